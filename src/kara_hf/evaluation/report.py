"""What was measured, as one HTML page that needs no network and as Markdown."""

import gzip
import json
import math
import re
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]

from .statistics import interval_of, summarise

__all__ = ["markdown", "summarise", "write"]

FULL, ORACLE = "full", "oracle"
RULES = {
    "pinned": "prompt pinned",
    "before": "prompt compressed, question known",
    "after": "context compressed, then the question",
    "none": "nothing evicted",
}
UNEQUAL = 0.02  # share of resident bytes; a method that is further from the reference is pointed out
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

CSS = """
:root { color-scheme: light dark; --text: #1d2129; --faint: #5c6470; --ground: #ffffff; --raised: #f5f6f8;
  --edge: #d9dce1; --grid: #e4e7eb; --won: #0063a0; --lost: #b34700; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7ec; --faint: #a2a9b4; --ground: #14161a; --raised: #1d2026;
  --edge: #363b44; --grid: #2c3038; --won: #6cbcf0; --lost: #ff9a52; } }
* { box-sizing: border-box; }
html { scroll-padding-top: 4.5rem; }
body { margin: 0 auto; max-width: 1500px; padding: 0 1.25rem 4rem; background: var(--ground); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 1.5rem 0 .25rem; font-size: 1.7rem; line-height: 1.2; }
h2 { margin: 2.75rem 0 .5rem; font-size: 1.3rem; }
h4 { margin: 1rem 0 0; font-size: .9rem; color: var(--faint); }
h3 { margin: 1.5rem 0 .25rem; font-size: 1.05rem; overflow-wrap: anywhere; }
p, ul { margin: .4rem 0; max-width: 75rem; }
li { overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: 0 1rem; }
a { color: var(--won); }
.faint { color: var(--faint); }
.legend { position: sticky; top: 0; z-index: 5; display: flex; gap: .3rem; padding: .5rem 0; overflow-x: auto;
  background: var(--ground); border-bottom: 1px solid var(--edge); }
.legend button { flex: none; padding: .15rem .6rem; border: 1px solid var(--edge); border-radius: 1rem;
  background: var(--raised); color: var(--text); font: inherit; font-size: .85rem; cursor: pointer; }
.legend button[aria-pressed=false] { opacity: .4; text-decoration: line-through; }
@media (min-width: 900px) { .legend { flex-wrap: wrap; } }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); gap: 1rem; }
.small { grid-template-columns: repeat(auto-fit, minmax(min(100%, 270px), 1fr)); }
figure { display: flex; flex-direction: column; justify-content: end; margin: .5rem 0; min-width: 0;
  max-width: 720px; }
figcaption { font-weight: 600; font-size: .9rem; }
.plot { height: 380px; }
.small .plot { height: 270px; }
details { margin: .5rem 0; }
summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .78rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .2rem .45rem .2rem 0; text-align: left; }
th { color: var(--faint); font-weight: 600; white-space: normal; vertical-align: bottom; }
tr.first td { border-top: 1px solid var(--edge); }
b.won { color: var(--won); } b.lost { color: var(--lost); }
code { font-size: .85em; overflow-wrap: anywhere; }
"""
SCRIPT = """
const unpack = async id => {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), letter => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
};
const library = document.createElement("script");
library.textContent = await unpack("plotly");
document.head.append(library);
const page = JSON.parse(await unpack("page")), hidden = new Set(), drawn = new Set();
const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const still = matchMedia("(pointer: coarse)").matches;
function draw(div) {
  const {data, layout} = page.figures[div.id], text = colour("--text"), grid = colour("--grid");
  const faint = div.closest(".small") ? "66" : "99";
  const axis = {gridcolor: grid, linecolor: grid, zeroline: false, automargin: true, fixedrange: still};
  const traces = data.map(trace => {
    const [paint, symbol, dash] = page.styles[trace.name];
    const bars = trace.error_y && {...trace.error_y, color: paint + faint};
    return {hoverinfo: "text", mode: "lines+markers", cliponaxis: false, ...trace, error_y: bars,
      visible: !hidden.has(trace.name),
      marker: {color: paint, symbol, size: 9, line: {width: 1, color: colour("--ground")}},
      line: {color: paint, width: 1.5, dash, ...trace.line}};
  });
  const front = (layout.front || []).map(line => ({...line, mode: "lines", hoverinfo: "skip",
    line: {color: colour("--faint"), width: 9, shape: "hv"}, opacity: .22}));
  Plotly.react(div, [...front, ...traces], {
    ...layout, front: undefined, showlegend: false, hovermode: "closest", dragmode: still ? false : "zoom",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: {l: 48, r: 10, t: 8, b: 44},
    font: {color: text, size: 12, family: "system-ui, sans-serif"},
    hoverlabel: {align: "left", bgcolor: colour("--raised"), bordercolor: colour("--edge"), font: {color: text}},
    xaxis: {...axis, ...layout.xaxis}, yaxis: {...axis, ...layout.yaxis},
  }, {displaylogo: false, responsive: true, displayModeBar: false});
  drawn.add(div);
}
const again = () => drawn.forEach(draw);
const plots = document.querySelectorAll(".plot");
const seen = new IntersectionObserver(entries => entries.forEach(entry => {
  if (entry.isIntersecting) { seen.unobserve(entry.target); draw(entry.target); }
}), {rootMargin: "600px"});
plots.forEach(div => seen.observe(div));
document.querySelectorAll(".legend button").forEach(button => button.addEventListener("click", () => {
  const name = button.value, show = hidden.delete(name);
  if (!show) hidden.add(name);
  button.setAttribute("aria-pressed", show);
  again();
}));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
addEventListener("beforeprint", () => {
  document.querySelectorAll("details").forEach(details => { details.open = true; });
  plots.forEach(draw);
});
"""

