"""What a run needs is looked up before it starts, all of it, and named with what installs it."""

import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kara_hf.cli import app as cli
from kara_hf.methods.registry import METHODS
from kara_hf.methods.registry import needs_of as needs_of_method
from kara_hf.needs import Check, Package, check_needs, extra
from kara_hf.tasks.task import TASKS
from kara_hf.tasks.task import needs_of as needs_of_task

ROOT = Path(__file__).resolve().parents[1]
EVALUATE = r"run: pip install 'kara_hf[evaluate]'"


def without(monkeypatch, *modules):
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)


def refused(*args):
    done = CliRunner().invoke(cli.app, [*map(str, args)], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert done.exit_code == 2, done.output
    return " ".join(done.stderr.split())


def fail(error):
    raise error


# ------------------------------------------------------------------------------------------------- the mechanism
def test_all_that_is_missing_is_named_at_once_with_who_needs_it(monkeypatch):
    without(monkeypatch, "here.not", "nowhere")
    needs = {
        "one": [Package("nowhere", "pip install nowhere"), Package("json", "pip install json")],
        "two": [Package("nowhere", "pip install nowhere"), Package("here.not", extra("x"), name="here-not")],
        "": [Check(lambda: fail(OSError("there is no file.")))],
    }
    with pytest.raises(ImportError) as caught:
        check_needs(needs)
    assert str(caught.value) == (
        "one, two: nowhere is not installed; run: pip install nowhere. two: here-not is not installed; run: pip "
        "install 'kara_hf[x]'. there is no file"
    )


def test_what_is_no_package_is_a_value(monkeypatch):
    with pytest.raises(ValueError, match=r"^it: no such map$"):
        check_needs({"it": [Check(lambda: fail(ValueError("no such map")))]})
    check_needs({"it": [Check(lambda: None), Package("json", ""), Package("not_a_module|json", "")], "none": []})


# ---------------------------------------------------------------------------------------- evaluate, all together
def test_methods_tasks_and_files_of_an_evaluation_are_looked_up_together(monkeypatch, tmp_path):
    without(monkeypatch, "optimum.quanto", "kvpress", "math_verify", "jieba")
    monkeypatch.setattr(
        "kara_hf.integration.loading.LoadedModel", lambda *a, **k: fail(AssertionError("it was loaded"))
    )
    text = refused(
        "evaluate",
        *("--model", "some/model"),
        *("--methods", "full,quantized-4,quantized-2,press:SnapKVPress,pod"),
        *("--tasks", f"gsm8k:path={tmp_path / 'none.jsonl'},longbench-dureader,niah:haystack=nowhere"),
        *("--sharing", tmp_path / "map", "--out", tmp_path / "out"),
    )
    for part in (
        f"quantized-4, quantized-2: optimum-quanto is not installed; {EVALUATE}",
        "press:SnapKVPress: kvpress is not installed; run: pip install --no-deps kvpress",
        f"math-verify is not installed; {EVALUATE}",
        f"longbench-dureader: jieba is not installed; {EVALUATE}",
        "none.jsonl' is not there; give a file",
        "haystack='nowhere' is not there",
        "there is no",  # the map
    ):
        assert part in text, (part, text)
    assert not (tmp_path / "out").exists()


def test_the_kit_itself_looks_up_what_its_methods_need(monkeypatch, tmp_path):
    from kara_hf.evaluation.measure.request import Request

    without(monkeypatch, "optimum.quanto")
    request = Request([METHODS["full"], METHODS["quantized-4"]])
    with pytest.raises(ImportError, match="quantized-4: optimum-quanto is not installed"):
        check_needs(request.needs())


def test_several_processes_need_accelerate(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    without(monkeypatch, "accelerate")
    assert f"accelerate is not installed; {EVALUATE}" in refused("evaluate")


@pytest.mark.parametrize("log", ["tensorboard", "trackio"])
def test_an_adaptation_needs_its_tracker_and_its_data(log, monkeypatch, tmp_path):
    without(monkeypatch, "peft", "tensorboard", "tensorboardX", "trackio", "datasets")
    options = ["--model", "some/model", "--data", "owner/text", "--out", tmp_path, "--log", log]
    text = refused("pod", "adapt", "--sharing", tmp_path / "map", *options)
    for part in ("peft is not installed", f"run: pip install {log}", "datasets is not installed", "there is no"):
        assert part in text


def test_an_exploration_needs_its_data_and_its_picture(monkeypatch, tmp_path):
    without(monkeypatch, "datasets", "plotly")
    options = ["--model", "some/model", "--data", "owner/text", "--plot", tmp_path / "it.html", "--out", tmp_path]
    text = refused("pod", "explore", *options)
    assert (
        "datasets is not installed; run: pip install 'kara_hf[train]'" in text and "pip install 'kara_hf[plot]'" in text
    )


def test_a_report_needs_more(monkeypatch, tmp_path):
    without(monkeypatch, "pandas", "plotly", "scipy")
    text = refused("report", tmp_path)
    assert all(f"{name} is not installed; {EVALUATE}" in text for name in ("pandas", "plotly", "scipy"))


# -------------------------------------------------------------------------------------------------------- extras
def test_extras_bring_what_is_declared():
    """Whatever command a need names, that extra has the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {need for name in METHODS for need in needs_of_method(name)}
    declared |= {need for name in TASKS for need in needs_of_task(name)}
    for need in declared:
        assert isinstance(need, Package)
        brought = " ".join(project["optional-dependencies"]["evaluate"])
        assert need.install == extra("evaluate") and (need.name or need.module).replace("_", "-") in brought, need
