"""`kara-hf doctor`: what is installed, what runs the kernels, and what each command lacks here."""

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

import typer
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import __version__
from ..needs import extra

PACKAGES = ("torch", "transformers", "triton", "accelerate", "peft", "datasets", "gradio")
NEEDS = {  # the extra that brings what commands need beside the package itself
    "generate, compress, plan": "",
    "evaluate, divergence, report": "evaluate",
    "serve": "serve",
    "demo": "demo",
    "pod explore, pod effect, pod adapt": "train",
    "--plot of pod explore": "plot",
    "the harness of lm_eval": "harness",
}


@dataclass(frozen=True)
class Lack:
    """A package that is missing or too old.

    Attributes:
        name: of the package.
        wanted: versions that would do, as pip writes them.
        found: the version that is installed; None: none is.
    """

    name: str
    wanted: str
    found: str | None

    def __str__(self) -> str:
        return (
            f"{self.name} is not installed" if self.found is None else f"{self.name} {self.found} is not {self.wanted}"
        )


def doctor() -> None:
    """Show versions, what runs the kernels, and what is missing for which command.

    Ends with code 1 if the package itself lacks something.
    """
    console = Console(highlight=False)
    console.print(f"kara_hf {__version__}, Python {platform.python_version()}, {platform.platform()}", markup=False)
    console.print(versions())
    console.print(f"Attention: {backend()}", markup=False)
    console.print(commands())
    if any(lacks("")):
        raise typer.Exit(1)


def versions() -> Table:
    """What is installed of what the package is used with."""
    table = Table(highlight=False)
    for name in PACKAGES:
        table.add_column(name, no_wrap=True)
    table.add_row(*(installed(name) or "-" for name in PACKAGES))
    return table


def commands() -> Table:
    """Whether each command can run, and what to do if not."""
    table = Table(highlight=False)
    for title in ("command", "here", "remedy"):
        table.add_column(title, overflow="fold")
    for names, needed in NEEDS.items():
        found = dict.fromkeys([*lacks(""), *lacks(needed)])
        remedy = (extra(needed) if needed else "pip install kara_hf") if found else ""
        table.add_row(names, "; ".join(map(str, found)) or "ready", Text(remedy))
    return table


def lacks(needed: str) -> Iterator[Lack]:
    """What is missing or too old of what an extra asks for; "": of what the package itself does."""
    for text in requires("kara_hf") or []:
        wanted = Requirement(text)
        asked = wanted.marker.evaluate({"extra": needed}) if wanted.marker else not needed
        found = installed(wanted.name)
        if asked and (found is None or not wanted.specifier.contains(found, prereleases=True)):
            yield Lack(wanted.name, str(wanted.specifier), found)


def installed(name: str) -> str | None:
    """The version of a package, without what a build adds behind "+"."""
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return None


def backend() -> str:
    """What computes attention over a cache here, and why."""
    if installed("torch") is None:
        return "torch is not installed"
    import torch

    from ..kernels.backend import use_triton

    if not torch.cuda.is_available():
        return "plain torch on the CPU; torch sees no GPU"
    name = torch.cuda.get_device_name()
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    asked = os.environ.get("KARA_BACKEND")
    try:
        kernels = use_triton(torch.empty(0, device="cuda", dtype=torch.float16), 64)
    except (RuntimeError, ValueError) as error:
        return f"{error} ({name}, compute capability {capability})"
    chosen = f", as KARA_BACKEND={asked} says" if asked else ""
    return f"{'Triton kernels' if kernels else 'plain torch'} on {name}, compute capability {capability}{chosen}"
