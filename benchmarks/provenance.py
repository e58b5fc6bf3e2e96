"""Where a number comes from, and the file of rows it goes to."""

import hashlib
import json
import platform
import shutil
import subprocess
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
        "versions": {name: version(name) for name in ("torch", "transformers")} | gpu_versions(device),
        "date": datetime.now(UTC).date().isoformat(),
    }


def gpu_versions(device: str) -> dict[str, str | None]:
    """What else a number from a GPU depends on: CUDA, its driver and Triton. Nothing on a CPU."""
    if not device.startswith("cuda"):
        return {}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.split() if shutil.which(query[0]) else []
    return {"cuda": torch.version.cuda, "driver": driver[0] if driver else "unknown", "triton": version("triton")}


def digest(folder: Path) -> str:
    """SHA-256 of the weights, which ties a row to what it was measured on."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % Wilson interval of a share, which stays sensible near 0 and 1."""
    share, spread = right / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * (share * (1 - share) / n + spread / (4 * n)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def load_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a result file; none if it is not there."""
    return json.loads(path.read_text()) if path.exists() else []


def update_rows(path: Path, rows: list[dict[str, Any]], key: tuple[str, ...]) -> None:
    """Writes `rows` to a JSON file; a row with the same values under `key` as an old one replaces it."""
    new = {tuple(row.get(name) for name in key): row for row in [*load_rows(path), *rows]}
    write_rows(path, list(new.values()))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Makes a JSON file of these rows and no others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")
