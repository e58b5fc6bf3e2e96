"""Resident memory of a process, as Linux counts it. Needs nothing, so that another environment can use it too."""

import os
import threading
from pathlib import Path

STATM = Path("/proc/self/statm")  # of Linux: pages of a process, resident ones second


class MostResident:
    """The most resident memory of this process within a block, in bytes, and by how much it `grew` at most."""

    def __enter__(self) -> "MostResident":
        self.before = self.most = resident()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self.most = max(self.most, resident())

    @property
    def grown(self) -> int:
        return self.most - self.before

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        self.most = max(self.most, resident())  # however seldom the thread had its turn


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
