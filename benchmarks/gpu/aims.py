"""What the benchmark of a GPU is there to reach."""

from collections.abc import Sequence
from typing import Any

from ..common.aims import Aim, judge
from ..common.rows import Row
from ..common.table import NONE

SHORT, LONG = 4 * 1024, 32 * 1024


def aims(rows: Sequence[Row]) -> list[Aim]:
    """Every aim, from the rows of all cases."""
    measured = [row for row in rows if row["status"] == "measured"]
    attend = [row for row in measured if row["case"] == "gpu.attend" and row["what"] == "attend"]
    long = [row for row in measured if row.get("length") == LONG and "retention" in row]
    kara = [row for row in long if row["retention"] is not None]
    even = [row for row in attend if row["rows"] == "even" and row["tokens"] >= SHORT]
    headline = [row for row in even if (row["batch"], row["tokens"]) == (32, LONG) and "share_of_copy" in row]
    sealing = [row for row in kara if "compression_share" in row]
    return [
        judge(
            "attend reads at 85 % of copy bandwidth or more, batch 32, 32k tokens",
            [(row["share_of_copy"], f"{row['share_of_copy']:.0%}") for row in headline],
            least=0.85,
        ),
        judge(
            "attend no slower than SDPA and flash, equal lengths",
            [attend_against_torch(row) for row in even if "flash_ms" in row],
            most=1.0,
        ),
        judge(
            "KaraCache 0.2 at 3x the tokens/s of DynamicCache or more, batch 16, 32k tokens",
            speedups([row for row in long if row["batch"] == 16]),
            least=3.0,
            otherwise=why_not(rows, what="DynamicCache", batch=16, length=LONG),
        ),
        judge(
            "compression below 2 % of decode time, 32k tokens",
            [(row["compression_share"], f"{row['compression_share']:.1%}, {where(row)}") for row in sealing],
            below=0.02,
        ),
        judge(
            "memory at most 5 % over nominal, by the cache's account and the allocator's, 32k tokens",
            [over_nominal(row) for row in kara if "allocated_bytes" in row],
            most=0.05,
        ),
        judge(
            "PoDCache's decode step no slower than without sharing, 32k tokens",
            shared_steps([row for row in long if row.get("followers") is not None]),
            most=1.0,
        ),
        judge(
            "serving with Kara 0.25 in half the steps of the engine alone or fewer",
            fewer_steps([row for row in measured if row["case"] == "gpu.serve"]),
            least=2.0,
        ),
    ]


def where(row: Row) -> str:
    return f"{row['model']}, {row['what']}, batch {row['batch']}"


def why_not(rows: list[Row], **labels: Any) -> str:
    """Why there is no number of the cases with these labels."""
    chosen = [row for row in rows if labels.items() <= row.items() and row["status"] != "measured"]
    return "; ".join(f"{row['model']}, {row['what']}: {row.get('reason', row['status'])}" for row in chosen) or NONE


def attend_against_torch(row: Row) -> tuple[float, str]:
    ratio = row["ms"] / min(row["sdpa_ms"], row["flash_ms"])
    return ratio, f"{ratio:.2f}x the time, batch {row['batch']}, {row['tokens']:,} tokens"


def speedups(rows: list[Row]) -> list[tuple[float, str]]:
    """Of every model, the faster KaraCache at 0.2 (with or without a CUDA graph) against DynamicCache."""
    found = []
    for model in sorted({row["model"] for row in rows}):
        kara = [row for row in rows if row["model"] == model and row["retention"] == 0.2]
        full = [row for row in rows if row["model"] == model and row["what"] == "DynamicCache"]
        if kara and full:
            best = max(kara, key=lambda row: row["tokens_per_s"])
            ratio = best["tokens_per_s"] / full[0]["tokens_per_s"]
            found.append((ratio, f"{ratio:.2f}x, {model}, {best['what']}"))
    return found


def shared_steps(rows: list[Row]) -> list[tuple[float, str]]:
    """Time of a step of every cache that shares keys, as a multiple of that of the same one without."""
    alone = {(row["model"], row["batch"], row["graph"]): row for row in rows if row["followers"] == 0}
    found = []
    for row in rows:
        base = alone.get((row["model"], row["batch"], row["graph"]))
        if base is not None and row["followers"] > 0:
            ratio = row["step_ms"] / base["step_ms"]
            found.append((ratio, f"{ratio:.2f}x the time, {where(row)}"))
    return found


def fewer_steps(rows: list[Row]) -> list[tuple[float, str]]:
    """Steps of the engine alone as a multiple of those with Kara."""
    alone = next((row["steps"] for row in rows if row["what"] == "engine alone"), None)
    ratios = [(alone / row["steps"], row["what"]) for row in rows if alone and row["what"] != "engine alone"]
    return [(ratio, f"{ratio:.2f}x, {what}") for ratio, what in ratios]


def over_nominal(row: Row) -> tuple[float, str]:
    over = max(row["resident_bytes"], row["allocated_bytes"]) / row["nominal_bytes"] - 1
    return over, f"{over:.1%}, {where(row)}"
