"""What is held while a long prompt is read: all of it, or the budget and one layer of it, or one chunk.

Every way has a process of its own, whose resident memory is read off beside the cache's own count. The prompt is of
random tokens; positions beyond those that a model knows cost as much memory as others.
"""

import gc
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from kara_hf import KaraCache, KVCompressCache
from kara_hf.evaluation.measure.memory import held_bytes, peak_bytes
from kara_hf.integration.generation import for_generate

from ..common.aims import Aim, judge
from ..common.case import Job, register
from ..common.memory import STATM, MostResident
from ..common.race import FULL
from ..common.rows import Row
from ..common.run import Run, Skip
from .bits import small_lm

MOST = 1.15  # aim: of the budget's bytes, beside one chunk
AT_ONCE, CHUNKS = "at once", "in chunks"
KV, KARA = "KVCompressCache", "KaraCache"
WAYS = tuple(f"{kind}, {CHUNKS}" for kind in (FULL, KV, KARA)) + (f"{KV}, {AT_ONCE}",)


def memory_aims(rows: Sequence[Row]) -> list[Aim]:
    mine = [row for row in rows if row["case"] == "prompt.memory" and row["method"] == f"{KV}, {CHUNKS}"]
    found = [(row["beside_chunk"], f"{row['beside_chunk']:.3f} of the budget's bytes") for row in mine]
    return [judge(f"a prompt in chunks: at most {MOST} times the budget, and the chunk", found, most=MOST)]


@register(
    "prompt.memory",
    "most bytes that are held while a prompt is read",
    [
        ("prompt", "{prompt}"),
        ("cache", "{method}"),
        ("most held, MB", "{peak_mb:.1f}"),
        ("of the full cache", "{of_full:.0%}"),
        ("process grew by, MB", "{rss_mb:.0f}"),
        ("seconds", "{seconds:.0f}"),
        ("most less a chunk, of the budget", "{beside_chunk:.3f}"),
    ],
    sizes={"model": "", "prompt": 16384, "budget": 1024, "chunk": 512, "ways": WAYS},
    smoke={"prompt": 200, "budget": 64, "chunk": 32},
    aims=memory_aims,
)
def memory_jobs(run: Run, model: str, prompt: int, budget: int, chunk: int, ways: Sequence[str]) -> Iterator[Job]:
    for name in ways:
        labels = {"method": name, "prompt": prompt, "model": model or "random"}
        yield Job(labels, partial(in_a_process, name, model, run.smoke, prompt, budget, chunk))


def in_a_process(*asked: Any) -> Row:
    """What `measured` says in a new process."""
    if not STATM.exists():
        raise Skip(f"{STATM} is not there to read a process's memory from")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measured, asked)


def measured(name: str, model_name: str, smoke: bool, prompt: int, budget: int, chunk: int) -> Row:
    """Reads the prompt and decodes two tokens, in float32 on one thread."""
    torch.set_num_threads(1)
    if model_name:
        model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32).eval()
    else:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(small_lm(smoke), dtype=torch.float32).eval()
    ids = torch.randint(3, model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None}
    model.generate(ids[:, :32], **settings)
    kind, _, how = name.partition(", ")
    size = chunk if how == CHUNKS else None
    makers: dict[str, Callable[[], Any]] = {
        FULL: lambda: DynamicCache(config=model.config),
        KV: lambda: KVCompressCache(model, max_cache_tokens=budget, prefill_chunk=size),
        KARA: lambda: KaraCache(model, retention=budget / prompt, compress_prompt=True, prefill_chunk=size),
    }
    cache = makers[kind]()
    gc.collect()
    start = time.perf_counter()
    if kind == FULL:
        settings["prefill_chunk_size"] = size
    with MostResident() as resident:
        model.generate(ids, **for_generate(cache), **settings)
    token = 2 * model.config.num_hidden_layers * model.config.num_key_value_heads * model.config.head_dim * 4
    most = peak_bytes(cache) if kind != FULL else held_bytes(cache)
    return {
        "peak_bytes": most,
        "peak_mb": most / 1e6,
        "of_full": most / (token * (prompt + 1)),
        "rss_mb": resident.grown / 1e6,
        "seconds": time.perf_counter() - start,
        "beside_chunk": (most - (size or 0) * token) / (budget * token),
    }
