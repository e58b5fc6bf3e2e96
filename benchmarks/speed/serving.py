"""What Kara is worth to Transformers' continuous batching where memory is short, on the bundled model.

64 requests and a pool with blocks for about 8 whole sequences: the engine without this package, with Kara sealing
windows at several settings, and with compression of the whole trace whenever it passes a threshold. Every request gets
as many tokens, whatever they are. Steps of the engine, running requests and preemptions do not depend on the machine;
time does. It is counted as time of the CPU, which other work on the machine disturbs less.
"""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig
from transformers.utils import logging

from kara_hf.evaluation.measure.provenance import digest
from kara_hf.tasks.reasoner import make_problem

from ..common.case import Job, register
from ..common.models import TINY
from ..common.rows import Row
from ..common.run import Run, Skip

PAGE = 16
WINDOW: Row = {"window": 64, "recent": 32, "anchor_share": 1.0}
KEY_DIFFERENCE: Row = {"score": "key-difference", "anchor_share": 1.0, "period": 16}
TRACE: Row = {"unit": "trace", "window": 256, "recent": 32, "retention": 0.5, "period": 16}
# Names and settings; None is the engine alone.
METHODS: dict[str, Row | None] = {
    "engine alone": None,
    "off (retention 1)": WINDOW | {"retention": 1.0},
    "key-difference, 25 %": WINDOW | KEY_DIFFERENCE | {"retention": 0.25},
    "key-difference, 25 %, windows of 32": WINDOW | KEY_DIFFERENCE | {"retention": 0.25, "window": 32, "recent": 16},
    "key-difference, 25 %, under pressure": WINDOW | KEY_DIFFERENCE | {"retention": 0.25, "trigger": "pressure"},
    "key-difference, 25 %, at most 4 at once": WINDOW | KEY_DIFFERENCE | {"retention": 0.25, "max_requests": 4},
    "key-difference, 50 %": WINDOW | KEY_DIFFERENCE | {"retention": 0.5},
    "bidirectional, 25 %": WINDOW | {"retention": 0.25, "period": 16},
    "Kara as published, 25 %": WINDOW | {"retention": 0.25, "anchor_share": 0.5, "period": 16},
    "random, 25 %": WINDOW | {"retention": 0.25, "score": "random", "period": 16},
    "whole trace over 288 tokens to 160, key-difference": TRACE | {"score": "key-difference"},
}


@register(
    "serving",
    "continuous batching with little memory: the engine alone and with Kara, behind short prompts and long ones",
    [
        ("prompt + new", "{prompt} + {new}"),
        ("method", "{method}"),
        ("steps", "{steps:,}"),
        ("running", "{running:.1f}"),
        ("preempted", "{preemptions}"),
        ("CPU time, s", "{cpu_seconds:.0f}"),
    ],
    sizes={"requests": 64, "sequences": 8, "prompts": (32, 450), "new": (1600, 900), "methods": tuple(METHODS)},
    smoke={
        "requests": 4,
        "sequences": 2,
        "prompts": (16,),
        "new": (104,),
        "methods": ("engine alone", "key-difference, 25 %, windows of 32"),
    },
)
def serving_jobs(
    run: Run, requests: int, sequences: int, prompts: list[int], new: list[int], methods: list[str]
) -> Iterator[Job]:
    unknown = sorted(set(methods) - set(METHODS))
    if unknown:
        raise ValueError(f"methods={unknown} are not there; choose from {'; '.join(METHODS)}")
    for prompt, count in zip(prompts, new, strict=True):
        for name in methods:
            labels = {"prompt": prompt, "new": count, "method": name, "requests": requests, "sequences": sequences}
            yield Job(labels, partial(served, METHODS[name], requests, sequences, prompt, count))


def can_serve() -> None:
    """Raises Skip if this Transformers cannot serve."""
    from kara_hf.serving.seams import check_version

    try:
        check_version()
    except ImportError as error:
        raise Skip(str(error)) from error
    logging.set_verbosity_error()


def bundled_to_serve() -> tuple[Any, Any]:
    """The bundled model and its tokenizer. Raises Skip if this Transformers cannot serve."""
    can_serve()
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(TINY)


def served(kara: Row | None, requests: int, sequences: int, prompt: int, new: int) -> Row:
    """Serves the same requests with one method."""
    from kara_hf.serving import kara_continuous_batching

    model, tokenizer = bundled_to_serve()
    problems = [make_problem("trace", generated=900, seed=50_000 + number) for number in range(requests)]
    ids = [tokenizer(f"{problem.prompt} {problem.completion}")["input_ids"][:prompt] for problem in problems]
    blocks = sequences * -(-(prompt + new) // PAGE)
    engine: Any = Counted(model) if kara is None else kara_continuous_batching(model, **kara)
    with engine as serving:
        start, start_cpu = time.perf_counter(), time.process_time()
        results = model.generate_batch(
            ids,
            generation_config=GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE, num_blocks=blocks, max_batch_tokens=1024
            ),
        )
        seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    metrics = serving if kara is None else serving.metrics
    errors = sum(result.error is not None for result in results.values())
    if errors or len(results) < requests:
        raise RuntimeError(f"{errors} of {requests} requests failed, and {len(results)} came back")
    config = model.config
    return {
        "settings_of_kara": kara,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "tokens": sum(len(result.generated_tokens) for result in results.values()),
        "steps": metrics.steps,
        "running": metrics.mean_running,
        "preemptions": metrics.preemptions,
        "windows": metrics.windows,
        "query_bytes": metrics.peak_query_bytes,
        "pool_bytes": blocks * PAGE * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2 * 4,
        "blocks": blocks,
        "weights": digest(TINY),
    }


class Counted:
    """Counts what an engine without Kara does, under the names of `ServingMetrics`."""

    def __init__(self, model: Any):
        self.model, self.steps, self.running, self.preemptions = model, 0, 0, 0
        self.windows = self.peak_query_bytes = self.computed_tokens = 0

    @property
    def mean_running(self) -> float:
        return self.running / self.steps

    def __enter__(self) -> "Counted":
        own = self.model.init_continuous_batching

        def init(**kwargs: Any) -> Any:
            manager = own(**kwargs)
            create = manager._create_batch_processor
            manager._create_batch_processor = lambda: self._count(create())
            return manager

        self.model.init_continuous_batching = init
        return self

    def _count(self, processor: Any) -> Any:
        prepare, offload = (
            processor.inputs_and_outputs.prepare_batch_tensors,
            processor.offloading_manager.offload_requests,
        )

        def prepared(requests_in_batch: list[Any], **kwargs: Any) -> None:
            prepare(requests_in_batch=requests_in_batch, **kwargs)
            self.steps, self.running = self.steps + 1, self.running + len(requests_in_batch)
            self.computed_tokens += sum(future.query_length for future in requests_in_batch)

        def offloaded() -> bool:
            before = len(processor.scheduler.active_requests)
            done: bool = offload()
            self.preemptions += before - len(processor.scheduler.active_requests)
            return done

        if not hasattr(processor, "counted"):
            processor.counted = True
            processor.inputs_and_outputs.prepare_batch_tensors = prepared
            processor.offloading_manager.offload_requests = offloaded
        return processor

    def __exit__(self, *error: object) -> None:
        del self.model.init_continuous_batching
