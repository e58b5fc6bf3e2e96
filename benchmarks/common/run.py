"""A run on one device: jobs that become rows, clocks, memory and the time that is left.

A job ends as rows, whatever happens: measured, passed, failed, skipped with the reason, or not reached. No number is
taken of an op whose check did not pass.
"""

import contextlib
import gc
import math
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from rich.progress import track

from .case import Case, Job
from .console import console
from .rows import GREEN, Row, RowFile, as_read, origin
from .table import GIB

FLUSH_BYTES = 2**30  # more than any L2 cache, and long enough to write that the host is ahead of the device meanwhile


class Skip(Exception):
    """Why a job has no number."""


class TimeIsUp(BaseException):
    """A job took longer than it may. No `Exception`, so that no library takes it for one of its own errors."""


@dataclass
class Run:
    """One run.

    Attributes:
        device: where everything is measured.
        file: where rows go.
        smoke: whether sizes are tiny and numbers mean nothing.
        again: whether what the file holds is measured again.
        minutes: for all of it.
        dtype: of the models.
        backend: of the kernels: "triton", "reference", or "auto".
        rows: of this run, those that the file held already included.
        shared: what jobs leave for those that follow.
    """

    device: torch.device
    file: RowFile
    smoke: bool = False
    again: bool = False
    minutes: float = math.inf
    dtype: torch.dtype = torch.float32
    backend: str = "auto"
    rows: list[Row] = field(default_factory=list)
    shared: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def red(self) -> set[str]:
        """Ops with a check that failed or was not reached."""
        return {row["op"] for row in self.rows if "op" in row and row["status"] not in GREEN}

    def take(self, case: Case, sizes: Row) -> None:
        """Turns the jobs of a case into rows, until the share `case.until` of the whole time is over.

        What the file holds of the same code, machine and settings is not measured again, checks excepted.
        """
        deadline = self.started + 60 * self.minutes * case.until
        sizes, kind = as_read(sizes), {"dtype": self.dtype_name, "backend": self.backend}
        here = origin(str(self.device))
        jobs = list(case.jobs(self, **case.sizes | sizes))
        for job in track(jobs, description=case.name, console=console, transient=True):
            if self.red & set(job.needs):
                continue
            source = as_read(job.source or here)
            held = [] if self.again or case.first else self.file.done(case.name, job.labels, sizes, source)
            if not held:
                common = {"case": case.name} | kind | job.labels
                held = [
                    common | row | {"settings": sizes, "provenance": source} for row in self._measured(job, deadline)
                ]
                if case.keep:
                    self.file.put(case.name, job.labels, held)
            self.rows += held

    def _measured(self, job: Job, deadline: float) -> list[Row]:
        left = deadline - time.monotonic()
        if left <= 0:
            return [{"status": "not reached", "reason": "the time was over before"}]
        seconds = min(left, job.seconds)
        try:
            with time_limit(seconds):
                found = job.measure()
            return [with_status(row) for row in ([found] if isinstance(found, dict) else found)]
        except TimeIsUp:
            return [{"status": "not reached", "reason": f"stopped after {seconds:.0f} s"}]
        except Skip as reason:
            return [{"status": "skipped", "reason": str(reason)}]
        except torch.OutOfMemoryError:
            return [{"status": "skipped", "reason": f"does not fit in the GPU's {self.memory_gib:.0f} GiB"}]
        except Exception as error:
            console.print_exception()
            return [{"status": "failed", "reason": f"{type(error).__name__}: {error}"[:300]}]
        finally:
            self.tidy()

    # -------------------------------------------------------------------------------------------------------- memory
    @property
    def memory_gib(self) -> float:
        return torch.cuda.get_device_properties(self.device).total_memory / GIB

    def tidy(self) -> None:
        """Gives back the memory of a GPU that nobody holds any more."""
        if self.cuda:
            gc.collect()
            torch.cuda.empty_cache()

    def allocated(self) -> int:
        """Bytes of live tensors by the allocator's account; 0 on a CPU, which has no such account."""
        return torch.cuda.memory_allocated(self.device) if self.cuda else 0

    def peak(self) -> int:
        """The most `allocated` was since `forget_peak`."""
        return torch.cuda.max_memory_allocated(self.device) if self.cuda else 0

    def forget_peak(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    # -------------------------------------------------------------------------------------------------------- clocks
    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], Any]) -> float:
        """Wall clock of one piece of work, from an idle device to an idle device."""
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def kernel_ms(self, work: Callable[[], Any], repeats: int = 30) -> list[float]:
        """Milliseconds on the device of `repeats` runs of `work`, after some more, the L2 cache flushed before each."""
        if not self.cuda:
            return [1e3 * self.seconds(work) for _ in range(3)]
        flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.device)
        for _ in range(5):
            work()
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, stop in pairs:
            flush.zero_()
            start.record()
            work()
            stop.record()
        self.wait()
        return [start.elapsed_time(stop) for start, stop in pairs]


def with_status(row: Row) -> Row:
    """A row of numbers as measured; of a check as passed or failed."""
    passed = row.pop("passed", None)
    return {"status": "measured" if passed is None else "passed" if passed else "failed"} | row


def spread(times: Sequence[float], name: str = "ms") -> Row:
    """Median and 10th and 90th percentile of `times`, as `name`, `name_p10` and `name_p90`."""
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return {name: statistics.median(times), f"{name}_p10": tenths[0], f"{name}_p90": tenths[-1]}


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """In it ops run by this backend, as ``KARA_BACKEND`` names it."""
    before = os.environ.get("KARA_BACKEND")
    os.environ["KARA_BACKEND"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["KARA_BACKEND"]
        else:
            os.environ["KARA_BACKEND"] = before


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises `TimeIsUp` in the body after so many seconds. A timer that runs already goes on behind it."""
    if math.isinf(seconds):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeIsUp

    handler = signal.signal(signal.SIGALRM, stop)
    start, (left, _) = time.monotonic(), signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - start), 1e-3))
