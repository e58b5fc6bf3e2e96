"""Read once, ask many: how soon questions about one text are answered from a saved cache, beside reading it each time.

Times are CPU times of one process, up to the first token of every answer.
"""

import statistics
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from kara_hf import CompressedCache, KVCompressCache

from ..common.case import Job, register
from ..common.models import random_llama
from ..common.race import cpu_seconds
from ..common.rows import Row
from ..common.run import Run


@register(
    "saved",
    "time to the first token of ten questions about a text: from its saved cache, and with the text read for each",
    [
        ("tokens of the text", "{text:,}"),
        ("how", "{how}"),
        ("questions", "{questions}"),
        ("s to all first tokens", "{seconds:.2f}"),
        ("times as soon", "{sooner:.1f}"),
        ("MB of the file", "{file_mb:.1f}"),
    ],
    sizes={"model": "", "texts": (4096,), "keep": 0.25, "question": 32, "questions": 10, "repeats": 3},
    smoke={"texts": (256,), "questions": 2, "repeats": 1},
)
def saved_jobs(
    run: Run, model: str, texts: list[int], keep: float, question: int, questions: int, repeats: int
) -> Iterator[Job]:
    if model not in run.shared:
        run.shared[model] = (
            AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval() if model else random_llama()
        )
    for text in texts:
        measure = partial(measured, run.shared[model], text, round(keep * text), question, questions, repeats)
        yield Job({"model": Path(model).name or "random", "text": text}, measure)


@torch.inference_mode()
def measured(model: Any, text: int, keep: int, question: int, questions: int, repeats: int) -> list[Row]:
    """A row for each way."""
    torch.manual_seed(0)
    book = torch.randint(1, model.config.vocab_size, (1, text))
    asked = torch.randint(1, model.config.vocab_size, (questions, question))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "text.safetensors")
        cache = KVCompressCache(model, max_cache_tokens=keep)
        model(input_ids=book, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.compress()
        cache.save(file)
        ways = {
            "read for each": partial(read_for_each, model, book, asked),
            "loaded for each": partial(loaded_for_each, model, file, asked),
            "loaded once, asked at once": partial(asked_at_once, model, file, asked),
        }
        times = {how: [cpu_seconds(way) for _ in range(repeats)] for how, way in ways.items()}
        seconds = {how: statistics.median(taken) for how, taken in times.items()}
        first, *_ = seconds.values()
        beside = {"questions": questions, "keep": keep, "file_bytes": file.stat().st_size}
        return [{"how": how, "seconds": taken, "sooner": first / taken} | beside for how, taken in seconds.items()]


def read_for_each(model: Any, book: torch.Tensor, asked: torch.Tensor) -> None:
    for question in asked:
        ids = torch.cat([book, question[None]], 1)
        model(input_ids=ids, past_key_values=DynamicCache(config=model.config), use_cache=True, logits_to_keep=1)


def loaded_for_each(model: Any, file: Path, asked: torch.Tensor) -> None:
    for question in asked:
        ask(model, CompressedCache.load(file, model), question[None])


def asked_at_once(model: Any, file: Path, asked: torch.Tensor) -> None:
    cache = CompressedCache.load(file, model)
    cache.batch_repeat_interleave(len(asked))
    ask(model, cache, asked)


def ask(model: Any, cache: CompressedCache, asked: torch.Tensor) -> None:
    """The first token behind each row of `asked` ``[B, S]``, which comes behind what the cache has seen."""
    positions = torch.arange(cache.columns, cache.columns + asked.shape[1]).expand(len(asked), -1)
    model(input_ids=asked, past_key_values=cache, use_cache=True, logits_to_keep=1, position_ids=positions)
