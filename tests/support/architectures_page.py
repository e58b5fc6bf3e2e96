"""docs/architectures.md, made of the result of the sweep."""

import re
import textwrap
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
    groups: dict[str, dict[str, Any]] = {"works": {}, "refused": {}, "wrong": {}, "unjudged": {}}
    for name, row in rows.items():
        groups[_group(row)][name] = row
    faults = {name: wrong(row) for name, row in rows.items() if wrong(row)}
    parts = ["# Architectures", _introduction(result, groups)]
    parts += ["## What works", _works(groups["works"]), _implementations(groups["works"])]
    parts += ["## What is refused, and why", _refused(groups["refused"])]
    if groups["unjudged"]:
        parts += ["## What could not be judged", _unjudged(groups["unjudged"])]
    if faults:
        parts += ["## Known faults", _faults(faults)]
    return "\n\n".join(parts) + "\n"


def _group(row: dict[str, Any]) -> str:
    outcome = judged(row).get("kara", "")
    if outcome == "exact":
        return "works"
    if outcome.startswith("refused"):
        return "refused"
    return "wrong" if wrong(row) else "unjudged"


def _introduction(result: dict[str, Any], groups: dict[str, dict[str, Any]]) -> str:
    count = {group: len(members) for group, members in groups.items()}
    left = result["left"]
    rest = f" {left} more have not been checked with this version yet." if left else ""
    also = f"{count['wrong']} do not behave as they should (see the end), and " if count["wrong"] else ""
    return "\n\n".join(
        map(
            _wrapped,
            (
                f"{sum(count.values())} classes of Transformers {result['transformers']} that write text were checked: "
                f"of `AutoModelForCausalLM` and, used with text alone, of `AutoModelForImageTextToText`.{rest} Each "
                "was built in miniature from its default config, with all kinds of its layers and random weights. "
                f"{count['works']} work with `KaraCache`, "
                f"{count['refused']} are refused by name, {also}{count['unjudged']} could not be judged.",
                "*Works*: while every token is kept (`retention=1.0`) the logits are those of `DynamicCache` within "
                "1e-4 of the largest logit, in a prompt with its answer, a later turn, and a left-padded batch. "
                "*Refused*: a `ValueError` or `RuntimeError` says why before anything is stored. *Invisible*, for all "
                "of them: making, using and dropping a cache changes nothing for others, bit for bit: logits, "
                "attentions, saved configs, pickles, `generate_batch`.",
                "Look for the `model_type` of your model's config. `docs/architectures.json` has every outcome, cache "
                "by cache. Both files are written by `python tests/support/sweep.py run`.",
            ),
        )
    )


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)


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
        lists.append(_wrapped(f"**{mix}**: {_types(members)}."))
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

    told = []
    for name, other in (("sdpa", "eager"), ("eager", "sdpa")):
        only = [row for row in rows.values() if works(row, name) and not works(row, other)]
        if only:
            told.append(f'With `attn_implementation="{name}"` only: {_types(only)}.')
    return _wrapped(" ".join([*told, "All others with both, `sdpa` and `eager`."]))


def _unjudged(rows: dict[str, Any]) -> str:
    def why(name: str, row: dict[str, Any]) -> str:
        told = str(row.get("not_built") or judged(row)["reference"]).replace(name, "the model")
        return told.replace("|", "\\|").partition(". ")[0][:160]

    lines = [f"| {reason} | {_types(members)} |" for reason, members in _grouped(rows, why)]
    return (
        "Transformers cannot build or run these here, from their defaults and with text alone.\n\n"
        "| Why | Models |\n|---|---|\n" + "\n".join(lines)
    )


def _faults(faults: dict[str, list[str]]) -> str:
    classes: dict[str, set[str]] = {}
    for name, found in faults.items():
        for what in found:
            told = what.removeprefix("sdpa").removeprefix("eager").lstrip(":, ").replace(name, "the model")
            classes.setdefault(re.sub(r"^(kara|kv_compress|pod): ", "", told)[:160], set()).add(name)
    lines = []
    for what, names in sorted(classes.items(), key=lambda item: (-len(item[1]), item[0])):
        shown = ", ".join(f"`{name}`" for name in sorted(names)[:6])
        lines.append(f"- {what}: {shown}" + (f" and {len(names) - 6} more" if len(names) > 6 else ""))
    return "\n".join(lines)
