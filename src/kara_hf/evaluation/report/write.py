"""What was measured, as one HTML page that needs no network and as Markdown."""

import json
import math
import re
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]

from .divergence_page import divergence_parts, make_divergence_page
from .divergence_summary import Divergences
from .page import CSS, SCRIPT, make_page, packed_script
from .statistics import summarise
from .summary import (
    COSTS,
    Results,
    Row,
    budget_of,
    difference_of,
    gap_of,
    guide_lines,
    held_by,
    losses_of,
    origins_of,
    record_of,
    score_of,
)

__all__ = ["markdown", "summarise", "write", "write_divergence"]


def write(
    frame: pd.DataFrame, out_dir: str | Path, *, reference: str = "random", title: str = "Evaluation"
) -> tuple[Path, Path]:
    """Writes ``report.html``, which needs no network, and ``report.md`` into a folder, which is made if need be.

    Args:
        frame: as `kara_hf.evaluation.measure.results.load` returns it.
        reference: method that all others are compared with.

    Returns:
        The paths of both.

    Raises:
        ImportError: plotly is not installed.
        ValueError: the reference was not measured.
    """
    results = Results(frame, reference)
    return save(Path(out_dir), "report", title, *make_page(results, title), _markdown(results, title))


def write_divergence(
    frame: pd.DataFrame, out_dir: str | Path, *, reference: str | None = None, title: str = "Divergence"
) -> tuple[Path, Path]:
    """As `write`, for what `kara_hf.evaluation.load_divergence` returns: ``divergence.html`` and ``divergence.md``.

    Args:
        reference: method that all others are compared with; None: random tokens, where they were measured.
    """
    found = Divergences(frame, reference)
    text = "\n\n".join(divergence_parts(found, title, plain, table)) + "\n"
    return save(Path(out_dir), "divergence", title, *make_divergence_page(found, title), text)


def save(out: Path, name: str, title: str, body: str, page: dict[str, Any], text: str) -> tuple[Path, Path]:
    """Writes a page, from its `body` and what its figures show, and its Markdown. Raises ImportError without plotly."""
    try:
        from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("reports need plotly, which is not there; pip install 'kara_hf[evaluate]'") from error
    packed = packed_script("plotly", get_plotlyjs()) + packed_script("page", json.dumps(page, allow_nan=False))
    out.mkdir(parents=True, exist_ok=True)
    html, md = out / f"{name}.html", out / f"{name}.md"
    html.write_text(
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><meta name='viewport' "
        f"content='width=device-width, initial-scale=1'><title>{escape(title)}</title><style>{CSS}</style></head>"
        f"<body>{body}{packed}<script type='module'>{SCRIPT}</script></body></html>\n",
        "utf-8",
    )
    md.write_text(text, "utf-8")
    return html, md


def markdown(frame: pd.DataFrame, *, reference: str = "random", title: str = "Evaluation") -> str:
    """Tables of accuracy against resident bytes, rules side by side, and of costs; what lost; where it comes from."""
    return _markdown(Results(frame, reference), title)


def _markdown(results: Results, title: str) -> str:
    reference = plain(results.reference)
    parts = [f"# {plain(title)}", results.verdict(plain)]
    parts.append("\n".join(f"- {line}" for line in guide_lines(results, plain)))
    for name, panels in results.tasks():
        problems = max(row["n"] for panel in panels for row in panel.rows)
        parts += [f"## {plain(name)}", f"{problems} problems."]
        head, costs = ["budget", "method"], ["compressed", "budget", "method", *COSTS]
        lines: dict[tuple[float, int], dict[int, Row]] = {}
        for i, panel in enumerate(panels):
            head += [f"{plain(panel.title)}: score, holds", f"against {reference}, won/lost/tied", "gap closed"]
            for row in panel.rows:
                place = (-row["budget"] if row["rule"] != "none" else -math.inf, results.methods.index(row["method"]))
                lines.setdefault(place, {})[i] = row
        accuracy = []
        for _, by_panel in sorted(lines.items()):
            row = next(iter(by_panel.values()))
            line = [budget_of(row), plain(row["method"])]
            for i in range(len(panels)):
                if (cell := by_panel.get(i)) is None:
                    line += ["", "", ""]
                    continue
                record = f", {record_of(cell)}" if record_of(cell) else ""
                line += [f"{score_of(cell)}, {held_by(cell)}", f"{difference_of(cell)}{record}", gap_of(cell)]
            accuracy.append(line)
        parts.append(table(head, accuracy))
        shown = {id(row): (panel, row) for panel in panels for row in panel.rows}
        parts.append(
            table(
                costs,
                [
                    [
                        plain(panel.title) if row["rule"] != "none" else "",
                        budget_of(row),
                        plain(row["method"]),
                        *(form(row) for form in COSTS.values()),
                    ]
                    for panel, row in shown.values()
                ],
            )
        )
    parts.append("## What lost")
    lost = [f"- {told}\n" + "\n".join(f"  - {line}" for line in lines) for told, lines in losses_of(results, plain)]
    parts.append("\n".join(lost) or f"No method scores below {reference} by a whole interval.")
    parts.append("## Where these numbers come from")
    for words, commands in origins_of(results.frame):
        parts.append(f"- {plain(words)}\n" + "\n".join(f"  - {plain(command)}" for command in commands))
    return "\n\n".join(parts) + "\n"


def plain(text: str) -> str:
    """Text of any origin as Markdown that shows it as it is, in a table too."""
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", escape(" ".join(text.split()), quote=False))


def table(head: list[str], lines: Iterable[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])
