"""The page of divergences: a Pareto plot against bytes, curves over the distance behind the prompt, and tables."""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from html import escape
from typing import Any

from .divergence_summary import COLUMNS, Divergences, against, guide, held_of, kl_of, loss_of, named, nats, same_of
from .figures import Figure, finite, shares_axis, styles_of
from .page import Figures, folded, inline, listed, make_body, origin_parts
from .summary import Mark, Row, budget_of, origins_of, size_in_words

SECTIONS = GUIDE, PARETO, TABLES, DISTANCE, MEASURES, ORIGIN = (
    "How to read it",
    "Divergence against resident bytes",
    "Tables",
    "Divergence by distance behind the prompt",
    "Likeliest tokens and loss",
    "Where these numbers come from",
)
DRAWN = (
    "In the figures, lower is better but for the share of equal likeliest tokens; bars are 95 % intervals over "
    "documents. The broad grey line is the Pareto front: the least divergence that so many bytes bought. A divergence "
    "of 0, as of the full cache itself, has no place on a logarithmic axis. Buttons at the top hide and show methods."
)
OTHERS = {"same": "same likeliest token", "loss": "loss beyond the full cache's"}
TICKS = [10.0**power for power in range(-7, 3)]


def make_divergence_page(found: Divergences, title: str) -> tuple[str, dict[str, Any]]:
    """The body of the page, and what its figures show."""
    figures, styles = Figures(), styles_of(found.methods)
    sections: dict[str, list[str]] = {name: [] for name in SECTIONS}
    sections[GUIDE] = [listed(inline(line) for line in [*guide(found, escape), DRAWN])]
    panels = list(found.panels())
    sections[PARETO] = [figures.grid((name, draw_pareto(rows, found)) for name, rows in panels)]
    for number, (name, rows) in enumerate(panels):
        listing = f"<div class='wide'>{_listing(rows, found)}</div>"
        sections[TABLES].append(folded(name, listing, open=number == 0))
        curves = figures.grid(draw_curves(rows, found), "grid small")
        sections[DISTANCE].append(folded(name, curves, open=number == 0))
        measures = figures.grid(((words, draw_measure(rows, key)) for key, words in OTHERS.items()), "grid small")
        sections[MEASURES].append(folded(name, measures, open=number == 0))
    sections[ORIGIN] = origin_parts(found.frame)
    body = make_body(title, found.verdict(escape), sections, styles)
    return body, {"figures": figures, "styles": styles}


def divergence_parts(
    found: Divergences, title: str, mark: Mark, table: Callable[[list[str], Iterable[list[str]]], str]
) -> Iterator[str]:
    """The parts of the Markdown."""
    yield f"# {mark(title)}"
    yield found.verdict(mark)
    yield "\n".join(f"- {line}" for line in guide(found, mark))
    for name, rows in found.panels():
        yield f"## {mark(name)}"
        yield f"{max(row['n'] for row in rows)} documents, {max(row['tokens'] for row in rows):,} forced tokens."
        lines = [[form(row) if key == "against" else mark(form(row)) for key, form in COLUMNS.items()] for row in rows]
        yield table(_head(found, mark), lines)
    yield "## Where these numbers come from"
    yield "\n".join(
        f"- {mark(words)}\n" + "\n".join(f"  - {mark(command)}" for command in commands)
        for words, commands in origins_of(found.frame)
    )


def _head(found: Divergences, mark: Mark) -> list[str]:
    return [f"against {mark(found.reference)}" if name == "against" else name for name in COLUMNS]


def _listing(rows: list[Row], found: Divergences) -> str:
    lines, before = [], None
    for row in rows:
        shown = {name: escape(form(row)) for name, form in COLUMNS.items()}
        side = "won" if row["difference"] < 0 else "lost"
        shown["against"] = re.sub(r"\*\*(.+?)\*\*", rf"<b class='{side}'>\1</b>", shown["against"])
        first = " class='first'" if budget_of(row) != before else ""
        before = budget_of(row)
        lines.append(f"<tr{first}>{''.join(f'<td>{cell}</td>' for cell in shown.values())}</tr>")
    head = "".join(f"<th>{name}</th>" for name in _head(found, escape))
    return f"<table><thead><tr>{head}</tr></thead>{''.join(lines)}</table>"


# ------------------------------------------------------------------------------------------------------------- figures
def _by_method(rows: list[Row]) -> dict[str, list[Row]]:
    names = dict.fromkeys(row["method"] for row in rows)
    return {
        name: sorted((row for row in rows if row["method"] == name), key=lambda row: row["resident"]) for name in names
    }


def _shares(rows: list[Row]) -> dict[str, Any]:
    shares = [row["resident"] for row in rows]
    return shares_axis([math.log10(min(shares) / 1.2), math.log10(max(shares) * 1.2)])


def _positive(value: float) -> float | None:
    return finite(value) if value > 0 else None


