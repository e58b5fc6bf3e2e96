"""What the rows of a run say: tables for the documentation, and which aims are met."""

from typing import Any

Row = dict[str, Any]
SHORT, LONG = 4 * 1024, 32 * 1024
GIB = 2**30

# Of every section a title, and of every column its head and what stands in it; "–" where a row lacks the number.
MEMORY = [
    ("resident / nominal", "{resident:.1%}"),
    ("allocated / nominal", "{allocated:.1%}"),
    ("peak GiB", "{peak_gib:.1f}"),
]
DECODE = [
    ("model", "{model}"),
    ("tokens seen", "{seen:,}"),
    ("batch", "{batch}"),
    ("cache", "{what}"),
    ("ms per step", "{step_ms:.2f}"),
    ("p10 to p90", "{step_ms_p10:.2f} to {step_ms_p90:.2f}"),
    ("tokens/s", "{tokens_per_s:,.0f}"),
    ("compression, share of time", "{compression_share:.1%}"),
    *MEMORY,
]
TABLES: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "attend": (
        "Attention of one decode step, one layer, 32 query and 8 KV heads of size 128",
        [
            ("what", "{what}"),
            ("batch", "{batch}"),
            ("tokens", "{tokens:,}"),
            ("rows", "{rows}"),
            ("ms", "{ms:.3f}"),
            ("p10 to p90", "{ms_p10:.3f} to {ms_p90:.3f}"),
            ("GB/s", "{gbps:,.0f}"),
            ("share of copy", "{share_of_copy:.0%}"),
            ("SDPA ms", "{sdpa_ms:.3f}"),
            ("flash ms", "{flash_ms:.3f}"),
        ],
    ),
    "windows": (
        "Compression of one window, one layer, all sequences of a batch",
        [
            ("op", "{what}"),
            ("window", "{window}"),
            ("batch", "{batch}"),
            ("ms", "{ms:.3f}"),
            ("p10 to p90", "{ms_p10:.3f} to {ms_p90:.3f}"),
        ],
    ),
    "decode": ("Decoding with a whole model, random weights", DECODE),
    "limit": (
        "The largest batch within a limit on memory beside the weights",
        [
            ("model", "{model}"),
            ("tokens", "{length:,}"),
            ("cache", "{what}"),
            ("limit GiB", "{limit_gib:.0f}"),
            ("largest batch", "{batch}"),
            ("takes GiB", "{used_gib:.1f}"),
            ("one more takes GiB", "{more_gib:.1f}"),
        ],
    ),
    "pod": (
        "Decoding with keys of distant tokens shared by groups of layers, random weights",
        [*DECODE[:4], ("followers", "{followers:.0%}"), *DECODE[4:7], ("GiB held", "{resident_gib:.2f}"), *MEMORY],
    ),
    "serve": (
        "Continuous batching with blocks for few sequences, random weights",
        [
            ("engine", "{what}"),
            ("requests", "{batch}"),
            ("tokens", "{new:,}"),
            ("steps", "{steps:,}"),
            ("running", "{running:.1f}"),
            ("preempted", "{preemptions}"),
            ("tokens/s", "{tokens_per_s:,.0f}"),
        ],
    ),
    "more": ("Other retentions, StaticCache, a second model and a whole `generate`", DECODE),
}


def markdown(rows: list[Row]) -> str:
    """The rows as Markdown: how the checks went, a table for every section, and the aims."""
    parts = [checks_line(rows)]
    for section, (title, columns) in TABLES.items():
        chosen = [row for row in rows if row["section"] == section]
        if chosen:
            parts.append(f"**{title}**. {conditions(chosen[0])}\n\n{table(chosen, columns)}")
    verdicts = [f"| {aim} | {verdict} | {detail} |" for aim, verdict, detail in aims(rows)]
    parts.append("\n".join(["| aim | | measured |", "|---|---|---|", *verdicts]))
    return "\n\n".join(parts)


def checks_line(rows: list[Row]) -> str:
    """How many checks passed, and what became of the others."""
    checks = [row for row in rows if row["section"] == "checks"]
    others = [row for row in checks if row["status"] != "passed"]
    text = f"Checks: {len(checks) - len(others)} of {len(checks)} passed."
    for row in others:
        text += f"\n- {row['op']}, {row['what']}, {row['dtype']}: {row['status']}, {reason(row)}"
    return text


