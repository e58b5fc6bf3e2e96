"""Races: caches that take turns step by step in one process, so that a busy machine slows all of them.

Needs torch and rich alone, so that another environment can use it too. Times are CPU times of one thread.
"""

import copy
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import track

from .console import console

FULL = "DynamicCache"


@dataclass
class Entry:
    """One cache in a race.

    Attributes:
        name: what it is called in rows.
        ids: its tokens, ``[B, prompt + steps]`` int64.
        prefill: takes the prompt ``[B, prompt]``.
        step: takes one token ``[B, 1]`` at a position.
        held: called without arguments, gives the bytes that the cache holds now.
        cache: what can be asked when the race is over.
    """

    name: str
    ids: torch.Tensor
    prefill: Callable[[torch.Tensor], Any]
    step: Callable[[torch.Tensor, int], Any]
    held: Any
    cache: Any = None


@dataclass
class Trace:
    """What was seen of one entry: seconds of CPU time, and bytes held after the prompt and after every step."""

    batch: int
    prefill: float = 0.0
    prompt_bytes: int = 0
    steps: list[float] = field(default_factory=list)
    held: list[int] = field(default_factory=list)


def cpu_seconds(work: Callable[..., Any], *arguments: Any) -> float:
    """CPU time of this process for one piece of work, which waiting for a busy core does not lengthen."""
    start = time.process_time()
    work(*arguments)
    return time.process_time() - start


@torch.no_grad()
def race(entries: list[Entry], prompt: int, what: str) -> list[Trace]:
    """Every cache takes the prompt, then one step after the other; who goes first changes from step to step."""
    order, traces = random.Random(0), [Trace(len(entry.ids)) for entry in entries]
    for entry, trace in zip(entries, traces, strict=True):
        trace.prefill = cpu_seconds(entry.prefill, entry.ids[:, :prompt])
        trace.prompt_bytes = entry.held()
    turns = list(zip(entries, traces, strict=True))
    steps = entries[0].ids.shape[1] - prompt
    for position in track(range(prompt, prompt + steps), description=what, console=console, transient=True):
        for entry, trace in order.sample(turns, len(turns)):
            trace.steps.append(cpu_seconds(entry.step, entry.ids[:, position : position + 1], position))
            trace.held.append(entry.held())
    return traces


def timing(runs: list[Trace], base: list[Trace]) -> dict[str, Any]:
    """Numbers of an entry from one or more runs of the same race, beside those of the entry it is compared with.

    Of every step the median over the runs counts: what a step always does stays, and what disturbed it once does not.
    The first step is the one in which a prompt is cut, if it is cut while decoding; it is part of the loop.
    """
    mine, other = (
        [statistics.median(times) for times in zip(*(trace.steps for trace in traces), strict=True)]
        for traces in (runs, base)
    )
    batch, share = runs[0].batch, runs[0].batch / base[0].batch
    speedups = [share * sum(b.steps) / sum(r.steps) for r, b in zip(runs, base, strict=True)]
    held = runs[0].held
    return {
        "batch": batch,
        "steps": len(mine),
        "repeats": len(runs),
        "tokens_per_s": batch * len(mine) / sum(mine),
        "speedup": share * sum(other) / sum(mine),
        "speedup_low": min(speedups),
        "speedup_high": max(speedups),
        "step_time_ratio": statistics.median(m / o for m, o in zip(mine[1:], other[1:], strict=True)),
        "step_ms": 1e3 * statistics.median(mine[1:]),
        "first_step_ms": 1e3 * mine[0],
        "worst_step_ms": 1e3 * max(mine[1:]),
        "prefill_ms": 1e3 * statistics.median(t.prefill for t in runs),
        "prompt_bytes": runs[0].prompt_bytes,
        "mean_bytes": round(statistics.mean(held)),
        "most_bytes": max(held),
        "last_bytes": held[-1],
    }


def dense_bytes(cache: Any) -> int:
    """Bytes of the keys and values of a DynamicCache."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def twin(model: Any) -> Any:
    """A model of its own modules and hooks, on the same weights."""
    return copy.deepcopy(model, {id(weight): weight for weight in (*model.parameters(), *model.buffers())})


def step(model: Any, cache: Any, token: torch.Tensor, position: int) -> None:
    """One decode step."""
    positions = torch.full_like(token, position)
    model(input_ids=token, past_key_values=cache, use_cache=True, position_ids=positions)


def tokens(prompt: int, new: int, batch: int = 1) -> torch.Tensor:
    """Random tokens, ``[batch, prompt + new - 1]``: the first new one comes from the prompt, the last is not read."""
    return torch.randint(0, 1024, (batch, prompt + new - 1), generator=torch.Generator().manual_seed(0))


def case_name(prompt: int, new: int) -> str:
    return f"{prompt} + {new}"
