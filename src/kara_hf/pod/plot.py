"""A picture of how alike layers attend and which of them share keys: a page that needs no network, or a PNG."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from importlib import import_module
from pathlib import Path

import numpy as np

from ..config import require
from ..policy.sharing import PoDSharing
from .similarity import LayerSimilarity, groups_of

# More layers than these go without a number in each cell: of a map, and of the table of leads.
MOST_NUMBERS, MOST_LEADS = 8, 40
TICK_STEPS = (1, 2, 4, 5, 8, 10, 16, 20, 25, 40, 50, 100)
FOLLOWS, LEADS, ALONE, MISSING = "#c6dbef", "#fdae6b", "#f0f0f3", "#d9d9de"
OUTLINE = "#d95f02"  # with white beside it, so that it is seen on either end of the colours
SIZE = (1600, 900)


@dataclass(frozen=True)
class Picture:
    """What is drawn.

    Attributes:
        title, lines: in words.
        maps: similarity of layers for each KV head, ``[H, L, L]``; NaN where it is not known.
        groups: for each KV head the layers of each group, its lead first.
        lead: ``[L, H]``, as in `PoDSharing`.
    """

    title: str
    lines: tuple[str, ...]
    maps: np.ndarray
    groups: list[list[list[int]]]
    lead: np.ndarray

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of maps."""
        rows = max(1, round(math.sqrt(len(self.maps) / 1.7)))
        return rows, -(-len(self.maps) // rows)

    @property
    def ticks(self) -> list[int]:
        """Layers that are named on an axis."""
        layers, most = len(self.lead), max(6, 32 // self.grid[1])
        step = next((step for step in TICK_STEPS if layers <= step * most), layers)
        return list(range(0, layers, step))

    @property
    def numbered(self) -> bool:
        """Whether there is room for a number in each cell of a map."""
        return len(self.lead) * self.grid[1] <= 2 * MOST_NUMBERS

    @property
    def named(self) -> bool:
        """Whether there is room for the lead in each cell of the table of leads."""
        return len(self.lead) <= MOST_LEADS and len(self.maps) <= 16

    @property
    def dense(self) -> bool:
        """Whether maps are so small, or layers so many, that titles must be short and outlines thin."""
        return self.grid[1] > 5 or len(self.lead) > MOST_LEADS

    @property
    def low(self) -> float:
        """Where the colours begin: just below the lowest similarity."""
        lowest = np.nanmin(self.maps) if np.isfinite(self.maps).any() else 0.0
        return math.floor(min(lowest, 0.9) * 10) / 10

    @property
    def roles(self) -> np.ndarray:
        """``[L, H]``: 0 alone, 1 follows another layer, 2 leads others."""
        own = np.arange(len(self.lead))[:, None]
        roles = (self.lead != own).astype(int)
        for head, groups in enumerate(self.groups):
            roles[[group[0] for group in groups if len(group) > 1], head] = 2
        return roles

    def name(self, head: int) -> str:
        follow = int((self.roles[:, head] == 1).sum())
        return f"head {head}" if self.dense else f"KV head {head}: {follow} of {len(self.lead)} follow"


def picture_of(similarity: LayerSimilarity, sharing: PoDSharing) -> Picture:
    origin, tokens = sharing.origin, 8 * sharing.proximal
    name = similarity.origin.get("model_name", "the model")
    samples = f"{len(similarity.tokens)} sample{'s'[: len(similarity.tokens) > 1]}"
    rule = f"threshold {origin['threshold']:.3g} ({origin['compare']}): " if "threshold" in origin else ""
    return Picture(
        title=f"Which layers of {name} attend alike, and which share keys",
        lines=(
            f"1 - Jensen-Shannon divergence of attention to {similarity.region} tokens, by the last "
            f"{similarity.queries} queries of {samples} of {max(similarity.tokens):,} tokens",
            f"{rule}{sharing.followers_share:.0%} of the (layer, KV head) pairs follow, which saves "
            f"{sharing.saving(tokens):.1%} of the cache of {tokens:,} tokens",
        ),
        maps=similarity.similarity.numpy().astype(float),
        groups=[groups_of(sharing, head) for head in range(sharing.heads)],
        lead=np.array(sharing.lead),
    )


def find_writer(path: Path) -> Callable[[LayerSimilarity, PoDSharing], None]:
    """The function that draws into such a file.

    Raises:
        ValueError: its name ends in neither .html nor .png, or its folder is not there.
        ImportError: what it needs is not installed.
    """
    require(path.suffix in WRITERS, "plot", str(path), f"a file name that ends in {' or '.join(WRITERS)}")
    require(path.absolute().parent.is_dir(), "plot", str(path), "in a folder that is there")
    library, write = WRITERS[path.suffix]
    try:
        import_module(library)
    except ImportError as error:
        raise ImportError(
            f"{path.suffix} files need {library}, which is not there; pip install 'kara_hf[plot]'"
        ) from error
    return lambda similarity, sharing: write(picture_of(similarity, sharing), path)


def plot(similarity: LayerSimilarity, sharing: PoDSharing, path: str | Path) -> None:
    """Draws the similarity of layers for each KV head, with the groups outlined, and beside it who leads.

    Args:
        path: .html (a page that needs no network; with plotly) or .png (with matplotlib).

    Raises:
        ValueError, ImportError: as `find_writer`.
    """
    find_writer(Path(path))(similarity, sharing)


def write_html(drawn: Picture, path: Path) -> None:
    from plotly import graph_objects as go  # type: ignore[import-untyped]
    from plotly.subplots import make_subplots  # type: ignore[import-untyped]

    (rows, columns), layers, heads = drawn.grid, len(drawn.lead), len(drawn.maps)
    specs: list[list[dict[str, int] | None]] = [[{} for _ in range(columns)] + [None] for _ in range(rows)]
    specs[0][-1] = {"rowspan": rows}
    figure = make_subplots(
        rows=rows,
        cols=columns + 1,
        specs=specs,
        column_widths=[0.74 / columns] * columns + [0.26],
        horizontal_spacing=min(0.06, 0.2 / columns),
        vertical_spacing=0.12 if rows > 1 else 0,
    )
    for head in range(heads):
        place = {"row": head // columns + 1, "col": head % columns + 1}
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
        for group in (group for group in drawn.groups[head] if len(group) > 1):
            for colour, width in (("white", 5 - 2 * drawn.dense), (OUTLINE, 2.5 - drawn.dense)):
                corners = {"x0": group[0] - 0.5, "y0": group[0] - 0.5, "x1": group[-1] + 0.5, "y1": group[-1] + 0.5}
                figure.add_shape(type="rect", line={"color": colour, "width": width}, **corners, **place)
        edge = head + columns >= heads
        figure.update_xaxes(
            title={"text": "layer" if edge else "", "standoff": 4},
            tickvals=drawn.ticks,
            range=[-0.5, layers - 0.5],
            showgrid=False,
            constrain="domain",
            **place,
        )
        figure.update_yaxes(
            title={"text": "layer" if head % columns == 0 else "", "standoff": 4},
            tickvals=drawn.ticks,
            range=[layers - 0.5, -0.5],
            showgrid=False,
            scaleanchor=figure.get_subplot(**place).xaxis.plotly_name.replace("axis", ""),
            constrain="domain",
            **place,
        )
        axes = figure.get_subplot(**place)
        figure.add_annotation(
            text=drawn.name(head),
            x=(layers - 1) / 2,
            y=1,
            xref=axes.xaxis.plotly_name.replace("axis", ""),
            yref=axes.yaxis.plotly_name.replace("axis", "") + " domain",
            yanchor="bottom",
            showarrow=False,
        )
    last = {"row": 1, "col": columns + 1}
    scale = [[0, ALONE], [1 / 3, ALONE], [1 / 3, FOLLOWS], [2 / 3, FOLLOWS], [2 / 3, LEADS], [1, LEADS]]
    meaning = np.array(["shares with none", "follows layer %d", "leads others"])
    text = [
        [(meaning[role] % lead) if role == 1 else meaning[role] for role, lead in zip(*pair, strict=True)]
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
        **last,
    )
    figure.update_xaxes(title="KV head", dtick=max(1, heads // 8), showgrid=False, **last)
    ticks = drawn.ticks if layers > MOST_LEADS else list(range(layers))
    figure.update_yaxes(title="layer", tickvals=ticks, range=[layers - 0.5, -0.5], showgrid=False, **last)
    axes = figure.get_subplot(**last)
    figure.add_annotation(
        text="Whose keys each layer uses<br>(orange: leads; blue: follows)",
        x=0.5,
        y=1,
        xref=axes.xaxis.plotly_name.replace("axis", "") + " domain",
        yref=axes.yaxis.plotly_name.replace("axis", "") + " domain",
        yanchor="bottom",
        showarrow=False,
    )
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
                "title": {"text": "similarity (outlined layers share keys; the first of them leads)", "side": "bottom"},
            },
        },
    )
    options = {"displaylogo": False, "responsive": True}
    body = figure.to_html(full_html=False, include_plotlyjs=True, default_height="100vh", config=options)
    head_tags = f"<meta charset='utf-8'><title>{escape(drawn.title)}</title><style>body {{ margin: 0 }}</style>"
    path.write_text(f"<!doctype html>\n<html lang='en'><head>{head_tags}</head><body>{body}</body></html>\n", "utf-8")


def write_png(drawn: Picture, path: Path) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import Normal, withStroke

    (rows, columns), layers, heads = drawn.grid, len(drawn.lead), len(drawn.maps)
    figure = Figure(figsize=(SIZE[0] / 100, SIZE[1] / 100), dpi=100)
    figure.set_layout_engine(ConstrainedLayoutEngine(rect=(0.01, 0.01, 0.98, 0.88)))
    figure.text(0.015, 0.955, drawn.title, fontsize=16)
    figure.text(0.015, 0.94, "\n".join(drawn.lines), fontsize=10, color="#444444", va="top", linespacing=1.5)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[0.76, 0.24])[0]
    panels = left.subplots(rows, columns, squeeze=False).flatten()
    white = [withStroke(linewidth=5 - 2 * drawn.dense, foreground="white"), Normal()]
    for panel in panels[heads:]:
        panel.set_visible(False)
    for head, panel in enumerate(panels[:heads]):
        panel.set_facecolor(MISSING)
        shown = panel.imshow(drawn.maps[head], cmap="viridis", vmin=drawn.low, vmax=1, interpolation="nearest")
        panel.set_title(drawn.name(head), fontsize=10)
        panel.set_xticks(drawn.ticks)
        panel.set_yticks(drawn.ticks)
        panel.tick_params(labelsize=9)
        panel.set_xlabel("layer" if head + columns >= heads else "")
        panel.set_ylabel("layer" if head % columns == 0 else "")
        if drawn.numbered:
            middle = (drawn.low + 1) / 2
            for (above, below), value in np.ndenumerate(drawn.maps[head]):
                if not np.isnan(value):
                    colour = "wk"[int(value >= middle)]
                    panel.text(below, above, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=9)
        for group in drawn.groups[head]:
            if len(group) > 1:
                size = group[-1] - group[0] + 1
                corner = (group[0] - 0.5, group[0] - 0.5)
                frame = Rectangle(corner, size, size, fill=False, edgecolor=OUTLINE, linewidth=2.2 - drawn.dense)
                frame.set_clip_on(False)
                frame.set_path_effects(white)
                panel.add_patch(frame)
    options = {"orientation": "horizontal", "shrink": 0.5, "aspect": 50, "pad": 0.02, "panchor": False}
    bar = left.colorbar(shown, ax=list(panels), **options)
    bar.set_label("similarity (outlined layers share keys; the first of them leads)", fontsize=10)

    table = right.subplots()
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
    figure.savefig(path)


WRITERS: dict[str, tuple[str, Callable[[Picture, Path], None]]] = {
    ".html": ("plotly", write_html),
    ".png": ("matplotlib", write_png),
}
