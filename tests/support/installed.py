"""A fresh environment with a wheel and one extra, as a stranger has it, but for the download: packages are linked."""

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from importlib.metadata import Distribution, PathDistribution, distribution
from pathlib import Path
from zipfile import Path as ZipPath

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def build_wheel(folder: Path) -> Path:
    """The wheel of this checkout, which gets nothing written into it."""
    copy = folder / "copy"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", *options, str(copy)], check=True, timeout=120)
    (wheel,) = folder.glob("*.whl")
    return wheel


def required(wheel: Path, extra: str) -> Iterator[Distribution]:
    """All that a wheel with an extra brings along, each as it is installed here."""
    (info,) = (path for path in ZipPath(wheel).iterdir() if path.name.endswith(".dist-info"))
    todo: list[tuple[Distribution, set[str]]] = [(PathDistribution(info), {extra})]
    seen = set()
    while todo:
        package, extras = todo.pop()
        for wanted in map(Requirement, package.requires or ()):
            asked = any(not wanted.marker or wanted.marker.evaluate({"extra": name}) for name in {"", *extras})
            key = wanted.name, frozenset(wanted.extras)
            if asked and key not in seen:
                seen.add(key)
                todo.append((found := distribution(wanted.name), set(wanted.extras)))
                yield found


class Environment:
    """A virtual environment in a folder, of which nothing leads to the checkout."""

    def __init__(self, folder: Path, wheel: Path, extra: str):
        """Raises CalledProcessError if what was linked is not all that pip wants."""
        self.folder = folder / "work"
        self.folder.mkdir()
        self.home = folder / "environment"
        venv.create(self.home, symlinks=True)
        (site,) = self.home.glob("lib/*/site-packages")
        for package in required(wheel, extra):
            for name in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
                if not (site / name).exists():
                    (site / name).symlink_to(package.locate_file(name))
        outside = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
        self.environ = outside | {
            "PATH": f"{self.home / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.folder),
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "200",
            "NO_COLOR": "1",
            "OMP_NUM_THREADS": "1",
        }
        wanted = f"kara_hf[{extra}] @ {wheel.as_uri()}" if extra else str(wheel)
        pip = [sys.executable, "-m", "pip", "--python", str(self.home / "bin" / "python")]
        for command in (["install", "--quiet", "--no-index", wanted], ["check"]):
            subprocess.run([*pip, *command], check=True, timeout=120, env=self.environ)

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(self.home / "bin" / words[0]), *words[1:]],
            cwd=self.folder,
            env=self.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str, code: int = 0) -> str:
        """What a command prints, or, if it is to fail, says on stderr; it has to end with that code."""
        process = self.start(*words)
        try:
            out, err = process.communicate(timeout=600)
        finally:
            process.kill()
        assert process.returncode == code, (words, process.returncode, out, err)
        return err if code else out
