"""Draw what KV-Compress keeps: tokens of every KV head of every layer, and which positions they are.

    python examples/kept_map.py                                  # the bundled model on a problem of its own
    python examples/kept_map.py --max-cache-tokens 128 --out kept.png
    python examples/kept_map.py --model Qwen/Qwen3-0.6B --prompt "$(cat essay.txt)" --retention 0.2

The map is shown in the terminal, and written as a page that needs no network (.html, with plotly) or a picture (.png,
with matplotlib): ``pip install '.[plot]'``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from kara_hf import KVCompressCache, KVCompressConfig
from kara_hf.bundled import BUNDLED_MODEL
from kara_hf.cli.display import kept_table
from kara_hf.config import Pins, parse_pins
from kara_hf.integration.generation import for_generate
from kara_hf.tasks.reasoner import make_problem

BUNDLED_PROBLEM: dict[str, Any] = {"task": "recall", "length": 512, "seed": 0}
RETENTION = 0.25

# Longer sequences are drawn in stretches, higher stacks of rows without a name for each, more heads without numbers.
MOST_COLUMNS, MOST_NAMES, MOST_NUMBERS = 2048, 40, 400
EVICTED, KEPT, PINNED = "#ececf1", "#2c728e", "#c0392b"
LINE = (("white", 4), ("#d95f02", 2))  # where the prompt ends: visible on either colour
SIZE = (1280, 800)


@dataclass(frozen=True)
class Map:
    """What is drawn, of one sequence.

    Attributes:
        title, subtitle: in words.
        layers: the model's index of each compressed layer.
        counts: tokens kept, ``[layer, head]`` float; NaN for a head that the layer does not have.
        survival: share of the positions of each stretch that is kept, ``[layer * head, stretch]`` float; NaN likewise.
        stretch: positions in a stretch.
        seen: positions in all.
        prompt: how many of them are the prompt's.
        pins: stretches of positions that are pinned.
    """

    title: str
    subtitle: str
    layers: list[int]
    counts: np.ndarray
    survival: np.ndarray
    stretch: int
    seen: int
    prompt: int
    pins: Pins

    @property
    def rows(self) -> list[str]:
        return [f"{layer} / {head}" for layer in self.layers for head in range(self.counts.shape[1])]

    @property
    def named(self) -> tuple[list[float], list[str], str]:
        """Places and texts of the marks on the axis of rows, and its title."""
        heads = self.counts.shape[1]
        if len(self.rows) <= MOST_NAMES:
            return list(range(len(self.rows))), self.rows, "layer / KV head"
        step = -(-len(self.layers) // MOST_NAMES)
        places = [i * heads + (heads - 1) / 2 for i in range(0, len(self.layers), step)]
        return places, [str(layer) for layer in self.layers[::step]], "layer, with a row for each KV head"

    @property
    def borders(self) -> list[float]:
        """Where one layer's rows end and the next one's begin."""
        return [i * self.counts.shape[1] - 0.5 for i in range(1, len(self.layers))]

    @property
    def gap(self) -> int:
        """Width of the line there, in pixels."""
        return 3 if len(self.rows) <= MOST_NAMES else 1

    @property
    def numbered(self) -> bool:
        """Whether there is room to write the counts into the map."""
        return self.counts.size <= MOST_NUMBERS and self.counts.shape[1] <= 8

    @property
    def binary(self) -> bool:
        """Whether every position is drawn by itself."""
        return self.stretch == 1

    @property
    def meaning(self) -> str:
        kept = "dark is kept" if self.binary else f"share of every {self.stretch} that is kept"
        return f"{kept}, red is pinned" if self.pins else kept

    @property
    def positions(self) -> str:
        rest = f"; generated from {self.prompt:,} on, right of the line" if self.prompt < self.seen else ""
        return f"position{rest}"


def map_of(cache: KVCompressCache, name: str, prompt: int, sequence: int = 0) -> Map:
    """Reads off `cache` what it keeps of a sequence whose first `prompt` tokens were the prompt."""
    report = cache.report()
    seen, kept = int(report.seen[sequence]), report.kept[:, sequence]
    stretch = -(-seen // MOST_COLUMNS)
    sizes = np.bincount(np.arange(seen) // stretch)
    survival = np.full((*kept.shape, len(sizes)), np.nan)
    for i, head in kept.nonzero().tolist():
        positions = cache.kept_positions(report.layers[i], sequence, head).numpy()
        survival[i, head] = np.bincount(positions // stretch, minlength=len(sizes)) / sizes
    first, head = kept.nonzero().tolist()[0]
    chunks = cache.chunks(report.layers[first], head, sequence)  # every row has what is pinned
    there = kept[kept > 0].double()
    share = there.mean() / seen
    return Map(
        title=f"What KV-Compress keeps of {seen:,} tokens of {name}",
        subtitle=f"{int(there.min()):,} to {int(there.max()):,} tokens per KV head, {there.mean():,.0f} on average "
        f"({share:.0%}); {report.nominal_bytes / 1024:,.0f} KiB of keys and values, "
        f"{report.resident_bytes / 1024:,.0f} KiB resident, full cache {report.full_bytes / 1024:,.0f} KiB",
        layers=report.layers,
        counts=np.where(kept > 0, kept.numpy().astype(float), np.nan),
        survival=survival.reshape(-1, len(sizes)),
        stretch=stretch,
        seen=seen,
        prompt=prompt,
        pins=tuple((start, stop) for start, stop, kind in chunks if kind == "pinned"),
    )


def write_html(drawn: Map, path: Path) -> None:
    from plotly import graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(
        cols=2,
        column_widths=[0.27, 0.73],
        horizontal_spacing=0.09,
        subplot_titles=("Tokens kept by each KV head", f"Which positions survive: {drawn.meaning}"),
    )
    layers, heads = [str(layer) for layer in drawn.layers], [str(head) for head in range(drawn.counts.shape[1])]
    bar = {"orientation": "h", "y": -0.12, "yanchor": "top", "thickness": 12, "outlinewidth": 0}
    figure.add_trace(
        go.Heatmap(
            z=drawn.counts,
            x=heads,
            y=layers,
            colorscale="Viridis",
            xgap=2 if drawn.numbered else 0,
            ygap=2 if drawn.numbered else 0,
            texttemplate="%{z:,}" if drawn.numbered else None,
            textfont={"size": max(8, min(15, 300 // len(layers)))},
            hovertemplate="layer %{y}, head %{x}<br>%{z:,} tokens<extra></extra>",
            hoverongaps=False,
            colorbar=bar | {"x": 0, "xanchor": "left", "len": 0.24, "title": {"text": "tokens", "side": "bottom"}},
        ),
        row=1,
        col=1,
    )
    figure.add_trace(
        go.Heatmap(
            z=drawn.survival.astype(np.float32),
            x=np.arange(drawn.survival.shape[1]) * drawn.stretch + (drawn.stretch - 1) / 2,
            y=drawn.rows,
            zmin=0,
            zmax=1,
            colorscale=[[0, EVICTED], [1, KEPT]],
            ygap=1 if len(drawn.rows) <= MOST_NAMES else 0,
            hovertemplate="layer / head %{y}<br>position %{x}: %{z:.0%} kept<extra></extra>",
            hoverongaps=False,
            showscale=not drawn.binary,
            colorbar=bar
            | {"x": 1, "xanchor": "right", "len": 0.24, "tickformat": ".0%", "nticks": 3}
            | {"title": {"text": "kept", "side": "bottom"}},
        ),
        row=1,
        col=2,
    )
    for border in drawn.borders:
        figure.add_hline(border, row=1, col=2, line={"color": "white", "width": drawn.gap})
    for start, stop in drawn.pins:
        figure.add_vrect(start - 0.5, stop - 0.5, row=1, col=2, fillcolor=PINNED, opacity=0.85, line_width=0)
    if drawn.prompt < drawn.seen:
        for colour, width in LINE:
            figure.add_vline(drawn.prompt - 0.5, row=1, col=2, line={"color": colour, "width": width})
    places, texts, title = drawn.named
    figure.update_xaxes(title="KV head", col=1, showgrid=False)
    figure.update_yaxes(title="layer", col=1, showgrid=False, range=[len(layers) - 0.5, -0.5], type="category")
    figure.update_xaxes(title=drawn.positions, col=2, showgrid=False, range=[-0.5, drawn.seen - 0.5])
    figure.update_yaxes(
        title=title,
        col=2,
        type="category",
        showgrid=False,
        range=[len(drawn.rows) - 0.5, -0.5],
        tickvals=places,
        ticktext=texts,
    )
    figure.update_layout(
        title={"text": drawn.title, "subtitle": {"text": drawn.subtitle}, "x": 0.03, "y": 0.95},
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "size": 14},
        margin={"l": 70, "r": 40, "t": 130, "b": 110},
    )
    options = {"displaylogo": False, "responsive": True}
    body = figure.to_html(full_html=False, include_plotlyjs=True, default_height="100vh", config=options)
    head = f"<meta charset='utf-8'><title>{escape(drawn.title)}</title><style>body {{ margin: 0 }}</style>"
    path.write_text(f"<!doctype html>\n<html lang='en'><head>{head}</head><body>{body}</body></html>\n", "utf-8")


def write_png(drawn: Map, path: Path) -> None:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(SIZE[0] / 100, SIZE[1] / 100), dpi=100)
    figure.set_layout_engine(ConstrainedLayoutEngine(rect=(0.01, 0.01, 0.98, 0.89), hspace=0.06))
    figure.text(0.02, 0.95, drawn.title, fontsize=16)
    figure.text(0.02, 0.92, drawn.subtitle, fontsize=10.5, color="#444444")
    (left, right), (tokens, shares) = figure.subplots(2, 2, width_ratios=[0.27, 0.73], height_ratios=[1, 0.025])

    counts = left.imshow(drawn.counts, aspect="auto", cmap="viridis", interpolation="nearest")
    left.set(title="Tokens kept by each KV head", xlabel="KV head", ylabel="layer")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    step = -(-len(drawn.layers) // MOST_NAMES)
    left.set_yticks(range(0, len(drawn.layers), step), drawn.layers[::step])
    if drawn.numbered:
        middle = (np.nanmin(drawn.counts) + np.nanmax(drawn.counts)) / 2
        for (i, head), count in np.ndenumerate(drawn.counts):
            if not np.isnan(count):
                left.text(head, i, f"{count:,.0f}", ha="center", va="center", color="wk"[int(count >= middle)])
    figure.colorbar(counts, cax=tokens, orientation="horizontal", label="tokens")

    colours = LinearSegmentedColormap.from_list("kept", [EVICTED, KEPT])
    extent = (-0.5, drawn.survival.shape[1] * drawn.stretch - 0.5, len(drawn.rows) - 0.5, -0.5)
    survival = right.imshow(
        drawn.survival, aspect="auto", cmap=colours, vmin=0, vmax=1, interpolation="nearest", extent=extent
    )
    places, texts, title = drawn.named
    right.set(title=f"Which positions survive: {drawn.meaning}", xlabel=drawn.positions, ylabel=title)
    right.set_yticks(places, texts)
    right.set_xlim(-0.5, drawn.seen - 0.5)
    for border in drawn.borders:
        right.axhline(border, color="white", linewidth=drawn.gap)
    for start, stop in drawn.pins:
        right.axvspan(start - 0.5, stop - 0.5, color=PINNED, alpha=0.85, linewidth=0)
    if drawn.prompt < drawn.seen:
        for colour, width in LINE:
            right.axvline(drawn.prompt - 0.5, color=colour, linewidth=width)
    shares.set_visible(not drawn.binary)
    figure.colorbar(survival, cax=shares, orientation="horizontal", label="kept", format="{x:.0%}")
    figure.savefig(path)


WRITERS: dict[str, tuple[str, Callable[[Map, Path], None]]] = {
    ".html": ("plotly", write_html),
    ".png": ("matplotlib", write_png),
}


def find_writer(out: Path) -> Callable[[Map, Path], None]:
    """The function that writes such a file. Raises ValueError if there is none, or if it needs what is not there."""
    if out.suffix not in WRITERS:
        raise ValueError(f"out={str(out)!r} is not possible: its name must end in {' or '.join(WRITERS)}")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"out={str(out)!r} is not possible: there is no folder {str(out.parent)!r}")
    library, writer = WRITERS[out.suffix]
    try:
        import_module(library)
    except ImportError as error:
        raise ValueError(f"{out.suffix} files need {library}, which is not there; pip install {library}") from error
    return writer


def draw(model_name: str | None, prompt: str | None, budget: dict[str, Any], max_new_tokens: int, out: Path) -> None:
    """Runs the prompt, shows the map and writes it. Raises ValueError or OSError if something asked is not possible."""
    write = find_writer(out)
    if model_name and prompt is None:
        raise ValueError("prompt is missing; a model of your own needs one: --prompt TEXT")
    KVCompressConfig(**budget)  # refuses it before anything is loaded
    folder = model_name or str(BUNDLED_MODEL)
    if Path(folder).is_dir():  # a download shows how far it is
        logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    cache = KVCompressCache(model, **budget)
    problem = make_problem(**BUNDLED_PROBLEM) if prompt is None else None
    inputs = tokenizer(problem.prompt if problem else prompt, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    if not length:
        raise ValueError("prompt is empty; give some text")
    if model_name is None and (inputs["input_ids"] == tokenizer.unk_token_id).any():
        raise ValueError("the bundled model knows only the words of its own problems; pass --model for other text")
    out_ids = model.generate(**inputs, **for_generate(cache), max_new_tokens=max_new_tokens, do_sample=False)
    if out_ids.shape[1] - length <= 1:
        cache.compress()  # a prompt is cut when the second token is asked for
    text = tokenizer.decode(out_ids[0, length:], skip_special_tokens=True).strip()
    drawn = map_of(cache, Path(folder).name if Path(folder).is_dir() else folder, length)
    console = Console(highlight=False)
    console.print(text, markup=False)
    if problem:
        verdict = "right" if problem.grade(text) else f"wrong, it is {problem.answer}"
        console.print(f"({verdict})", markup=False)
    console.print()
    console.print(f"{drawn.title}: {drawn.subtitle}", markup=False)
    console.print(kept_table(cache.report(), width=console.width))
    write(drawn, out)
    console.print(f"Written to {out}", markup=False)


def main(
    model: Annotated[
        str | None, typer.Option(help="Hub id or folder of a causal language model [default: the bundled one].")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Text to continue [default: a problem of the bundled model].")
    ] = None,
    max_cache_tokens: Annotated[
        int | None, typer.Option(help="Tokens per KV head and layer that are kept on average.")
    ] = None,
    retention: Annotated[float | None, typer.Option(help="Share that is kept instead [default: 0.25].")] = None,
    pin: Annotated[
        str | None, typer.Option(metavar="START:END,...", help="Positions that are never evicted, drawn in red.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated at most.")] = 64,
    out: Annotated[Path, typer.Option(help="File to write, .html or .png.")] = Path("kept.html"),
) -> None:
    """Run a prompt under KVCompressCache and draw which tokens each KV head keeps."""
    if max_cache_tokens is None and retention is None:
        retention = RETENTION
    try:
        budget = {"max_cache_tokens": max_cache_tokens, "retention": retention, "pin": parse_pins(pin or "")}
        draw(model, prompt, budget, max_new_tokens, out)
    except (ValueError, OSError) as error:
        typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    typer.run(main)
