"""The picture as a page with plotly inside, which needs no network."""

from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from plotly import graph_objects as go  # type: ignore[import-untyped]
from plotly.subplots import make_subplots  # type: ignore[import-untyped]

from .picture import ALONE, BAR_LABEL, FOLLOWS, LEADS, MISSING, MOST_LEADS, OUTLINE, Picture

MEANINGS = np.array(["shares with none", "follows layer %d", "leads others"])  # of `Picture.roles`


def write(drawn: Picture, path: Path) -> None:
    """Writes the page."""
    figure = make_grid(drawn)
    for head in range(len(drawn.maps)):
        place = {"row": head // drawn.grid[1] + 1, "col": head % drawn.grid[1] + 1}
        add_map(figure, drawn, head, place)
        add_outlines(figure, drawn, head, place)
        title(figure, place, drawn.name(head), (len(drawn.lead) - 1) / 2, "")
    add_leads(figure, drawn, {"row": 1, "col": drawn.grid[1] + 1})
    lay_out(figure, drawn)
    path.write_text(page(figure, drawn), "utf-8")


def make_grid(drawn: Picture) -> go.Figure:
    """Empty panels for the maps, and right of them a high one for the table of leads."""
    rows, columns = drawn.grid
    specs: list[list[dict[str, int] | None]] = [[{} for _ in range(columns)] + [None] for _ in range(rows)]
    specs[0][-1] = {"rowspan": rows}
    return make_subplots(
        rows=rows,
        cols=columns + 1,
        specs=specs,
        column_widths=[0.74 / columns] * columns + [0.26],
        horizontal_spacing=min(0.06, 0.2 / columns),
        vertical_spacing=0.12 if rows > 1 else 0,
    )


def add_map(figure: go.Figure, drawn: Picture, head: int, place: dict[str, int]) -> None:
    """The similarity of layers in one KV head."""
    layers, columns = len(drawn.lead), drawn.grid[1]
    figure.add_trace(
        go.Heatmap(
            z=drawn.maps[head],
            coloraxis="coloraxis",
            texttemplate="%{z:.2f}" if drawn.numbered else None,
            hovertemplate=f"KV head {head}, layers %{{y}} and %{{x}}<br>similarity %{{z:.3f}}<extra></extra>",
            hoverongaps=False,
        ),
        **place,
    )
    axis = {"tickvals": drawn.ticks, "showgrid": False, "constrain": "domain", **place}
    below, left = head + columns >= len(drawn.maps), head % columns == 0
    figure.update_xaxes(title=axis_title("layer" if below else ""), range=[-0.5, layers - 0.5], **axis)
    figure.update_yaxes(
        title=axis_title("layer" if left else ""),
        range=[layers - 0.5, -0.5],
        scaleanchor=axes_of(figure, place)[0],
        **axis,
    )


def add_outlines(figure: go.Figure, drawn: Picture, head: int, place: dict[str, int]) -> None:
    """Frames around the layers that share keys in one KV head."""
    for group in (group for group in drawn.groups[head] if len(group) > 1):
        for colour, width in (("white", 5 - 2 * drawn.dense), (OUTLINE, 2.5 - drawn.dense)):
            corners = {"x0": group[0] - 0.5, "y0": group[0] - 0.5, "x1": group[-1] + 0.5, "y1": group[-1] + 0.5}
            figure.add_shape(type="rect", line={"color": colour, "width": width}, **corners, **place)


def add_leads(figure: go.Figure, drawn: Picture, place: dict[str, int]) -> None:
    """The table that says whose keys each layer uses."""
    layers, heads = drawn.lead.shape
    scale = [[0, ALONE], [1 / 3, ALONE], [1 / 3, FOLLOWS], [2 / 3, FOLLOWS], [2 / 3, LEADS], [1, LEADS]]
    text = [
        [(MEANINGS[role] % lead) if role == 1 else MEANINGS[role] for role, lead in zip(*pair, strict=True)]
        for pair in zip(drawn.roles, drawn.lead, strict=True)
    ]
    figure.add_trace(
        go.Heatmap(
            z=drawn.roles,
            zmin=0,
            zmax=2,
            text=drawn.lead,
            customdata=text,
            texttemplate="%{text}" if drawn.named else None,
            textfont={"size": 11 if layers > 16 else 13, "color": "#222222"},
            colorscale=scale,
            showscale=False,
            xgap=1,
            ygap=1,
            hovertemplate="KV head %{x}, layer %{y}<br>%{customdata}<extra></extra>",
        ),
        **place,
    )
    figure.update_xaxes(title="KV head", dtick=max(1, heads // 8), showgrid=False, **place)
    ticks = drawn.ticks if layers > MOST_LEADS else list(range(layers))
    figure.update_yaxes(title="layer", tickvals=ticks, range=[layers - 0.5, -0.5], showgrid=False, **place)
    title(figure, place, "Whose keys each layer uses<br>(orange: leads; blue: follows)", 0.5, " domain")


def axis_title(text: str) -> dict[str, Any]:
    return {"text": text, "standoff": 4}


def axes_of(figure: go.Figure, place: dict[str, int]) -> tuple[str, str]:
    """What the axes of a panel are called where others refer to them."""
    panel = figure.get_subplot(**place)
    return tuple(axis.plotly_name.replace("axis", "") for axis in (panel.xaxis, panel.yaxis))


def title(figure: go.Figure, place: dict[str, int], text: str, x: float, unit: str) -> None:
    """Writes above a panel; `x` counts in its values, or with `unit` " domain" in its width."""
    across, up = axes_of(figure, place)
    figure.add_annotation(
        text=text, x=x, y=1, xref=across + unit, yref=f"{up} domain", yanchor="bottom", showarrow=False
    )


def lay_out(figure: go.Figure, drawn: Picture) -> None:
    """Title, colours and margins of the whole."""
    subtitle = "<br>".join(map(escape, drawn.lines))
    figure.update_layout(
        title={"text": escape(drawn.title), "subtitle": {"text": subtitle}, "x": 0.02, "y": 0.97},
        template="plotly_white",
        plot_bgcolor=MISSING,
        font={"family": "system-ui, sans-serif", "size": 13},
        margin={"l": 60, "r": 30, "t": 140, "b": 110},
        coloraxis={
            "colorscale": "Viridis",
            "cmin": drawn.low,
            "cmax": 1,
            "colorbar": {
                "orientation": "h",
                "x": 0,
                "xanchor": "left",
                "y": -0.09,
                "yanchor": "top",
                "len": 0.4,
                "thickness": 12,
                "title": {"text": BAR_LABEL, "side": "bottom"},
            },
        },
    )


def page(figure: go.Figure, drawn: Picture) -> str:
    """The figure as a page of HTML."""
    options = {"displaylogo": False, "responsive": True}
    body = figure.to_html(full_html=False, include_plotlyjs=True, default_height="100vh", config=options)
    head = f"<meta charset='utf-8'><title>{escape(drawn.title)}</title><style>body {{ margin: 0 }}</style>"
    return f"<!doctype html>\n<html lang='en'><head>{head}</head><body>{body}</body></html>\n"
