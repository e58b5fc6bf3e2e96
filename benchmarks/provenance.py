"""The files that rows of numbers go to. `kara_hf.evaluation.measure.provenance` says where a number comes from."""

import json
from pathlib import Path
from typing import Any

from kara_hf.evaluation.measure.provenance import digest, processor, provenance  # noqa: F401  for scripts that find them here


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
