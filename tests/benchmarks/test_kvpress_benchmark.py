"""kvpress beside this package: its environment, its presses, and its answers among those of the kit."""

import ast
import json
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import resolve_name
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.common import environment as environment_module
from benchmarks.common.environment import KVPRESS, TORCH
from benchmarks.kvpress import tasks, worker
from benchmarks.quality import kit
from kara_hf.evaluation.measure.evaluator import Request
from kara_hf.evaluation.measure.results import load
from kara_hf.methods.registry import METHODS

ROOT = Path(__file__).parents[2]
ORIGIN = {"command": "python -m benchmarks run kvpress", "device": "a CPU", "threads": 1, "date": "2026-01-02"}


def test_an_environment_does_not_take_a_folder_that_is_something_else(tmp_path, monkeypatch):
    monkeypatch.setattr(
        environment_module.subprocess, "run", lambda *args, **kwargs: pytest.fail("nothing may be installed here")
    )
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and no environment"):
        environment_module.environment(KVPRESS, tmp_path)
    (tmp_path / "installed.json").write_text(json.dumps([TORCH, *KVPRESS.packages]))
    assert environment_module.environment(KVPRESS, tmp_path) == tmp_path / "bin" / "python"


def test_an_environment_is_finished_only_when_everything_is_installed(tmp_path, monkeypatch):
    calls = []

    def run(command, check):
        calls.append(command)
        if len(calls) == 3:
            raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(environment_module.subprocess, "run", run)
    with pytest.raises(subprocess.CalledProcessError):
        environment_module.environment(KVPRESS, tmp_path / "env", "torch==1")
    assert calls[1][-1] == "torch==1" and calls[2][-len(KVPRESS.packages) - 1 :] == ["torch==1", *KVPRESS.packages]
    assert not (tmp_path / "env" / "installed.json").exists()


def test_cells_are_what_kvpress_can_do():
    cells = tasks.cells_of(["full", "SnapKV", "Decoding(Knorm)"], [0.5, 0.25], ["before", "after"])
    assert [(cell["method"], cell["rule"], cell["budget"]) for cell in cells] == [
        ("full", "none", 1.0),
        ("SnapKV", "before", 0.5),
        ("Decoding(Knorm)", "before", 0.5),
        ("SnapKV", "before", 0.25),
        ("Decoding(Knorm)", "before", 0.25),
        ("SnapKV", "after", 0.5),
        ("SnapKV", "after", 0.25),
    ]
    with pytest.raises(ValueError, match="rules must be of before, after"):
        tasks.cells_of(["full"], [0.5], ["pinned"])
    with pytest.raises(ValueError, match="budgets must be shares"):
        tasks.cells_of(["full"], [1.5], ["before"])


@dataclass
class SnapKVPress:
    window_size: int = 64
    compression_ratio: float = 0.0


@dataclass
class AdaKVPress:
    press: SnapKVPress
    compression_ratio: float = 0.0


@dataclass
class DecodingPress:
    base_press: SnapKVPress
    compression_interval: int = 512
    target_size: int = 2048


@dataclass
class ComposedPress:
    pass


@pytest.fixture
def kvpress(monkeypatch):
    """What the worker imports in its environment."""
    kinds = (SnapKVPress, AdaKVPress, DecodingPress, ComposedPress)
    monkeypatch.setitem(sys.modules, "kvpress", SimpleNamespace(**{kind.__name__: kind for kind in kinds}))
    monkeypatch.setattr(worker, "version", lambda name: "0.5.5")


def test_a_press_is_made_by_its_name_for_a_share(kvpress):
    settings = {"window": 8, "interval": 32}
    assert worker.press_of("full", 1.0, 100, settings) is None
    assert worker.press_of("SnapKV", 0.25, 100, settings) == SnapKVPress(8, 0.75)
    assert worker.press_of("AdaKV(SnapKV)", 0.25, 100, settings) == AdaKVPress(SnapKVPress(8), 0.75)
    assert worker.press_of("Decoding(SnapKV)", 0.25, 100, settings) == DecodingPress(SnapKVPress(8), 32, 25)
    with pytest.raises(ValueError, match="kvpress 0.5.5 has no SnapPress"):
        worker.press_of("AdaKV(Snap)", 0.5, 100, settings)
    with pytest.raises(ValueError, match="'Composed' is not possible: it has no compression_ratio"):
        worker.press_of("Composed", 0.5, 100, settings)


