"""Published test sets: GSM8K, MATH-500, AIME and LongBench, from the hub or from a file with the same columns.

Examples are in the order of the set. Prompts are in words of our own. The problems of mathematics are all context and
no question; LongBench's questions stand behind their context.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..config import is_int
from ..needs import Package, extra
from .grading import gsm8k_answer, mathematics, optional
from .longbench import DATASETS, Dataset
from .task import Example, register_task

Row = Mapping[str, Any]
DATASETS_PACKAGE = Package("datasets", extra("evaluate"))
MATHEMATICS = (DATASETS_PACKAGE, Package("math_verify", extra("evaluate"), name="math-verify"))
BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class PublishedTask:
    """The examples of a set.

    Attributes:
        rows: the set, a sequence of mappings from column to value.
        make: from number and row, or several rows, to the example.
        source: what tells the set or file from others.
    """

    name: str
    rows: Any
    make: Callable[[str, int, Any], Example]
    source: str
    chat: bool = True

    @property
    def size(self) -> int:
        return len(self.rows)

    def example(self, number: int) -> Example:
        if not 0 <= number < self.size:
            raise IndexError(f"task {self.name!r} has no example {number}; it has 0 to {self.size - 1}")
        return self.make(self.name, number, self.rows[number])


def load_rows(
    name: str, hub: str, subset: str | None, split: str, columns: tuple[str, ...], path: str | None = None
) -> Any:
    """The rows of a set, in its order.

    Args:
        name: the task's, for errors.
        hub: id of the set on the hub.
        subset, split: which part of it.
        columns: what has to be there.
        path: a .jsonl, .json or .parquet file to read instead.

    Raises:
        ValueError: the file or the set is not there, cannot be read, or lacks a column.
        ImportError: datasets is not installed.
    """
    datasets = optional("datasets")
    if path is None:
        try:
            rows = datasets.load_dataset(hub, subset, split=split)
        except Exception as error:  # what a failed download raises is up to several libraries
            raise ValueError(
                f"task={name!r}: {hub} could not be loaded from the hub ({error}); without a network, give a file of "
                f"its {split} split: {name}:path=FILE with FILE a .jsonl, .json or .parquet"
            ) from error
        source = hub
    else:
        file = Path(str(path)).expanduser()
        if not file.is_file():
            raise ValueError(f"task={name!r}: path={path!r} is no file; give a .jsonl, .json or .parquet of {hub}")
        if file.suffix not in BUILDERS:
            raise ValueError(f"task={name!r}: path={path!r} ends in none of {', '.join(BUILDERS)}; convert it to one")
        try:
            rows = datasets.load_dataset(BUILDERS[file.suffix], data_files=str(file), split="train")
        except datasets.exceptions.DatasetGenerationError as error:
            raise ValueError(f"task={name!r}: path={path!r} cannot be read: {error.__cause__ or error}") from error
        source = str(path)
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise ValueError(
            f"task={name!r}: {source} has no {' and no '.join(missing)}; its columns are {', '.join(rows.column_names)}"
        )
    return rows


def source_of(hub: str, path: str | None) -> str:
    """The set's id, or of a file the SHA-256 of its content."""
    if path is None:
        return hub
    with Path(path).expanduser().open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _mathematics(
    name: str, number: int, row: Row, *, problem: str, gold: Callable[[str], str], room: int, shown: str = ""
) -> Example:
    right = gold(str(row["answer"]))
    return Example(
        task=name,
        number=number,
        context=(
            f"{shown}Problem: {row[problem]}\n\n"
            "Solve the problem step by step and put the final answer in \\boxed{}.\n\nSolution:"
        ),
        question="",
        answers=(right,),
        score=lambda text: mathematics(gold(_first_solution(text)), right),
        max_new_tokens=room,
        reference=str(row.get("solution") or row["answer"]),
    )


def _solved(row: Row) -> str:
    """A problem of GSM8K with its solution, as it is shown before others."""
    steps = re.sub(r"<<.*?>>", "", str(row["answer"])).partition("####")[0].strip()
    return f"Problem: {row['question']}\n\nSolution: {steps} \\boxed{{{gsm8k_answer(str(row['answer']))}}}\n\n"


def _first_solution(text: str) -> str:
    """What comes before a further problem, with which base models like to go on."""
    return text.partition("\n\nProblem:")[0]


def _room(name: str, max_new_tokens: object) -> int:
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"task={name!r}: max_new_tokens={max_new_tokens!r} is not possible; give at least 1")
    return max_new_tokens


@register_task("gsm8k", packages=MATHEMATICS, files=("path",))
def _gsm8k(
    name: str,
    tokenizer: Any,
    *,
    path: str | None = None,
    problems: int = 1,
    shots: int = 0,
    max_new_tokens: int | None = None,
) -> PublishedTask:
    """GSM8K; with more than one of `problems` so many are solved one after the other in one long answer; with `shots`
    the last so many of the set are shown solved before every problem, and not asked.
    """
    hub = "openai/gsm8k"
    if not is_int(problems) or problems < 1:
        raise ValueError(f"task={name!r}: problems={problems!r} is not possible; give at least 1")
    if not is_int(shots) or shots < 0 or (shots and problems > 1):
        raise ValueError(f"task={name!r}: shots={shots!r} is not possible; give 0, or more with problems=1")
    room = _room(name, 1024 * problems if max_new_tokens is None else max_new_tokens)
    rows = load_rows(name, hub, "main", "test", ("question", "answer"), path)
    if problems == 1:
        if shots >= len(rows):
            raise ValueError(f"task={name!r}: shots={shots} is not possible; the set has {len(rows)} problems in all")
        shown = "".join(_solved(rows[number]) for number in range(len(rows) - shots, len(rows)))
        make = partial(_mathematics, problem="question", gold=gsm8k_answer, room=room, shown=shown)
        asked = rows.select(range(len(rows) - shots)) if shots else rows
        return PublishedTask(name, asked, make, source_of(hub, path))
    groups = [[rows[first + i] for i in range(problems)] for first in range(0, len(rows) - problems + 1, problems)]
    return PublishedTask(name, groups, partial(_problems_in_turn, room=room), source_of(hub, path))


