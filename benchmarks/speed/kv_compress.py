"""What KVCompressCache really holds, and how fast it decodes beside DynamicCache, on a random-weight Llama.

Caches that are compared take turns step by step in one process (`race`).
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from transformers import DynamicCache

from kara_hf import CompressedCache, KaraCache, KVCompressCache, KVCompressConfig

from ..common.aims import Aim
from ..common.case import Job, register
from ..common.models import random_llama
from ..common.race import FULL, Entry, Trace, case_name, dense_bytes, race, step, timing, tokens, twin
from ..common.rows import Row
from ..common.run import Run

OURS = "KVCompressCache"
LEVELS = (None, 4, 2, 1)
DEFAULTS = KVCompressConfig(retention=0.5)
FLOOR = 3 * DEFAULTS.block_size  # tokens per row that no budget may go below: sinks, half of them recent, and a block
EXCESS, COST = 0.02, 1.15  # aims: bytes above nominal, beside a block per row; step time where nothing is evicted
# Bytes that kvpress holds by its arithmetic, and its speed-ups as they were found before on another machine.
SNAP, BOTH = "SnapKV 0.8", "SnapKV 0.8, then Decoding(Knorm, 128/512)"
BARS = {
    ("2048 + 512", "20 % of the prompt"): (SNAP, 1.27, "last_bytes", 4096 * (409 + 511)),
    ("8192 + 256", "20 % of the prompt"): (SNAP, 1.84, "last_bytes", 4096 * (1638 + 255)),
    ("2048 + 512", "512 tokens"): (BOTH, 1.25, "most_bytes", 4096 * (512 + 128)),
    ("8192 + 256", "512 tokens"): (BOTH, 1.99, "most_bytes", 4096 * (512 + 128)),
}
SPEED = [
    ("prompt + new", "{label}"),
    ("cache", "{method}"),
    ("tokens/s", "{tokens_per_s:.0f}"),
    ("against DynamicCache", "{speedup:.2f}x"),
    ("MB at the end", "{last_mb:.2f}"),
]
Make = Callable[[Any], Any]


# ---------------------------------------------------------------------------------------------------------- the caches
def models(run: Run) -> tuple[Any, Any]:
    """One random model twice, on the same weights: for DynamicCache, and for the caches of this package."""
    if "kv_compress" not in run.shared:
        plain = random_llama()
        run.shared["kv_compress"] = plain, twin(plain)
    return run.shared["kv_compress"]


def full(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config)


def ours(budget: int, **settings: Any) -> Make:
    """KVCompressCache with `budget` tokens per row, or as few as its settings allow."""
    return partial(KVCompressCache, max_cache_tokens=max(budget, FLOOR), **settings)


class Account:
    """Bytes that a cache holds, when called: after the prompt, and after every step.

    The first step cuts the prompt; what is held at its most from then on is known apart from what the prompt took.
    """

    def __init__(self, cache: Any):
        self.cache, self.calls, self.with_prompt = cache, 0, 0

    def __call__(self) -> int:
        if not isinstance(self.cache, CompressedCache):
            return dense_bytes(self.cache)
        self.calls += 1
        if self.calls == 2:
            self.with_prompt = self.cache.meter.peak
            self.cache.meter.peak = self.cache.meter.held
        return self.cache.report().resident_bytes

    def numbers(self) -> Row:
        """What is known at the end. DynamicCache grows by copying a tensor, which is there twice meanwhile."""
        if not isinstance(self.cache, CompressedCache):
            held, largest = dense_bytes(self.cache), max(layer.keys.nbytes for layer in self.cache.layers)
            return {"decode_peak_bytes": held + largest, "peak_bytes": held + largest}
        report = self.cache.report()
        return {
            "kept_min": int(report.kept.min()),
            "kept_mean": float(report.kept.float().mean()),
            "kept_max": int(report.kept.max()),
            "full_bytes": report.full_bytes,
            "decode_peak_bytes": report.peak_bytes,
            "peak_bytes": max(report.peak_bytes, self.with_prompt),
        }


def entry(run: Run, name: str, make: Make, ids: torch.Tensor) -> Entry:
    plain, attached = models(run)
    held = make(attached)
    model = plain if isinstance(held, DynamicCache) else attached

    def prefill(prompt: torch.Tensor) -> None:
        model(input_ids=prompt, past_key_values=held, use_cache=True, logits_to_keep=1)

    return Entry(name, ids, prefill, partial(step, model, held), Account(held), held)


def compete(
    run: Run, methods: dict[str, Make], prompt: int, new: int, repeats: int, batches: dict[str, int] | None = None
) -> dict[str, tuple[Row, Entry]]:
    """Numbers of every method from paired steps, beside those of the first one, and its entry in the last race."""
    runs: list[list[Trace]] = []
    entries: list[Entry] = []
    for number in range(repeats):
        shapes = {name: tokens(prompt, new, batches[name] if batches else 1) for name in methods}
        entries = [entry(run, name, make, shapes[name]) for name, make in methods.items()]
        runs.append(race(entries, prompt, f"{case_name(prompt, new)}, run {number + 1}"))
    columns = [list(column) for column in zip(*runs, strict=True)]
    return {
        each.name: (timing(mine, columns[0]) | each.held.numbers(), each)
        for each, mine in zip(entries, columns, strict=True)
    }


def rows_of(run: Run, methods: dict[str, Make], prompt: int, new: int, repeats: int) -> list[Row]:
    """A row for each method."""
    found = compete(run, methods, prompt, new, repeats)
    return [{"method": name} | numbers for name, (numbers, _) in found.items()]


# ------------------------------------------------------------------------------------------------------------ the cases
def byte_aims(rows: Sequence[Row]) -> list[Aim]:
    """Missing the one at 8 times fails the run."""
    return [
        Aim(
            f"{row['rate']} times: within 2 % and a block per row",
            "met" if row["within_aim"] else "missed",
            f"{row['excess']:.1%} above nominal, {row['excess_blocks']:.2f} blocks per row",
            must=row["rate"] == 8,
        )
        for row in rows
        if row["case"] == "kv_compress.bytes"
    ]


@register(
    "kv_compress.bytes",
    "resident bytes while decoding against nominal ones, at 2 to 64 times",
    [
        ("asked", "{rate}x"),
        ("true", "{true_rate:.2f}x"),
        ("nominal MB", "{nominal_mb:.3f}"),
        ("most MB", "{most_mb:.3f}"),
        ("within 2 % and a block", "{within_aim}"),
    ],
    sizes={"prompt": 8192, "new": 385, "rates": (2, 4, 8, 16, 32, 64)},
    smoke={"prompt": 256, "new": 20, "rates": (2, 8, 64)},
    aims=byte_aims,
)
def byte_jobs(run: Run, prompt: int, new: int, rates: list[int]) -> Iterator[Job]:
    for rate in rates:
        yield Job({"label": case_name(prompt, new), "rate": rate}, partial(byte_row, run, rate, prompt, new))


def byte_row(run: Run, rate: int, prompt: int, new: int) -> Row:
    """Resident bytes against nominal ones: seen / rate tokens per row, and nothing but their keys and values."""
    model = models(run)[1]
    config = model.config
    token = 2 * config.head_dim * model.dtype.itemsize
    heads = config.num_hidden_layers * config.num_key_value_heads
    asked = (prompt + new - 1) // rate
    nominal, block = asked * heads * token, DEFAULTS.block_size * heads * token
    made = entry(run, OURS, ours(asked), tokens(prompt, new))
    (trace,) = race([made], prompt, f"{rate} times")
    report, most = made.cache.report(), max(trace.held)
    return {
        "max_cache_tokens": max(asked, FLOOR),
        "floor_tokens": FLOOR,
        "floor_binds": asked < FLOOR,
        "rows_at_floor": int((report.kept <= FLOOR).sum()),
        "rows": heads,
        "seen": int(report.seen[0]),
        "nominal_bytes": nominal,
        "mean_bytes": round(sum(trace.held) / len(trace.held)),
        "most_bytes": most,
        "last_bytes": trace.held[-1],
        "true_rate": report.full_bytes / trace.held[-1],
        "excess": most / nominal - 1,
        "excess_blocks": (most - nominal) / block,
        "within_aim": most <= (1 + EXCESS) * nominal + block,
    } | made.held.numbers()


def speed_aims(rows: Sequence[Row]) -> list[Aim]:
    """kvpress's bytes and speed-up; the latter its own row's where there is one."""
    speed = {(r["label"], r["method"]): r for r in rows if r["case"] in ("kv_compress.speed", "kvpress.speed")}
    found = []
    for (label, what), (peer, published, name, most) in BARS.items():
        row, theirs = speed.get((label, f"{OURS}, {what}")), speed.get((label, peer))
        if row is None:
            continue
        bar, source = (theirs["speedup"], "here") if theirs else (published, "elsewhere")
        verdict = "met" if row[name] <= most else "missed"
        found.append(Aim(f"{label}, {what}: at most {most / 1e6:.2f} MB", verdict, f"{row[name] / 1e6:.2f} MB"))
        verdict = "met" if row["speedup"] >= bar else "missed"
        found.append(Aim(f"{label}, {what}: {bar:.2f}x, as {peer} {source}", verdict, f"{row['speedup']:.2f}x"))
    return found


@register(
    "kv_compress.speed",
    "the decode loops that kvpress is known by: a prompt cut once, and one budget over prompt and decoding",
    SPEED,
    sizes={"prompts": (2048, 8192), "new": (512, 256), "budget": 512, "repeats": 3},
    smoke={"prompts": (160,), "new": (20,), "budget": 96, "repeats": 1},
    aims=speed_aims,
)
def speed_jobs(run: Run, prompts: list[int], new: list[int], budget: int, repeats: int) -> Iterator[Job]:
    for prompt, count in zip(prompts, new, strict=True):
        methods = {
            FULL: full,
            f"{OURS}, 20 % of the prompt": ours(prompt // 5, continual=False),
            f"{OURS}, {budget} tokens": ours(budget),
            f"{OURS}, {budget} tokens, no votes while decoding": ours(budget, accumulate=False),
            "KaraCache, 20 %, prompt too": partial(KaraCache, retention=0.2, compress_prompt=True),
        }
        yield Job({"label": case_name(prompt, count)}, partial(rows_of, run, methods, prompt, count, repeats))


def whole_aims(rows: Sequence[Row]) -> list[Aim]:
    """What the machinery may cost."""
    return [
        Aim(
            f"{row['label']}, {row['method']}: at most {COST} of a step of {FULL}",
            "met" if row["step_time_ratio"] <= COST else "missed",
            f"{row['step_time_ratio']:.2f}",
        )
        for row in rows
        if row["case"] == "kv_compress.whole" and row["method"].startswith(f"{OURS}, nothing evicted")
    ]


@register(
    "kv_compress.whole",
    "what the machinery costs where nothing is evicted: the same tokens in both caches",
    [*SPEED[:2], ("usual step, ms", "{step_ms:.2f}"), ("step time, paired", "{step_time_ratio:.2f}")],
    sizes={"prompts": (512, 2048, 8192), "new": (257, 129, 65), "repeats": 3},
    smoke={"prompts": (96,), "new": (12,), "repeats": 1},
    aims=whole_aims,
)
def whole_jobs(run: Run, prompts: list[int], new: list[int], repeats: int) -> Iterator[Job]:
    for prompt, count in zip(prompts, new, strict=True):
        methods = {
            FULL: full,
            f"{OURS}, nothing evicted": ours(prompt + 2 * count),
            f"{OURS}, nothing evicted, no votes while decoding": ours(prompt + 2 * count, accumulate=False),
            "KaraCache, nothing evicted": partial(KaraCache, retention=1.0),
        }
        yield Job({"label": case_name(prompt, count)}, partial(rows_of, run, methods, prompt, count, repeats))


class Watch:
    """Stands in for a policy's `evict`, and notes what share of all votes the tokens that stay have received."""

    def __init__(self, evict: Callable[..., Any]):
        self.evict, self.passes = evict, []

    def __call__(
        self, metric: torch.Tensor, positions: torch.Tensor, lengths: torch.Tensor, *rest: Any, **more: Any
    ) -> Any:
        eviction = self.evict(metric, positions, lengths, *rest, **more)
        self.passes.append((metric, lengths, eviction.dropped))
        return eviction

    def shares(self) -> list[float]:
        """One share for each pass, the first of which cuts the prompt."""
        found = []
        for metric, lengths, dropped in self.passes:
            stored = torch.arange(metric.shape[2]) < lengths[..., None]
            found.append(float(metric[stored & ~dropped].sum() / metric[stored].sum()))
        return found


