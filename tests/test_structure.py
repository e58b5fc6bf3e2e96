"""The picture of who imports whom, and what importing the package brings along."""

import ast
import graphlib
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import kara_hf

SOURCE = Path(kara_hf.__file__).parent
LONGEST = 430  # lines of a module
OPTIONAL = ("triton", "peft", "gradio", "datasets", "accelerate", "plotly", "matplotlib")

# The rooms from the ground up: each may import those below it, and of those above it none, not for types either.
FLOORS = (
    {"config", "hub", "bundled", "needs", "kernels"},
    {"policy", "storage", "integration"},
    {"cache"},
    {"tasks", "methods", "serving"},
    {"probing", "evaluation"},
    {"pod", "demo"},
    {"cli"},
    {"__main__"},
)


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in SOURCE.rglob("*.py")}


def imported(name: str) -> set[str]:
    """Modules of the package that a module imports anywhere: on top, in a function, or for the type checker alone."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module or "").split(".") * bool(node.module)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kara_hf":
            base = node.module.split(".")[1:]
        elif isinstance(node, ast.Import) and any(alias.name.startswith("kara_hf") for alias in node.names):
            raise AssertionError(f"{path}: imports inside the package are relative")
        else:
            continue
        for alias in node.names:
            inside = ".".join([*base, alias.name])
            found.add(inside if inside in MODULES else ".".join(base))
    return found - {name, ""}


@cache
def graph() -> dict[str, set[str]]:
    return {name: imported(name) for name in MODULES if name}


def test_no_module_imports_what_imports_it():
    try:
        graphlib.TopologicalSorter(graph()).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(f"a circle: {' -> '.join(error.args[1])}") from None


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {""}))
def test_arrows_only_point_down(name):
    floor = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
    home = name.split(".")[0]
    up = {other for other in graph()[name] if other.split(".")[0] != home and floor[other.split(".")[0]] > floor[home]}
    assert not up, f"{home} is below {sorted(up)}"


def test_rooms_form_no_circle():
    rooms = {name.split(".")[0]: set() for name in graph()}
    for name, targets in graph().items():
        rooms[name.split(".")[0]] |= {target.split(".")[0] for target in targets} - {name.split(".")[0]}
    graphlib.TopologicalSorter(rooms).prepare()
    assert set(rooms) == set.union(*FLOORS)


def test_the_circle_is_seen(tmp_path):
    """What the type checker alone sees counts too."""
    file = tmp_path / "x.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from kara_hf.cache.layer import CompressedLayer\n"
    )
    MODULES["x"] = file
    try:
        assert imported("x") == {"cache.layer"}
    finally:
        del MODULES["x"]


def test_the_root_is_tidy_and_modules_are_short():
    loose = [path.name for path in SOURCE.glob("*.py")]
    assert len(loose) <= 7, loose
    long = {name: lines for name, path in MODULES.items() if (lines := len(path.read_text().splitlines())) > LONGEST}
    assert not long


def test_importing_changes_nothing_and_brings_nothing():
    """And needs no package of an extra: of those none can be had here."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL!r})); import kara_hf, kara_hf.cli.app; "
        "assert not {'torch', 'transformers'} & set(sys.modules); "
        "from transformers import AttentionInterface as A; "
        "from transformers.masking_utils import AttentionMaskInterface as M; before = dict(vars(A)), dict(vars(M)); "
        "import kara_hf.cache.caches, kara_hf.integration.loading; "
        "assert before == (dict(vars(A)), dict(vars(M))); assert kara_hf.KaraCache"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=SOURCE.parent)


def test_every_public_name_is_there():
    for name in kara_hf.__all__:
        assert getattr(kara_hf, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'Kara'"):
        kara_hf.Kara  # noqa: B018