def reason(row: Row) -> str:
    if "reason" in row:
        return row["reason"]
    return f"error {row['error']:.3g}" + (f", plain torch {row['plain_error']:.3g}" if "plain_error" in row else "")


def conditions(row: Row) -> str:
    """What the numbers of a section were measured on and how."""
    origin = row["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    return f"`{origin['command']}`: {origin['device']}, {versions}, {row['dtype']}, {origin['date']}."


def table(rows: list[Row], columns: list[tuple[str, str]]) -> str:
    """A line for every row; a row without numbers says why."""
    heads = [head for head, _ in columns]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        values = derived(row)
        cells = [cell(form, values) for _, form in columns]
        if row["status"] != "measured":
            cells[-1] = f"{row['status']}: {row.get('reason', '')}"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(form: str, values: Row) -> str:
    try:
        return form.format_map(values)
    except KeyError:
        return "–"


def derived(row: Row) -> Row:
    """The row with what the tables show and nobody stores: shares of the nominal bytes, and GiB."""
    more = {
        name: row[f"{name}_bytes"] / row["nominal_bytes"]
        for name in ("resident", "allocated")
        if "nominal_bytes" in row and f"{name}_bytes" in row
    }
    names = {"peak_bytes": "peak_gib", "limit_bytes": "limit_gib", "used_bytes": "used_gib"}
    names |= {"used_by_one_more_bytes": "more_gib", "resident_bytes": "resident_gib"}
    return row | more | {name: row[source] / GIB for source, name in names.items() if source in row}


# -------------------------------------------------------------------------------------------------------------- aims
def aims(rows: list[Row]) -> list[tuple[str, str, str]]:
    """Every aim, whether it is "met", "missed" or "not measured", and the number that says so."""
    measured = [row for row in rows if row["status"] == "measured"]
    attend = [row for row in measured if row["section"] == "attend" and row["what"] == "attend"]
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
            [(row["compression_share"], f"{row['compression_share']:.1%}, {case(row)}") for row in sealing],
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
            fewer_steps([row for row in measured if row["section"] == "serve"]),
            least=2.0,
        ),
    ]


def judge(
    aim: str,
    found: list[tuple[float, str]],
    least: float | None = None,
    most: float | None = None,
    below: float | None = None,
    otherwise: str = "–",
) -> tuple[str, str, str]:
    """An aim against the worst of what was found for it: numbers, each with its text; `otherwise` where nothing was."""
    if not found:
        return aim, "not measured", otherwise
    number, text = min(found) if least is not None else max(found)
    met = (least is None or number >= least) and (most is None or number <= most) and (below is None or number < below)
    worst = f" (the worst of {len(found)})" if len(found) > 1 else ""
    return aim, "met" if met else "missed", text + worst


def case(row: Row) -> str:
    return f"{row['model']}, {row['what']}, batch {row['batch']}"


def why_not(rows: list[Row], **labels: Any) -> str:
    """Why there is no number of the cases with these labels."""
    chosen = [row for row in rows if labels.items() <= row.items() and row["status"] != "measured"]
    return "; ".join(f"{row['model']}, {row['what']}: {row.get('reason', row['status'])}" for row in chosen) or "–"


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
            found.append((ratio, f"{ratio:.2f}x the time, {case(row)}"))
    return found


def fewer_steps(rows: list[Row]) -> list[tuple[float, str]]:
    """Steps of the engine alone as a multiple of those with Kara."""
    alone = next((row["steps"] for row in rows if row["what"] == "engine alone"), None)
    ratios = [(alone / row["steps"], row["what"]) for row in rows if alone and row["what"] != "engine alone"]
    return [(ratio, f"{ratio:.2f}x, {what}") for ratio, what in ratios]


def over_nominal(row: Row) -> tuple[float, str]:
    over = max(row["resident_bytes"], row["allocated_bytes"]) / row["nominal_bytes"] - 1
    return over, f"{over:.1%}, {case(row)}"