SECTIONS = GUIDE, ACCURACY, TABLES, LOST, DISTANCE, LENGTH, SPEED, ORIGIN = (
    "How to read it",
    "Accuracy against resident bytes",
    "Tables",
    "What lost",
    "Accuracy by distance of the fact",
    "Length",
    "Speed and memory",
    "Where these numbers come from",
)
MEASURES = {
    LENGTH: {"generated": "tokens generated", "truncated": "answers cut off", "looped": "answers in a loop"},
    SPEED: {
        "tokens_per_second": "tokens per second",
        "solved_per_minute": "problems solved per minute",
        "peak": "most bytes at any moment, of the full cache",
    },
}
DRAWN = (
    "In the figures, methods are moved sideways by a few percent, so that they do not hide each other; the exact "
    "numbers appear under the pointer. The broad grey line is the Pareto front: the best score that so many "
    "bytes bought, the oracle left out. The dashed line is the full cache. Buttons at the top hide and show methods.",
)

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
    return RULES.get(rule, rule) + ("" if equal == "bytes" or rule == "none" else f", equal {equal}")


class Results:
    """A summary in the order in which it is shown."""

    def __init__(self, frame: pd.DataFrame, reference: str, ceiling: str = ORACLE):
        self.frame, self.reference, self.ceiling = frame, reference, ceiling
        rows: list[Row] = summarise(frame, reference, ceiling=ceiling).to_dict("records")
        ruled = {row["method"] for row in rows if row["rule"] != "none"}
        self.methods = sorted(
            {row["method"] for row in rows}, key=lambda m: (m != FULL, m in ruled, m != reference, m == ceiling, m)
        )
        rules = list(RULES)
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
        rows = [row for row in self.rows if _known(row["difference"])]
        signs = [int(row["difference_low"] > 0) - int(row["difference_high"] < 0) for row in rows]
        more = sum(row["bytes_apart"] > UNEQUAL for row in rows)
        above, below, undecided = (signs.count(sign) for sign in (1, -1, 0))
        return (
            f"Of {len(signs)} comparisons with {mark(self.reference)}, {above} are above it, {below} below, and "
            f"{undecided} are undecided at 95 %. By chance alone, about one in 20 would leave out 0. "
            f"In {more} of them the method held over {100 * UNEQUAL:g} % more bytes."
        )


