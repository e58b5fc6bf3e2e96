"""`kara-hf calibrate`. Torch and Transformers are imported by what runs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Data, Device, Dtype, Model, SampleLength, TextColumn, TrustRemoteCode, readable_errors

# What the bundled model reads, and any other model unless told otherwise.
BUNDLED: dict[str, Any] = {
    "data": "problems:trace=0.3,fact=0.3,recall=0.2,copy=0.2",
    "samples": 768,
    "length": 512,
    "window": 64,
}
REAL: dict[str, Any] = {"data": None, "samples": 64, "length": 8192, "window": 256}


def calibrate(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write; then `--score DIR`.")],
    model: Model = None,
    data: Data = None,
    samples: Annotated[
        int | None, typer.Option(help="Samples that are read [default: 64; bundled model: 768].")
    ] = None,
    length: SampleLength = None,
    window: Annotated[int | None, typer.Option(help="Tokens in a window [default: 256; bundled model: 64].")] = None,
    recent: Annotated[int, typer.Option(help="Newest tokens, always kept whole.")] = 32,
    rank: Annotated[int, typer.Option(help="Directions of a head's keys whose products count.")] = 32,
    split: Annotated[str, typer.Option(help="Split of a dataset of the hub.")] = "train",
    text_column: TextColumn = "text",
    seed: Annotated[int, typer.Option(help="Seed of which samples are drawn.")] = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Fit a score to a model: which keys will be looked at, told from the key alone.

    Writes key_calibration.safetensors. A cache that uses it holds nothing but keys and values: `KaraCache(model,
    score="DIR")`, and `--score DIR` or `--calibration DIR` of the other commands.
    """
    with readable_errors():
        from dataclasses import replace

        from .samples import counting, open_samples

        defaults = REAL if model else BUNDLED
        samples = defaults["samples"] if samples is None else samples
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
        from ..probing.calibrate import calibrate as fit

        with counting(samples) as done:
            found = fit(
                loaded.model,
                text,
                window=defaults["window"] if window is None else window,
                recent=recent,
                rank=rank,
                progress=done,
            )
        replace(found, origin={**found.origin, **origin}).save_pretrained(out)
        typer.echo(f"written to {out}")
