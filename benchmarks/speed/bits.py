"""How fast a cache decodes whose tokens are stored in few bits: beside the same cache without, DynamicCache, and
Transformers' QuantizedCache, which makes everything whole at every step.

Caches take turns step by step in one process (`race`). The model is of random weights in the shape of SmolLM2-135M, or
one that is named.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, QuantizedCache

from kara_hf import KaraCache
from kara_hf.evaluation.measure.memory import held_bytes

from ..common.aims import Aim, judge
from ..common.case import Job, register
from ..common.race import FULL, Entry, race, step, timing, tokens, twin
from ..common.rows import Row
from ..common.run import Run

WHOLE, BITS = "KaraCache, all tokens", "KaraCache, all tokens, {bits} bits"
COST = 1.25  # aim: a step beside that of the same cache in the model's dtype
PACKAGES = {"quanto": "optimum.quanto", "hqq": "hqq"}
Make = Callable[[Any], Any]


def speed_aims(rows: Sequence[Row]) -> list[Aim]:
    """Each by the worst of all shapes and dtypes."""
    shapes: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if row["case"] == "bits.speed":
            shapes.setdefault((row["label"], row["batch_size"], row["dtype"]), {})[row["method"]] = row
    found = []
    for bits in (8, 4):
        pairs = [(of[name], of.get(WHOLE)) for of in shapes.values() if (name := BITS.format(bits=bits)) in of]
        beside = [(mine["step_ms"] / other["step_ms"], _told(mine, other)) for mine, other in pairs if other]
        dense = [(1 / mine["speedup"], f"{1 / mine['speedup']:.2f}x a step of {FULL}") for mine, _ in pairs]
        found += [
            judge(f"{bits} bits: a step of at most {COST} times that without", beside, most=COST),
            judge(f"{bits} bits: a step of at most DynamicCache's", dense, most=1.0),
        ]
    return found


def _told(mine: Row, other: Row) -> str:
    return f"{mine['step_ms']:.1f} ms beside {other['step_ms']:.1f}"


@register(
    "bits.speed",
    "decode steps of caches that hold all tokens in 8 or 4 bits",
    [
        ("prompt + new", "{label}"),
        ("batch", "{batch_size}"),
        ("dtype", "{dtype}"),
        ("cache", "{method}"),
        ("ms per step", "{step_ms:.2f}"),
        ("against DynamicCache", "{speedup:.2f}x"),
        ("MB at the end", "{last_mb:.2f}"),
    ],
    sizes={
        "model": "",
        "prompt": 4096,
        "steps": 64,
        "batches": (1, 8),
        "dtypes": ("bfloat16", "float32"),
        "repeats": 3,
    },
    smoke={"prompt": 120, "steps": 12, "batches": (2,), "dtypes": ("float32",), "repeats": 1},
    aims=speed_aims,
)
def speed_jobs(
    run: Run, model: str, prompt: int, steps: int, batches: list[int], dtypes: list[str], repeats: int
) -> Iterator[Job]:
    for dtype in dtypes:
        for batch in batches:
            labels = {"label": f"{prompt} + {steps}", "batch_size": batch, "dtype": dtype, "model": model or "random"}
            yield Job(labels, partial(speed_rows, run, model, dtype, batch, prompt, steps, repeats))


def speed_rows(run: Run, name: str, dtype: str, batch: int, prompt: int, steps: int, repeats: int) -> list[Row]:
    """A row for each cache."""
    plain = loaded(run, name, dtype)
    attached, runs = twin(plain), []
    for number in range(repeats):
        entries = [
            entry(
                plain if other else attached, method, make, tokens(prompt, steps + 1, batch) % plain.config.vocab_size
            )
            for method, (make, other) in methods().items()
        ]
        runs.append(race(entries, prompt, f"{dtype}, batch {batch}, run {number + 1}"))
    columns = [list(column) for column in zip(*runs, strict=True)]
    numbers = [timing(mine, columns[0]) for mine in columns]
    return [{"method": method, "dtype": dtype} | row for method, row in zip(methods(), numbers, strict=True)]


def loaded(run: Run, name: str, dtype: str) -> Any:
    """The named model, or one in the shape of SmolLM2-135M."""
    place = "bits", name, dtype
    if place not in run.shared:
        run.shared.clear()
        if name:
            model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
        else:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(small_lm(run.smoke), dtype=getattr(torch, dtype))
        run.shared[place] = model.eval()
    return run.shared[place]


def small_lm(smoke: bool) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=49152 if not smoke else 1024,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30 if not smoke else 2,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
    )


def methods() -> dict[str, tuple[Make, bool]]:
    """What makes each cache, and whether it is another's than this package's."""
    ours = partial(KaraCache, retention=1.0, recent=32, sinks=4)
    found: dict[str, tuple[Make, bool]] = {
        FULL: (lambda model: DynamicCache(config=model.config), True),
        WHOLE: (ours, False),
    }
    found |= {BITS.format(bits=bits): (partial(ours, bits=bits), False) for bits in (8, 4)}
    for backend, package in PACKAGES.items():
        if find_spec(package.partition(".")[0]) is not None:
            make = partial(QuantizedCache, backend, nbits=4, q_group_size=64, residual_length=64)
            found[f"QuantizedCache, {backend}, 4 bits"] = (lambda model, make=make: make(config=model.config), True)
    return found


def entry(model: Any, name: str, make: Make, ids: torch.Tensor) -> Entry:
    cache = make(model)

    def prefill(prompt: torch.Tensor) -> None:
        model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)

    return Entry(name, ids, prefill, partial(step, model, cache), partial(held_bytes, cache), cache)