def _known(value: float) -> bool:
    return not math.isnan(value)


def _share(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}%" if _known(value) else ""


def _budget(row: Row) -> str:
    return "" if row["rule"] == "none" else f"{100 * row['budget']:.4g}%"


def _bytes(value: float) -> str:
    power = min(3, int(math.log(max(value, 1), 1024)))
    return f"{value / 1024**power:.{int(power > 1)}f} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def _number(value: float) -> str:
    return (f"{value:,.0f}" if value >= 100 else f"{value:.3g}") if _known(value) else ""


def _interval(low: float, high: float, form: str = ".1f") -> str:
    return f" ({100 * low:{form}} to {100 * high:{form}})" if _known(low) else ""


def _score(row: Row) -> str:
    return _share(row["score"]) + _interval(row["low"], row["high"])


def _difference(row: Row) -> str:
    """In points; bold where the interval leaves out 0."""
    value, low, high = (row[f"difference{end}"] for end in ("", "_low", "_high"))
    if not _known(value):
        return ""
    mark = "**" if low > 0 or high < 0 else ""
    return f"{mark}{100 * value:+.1f}{mark}{_interval(low, high, '+.1f')}"


def _record(row: Row) -> str:
    """Problems won, lost and tied, and how many both had if that is not all of them."""
    if not _known(row["common"]):
        return ""
    of = "" if row["common"] == row["n"] else f" of {row['common']:.0f}"
    return "/".join(f"{row[name]:.0f}" for name in ("wins", "losses", "ties")) + of


def _gap(row: Row) -> str:
    return f"{100 * row['gap']:.0f}%{_interval(row['gap_low'], row['gap_high'], '.0f')}" if _known(row["gap"]) else ""


def _held(row: Row) -> str:
    apart = row["bytes_apart"]
    return _share(row["resident"]) + (f" ({apart:+.1%})" if abs(apart) > UNEQUAL else "")


COSTS: dict[str, Callable[[Row], str]] = {
    "holds": _held,
    "mean": lambda row: _share(row["held"]),
    "peak": lambda row: f"{_share(row['peak'])}, {_bytes(row['peak_bytes'])}",
    "tokens": lambda row: _number(row["generated"]),
    "cut off, loops": lambda row: f"{_share(row['truncated'], 0)}, {_share(row['looped'], 0)}",
    "tokens/s": lambda row: _number(row["tokens_per_second"]),
    "solved/min": lambda row: _number(row["solved_per_minute"]),
}


def _guide(results: Results, mark: Mark) -> list[str]:
    reference, ceiling = mark(results.reference), mark(results.ceiling)
    return [
        "**Score**: mean over problems, with its 95 % interval (Wilson's for scores of 0 and 1, otherwise by bootstrap "
        "over problems). Several seeds of a method are averaged for each problem first.",
        f"**Against {reference}**: the difference in points on the same problems, at the same rule and budget, "
        "with its 95 % interval by paired bootstrap; bold where the interval leaves out 0. Beside it, "
        "problems won, lost and tied. With few problems, or where all of them agree, intervals are too narrow.",
        f"**Gap closed**: how far the score is on the way from random to {ceiling}; empty where {ceiling} was not "
        "measured or is not above random.",
        "**Rules**: a pinned prompt is kept whole, and only generated tokens are compressed; otherwise the prompt is "
        "compressed as well, with the question known, or before the question comes. What evicts nothing is shown under "
        "every rule.",
        "**Budget**: nominal. Methods are set to hold equal bytes there or, where it says so, equal shares of tokens.",
        "**Holds**: most resident bytes while decoding, measured, as a share of what the full cache holds for the same "
        f"tokens; behind it, how many bytes more or less than {reference}, where that is over "
        f"{100 * UNEQUAL:g} %. **Mean**: over decode steps. **Peak**: most at any moment, prefill and copies included.",
        "**Tokens**: generated, on average. **Cut off**: answers that reached the limit. **Loops**: answers that ended "
        "in repetition. **Tokens/s** and **solved/min** are of the same runs, for one sequence of a batch.",
    ]


