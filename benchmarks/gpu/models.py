"""Whole models: decode speed, memory and the largest batch."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..common.case import Job, register
from ..common.rows import Row
from ..common.run import Run, Skip, spread
from ..common.table import GIB
from .aims import LONG, SHORT, aims
from .shapes import (
    FULL,
    KARA,
    KARA_GRAPH,
    LLAMA,
    QWEN,
    STATIC,
    Kind,
    attached,
    batch_of,
    cache_bytes,
    lead_of,
    new_cache,
    prefilled,
    settings,
    the_model,
    tokens_seen,
)
from .small_model import has_graphs

MIDDLE = 16 * 1024
TAIL, WARM = 24, 8  # steps after a compression, and those that count for nothing
AFTER = 4  # steps that may pay for a compression: its own, and those behind it that capture a graph anew
WHOLE_WINDOW_SECONDS = 6.0  # a whole window is timed where it takes no longer
LIMIT_GIB = 24.0
DECODE = [
    ("model", "{model}"),
    ("tokens seen", "{seen:,}"),
    ("batch", "{batch}"),
    ("cache", "{what}"),
    ("ms per step", "{step_ms:.2f}"),
    ("tokens/s", "{tokens_per_s:,.0f}"),
    ("compression, share of time", "{compression_share:.1%}"),
    ("allocated / nominal", "{allocated_of_nominal:.1%}"),
    ("peak GiB", "{peak_gib:.1f}"),
]


@register(
    "gpu.decode",
    "tokens/s and memory of a whole model with DynamicCache and KaraCache",
    DECODE,
    device="cuda",
    until=0.7,
    aims=aims,
)
def decode_jobs(run: Run) -> list[Job]:
    """The comparison that matters most: one model, KaraCache at 0.2 with and without graphs, and the full cache."""
    main = (KARA_GRAPH, KARA, FULL)
    if run.smoke:
        return grid(run, LLAMA, 96, (2,), main)
    found = grid(run, LLAMA, LONG, (16, 1, 8, 64), main) + grid(run, LLAMA, SHORT, (16, 64, 1), main)
    return found + grid(run, LLAMA, MIDDLE, (16,), main)


@register(
    "gpu.pod",
    "decode steps of PoDCache with groups of layers that share keys, against the same cache without",
    [*DECODE[:4], ("followers", "{followers:.0%}"), *DECODE[4:6], ("GiB held", "{resident_gib:.2f}"), *DECODE[7:]],
    device="cuda",
    until=0.86,
    aims=aims,
)
def pod_jobs(run: Run) -> list[Job]:
    """One model with no, half and three quarters of its layers following another; then with graphs."""
    if run.smoke:
        return grid(run, LLAMA, 96, (2,), (Kind(group=2), Kind(group=1)))
    kinds = tuple(Kind(group=group) for group in (4, 1, 2))
    graphs = tuple(Kind(group=group, graph=True) for group in (4, 1))
    return (
        grid(run, LLAMA, LONG, (8, 1), kinds)
        + grid(run, LLAMA, MIDDLE, (8,), kinds)
        + grid(run, LLAMA, LONG, (8, 1), graphs)
    )


@register(
    "gpu.more",
    "other retentions, StaticCache with torch.compile, a whole generate, and a second model",
    DECODE,
    device="cuda",
    until=1.0,
    aims=aims,
)
def more_jobs(run: Run) -> list[Job]:
    """Other retentions, StaticCache, a whole `generate`, and a second model."""
    kinds = (Kind(0.5, True), Kind(1.0, True), Kind(0.5), Kind(1.0))
    if run.smoke:
        found = grid(run, LLAMA, 96, (2,), (Kind(0.5), Kind(1.0), STATIC))
        return found + generate_jobs(run, KARA) + grid(run, QWEN, 96, (2,), (KARA_GRAPH, KARA, FULL))
    found = generate_jobs(run, KARA_GRAPH if has_graphs() else KARA)
    found += grid(run, LLAMA, LONG, (1,), (STATIC,)) + grid(run, LLAMA, LONG, (16, 1), kinds)
    found += grid(run, QWEN, LONG, (16, 1, 8, 64), (KARA_GRAPH, KARA, FULL))
    found += grid(run, LLAMA, SHORT, (16,), (STATIC, *kinds)) + generate_jobs(run, FULL)
    return found + grid(run, QWEN, SHORT, (16, 64, 1), (KARA_GRAPH, KARA, FULL))


@register(
    "gpu.limit",
    "the largest batch within a limit on memory beside the weights",
    [
        ("tokens", "{length:,}"),
        ("cache", "{what}"),
        ("limit GiB", "{limit_gib:.0f}"),
        ("largest batch", "{batch}"),
        ("takes GiB", "{used_gib:.1f}"),
        ("one more takes GiB", "{used_by_one_more_gib:.1f}"),
    ],
    device="cuda",
    until=0.77,
    aims=aims,
)
def limit_jobs(run: Run) -> list[Job]:
    """The largest batch within a fixed limit."""
    length, limit = (96, 5 * 10**5) if run.smoke else (LONG, int(LIMIT_GIB * GIB))
    found = []
    for kind in (KARA, FULL):
        labels = {"what": str(kind), "model": LLAMA, "length": length, "limit_bytes": limit}
        found.append(Job(labels, partial(largest_batch, run, LLAMA, kind, length, limit), kind.needs))
    return found


def grid(run: Run, model: str, length: int, batches: tuple[int, ...], kinds: tuple[Kind, ...]) -> list[Job]:
    """One kind after the other, so that a prefilled sequence serves all batches."""
    found = []
    for kind in kinds:
        for batch in batches:
            labels = {"what": str(kind), "model": model, "length": length, "batch": batch, "retention": kind.retention}
            measure = partial(decode_speed, run, model, kind, length, batch)
            labels |= {"graph": kind.graph} | ({} if kind.group is None else {"followers": kind.followers})
            found.append(Job(labels, measure, kind.needs, seconds=90))
    return found


def generate_jobs(run: Run, kind: Kind) -> list[Job]:
    prompt, new, batch = (16, 48, 2) if run.smoke else (128, 2048, 16)
    labels = {"what": f"generate, {kind}", "model": LLAMA, "batch": batch, "prompt": prompt, "new": new}
    return [Job(labels, partial(generate_speed, run, kind, batch, prompt, new), kind.needs, seconds=100)]


# --------------------------------------------------------------------------------------------------------- decode steps
def compiled(run: Run, model: Any) -> Callable[..., Any]:
    """The model as `torch.compile` with CUDA graphs makes it; where nothing is measured, only traced."""
    fast = torch.compile(model, backend="eager") if run.smoke else torch.compile(model, mode="reduce-overhead")

    def forward(**arguments: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        try:
            return fast(**arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise Skip(f"torch.compile failed, {type(error).__name__}: {error}"[:200]) from error

    return forward


def decode_steps(run: Run, forward: Callable[..., Any], cache: Any, batch: int, first: int, count: int) -> list[float]:
    """Seconds of `count` steps of one token from position `first` on, each from an idle device to an idle device."""
    token = torch.ones(batch, 1, dtype=torch.long, device=run.device)
    times = []
    for position in range(first, first + count):
        step = partial(forward, input_ids=token, position_ids=torch.full_like(token, position), past_key_values=cache)
        times.append(run.seconds(partial(step, use_cache=True)))
    return times


@torch.no_grad()
def decode_speed(run: Run, name: str, kind: Kind, length: int, batch: int) -> Row:
    """Decode steps at about `length` tokens seen, one of which seals a window, and the memory they take."""
    model = the_model(run, name)
    with attached(run, model, kind):
        one = prefilled(run, name, kind, length)
        before, seen, window = run.allocated(), tokens_seen(run, length), settings(run)["window"]
        lead = lead_of(run)
        count = lead + 1 + min(TAIL, window // 2)
        cache = batch_of(run, one, kind, batch, room=count)
        forward = compiled(run, model) if kind.static else model
        run.forget_peak()
        times = decode_steps(run, forward, cache, batch, seen, count)
        compresses = kind.retention is not None and kind.retention < 1
        whole = compresses and not run.smoke and window * statistics.median(times[WARM:]) <= WHOLE_WINDOW_SECONDS
        if whole:
            times += decode_steps(run, forward, cache, batch, seen + count, window)
        if kind.graph and not cache.graph.replays:
            raise RuntimeError("no step was replayed from a CUDA graph")
        numbers = step_numbers(times, batch, window, lead, compresses, whole)
        return numbers | {"seen": seen + len(times)} | memory_numbers(run, cache, before)


def step_numbers(times: list[float], batch: int, window: int, lead: int, compresses: bool, whole: bool) -> Row:
    """Times of steps as numbers of a row: the usual step, tokens in a second, and what compressing takes of a window.

    Step `lead` seals a window; where a `whole` window is timed behind it, so does the step one window later. Otherwise
    a window is made of usual steps and one compression, in which kernels may run for the first time.
    """
    if not compresses:
        rest = times[WARM:]
        return spread([1e3 * t for t in rest], "step_ms") | {"tokens_per_s": batch * len(rest) / sum(rest)}
    seals = [lead, lead + window] if whole else [lead]
    paying = {seal + n for seal in seals for n in range(AFTER)}
    plain = [t for n, t in enumerate(times) if n >= WARM and n not in paying]
    usual = statistics.median(plain)
    cost = sum(t - usual for t in times[seals[-1] : seals[-1] + AFTER])
    total = sum(times[lead + 1 : lead + 1 + window]) if whole else window * statistics.mean(plain) + cost
    return spread([1e3 * t for t in plain], "step_ms") | {
        "tokens_per_s": batch * window / total,
        "compression_ms": 1e3 * cost,
        "compression_share": cost / total,
        "window": window,
        "whole_window_timed": whole,
    }


def memory_numbers(run: Run, cache: Any, before: int) -> Row:
    """Bytes of a cache by its own account and by the allocator's, which had `before` bytes when it was made.

    What the allocator held beside the weights and the cache, such as the sequence that was copied, is left out.
    """
    run.tidy()
    resident, nominal = cache_bytes(cache)
    numbers = {"resident_bytes": resident, "nominal_bytes": nominal}
    if run.cuda:
        numbers |= {"allocated_bytes": run.allocated() - before}
        numbers |= {"peak_bytes": run.peak() - before + run.shared["weights"]}
    return numbers


@torch.no_grad()
def generate_speed(run: Run, kind: Kind, batch: int, prompt: int, new: int) -> Row:
    """One `generate` from a prompt to its last token, by the wall clock."""
    model = the_model(run, LLAMA)
    ids = torch.randint(0, model.config.vocab_size, (batch, prompt), device=run.device)
    with attached(run, model, kind):
        before = run.allocated()
        cache = new_cache(run, model, kind)
        run.forget_peak()
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": cache}
        seconds = run.seconds(partial(model.generate, **inputs, do_sample=False, max_new_tokens=new))
        del inputs
        if cache.get_seq_length() != prompt + new - 1:
            raise RuntimeError(f"{cache.get_seq_length()} tokens were seen instead of {prompt + new - 1}")
        numbers = {"seconds": seconds, "tokens_per_s": batch * new / seconds, "seen": prompt + new - 1}
        return numbers | memory_numbers(run, cache, before)


@torch.no_grad()
def largest_batch(run: Run, name: str, kind: Kind, length: int, limit: int) -> Row:
    """The largest batch whose decode steps take at most `limit` bytes beside the weights; one more takes more."""
    model, steps = the_model(run, name), lead_of(run) + AFTER
    with attached(run, model, kind):
        one = prefilled(run, name, kind, length)

        def need(batch: int) -> int:
            run.tidy()
            before = run.allocated()
            cache = batch_of(run, one, kind, batch, room=steps)
            run.forget_peak()
            decode_steps(run, model, cache, batch, tokens_seen(run, length), steps)
            return run.peak() - before if run.cuda else cache_bytes(cache)[0]

        if (one_takes := need(1)) > limit:
            raise Skip(f"one sequence takes {one_takes / GIB:.1f} GiB")
        batch = limit // one_takes
        while (used := need(batch)) > limit:
            batch -= 1
        while (more := need(batch + 1)) <= limit:
            batch, used = batch + 1, more
    return {"batch": batch, "used_bytes": used, "used_by_one_more_bytes": more}
