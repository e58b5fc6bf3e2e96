"""The page of a report: its sections, tables, style and script."""

import gzip
import re
from base64 import b64encode
from collections.abc import Iterable
from html import escape
from typing import Any

import pandas as pd  # type: ignore[import-untyped]

from .figures import SYMBOLS, Figure, bin_distances, draw_accuracy, draw_curves, draw_measure, span_of, styles_of
from .summary import (
    COSTS,
    Panel,
    Results,
    budget_of,
    difference_of,
    gap_of,
    guide_lines,
    losses_of,
    origins_of,
    record_of,
    score_of,
)

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


class Figures(dict[str, Figure]):
    """The figures of a page, each by the name of its place."""

    def place(self, caption: str, drawn: Figure) -> str:
        """HTML of a place in which `drawn` will be shown."""
        name = f"figure{len(self)}"
        self[name] = drawn
        return f"<figure><figcaption>{escape(caption)}</figcaption><div class='plot' id='{name}'></div></figure>"

    def grid(self, drawn: Iterable[tuple[str, Figure]], kind: str = "grid") -> str:
        return f"<div class='{kind}'>{''.join(self.place(*each) for each in drawn)}</div>"


def folded(title: str, content: str, *, open: bool) -> str:
    return f"<details{' open' * open}><summary>{escape(title)}</summary>{content}</details>"


def make_body(title: str, verdict: str, sections: dict[str, list[str]], styles: dict[str, tuple[str, str, str]]) -> str:
    """A body of `sections`, those left out that are empty, under a legend of methods. All parts are HTML."""
    legend = "".join(
        f"<button type='button' value='{escape(method)}' aria-pressed='true'>"
        f"<span style='color:{colour}' aria-hidden='true'>{SYMBOLS[symbol]}</span> {escape(method)}</button>"
        for method, (colour, symbol, _) in styles.items()
    )
    filled = {head: "".join(parts) for head, parts in sections.items() if parts}
    links = "".join(f"<a href='#part{i}'>{head}</a>" for i, head in enumerate(filled))
    body = "".join(f"<h2 id='part{i}'>{head}</h2>{parts}" for i, (head, parts) in enumerate(filled.items()))
    script = "<noscript><p>The figures need JavaScript; the tables do not.</p></noscript>"
    head = f"<h1>{escape(title)}</h1><p>{verdict}</p><nav>{links}</nav>"
    return f"{head}{script}<div class='legend'>{legend}</div>{body}"


def make_page(results: Results, title: str) -> tuple[str, dict[str, Any]]:
    """The body of the page, and what its figures show."""
    figures, styles = Figures(), styles_of(results.methods)
    grid = figures.grid

    def by_rule(drawn: Iterable[tuple[Panel, Iterable[tuple[str, Figure]]]]) -> str:
        return "".join(f"<h4>{escape(panel.title)}</h4>{grid(each, 'grid small')}" for panel, each in drawn)

    sections: dict[str, list[str]] = {name: [] for name in SECTIONS}
    sections[GUIDE] = [listed(inline(line) for line in [*guide_lines(results, escape), *DRAWN])]
    tasks = list(results.tasks())
    for task, panels in tasks:
        span, distances = span_of(panels), bin_distances(panels[0], results)
        drawn = grid((panel.title, draw_accuracy(panel, results, span)) for panel in panels)
        sections[ACCURACY].append(f"<h3>{escape(task)}</h3>{drawn}")
        sections[TABLES] += [
            folded(
                f"{task}: {panel.title}", f"<div class='wide'>{_listing(panel, results)}</div>", open=len(tasks) == 1
            )
            for panel in panels
        ]
        if distances:
            content = by_rule((panel, draw_curves(panel, results, *distances)) for panel in panels)
            sections[DISTANCE].append(folded(task, content, open=not sections[DISTANCE]))
        for section, measures in MEASURES.items():
            content = by_rule(
                (panel, [(words, draw_measure(panel, results, key)) for key, words in measures.items()])
                for panel in panels
            )
            sections[section].append(folded(task, content, open=not sections[section]))
    sections[LOST] = [
        f"<h3>{inline(told)}</h3>{listed(map(inline, lines))}" for told, lines in losses_of(results, escape)
    ]
    if not sections[LOST]:
        sections[LOST] = [f"<p>No method scores below {escape(results.reference)} by a whole interval.</p>"]
    sections[ORIGIN] = origin_parts(results.frame)
    body = make_body(title, results.verdict(escape), sections, styles)
    return body, {"figures": figures, "styles": styles}


def origin_parts(frame: pd.DataFrame) -> list[str]:
    """Where rows come from."""
    return [
        f"<p>{escape(words)}</p>{listed(f'<code>{escape(command)}</code>' for command in commands)}"
        for words, commands in origins_of(frame)
    ]


def listed(items: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"


def packed_script(name: str, text: str) -> str:
    """Text that the page unpacks when it is opened; plotly.js is a third so large like this."""
    data = b64encode(gzip.compress(text.encode(), mtime=0)).decode()
    return f"<script type='application/octet-stream' id='{name}'>{data}</script>"


def inline(text: str) -> str:
    """Bold as HTML, in text that is escaped already."""
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)


def _listing(panel: Panel, results: Results) -> str:
    head = ["budget", "method", "score", f"against {results.reference}", "won/lost/tied", "gap closed", *COSTS]
    lines, before = [], None
    for row in panel.rows:
        cells = [budget_of(row), row["method"], score_of(row), difference_of(row), record_of(row), gap_of(row)]
        cells += [form(row) for form in COSTS.values()]
        shown = [escape(cell) for cell in cells]
        side = "won" if row["difference"] > 0 else "lost"
        shown[3] = re.sub(r"\*\*(.+?)\*\*", rf"<b class='{side}'>\1</b>", shown[3])
        first = " class='first'" if budget_of(row) != before else ""
        before = budget_of(row)
        lines.append(f"<tr{first}>{''.join(f'<td>{cell}</td>' for cell in shown)}</tr>")
    return (
        f"<table><thead><tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr></thead>{''.join(lines)}</table>"
    )
