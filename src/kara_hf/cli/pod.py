"""`kara-hf pod`: find out which layers of a model can share keys, and train it to do so.

Torch and Transformers are imported only by a command that runs, so that help is shown at once.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..config import require
from ..needs import check_needs
from .adapt import adapt
from .effect import BUNDLED_RECENT, RECENT, Recent, effect
from .options import BUNDLED_DATA, DTYPES, Data, Device, Model, SampleLength, TrustRemoteCode, given, readable_errors
from .samples import counting, open_samples

if TYPE_CHECKING:
    from ..pod.similarity import LayerSimilarity

THRESHOLD = 0.5
# What the bundled model is measured on, whose sequences are short, and others unless it is given.
BUNDLED: dict[str, Any] = {"data": BUNDLED_DATA, "length": 1024, "recent": BUNDLED_RECENT}
REAL: dict[str, Any] = {"data": None, "length": 8192, "recent": RECENT}

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
app.command()(effect)
app.command()(adapt)


@app.callback()
def main() -> None:
    """Let layers share the keys of distant tokens (PoD)."""


@app.command()
def explore(
    model: Model = None,
    data: Data = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder to write; needed unless --from is given.")
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="DIR", help="Group again from what an earlier run wrote, without the model."),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help=f"Least similarity of layers that share, in [0, 1] [default: {THRESHOLD}].")
    ] = None,
    saving: Annotated[
        float | None,
        typer.Option(help="Share of the cache to save, below 0.5; the threshold that does so is found."),
    ] = None,
    at_tokens: Annotated[
        int | None,
        typer.Option(help="With --saving: for sequences of so many tokens [default: 8 x (sinks + recent)]."),
    ] = None,
    compare: Annotated[
        str, typer.Option(help="Similarity to a group is that to its lead, to its newest layer (prev), or to all.")
    ] = "lead",
    sinks: Annotated[int | None, typer.Option(help="First tokens, always near [default: 16].")] = None,
    recent: Recent = None,
    distant_query: Annotated[
        str, typer.Option(help="Query that looks at distant tokens: the lead's or its own (own).")
    ] = "lead",
    samples: Annotated[int | None, typer.Option(help="Samples to measure on [default: 16].")] = None,
    length: SampleLength = None,
    queries: Annotated[int | None, typer.Option(help="Last tokens whose attention is compared [default: 32].")] = None,
    region: Annotated[
        str | None, typer.Option(help="Attention to all tokens, or to distant ones only [default: all].")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of a dataset of the hub [default: train].")] = None,
    text_column: Annotated[str | None, typer.Option(help="Column or field of the text [default: text].")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of which samples are drawn [default: 0].")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Picture to write, .html or .png.")] = None,
    device: Device = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"{', '.join(DTYPES[:-1])} or {DTYPES[-1]} [default: auto].")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure how alike the layers of a model attend, and group those that can share keys.

    Writes similarity.safetensors and similarity.json (which --from reads), and pod_sharing.json, the groups.
    """
    with readable_errors():
        fits = threshold is None or 0 <= threshold <= 1
        require(
            fits, "threshold", threshold, "a number in [0, 1]; where nothing is to be shared, use no sharing at all"
        )
        require(threshold is None or saving is None, "saving", saving, "given without --threshold, or left out")
        fits = saving is None or 0 < saving < 0.5
        require(fits, "saving", saving, "a number between 0 and 0.5, since values are never shared")
        require(saving is not None or at_tokens is None, "at_tokens", at_tokens, "given with --saving, or left out")
        require(compare in ("lead", "all", "prev"), "compare", compare, "'lead', 'all' or 'prev'")
        near = given(sinks=sinks, recent=recent)
        from ..policy.sharing import PoDSharing

        PoDSharing.none(1, 1, distant_query=distant_query, **near)  # refuses what is out of range before a model runs
        measured = given(
            model=model,
            data=data,
            samples=samples,
            length=length,
            queries=queries,
            region=region,
            split=split,
            text_column=text_column,
            seed=seed,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code or None,
        )
        folder = out or source
        if folder is None:
            raise ValueError("out is missing; give the folder to write: --out DIR")
        if source is not None and measured:
            raise ValueError(
                f"{', '.join(measured)} cannot be changed with --from: what was measured in {source} is taken as it is"
            )

        from ..pod.plot import needs_of as needs_of_plot
        from ..pod.plot import plot as draw
        from ..pod.similarity import LayerSimilarity
        from ..probing.data import needs_of
        from .pod_tables import show_sharing

        # Of other text than the bundled model's own `measure` says that it is not possible.
        reads = needs_of(data) if data and model else []
        check_needs({"plot": needs_of_plot(plot) if plot else [], "data": reads})
        console = Console(highlight=False)
        similarity = LayerSimilarity.load(source) if source else measure(**measured, **near)
        if folder != source:
            similarity.save(folder)
            console.print(f"Similarity written to {folder}", markup=False)
        settings: dict[str, Any] = {"compare": compare, "distant_query": distant_query, **near}
        if saving is None:
            sharing = similarity.group(THRESHOLD if threshold is None else threshold, **settings)
        else:
            tokens = at_tokens or 8 * similarity.group(0, **settings).proximal
            sharing = similarity.group_for(saving, tokens, **settings)
        sharing.save_pretrained(folder)
        if plot is not None:
            draw(similarity, sharing, plot)
        show_sharing(console, similarity, sharing)
        console.print(f"Written to {folder}{f' and {plot}' if plot else ''}", markup=False)


def measure(
    *,
    model: str | None = None,
    data: str | None = None,
    samples: int = 16,
    length: int | None = None,
    queries: int = 32,
    region: str = "all",
    sinks: int = 16,
    recent: int | None = None,
    split: str = "train",
    text_column: str = "text",
    seed: int = 0,
    device: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> "LayerSimilarity":
    """Loads the model and explores it, with a progress bar on stderr.

    Raises:
        ValueError, OSError, ImportError: something asked is not possible; the message says what.
    """
    require(region in ("all", "distant"), "region", region, "'all' or 'distant'")
    defaults = BUNDLED if model is None else REAL
    recent = defaults["recent"] if recent is None else recent
    loaded, text, origin = open_samples(
        model,
        defaults["data"] if data is None else data,
        samples=samples,
        length=defaults["length"] if length is None else length,
        split=split,
        text_column=text_column,
        seed=seed,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    from ..pod.explore import explore as explore_model

    with counting(samples) as done:
        similarity = explore_model(
            loaded.model,
            text,
            queries=queries,
            region=region,  # type: ignore[arg-type]
            sinks=sinks,
            recent=recent,
            progress=done,
        )
    return replace(similarity, origin={**similarity.origin, **origin})
