"""What KVCompressCache really holds, and how fast it decodes beside DynamicCache, on a random-weight Llama.

    python benchmarks/kv_compress.py                        # all of it, on a CPU, one thread
    python benchmarks/kv_compress.py --sections bytes,speed # these alone
    python benchmarks/kv_compress.py --smoke                # every section with tiny sizes; measures nothing
    python benchmarks/peer_kvpress.py                       # adds kvpress, from an environment of its own

Sections, each a table:

- bytes: resident bytes while decoding against nominal ones, at 2 to 64 times. Does not depend on the machine.
- speed: decode loops on the rows that kvpress is known by, with what every cache holds.
- whole: what the machinery costs where nothing is evicted.
- levels: rows that may be cut to few different lengths, and how much of the metric that gives up.
- limit: the largest batch within a fixed number of bytes, and tokens/s of all its sequences.

Times are CPU times of one thread. Caches that are compared take turns step by step in one process, so that a busy
machine slows all of them. Rows with provenance go to a JSON file after every section, in place of what it had there.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from generation import random_llama, step
from peer_kvpress import FULL, RESULTS, Entry, Row, Trace, dense_bytes, merge, race, result_file, timing, twin
from provenance import load_rows, write_rows
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import DynamicCache

from kara_hf import CompressedCache, KaraCache, KVCompressCache, KVCompressConfig
from kara_hf.evaluation.measure.provenance import provenance

OURS = "KVCompressCache"
CASES = ((2048, 512), (8192, 256))  # tokens of the prompt, and new ones
RATES = (2, 4, 8, 16, 32, 64)
LEVELS = (None, 4, 2, 1)
DEFAULTS = KVCompressConfig(retention=0.5)
FLOOR = DEFAULTS.block_size * (DEFAULTS.least_blocks + 1)  # tokens per row that no budget may go below
SIZES: Row = {
    "cases": CASES,
    "budget": 512,
    "bytes": (8192, 385),
    "whole": ((512, 257), (2048, 129), (8192, 65)),
    "levels": ((2048, 257), (8192, 129)),
    "limit": (2048, 129, 64_000_000),
}
SMOKE: Row = {
    "cases": ((160, 20),),
    "budget": 96,
    "bytes": (256, 20),
    "whole": ((96, 12),),
    "levels": ((256, 20),),
    "limit": (96, 8, 2_000_000),
}
EXCESS, COST = 0.02, 1.15  # aims: bytes above nominal, beside a block per row; step time where nothing is evicted
console = Console()
Make = Callable[[Any], Any]


@dataclass
class Bench:
    """What the sections share: one random model twice, as it is and attached, on the same weights.

    Attributes:
        plain: for DynamicCache.
        model: for the caches of this package.
        sizes: `SIZES` or `SMOKE`.
        repeats: races of every comparison.
    """

    plain: Any
    model: Any
    sizes: Row
    repeats: int


# ---------------------------------------------------------------------------------------------------------- the caches
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


def tokens(prompt: int, new: int, batch: int = 1) -> torch.Tensor:
    """Random tokens, ``[batch, prompt + new - 1]``: the first new one comes from the prompt, the last is not read."""
    return torch.randint(0, 1024, (batch, prompt + new - 1), generator=torch.Generator().manual_seed(0))


def case_name(prompt: int, new: int) -> str:
    return f"{prompt} + {new}"


def entry(bench: Bench, name: str, make: Make, ids: torch.Tensor) -> Entry:
    held = make(bench.model)
    model = bench.plain if isinstance(held, DynamicCache) else bench.model

    def prefill(prompt: torch.Tensor) -> None:
        model(input_ids=prompt, past_key_values=held, use_cache=True, logits_to_keep=1)

    return Entry(name, ids, prefill, partial(step, model, held), Account(held), held)


def compete(
    bench: Bench, methods: dict[str, Make], prompt: int, new: int, what: str, batches: dict[str, int] | None = None
) -> dict[str, tuple[Row, Entry]]:
    """Numbers of every method from paired steps, beside those of the first one, and its entry in the last race."""
    runs: list[list[Trace]] = []
    entries: list[Entry] = []
    for number in range(bench.repeats):
        shapes = {name: tokens(prompt, new, batches[name] if batches else 1) for name in methods}
        entries = [entry(bench, name, make, shapes[name]) for name, make in methods.items()]
        runs.append(race(entries, prompt, f"{what}, {case_name(prompt, new)}, run {number + 1}"))
    columns = [list(column) for column in zip(*runs, strict=True)]
    return {
        each.name: (timing(mine, columns[0]) | each.held.numbers(), each)
        for each, mine in zip(entries, columns, strict=True)
    }


# -------------------------------------------------------------------------------------------------------- the sections
def bytes_rows(bench: Bench) -> list[Row]:
    """Resident bytes against nominal ones: seen / rate tokens per row, and nothing but their keys and values."""
    prompt, new = bench.sizes["bytes"]
    return [byte_row(bench, rate, prompt, new) for rate in RATES]


def byte_row(bench: Bench, rate: int, prompt: int, new: int) -> Row:
    config = bench.model.config
    token = 2 * config.head_dim * bench.model.dtype.itemsize
    heads = config.num_hidden_layers * config.num_key_value_heads
    asked = (prompt + new - 1) // rate
    nominal, block = asked * heads * token, DEFAULTS.block_size * heads * token
    made = entry(bench, OURS, ours(asked), tokens(prompt, new))
    (trace,) = race([made], prompt, f"bytes, {rate} times")
    report, most = made.cache.report(), max(trace.held)
    return {
        "case": case_name(prompt, new),
        "method": f"{OURS}, {rate} times",
        "rate": rate,
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


def speed_rows(bench: Bench) -> list[Row]:
    """The decode loops that kvpress is known by: a prompt cut once, and one budget over prompt and decoding."""
    found, budget = [], bench.sizes["budget"]
    for prompt, new in bench.sizes["cases"]:
        methods = {
            FULL: full,
            f"{OURS}, 20 % of the prompt": ours(prompt // 5, continual=False),
            f"{OURS}, {budget} tokens": ours(budget),
            f"{OURS}, {budget} tokens, no votes while decoding": ours(budget, accumulate=False),
            "KaraCache, 20 %, prompt too": partial(KaraCache, retention=0.2, compress_prompt=True),
        }
        for name, (numbers, _) in compete(bench, methods, prompt, new, "speed").items():
            found.append({"case": case_name(prompt, new), "method": name} | numbers)
    return found


def whole_rows(bench: Bench) -> list[Row]:
    """A budget that is never reached: the same tokens in both caches."""
    found = []
    for prompt, new in bench.sizes["whole"]:
        methods = {
            FULL: full,
            f"{OURS}, nothing evicted": ours(prompt + 2 * new),
            f"{OURS}, nothing evicted, no votes while decoding": ours(prompt + 2 * new, accumulate=False),
            "KaraCache, nothing evicted": partial(KaraCache, retention=1.0),
        }
        for name, (numbers, _) in compete(bench, methods, prompt, new, "whole").items():
            found.append({"case": case_name(prompt, new), "method": name} | numbers)
    return found


class Watch:
    """Stands in for a policy's `evict`, and notes what share of all votes the tokens that stay have received."""

    def __init__(self, evict: Callable[..., Any]):
        self.evict, self.passes = evict, []

    def __call__(self, metric: torch.Tensor, positions: torch.Tensor, lengths: torch.Tensor, *rest: Any) -> Any:
        eviction = self.evict(metric, positions, lengths, *rest)
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


