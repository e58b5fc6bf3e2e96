"""Synthetic problems as pure functions of (task, split, length, seed).

A problem is text: words separated by single spaces, every word one token of the bundled tiny reasoner. Every
completion ends in ``ans ...`` and only that final answer is graded, so a new task is one builder function under
``@task``:

    @task("echo", min_length=16)
    def _echo(rng, length):
        words = rng.choices(VALUES, k=length // 2)
        return words, ["ans", *words]

Train and test never meet: the prompt's own hash decides which split it belongs to, whatever seed or length produced it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

SYMBOLS = (":", ";", "?", ">", "=", "+", "[", "]", "ans", "recall", "copy")
DIGITS = tuple("0123456789")
NAMES = tuple(
    [c + v for c in "bcdfghjklmnpqrstvwxz" for v in "aeiou"] + [v + c for v in "aei" for c in "bcdfghjklmnpqrstvwxz"]
)
VALUES = tuple(f"w{i:02d}" for i in range(64))
FILLERS = tuple(f"f{i:02d}" for i in range(32))
KEYS = tuple(f"k{i:02d}" for i in range(32))
VOCABULARY = (*SYMBOLS, *DIGITS, *NAMES, *VALUES, *FILLERS, *KEYS)
EOS = "<eos>"

Words = list[str]
Builder = Callable[[Random, int], tuple[Words, Words]]


@dataclass(frozen=True)
class Problem:
    """One prompt with its reference completion; all text fields are words separated by single spaces."""

    task: str
    split: str
    length: int
    seed: int
    prompt: str
    completion: str

    @property
    def answer(self) -> str:
        """The final answer: what follows the last ``ans`` of the reference completion."""
        return final_answer(self.completion)

    def grade(self, generated_text: str) -> bool:
        """Whether the final answer of `generated_text` (the completion only, not the prompt) is right."""
        return final_answer(generated_text) == self.answer

    def exact(self, generated_text: str) -> bool:
        """Whether every word up to the end of sequence is that of the reference completion."""
        return _until_eos(generated_text) == self.completion.split()


@dataclass(frozen=True)
class Task:
    """A registered task.

    `build(rng, length)` returns prompt and completion words, together close to and at most `length`. `length_for`
    maps a wanted number of generated tokens to a length; it is None for tasks whose completions are short whatever
    the length.
    """

    name: str
    build: Builder
    min_length: int
    max_length: int
    length_for: Callable[[int], int] | None = None


TASKS: dict[str, Task] = {}


def task(
    name: str, *, min_length: int, max_length: int = 4096, length_for: Callable[[int], int] | None = None
) -> Callable[[Builder], Builder]:
    """Register the decorated builder as task `name`. Raises ValueError if the name is taken."""

    def register(build: Builder) -> Builder:
        if name in TASKS:
            raise ValueError(f"task {name!r} is already registered; choose another name")
        TASKS[name] = Task(name, build, min_length, max_length, length_for)
        return build

    return register


def make_problem(
    task: str, *, length: int | None = None, generated: int | None = None, seed: int, split: str = "test"
) -> Problem:
    """Return the problem numbered `seed` of (task, split, length); equal arguments give equal problems.

    Args:
        task: A key of `TASKS`.
        length: Tokens in all, prompt and completion together; the problem comes close to it and never exceeds it.
        generated: Instead of `length`: at least so many tokens in the completion (and some five percent more at most
            for long ones). Only for tasks with a long completion.
        seed: Number of the problem in its stream, >= 0.
        split: "train" or "test".

    Raises:
        ValueError: For an unknown task or split, a length out of the task's range, a negative seed, or when not
            exactly one of `length` and `generated` is given.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; choose one of {sorted(TASKS)}")
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}; choose 'train' or 'test'")
    if seed < 0:
        raise ValueError(f"seed is {seed}; give a seed >= 0")
    spec = TASKS[task]
    if (length is None) == (generated is None):
        raise ValueError(f"got length={length} and generated={generated}; give exactly one of them")
    if generated is not None:
        if spec.length_for is None:
            able = sorted(name for name, other in TASKS.items() if other.length_for)
            raise ValueError(
                f"task {task!r} has short completions, generated={generated} cannot be met; use one of {able}"
            )
        length = spec.length_for(generated)
    assert length is not None
    if not spec.min_length <= length <= spec.max_length:
        raise ValueError(
            f"length {length} is out of range for task {task!r}; choose {spec.min_length} to {spec.max_length} "
            "tokens in all"
        )
    rng = Random(f"{task}/{split}/{length}/{seed}")
    while True:
        prompt_words, completion_words = spec.build(rng, length)
        prompt = " ".join(prompt_words)
        if split_of(prompt) == split:
            return Problem(task, split, length, seed, prompt, " ".join(completion_words))


def split_of(prompt: str) -> str:
    """The split a prompt belongs to: a quarter of all prompts, by hash, are test prompts."""
    return "test" if zlib.crc32(prompt.encode()) % 4 == 0 else "train"


def final_answer(text: str) -> str:
    """The words after the last ``ans`` and before the end of sequence; empty if there is no ``ans``."""
    words = _until_eos(text)
    if "ans" not in words:
        return ""
    return " ".join(words[len(words) - words[::-1].index("ans") :])


