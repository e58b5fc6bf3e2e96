"""The picture as a PNG of a screen's size, with matplotlib."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.patheffects import Normal, withStroke

from .picture import ALONE, BAR_LABEL, FOLLOWS, LEADS, MISSING, MOST_LEADS, OUTLINE, Picture

SIZE = (1600, 900)


def write(drawn: Picture, path: Path) -> None:
    """Writes the image."""
    figure = Figure(figsize=(SIZE[0] / 100, SIZE[1] / 100), dpi=100)
    figure.set_layout_engine(ConstrainedLayoutEngine(rect=(0.01, 0.01, 0.98, 0.88)))
    figure.text(0.015, 0.955, drawn.title, fontsize=16)
    figure.text(0.015, 0.94, "\n".join(drawn.lines), fontsize=10, color="#444444", va="top", linespacing=1.5)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[0.76, 0.24])[0]
    draw_maps(left, drawn)
    draw_leads(right.subplots(), drawn)
    figure.savefig(path)


def draw_maps(figure: SubFigure, drawn: Picture) -> None:
    """A map for each KV head, and the bar of their colours."""
    heads, panels = len(drawn.maps), figure.subplots(*drawn.grid, squeeze=False).flatten()
    for panel in panels[heads:]:
        panel.set_visible(False)
    for head, panel in enumerate(panels[:heads]):
        shown = draw_map(panel, drawn, head)
        draw_outlines(panel, drawn, head)
    options: dict[str, Any] = {"orientation": "horizontal", "shrink": 0.5, "aspect": 50, "pad": 0.02, "panchor": False}
    figure.colorbar(shown, ax=list(panels), **options).set_label(BAR_LABEL, fontsize=10)


def draw_map(panel: Axes, drawn: Picture, head: int) -> AxesImage:
    """The similarity of layers in one KV head."""
    columns = drawn.grid[1]
    panel.set_facecolor(MISSING)
    shown = panel.imshow(drawn.maps[head], cmap="viridis", vmin=drawn.low, vmax=1, interpolation="nearest")
    panel.set_title(drawn.name(head), fontsize=10)
    panel.set_xticks(drawn.ticks)
    panel.set_yticks(drawn.ticks)
    panel.tick_params(labelsize=9)
    panel.set_xlabel("layer" if head + columns >= len(drawn.maps) else "")
    panel.set_ylabel("layer" if head % columns == 0 else "")
    if drawn.numbered:
        middle = (drawn.low + 1) / 2
        for (above, below), value in np.ndenumerate(drawn.maps[head]):
            if not np.isnan(value):
                colour = "wk"[int(value >= middle)]
                panel.text(below, above, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=9)
    return shown


def draw_outlines(panel: Axes, drawn: Picture, head: int) -> None:
    """Frames around the layers that share keys in one KV head."""
    white = [withStroke(linewidth=5 - 2 * drawn.dense, foreground="white"), Normal()]
    for group in (group for group in drawn.groups[head] if len(group) > 1):
        size, corner = group[-1] - group[0] + 1, (group[0] - 0.5, group[0] - 0.5)
        frame = Rectangle(corner, size, size, fill=False, edgecolor=OUTLINE, linewidth=2.2 - drawn.dense)
        frame.set_clip_on(False)
        frame.set_path_effects(white)
        panel.add_patch(frame)


def draw_leads(table: Axes, drawn: Picture) -> None:
    """The table that says whose keys each layer uses."""
    layers, heads = drawn.lead.shape
    table.imshow(drawn.roles, cmap=ListedColormap([ALONE, FOLLOWS, LEADS]), vmin=-0.5, vmax=2.5, aspect="auto")
    table.set_title("Whose keys each layer uses\n(orange: leads; blue: follows)", fontsize=10)
    table.set(xlabel="KV head", ylabel="layer")
    table.set_xticks(range(0, heads, max(1, heads // 8)))
    table.set_yticks(drawn.ticks if layers > MOST_LEADS else range(layers))
    table.tick_params(labelsize=9)
    table.set_xticks(np.arange(1, heads) - 0.5, minor=True)
    table.set_yticks(np.arange(1, layers) - 0.5, minor=True)
    table.grid(which="minor", color="white", linewidth=1)
    table.tick_params(which="minor", length=0)
    if drawn.named:
        for (layer, head), lead in np.ndenumerate(drawn.lead):
            table.text(head, layer, str(lead), ha="center", va="center", fontsize=8 if layers > 16 else 10)
