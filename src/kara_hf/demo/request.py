"""What a visitor asks for, checked: every number and text from the page goes through here."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch

from ..config import require
from ..tasks.task import Example
from .generation import Generation
from .models import Loaded, Models
from .presets import FULL, OWN, TRACE, make_example, make_method, prompt_of
from .sessions import Session

LETTERS = 32  # letters of a prompt per token that it may have
NEW_TOKENS = 400  # of a text of one's own, where nothing else is asked for
SAMPLE = "ba : 8 ; xa : 4 ; qo : ba + xa ; ? qo xa >"
PACES = {"full speed": 0.0, "100 tokens/s": 100.0, "20 tokens/s": 20.0}


@dataclass(frozen=True)
class Limits:
    """What a visitor may ask for.

    Attributes:
        prompt: tokens in a prompt.
        new: tokens generated.
        runs: visitors whose runs go on at the same time.
    """

    prompt: int = 4096
    new: int = 4096
    runs: int = 4


@dataclass(frozen=True)
class DemoRequest:
    """What a visitor chose, as it came from the page: fields that were left empty are None.

    Attributes:
        model: name of a model.
        task: a key of `TASK_PRESETS`.
        length: of the task.
        number: of the problem.
        text: of one's own.
        choice: a key of `METHOD_PRESETS`.
        beside: whether the full cache runs too.
        new: most tokens generated; 0: enough for the task.
        temperature: 0 for greedy.
        seed: of sampling and of random choices.
        pace: a key of `PACES`.
        settings: of the method, by name.
    """

    model: str | None
    task: str
    length: float | None
    number: float | None
    text: str
    choice: str
    beside: bool
    new: float | None
    temperature: float | None
    seed: float | None
    pace: str
    settings: dict[str, Any]

    @classmethod
    def of(cls, values: Sequence[Any], settings: Sequence[str]) -> Self:
        """From the values of the page's fields: those above in their order, and behind them `settings`."""
        names = [field.name for field in fields(cls)][:-1]
        chosen = dict(zip(settings, values[len(names) :], strict=True))
        return cls(**dict(zip(names, values, strict=False)), settings=chosen)


def open_session(request: DemoRequest, models: Models, limits: Limits, paused: bool) -> Session:
    """The session that a visitor asks for, not started.

    Raises:
        ValueError: something is not possible or above a limit; the message says what to change.
        OSError: the model cannot be loaded.
    """
    loaded = models.load(request.model or "")
    example, text, task = _asked(request, loaded, limits)
    ids = _encode(text, loaded, limits)
    room = loaded.limit - ids.shape[1]
    require(room >= 1, "prompt", _start(text), f"shorter than the {loaded.limit:,} positions of {loaded.name}")
    new = _whole("most new tokens", request.new, 0, limits.new)
    new = new or min(limits.new, example.max_new_tokens if example else NEW_TOKENS)
    seed = _whole("seed", request.seed, 0, 2**31)
    warm = request.temperature is not None and 0 <= request.temperature <= 2
    require(warm, "temperature", request.temperature, "a number from 0 to 2")
    generation = Generation(ids, min(new, room), float(request.temperature or 0), seed, example)
    methods = {FULL: make_method(FULL, {}, loaded, seed)} if request.beside else {}
    pins = loaded.pins(request.settings["pin"] or "", text, chat=not loaded.own_words)
    methods[request.choice] = make_method(request.choice, {**request.settings, "pin": pins}, loaded, seed)
    return Session(task, loaded, methods, generation, paused=paused, pace=PACES[request.pace])


def _asked(request: DemoRequest, loaded: Loaded, limits: Limits) -> tuple[Example | None, str, str]:
    """The example, its prompt, and what it is called; the prompt may be a text of one's own."""
    if request.task == OWN:
        require(bool(request.text.strip()), "prompt", request.text, "some text to continue")
        return None, request.text, OWN
    length = _whole("length", request.length, 1, limits.new if request.task == TRACE else limits.prompt)
    number = _whole("problem", request.number, 0, 1_000_000)
    example = make_example(request.task, length, number, loaded)
    return example, prompt_of(example), f"{example.task}, problem {number}"


def _encode(text: str, loaded: Loaded, limits: Limits) -> torch.Tensor:
    """Token ids ``[1, S]`` of a prompt."""
    most = LETTERS * limits.prompt
    require(len(text) <= most, "prompt", _start(text), f"{most:,} letters long at most, not {len(text):,}")
    ids = loaded.encode(text, chat=not loaded.own_words)
    tokens = ids.shape[1]
    require(tokens > 0, "prompt", _start(text), "some text that the tokenizer knows")
    require(tokens <= limits.prompt, "prompt", _start(text), f"{limits.prompt:,} tokens at most, not {tokens:,}")
    if loaded.own_words and (ids == loaded.tokenizer.unk_token_id).any():
        known = loaded.tokenizer.get_vocab()
        unknown = [word for word in text.split() if word not in known][:5]
        raise ValueError(
            f"{loaded.name} knows only the words of its own problems, like {SAMPLE!r}, and not "
            f"{', '.join(map(repr, unknown))}; choose another model for text of your own"
        )
    return ids


def _whole(name: str, value: float | None, least: int, most: int) -> int:
    """A number that should be a whole one. Raises ValueError."""
    fits = value is not None and least <= value <= most and value == int(value)
    require(fits, name, value, f"a whole number from {least:,} to {most:,}")
    return int(value or 0)


def _start(text: str) -> str:
    """Of a text what names it in a message."""
    return text if len(text) <= 20 else f"{text[:20]}..."
