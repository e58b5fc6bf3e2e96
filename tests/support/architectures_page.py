"""docs/architectures.md, made of the result of the sweep."""

import re
from collections.abc import Callable, Iterable
from typing import Any

IMPLEMENTATIONS = ("sdpa", "eager")
CACHES = {"kara": "KaraCache", "kv_compress": "KVCompressCache", "pod": "PoDCache"}

# What else a supported model has beside the layers that are compressed: title, and the cache layers that show it.
_MIXES = {
    "Sliding or chunked windows between full attention": r".*SlidingWindowLayer",
    "Recurrent or convolutional layers between full attention": r"LinearAttentionLayer",
    "Attention and a recurrent state in one layer": r"LinearAttentionAnd.*",
    "Layers that read keys of other layers": r"DummyLayer",
}


def judged(row: dict[str, Any]) -> dict[str, Any]:
    """Outcomes of one class under the implementation that Transformers takes by itself: sdpa where there is one."""
    return next((row[name] for name in IMPLEMENTATIONS if name in row), {})


def wrong(row: dict[str, Any]) -> list[str]:
    """What must not be: outcomes that are neither exact nor a refusal, what others can see, crashes."""
    found = [row["crash"]] if "crash" in row else []
    for implementation in IMPLEMENTATIONS:
        for cache, outcome in row.get(implementation, {}).items():
            if cache == "visible":
                found += [f"{implementation}: {what}" for what in outcome]
            elif cache != "reference" and outcome.startswith(("differs", "fault")):
                found.append(f"{implementation}, {cache}: {outcome}")
    return found


def page(result: dict[str, Any]) -> str:
    """The page as Markdown; the same result gives the same page."""
    rows = result["classes"]
    groups = {name: _group(row) for name, row in rows.items()}
    count = {group: sum(found == group for found in groups.values()) for group in ("works", "refused", "other")}
    parts = [
        "# Architectures",
        _introduction(result, len(rows), count),
        "## What works",
        _works({name: row for name, row in rows.items() if groups[name] == "works"}),
        "## What is refused, and why",
        _refused({name: row for name, row in rows.items() if groups[name] == "refused"}),
        "## Which attention implementation",
        _implementations(rows),
    ]
    others = {name: row for name, row in rows.items() if groups[name] == "other"}
    if others:
        parts += ["## What could not be judged", _others(others)]
    faults = {name: wrong(row) for name, row in rows.items() if wrong(row)}
    if faults:
        parts += ["## Known faults", _faults(faults)]
    return "\n\n".join(parts) + "\n"


def _group(row: dict[str, Any]) -> str:
    outcome = judged(row).get("kara", "")
    return "works" if outcome == "exact" else "refused" if outcome.startswith("refused") else "other"


def _introduction(result: dict[str, Any], total: int, count: dict[str, int]) -> str:
    return (
        f"Transformers {result['transformers']} has {total} classes that write text: those of `AutoModelForCausalLM` "
        "and, used with text alone, of\n`AutoModelForImageTextToText`. Each was built in miniature from its default "
        f"config, with random weights. {count['works']} work with `KaraCache`,\n{count['refused']} are refused by name "
        f"before anything is stored, and {count['other']} could not be judged.\n\n"
        "*Works* means: while every token is kept (`retention=1.0`) the logits are those of `DynamicCache` within "
        "1e-4 of the largest logit, in\na prompt with its answer, a later turn, and a left-padded batch. *Refused* "
        "means a `ValueError` or `RuntimeError` that says why. Making, using\nand dropping a cache changes nothing in "
        "what the model computes for others, bit for bit.\n\n"
        "Look for the `model_type` of your model's config. `docs/architectures.json` has every outcome, cache by "
        "cache.\nBoth files are written by `python tests/support/sweep.py run`."
    )


def _types(rows: Iterable[dict[str, Any]]) -> str:
    """Model types, the ones with images marked."""
    return ", ".join(sorted({f"`{row['model_type']}`" + ("*" if row["kind"] == "images" else "") for row in rows}))


