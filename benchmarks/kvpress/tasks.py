"""kvpress's answers to tasks of the evaluation kit, one after the other, graded and kept by the kit.

They stand in its folder of results under names like "kvpress AdaKV(SnapKV)", and `kara-hf report` shows them next to
others. A budget is the share of the tokens that is kept, so `kara-hf evaluate --equal tokens` goes beside it. "before":
the press cuts the whole prompt, or Decoding(...) keeps that share of the prompt and the expected answer together.
"after": the press cuts the context. Bytes are those really held: AdaKV frees none, and Decoding(...) holds the prompt
until its first cut.
"""

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from ..common.case import Job, register
from ..common.console import console
from ..common.environment import KVPRESS, TORCH, environment, run_worker, source_of
from ..common.models import TINY
from ..common.rows import Row
from ..common.run import Run
from ..quality.kit import COLUMNS, RESULTS, evaluator_of, folder_of, rows_of, shared_settings_of, tasks_of
from .speed import WORKER
from .worker import decodes

RULES = ("before", "after")
METHODS = ("full", "SnapKV", "AdaKV(SnapKV)", "Decoding(SnapKV)", "Decoding(Knorm)")


@register(
    "kvpress.tasks",
    "kvpress's answers to tasks of the evaluation kit",
    COLUMNS,
    sizes={
        "model": "",
        "tasks": "trace:generated=300",
        "methods": METHODS,
        "budgets": (0.5, 0.25, 0.125, 0.0625),
        "rules": ("before",),
        "n": 200,
        "out": str(RESULTS),
        "env": str(KVPRESS.folder),
        "torch_package": TORCH,
    },
    smoke={"n": 2, "tasks": "trace:generated=48", "budgets": (0.5,)},
    device="any",
    keep=False,
)
def task_jobs(
    run: Run,
    model: str,
    tasks: str,
    methods: list[str],
    budgets: list[float],
    rules: list[str],
    n: int,
    out: str,
    env: str,
    torch_package: str,
) -> Iterator[Job]:
    cells = cells_of(methods, budgets, rules)
    python = environment(KVPRESS, Path(env).absolute(), torch_package)
    evaluator = evaluator_of(model, device="cpu")  # it reads prompts and grades, the worker generates
    for task in tasks_of(tasks, evaluator.tokenizer):
        measure = partial(measured, run, python, evaluator, task, cells, model, n, out)
        yield Job({"model": evaluator.name, "task": task.name}, measure, source=source_of(KVPRESS, python))


def cells_of(methods: Sequence[str], budgets: Sequence[float], rules: Sequence[str]) -> list[Row]:
    """Method, rule and budget of everything that is measured of a task.

    Raises:
        ValueError: a budget is no share, or a rule is not one that kvpress can follow.
    """
    if not set(rules) <= set(RULES):
        raise ValueError(f"rules={';'.join(rules)!r} is not possible: rules must be of {', '.join(RULES)}")
    if not all(0 < share <= 1 for share in budgets):
        raise ValueError(f"budgets={list(budgets)} is not possible: budgets must be shares in (0, 1]")
    cells: list[Row] = [{"method": "full", "rule": "none", "budget": 1.0}] if "full" in methods else []
    for rule in rules:
        able = [name for name in methods if name != "full" and not (rule == "after" and decodes(name))]
        cells += [{"method": name, "rule": rule, "budget": share} for share in budgets for name in able]
    return cells


def measured(
    run: Run, python: Path, evaluator: Any, task: Any, cells: list[Row], model: str, n: int, out: str
) -> list[Row]:
    """Has the cells answered, and gives a row for each; compared with the full cache."""
    with folder_of(out, run.smoke) as folder:
        answer_task(python, evaluator, task, cells, model, n, folder)
        names = [f"kvpress {cell['method']}" for cell in cells]
        return rows_of(folder, task.name, names, names[0])


def answer_task(python: Path, evaluator: Any, task: Any, cells: list[Row], model: str, n: int, out: Path) -> None:
    """Has what is not in `out` already answered by the worker, and appends each answer as it comes.

    Raises:
        ValueError: the task does not fit the model or the rules.
    """
    from kara_hf.evaluation.measure.evaluator import Answers

    prompts = [evaluator.prompt(task, i) for i in range(n if task.size is None else min(n, task.size))]
    if not prompts[0].question and any(cell["rule"] == "after" for cell in cells):
        raise ValueError(f"task {task.name!r} has no question apart from its context; leave out the rule 'after'")
    job = job_for(evaluator, model)
    files = files_of(
        evaluator,
        task,
        cells,
        model,
        out,
        source_of(KVPRESS, python, job["device"], job["threads"]) | {"dtype": job["dtype"]},
    )
    lacking = [
        cell | {"missing": [i for i in range(len(prompts)) if i not in file.done]}
        for cell, file in zip(cells, files, strict=True)
    ]
    total = sum(len(cell["missing"]) for cell in lacking)
    if not total:
        return
    job |= {"cells": lacking, "examples": [as_asked(prompt, evaluator.tokenizer) for prompt in prompts]}
    with tempfile.TemporaryDirectory() as scratch:
        rows = run_worker(python, Path(scratch), job, WORKER)
        for row in track(rows, description=task.name, total=total, console=console, transient=True):
            place, prompt = row.pop("cell"), prompts[row.pop("number")]
            answer = Answers(**row | {"tokens": [row["tokens"]], "allocated_bytes": math.nan})
            files[place].append(evaluator.lines([prompt], answer, prompt.example.max_new_tokens, True))


def job_for(evaluator: Any, model: str) -> Row:
    """What the worker needs to know of the model. The bundled one is too small for several threads."""
    from kara_hf.integration.loading import find_device

    skeleton = shared_settings_of(model)
    return {
        "kind": "tasks",
        "device": str(find_device(None)),
        "threads": torch.get_num_threads() if model else 1,
        "model": model or str(TINY),
        "dtype": str(evaluator.model.dtype).removeprefix("torch."),
        "ends": sorted(evaluator.ends),
        "window": skeleton.observation,
        "interval": skeleton.window,
    }


def files_of(evaluator: Any, task: Any, cells: list[Row], model: str, out: Path, source: Row) -> list[Any]:
    """The kit's file of each cell."""
    from kara_hf.evaluation.measure.results import Cell, CellFile

    files = []
    for cell in cells:
        key = (task.name, cell["rule"], f"kvpress {cell['method']}", cell["budget"], "tokens", 0)
        settings = {"share": cell["budget"], "batch": 1, "skeleton": asdict(shared_settings_of(model))}
        files.append(CellFile(out, Cell(evaluator.name, evaluator.weights, *key), settings, source))
    return files


def as_asked(prompt: Any, tokenizer: Any) -> Row:
    """An example as the worker reads it, which has no tokenizer; `expected` is how long its answer should be."""
    example, expected = prompt.example, prompt.example.max_new_tokens
    if example.reference is not None:
        solution = tokenizer(example.reference, add_special_tokens=False)["input_ids"]
        expected = min(expected, len(solution) + 1)
    return {
        "context": prompt.context,
        "question": prompt.question,
        "room": example.max_new_tokens,
        "expected": expected,
    }
