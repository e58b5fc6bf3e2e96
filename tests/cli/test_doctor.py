"""`kara-hf doctor`: what is there, what is missing for which command, and what to do."""

from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from kara_hf import __version__
from kara_hf.cli import doctor
from kara_hf.cli.app import app


def invoke():
    return CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "160", "NO_COLOR": "1"})


def line_of(output, command):
    return next(line for line in output.splitlines() if command in line)


def test_all_is_there():
    result = invoke()
    assert result.exit_code == 0, result.output
    assert (
        result.output.startswith(f"kara_hf {__version__}, Python 3.")
        and torch.__version__.split("+")[0] in result.output
    )
    assert "Attention: plain torch on the CPU" in result.output or "on NVIDIA" in result.output
    assert all("ready" in line_of(result.output, names) for names in doctor.NEEDS)


@pytest.fixture
def having(monkeypatch):
    """Pretends that packages have these versions; None: that they are not installed."""
    true = doctor.version

    def pretend(**versions):
        def version(name):
            if versions.get(name, "") is None:
                raise PackageNotFoundError(name)
            return versions.get(name) or true(name)

        monkeypatch.setattr(doctor, "version", version)

    return pretend


def test_what_an_extra_would_bring_is_named_with_the_remedy(having):
    having(gradio=None, peft="0.1.0")
    result = invoke()
    assert result.exit_code == 0
    assert "gradio is not installed" in (demo := line_of(result.output, "│ demo")) and "kara_hf[demo]" in demo
    assert "peft 0.1.0 is not >=" in (adapt := line_of(result.output, "pod adapt")) and "kara_hf[train]" in adapt
    assert "ready" in line_of(result.output, "generate")


def test_a_transformers_that_is_too_old_stops_everything(having):
    having(transformers="5.16.1")
    result = invoke()
    assert result.exit_code == 1
    assert "transformers 5.16.1 is not" in line_of(result.output, "generate")
    having(transformers="5.20.0")
    result = invoke()
    assert result.exit_code == 0 and "ready" in line_of(result.output, "generate")
    assert "transformers 5.20.0 is not" in line_of(result.output, "│ serve")


@pytest.mark.parametrize(
    ("kernels", "asked", "said"),
    [
        (True, None, "Triton kernels on a card, compute capability 9.0"),
        (False, "reference", "plain torch on a card, compute capability 9.0, as KARA_BACKEND=reference says"),
        (
            RuntimeError("KARA_BACKEND=triton, but triton is not installed"),
            "triton",
            "but triton is not installed (a card",
        ),
    ],
)
def test_what_runs_on_a_gpu(monkeypatch, kernels, asked, said):
    cuda = SimpleNamespace(
        is_available=lambda: True, get_device_name=lambda: "a card", get_device_capability=lambda: (9, 0)
    )

    def use_triton(tensor, size):
        if isinstance(kernels, Exception):
            raise kernels
        return kernels

    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch, "empty", lambda *size, **where: None)
    monkeypatch.setattr("kara_hf.kernels.backend.use_triton", use_triton)
    monkeypatch.delenv("KARA_BACKEND", raising=False)
    if asked:
        monkeypatch.setenv("KARA_BACKEND", asked)
    assert said in doctor.backend()
