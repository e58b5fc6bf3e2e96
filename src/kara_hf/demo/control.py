"""How runs are driven from outside, and how those on one model take turns."""

import threading
import time
from collections import deque
from typing import Self


class FifoLock:
    """A lock that is given in the order in which it was asked for, so that runs on one model alternate."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._taken = False
        self._waiting: deque[threading.Event] = deque()

    def acquire(self) -> None:
        """Waits until all who asked before have released it."""
        with self._guard:
            if not self._taken:
                self._taken = True
                return
            mine = threading.Event()
            self._waiting.append(mine)
        mine.wait()

    def release(self) -> None:
        """Gives it to whoever has waited longest."""
        with self._guard:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._taken = False

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class RunControl:
    """What is done to the runs of a session from outside: stopping, pausing, single steps, and how fast they may go.

    Args:
        paused: whether they wait for steps.
        pace: tokens per second at most, 0 for no limit.
    """

    def __init__(self, *, paused: bool = False, pace: float = 0.0):
        self.pace = pace
        self.stopped = False
        self._allowed: int | None = 0 if paused else None  # tokens that each run may have; None for any number
        self._changed = threading.Condition()

    @property
    def paused(self) -> bool:
        return self._allowed is not None

    def stop(self) -> None:
        self.stopped = True
        self.allow(None)

    def allow(self, generated: int | None) -> None:
        """Lets every run go on until it has so many tokens, and wait there; None: without end."""
        with self._changed:
            self._allowed = generated
            self._changed.notify_all()

    def wait(self, generated: int, since: float) -> None:
        """Returns once a run that has `generated` tokens, the last one begun at `since`, may make the next."""
        with self._changed:
            while not self.stopped:
                early = since + 1 / self.pace - time.perf_counter() if self.pace and generated else 0.0
                if self._allowed is not None and generated >= self._allowed:
                    self._changed.wait()
                elif early > 0:
                    self._changed.wait(early)
                else:
                    return
