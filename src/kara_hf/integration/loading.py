"""Runs of the `kara-hf` command: one model, one prompt, one cache after the other, measured in the same way."""

import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
from transformers.cache_utils import Cache
from transformers.utils import logging

from ..cli.display import Run
from ..methods.caches import Method
from ..tasks.reasoner import Problem, final_answer


class Runner:
    """A loaded model that runs a prompt under one cache after the other.

    Args:
        name: hub id or folder of a causal LM.
        device: name, or None for a GPU if there is one.
        dtype: name, or "auto" for what the model was saved in.
        trust_remote_code: whether code that comes with the model may run.

    Attributes:
        limit: positions that the model has.

    Raises:
        ValueError: the device or the model's name is not possible; nothing was loaded then.
        OSError: the model cannot be loaded.
    """

    def __init__(self, name: str, *, device: str | None = None, dtype: str = "auto", trust_remote_code: bool = False):
        self.device = find_device(device)
        local = is_folder(name)
        self.name = Path(name).name if local else name
        logging.set_verbosity_error()
        if local:  # a download shows how far it is
            logging.disable_progress_bar()
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, ImportError) as error:
            reason = textwrap.shorten(str(error), 240, placeholder=" ...")
            raise OSError(
                f"model={name!r} cannot be loaded; give a hub id or the folder of a causal LM ({reason})"
            ) from error
        self.model = model.to(self.device).eval()
        self.limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize

    def encode(self, prompt: str, *, chat: bool) -> torch.Tensor:
        """Token ids ``[1, S]`` of a prompt, inside the model's chat template if it has one and `chat` is set."""
        if chat and self.tokenizer.chat_template:
            messages = [{"role": "user", "content": prompt}]
            options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
            encoded = self.tokenizer.apply_chat_template(messages, **options)
        else:
            encoded = self.tokenizer(prompt, return_tensors="pt")
        return encoded["input_ids"].to(self.device)

    def run(
        self,
        methods: Sequence[Method],
        ids: torch.Tensor,
        *,
        max_new_tokens: int,
        stream: bool,
        problem: Problem | None,
    ) -> list[Run]:
        """Continues the prompt `ids` ``[1, S]`` greedily, once under each cache and after a warm-up.

        Shows a progress bar on stderr, or with `stream` the text on stdout. `problem` is what the prompt asks, if its
        answer is known.

        Raises:
            ValueError: the model has not so many positions, or the cache does not support it.
            PoolExhausted: `max_bytes` is too low.
        """
        if ids.shape[1] + max_new_tokens > self.limit:
            raise ValueError(
                f"max_new_tokens={max_new_tokens} is not possible behind a prompt of {ids.shape[1]}: the model has "
                f"{self.limit} positions; lower max_new_tokens or shorten the prompt"
            )
        columns = (TextColumn("{task.description:<15}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        console = Console(stderr=True)
        hidden = stream or not console.is_terminal
        with Progress(*columns, console=console, disable=hidden, transient=True) as progress:
            task = progress.add_task("warm-up", total=len(methods))
            for method in methods:
                method.make(self.model)  # refuses a model or a setting before anything runs
            for method in methods:
                self._warm_up(method, ids)
                progress.advance(task)
            progress.remove_task(task)
            runs = []
            for method in methods:
                if stream:
                    print(f"--- {method.title}", flush=True)
                task = progress.add_task(method.title, total=max_new_tokens)
                watch = Watch(partial(progress.advance, task), self._text_streamer() if stream else None)
                runs.append(self._run(method, ids, max_new_tokens, watch, problem))
                progress.update(task, total=watch.count)
        return runs

    def _run(
        self, method: Method, ids: torch.Tensor, max_new_tokens: int, watch: "Watch", problem: Problem | None
    ) -> Run:
        cache = method.make(self.model)
        new = self._generate(ids, cache, max_new_tokens, streamer=watch)[0, ids.shape[1] :]
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        fields = method.held(cache)
        if problem is not None:
            fields |= {"answer": final_answer(text), "expected": problem.answer, "correct": problem.grade(text)}
        return Run(
            name=method.title,
            settings=method.describe(),
            text=text,
            new_tokens=len(new),
            decode_rate=watch.rate,
            **fields,
        )

    def _warm_up(self, method: Method, ids: torch.Tensor) -> None:
        """Pays the costs of first calls."""
        plan = method.rehearsal()
        new_tokens = min(plan.new_tokens, self.limit // 2)
        length = min(plan.length, self.limit - new_tokens)
        ids = ids.repeat(1, -(-length // ids.shape[1]))[:, :length]
        self._generate(ids, method.make(self.model, **plan.changes), new_tokens, min_new_tokens=new_tokens)

    def _generate(self, ids: torch.Tensor, cache: Cache, max_new_tokens: int, **options: Any) -> torch.Tensor:
        with any_name_of_the_cache():
            return self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                **options,
            )

    def _text_streamer(self) -> TextStreamer:
        return TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)


@contextmanager
def any_name_of_the_cache() -> Iterator[None]:
    """Newer versions of Transformers 5 prefer another name for `past_key_values`, which older ones do not know."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`past_key_values` is deprecated", category=FutureWarning)
        yield


class Watch:
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


def is_folder(name: str) -> bool:
    """Whether a model's name is a folder of one; raises ValueError if it can only be a folder and is none."""
    path = Path(name)
    if path.is_dir() and not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
        raise ValueError(
            f"model={name!r} is a folder without config.json; give the folder of a saved model or a hub id"
        )
    if not path.is_dir() and (not name or name[0] in "./~" or name.count("/") > 1 or path.exists()):
        raise ValueError(f"model={name!r} is no folder; give the folder of a saved model or a hub id")
    return path.is_dir()


def find_device(name: str | None) -> torch.device:
    """The device of that name, or without a name a GPU if there is one; raises ValueError if it is not there."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        found = ["cpu", *(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count()) if accelerator)]
        raise ValueError(f"device={name!r} is not there; torch {torch.__version__} sees {', '.join(found)}") from error
    return device
