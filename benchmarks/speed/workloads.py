"""Whole requests while serving, with any model: engine steps, latencies and right answers in a pool of fixed bytes.

A workload is a task of the evaluation kit: few-shot problems, long documents with short answers, short prompts with
long traces. All requests come at once, and the pool has blocks for a few whole ones. The engine alone runs as its users
run it, and once more without shared prefixes; asynchronous batching and CUDA graphs, which are refused beside Kara, are
off on a CPU anyway. Time of the CPU is disturbed less by other work on the machine; latencies are of the clock.
"""

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from transformers import ContinuousBatchingConfig

from ..common.case import Job, register
from ..common.rows import Row
from ..common.run import Run
from ..quality.kit import evaluator_of, tasks_of
from .serving import PAGE, Counted, can_serve

QUARTER: Row = {"retention": 0.25, "window": 64, "period": 16}
# Settings of Kara, None for the engine alone, and of the engine.
METHODS: dict[str, tuple[Row | None, Row]] = {
    "engine alone": (None, {}),
    "engine alone, nothing shared": (None, {"allow_block_sharing": False}),
    "Kara, 25 %": (QUARTER, {}),
    "Kara, 25 %, 128 at least": (QUARTER | {"min_cache_tokens": 128}, {}),
    "Kara, 50 %, 128 at least": (QUARTER | {"retention": 0.5, "min_cache_tokens": 128}, {}),
    "Kara, 25 %, prompts too": (QUARTER | {"prompt_retention": 0.25}, {}),
    "Kara, 50 %, prompts too": (QUARTER | {"retention": 0.5, "prompt_retention": 0.5}, {}),
    "random, 25 %": (QUARTER | {"score": "random"}, {}),
    "random, 25 %, 128 at least": (QUARTER | {"score": "random", "min_cache_tokens": 128}, {}),
}
TASKS = "trace:generated=300"


@register(
    "workloads",
    "whole requests while serving: steps, latencies and right answers in a pool of fixed bytes",
    [
        ("task", "{task}"),
        ("method", "{method}"),
        ("steps", "{steps:,}"),
        ("running", "{running:.1f}"),
        ("right", "{right:.0%}, {difference:+.0%} ({low:+.0%} to {high:+.0%})"),
        ("solved per CPU s", "{solved:.3f}"),
        ("first token, s", "{first_50:.1f}, 99 %: {first_99:.1f}"),
        ("between, s", "{between_50:.2f}, 99 %: {between_99:.2f}"),
    ],
    sizes={"model": "", "tasks": TASKS, "requests": 32, "sequences": 6, "methods": tuple(METHODS)},
    smoke={
        "tasks": "trace:generated=48",
        "requests": 4,
        "sequences": 2,
        "methods": ("engine alone", "Kara, 25 %, prompts too"),
    },
)
def workload_jobs(
    run: Run, model: str, tasks: str, requests: int, sequences: int, methods: Sequence[str]
) -> Iterator[Job]:
    unknown = sorted(set(methods) - set(METHODS))
    if unknown:
        raise ValueError(f"methods={unknown} are not there; choose from {'; '.join(METHODS)}")
    can_serve()
    evaluator = evaluator_of(model, device=str(run.device), dtype=run.dtype_name)
    for task in tasks_of(tasks, evaluator.tokenizer):
        labels = {"model": evaluator.name, "task": task.name, "requests": requests, "sequences": sequences}
        for name in methods:
            measure = partial(served, run, evaluator, task, labels | {"method": methods[0]}, name)
            yield Job(labels | {"method": name}, measure)


def served(run: Run, evaluator: Any, task: Any, first: Row, name: str) -> Row:
    """What a method does with the requests, and what it answers right beside the row labelled `first`."""
    from kara_hf.evaluation.report.statistics import compare

    prompts = [evaluator.prompt(task, number) for number in range(first["requests"])]
    longest = max(len(prompt.ids) + prompt.example.max_new_tokens for prompt in prompts)
    row = answered(evaluator, prompts, *METHODS[name], blocks=first["sequences"] * -(-longest // PAGE))
    known = (row for row in run.rows if first.items() <= row.items())
    beside = compare(pd.Series(row["scores"]), pd.Series(next(known, row)["scores"]))
    assert beside is not None
    return row | {"difference": beside.value, "low": beside.low, "high": beside.high}


def answered(evaluator: Any, prompts: Sequence[Any], kara: Row | None, of_engine: Row, blocks: int) -> Row:
    """Answers all `prompts` at once in a pool of `blocks`."""
    from kara_hf.integration.generation import greedy
    from kara_hf.serving import kara_continuous_batching

    model, tokenizer = evaluator.model, evaluator.tokenizer
    config = greedy(model, tokenizer, max_new_tokens=max(prompt.example.max_new_tokens for prompt in prompts))
    engine: Any = Counted(model) if kara is None else kara_continuous_batching(model, **kara)
    with engine as serving:
        begun, start = time.process_time(), time.perf_counter()
        results = model.generate_batch(
            [prompt.ids for prompt in prompts],
            generation_config=config,
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE, num_blocks=blocks, max_batch_tokens=1024, **of_engine
            ),
            record_timestamps=True,
        )
        cpu, seconds = time.process_time() - begun, time.perf_counter() - start
    outputs = list(results.values())
    errors = [output.error for output in outputs if output.error is not None]
    if errors or len(outputs) < len(prompts):
        raise RuntimeError(f"{len(outputs)} of {len(prompts)} requests came back, and of these failed: {errors}")
    metrics = serving if kara is None else serving.metrics
    texts = [tokenizer.decode(output.generated_tokens, skip_special_tokens=True) for output in outputs]
    scores = [float(prompt.example.score(text)) for prompt, text in zip(prompts, texts, strict=True)]
    first = [output.timestamps[0] - start for output in outputs]
    between = np.concatenate([np.diff(output.timestamps) for output in outputs])
    quantiles = {
        f"{name}_{part}": float(np.percentile(values, part))
        for name, values in (("first", first), ("between", between))
        for part in (50, 99)
    }
    return quantiles | {
        "settings_of_kara": kara,
        "scores": scores,
        "right": float(np.mean(scores)),
        "solved": sum(scores) / cpu,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "tokens": sum(len(output.generated_tokens) for output in outputs),
        "prompt_tokens": sum(len(prompt.ids) for prompt in prompts),
        "steps": metrics.steps,
        "running": metrics.mean_running,
        "preemptions": metrics.preemptions,
        "computed": metrics.computed_tokens,
        "blocks": blocks,
        "weights": evaluator.weights,
    }
