"""`kara-hf pod effect`: group layers by what sharing does to predictions.

Torch and Transformers are imported only when the command runs, so that help is shown at once.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ..config import require
from .options import BUNDLED_DATA, DTYPES, Data, Device, Model, TrustRemoteCode, readable_errors
from .samples import open_samples

BUNDLED_RECENT, RECENT = 112, 4080
Recent = Annotated[
    int | None, typer.Option(help=f"Newest tokens, near as well [default: {RECENT}; bundled model: {BUNDLED_RECENT}].")
]


def effect(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write.")],
    saving: Annotated[float, typer.Option(help="Share of the cache to save, below 0.5.")],
    model: Model = None,
    data: Data = None,
    at_tokens: Annotated[
        int | None, typer.Option(help="Save it for sequences of so many tokens [default: 8 x (sinks + recent)].")
    ] = None,
    per: Annotated[str, typer.Option(help="Layers join in each KV head by itself (head), or whole (layer).")] = "head",
    sinks: Annotated[int, typer.Option(help="First tokens, always near.")] = 16,
    recent: Recent = None,
    distant_query: Annotated[
        str, typer.Option(help="Query that looks at distant tokens: the lead's or its own (own).")
    ] = "lead",
    samples: Annotated[int, typer.Option(help="Samples to measure on.")] = 4,
    length: Annotated[int | None, typer.Option(help="Tokens of a sample [default: 2 x (sinks + recent)].")] = None,
    split: Annotated[str, typer.Option(help="Split of a dataset of the hub.")] = "train",
    text_column: Annotated[str, typer.Option(help="Column or field of the text.")] = "text",
    seed: Annotated[int, typer.Option(help="Seed of which samples are drawn.")] = 0,
    device: Device = None,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES[:-1])} or {DTYPES[-1]}.")] = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Group layers so that sharing changes the model's predictions least. Slower than explore, and closer to the aim.

    Writes pod_sharing.json, and pod_effect.json, the order in which layers joined and the divergence behind each.
    """
    with readable_errors():
        from ..policy.sharing import PoDSharing, check_saving

        recent = (BUNDLED_RECENT if model is None else RECENT) if recent is None else recent
        nothing = PoDSharing.none(1, 1, sinks=sinks, recent=recent, distant_query=distant_query)
        at = 8 * nothing.proximal if at_tokens is None else at_tokens
        check_saving(saving, at)
        require(per in ("head", "layer"), "per", per, "'head' or 'layer'")
        loaded, text, origin = open_samples(
            model,
            BUNDLED_DATA if data is None and model is None else data,
            samples=samples,
            length=2 * nothing.proximal if length is None else length,
            split=split,
            text_column=text_column,
            seed=seed,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
        from ..pod.effect import search
        from .pod_tables import show_path

        told = TextColumn("saves {task.fields[saves]:.1%}, KL {task.fields[kl]:.4f}")
        errors = Console(stderr=True)
        with Progress(
            told, BarColumn(), TimeElapsedColumn(), console=errors, disable=not errors.is_terminal, transient=True
        ) as bar:
            task = bar.add_task("joining", total=saving, saves=0.0, kl=0.0)
            path = search(
                loaded.model,
                text,
                saving=saving,
                tokens=at,
                per=per,  # type: ignore[arg-type]
                sinks=sinks,
                recent=recent,
                distant_query=distant_query,  # type: ignore[arg-type]
                progress=lambda saved, kl: bar.update(task, completed=saved, saves=saved, kl=kl),
            )
        path = replace(path, nothing=replace(path.nothing, origin={**path.nothing.origin, **origin}))
        path.save(out)
        path.group_for(saving, at).save_pretrained(out)
        console = Console(highlight=False)
        show_path(console, path, saving, at)
        console.print(f"Written to {out}", markup=False)