def _problems_in_turn(name: str, number: int, rows: Sequence[Row], *, room: int) -> Example:
    """Problems of GSM8K that one answer solves in their order; its score is the share solved."""
    right = [gsm8k_answer(str(row["answer"])) for row in rows]
    asked = "\n\n".join(f"Problem {place}: {row['question']}" for place, row in enumerate(rows, 1))
    solved = (f"Problem {place}: {row['answer']}" for place, row in enumerate(rows, 1))
    return Example(
        task=name,
        number=number,
        context=(
            f"{asked}\n\nSolve these {len(rows)} problems step by step, one after the other. Begin each solution with "
            '"Problem" and its number, and end it with its final answer in \\boxed{}.\n\n'
        ),
        question="",
        answers=tuple(right),
        score=lambda text: sum(map(mathematics, answers_in_turn(text, len(right)), right)) / len(right),
        max_new_tokens=room,
        reference="\n\n".join(solved),
    )


def answers_in_turn(text: str, count: int) -> list[str]:
    """Answers in the parts of a text behind "Problem 1" to "Problem `count`", each up to the next; "" where one is
    missing.
    """
    heads: list[tuple[int, re.Match[str]]] = []
    for found in re.finditer(r"\bProblem (\d+)\b", text):
        number, last = int(found[1]), heads[-1][0] if heads else 0
        if last < number <= count + 1:  # a problem more is what base models like to go on with
            heads.append((number, found))
    ends = [head.start() for _, head in heads[1:]] + [len(text)]
    parts = {number: text[head.end() : end] for (number, head), end in zip(heads, ends, strict=False)}
    return [gsm8k_answer(parts.get(number, "")) for number in range(1, count + 1)]


def _register_mathematics(task: str, hub: str, split: str, room: int) -> None:
    @register_task(task, packages=MATHEMATICS, files=("path",))
    def make(name: str, tokenizer: Any, *, path: str | None = None, max_new_tokens: int = room) -> PublishedTask:
        rows = load_rows(name, hub, None, split, ("problem", "answer"), path)
        to_example = partial(
            _mathematics,
            problem="problem",
            gold=str,
            room=_room(name, max_new_tokens),
        )
        return PublishedTask(name, rows, to_example, source_of(hub, path))


_register_mathematics("math500", "HuggingFaceH4/MATH-500", "test", 4096)
_register_mathematics("aime24", "HuggingFaceH4/aime_2024", "train", 16384)
_register_mathematics("aime25", "math-ai/aime25", "test", 16384)


def cut_middle(context: str, question: str, most: int, tokenizer: Any) -> str:
    """The context without its middle, so that it and the question have about `most` tokens, as many on either side.

    Both halves go through the tokenizer and back, as in the benchmark, which cuts the prompt as a whole. A question of
    more than half of them is left whole.

    Raises:
        ValueError: the question alone has more tokens.
    """
    ids, asked = (tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in (context, question))
    if len(asked) > most:
        raise ValueError(f"max_length={most} is too short for a question of {len(asked)} tokens; give more")
    if len(ids) + len(asked) <= most:
        return context
    head = min(most // 2, most - len(asked))
    tail = max(0, most // 2 - len(asked))
    return "".join(tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:head], ids[len(ids) - tail :]))


def _longbench(
    name: str, number: int, row: Row, *, dataset: Dataset, tokenizer: Any, max_length: int | None
) -> Example:
    context, question = dataset.before + row["context"], dataset.question.format(input=row["input"])
    if max_length is not None:
        context = cut_middle(context, question, max_length, tokenizer)
    answers = tuple(row["answers"])
    return Example(
        task=name,
        number=number,
        context=context,
        question=question,
        answers=answers,
        score=partial(dataset.best, answers=answers, classes=tuple(row.get("all_classes") or ())),
        max_new_tokens=dataset.max_new_tokens,
    )


def _register_longbench(key: str, dataset: Dataset) -> None:
    @register_task(f"longbench-{key}", packages=(DATASETS_PACKAGE, *dataset.packages), files=("path",))
    def make(name: str, tokenizer: Any, *, path: str | None = None, max_length: int | None = None) -> PublishedTask:
        if max_length is not None and (not isinstance(max_length, int) or max_length < 2):
            raise ValueError(f"task={name!r}: max_length={max_length!r} is not possible; give at least 2 tokens")
        hub = "Xnhyacinth/LongBench"
        rows = load_rows(name, hub, key, "test", ("input", "context", "answers"), path)
        to_example = partial(_longbench, dataset=dataset, tokenizer=tokenizer, max_length=max_length)
        return PublishedTask(name, rows, to_example, source_of(hub, path), chat=dataset.chat)


for _key, _dataset in DATASETS.items():
    _register_longbench(_key, _dataset)
