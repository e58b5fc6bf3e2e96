r"""Teach a model to share keys between its layers (PoD): LoRA or all weights, on one device or several.

    python examples/adapt_pod.py src/kara_hf/assets/tiny_reasoner "problems:trace=0.5,recall=0.5" adapted \
        --sharing sharing --length 704 --learn-after ">" --learn-first --steps 200
    accelerate launch --num_processes 2 examples/adapt_pod.py ...

`--sharing` is a folder that `kara-hf pod explore` wrote. `kara-hf pod adapt` does the same with more options.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer

from kara_hf import PoDSharing
from kara_hf.pod.adapt import AdaptConfig, adapt


def main(
    model: Annotated[str, typer.Argument(help="Hub id or folder of a causal language model.")],
    data: Annotated[str, typer.Argument(help="File, folder, dataset of a hub, or problems:TASK=WEIGHT,...")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    sharing: Annotated[str, typer.Option(help="Folder or hub id of a sharing map.")],
    length: Annotated[int, typer.Option(help="Tokens of a sample; several times what the map calls near.")] = 8192,
    learn_after: Annotated[str | None, typer.Option(help="Learn only what follows this token, up to EOS.")] = None,
    learn_first: Annotated[bool, typer.Option("--learn-first", help="Only behind the first such token.")] = False,
    rank: Annotated[int, typer.Option(help="Rank of LoRA; 0 trains all weights.")] = 16,
    distill: Annotated[float, typer.Option(help="Share of the loss that follows the unshared model.")] = 0.5,
    steps: Annotated[int, typer.Option(help="Steps of the optimiser.")] = 1000,
    batch: Annotated[int, typer.Option(help="Samples a step, on each process.")] = 1,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint of a killed run.")] = False,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype="auto" if rank else torch.float32)
    config = AdaptConfig(
        length=length,
        learn_after=learn_after,
        learn_first=learn_first,
        rank=rank,
        distill=distill,
        steps=steps,
        batch=batch,
        lr=lr,
    )
    shared = PoDSharing.from_pretrained(sharing)
    result = adapt(base, shared, data, config, output, tokenizer=tokenizer, resume=resume)
    for state, loss in result.held_out.items():
        PartialState().print(f"loss of a held-out token, {state} model: {loss:.4f}")


if __name__ == "__main__":
    typer.run(main)
