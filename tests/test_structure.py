"""The picture of who may import whom, and what importing the package brings along."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kara_hf

SOURCE = Path(kara_hf.__file__).parent

# Arrows only point down; a name stands for the module or the folder.
MAY_IMPORT = {
    "config": set(),
    "files": set(),
    "kernels": set(),
    "evaluation": {
        "attention",
        "binding",
        "cache",
        "command",
        "config",
        "evicting",
        "layer",
        "policy",
        "runner",
        "sealing",
        "sequence",
        "sharing",
        "storage",
    },
    "report": set(),
    "serving": {"attention", "binding", "command", "config", "policy"},
    "attention": set(),
    "sharing": {"config", "files"},
    "pod": {"attention", "binding", "cache", "command", "config", "evaluation", "kernels", "runner", "sharing"},
    "storage": {"kernels"},
    "policy": {"kernels", "config", "files"},
    "sequence": {"policy"},
    "compression": {"sequence", "storage"},
    "layer": {"attention", "kernels", "sequence", "sharing", "storage"},
    "sealing": {"layer", "policy", "sequence", "storage"},
    "evicting": {"layer", "policy", "sequence", "storage"},
    "graph": {"storage"},
    "binding": {"attention", "config", "policy", "sharing"},
    "calibration": {"attention", "binding", "command", "config", "pod", "policy", "sharing"},
    "cache": {
        "attention",
        "binding",
        "compression",
        "config",
        "evicting",
        "graph",
        "layer",
        "policy",
        "report",
        "sealing",
        "sequence",
        "sharing",
        "storage",
    },
    "demo": {
        "attention",
        "cache",
        "command",
        "config",
        "evaluation",
        "methods",
        "policy",
        "runner",
        "sequence",
        "sharing",
    },
    "display": set(),
    "methods": {"attention", "cache", "config", "sharing"},
    "runner": {"display", "evaluation", "methods"},
    "command": {"storage"},
    "cli": {"calibration", "command", "config", "demo", "display", "evaluation", "methods", "pod", "runner", "serving"},
    "__main__": {"cli"},
}


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports at run time; what only the type checker sees is left out."""
    tree = ast.parse(path.read_text())
    hidden = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    package = path.relative_to(SOURCE).parts[:-1]
    names = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node in hidden:
            continue
        if node.level:
            base = list(package)[: len(package) - node.level + 1]
            module = base + (node.module or "").split(".")
        elif (node.module or "").startswith("kara_hf"):
            module = node.module.split(".")[1:]
        else:
            continue
        names.add(next((part for part in module if part), ""))
    return names - {"", package[0] if package else ""}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path):
    home = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if home == "__init__":
        return
    assert imported(path) <= MAY_IMPORT[home], f"{home} may import {sorted(MAY_IMPORT[home])} only"


def test_importing_changes_nothing_and_brings_nothing():
    code = (
        "import sys, kara_hf; heavy = "
        "{'torch', 'transformers', 'triton', 'peft', 'gradio', 'datasets', 'accelerate'} & set(sys.modules); assert "
        "not heavy, heavy; from transformers import AttentionInterface as A; from transformers.masking_utils import "
        "AttentionMaskInterface as M; before = dict(A._global_mapping), dict(M._global_mapping); import "
        "kara_hf.cache.compressed; assert before == (dict(A._global_mapping), dict(M._global_mapping)); assert "
        "kara_hf.KaraCache and not {'gradio', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=SOURCE.parent)


def test_every_public_name_is_there():
    for name in kara_hf.__all__:
        assert getattr(kara_hf, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'Kara'"):
        kara_hf.Kara  # noqa: B018
