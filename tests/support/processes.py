"""Processes that work together, as torchrun starts them, but for the imports: they are copies of this one."""

import multiprocessing
import os
from collections.abc import Callable, Sequence


def _run(function: Callable[[], object], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    function()


def forked(functions: Sequence[Callable[[], object]], world: dict[str, str], seconds: float) -> list[int | None]:
    """Runs all at once, each as its rank of `world`, and returns their exit codes; None of one that hangs, and ends."""
    context = multiprocessing.get_context("fork")
    places = [world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(len(functions))]
    started = [context.Process(target=_run, args=both) for both in zip(functions, places, strict=True)]
    for process in started:
        process.start()
    for process in started:
        process.join(seconds)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    return codes
