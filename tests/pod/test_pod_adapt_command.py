"""`kara-hf pod adapt`, its example, and several processes."""

import importlib.util
import json
import socket
from pathlib import Path

import pytest
from support.pod_training import LENGTH, QUICK, SHARED, adapt_as_process, build_model, numbers, read
from torch.multiprocessing import start_processes
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from kara_hf import PoDCache, PoDSharing
from kara_hf.bundled import BUNDLED_MODEL
from kara_hf.cli.app import app
from kara_hf.pod.adapt import AdaptConfig, adapt
from kara_hf.pod.training import Training

ROOT = Path(__file__).resolve().parents[2]


class Killed(BaseException):
    pass


def invoke(*args):
    return CliRunner().invoke(app, ["pod", "adapt", *map(str, args)], env={"COLUMNS": "100", "NO_COLOR": "1"})


def test_the_command_adapts_the_bundled_model_and_resumes(tmp_path, monkeypatch):
    from peft import PeftModel

    sharing = PoDSharing(lead=((0, 0), (0, 0), (2, 2), (2, 2)), sinks=4, recent=28)
    sharing.save_pretrained(tmp_path / "sharing")
    options = ["--sharing", tmp_path / "sharing", "--out", tmp_path / "out", "--length", 128, "--steps", 3]
    options += ["--lr", 1e-3, "--rank", 4, "--targets", "q_proj, k_proj", "--distill", 0.5, "--batch", 2]
    options += ["--held-out", 2, "--held-out-split", "test", "--save-every", 1, "--clip", 0]
    options += ["--teacher", tmp_path / "teacher", "--top-k", 4]
    steps = Training.take_step

    def killed(self):
        if self.step == 2:
            raise Killed
        return steps(self)

    monkeypatch.setattr(Training, "take_step", killed)
    with pytest.raises(Killed):
        CliRunner().invoke(app, ["pod", "adapt", *map(str, options)], catch_exceptions=False)
    monkeypatch.setattr(Training, "take_step", steps)
    result = invoke(*options)
    assert result.exit_code == 2 and "has the checkpoint of a run that was killed" in result.stderr
    result = invoke(*options, "--resume")
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if line.startswith("Loss of a held-out token")]
    assert [line.split(", ")[1].split(":")[0] for line in lines] == ["unshared", "shared", "adapted"]
    assert [row["step"] for row in read(tmp_path / "out" / "metrics.jsonl")] == [1, 2, 3]
    settings = json.loads((tmp_path / "out" / "pod_adapt.json").read_text())["config"]
    assert len(list((tmp_path / "teacher").glob("*.safetensors"))) == 6
    assert settings["targets"] == ["q_proj", "k_proj"] and settings["clip"] is None and settings["learn_after"] == ">"
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL), str(tmp_path / "out"))
    assert PoDCache(loaded, PoDSharing.from_pretrained(tmp_path / "out")) is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--length", 32], "Error: samples of 32 tokens are not possible: with sinks=4 and recent=28"),
        (["--model", "somewhere"], "--model somewhere --data TEXT"),
        (["--steps", 0], "Error: steps=0 is not possible"),
        (["--learn-after", "no such token"], "Error: learn_after='no such token' is not possible"),
        (["--resume"], "Error: there is no checkpoint in"),
        (["--log", "paper"], "Error: log='paper' is not possible"),
        (["--dtype", "int8"], "Error: dtype='int8' is not possible"),
        (["--full", "--dtype", "bfloat16"], "Error: training all weights in torch.bfloat16 is not possible"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else "",
)
def test_the_command_refuses_in_one_line(tmp_path, options, message):
    PoDSharing(lead=((0, 0), (0, 0), (2, 2), (2, 2)), sinks=4, recent=28).save_pretrained(tmp_path)
    result = invoke("--sharing", tmp_path, "--out", tmp_path / "out", "--length", 128, *options)
    assert result.exit_code == 2
    assert message in result.stderr.splitlines()[-1] and not (tmp_path / "out").exists()


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("script_adapt_pod", ROOT / "examples" / "adapt_pod.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    PoDSharing(lead=((0, 0), (0, 0), (2, 2), (2, 2)), sinks=4, recent=28).save_pretrained(tmp_path)
    module.main(BUNDLED_MODEL.as_posix(), "problems:recall=1", tmp_path / "out", str(tmp_path), length=96, steps=2)
    assert "loss of a held-out token, adapted model: " in capsys.readouterr().out
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_two_processes_train_as_one_with_twice_the_batch(tmp_path):
    settings = QUICK | {"distill": 0.5, "held_out": 3, "accumulate": 2}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (2, port, settings | {"save_every": 2}, tmp_path / "two")
    start_processes(adapt_as_process, arguments, nprocs=2, start_method="fork")
    config = AdaptConfig(**settings | {"batch": 2})
    one = adapt(build_model(), SHARED, numbers(9), config, tmp_path / "one")
    rows = read(tmp_path / "two" / "metrics.jsonl")
    assert [row["loss"] for row in rows] == pytest.approx(one.losses, rel=1e-4)
    assert [row["tokens"] for row in rows] == [4 * LENGTH * step for step in range(1, 5)]
    two = json.loads((tmp_path / "two" / "pod_adapt.json").read_text())
    assert two["held_out_loss"] == pytest.approx(one.held_out, rel=1e-4)
