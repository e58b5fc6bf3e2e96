"""Everything that only a GPU can show, in one run of less than ten minutes on one card of 80 GiB or more.

    python benchmarks/gpu.py                          # all of it; needs a GPU
    python benchmarks/gpu.py --sections attend,decode # the checks and these
    python benchmarks/gpu.py --smoke                  # every section with tiny shapes on a CPU; measures nothing

Sections, in this order, each with its share of the time:

- checks: every op under Triton against float64 references, and decode steps of a small model. Always run. A check that
  does not pass takes the speed rows of its op away, and the exit code is 1.
- attend: attention of one decode step, against the card's own copy bandwidth and torch's attention.
- windows: what scoring a window and moving its survivors takes.
- decode: tokens/s and memory of a whole model with DynamicCache and KaraCache.
- limit: the largest batch within a fixed amount of memory.
- pod: decode steps of PoDCache with groups of layers that share keys, against the same cache without.
- serve: continuous batching with Kara inside, where memory is short, against the engine alone.
- more: other retentions, StaticCache with `torch.compile`, a whole `generate`, and a second model.

Rows with provenance go to benchmarks/results/<gpu>.json after every section, in place of what that section had there.
What there is no time for is a row that says so.
"""

import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import gpu_checks
import gpu_kernels
import gpu_models
import gpu_serving
import torch
import typer
from gpu_report import aims, markdown
from gpu_run import GREEN, Case, Row, Run
from provenance import load_rows, write_rows
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kara_hf.evaluation.measure.provenance import processor

RESULTS = Path(__file__).parent / "results"
# The cases of each section, and the share of the time that is over when it must be done. Checks compile every kernel.
SECTIONS: dict[str, tuple[Callable[[Run], list[Case]], float]] = {
    "checks": (gpu_checks.cases, 0.40),
    "attend": (gpu_kernels.attend_cases, 0.50),
    "windows": (gpu_kernels.window_cases, 0.53),
    "decode": (gpu_models.decode_cases, 0.70),
    "limit": (gpu_models.limit_cases, 0.77),
    "pod": (gpu_models.pod_cases, 0.86),
    "serve": (gpu_serving.serve_cases, 0.95),
    "more": (gpu_models.more_cases, 1.0),
}
console = Console()


def chosen_sections(names: str) -> list[str]:
    """The sections in their order, the checks always among them. Raises `typer.BadParameter` on another name."""
    asked = [name.strip() for name in names.split(",")] if names else list(SECTIONS)
    if unknown := sorted(set(asked) - set(SECTIONS)):
        raise typer.BadParameter(f"{', '.join(unknown)} is no section; choose from {', '.join(SECTIONS)}")
    return [name for name in SECTIONS if name in asked or name == "checks"]


def result_file(out: Path | None, smoke: bool, device: torch.device) -> Path | None:
    """Where rows go: nowhere in a smoke run, unless a file outside the results is named."""
    if not smoke:
        return out or RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', processor(str(device)).lower()).strip('-')}.json"
    if out is not None and out.resolve().is_relative_to(RESULTS.resolve()):
        raise typer.BadParameter("a smoke run measures nothing; name a file outside benchmarks/results")
    return out


def save(path: Path, run: Run, done: list[str]) -> None:
    """Writes the rows so far; sections of the file that are not `done` by this run stay as they are."""
    write_rows(path, [row for row in load_rows(path) if row["section"] not in done] + run.rows)


def show_aims(rows: list[Row]) -> None:
    colours = {"met": "green", "missed": "red", "not measured": "yellow"}
    shown = Table("aim", "", "measured")
    for aim, verdict, detail in aims(rows):
        shown.add_row(escape(aim), f"[{colours[verdict]}]{verdict}[/]", escape(detail))
    console.print(shown)


def main(
    minutes: Annotated[float, typer.Option(help="time for all of it")] = 9.0,
    sections: Annotated[str, typer.Option(help=f"comma-separated, of {', '.join(SECTIONS)}; empty: all")] = "",
    out: Annotated[Path | None, typer.Option(help="JSON file of rows; default: benchmarks/results/<gpu>.json")] = None,
    smoke: Annotated[bool, typer.Option(help="tiny shapes on a CPU, to see that all of it runs")] = False,
) -> None:
    """Checks, measures, prints the tables and writes the rows."""
    names = chosen_sections(sections)
    if not smoke and not torch.cuda.is_available():
        console.print("[red]torch sees no GPU; --smoke runs every section with tiny shapes on a CPU[/]")
        raise typer.Exit(2)
    device = torch.device("cpu" if smoke else "cuda")
    if smoke:
        os.environ["KARA_BACKEND"] = "reference"
        torch.set_num_threads(1)  # threads that wait for each other slow tiny shapes down
    backend = os.environ.setdefault("KARA_BACKEND", "triton")
    path = result_file(out, smoke, device)
    warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)  # 5.17 knows no other name
    run = Run(device, smoke, minutes, backend, console)
    for number, name in enumerate(names, start=1):
        make_cases, until = SECTIONS[name]
        run.take(name, make_cases(run), until)
        if path is not None:
            save(path, run, names[:number])
    console.print(markdown(run.rows), markup=False, highlight=False, soft_wrap=True)
    if smoke:
        console.print("[yellow]a smoke run: none of these numbers means anything[/]")
    else:
        show_aims(run.rows)
    if path is not None:
        console.print(f"written to {path}")
    failed = any(row["status"] == "failed" for row in run.rows)
    red = any(row["section"] == "checks" and row["status"] not in GREEN for row in run.rows)
    raise typer.Exit(1 if failed or red else 0)


if __name__ == "__main__":
    typer.run(main)
