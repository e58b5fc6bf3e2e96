"""Decode steps of PoDCache with shared keys and without, on a random-weight Llama, in caches otherwise the same."""

import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from kara_hf import PoDCache, PoDSharing

from ..common.case import Job, register
from ..common.models import random_llama
from ..common.rows import Row
from ..common.run import Run

LAYERS, HEADS, SINKS = 8, 4, 4


@register(
    "pod",
    "decode steps with shared keys against the same cache without, an eighth of the tokens proximal",
    [
        ("sharing", "{sharing}"),
        ("tokens seen", "{seen:,}"),
        ("ms per step", "{ms:.2f}"),
        ("against no sharing", "{ratio:.2f}"),
        ("held / full", "{resident_of_full:.0%}"),
    ],
    sizes={"seen": (512, 2048, 8192), "batch": 1, "steps": 40},
    smoke={"seen": (64, 96), "steps": 2},
)
def pod_jobs(run: Run, seen: list[int], batch: int, steps: int) -> Iterator[Job]:
    model = random_llama(LAYERS, HEADS)
    for tokens in seen:
        yield Job({"seen": tokens, "batch": batch}, partial(paired, model, tokens, batch, steps))


def maps_of(layers: int, heads: int, tokens: int) -> dict[str, PoDSharing]:
    """Sharing maps of a model, an eighth of whose `tokens` is proximal."""
    near: dict[str, Any] = {"sinks": SINKS, "recent": tokens // 8 - SINKS}
    pairs = tuple((layer // 2 * 2,) * heads for layer in range(layers))
    fours = tuple((layer // 4 * 4,) * heads for layer in range(layers))
    mixed = tuple(
        tuple(layer // 2 * 2 if head % 2 else (layer + 1) // 2 * 2 - (layer > 0) for head in range(heads))
        for layer in range(layers)
    )
    return {
        "none": PoDSharing.none(layers, heads, **near),
        "layers in pairs": PoDSharing(lead=pairs, **near),
        "layers in fours": PoDSharing(lead=fours, **near),
        "pairs that differ by head": PoDSharing(lead=mixed, **near),
        "layers in fours, own queries": PoDSharing(lead=fours, distant_query="own", **near),
    }


@torch.inference_mode()
def paired(model: Any, tokens: int, batch: int, steps: int) -> list[Row]:
    """A row for each map: all caches take turns, so that a busy machine slows all of them."""
    ids = torch.randint(0, model.config.vocab_size, (batch, tokens))
    caches = {name: PoDCache(model, sharing) for name, sharing in maps_of(LAYERS, HEADS, tokens).items()}
    times: dict[str, list[float]] = {name: [] for name in caches}
    for cache in caches.values():
        model(ids, past_key_values=cache, logits_to_keep=1)
    for _ in range(steps):
        for name, cache in caches.items():
            start = time.perf_counter()
            model(ids[:, :1], past_key_values=cache)
            times[name].append(time.perf_counter() - start)
    reports = {name: cache.report() for name, cache in caches.items()}
    return [
        {
            "sharing": name,
            "steps": steps,
            "ms": 1000 * statistics.median(mine),
            "ratio": statistics.median(one / plain for one, plain in zip(mine, times["none"], strict=True)),
            "resident_bytes": reports[name].resident_bytes,
            "full_bytes": reports[name].full_bytes,
        }
        for name, mine in times.items()
    ]
