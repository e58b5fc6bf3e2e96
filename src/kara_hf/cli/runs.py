"""Runs of `kara-hf generate`: one model, one prompt, one cache after the other, measured in the same way."""

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import GenerationConfig, TextStreamer
from transformers.generation.streamers import BaseStreamer

from ..integration.generation import generate, greedy
from ..integration.loading import LoadedModel
from ..methods.caches import ConfiguredCache
from ..tasks.reasoner import Problem, final_answer
from .display import CacheRun


def compare(
    loaded: LoadedModel,
    methods: Sequence[ConfiguredCache],
    ids: torch.Tensor,
    *,
    max_new_tokens: int,
    stream: bool,
    problem: Problem | None,
) -> list[CacheRun]:
    """Continues the prompt `ids` ``[1, S]`` greedily, once under each cache and after a warm-up.

    Shows a progress bar on stderr, or with `stream` the text on stdout. `problem` is what the prompt asks, if its
    answer is known. Of the model's `generation_config` only the end tokens count.

    Raises:
        ValueError: the model has not so many positions, the cache does not support it, or it leaves the cache.
        PoolExhausted: `max_bytes` is too low.
    """
    if ids.shape[1] + max_new_tokens > loaded.limit:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} is not possible behind a prompt of {ids.shape[1]}: the model has "
            f"{loaded.limit} positions; lower max_new_tokens or shorten the prompt"
        )
    config = greedy(loaded.model, loaded.tokenizer, max_new_tokens=max_new_tokens)
    columns = (TextColumn("{task.description:<15}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    hidden = stream or not console.is_terminal
    with Progress(*columns, console=console, disable=hidden, transient=True) as progress:
        task = progress.add_task("warm-up", total=len(methods))
        for method in methods:
            method.make(loaded.model)  # refuses a model or a setting before anything runs
        for method in methods:
            _warm_up(loaded, method, ids)
            progress.advance(task)
        progress.remove_task(task)
        runs = []
        for method in methods:
            if stream:
                print(f"--- {method.title}", flush=True)
            task = progress.add_task(method.title, total=max_new_tokens)
            echo = TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
            watch = Watch(partial(progress.advance, task), echo)
            runs.append(_run(loaded, method, ids, config, watch, problem))
            progress.update(task, total=watch.count)
    return runs


def _run(
    loaded: LoadedModel,
    method: ConfiguredCache,
    ids: torch.Tensor,
    config: GenerationConfig,
    watch: "Watch",
    problem: Problem | None,
) -> CacheRun:
    cache = method.make(loaded.model)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    new = generate(loaded.model, cache, config, **inputs, streamer=watch)[0, ids.shape[1] :]
    text = loaded.tokenizer.decode(new, skip_special_tokens=True)
    fields = method.held(cache)
    if problem is not None:
        fields |= {"answer": final_answer(text), "expected": problem.answer, "correct": problem.grade(text)}
    return CacheRun(
        name=method.title,
        settings=method.describe(),
        text=text,
        new_tokens=len(new),
        decode_rate=watch.rate,
        **fields,
    )


def _warm_up(loaded: LoadedModel, method: ConfiguredCache, ids: torch.Tensor) -> None:
    """Pays the costs of first calls."""
    wanted = method.warm_up()
    new_tokens = min(wanted.new_tokens, loaded.limit // 2)
    length = min(wanted.length, loaded.limit - new_tokens)
    ids = ids.repeat(1, -(-length // ids.shape[1]))[:, :length]
    cache = method.make(loaded.model, **wanted.changes)
    config = greedy(loaded.model, loaded.tokenizer, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
    generate(loaded.model, cache, config, input_ids=ids, attention_mask=torch.ones_like(ids))


class Watch(BaseStreamer):
    """A streamer that counts and times the tokens of one run.

    Args:
        on_token: called after each token.
        echo: another streamer that is given everything too, or None.
    """

    def __init__(self, on_token: Callable[[], None], echo: TextStreamer | None = None):
        self.on_token, self.echo = on_token, echo
        self.count = -1  # the prompt is streamed first
        self.first = self.last = 0.0

    @property
    def rate(self) -> float | None:
        """Tokens per second behind the first one, so that the prompt's own forward is left out; None without any."""
        return (self.count - 1) / (self.last - self.first) if self.count > 1 else None

    def put(self, tokens: torch.Tensor) -> None:
        self.count += 1
        self.last = time.perf_counter()
        if self.count == 1:
            self.first = self.last
        if self.count > 0:
            self.on_token()
        if self.echo is not None:
            self.echo.put(tokens)

    def end(self) -> None:
        if self.echo is not None:
            self.echo.end()
