"""Aims: what a benchmark is there to reach, and whether the rows say that it is reached."""

from collections.abc import Sequence
from typing import NamedTuple

from .table import NONE


class Aim(NamedTuple):
    """One aim.

    Attributes:
        text: what is to be reached.
        verdict: "met", "missed" or "not measured".
        detail: by what number.
        must: whether missing it fails the run.
    """

    text: str
    verdict: str
    detail: str
    must: bool = False


def judge(
    text: str,
    found: Sequence[tuple[float, str]],
    *,
    least: float | None = None,
    most: float | None = None,
    below: float | None = None,
    otherwise: str = NONE,
    must: bool = False,
) -> Aim:
    """An aim against the worst of what was found for it: numbers, each with its text; `otherwise` where nothing was."""
    if not found:
        return Aim(text, "not measured", otherwise, must)
    number, detail = min(found) if least is not None else max(found)
    met = (least is None or number >= least) and (most is None or number <= most) and (below is None or number < below)
    worst = f" (the worst of {len(found)})" if len(found) > 1 else ""
    return Aim(text, "met" if met else "missed", detail + worst, must)


def aims_table(aims: Sequence[Aim]) -> str:
    """A line for each aim."""
    lines = [f"| {aim.text} | {aim.verdict} | {aim.detail} |" for aim in aims]
    return "\n".join(["| aim | | measured |", "| --- | --- | --- |", *lines])