def _until_eos(text: str) -> Words:
    words = text.split()
    return words[: words.index(EOS)] if EOS in words else words


def _trace_length_for(generated: int) -> int:
    """Base lines spend the fewest completion words per word (7 of 11); 27 covers question, answer and rounding."""
    return -(-generated * 11 // 7) + 27


def _chain(rng: Random, length: int, *, once: int) -> tuple[Words, Words]:
    """A chain of sums mod 10 and its step-by-step evaluation.

    Operands are uniform over all earlier variables, so every step looks far back into the prompt and into the
    completion. With `once` > 0, up to so many sums of the first quarter are never used as operands: their values are
    written once and two of them are asked for.
    """
    base_cost, sum_cost, frame_cost = 11, 17, 9
    is_base, room = [True, True], length - frame_cost - 2 * base_cost
    while room >= sum_cost and len(is_base) < len(NAMES):
        is_base.append(len(is_base) > 3 and rng.random() < 0.125)
        room -= base_cost if is_base[-1] else sum_cost
    names = rng.sample(NAMES, len(is_base))
    sums = [name for name, base in zip(names, is_base, strict=True) if not base]
    early = sums[: max(2, len(sums) // 4)]
    stated_once = rng.sample(early, min(once, len(early)))
    asked = rng.sample(stated_once or sums, 2)

    prompt: Words = []
    steps: Words = []
    value: dict[str, int] = {}
    operands: Words = []
    for name, base in zip(names, is_base, strict=True):
        if base:
            value[name] = rng.randrange(10)
            prompt += [name, ":", str(value[name]), ";"]
            steps += [name, ":", str(value[name])]
        else:
            left, right = rng.sample(operands, 2)
            value[name] = (value[left] + value[right]) % 10
            prompt += [name, ":", left, "+", right, ";"]
            steps += [name, ":", left, str(value[left]), "+", right, str(value[right])]
        steps += ["=", name, str(value[name]), ";"]
        if name not in stated_once:
            operands.append(name)
    first, second = asked
    return (
        [*prompt, "?", first, second, ">"],
        [*steps, "ans", first, str(value[first]), second, str(value[second])],
    )


@task("trace", min_length=72, max_length=2400, length_for=_trace_length_for)
def _trace(rng: Random, length: int) -> tuple[Words, Words]:
    """Chain of thought: every line of the completion needs values from the prompt and from its own earlier lines."""
    return _chain(rng, length, once=0)


@task("fact", min_length=96, max_length=2400, length_for=_trace_length_for)
def _fact(rng: Random, length: int) -> tuple[Words, Words]:
    """Chain of thought whose asked values are written once, early in the completion, and then only in the answer."""
    return _chain(rng, length, once=4)


def _haystack(rng: Random, count: int) -> Words:
    """Filler with 15 % value words, so that the kind of a word does not mark a fact."""
    return [rng.choice(VALUES if rng.random() < 0.15 else FILLERS) for _ in range(count)]


def _scatter(rng: Random, pieces: list[Words], filler: int) -> Words:
    """The pieces in order, at random places among `filler` haystack words."""
    hay, words, start = _haystack(rng, filler), [], 0
    for cut, piece in zip(sorted(rng.randint(0, filler) for _ in pieces), pieces, strict=True):
        words += hay[start:cut] + piece
        start = cut
    return words + hay[start:]


def _facts(rng: Random, length: int, *, most_asked: int) -> tuple[Words, Words]:
    """Up to 24 facts ``key value value value ;`` in a haystack, one to `most_asked` of them asked for in any order."""
    facts = rng.randint(2, min(24, length // 16))
    asked = rng.randint(1, min(most_asked, facts))
    pieces = [[key, *rng.choices(VALUES, k=3), ";"] for key in rng.sample(KEYS, facts)]
    wanted = rng.sample(pieces, asked)
    question = ["?", "recall", *(piece[0] for piece in wanted), ">"]
    completion = ["ans", *(word for piece in wanted for word in piece)]
    filler = length - len(question) - len(completion) - 5 * facts
    return _scatter(rng, pieces, filler) + question, completion


@task("recall", min_length=64)
def _recall(rng: Random, length: int) -> tuple[Words, Words]:
    """Facts in a haystack; one to four of them are asked for."""
    return _facts(rng, length, most_asked=4)


@task("survey", min_length=64)
def _survey(rng: Random, length: int) -> tuple[Words, Words]:
    """Facts in a haystack; any number of them, up to all 24, is asked for."""
    return _facts(rng, length, most_asked=24)


@task("copy", min_length=64)
def _copy(rng: Random, length: int) -> tuple[Words, Words]:
    """Spans ``[ key word ... ]`` of 8 to 16 words in a haystack; one of them is asked for."""
    spans = rng.randint(1, max(1, min(8, length // 64)))
    pieces = [["[", key, *rng.sample(VALUES + FILLERS, rng.randint(8, 16)), "]"] for key in rng.sample(KEYS, spans)]
    wanted = rng.choice(pieces)
    question = ["?", "copy", wanted[1], ">"]
    completion = ["ans", *wanted[1:]]
    filler = length - len(question) - len(completion) - sum(map(len, pieces))
    return _scatter(rng, pieces, filler) + question, completion
