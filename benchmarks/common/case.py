"""A case is a question that is measured, under a name; its jobs are the measurements that answer it."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .aims import Aim
from .rows import Row
from .table import Columns

Measure = Callable[[], Row | list[Row]]
CASES: dict[str, "Case"] = {}


@dataclass
class Job:
    """One measurement, or one race of several.

    Attributes:
        labels: what tells its rows from others of the case.
        measure: gives the numbers of its row, or of several rows, each with labels of its own beside these; of a check
            also whether it "passed".
        needs: ops whose checks must have passed.
        seconds: it is stopped after so many.
        source: where its numbers come from, if not from this process.
    """

    labels: Row
    measure: Measure
    needs: tuple[str, ...] = ()
    seconds: float = math.inf
    source: Row | None = None


@dataclass(frozen=True)
class Case:
    """What `python -m benchmarks run` can be asked for.

    Attributes:
        name: a word, or two with a dot between: those with the same first word are a group.
        about: the question, in a sentence.
        jobs: called with the run and `sizes` by name, gives its jobs.
        columns: of its table.
        sizes: what can be set.
        smoke: what a smoke run sets.
        aims: from all rows of the file, those of this case; or None.
        device: "cpu", "cuda" for what needs a GPU, or "any" for a GPU if there is one.
        first: whether it runs whenever another of its group does.
        until: share of the time that is over when it must be done.
        keep: whether its rows go to the file of this machine; the evaluation kit keeps answers in a folder of its own.
    """

    name: str
    about: str
    jobs: Callable[..., Iterable[Job]]
    columns: Columns
    sizes: Row = field(default_factory=dict)
    smoke: Row = field(default_factory=dict)
    aims: Callable[[Sequence[Row]], list[Aim]] | None = None
    device: str = "cpu"
    first: bool = False
    until: float = 1.0
    keep: bool = True

    @property
    def group(self) -> str:
        return self.name.partition(".")[0]


def register(name: str, about: str, columns: Columns, **options: Any) -> Callable[[Any], Any]:
    """Makes a case of a function that gives its jobs; `options` are those of `Case`.

    Raises:
        ValueError: there is such a case already.
    """

    def add(jobs: Callable[..., Iterable[Job]]) -> Callable[..., Iterable[Job]]:
        if name in CASES:
            raise ValueError(f"name={name!r} is taken: a case of that name is registered already")
        CASES[name] = Case(name, about, jobs, columns, **options)
        return jobs

    return add


def chosen(names: Sequence[str]) -> list[Case]:
    """Cases by name or group, in the order in which they must be done, with those that come first in their group.

    Raises:
        ValueError: there is no such case, or they need different devices.
    """
    known = list(dict.fromkeys([*(case.group for case in CASES.values()), *CASES]))
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"{', '.join(unknown)} is no case; choose from {', '.join(known)}")
    asked = [case for case in CASES.values() if {case.name, case.group} & set(names)]
    groups = {case.group for case in asked}
    found = [case for case in CASES.values() if case in asked or (case.first and case.group in groups)]
    if len({case.device for case in found}) > 1:
        wanted = ", ".join(f"{case.name} ({case.device})" for case in found)
        raise ValueError(f"{wanted} cannot run together, since they need other devices; run one after the other")
    return sorted(found, key=lambda case: case.until)


def with_settings(case: Case, smoke: bool, given: Sequence[str]) -> Row:
    """The sizes of a case: its own, those of a smoke run, and what is given as ``NAME=VALUE``. Others are left alone.

    Raises:
        ValueError: a value is not of the kind of the size that it replaces.
    """
    sizes = case.sizes | (case.smoke if smoke else {})
    for text in given:
        name, _, value = text.partition("=")
        if name in case.sizes:
            sizes[name] = _read(name, value, case.sizes[name])
    return sizes


def check_settings(cases: Sequence[Case], given: Sequence[str]) -> None:
    """Raises ValueError unless each ``NAME=VALUE`` can be set in one of the cases."""
    known = sorted({name for case in cases for name in case.sizes})
    for text in given:
        name, sign, _ = text.partition("=")
        if not sign or name not in known:
            raise ValueError(
                f"set={text!r} is not possible: it must be NAME=VALUE, NAME one of {', '.join(known) or 'none'}"
            )


def _read(name: str, value: str, like: Any) -> Any:
    """`value` as what `like` is; of a tuple its parts, numbers separated by commas and texts by semicolons."""
    if isinstance(like, tuple):
        parts = value.split(";" if isinstance(like[0], str) else ",")
        return tuple(_read(name, part.strip(), like[0]) for part in parts)
    try:
        if isinstance(like, bool):
            return {"true": True, "false": False}[value.lower()]
        return type(like)(value)
    except (ValueError, KeyError):
        raise ValueError(f"{name}={value!r} is not possible: {name} must be like {like!r}") from None