def _log_axis(title: str, values: Iterable[float]) -> dict[str, Any]:
    known = [value for value in values if value > 0]
    near = known and max(known) < 100 * min(known)
    ticks = [digit * tick for tick in TICKS for digit in ((1, 2, 5) if near else (1,))]
    shown = {"tickvals": ticks, "ticktext": [f"{tick:.3g}" for tick in ticks]}
    return {"type": "log", "title": {"text": title, "standoff": 4}, **shown}


def _bars(rows: list[Row], name: str = "kl") -> dict[str, Any]:
    return {
        "array": [finite(row[f"{name}_high"] - row[name]) for row in rows],
        "arrayminus": [finite(row[name] - row[f"{name}_low"]) for row in rows],
        "width": 0,
        "thickness": 1.2,
    }


def _hover(row: Row, found: Divergences) -> str:
    budget = f", budget {budget_of(row)}" if budget_of(row) else ""
    lines = [
        f"<b>{escape(row['method'])}</b>{budget}",
        f"KL {kl_of(row)}, {row['n']} documents",
        f"median {nats(row['kl_median'])}, 99 % {nats(row['kl_99'])}, largest {nats(row['kl_max'])}",
        f"same token {same_of(row)}, loss {loss_of(row)}",
        f"holds {held_of(row)}, {size_in_words(row['resident_bytes'])}",
    ]
    if told := against(row).replace("**", ""):
        lines.append(f"against {escape(found.reference)} {told}")
    return "<br>".join(lines)


def draw_pareto(rows: list[Row], found: Divergences) -> Figure:
    """Divergence against resident bytes, both logarithmic, a line for each method."""
    traces = [
        {
            "name": method,
            "x": [finite(row["resident"]) for row in mine],
            "y": [_positive(row["kl"]) for row in mine],
            "error_y": _bars(mine),
            "hovertext": [_hover(row, found) for row in mine],
        }
        for method, mine in _by_method(rows).items()
    ]
    front = front_of(rows)
    ends = [(row["resident"], row["kl"]) for row in front]
    if ends:
        ends.append((max(row["resident"] for row in rows) * 1.2, ends[-1][1]))
    return {
        "data": traces,
        "layout": {
            "front": [{"x": [finite(x) for x, _ in ends], "y": [finite(y) for _, y in ends]}],
            "xaxis": _shares(rows),
            "yaxis": _log_axis("KL from the full cache, nats", [row["kl"] for row in rows]),
        },
    }


def front_of(rows: Iterable[Row]) -> list[Row]:
    """Rows that diverge less than all that hold less, by the bytes that they hold; the oracle is left out."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["resident"], row["kl"])):
        if row["kl"] > 0 and row["method"] != "oracle" and (not front or row["kl"] < front[-1]["kl"]):
            front.append(row)
    return front


def draw_measure(rows: list[Row], name: str) -> Figure:
    """The share of equal likeliest tokens, or the loss, against resident bytes."""
    form = same_of if name == "same" else loss_of
    traces = [
        {
            "name": method,
            "x": [finite(row["resident"]) for row in mine],
            "y": [finite(row[name]) for row in mine],
            "error_y": _bars(mine, name),
            "hovertext": [f"<b>{escape(method)}</b> {budget_of(row)}<br>{form(row)}" for row in mine],
        }
        for method, mine in _by_method(rows).items()
    ]
    axis = {"tickformat": ".0%"} if name == "same" else {"title": {"text": "nats", "standoff": 4}}
    return {"data": traces, "layout": {"xaxis": _shares(rows), "yaxis": axis}}


def draw_curves(rows: list[Row], found: Divergences) -> Iterator[tuple[str, Figure]]:
    """For each budget the divergence by distance behind the prompt, a line for each method."""
    edges = found.edges(rows)
    names = [f"{low:,} to {high:,}" for low, high in zip(edges[:-1], edges[1:], strict=True)]
    middles = [(low + high) / 2 for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)]
    free = [row for row in rows if row["rule"] == "none"]
    budgets = sorted({row["budget"] for row in rows if row["rule"] != "none"}, reverse=True) or [1.0]
    axis = {"title": {"text": "tokens behind the prompt", "standoff": 6}, "range": [0, int(edges[-1])]}
    for budget in budgets:
        traces = []
        for row in [*free, *(row for row in rows if row["rule"] != "none" and row["budget"] == budget)]:
            shown = [named("kl", each) for each in found.by_distance(row, edges)]
            held = f"<b>{escape(row['method'])}</b>, holds {held_of(row)}"
            traces.append(
                {
                    "name": row["method"],
                    "x": middles,
                    "y": [_positive(each["kl"]) for each in shown],
                    "error_y": _bars(shown),
                    "hovertext": [
                        f"{held}<br>{name} tokens behind the prompt: KL {kl_of(each)}"
                        for name, each in zip(names, shown, strict=True)
                    ],
                }
            )
        seen = [value for trace in traces for value in trace["y"] if value]
        caption = f"budget {100 * budget:.4g}%" if any(row["rule"] != "none" for row in rows) else "nothing evicted"
        yield caption, {"data": traces, "layout": {"xaxis": axis, "yaxis": _log_axis("", seen)}}
