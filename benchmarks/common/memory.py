"""Resident memory of a process, as Linux counts it. Needs nothing, so that another environment can use it too."""

import os
import threading
from pathlib import Path

STATM = Path("/proc/self/statm")  # of Linux: pages of a process, resident ones second


class MostResident:
    """By how much the resident memory of this process grew at most within a block, in bytes."""

    def __enter__(self) -> "MostResident":
        self.grown, self._before, self._over = 0, resident(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self.grown = max(self.grown, resident() - self._before)

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
