"""Rows of numbers: where they come from, and the file that keeps those of one machine."""

import hashlib
import json
import re
import shlex
import sys
from functools import cache
from pathlib import Path
from typing import Any

import kara_hf
from kara_hf.evaluation.measure.provenance import processor, provenance

Row = dict[str, Any]
ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SAME = ("device", "threads", "versions", "code")  # of two origins of one number
GREEN = ("passed", "skipped", "measured")


@cache
def code_digest() -> str:
    """What tells this state of the package's code from others."""
    total = hashlib.sha256()
    for path in sorted(Path(kara_hf.__file__).parent.rglob("*.py")):
        total.update(path.read_bytes())
    return total.hexdigest()[:12]


def origin(device: str) -> Row:
    """Where a number that is measured now comes from: command, hardware, versions, code and date."""
    command = f"python -m benchmarks {shlex.join(sys.argv[1:])}".strip()
    return provenance(device) | {"command": command, "code": code_digest()}


def file_of(device: str) -> Path:
    """The file of this machine's rows: named after its processor."""
    return RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', processor(device).lower()).strip('-')}.json"


def load_rows(path: Path) -> list[Row]:
    """The rows of a file; none if it is not there."""
    return json.loads(path.read_text("utf-8")) if path.exists() else []


class RowFile:
    """Rows of all cases, one JSON file. Every change is on the disk at once, and a run that was stopped goes on.

    Args:
        path: the file; None keeps rows in memory alone.

    Attributes:
        rows: all of them.
    """

    def __init__(self, path: Path | None):
        self.path, self.rows = path, [] if path is None else load_rows(path)

    def done(self, case: str, labels: Row, settings: Row, source: Row) -> list[Row]:
        """Rows with these labels and settings that the same code measured on the same machine with the same versions;
        none if one of them failed or was not reached.
        """
        wanted = {"settings": settings} | {name: source.get(name) for name in SAME}
        found = [
            row
            for row in self.of(case, labels)
            if wanted == {"settings": row.get("settings")} | {name: row["provenance"].get(name) for name in SAME}
        ]
        return found if all(row["status"] in GREEN for row in found) else []

    def of(self, case: str, labels: Row) -> list[Row]:
        """Rows of a case with these labels."""
        return [row for row in self.rows if (labels | {"case": case}).items() <= row.items()]

    def put(self, case: str, labels: Row, rows: list[Row]) -> None:
        """Writes `rows` in place of those of the case that have these labels; what other runs wrote since stays."""
        if self.path is not None:
            self.rows = load_rows(self.path)
        old = self.of(case, labels)
        self.rows = [row for row in self.rows if not any(row is each for each in old)] + as_read(rows)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            beside = self.path.with_name(f"{self.path.name}.new")
            beside.write_text(json.dumps(self.rows, indent=1) + "\n", "utf-8")
            beside.replace(self.path)


def as_read(value: Any) -> Any:
    """`value` as it is read back from a file: lists for tuples."""
    return json.loads(json.dumps(value))