def level_rows(bench: Bench) -> list[Row]:
    """An eighth of the prompt, with ever fewer lengths that rows may have."""
    found = []
    for prompt, new in bench.sizes["levels"]:
        names = {level: f"{OURS}, levels {level}" for level in LEVELS}
        methods: dict[str, Make] = {FULL: full}
        methods |= {name: partial(watched, ours(prompt // 8, levels=level)) for level, name in names.items()}
        results = compete(bench, methods, prompt, new, "levels")
        for level, name in names.items():
            numbers, made = results[name]
            first, *later = made.cache.policy.evict.shares()
            kept = made.cache.report().kept
            found.append(
                {"case": case_name(prompt, new), "method": name, "levels": level, "kept_metric": first}
                | ({"kept_metric_decoding": sum(later) / len(later)} if later else {})
                | {"lengths": len(kept.unique()), "kept_deviation": float(kept.float().std(correction=0))}
                | numbers
            )
    return found


def limit_rows(bench: Bench) -> list[Row]:
    """As many sequences as fit while they decode; the prompts, which are read at once, come before that."""
    prompt, new, limit = bench.sizes["limit"]
    methods = {
        FULL: full,
        f"{OURS}, 8 times": ours((prompt + new - 1) // 8),
        "KaraCache 0.25, prompt too": partial(KaraCache, retention=0.25, compress_prompt=True),
    }
    batches = {name: largest(partial(most_held, bench, make, prompt, new), limit) for name, make in methods.items()}
    results = compete(bench, methods, prompt, new, "limit", batches)
    labels = {"case": f"{case_name(prompt, new)}, {limit / 1e6:.0f} MB", "limit_bytes": limit}
    return [labels | {"method": name} | numbers for name, (numbers, _) in results.items()]


def most_held(bench: Bench, make: Make, prompt: int, new: int, batch: int) -> int:
    """The most bytes that `batch` sequences hold after any step."""
    (trace,) = race([entry(bench, "", make, tokens(prompt, new, batch))], prompt, f"does a batch of {batch} fit?")
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


SECTIONS: dict[str, Callable[[Bench], list[Row]]] = {
    "bytes": bytes_rows,
    "speed": speed_rows,
    "whole": whole_rows,
    "levels": level_rows,
    "limit": limit_rows,
}


# ---------------------------------------------------------------------------------------------------------- the tables
# A section's columns: what stands above, and a format over the row, in which bytes may also be had as MB (1e6 bytes).
KEPT = ("kept per head: least, mean, most", "{kept_min}, {kept_mean:.0f}, {kept_max}")
TIMES = [
    ("prompt + new", "{case}"),
    ("cache", "{method}"),
    ("tokens/s", "{tokens_per_s:.0f}"),
    ("against DynamicCache", "{speedup:.2f}x ({speedup_low:.2f} to {speedup_high:.2f})"),
    ("usual step, ms", "{step_ms:.2f}"),
    ("first step, ms", "{first_step_ms:.1f}"),
    ("worst later step, ms", "{worst_step_ms:.1f}"),
]
COLUMNS: dict[str, list[tuple[str, str]]] = {
    "bytes": [
        ("asked", "{rate}x"),
        ("true", "{true_rate:.2f}x"),
        ("tokens per head", "{max_cache_tokens}"),
        KEPT,
        ("nominal MB", "{nominal_mb:.3f}"),
        ("resident MB: mean, most", "{mean_mb:.3f}, {most_mb:.3f}"),
        ("above nominal", "{excess:.1%}"),
        ("in blocks per row", "{excess_blocks:.2f}"),
        ("within 2 % and a block", "{within_aim}"),
        ("settings' floor", "{floor_tokens} tokens, binds: {floor_binds}, rows at it: {rows_at_floor} of {rows}"),
        ("most for a moment, MB", "{decode_peak_mb:.3f}"),
        ("with the prompt, MB", "{peak_mb:.3f}"),
    ],
    "speed": [
        *TIMES,
        ("MB after the prompt", "{prompt_mb:.2f}"),
        ("MB at the end", "{last_mb:.2f}"),
        ("most MB after a step", "{most_mb:.2f}"),
        ("most for a moment while decoding, MB", "{decode_peak_mb:.2f}"),
        ("beside the cache, MB", "{buffer_mb:.2f}"),
        KEPT,
    ],
    "whole": [*TIMES, ("step time, paired", "{step_time_ratio:.2f}")],
    "levels": [
        *TIMES,
        ("metric kept of the prompt", "{kept_metric:.1%}"),
        ("of what is cut later", "{kept_metric_decoding:.1%}"),
        KEPT,
        ("lengths", "{lengths}"),
        ("deviation", "{kept_deviation:.0f}"),
    ],
    "limit": [
        ("prompt + new, limit", "{case}"),
        ("cache", "{method}"),
        ("sequences", "{batch}"),
        ("tokens/s of all", "{tokens_per_s:.0f}"),
        ("against DynamicCache", "{speedup:.2f}x"),
        ("most MB after a step", "{most_mb:.1f}"),
        ("with the prompts, MB", "{peak_mb:.1f}"),
    ],
}


def markdown(rows: list[Row]) -> str:
    """A table of every section that has rows, kvpress's among them, and where they come from."""
    parts = []
    for section, columns in COLUMNS.items():
        mine = [row for row in rows if row["section"] == section]
        cases = list(dict.fromkeys(row["case"] for row in mine))
        mine.sort(key=lambda row: cases.index(row["case"]))
        if mine:
            parts.append(f"**{section}**: {origin(mine)}\n\n{table(mine, columns)}")
    return "\n\n".join(parts)


def table(rows: list[Row], columns: list[tuple[str, str]]) -> str:
    lines = [[title for title, _ in columns], ["---"] * len(columns)]
    lines += [[cell(form, row) for _, form in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" if line[0] != "---" else f"|{'|'.join(line)}|" for line in lines)


def cell(form: str, row: Row) -> str:
    """A row's values in a format; a dash where one is not there."""
    sizes = {name.removesuffix("_bytes"): value for name, value in row.items() if name.endswith("_bytes")}
    units = {f"{name}_{unit}": value / by for name, value in sizes.items() for unit, by in (("mb", 1e6), ("kb", 1e3))}
    words = {name: "yes" if value else "no" for name, value in row.items() if isinstance(value, bool)}
    try:
        return form.format(**row | units | words)
    except KeyError:
        return "–"


def origin(rows: list[Row]) -> str:
    """Commands, hardware, versions and dates of rows."""
    found = {}
    for row in rows:
        source = row["provenance"]
        versions = ", ".join(f"{name} {number}" for name, number in source["versions"].items())
        found[f"`{source['command']}`: {source['device']}, 1 thread, {versions}, {row['dtype']}, {source['date']}"] = (
            None
        )
    return "; ".join(found) + "."


# ------------------------------------------------------------------------------------------------------------ the aims
SNAP, BOTH = "SnapKV 0.8", "SnapKV 0.8, then Decoding(Knorm, 128/512)"
# Bytes that kvpress holds there by its arithmetic, and its speed-ups as they were found before on another machine.
BARS = {
    ("2048 + 512", "20 % of the prompt"): (SNAP, 1.27, "last_bytes", 4096 * (409 + 511)),
    ("8192 + 256", "20 % of the prompt"): (SNAP, 1.84, "last_bytes", 4096 * (1638 + 255)),
    ("2048 + 512", "512 tokens"): (BOTH, 1.25, "most_bytes", 4096 * (512 + 128)),
    ("8192 + 256", "512 tokens"): (BOTH, 1.99, "most_bytes", 4096 * (512 + 128)),
}


def aims(rows: list[Row]) -> list[tuple[str, str, str]]:
    """Every aim, whether it is met, and by what number. kvpress's speed-up is its own row's where there is one."""
    found = []
    for row in rows:
        if row["section"] == "bytes":
            detail = f"{row['excess']:.1%} above nominal, {row['excess_blocks']:.2f} blocks per row"
            found.append((f"{row['rate']} times: within 2 % and a block per row", row["within_aim"], detail))
        if row["section"] == "whole" and row["method"].startswith(f"{OURS}, nothing evicted"):
            name = f"{row['case']}, {row['method']}: at most {COST} of a step of {FULL}"
            found.append((name, row["step_time_ratio"] <= COST, f"{row['step_time_ratio']:.2f}"))
    speed = {(row["case"], row["method"]): row for row in rows if row["section"] == "speed"}
    for (case, what), (peer, published, name, most) in BARS.items():
        row, theirs = speed.get((case, f"{OURS}, {what}")), speed.get((case, peer))
        if row is None:
            continue
        bar, source = (theirs["speedup"], "here") if theirs else (published, "elsewhere")
        held = f"{row[name] / 1e6:.2f} MB"
        found.append((f"{case}, {what}: at most {most / 1e6:.2f} MB", row[name] <= most, held))
        aim = f"{case}, {what}: at least {bar:.2f}x, as {peer} {source}"
        found.append((aim, row["speedup"] >= bar, f"{row['speedup']:.2f}x"))
    return [(aim, "met" if passed else "missed", detail) for aim, passed, detail in found]


def show_aims(rows: list[Row]) -> None:
    shown, found = Table("aim", "", "measured"), aims(rows)
    for aim, verdict, detail in found:
        shown.add_row(escape(aim), f"[{'green' if verdict == 'met' else 'red'}]{verdict}[/]", escape(detail))
    if found:
        console.print(shown)


def chosen_sections(names: str) -> list[str]:
    """The sections asked for, in their order. Raises `typer.BadParameter` on another name."""
    asked = [name.strip() for name in names.split(",")] if names else list(SECTIONS)
    if unknown := sorted(set(asked) - set(SECTIONS)):
        raise typer.BadParameter(f"{', '.join(unknown)} is no section; choose from {', '.join(SECTIONS)}")
    return [name for name in SECTIONS if name in asked]


def main(
    sections: Annotated[str, typer.Option(help=f"comma-separated, of {', '.join(SECTIONS)}; empty: all")] = "",
    repeats: Annotated[int, typer.Option(help="races of every comparison; of each step the median counts")] = 3,
    out: Annotated[Path | None, typer.Option(help=f"JSON file of rows; default: results/{RESULTS.name}")] = None,
    smoke: Annotated[bool, typer.Option(help="tiny sizes, to see that all of it runs")] = False,
) -> None:
    """Measures, prints the tables and writes the rows."""
    names, path = chosen_sections(sections), result_file(out, smoke)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)  # 5.17 knows no other name
    plain = random_llama("cpu", torch.float32)
    bench = Bench(plain, twin(plain), SMOKE if smoke else SIZES, 1 if smoke else repeats)
    common = {"package": "kara_hf", "device": "cpu", "dtype": "float32"}
    rows: list[Row] = []
    for name in names:
        found = [{"section": name} | row | common | {"provenance": provenance("cpu")} for row in SECTIONS[name](bench)]
        rows += found
        if path is not None:
            write_rows(path, merge(load_rows(path), found))
    console.print(markdown(rows), markup=False, highlight=False, soft_wrap=True)
    if smoke:
        console.print("[yellow]a smoke run: none of these numbers means anything[/]")
    else:
        show_aims(rows if path is None else merge(load_rows(path), rows))
    if path is not None:
        console.print(f"written to {path}")
    missed = any(row["section"] == "bytes" and row["rate"] == 8 and not row["within_aim"] for row in rows)
    raise typer.Exit(1 if missed and not smoke else 0)


if __name__ == "__main__":
    typer.run(main)
