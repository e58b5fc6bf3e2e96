"""English tasks of a wanted number of tokens, whatever the tokenizer: a draft is made with more or fewer units of text
until it fits."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

from .task import Example

MOST_UNKNOWN = 0.03  # share of an example's tokens


@dataclass(frozen=True)
class Draft:
    """An example before its tokens are counted.

    Attributes:
        context, question, answers, score: as in `Example`.
        reference: a right answer as a model is to write it.
        stated: where in `context` the oldest of the answers is stated, in characters; None where that is not one place.
        room: tokens to leave for an answer, as a multiple of those of `reference`, to which 16 are added.
    """

    context: str
    question: str
    answers: tuple[str, ...]
    score: Callable[[str], float]
    reference: str
    stated: int | None = None
    room: float = 1.0


Count = Callable[[str], int]  # tokens of a text
Drafting = Callable[
    [Random, Count], Callable[[int], Draft]
]  # draws what is asked, then drafts it with so many units of text


@dataclass(frozen=True)
class TextTask:
    """Examples in English of a wanted length, as many as one likes.

    Attributes:
        kind: name without options; examples of one kind and number ask the same at every length.
        drafting: draws what is asked and returns its drafts; tokens grow with the number of units.
        length: tokens of context, question and answer in all, what a tokenizer puts before a text included, those of
            a chat template left out.
        generated: instead of `length`: at least so many tokens in the reference answer.
        least: units of the shortest draft.
        source: what tells a text that the task was given from others; empty where it was given none.

    What is left of `length` when no further unit fits is room for the answer, so that it is met exactly.
    """

    name: str
    kind: str
    tokenizer: Any
    drafting: Drafting
    length: int | None
    generated: int | None = None
    least: int = 4
    size: int | None = None
    chat: bool = True
    source: str = ""

    def example(self, number: int) -> Example:
        """The example of that number, from 0 on.

        Raises:
            IndexError: the number is negative.
            ValueError: `length` is too short for the task, or the tokenizer does not know enough English words.
        """
        if number < 0:
            raise IndexError(f"task {self.name!r} has no example {number}; numbers begin at 0")
        draft = cache(self.drafting(Random(f"{self.kind}/{number}"), self.count))

        @cache
        def prompt(units: int) -> int:
            return self.count(draft(units).context, special=True) + self.count(draft(units).question)

        @cache
        def answer(units: int) -> int:
            return self.count(draft(units).reference)

        def room(units: int) -> int:
            return int(draft(units).room * answer(units)) + 16

        if self.length is None:
            assert self.generated is not None
            units, below = self.least, self.generated - 1
            if answer(units) <= below:
                units = fit(answer, below, self.least, "generated", slack=0) + 1
            max_new_tokens = room(units)
        else:
            units = fit(lambda units: prompt(units) + room(units), self.length, self.least, "length")
            max_new_tokens = self.length - prompt(units)
        made = draft(units)
        self._check_words(made)
        return Example(
            task=self.name,
            number=number,
            context=made.context,
            question=made.question,
            answers=made.answers,
            score=made.score,
            max_new_tokens=max_new_tokens,
            reference=made.reference,
            distance=None if made.stated is None else self.count(made.context[made.stated :]),
        )

    def count(self, text: str, special: bool = False) -> int:
        """Tokens of a text; with those that the tokenizer adds to every text, if `special`."""
        return len(self._ids(text, special))

    def _ids(self, text: str, special: bool = False) -> list[int]:
        return self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]

    def _check_words(self, made: Draft) -> None:
        text, unknown = made.context[:20_000], self.tokenizer.unk_token_id
        ids = self._ids(text)
        share = ids.count(unknown) / max(1, len(ids))
        if len(ids) < len(text.split()) // 4:
            lost = "most of it is lost in"
        elif share > MOST_UNKNOWN:
            lost = f"{share:.0%} of its tokens are unknown to"
        elif unknown in self._ids(made.reference):
            lost = "tokens of its answers are unknown to"
        else:
            return
        raise ValueError(
            f"task={self.name!r} is in English, and {lost} this tokenizer, whose vocabulary is made for other text; "
            "choose a task in its own words, such as trace for the bundled model, or a model that reads English"
        )


def fit(cost: Callable[[int], int], limit: int, least: int, what: str, *, slack: int | None = None) -> int:
    """So many units that they cost at most `limit`, and either within `slack` of it or no unit more would fit.

    Costs are taken to grow with units about evenly, so that few of them are asked for.

    Args:
        cost: from a number of units to what they cost.
        limit: what may be spent.
        least: the smallest number of units.
        what: name of the option that gave the limit, for errors.
        slack: a hundredth of the limit, and at most 48, where it is None.

    Raises:
        ValueError: the smallest number costs more than the limit, or more units cost nothing.
    """
    slack = min(limit // 100, 48) if slack is None else slack
    base = spent = cost(least)
    if spent > limit:
        raise ValueError(f"{what}={limit} is too short for this task and tokenizer; give at least {spent} tokens")
    low, high, units = least, None, least + 16
    while limit - spent > slack and (high is None or high - low > 1):
        now = cost(units)
        if now <= base:
            raise ValueError("this tokenizer makes no tokens of English words; choose a model that reads English")
        if now <= limit:
            low, spent = units, now
        else:
            high = units
        units = least + int((limit - slack // 2 - base) * (units - least) / (now - base))
        units = max(units, low + 1) if high is None else min(max(units, low + 1), high - 1)
    return low
