"""A summary of results in the order in which it is shown, and its numbers in words."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import pandas as pd  # type: ignore[import-untyped]

from ...methods.rules import PROMPT_KEPT, QUERY_AGNOSTIC, QUERY_AWARE
from .statistics import summarise

FULL, ORACLE = "full", "oracle"
RULE_LABELS = {
    PROMPT_KEPT: "prompt kept",
    QUERY_AWARE: "prompt compressed, question known",
    QUERY_AGNOSTIC: "context compressed, then the question",
    "none": "nothing evicted",
}
UNEQUAL = 0.02  # share of resident bytes; a method that is further from the reference is pointed out

Row = dict[str, Any]
Figure = dict[str, Any]
Mark = Callable[[str], str]  # from text of any origin to Markdown that shows it as it is


@dataclass(frozen=True)
class Panel:
    """The rows that are drawn or listed together: one task and rule, beside what is under no rule."""

    model: str
    weights: str
    task: str
    rule: str
    equal: str
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        return _kind(self.rule, self.equal)


def _kind(rule: str, equal: str) -> str:
    return RULE_LABELS.get(rule, rule) + ("" if equal == "bytes" or rule == "none" else f", equal {equal}")


class Results:
    """A summary in the order in which it is shown."""

    def __init__(self, frame: pd.DataFrame, reference: str, ceiling: str = ORACLE):
        self.frame, self.reference, self.ceiling = frame, reference, ceiling
        rows: list[Row] = summarise(frame, reference, ceiling=ceiling).to_dict("records")
        ruled = {row["method"] for row in rows if row["rule"] != "none"}
        self.methods = sorted(
            {row["method"] for row in rows}, key=lambda m: (m != FULL, m in ruled, m != reference, m == ceiling, m)
        )
        rules = list(RULE_LABELS)
        self.rows = sorted(
            rows,
            key=lambda row: (
                *(row[name] for name in ("model", "weights", "task")),
                rules.index(row["rule"]) if row["rule"] in rules else len(rules),
                row["equal"],
                -row["budget"],
                self.methods.index(row["method"]),
            ),
        )
        self.several = len({(row["model"], row["weights"]) for row in rows}) > 1

    def tasks(self) -> Iterator[tuple[str, list[Panel]]]:
        """Each task by its name, with its panels."""
        for key, found in groupby(self.rows, key=lambda row: (row["model"], row["weights"], row["task"])):
            rows = list(found)
            kinds = dict.fromkeys((row["rule"], row["equal"]) for row in rows if row["rule"] != "none")
            panels = []
            for rule, equal in kinds or {("none", "bytes"): None}:
                free = {row["method"]: row for row in rows if row["rule"] == "none"}
                free |= {row["method"]: row for row in rows if (row["rule"], row["equal"]) == ("none", equal)}
                ruled = [row for row in rows if row["rule"] != "none" and (row["rule"], row["equal"]) == (rule, equal)]
                panels.append(Panel(*key, rule, equal, (*free.values(), *ruled)))
            yield self.name(rows[0]), panels

    def name(self, row: Row) -> str:
        return f"{row['model']} ({row['weights'][:8]}), {row['task']}" if self.several else row["task"]

    def lost(self) -> list[Row]:
        return [row for row in self.rows if row["difference_high"] < 0]

    def verdict(self, mark: Mark) -> str:
        """How many comparisons came out which way."""
        rows = [row for row in self.rows if is_known(row["difference"])]
        signs = [int(row["difference_low"] > 0) - int(row["difference_high"] < 0) for row in rows]
        more = sum(row["bytes_apart"] > UNEQUAL for row in rows)
        above, below, undecided = (signs.count(sign) for sign in (1, -1, 0))
        return (
            f"Of {len(signs)} comparisons with {mark(self.reference)}, {above} are above it, {below} below, and "
            f"{undecided} are undecided at 95 %. By chance alone, about one in 20 would leave out 0. "
            f"In {more} of them the method held over {100 * UNEQUAL:g} % more bytes."
        )


def is_known(value: float) -> bool:
    return not math.isnan(value)


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}%" if is_known(value) else ""


def budget_of(row: Row) -> str:
    return "" if row["rule"] == "none" else f"{100 * row['budget']:.4g}%"


def size_in_words(value: float) -> str:
    power = min(3, int(math.log(max(value, 1), 1024)))
    return f"{value / 1024**power:.{int(power > 1)}f} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def rounded(value: float) -> str:
    return (f"{value:,.0f}" if value >= 100 else f"{value:.3g}") if is_known(value) else ""


def _interval(low: float, high: float, form: str = ".1f") -> str:
    return f" ({100 * low:{form}} to {100 * high:{form}})" if is_known(low) else ""


def score_of(row: Row) -> str:
    return percent(row["score"]) + _interval(row["low"], row["high"])


def difference_of(row: Row) -> str:
    """In points; bold where the interval leaves out 0."""
    value, low, high = (row[f"difference{end}"] for end in ("", "_low", "_high"))
    if not is_known(value):
        return ""
    mark = "**" if low > 0 or high < 0 else ""
    return f"{mark}{100 * value:+.1f}{mark}{_interval(low, high, '+.1f')}"


def record_of(row: Row) -> str:
    """Problems won, lost and tied, and how many both had if that is not all of them."""
    if not is_known(row["common"]):
        return ""
    of = "" if row["common"] == row["n"] else f" of {row['common']:.0f}"
    return "/".join(f"{row[name]:.0f}" for name in ("wins", "losses", "ties")) + of


def gap_of(row: Row) -> str:
    return f"{100 * row['gap']:.0f}%{_interval(row['gap_low'], row['gap_high'], '.0f')}" if is_known(row["gap"]) else ""


def held_by(row: Row) -> str:
    apart = row["bytes_apart"]
    return percent(row["resident"]) + (f" ({apart:+.1%})" if abs(apart) > UNEQUAL else "")


def _allocated(row: Row) -> str:
    return f" ({size_in_words(row['allocated_bytes'])})" if is_known(row["allocated_bytes"]) else ""


COSTS: dict[str, Callable[[Row], str]] = {
    "holds": held_by,
    "mean": lambda row: percent(row["held"]),
    "peak": lambda row: f"{percent(row['peak'])}, {size_in_words(row['peak_bytes'])}" + _allocated(row),
    "tokens": lambda row: rounded(row["generated"]),
    "evictable": lambda row: percent(row["evictable"], 0) if is_known(row["evictable"]) else "",
    "cut off, loops": lambda row: f"{percent(row['truncated'], 0)}, {percent(row['looped'], 0)}",
    "tokens/s": lambda row: rounded(row["tokens_per_second"]),
    "solved/min": lambda row: rounded(row["solved_per_minute"]),
}


def guide_lines(results: Results, mark: Mark) -> list[str]:
    reference, ceiling = mark(results.reference), mark(results.ceiling)
    return [
        "**Score**: mean over problems, with its 95 % interval (Wilson's for scores of 0 and 1, otherwise by bootstrap "
        "over problems). Several seeds of a method are averaged for each problem first.",
        f"**Against {reference}**: the difference in points on the same problems, at the same rule and budget, "
        "with its 95 % interval by paired bootstrap; bold where the interval leaves out 0. Beside it, "
        "problems won, lost and tied. With few problems, or where all of them agree, intervals are too narrow.",
        f"**Gap closed**: how far the score is on the way from random to {ceiling}; empty where {ceiling} was not "
        "measured or is not above random.",
        "**Rules**: where the prompt is kept, only generated tokens are compressed; otherwise the prompt is "
        "compressed as well, with the question known, or before the question comes. What evicts nothing is shown under "
        "every rule.",
        "**Budget**: nominal. Methods are set to hold equal bytes there or, where it says so, equal shares of tokens.",
        "**Holds**: most resident bytes while decoding, measured, as a share of what the full cache holds for the same "
        f"tokens; behind it, how many bytes more or less than {reference}, where that is over "
        f"{100 * UNEQUAL:g} %. **Mean**: over decode steps. **Peak**: most at any moment, prefill and copies included; "
        "in brackets what a GPU's allocator gave out at most for one sequence, activations included.",
        "**Tokens**: generated, on average. **Evictable**: how many of them were in whole windows when the answer "
        "ended: of the others no window method can drop any. **Cut off**: answers that "
        "reached the limit. **Loops**: answers that ended "
        "in repetition. **Tokens/s** and **solved/min** are of the same runs, for one sequence of a batch.",
    ]


def _lost(row: Row, results: Results, mark: Mark) -> str:
    where = [mark(results.name(row)), mark(_kind(row["rule"], row["equal"])), f"budget {budget_of(row) or 'whole'}"]
    won, lost, tied = (f"{row[name]:.0f}" for name in ("wins", "losses", "ties"))
    held = f"{percent(row['score'])}, holding {held_by(row)}"
    told = f"{difference_of(row).replace('**', '')} points; {won} won, {lost} lost, {tied} tied"
    return f"{', '.join(where)}: {held}; {told}"


def losses_of(results: Results, mark: Mark) -> Iterator[tuple[str, list[str]]]:
    """Each method that lost, in a sentence, and where."""
    lost = results.lost()
    for method in results.methods:
        mine = [row for row in lost if row["method"] == method]
        if mine:
            tried = sum(is_known(row["difference"]) for row in results.rows if row["method"] == method)
            told = f"**{mark(method)}** scores below {mark(results.reference)} in {len(mine)} of {tried} comparisons"
            yield told, [_lost(row, results, mark) for row in mine]


def origins_of(frame: pd.DataFrame) -> list[tuple[str, list[str]]]:
    """Where rows come from: hardware, versions and dates in words, and the commands."""
    found: dict[str, tuple[set[str], set[str]]] = {}
    weights = frame[["model", "weights"]].drop_duplicates().itertuples(index=False)
    models = "; ".join(f"{model}, weights {revision}" for model, revision in weights)
    for text in dict.fromkeys(frame["provenance"].map(json.dumps)):
        entries = json.loads(text)
        command, date = str(entries.pop("command", "")), str(entries.pop("date", ""))
        flat = {
            name: ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
            for name, value in entries.items()
        }
        dates, commands = found.setdefault("; ".join(f"{k}: {v}" for k, v in flat.items()), (set(), set()))
        dates.add(date)
        commands.add(command)
    return [
        (f"{models}; {words}; {' to '.join(sorted({min(dates), max(dates)}))}", sorted(commands))
        for words, (dates, commands) in found.items()
    ]
