"""kvpress's presses on the weights, prompts and clock of `kv_compress.speed`.

Within a race the caches are paired; between the two environments compare each with its own DynamicCache.
"""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from ..common.case import Job, register
from ..common.environment import KVPRESS, TORCH, environment, run_worker, source_of
from ..common.models import random_llama
from ..common.race import case_name, tokens
from ..common.rows import Row
from ..common.run import Run
from ..speed.kv_compress import SPEED, speed_aims

WORKER = ("-m", "benchmarks.kvpress.worker")
PRESS = {"window": 64, "interval": 128, "target": 512}


@register(
    "kvpress.speed",
    "the same decode loops by kvpress, in an environment of its own",
    SPEED,
    sizes={"prompts": (2048, 8192), "new": (512, 256), "repeats": 3, "env": str(KVPRESS.folder), "torch_package": TORCH}
    | PRESS,
    smoke={"prompts": (160,), "new": (24,), "repeats": 1, "window": 4, "interval": 8, "target": 64},
    aims=speed_aims,
)
def speed_jobs(
    run: Run, prompts: list[int], new: list[int], repeats: int, env: str, torch_package: str, **press: int
) -> Iterator[Job]:
    python = environment(KVPRESS, Path(env).absolute(), torch_package)
    source = source_of(KVPRESS, python)
    for prompt, count in zip(prompts, new, strict=True):
        job = {"kind": "speed", "threads": 1, "prompt": prompt, "repeats": repeats, "press": press}
        yield Job({"label": case_name(prompt, count)}, partial(measured, python, job, count), source=source)


def measured(python: Path, job: Row, new: int) -> list[Row]:
    """A row for each press."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), job["prompt"], new)
        return list(run_worker(python, Path(folder), job, WORKER))


@torch.no_grad()
def write_model(folder: Path, prompt: int, new: int) -> None:
    """Writes the random weights, logits to know them by, and the tokens of the loop."""
    disable_progress_bar()
    model = random_llama()
    model.save_pretrained(folder / "model")
    check = tokens(64, 1)
    tensors = {"check": check, "logits": model(input_ids=check).logits, "ids": tokens(prompt, new)}
    torch.save(tensors, folder / "tensors.pt")
