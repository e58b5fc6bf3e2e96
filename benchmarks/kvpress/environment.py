"""An environment of its own for kvpress, which stops at Transformers 5.3 where this package begins later.

It is made at the first run, which takes some minutes and 1.5 GB. `run_worker` has jobs done in it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..common.console import console
from ..common.rows import ROOT, Row, origin

ENVIRONMENT = ROOT / "runs" / "kvpress-env"
TORCH = "torch==2.13.0"
REQUIRED = ("transformers<5.3", "kvpress==0.5.5", "rich")
VERSIONS = """import json, platform
from importlib.metadata import version
names = ("torch", "transformers", "kvpress")
print(json.dumps({"python": platform.python_version(), "versions": {name: version(name) for name in names}}))"""
WORKER = ("-m", "benchmarks.kvpress.worker")


def environment(folder: Path = ENVIRONMENT, torch_requirement: str = TORCH) -> Path:
    """The Python of an environment with kvpress in `folder`, which is made if it is not there already.

    Raises:
        ValueError: the folder holds something else.
        subprocess.CalledProcessError: an installation failed; the next call starts it again.
    """
    stamp, wanted, python = folder / "installed.json", [torch_requirement, *REQUIRED], folder / "bin" / "python"
    if stamp.exists() and json.loads(stamp.read_text()) == wanted:
        return python
    if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").exists():
        raise ValueError(f"env={str(folder)!r} is not empty and no environment; name another folder with --set env=DIR")
    console.print(f"making an environment in {folder}, which takes some minutes")
    stamp.unlink(missing_ok=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    # torch comes first and is named again, so that nothing that needs it brings another build.
    for packages in ([torch_requirement], wanted):
        subprocess.run([str(python), "-m", "pip", "install", "-qq", *packages], check=True)
    subprocess.run([str(python), "-W", "ignore", "-c", "import kvpress"], check=True)
    stamp.write_text(json.dumps(wanted))
    return python


def source_of(python: Path, device: str = "cpu", threads: int = 1) -> Row:
    """Where numbers of this environment come from."""
    told = subprocess.run([str(python), "-c", VERSIONS], check=True, capture_output=True, text=True).stdout
    return origin(device) | json.loads(told) | {"threads": threads}


def run_worker(python: Path, folder: Path, job: Row, worker: Sequence[str] = WORKER) -> Iterator[Row]:
    """Has the job done in the other environment: what it finds, as it comes.

    Raises:
        subprocess.CalledProcessError: the worker failed; what it found until then has come.
    """
    (folder / "job.json").write_text(json.dumps(job))
    command = [str(python), "-W", "ignore", *worker, str(folder)]
    surroundings = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=surroundings) as process:
        assert process.stdout is not None
        yield from map(json.loads, process.stdout)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