@dataclass
class Newest:
    """A press that keeps a prompt's newest tokens."""

    compression_ratio: float

    @contextmanager
    def __call__(self, model):
        def cut(module, arguments, settings, output):
            cache = settings.get("cache", settings.get("past_key_values"))  # its name depends on the version
            layer = cache.layers[module.layer_idx]
            kept = round(layer.keys.shape[2] * (1 - self.compression_ratio))
            layer.keys, layer.values = layer.keys[:, :, -kept:].clone(), layer.values[:, :, -kept:].clone()

        hooks = [layer.self_attn.register_forward_hook(cut, with_kwargs=True) for layer in model.model.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@pytest.fixture
def without_worker(monkeypatch):
    """The worker's part done here, by a press of this file; gives the jobs."""
    jobs = []

    def run_worker(python, folder, job, command):
        jobs.append(job)
        yield from worker.answers(job)

    monkeypatch.setattr(tasks, "run_worker", run_worker)
    monkeypatch.setattr(tasks, "source_of", lambda *_: dict(ORIGIN))
    monkeypatch.setattr(worker, "press_of", lambda method, share, *_: None if method == "full" else Newest(1 - share))
    return jobs


@pytest.fixture(scope="module")
def evaluator():
    return kit.evaluator_of(device="cpu")


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_answers_of_the_worker_are_results_of_the_kit(without_worker, evaluator, tmp_path):
    (task,) = kit.tasks_of("recall:length=160", evaluator.tokenizer)
    cells = tasks.cells_of(["full", "SnapKV"], [0.5], ["before", "after"])
    tasks.answer_task("python", evaluator, task, cells, "", 2, tmp_path)
    frame = load(tmp_path)
    assert list(zip(frame["rule"], frame["method"], frame["number"], strict=True)) == [
        (rule, f"kvpress {method}", number)
        for rule, method in (("none", "full"), ("query-agnostic", "SnapKV"), ("query-aware", "SnapKV"))
        for number in (0, 1)
    ]
    assert set(frame["equal"]) == {"tokens"} and frame["provenance"].iloc[0]["date"] == ORIGIN["date"]
    evaluator.measure(task, Request(methods=[METHODS["full"]], n=2, batch=1), tmp_path)
    frame = load(tmp_path)
    columns = ["number", "score", "generated", "prompt", "resident_bytes", "peak_bytes", "full_bytes", "text"]
    theirs, mine = (frame.loc[frame["method"] == name, columns].to_dict("list") for name in ("kvpress full", "full"))
    assert theirs == mine
    full, cut = (frame[frame["method"] == name] for name in ("kvpress full", "kvpress SnapKV"))
    assert cut["resident_bytes"].max() < 0.7 * full["resident_bytes"].min()
    assert (cut["peak_bytes"] > cut["resident_bytes"]).all()
    (row,) = kit.rows_of(tmp_path, task.name, ["kvpress full"], "kvpress full")
    assert row["method"] == "kvpress full" and row["n"] == 2 and row["score"] == full["score"].mean()


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_answers_that_are_there_are_not_asked_for_again(without_worker, evaluator, tmp_path):
    (task,) = kit.tasks_of("recall:length=160", evaluator.tokenizer)
    for n in (1, 2, 2):
        tasks.answer_task("python", evaluator, task, tasks.cells_of(["full"], [0.5], ["before"]), "", n, tmp_path)
    assert [job["cells"][0]["missing"] for job in without_worker] == [[0], [1]]
    assert list(load(tmp_path)["number"]) == [0, 1]


def test_a_task_without_a_question_cannot_have_it_after(evaluator, tmp_path):
    (task,) = kit.tasks_of("trace:generated=48", evaluator.tokenizer)
    cells = tasks.cells_of(["SnapKV"], [0.5], ["after"])
    if evaluator.prompt(task, 0).question:
        pytest.skip("traces have a question of their own")
    with pytest.raises(ValueError, match="no question apart from its context"):
        tasks.answer_task("python", evaluator, task, cells, "", 1, tmp_path)


def test_a_worker_that_fails_is_an_error_behind_what_it_found(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text("import json; print(json.dumps({'cell': 0})); raise SystemExit(3)")
    rows = environment_module.run_worker(sys.executable, tmp_path, {}, worker=[str(script)])
    assert next(rows) == {"cell": 0}
    with pytest.raises(subprocess.CalledProcessError):
        next(rows)


def test_the_worker_needs_nothing_of_this_package():
    """It runs where neither this package nor its Transformers can be imported."""
    todo, seen = ["benchmarks.kvpress.worker"], set()
    while todo:
        name = todo.pop()
        seen.add(name)
        package = name if (path := ROOT / name.replace(".", "/") / "__init__.py").exists() else name.rpartition(".")[0]
        path = path if path.exists() else ROOT / f"{name.replace('.', '/')}.py"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("kara_hf") for alias in node.names)
            if isinstance(node, ast.ImportFrom):
                assert node.level or not node.module.startswith(("kara_hf", "benchmarks"))
                if node.level:
                    found = resolve_name("." * node.level + (node.module or ""), package)
                    todo += {found, found.rpartition(".")[0]} - seen
    assert {"benchmarks.common.race", "benchmarks.common.console"} < seen and "benchmarks.common.rows" not in seen