def watched(make: Make, model: Any) -> KVCompressCache:
    made = make(model)
    made.policy.evict = Watch(made.policy.evict)
    return made


@register(
    "kv_compress.levels",
    "rows that may be cut to few different lengths, and how much of the metric that gives up",
    [*SPEED[:4], ("metric kept of the prompt", "{kept_metric:.1%}"), ("lengths", "{lengths}")],
    sizes={"prompts": (2048, 8192), "new": (257, 129), "repeats": 3},
    smoke={"prompts": (256,), "new": (20,), "repeats": 1},
)
def level_jobs(run: Run, prompts: list[int], new: list[int], repeats: int) -> Iterator[Job]:
    for prompt, count in zip(prompts, new, strict=True):
        yield Job({"label": case_name(prompt, count)}, partial(level_rows, run, prompt, count, repeats))


def level_rows(run: Run, prompt: int, new: int, repeats: int) -> list[Row]:
    """An eighth of the prompt, with ever fewer lengths that rows may have."""
    names = {level: f"{OURS}, levels {level}" for level in LEVELS}
    methods: dict[str, Make] = {FULL: full}
    methods |= {name: partial(watched, ours(prompt // 8, levels=level)) for level, name in names.items()}
    results, found = compete(run, methods, prompt, new, repeats), []
    for level, name in names.items():
        numbers, made = results[name]
        first, *later = made.cache.policy.evict.shares()
        kept = made.cache.report().kept
        found.append(
            {"method": name, "levels": level, "kept_metric": first}
            | ({"kept_metric_decoding": sum(later) / len(later)} if later else {})
            | {"lengths": len(kept.unique()), "kept_deviation": float(kept.float().std(correction=0))}
            | numbers
        )
    return found


@register(
    "kv_compress.limit",
    "the largest batch within a fixed number of bytes, and tokens/s of all its sequences",
    [*SPEED[:2], ("sequences", "{batch}"), *SPEED[2:4], ("most MB after a step", "{most_mb:.1f}")],
    sizes={"prompt": 2048, "new": 129, "limit": 64_000_000, "repeats": 3},
    smoke={"prompt": 96, "new": 4, "limit": 2_000_000, "repeats": 1},
)
def limit_jobs(run: Run, prompt: int, new: int, limit: int, repeats: int) -> Iterator[Job]:
    label = f"{case_name(prompt, new)}, {limit / 1e6:.0f} MB"
    yield Job({"label": label, "limit_bytes": limit}, partial(limit_rows, run, prompt, new, limit, repeats))


def limit_rows(run: Run, prompt: int, new: int, limit: int, repeats: int) -> list[Row]:
    """As many sequences as fit while they decode; the prompts, which are read at once, come before that."""
    methods = {
        FULL: full,
        f"{OURS}, 8 times": ours((prompt + new - 1) // 8),
        "KaraCache 0.25, prompt too": partial(KaraCache, retention=0.25, compress_prompt=True),
    }
    batches = {name: largest(partial(most_held, run, make, prompt, new), limit) for name, make in methods.items()}
    results = compete(run, methods, prompt, new, repeats, batches)
    return [{"method": name} | numbers for name, (numbers, _) in results.items()]


def most_held(run: Run, make: Make, prompt: int, new: int, batch: int) -> int:
    """The most bytes that `batch` sequences hold after any step."""
    (trace,) = race([entry(run, "", make, tokens(prompt, new, batch))], prompt, f"does a batch of {batch} fit?")
    return max(trace.held)


def largest(held: Callable[[int], int], limit: int) -> int:
    """The largest batch whose `held` bytes are no more than `limit`.

    Raises:
        ValueError: not even one sequence fits.
    """
    held = cache(held)
    if held(1) > limit:
        raise ValueError(f"one sequence takes {held(1)} bytes, more than the limit of {limit}")
    batch = limit // held(1)
    while held(batch) > limit:
        batch -= 1
    while held(batch + 1) <= limit:
        batch += 1
    return batch
