"""Environments of their own for peers, which need other versions than this package.

One is made at its first run, which takes some minutes and up to 1.5 GB. `run_worker` has jobs done in it.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .console import console
from .rows import ROOT, Row, origin

TORCH = "torch==2.13.0"
VERSIONS = """import json, platform, sys
from importlib.metadata import version
print(json.dumps({"python": platform.python_version(), "versions": {name: version(name) for name in sys.argv[1:]}}))"""


@dataclass(frozen=True)
class Environment:
    """What is installed for a peer.

    Attributes:
        name: of its folder in runs/, where no other is named.
        packages: requirements, torch aside.
        imports: a module that must be importable when all is installed.
        torch: whether it needs torch.
    """

    name: str
    packages: tuple[str, ...]
    imports: str
    torch: bool = True

    @property
    def folder(self) -> Path:
        return ROOT / "runs" / f"{self.name}-env"

    @property
    def told(self) -> tuple[str, ...]:
        """Packages whose versions are part of a number's origin."""
        return tuple(re.split("[<=>]", package)[0] for package in self.packages) + ("torch",) * self.torch


KVPRESS = Environment("kvpress", ("transformers<5.3", "kvpress==0.5.5", "rich"), "kvpress")


def environment(peer: Environment, folder: Path | None = None, torch_requirement: str = TORCH) -> Path:
    """The Python of a peer's environment in `folder`, which is made if it is not there already.

    Raises:
        ValueError: the folder holds something else.
        subprocess.CalledProcessError: an installation failed; the next call starts it again.
    """
    folder = folder or peer.folder
    needed = [torch_requirement] if peer.torch else []
    stamp, wanted, python = folder / "installed.json", [*needed, *peer.packages], folder / "bin" / "python"
    if stamp.exists() and json.loads(stamp.read_text()) == wanted:
        return python
    if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").exists():
        raise ValueError(f"env={str(folder)!r} is not empty and no environment; name another folder with --set env=DIR")
    console.print(f"making an environment in {folder}, which takes some minutes")
    stamp.unlink(missing_ok=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    # torch comes first and is named again, so that nothing that needs it brings another build.
    for packages in filter(None, (needed, wanted)):
        subprocess.run([str(python), "-m", "pip", "install", "-qq", *packages], check=True)
    subprocess.run([str(python), "-W", "ignore", "-c", f"import {peer.imports}"], check=True)
    stamp.write_text(json.dumps(wanted))
    return python


def source_of(peer: Environment, python: Path, device: str = "cpu", threads: int = 1) -> Row:
    """Where numbers of this environment come from."""
    asked = [str(python), "-c", VERSIONS, *peer.told]
    told = subprocess.run(asked, check=True, capture_output=True, text=True).stdout
    return origin(device) | json.loads(told) | {"threads": threads}


def run_worker(python: Path | None, folder: Path, job: Row, worker: Sequence[str]) -> Iterator[Row]:
    """Has the job done in the other environment, or in a new process of this one: what it finds, as it comes.

    Raises:
        subprocess.CalledProcessError: the worker failed; what it found until then has come.
    """
    (folder / "job.json").write_text(json.dumps(job))
    command = [str(python or sys.executable), "-W", "ignore", *worker, str(folder)]
    surroundings = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=surroundings) as process:
        assert process.stdout is not None
        yield from map(json.loads, process.stdout)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