def _works(rows: dict[str, Any]) -> str:
    head = "| Layers of the model | KVCompressCache | PoDCache | Classes |\n|---|---|---|---|\n"
    by_mix: dict[str, list[dict[str, Any]]] = {}
    for row in rows.values():
        by_mix.setdefault(_mix(row), []).append(row)
    table, lists = [], []
    for mix in sorted(by_mix, key=lambda mix: -len(by_mix[mix])):
        members = by_mix[mix]
        table.append(f"| {mix} | {_share(members, 'kv_compress')} | {_share(members, 'pod')} | {len(members)} |")
        lists.append(f"**{mix}**: {_types(members)}.")
    return head + "\n".join(table) + "\n\n" + "\n\n".join(lists) + "\n\n`*`: takes images as well."


def _mix(row: dict[str, Any]) -> str:
    outcomes = judged(row)
    if "latent attention" in outcomes.get("kv_compress", ""):
        return "Multi-head latent attention"
    for title, pattern in _MIXES.items():
        if any(re.fullmatch(pattern, layer) for layer in row["layers"]):
            return title
    if len(set(row["layers"])) > 1:
        return "Layers that select keys themselves between full attention"
    return "Full attention in every layer"


def _share(rows: list[dict[str, Any]], cache: str) -> str:
    exact = sum(judged(row).get(cache) == "exact" for row in rows)
    return "yes" if exact == len(rows) else "refused" if exact == 0 else f"{exact} of {len(rows)}"


def _refused(rows: dict[str, Any]) -> str:
    by_reason = _grouped(rows, lambda name, row: _reason(name, judged(row)["kara"]))
    lines = [f"| {reason} | {_types(members)} |" for reason, members in by_reason]
    return "| Reason | Models |\n|---|---|\n" + "\n".join(lines)


def _grouped(rows: dict[str, Any], key: Callable[[str, dict[str, Any]], str]) -> list[tuple[str, list[dict[str, Any]]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for name, row in rows.items():
        found.setdefault(key(name, row), []).append(row)
    return sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))


def _reason(name: str, outcome: str) -> str:
    """A refusal without the names of one model and without its remedy."""
    text = outcome.removeprefix("refused: ").replace(name, "the model")
    text = re.sub(r"\b[A-Z]\w+(Attention|SelfAttention)\b", "its attention module", text)
    text = re.sub(r" \(attn_implementation=[^)]*\)", "", text)
    text = re.sub(r"\blayer \d+\b", "a layer", text)
    return text.partition(";")[0].replace("|", "\\|")


def _implementations(rows: dict[str, Any]) -> str:
    def works(row: dict[str, Any], implementation: str) -> bool:
        return row.get(implementation, {}).get("kara") == "exact"

    only = {
        name: [row for row in rows.values() if works(row, name) and other in row and not works(row, other)]
        for name, other in (("sdpa", "eager"), ("eager", "sdpa"))
    }
    lines = [f'Only with `attn_implementation="{name}"`: {_types(found)}.' for name, found in only.items() if found]
    lone = [row for row in rows.values() if works(row, "eager") and "sdpa" not in row]
    if lone:
        lines.append(f"Transformers has no sdpa for them, and eager works: {_types(lone)}.")
    return "All others work with both, `sdpa` and `eager`.\n\n" + "\n\n".join(lines)


def _others(rows: dict[str, Any]) -> str:
    def why(name: str, row: dict[str, Any]) -> str:
        told = row.get("not_built") or row.get("crash") or judged(row).get("reference") or judged(row).get("kara", "")
        return str(told).replace(name, "the model").replace("|", "\\|")[:160]

    lines = [f"| {reason} | {_types(members)} |" for reason, members in _grouped(rows, why)]
    return (
        "Transformers cannot build or run these from their defaults here, with text alone.\n\n"
        "| Why | Models |\n|---|---|\n" + "\n".join(lines)
    )


def _faults(faults: dict[str, list[str]]) -> str:
    lines = [f"| `{name}` | {'; '.join(found)[:300].replace('|', chr(92) + '|')} |" for name, found in faults.items()]
    return "| Class | What is wrong |\n|---|---|\n" + "\n".join(lines)