def _lost(row: Row, results: Results, mark: Mark) -> str:
    where = [mark(results.name(row)), mark(_kind(row["rule"], row["equal"])), f"budget {_budget(row) or 'whole'}"]
    won, lost, tied = (f"{row[name]:.0f}" for name in ("wins", "losses", "ties"))
    held = f"{_share(row['score'])}, holding {_held(row)}"
    told = f"{_difference(row).replace('**', '')} points; {won} won, {lost} lost, {tied} tied"
    return f"{', '.join(where)}: {held}; {told}"


def _losses(results: Results, mark: Mark) -> Iterator[tuple[str, list[str]]]:
    """Each method that lost, in a sentence, and where."""
    lost = results.lost()
    for method in results.methods:
        mine = [row for row in lost if row["method"] == method]
        if mine:
            tried = sum(_known(row["difference"]) for row in results.rows if row["method"] == method)
            told = f"**{mark(method)}** scores below {mark(results.reference)} in {len(mine)} of {tried} comparisons"
            yield told, [_lost(row, results, mark) for row in mine]


def _origins(frame: pd.DataFrame) -> list[tuple[str, list[str]]]:
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


def _plain(text: str) -> str:
    """Text of any origin as Markdown that shows it as it is, in a table too."""
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", escape(" ".join(text.split()), quote=False))


