"""Tables of what `kv_compress_quality.py` measured."""

from functools import cache
from typing import Any

import numpy as np

FULL, OURS, CONTROL, CHECK = "full cache", "KV-Compress", "uniform heads", "random, uniform heads"
COMPARED = (OURS, "SnapKV", "SnapKV, voting on", "random", "recency")  # with uniform heads
RULES = {"before": "question before", "after": "question after", "pinned": "prompt pinned"}
UNEQUAL = 0.02  # share of resident bytes: a method may hold so much more than uniform heads; less is pointed out

Row = dict[str, Any]


@cache
def _draws(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(n, size=(10_000, n))


def compare(row: Row, control: Row) -> tuple[float, float, float, int, int]:
    """Mean difference on the same problems, its 95 % interval (bootstrap over problems), problems won and lost."""
    mine, other = (np.array(each["scores"].split(), dtype=float) for each in (row, control))
    difference = mine - other
    low, high = np.percentile(difference[_draws(len(difference))].mean(1), (2.5, 97.5))
    return float(difference.mean()), float(low), float(high), int((mine > other).sum()), int((mine < other).sum())


def _versus(row: Row, control: Row) -> str:
    mean, low, high, wins, losses = compare(row, control)
    mark = "**" if low > 0 or high < 0 else ""
    ties = row["n"] - wins - losses
    return f"{mark}{100 * mean:+.1f}{mark} ({100 * low:+.1f} to {100 * high:+.1f}), {wins}/{losses}/{ties}"


def _cost(row: Row, control: Row) -> str:
    apart = row["resident_bytes"] / control["resident_bytes"] - 1
    noted = f" ({apart:+.1%} bytes)" if abs(apart) > UNEQUAL else ""
    share = row["resident_bytes"] / row["full_bytes"]
    return f"{share:.1%}{noted}, {row['mean_generated']:.0f}, {row['truncated']:.0%}"


def table(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def _by_cell(rows: list[Row], weights: str) -> dict[tuple[str, str, float], dict[str, Row]]:
    """Rows of these weights by (problems, rule, share) and method; cells that are not complete are left out."""
    found: dict[tuple[str, str, float], dict[str, Row]] = {}
    for row in rows:
        if row["weights"] == weights:
            found.setdefault((row["problems"], row["rule"], row["nominal"]), {})[row["method"]] = row
    kinds, rules = list(dict.fromkeys(problems for problems, *_ in found)), list(RULES)
    cells = {}
    for problems, rule, share in sorted(
        (k for k in found if k[1] in RULES), key=lambda k: (kinds.index(k[0]), rules.index(k[1]), -k[2])
    ):
        cell = found[problems, rule, share] | found.get((problems, "none", 1.0), {})
        if {FULL, CONTROL, *COMPARED} <= set(cell):
            cells[problems, rule, share] = cell
    return cells


def markdown(rows: list[Row], weights: str) -> str:
    """All that was measured on these weights: scores with what uniform heads make of them, and what they took."""
    cells = _by_cell(rows, weights)
    if not cells:
        return "Not measured on these weights."
    scores, costs, checks = [], [], []
    for (problems, rule, share), cell in cells.items():
        label, control = [problems, RULES[rule], f"{100 * share:g}%"], cell[CONTROL]
        against = [f"{cell[name]['score']:.1%}, {_versus(cell[name], control)}" for name in COMPARED]
        scores.append([*label, f"{cell[FULL]['score']:.1%}", f"{control['score']:.1%}", *against])
        costs.append([*label, *(_cost(cell[name], control) for name in (CONTROL, *COMPARED))])
        if CHECK in cell:
            checks.append(compare(cell[CHECK], cell["random"]))
    row = next(iter(cells.values()))[CONTROL]
    settings = ", ".join(
        f"{name} {row['settings'][name]}" for name in ("block_size", "protected", "sinks", "observation")
    )
    parts = [
        f"{row['n']} problems of each kind, {settings} (with a pinned prompt, sinks are all of it); {row['device']}, "
        f"{row['threads']} thread, torch {row['versions']['torch']}, transformers {row['versions']['transformers']}, "
        f"float32, {row['date']}.",
        "Score; difference to uniform heads in points (95 % interval); problems won/lost/tied. Bold: the interval "
        "leaves out 0. Budgets are shares of all tokens of a problem, behind a pinned prompt of the generated ones.",
        table(["problems", "compressed", "budget", FULL, CONTROL, *COMPARED], scores),
        "Most resident bytes while decoding, as a share of what the full cache holds in the end; tokens generated; "
        f"answers cut off. A method that held over {UNEQUAL:.0%} more than uniform heads was given a lower budget; "
        "where one holds less by more than that, it is said.",
        table(["problems", "compressed", "budget", CONTROL, *COMPARED], costs),
    ]
    if checks:
        apart = sum(low > 0 or high < 0 for _, low, high, *_ in checks)
        least, most = (100 * end(mean for mean, *_ in checks) for end in (min, max))
        parts.append(
            f"Random with uniform heads, at 25%: between {least:+.1f} and {most:+.1f} points from random; {apart} of "
            f"{len(checks)} intervals leave out 0."
        )
    return "\n\n".join(parts)


def summary(rows: list[Row], weights: str) -> str:
    """Scores at a budget of 25 %, for traces 50 %, with the difference to uniform heads; a star where its interval
    leaves out 0."""
    cells = {
        key: cell
        for key, cell in _by_cell(rows, weights).items()
        if key[2] == (0.5 if key[0] in ("trace", "fact") else 0.25)
    }
    if not cells:
        return "Not measured on these weights."
    lines = []
    for name in (FULL, OURS, CONTROL, *COMPARED[1:]):
        line = [f"**{name}**" if name == OURS else name]
        for cell in cells.values():
            mean, low, high, *_ = compare(cell[name], cell[CONTROL])
            star = "*" if low > 0 or high < 0 else ""
            versus = "" if name in (FULL, CONTROL) else f" ({100 * mean:+.1f}{star})"
            line.append(f"{cell[name]['score']:.1%}{versus}")
        lines.append(line)
    head = [f"{problems}, {RULES[rule]}, {100 * share:g}%" for problems, rule, share in cells]
    return table(["what is kept", *head], lines)
