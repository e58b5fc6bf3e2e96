"""`kara-hf pod`: find out which layers of a model can share keys, and train it to do so.

Torch and Transformers are imported only by a command that runs, so that help is shown at once.
"""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..bundled import BUNDLED_MODEL
from ..config import require
from ..needs import Check, check_needs
from ..pod.config import AdaptConfig
from .options import (
    DTYPES,
    Data,
    Device,
    Model,
    SampleLength,
    TextColumn,
    TrustRemoteCode,
    check_dtype,
    readable_errors,
)
from .samples import counting, open_samples

if TYPE_CHECKING:
    from ..pod.similarity import LayerSimilarity

THRESHOLD = 0.5
# What the bundled model is measured on, whose sequences are short, and others unless it is given.
BUNDLED: dict[str, Any] = {"data": "problems:trace=0.5,fact=0.2,recall=0.3", "length": 1024, "recent": 112}
REAL: dict[str, Any] = {"data": None, "length": 8192, "recent": 4080}
# The bundled model knows no text in which one problem follows another, and prompts cannot be predicted.
BUNDLED_LEARNS: dict[str, Any] = {"length": 1024, "learn_after": ">", "learn_first": True}

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


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
    recent: Annotated[
        int | None, typer.Option(help="Newest tokens, near as well [default: 4080; bundled model: 112].")
    ] = None,
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


@app.command()
def adapt(
    sharing: Annotated[
        str, typer.Option(metavar="DIR", help="Folder or hub id of a sharing map, which `pod explore` writes.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write.")],
    model: Model = None,
    data: Data = None,
    length: SampleLength = None,
    split: Annotated[str, typer.Option(help="Split of a dataset of the hub, or of problems.")] = AdaptConfig.split,
    text_column: TextColumn = AdaptConfig.text_column,
    learn_after: Annotated[
        str | None,
        typer.Option(metavar="TOKEN", help="Learn only what follows this token, up to EOS [bundled model: >]."),
    ] = None,
    learn_first: Annotated[
        bool, typer.Option("--learn-first", help="Only behind the first such token of a sample [bundled model: so].")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="Train all weights, without LoRA.")] = False,
    rank: Annotated[int, typer.Option(help="LoRA: rank.")] = AdaptConfig.rank,
    alpha: Annotated[int, typer.Option(help="LoRA: outputs are multiplied by alpha / rank.")] = AdaptConfig.alpha,
    dropout: Annotated[float, typer.Option(help="LoRA: dropout of inputs.")] = AdaptConfig.dropout,
    targets: Annotated[
        str | None,
        typer.Option(help="LoRA: names of linear layers, by commas, or all-linear [default: q, k, v and o_proj]."),
    ] = None,
    distill: Annotated[
        float, typer.Option(help="Share of the loss that is KL divergence from the unshared base model.")
    ] = AdaptConfig.distill,
    steps: Annotated[int, typer.Option(help="Steps of the optimiser.")] = AdaptConfig.steps,
    batch: Annotated[int, typer.Option(help="Samples at once, on each process.")] = AdaptConfig.batch,
    accumulate: Annotated[int, typer.Option(help="Batches in a step.")] = AdaptConfig.accumulate,
    lr: Annotated[
        float | None, typer.Option(help="Highest learning rate [default: 1e-4; with --full 1e-5].")
    ] = AdaptConfig.lr,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which it rises.")] = AdaptConfig.warmup,
    floor: Annotated[float, typer.Option(help="Share of it that is left at the last step.")] = AdaptConfig.floor,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = AdaptConfig.weight_decay,
    clip: Annotated[float, typer.Option(help="Longest gradient; 0: any.")] = AdaptConfig.clip or 0,
    precision: Annotated[
        str | None, typer.Option(help="Autocast: no, bf16 or fp16 [default: as accelerate is configured, or no].")
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Compute layers again for gradients: less memory, more time.")
    ] = False,
    held_out: Annotated[
        int, typer.Option(help="Samples that measure the loss before and after.")
    ] = AdaptConfig.held_out,
    held_out_split: Annotated[
        str | None, typer.Option(help="Split that they are of [default: the first samples of --split].")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, dropout and order.")] = AdaptConfig.seed,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = AdaptConfig.save_every,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint of a killed run with the same options.")
    ] = False,
    log: Annotated[str, typer.Option(help="Tracker that gets the losses too: none, tensorboard or trackio.")] = "none",
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Model repository to upload the result to.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"Of the weights: {', '.join(DTYPES)} [default: auto; with --full float32].")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train a model to share keys as a map says, by LoRA or in all weights.

    Writes an adapter for PEFT (--full: a model), the map, the settings, a model card, and metrics.jsonl. On several
    devices: accelerate launch -m kara_hf pod adapt ...
    """
    with readable_errors():
        check_dtype(dtype)
        require(model is None or data is not None, "data", None, f"given with --model: --model {model} --data TEXT")
        names = tuple(name.strip() for name in (targets or "").split(","))
        chosen = {"length": length, "learn_after": learn_after, "learn_first": learn_first or None}
        config = AdaptConfig(
            **(BUNDLED_LEARNS if model is None else {}) | given(**chosen),
            split=split,
            text_column=text_column,
            rank=0 if full else rank,
            alpha=alpha,
            dropout=dropout,
            targets=names if targets and targets != "all-linear" else targets,  # type: ignore[arg-type]
            distill=distill,
            steps=steps,
            batch=batch,
            accumulate=accumulate,
            lr=lr,
            warmup=warmup,
            floor=floor,
            weight_decay=weight_decay,
            clip=clip or None,
            precision=precision,  # type: ignore[arg-type]
            checkpointing=checkpointing,
            seed=seed,
            save_every=save_every,
            held_out=held_out,
        )
        data = data or BUNDLED["data"]

        from ..integration.loading import LoadedModel
        from ..pod.adapt import adapt as adapt_model
        from ..pod.refusals import needs_of_adaptation
        from ..pod.samples import opener
        from ..policy.sharing import PoDSharing

        readable = Check(lambda: PoDSharing.from_pretrained(sharing))
        check_needs({"adaptation": [*needs_of_adaptation(config, data, out, log, push_to_hub), readable]})
        shared = PoDSharing.from_pretrained(sharing)
        # accelerate moves it to the device of the process
        loaded = LoadedModel(
            model or str(BUNDLED_MODEL),
            device="cpu",
            dtype=dtype or ("auto" if config.rank else "float32"),
            trust_remote_code=trust_remote_code,
        )
        others = None
        if held_out_split is not None:
            start = opener(data, loaded.tokenizer, replace(config, split=held_out_split))
            others = list(islice(start(0), held_out))
        result = adapt_model(
            loaded.model,
            shared,
            data,
            config,
            out,
            tokenizer=loaded.tokenizer,
            held_out=others,
            resume=resume,
            log=log,  # type: ignore[arg-type]
            push_to_hub=push_to_hub,
        )
        from accelerate import PartialState

        if not PartialState().is_main_process:
            return
        console = Console(highlight=False)
        for state, loss in result.held_out.items():
            console.print(f"Loss of a held-out token, {state}: {loss:.4f}", markup=False)
        console.print(f"Written to {out}", markup=False)


def given(**options: Any) -> dict[str, Any]:
    """The options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


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
