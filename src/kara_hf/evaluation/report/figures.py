"""The figures of a report, as plotly reads them."""

import math
from collections.abc import Iterable, Iterator
from html import escape
from typing import Any

import pandas as pd  # type: ignore[import-untyped]

from .statistics import interval_of
from .summary import (
    FULL,
    Panel,
    Results,
    Row,
    budget_of,
    difference_of,
    gap_of,
    held_by,
    is_known,
    percent,
    record_of,
    rounded,
    score_of,
    size_in_words,
)

BINS, LEAST = 6, 8  # of a curve over distances: most bins, and fewest problems in one

# Okabe and Ito's colours, without those that vanish on white or on black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a8f98")
SYMBOLS = {
    "circle": "●",
    "square": "■",
    "diamond": "◆",
    "triangle-up": "▲",
    "cross": "✚",
    "x": "✖",
    "triangle-down": "▼",
    "star": "★",
}
DASHES = ("solid", "dot", "dashdot")
SHARES = [2.0**power for power in range(-8, 4)]
CLOSE_SHARES = [0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.25, 1.5, 2, 2.5, 3, 4]


Figure = dict[str, Any]


def styles_of(methods: list[str]) -> dict[str, tuple[str, str, str]]:
    """A colour, a symbol and a kind of line for each method; up to 56, no two share colour and symbol."""
    symbols, cycle = list(SYMBOLS), len(COLOURS)
    return {
        method: (COLOURS[i % cycle], symbols[i % len(symbols)], DASHES[i // cycle % len(DASHES)])
        for i, method in enumerate(methods)
    }


def _by_method(panel: Panel, results: Results) -> dict[str, list[Row]]:
    rows = {method: [row for row in panel.rows if row["method"] == method] for method in results.methods}
    return {method: sorted(found, key=lambda row: row["resident"]) for method, found in rows.items() if found}


def span_of(panels: list[Panel]) -> dict[str, list[float]]:
    """Ends of both axes, the same for all panels of a task."""
    rows = [row for panel in panels for row in panel.rows]
    shares = [row["resident"] for row in rows]
    scores = [row[name] for row in rows for name in ("score", "low", "high") if is_known(row[name])]
    pad = 0.06 * max(max(scores) - min(scores), 0.05)
    x = [math.log10(min(shares) / 1.2), math.log10(max(shares) * 1.2)]
    return {"x": x, "y": [min(scores) - pad, max(scores) + pad]}


def shares_axis(span: list[float]) -> dict[str, Any]:
    shares = SHARES if span[1] - span[0] > 0.8 else CLOSE_SHARES
    return {
        "type": "log",
        "range": span,
        "tickvals": shares,
        "ticktext": [f"{100 * share:.3g}%" for share in shares],
        "title": {"text": "resident bytes, of the full cache", "standoff": 6},
    }


def _moved(rows: dict[str, list[Row]]) -> dict[str, float]:
    """Factors by which methods are moved sideways, 1 in the middle and for what holds its bytes under every rule."""
    ruled = [method for method, found in rows.items() if found[0]["rule"] != "none"]
    step = min(0.03, 0.24 / max(1, len(ruled)))
    moved = {method: math.exp(step * (i - (len(ruled) - 1) / 2)) for i, method in enumerate(ruled)}
    return dict.fromkeys(rows, 1.0) | moved


def draw_accuracy(panel: Panel, results: Results, span: dict[str, list[float]]) -> Figure:
    rows = _by_method(panel, results)
    moved = _moved(rows)
    traces = []
    for method, found in rows.items():
        traces.append(
            {
                "name": method,
                "x": [finite(row["resident"] * moved[method]) for row in found],
                "y": [finite(row["score"]) for row in found],
                "error_y": _bars(found),
                "hovertext": [_hover(row, panel, results) for row in found],
            }
        )
        if method == FULL:
            ends = [10**end for end in span["x"]]
            line = {"dash": "dash", "width": 1}
            traces.append({"name": method, "x": ends, "y": [found[0]["score"]] * 2, "mode": "lines", "line": line})
            traces[-1]["hoverinfo"] = "skip"
    front = [(row["resident"], row["score"]) for row in _front(panel.rows, results.ceiling)]
    if front:
        front.append((10 ** span["x"][1], front[-1][1]))
    return {
        "data": traces,
        "layout": {
            "front": [{"x": [x for x, _ in front], "y": [y for _, y in front]}],
            "xaxis": shares_axis(span["x"]),
            "yaxis": {"range": span["y"], "tickformat": ".0%", "title": {"text": "score", "standoff": 4}},
        },
    }


def _front(rows: Iterable[Row], ceiling: str) -> list[Row]:
    """Rows that score more than all that hold less, by the bytes that they hold."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["resident"], -row["score"])):
        if row["method"] != ceiling and (not front or row["score"] > front[-1]["score"]):
            front.append(row)
    return front


def _bars(rows: list[Row]) -> dict[str, Any]:
    up = [finite(row["high"] - row["score"]) for row in rows]
    return {
        "array": up,
        "arrayminus": [finite(row["score"] - row["low"]) for row in rows],
        "width": 0,
        "thickness": 1.2,
    }


def finite(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _hover(row: Row, panel: Panel, results: Results) -> str:
    budget = f", budget {budget_of(row)}" if budget_of(row) else ""
    seeds = f", seeds {row['seeds']}" if " " in row["seeds"] else ""
    lines = [
        f"<b>{escape(row['method'])}</b>{budget}",
        f"score {score_of(row)}, {row['n']} problems{seeds}",
        f"holds {held_by(row)}, {size_in_words(row['resident_bytes'])}",
        f"mean {percent(row['held'])}, peak {percent(row['peak'])}",
    ]
    if is_known(row["difference"]):
        lines.append(f"against {escape(results.reference)} {difference_of(row).replace('**', '')}, {record_of(row)}")
    if is_known(row["gap"]):
        lines.append(f"gap closed {gap_of(row)}")
    lines.append(f"{rounded(row['generated'])} tokens, {percent(row['truncated'], 0)} cut off, ")
    lines[-1] += f"{percent(row['looped'], 0)} loops, {rounded(row['tokens_per_second'])} tokens/s"
    return "<br>".join(lines)


def draw_measure(panel: Panel, results: Results, name: str) -> Figure:
    """One measure against resident bytes, a line for each method."""
    rows = _by_method(panel, results)
    share = name in ("truncated", "looped", "peak")
    traces = [
        {
            "name": method,
            "x": [finite(row["resident"]) for row in found],
            "y": [finite(row[name]) for row in found],
            "hovertext": [
                f"<b>{escape(method)}</b> {budget_of(row)}<br>{percent(row[name]) if share else rounded(row[name])}"
                for row in found
            ],
        }
        for method, found in rows.items()
    ]
    span = span_of([panel])["x"]
    most = max([row[name] for row in panel.rows if is_known(row[name])], default=0)
    axis = {"range": [0, max(1.08 * most, 0.05)], "tickformat": ".0%" if share else ""}
    if name == "generated":
        del axis["range"]
    return {"data": traces, "layout": {"xaxis": shares_axis(span), "yaxis": axis}}


def bin_distances(panel: Panel, results: Results) -> tuple[pd.DataFrame, pd.Series, list[str]] | None:
    """Examples of a task, the bin of each problem by quantiles of its distance, and what bins are called."""
    frame = results.frame
    frame = frame[(frame["model"] == panel.model) & (frame["weights"] == panel.weights) & (frame["task"] == panel.task)]
    distance = frame.dropna(subset="distance").groupby("number")["distance"].first()
    bins = min(BINS, len(distance) // LEAST)
    if bins < 2:
        return None
    place = pd.qcut(distance, bins, labels=False, duplicates="drop")
    ends = distance.groupby(place).agg(["min", "max"]).astype(int)
    return frame, place, [f"{low}-<br>{high}" if low < high else str(low) for low, high in ends.itertuples(index=False)]


def draw_curves(
    panel: Panel, results: Results, frame: pd.DataFrame, place: pd.Series, names: list[str]
) -> Iterator[tuple[str, Figure]]:
    """For each budget the score by distance, a line for each method."""
    mine = frame[(frame["rule"] == "none") | ((frame["rule"] == panel.rule) & (frame["equal"] == panel.equal))]
    budgets = sorted(mine.loc[mine["rule"] != "none", "budget"].unique(), reverse=True) or [1.0]
    axis = {
        "tickvals": list(range(len(names))),
        "ticktext": names,
        "tickfont": {"size": 10},
        "tickangle": 0,
        "ticklabeloverflow": "allow",
        "range": [-0.5, len(names) - 0.5],
        "title": {"text": "tokens between fact and question", "standoff": 6},
        "showgrid": False,
    }
    for budget in budgets:
        here = mine[(mine["rule"] == "none") | (mine["budget"] == budget)]
        methods = [method for method in results.methods if method in set(here["method"])]
        traces = []
        for i, method in enumerate(methods):
            scores = here[here["method"] == method].groupby("number")["score"].mean()
            by_bin = scores.groupby(place.reindex(scores.index))
            found = [(int(b), len(group), interval_of(group)) for b, group in by_bin]
            aside = 0.6 * ((i + 0.5) / len(methods) - 0.5)
            rows = [{"score": each.value, "low": each.low, "high": each.high} for *_, each in found]
            told = [
                f"<b>{escape(method)}</b><br>{names[b].replace('<br>', '')} tokens: {score_of(row)}, {n} problems"
                for (b, n, _), row in zip(found, rows, strict=True)
            ]
            traces.append(
                {
                    "name": method,
                    "x": [round(b + aside, 3) for b, *_ in found],
                    "y": [finite(row["score"]) for row in rows],
                    "error_y": _bars(rows),
                    "hovertext": told,
                }
            )
        caption = "score" if panel.rule == "none" else f"budget {100 * budget:.4g}%"
        yield (
            caption,
            {"data": traces, "layout": {"xaxis": axis, "yaxis": {"range": [-0.05, 1.05], "tickformat": ".0%"}}},
        )
