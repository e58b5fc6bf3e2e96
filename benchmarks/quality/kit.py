"""The evaluation kit as benchmarks use it: an evaluator for a model, tasks by name, and rows of what was answered."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..common.console import console
from ..common.models import TINY
from ..common.rows import ROOT, Row

if TYPE_CHECKING:
    from kara_hf.evaluation.measure.evaluator import Evaluator
    from kara_hf.methods.registry import SharedSettings
    from kara_hf.tasks.task import Task

RESULTS = ROOT / "runs" / "quality"
BUNDLED_SKELETON: Row = {"window": 64, "block_size": 4, "observation": 8}  # the bundled models know short texts alone
COLUMNS = [
    ("task", "{task}"),
    ("compressed", "{rule}"),
    ("method", "{method}"),
    ("budget", "{budget:.1%}"),
    ("score", "{score:.1%} ({low:.0%} to {high:.0%})"),
    ("held / full", "{resident:.0%}"),
]


def evaluator_of(model: str = "", device: str | None = None, dtype: str = "auto") -> "Evaluator":
    """An evaluator for a hub id or folder; for the bundled model if that is empty."""
    from kara_hf.evaluation.measure.evaluator import Evaluator
    from kara_hf.evaluation.measure.identity import weights_of
    from kara_hf.integration.loading import LoadedModel

    if not model:
        torch.set_num_threads(1)  # it is too small for several
    runner = LoadedModel(model or str(TINY), device=device, dtype=dtype)
    runner.tokenizer.padding_side = "left"
    weights = weights_of(runner.model, model or str(TINY))
    return Evaluator(runner.model, runner.tokenizer, name=runner.name, weights=weights, limit=runner.limit)


def shared_settings_of(model: str) -> "SharedSettings":
    """What is the same for all methods: the kit's own, or what fits the bundled models."""
    from kara_hf.methods.registry import SharedSettings

    return SharedSettings(**BUNDLED_SKELETON if not model or Path(model).is_relative_to(TINY.parent) else {})


def tasks_of(names: str, tokenizer: Any) -> "list[Task]":
    """Tasks by their names, separated by commas. Raises ValueError if there is no such task."""
    from kara_hf.tasks import english, published, reasoner_tasks  # noqa: F401  they register their tasks
    from kara_hf.tasks.task import make_task

    return [make_task(name.strip(), tokenizer) for name in names.split(",")]


@contextmanager
def folder_of(out: str, smoke: bool) -> Iterator[Path]:
    """Where answers go: of a smoke run to a folder that is gone afterwards."""
    if not smoke:
        yield Path(out)
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)
    console.print("answers of a smoke run are gone")


def rows_of(folder: Path, task: str, methods: Sequence[str], reference: str) -> list[Row]:
    """What the folder says of these methods at a task, a row for each budget, beside the reference."""
    from kara_hf.evaluation.measure.results import load
    from kara_hf.evaluation.report.statistics import summarise

    frame = load(folder)
    frame = frame[(frame["task"] == task) & frame["method"].isin(methods)]
    return summarise(frame, reference).to_dict("records")
