"""Continuous batching of a whole model with little memory for its requests, with Kara inside and without."""

from functools import partial
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from ..common.case import Job, register
from ..common.rows import Row
from ..common.run import Run, Skip
from .aims import aims
from .shapes import LLAMA, the_model

PAGE = 16
RETENTIONS: dict[str, float | None] = {"engine alone": None, "Kara 0.25": 0.25, "Kara 0.25, key-difference": 0.25}


@register(
    "gpu.serve",
    "continuous batching with Kara inside, with blocks for few sequences, against the engine alone",
    [
        ("engine", "{what}"),
        ("requests", "{batch}"),
        ("tokens", "{new:,}"),
        ("steps", "{steps:,}"),
        ("running", "{running:.1f}"),
        ("preempted", "{preemptions}"),
        ("tokens/s", "{tokens_per_s:,.0f}"),
    ],
    device="cuda",
    until=0.95,
    aims=aims,
)
def serve_jobs(run: Run) -> list[Job]:
    """The same requests with the engine alone and with Kara; a random model, so that answers mean nothing."""
    requests, prompt, new, sequences = (6, 8, 48, 2) if run.smoke else (24, 64, 384, 6)
    found = []
    for what, retention in RETENTIONS.items():
        labels = {"what": what, "model": LLAMA, "batch": requests, "prompt": prompt, "new": new, "sequences": sequences}
        settings = None if retention is None else kara(run, retention, what.endswith("key-difference"))
        found.append(Job(labels, partial(served, run, settings, requests, prompt, new, sequences), seconds=120))
    return found


def kara(run: Run, retention: float, keys_alone: bool) -> dict[str, Any]:
    sizes = {"window": 16, "recent": 4} if run.smoke else {"window": 64, "recent": 32}
    return sizes | {"retention": retention, "period": 4, "score": "key-difference" if keys_alone else "bidirectional"}


@torch.no_grad()
def served(run: Run, kara: dict[str, Any] | None, requests: int, prompt: int, new: int, sequences: int) -> Row:
    """Tokens in a second over all requests, and the engine's steps, which do not depend on the machine."""
    from kara_hf.serving import kara_continuous_batching
    from kara_hf.serving.seams import check_version

    try:
        check_version()
    except ImportError as error:
        raise Skip(str(error)) from error
    model = the_model(run, LLAMA)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, model.config.vocab_size, (requests, prompt), generator=generator).tolist()
    generation = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    config = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=sequences * -(-(prompt + new) // PAGE),
        max_batch_tokens=512,
        use_async_batching=False,
        use_cuda_graph=False,
        auto_switch_to_flash=False,
    )
    with kara_continuous_batching(model, **(kara or {"retention": 1.0})) as serving:
        run.forget_peak()
        work = partial(
            model.generate_batch, inputs, generation_config=generation, continuous_batching_config=config, warmup=False
        )
        seconds = run.seconds(work)
    metrics = serving.metrics
    if metrics.failed or not metrics.steps:
        raise RuntimeError(f"{metrics.failed} of {requests} requests failed in {metrics.steps} steps")
    return {
        "seconds": seconds,
        "tokens_per_s": requests * new / seconds,
        "steps": metrics.steps,
        "running": metrics.mean_running,
        "preemptions": metrics.preemptions,
        "query_bytes": metrics.peak_query_bytes,
        "peak_bytes": run.peak(),
    }