def _table(head: list[str], lines: Iterable[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def markdown(frame: pd.DataFrame, *, reference: str = "random", title: str = "Evaluation") -> str:
    """Tables of accuracy against resident bytes, rules side by side, and of costs; what lost; where it comes from."""
    return _markdown(Results(frame, reference), title)


def _markdown(results: Results, title: str) -> str:
    reference = _plain(results.reference)
    parts = [f"# {_plain(title)}", results.verdict(_plain)]
    parts.append("\n".join(f"- {line}" for line in _guide(results, _plain)))
    for name, panels in results.tasks():
        problems = max(row["n"] for panel in panels for row in panel.rows)
        parts += [f"## {_plain(name)}", f"{problems} problems."]
        head, costs = ["budget", "method"], ["compressed", "budget", "method", *COSTS]
        lines: dict[tuple[float, int], dict[int, Row]] = {}
        for i, panel in enumerate(panels):
            head += [f"{_plain(panel.title)}: score, holds", f"against {reference}, won/lost/tied", "gap closed"]
            for row in panel.rows:
                place = (-row["budget"] if row["rule"] != "none" else -math.inf, results.methods.index(row["method"]))
                lines.setdefault(place, {})[i] = row
        accuracy = []
        for _, by_panel in sorted(lines.items()):
            row = next(iter(by_panel.values()))
            line = [_budget(row), _plain(row["method"])]
            for i in range(len(panels)):
                if (cell := by_panel.get(i)) is None:
                    line += ["", "", ""]
                    continue
                record = f", {_record(cell)}" if _record(cell) else ""
                line += [f"{_score(cell)}, {_held(cell)}", f"{_difference(cell)}{record}", _gap(cell)]
            accuracy.append(line)
        parts.append(_table(head, accuracy))
        shown = {id(row): (panel, row) for panel in panels for row in panel.rows}
        parts.append(
            _table(
                costs,
                [
                    [
                        _plain(panel.title) if row["rule"] != "none" else "",
                        _budget(row),
                        _plain(row["method"]),
                        *(form(row) for form in COSTS.values()),
                    ]
                    for panel, row in shown.values()
                ],
            )
        )
    parts.append("## What lost")
    lost = [f"- {told}\n" + "\n".join(f"  - {line}" for line in lines) for told, lines in _losses(results, _plain)]
    parts.append("\n".join(lost) or f"No method scores below {reference} by a whole interval.")
    parts.append("## Where these numbers come from")
    for words, commands in _origins(results.frame):
        parts.append(f"- {_plain(words)}\n" + "\n".join(f"  - {_plain(command)}" for command in commands))
    return "\n\n".join(parts) + "\n"


def _page(results: Results, title: str) -> tuple[str, dict[str, Any]]:
    """The body of the page, and what its figures show."""
    figures: dict[str, Figure] = {}
    styles = _styles(results.methods)

    def figure(caption: str, drawn: Figure) -> str:
        name = f"figure{len(figures)}"
        figures[name] = drawn
        return f"<figure><figcaption>{escape(caption)}</figcaption><div class='plot' id='{name}'></div></figure>"

    def grid(drawn: Iterable[tuple[str, Figure]], kind: str = "grid") -> str:
        return f"<div class='{kind}'>{''.join(figure(*each) for each in drawn)}</div>"

    def folded(title: str, content: str, *, open: bool) -> str:
        return f"<details{' open' * open}><summary>{escape(title)}</summary>{content}</details>"

    def by_rule(drawn: Iterable[tuple[Panel, Iterable[tuple[str, Figure]]]]) -> str:
        return "".join(f"<h4>{escape(panel.title)}</h4>{grid(each, 'grid small')}" for panel, each in drawn)

    sections: dict[str, list[str]] = {name: [] for name in SECTIONS}
    sections[GUIDE] = [_list(_inline(line) for line in [*_guide(results, escape), *DRAWN])]
    tasks = list(results.tasks())
    for task, panels in tasks:
        span, distances = _span(panels), _distances(panels[0], results)
        drawn = grid((panel.title, _accuracy(panel, results, span)) for panel in panels)
        sections[ACCURACY].append(f"<h3>{escape(task)}</h3>{drawn}")
        sections[TABLES] += [
            folded(
                f"{task}: {panel.title}", f"<div class='wide'>{_listing(panel, results)}</div>", open=len(tasks) == 1
            )
            for panel in panels
        ]
        if distances:
            content = by_rule((panel, _curves(panel, results, *distances)) for panel in panels)
            sections[DISTANCE].append(folded(task, content, open=not sections[DISTANCE]))
        for section, measures in MEASURES.items():
            content = by_rule(
                (panel, [(words, _measure(panel, results, key)) for key, words in measures.items()]) for panel in panels
            )
            sections[section].append(folded(task, content, open=not sections[section]))
    sections[LOST] = [
        f"<h3>{_inline(told)}</h3>{_list(map(_inline, lines))}" for told, lines in _losses(results, escape)
    ]
    if not sections[LOST]:
        sections[LOST] = [f"<p>No method scores below {escape(results.reference)} by a whole interval.</p>"]
    sections[ORIGIN] = [
        f"<p>{escape(words)}</p>{_list(f'<code>{escape(command)}</code>' for command in commands)}"
        for words, commands in _origins(results.frame)
    ]
    legend = "".join(
        f"<button type='button' value='{escape(method)}' aria-pressed='true'>"
        f"<span style='color:{colour}' aria-hidden='true'>{SYMBOLS[symbol]}</span> {escape(method)}</button>"
        for method, (colour, symbol, _) in styles.items()
    )
    filled = {head: "".join(parts) for head, parts in sections.items() if parts}
    links = "".join(f"<a href='#part{i}'>{head}</a>" for i, head in enumerate(filled))
    body = "".join(f"<h2 id='part{i}'>{head}</h2>{parts}" for i, (head, parts) in enumerate(filled.items()))
    verdict = f"<p>{results.verdict(escape)}</p><nav>{links}</nav>"
    script = "<noscript><p>The figures need JavaScript; the tables do not.</p></noscript>"
    return f"<h1>{escape(title)}</h1>{verdict}{script}<div class='legend'>{legend}</div>{body}", {
        "figures": figures,
        "styles": styles,
    }


def _list(items: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"


def _packed(name: str, text: str) -> str:
    """Text that the page unpacks when it is opened; plotly.js is a third so large like this."""
    data = b64encode(gzip.compress(text.encode(), mtime=0)).decode()
    return f"<script type='application/octet-stream' id='{name}'>{data}</script>"


def _inline(text: str) -> str:
    """Bold as HTML, in text that is escaped already."""
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)


def _styles(methods: list[str]) -> dict[str, tuple[str, str, str]]:
    """A colour, a symbol and a kind of line for each method; up to 56, no two share colour and symbol."""
    symbols, cycle = list(SYMBOLS), len(COLOURS)
    return {
        method: (COLOURS[i % cycle], symbols[i % len(symbols)], DASHES[i // cycle % len(DASHES)])
        for i, method in enumerate(methods)
    }


def _by_method(panel: Panel, results: Results) -> dict[str, list[Row]]:
    rows = {method: [row for row in panel.rows if row["method"] == method] for method in results.methods}
    return {method: sorted(found, key=lambda row: row["resident"]) for method, found in rows.items() if found}


def _span(panels: list[Panel]) -> dict[str, list[float]]:
    """Ends of both axes, the same for all panels of a task."""
    rows = [row for panel in panels for row in panel.rows]
    shares = [row["resident"] for row in rows]
    scores = [row[name] for row in rows for name in ("score", "low", "high") if _known(row[name])]
    pad = 0.06 * max(max(scores) - min(scores), 0.05)
    x = [math.log10(min(shares) / 1.2), math.log10(max(shares) * 1.2)]
    return {"x": x, "y": [min(scores) - pad, max(scores) + pad]}


def _shares_axis(span: list[float]) -> dict[str, Any]:
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


def _accuracy(panel: Panel, results: Results, span: dict[str, list[float]]) -> Figure:
    rows = _by_method(panel, results)
    moved = _moved(rows)
    traces = []
    for method, found in rows.items():
        traces.append(
            {
                "name": method,
                "x": [_finite(row["resident"] * moved[method]) for row in found],
                "y": [_finite(row["score"]) for row in found],
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
            "xaxis": _shares_axis(span["x"]),
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
    up = [_finite(row["high"] - row["score"]) for row in rows]
    return {
        "array": up,
        "arrayminus": [_finite(row["score"] - row["low"]) for row in rows],
        "width": 0,
        "thickness": 1.2,
    }


def _finite(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _hover(row: Row, panel: Panel, results: Results) -> str:
    budget = f", budget {_budget(row)}" if _budget(row) else ""
    seeds = f", seeds {row['seeds']}" if " " in row["seeds"] else ""
    lines = [
        f"<b>{escape(row['method'])}</b>{budget}",
        f"score {_score(row)}, {row['n']} problems{seeds}",
        f"holds {_held(row)}, {_bytes(row['resident_bytes'])}",
        f"mean {_share(row['held'])}, peak {_share(row['peak'])}",
    ]
    if _known(row["difference"]):
        lines.append(f"against {escape(results.reference)} {_difference(row).replace('**', '')}, {_record(row)}")
    if _known(row["gap"]):
        lines.append(f"gap closed {_gap(row)}")
    lines.append(f"{_number(row['generated'])} tokens, {_share(row['truncated'], 0)} cut off, ")
    lines[-1] += f"{_share(row['looped'], 0)} loops, {_number(row['tokens_per_second'])} tokens/s"
    return "<br>".join(lines)


def _measure(panel: Panel, results: Results, name: str) -> Figure:
    """One measure against resident bytes, a line for each method."""
    rows = _by_method(panel, results)
    share = name in ("truncated", "looped", "peak")
    traces = [
        {
            "name": method,
            "x": [_finite(row["resident"]) for row in found],
            "y": [_finite(row[name]) for row in found],
            "hovertext": [
                f"<b>{escape(method)}</b> {_budget(row)}<br>{_share(row[name]) if share else _number(row[name])}"
                for row in found
            ],
        }
        for method, found in rows.items()
    ]
    span = _span([panel])["x"]
    most = max([row[name] for row in panel.rows if _known(row[name])], default=0)
    axis = {"range": [0, max(1.08 * most, 0.05)], "tickformat": ".0%" if share else ""}
    if name == "generated":
        del axis["range"]
    return {"data": traces, "layout": {"xaxis": _shares_axis(span), "yaxis": axis}}


def _distances(panel: Panel, results: Results) -> tuple[pd.DataFrame, pd.Series, list[str]] | None:
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


def _curves(
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
                f"<b>{escape(method)}</b><br>{names[b].replace('<br>', '')} tokens: {_score(row)}, {n} problems"
                for (b, n, _), row in zip(found, rows, strict=True)
            ]
            traces.append(
                {
                    "name": method,
                    "x": [round(b + aside, 3) for b, *_ in found],
                    "y": [_finite(row["score"]) for row in rows],
                    "error_y": _bars(rows),
                    "hovertext": told,
                }
            )
        caption = "score" if panel.rule == "none" else f"budget {100 * budget:.4g}%"
        yield (
            caption,
            {"data": traces, "layout": {"xaxis": axis, "yaxis": {"range": [-0.05, 1.05], "tickformat": ".0%"}}},
        )


def _listing(panel: Panel, results: Results) -> str:
    head = ["budget", "method", "score", f"against {results.reference}", "won/lost/tied", "gap closed", *COSTS]
    lines, before = [], None
    for row in panel.rows:
        cells = [_budget(row), row["method"], _score(row), _difference(row), _record(row), _gap(row)]
        cells += [form(row) for form in COSTS.values()]
        shown = [escape(cell) for cell in cells]
        side = "won" if row["difference"] > 0 else "lost"
        shown[3] = re.sub(r"\*\*(.+?)\*\*", rf"<b class='{side}'>\1</b>", shown[3])
        first = " class='first'" if _budget(row) != before else ""
        before = _budget(row)
        lines.append(f"<tr{first}>{''.join(f'<td>{cell}</td>' for cell in shown)}</tr>")
    return (
        f"<table><thead><tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr></thead>{''.join(lines)}</table>"
    )


def write(
    frame: pd.DataFrame, out_dir: str | Path, *, reference: str = "random", title: str = "Evaluation"
) -> tuple[Path, Path]:
    """Writes ``report.html``, which needs no network, and ``report.md`` into a folder, which is made if need be.

    Args:
        frame: as `kara_hf.evaluation.results.load` returns it.
        reference: method that all others are compared with.

    Returns:
        The paths of both.

    Raises:
        ImportError: plotly is not installed.
        ValueError: the reference was not measured.
    """
    try:
        from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("reports need plotly, which is not there; pip install 'kara_hf[evaluate]'") from error
    results = Results(frame, reference)
    body, page = _page(results, title)
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    html, md = out / "report.html", out / "report.md"
    html.write_text(
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><meta name='viewport' "
        f"content='width=device-width, initial-scale=1'><title>{escape(title)}</title><style>{CSS}</style></head>"
        f"<body>{body}{_packed('plotly', get_plotlyjs())}{_packed('page', json.dumps(page, allow_nan=False))}"
        f"<script type='module'>{SCRIPT}</script></body></html>\n",
        "utf-8",
    )
    md.write_text(_markdown(results, title), "utf-8")
    return html, md
