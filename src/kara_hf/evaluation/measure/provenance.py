"""Where a number comes from. Needs torch alone, so that another environment can use it too."""

import hashlib
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
    program = Path(sys.argv[0])
    if program.name == "__main__.py":  # wherever the package lies
        began = f"python -m {program.parent.name}"
    else:
        began = f"python {program}" if program.suffix == ".py" else program.name
    return {
        "command": " ".join([began, *sys.argv[1:]]).replace(str(Path.cwd()) + "/", ""),
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
    """SHA-256 of the weights in a folder, which ties a result to what it was measured on.

    Raises:
        OSError: there are none, as safetensors or in torch's own format.
    """
    found = (sorted(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin", "*.pt", "*.pth"))
    files = next(filter(None, found), [])
    if not files:
        raise FileNotFoundError(f"there are no *.safetensors in {folder}")
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while part := opened.read(1 << 24):
                total.update(part)
    return total.hexdigest()
