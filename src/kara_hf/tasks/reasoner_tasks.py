"""The tasks of the bundled model's own language, as tasks of the evaluation kit."""

from dataclasses import dataclass
from typing import Any

from .reasoner import TASKS as KINDS
from .reasoner import Problem, make_problem
from .task import Example, register_task

FIRST_SEED = 40_000  # of the test split; other seeds of it were looked at while methods were being made


@dataclass(frozen=True)
class ReasonerTask:
    """Problems in the words of the bundled model, see `kara_hf.tasks.reasoner`; disjoint from their training.

    Attributes:
        kind: a key of the reasoner's tasks.
        size_of: ``{"length": tokens in all}`` or ``{"generated": tokens of the solution}``.
    """

    name: str
    kind: str
    size_of: dict[str, Any]
    size: int | None = None
    chat: bool = False

    def example(self, number: int) -> Example:
        problem = make_problem(self.kind, seed=FIRST_SEED + number, **self.size_of)
        context, question = split_question(problem)
        return Example(
            task=self.name,
            number=number,
            context=context,
            question=question,
            answers=(problem.answer,),
            score=lambda text: float(problem.grade(text)),
            max_new_tokens=len(problem.completion.split()) + 16,
            reference=problem.completion,
            distance=distance_of(problem),
        )


def split_question(problem: Problem) -> tuple[str, str]:
    """What comes before the question, and the question from its question mark on."""
    context, _, question = problem.prompt.rpartition(" ?")
    return context, f" ?{question}"


def distance_of(problem: Problem) -> int | None:
    """Of problems that ask for values stated once: tokens between the oldest of them and the answer; of others None."""
    if problem.task != "fact":
        return None
    words = problem.completion.split()
    answer = len(words) - words[::-1].index("ans")
    asked = words[answer::2]
    found = [i for i, (sign, name) in enumerate(zip(words, words[1:], strict=False)) if sign == "=" and name in asked]
    return answer - min(found)


def _register(kind: str) -> None:
    @register_task(kind)
    def make(name: str, tokenizer: Any, *, length: int | None = None, generated: int | None = None) -> ReasonerTask:
        size_of: dict[str, Any] = {}
        if generated is not None:
            size_of["generated"] = generated
        if length is not None or generated is None:
            size_of["length"] = 384 if length is None else length
        task = ReasonerTask(name, kind, size_of)
        problem = make_problem(kind, seed=FIRST_SEED, **size_of)
        ids = tokenizer(problem.prompt)["input_ids"]
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            raise ValueError(
                f"task={name!r} is written in the words of the bundled model, which this tokenizer does not know; "
                "choose a task in English, such as niah"
            )
        return task


for _kind in KINDS:
    _register(_kind)
