"""How fast KaraCache decodes beside DynamicCache, on a random-weight Llama, by paired steps."""

import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from rich.progress import track
from transformers import DynamicCache

from kara_hf import KaraCache

from ..common.case import Job, register
from ..common.console import console
from ..common.models import random_llama
from ..common.race import dense_bytes, step
from ..common.rows import Row
from ..common.run import Run

WARM = 8  # first steps, which count for nothing


@register(
    "generation",
    "decode steps of KaraCache with as many tokens as DynamicCache, and with a quarter of them",
    [
        ("tokens kept of seen", "{kept:,} of {seen:,}"),
        ("DynamicCache, ms per step", "{dense_step_ms:.2f}"),
        ("KaraCache, ms per step", "{kara_step_ms:.2f}"),
        ("tokens/s", "{speedup:.2f}x"),
        ("held / full", "{resident_of_full:.1%}"),
    ],
    sizes={"batch": 4, "seen": (512, 2048, 8192), "steps": 200, "window": 256, "recent": 32},
    smoke={"seen": (96,), "steps": 24, "window": 16, "recent": 8},
)
def generation_jobs(run: Run, batch: int, seen: list[int], steps: int, window: int, recent: int) -> Iterator[Job]:
    """Nothing is evicted, or three quarters are; then steps enough that windows are sealed among them."""
    model = random_llama()
    for tokens in seen:
        for retention in (1.0, 0.25):
            count = steps if retention == 1 else max(steps, window + window // 2)
            settings = {"retention": retention, "window": window, "recent": recent, "compress_prompt": retention < 1}
            measure = partial(measured, model, batch, tokens, count, settings)
            yield Job({"prompt": tokens, "retention": retention, "batch": batch}, measure)


@torch.no_grad()
def measured(model: Any, batch: int, prompt: int, steps: int, settings: Row) -> Row:
    """Fills both caches with one prompt and then takes paired decode steps."""
    ids = torch.randint(0, model.config.vocab_size, (batch, prompt))
    dense, kara = DynamicCache(config=model.config), KaraCache(model, **settings)
    for cache in (dense, kara):
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    times, sealing = paired_steps(model, dense, kara, ids[:, -1:], prompt, steps)
    report = kara.report()
    return step_numbers(times, sealing, batch, min(WARM, steps // 4)) | {
        "seen": prompt + steps,
        "kept": int(report.kept.max()),
        "full_bytes": report.full_bytes,
        "resident_bytes": report.resident_bytes,
        "peak_bytes": report.peak_bytes,
        "dense_bytes": dense_bytes(dense),
    }


def paired_steps(
    model: Any, dense: Any, kara: Any, token: torch.Tensor, first: int, steps: int
) -> tuple[dict[str, list[float]], list[int]]:
    """Seconds of every step of both caches, and the numbers of the steps in which windows were sealed."""
    times: dict[str, list[float]] = {"dense": [], "kara": []}
    sealing, kept = [], kara.report().kept.max()
    for number in track(range(steps), description=f"{first} seen", console=console, transient=True):
        pair = [("dense", dense), ("kara", kara)]
        for name, cache in pair if number % 2 else reversed(pair):
            start = time.perf_counter()
            step(model, cache, token, first + number)
            times[name].append(time.perf_counter() - start)
        before, kept = kept, kara.report().kept.max()
        if kept <= before:
            sealing.append(number)
    return times, sealing


def step_numbers(times: dict[str, list[float]], sealing: list[int], batch: int, warm: int) -> Row:
    """The usual step of both, tokens in a second, and the share of the time that sealing windows takes."""
    steps = len(times["kara"])
    plain = [number for number in range(warm, steps) if number not in sealing]
    usual = statistics.median(times["kara"][n] for n in plain)
    total = {name: sum(values[warm:]) for name, values in times.items()}
    compression = sum(times["kara"][number] - usual for number in sealing if number >= warm)
    return {
        "steps": steps - warm,
        "step_time_ratio": statistics.median(times["kara"][n] / times["dense"][n] for n in plain),
        "dense_step_ms": 1e3 * statistics.median(times["dense"][n] for n in plain),
        "kara_step_ms": 1e3 * usual,
        "dense_tokens_per_s": batch * (steps - warm) / total["dense"],
        "kara_tokens_per_s": batch * (steps - warm) / total["kara"],
        "speedup": total["dense"] / total["kara"],
        "windows_sealed": len(sealing),
        "compression_share": compression / total["kara"],
        "worst_step_ms": 1e3 * max(times["kara"][warm:]),
    }
