"""Where a number comes from, and the file of rows it goes to."""

import json
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def processor(device: str) -> str:
    """Name of the CPU or GPU that did the work."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def provenance(device: str) -> dict[str, Any]:
    """Command, hardware, versions and date of this run."""
    return {
        "command": " ".join(["python", *sys.argv]).replace(str(Path.cwd()) + "/", ""),
        "device": processor(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "date": datetime.now(UTC).date().isoformat(),
    }


def update_rows(path: Path, rows: list[dict[str, Any]], key: tuple[str, ...]) -> None:
    """Writes `rows` to a JSON file; a row with the same values under `key` as an old one replaces it."""
    old = json.loads(path.read_text()) if path.exists() else []
    new = {tuple(row.get(name) for name in key): row for row in [*old, *rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(new.values()), indent=1) + "\n")
