"""What is asked of a model, and where such questions come from: `Example`, `Task` and the registry of tasks."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ..needs import Check, Need, Package


@dataclass(frozen=True)
class Example:
    """One question to a model.

    Attributes:
        task: full name of its task, as in `Task.name`.
        number: which one of its task; equal numbers are equal examples, for every method and in every run.
        context: text that the model reads first; what compression of a prompt may drop tokens of.
        question: text right behind the context, where the two can be told apart; otherwise empty.
        answers: what is right. Which of them, or whether all of them count, is for `score` to say.
        score: from the generated text, special tokens removed, to a score in [0, 1].
        max_new_tokens: room for an answer.
        reference: a worked solution, or None.
        distance: tokens between the place where the answer was stated and the question for it, or None.
    """

    task: str
    number: int
    context: str
    question: str
    answers: tuple[str, ...]
    score: Callable[[str], float]
    max_new_tokens: int
    reference: str | None = None
    distance: int | None = None


class Task(Protocol):
    """Numbered examples of one kind.

    A task may have a `source`: what tells the file or set that its examples come from, where its name does not.
    """

    @property
    def name(self) -> str:
        """The name that it was asked for by, options included, like ``niah:length=4096``."""

    @property
    def size(self) -> int | None:
        """How many examples there are; None: as many as one likes."""

    @property
    def chat(self) -> bool:
        """Whether prompts go through the model's chat template, if it has one."""

    def example(self, number: int) -> Example:
        """The example of that number, from 0 on. Raises IndexError behind the last."""


Factory = Callable[..., Task]


@dataclass(frozen=True)
class Registered:
    """How a task is made.

    Attributes:
        factory: ``factory(name, tokenizer, **options)``; options are keyword-only, with defaults.
        packages: what it needs.
        files: options that name a file or a folder.
    """

    factory: Factory
    packages: tuple[Package, ...] = ()
    files: tuple[str, ...] = ()

    @property
    def options(self) -> list[str]:
        parameters = inspect.signature(self.factory).parameters.values()
        return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


TASKS: dict[str, Registered] = {}


def register_task(
    name: str, *, packages: Sequence[Package] = (), files: Sequence[str] = ()
) -> Callable[[Factory], Factory]:
    """Makes ``factory(name, tokenizer, **options)`` the maker of a task, see `Registered`.

    Raises:
        ValueError: the name is taken.
    """

    def register(factory: Factory) -> Factory:
        if name in TASKS:
            raise ValueError(f"task {name!r} is registered already; choose another name")
        TASKS[name] = Registered(factory, tuple(packages), tuple(files))
        return factory

    return register


def make_task(text: str, tokenizer: Any) -> Task:
    """A task by its name and options, ``name:option=value:option=value``.

    Values are whole numbers, numbers or text, in this order of preference.

    Raises:
        ValueError: there is no such task or option, or a value is not possible; the message says what there is.
    """
    registered, options = _parse(text)
    return registered.factory(text, tokenizer, **options)


def needs_of(text: str) -> list[Need]:
    """What a task needs, by its name and options: packages and files.

    Raises:
        ValueError: as `make_task`, of a task or option that is not there.
    """
    registered, options = _parse(text)
    files = [(option, str(options[option])) for option in registered.files if options.get(option)]
    return [*registered.packages, *(Check(partial(_find, option, path)) for option, path in files)]


def _find(option: str, path: str) -> None:
    if not Path(path).expanduser().exists():
        raise ValueError(f"{option}={path!r} is not there; give a file or folder that is")


def _parse(text: str) -> tuple[Registered, dict[str, Any]]:
    name, *parts = text.split(":")
    if name not in TASKS:
        raise ValueError(f"task={name!r} is not there; choose one of {', '.join(sorted(TASKS))}")
    registered, options = TASKS[name], {}
    known = registered.options
    for part in parts:
        option, equals, value = part.partition("=")
        if not equals or option not in known:
            told = ", ".join(known) if known else "none"
            raise ValueError(
                f"task={text!r} has no option {option!r}; options of {name}, given as option=value: {told}"
            )
        options[option] = _value(value)
    return registered, options


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
