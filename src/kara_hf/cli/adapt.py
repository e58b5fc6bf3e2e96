"""`kara-hf pod adapt`: train a model to share keys.

Torch and Transformers are imported only when the command runs, so that help is shown at once.
"""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..bundled import BUNDLED_MODEL
from ..config import require
from ..needs import Check, check_needs
from ..pod.config import AdaptConfig
from .options import (
    BUNDLED_DATA,
    DTYPES,
    Data,
    Model,
    SampleLength,
    TrustRemoteCode,
    check_dtype,
    given,
    readable_errors,
    with_settings,
)

# The bundled model knows no text in which one problem follows another, and prompts cannot be predicted.
BUNDLED_LEARNS: dict[str, Any] = {"length": 1024, "learn_after": ">", "learn_first": True}

SETTINGS: dict[str, Any] = {
    "length": SampleLength,
    "split": "Split of a dataset of the hub, or of problems.",
    "text_column": "Column or field of the text.",
    "learn_after": Annotated[
        str | None,
        typer.Option(metavar="TOKEN", help="Learn only what follows this token, up to EOS [bundled model: >]."),
    ],
    "learn_first": Annotated[
        bool | None,
        typer.Option("--learn-first", help="Only behind the first such token of a sample [bundled model: so]."),
    ],
    "rank": "LoRA: rank.",
    "alpha": "LoRA: outputs are multiplied by alpha / rank.",
    "dropout": "LoRA: dropout of inputs.",
    "targets": Annotated[
        str | None,
        typer.Option(help="LoRA: names of linear layers, by commas, or all-linear [default: q, k, v and o_proj]."),
    ],
    "distill": "Share of the loss that is KL divergence from the unshared base model.",
    "top_k": "Its most likely tokens that this compares one by one; the rest is one class.",
    "teacher": Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Folder that keeps what the base model predicts, for other runs on this data."
        ),
    ],
    "steps": "Steps of the optimiser.",
    "batch": "Samples at once, on each process.",
    "accumulate": "Batches in a step.",
    "lr": "Highest learning rate [default: 1e-4; with --full 1e-5].",
    "warmup": "Share of the steps in which it rises.",
    "floor": "Share of it that is left at the last step.",
    "weight_decay": "Of AdamW.",
    "clip": Annotated[float | None, typer.Option(help=f"Longest gradient; 0: any [default: {AdaptConfig.clip}].")],
    "precision": Annotated[
        str | None, typer.Option(help="Autocast: no, bf16 or fp16 [default: as accelerate is configured, or no].")
    ],
    "checkpointing": "Compute layers again for gradients: less memory, more time.",
    "held_out": "Samples that measure the loss before and after.",
    "seed": "Seed of weights, dropout and order.",
    "save_every": "Steps between checkpoints.",
}


@with_settings(AdaptConfig, SETTINGS)
def adapt(
    sharing: Annotated[
        str, typer.Option(metavar="DIR", help="Folder or hub id of a sharing map, which `pod explore` writes.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write.")],
    settings: dict[str, Any],
    model: Model = None,
    data: Data = None,
    full: Annotated[bool, typer.Option("--full", help="Train all weights, without LoRA.")] = False,
    held_out_split: Annotated[
        str | None, typer.Option(help="Split of what measures the loss [default: the first samples of --split].")
    ] = None,
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
        config = config_of(settings, full, bundled=model is None)
        data = data or BUNDLED_DATA

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
            others = list(islice(start(0), config.held_out))
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


def config_of(settings: dict[str, Any], full: bool, bundled: bool) -> AdaptConfig:
    """What was asked, and of the rest what suits the bundled model or any other. Raises ValueError."""
    asked = (BUNDLED_LEARNS if bundled else {}) | given(**settings)
    if full:
        asked["rank"] = 0
    if asked.get("clip") == 0:
        asked["clip"] = None
    if asked.get("targets", "all-linear") != "all-linear":
        asked["targets"] = tuple(name.strip() for name in asked["targets"].split(","))
    return AdaptConfig(**asked)
