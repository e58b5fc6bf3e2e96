"""Measures this package: each case answers one question, and its rows say where they come from.

    python -m benchmarks list
    python -m benchmarks run generation kv_compress.bytes   # cases, or groups of them
    python -m benchmarks run gpu                            # checks and measures all that needs a GPU
    python -m benchmarks run pod --set seen=512,2048        # other sizes
    python -m benchmarks run gpu --smoke                    # tiny sizes on a CPU; measures nothing
    python -m benchmarks table pod

Rows go to benchmarks/results/PROCESSOR.json as they come. A run that was stopped goes on where it was; what the same
code measured on the same machine is not measured again without --again. The exit code is 1 if a check or a job failed.
"""

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import typer

from . import registry  # noqa: F401  it registers the cases
from .common.aims import Aim, aims_table
from .common.case import CASES, Case, check_settings, chosen, with_settings
from .common.console import console
from .common.rows import GREEN, RESULTS, Row, RowFile, file_of
from .common.run import Run, backend
from .common.table import markdown, table

GPU_MINUTES = 9.0
Names = Annotated[list[str], typer.Argument(help="Cases, or groups: the word before the dot.", show_default=False)]
File = Annotated[Path | None, typer.Option(help="JSON file of rows [default: that of this machine].")]

app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command("list")
def list_cases() -> None:
    """Say what there is to measure, and what can be set."""
    rows = [
        {"name": case.name, "about": case.about, "set": ", ".join(case.sizes), "device": case.device}
        for case in CASES.values()
    ]
    columns = [("case", "{name}"), ("question", "{about}"), ("needs", "{device}"), ("--set", "{set}")]
    show(table(rows, columns))


@app.command()
def run(
    names: Names,
    given: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Another size.")] = None,
    out: File = None,
    again: Annotated[bool, typer.Option("--again", help="Measure what the file holds, too.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Tiny sizes on a CPU, to see that all of it runs.")] = False,
    minutes: Annotated[
        float | None, typer.Option(help=f"Time for all of it [default: {GPU_MINUTES:g} on a GPU; elsewhere no limit].")
    ] = None,
) -> None:
    """Measure cases, print their tables and write their rows."""
    with readable_errors():
        cases = chosen(names)
        check_settings(cases, given or [])
        sizes = {case.name: with_settings(case, smoke, given or []) for case in cases}
        found = begin(cases[0].device, out, again=again, smoke=smoke, minutes=minutes)
        with backend(found.backend):
            for case in cases:
                found.take(case, sizes[case.name])
    for case in cases:
        show_case(case, found.rows)
    failed = any(row["status"] not in GREEN for row in found.rows if row["status"] == "failed" or "op" in row)
    if smoke:
        console.print("[yellow]a smoke run: none of these numbers means anything[/]")
    else:
        verdicts = show_aims(cases, found.file.rows)
        failed = failed or any(aim.must and aim.verdict == "missed" for aim in verdicts)
    if found.file.path is not None and any(case.keep for case in cases):
        console.print(f"written to {found.file.path}", soft_wrap=True)
    raise typer.Exit(1 if failed else 0)


@app.command("table")
def show_tables(names: Names, rows: File = None) -> None:
    """Print tables and aims from rows that were measured."""
    with readable_errors():
        cases = chosen(names)
        path = rows or file_of(needed_device(cases[0].device, smoke=False))
        held = RowFile(path).rows
        if not any(row["case"] == case.name for row in held for case in cases):
            raise ValueError(
                f"rows={str(path)!r} has no rows of {', '.join(names)}; measure them, or name another file"
            )
    for case in cases:
        show_case(case, held)
    show_aims(cases, held)


def begin(device: str, out: Path | None, *, again: bool, smoke: bool, minutes: float | None) -> Run:
    """A run on the device that is needed; where that is a CPU with one thread, since threads wait for each other.

    Raises:
        ValueError: there is no such device, or rows of a smoke run would get among the results.
    """
    if smoke and out is not None and out.resolve().is_relative_to(RESULTS.resolve()):
        raise ValueError(f"out={str(out)!r} is not possible: a smoke run measures nothing; name a file elsewhere")
    used = needed_device(device, smoke)
    warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)  # 5.17 knows no other name
    if used == "cpu" and device != "any":
        torch.set_num_threads(1)
    return Run(
        torch.device(used),
        RowFile(out if smoke else out or file_of(used)),
        smoke=smoke,
        again=again,
        minutes=minutes or (GPU_MINUTES if device == "cuda" else math.inf),
        dtype=torch.bfloat16 if device == "cuda" else torch.float32,
        backend="triton" if used == "cuda" and device == "cuda" else os.environ.get("KARA_BACKEND", "auto"),
    )


def needed_device(device: str, smoke: bool) -> str:
    """Raises ValueError if there is no GPU where one is needed."""
    if smoke or device == "cpu" or (device == "any" and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        raise ValueError("torch sees no GPU, which these cases need; --smoke runs them with tiny sizes on a CPU")
    return "cuda"


def show_case(case: Case, rows: Sequence[Row]) -> None:
    """Its table, and of the checks how many passed."""
    mine = [row for row in rows if row["case"] == case.name]
    if case.first:
        passed = sum(row["status"] == "passed" for row in mine)
        show(f"**{case.name}: {case.about}** {passed} of {len(mine)} passed.")
        mine = [row for row in mine if row["status"] != "passed"]
    if mine:
        show(markdown(f"{case.name}: {case.about}.", mine, case.columns))


def show_aims(cases: Sequence[Case], rows: Sequence[Row]) -> list[Aim]:
    """The aims of the cases, those that several have once."""
    found = [aim for aims in dict.fromkeys(case.aims for case in cases if case.aims) for aim in aims(rows)]
    if found:
        show(aims_table(found))
    return found


def show(text: str) -> None:
    console.print(f"{text}\n", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def readable_errors() -> Iterator[None]:
    """Ends the command with one line and code 2 if what was asked is not possible."""
    try:
        yield
    except ValueError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
