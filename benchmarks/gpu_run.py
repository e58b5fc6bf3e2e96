"""What a run on one device is made of: cases that become rows, clocks, memory and the time that is left.

A case ends as one row, whatever happens: measured, passed, failed, skipped with the reason, or not reached. No speed is
measured of an op whose check did not pass.
"""

import contextlib
import gc
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from gpu_report import GIB, Row
from rich.console import Console
from rich.progress import track

from kara_hf.evaluation.measure.provenance import provenance

DTYPE = torch.bfloat16
FLUSH_BYTES = 2**30  # more than any L2 cache, and long enough to write that the host is ahead of the device meanwhile


class Skip(Exception):
    """Why a case has no number."""


class TimeIsUp(BaseException):
    """A case took longer than it may. No `Exception`, so that no library takes it for one of its own errors."""


@dataclass
class Case:
    """What is measured or checked.

    Attributes:
        labels: what tells its row from others: at least "what", and "op" for a check.
        measure: gives the numbers of the row; of a check also whether it "passed".
        needs: ops whose checks must have passed.
        seconds: it is stopped after so many.
    """

    labels: Row
    measure: Callable[[], Row]
    needs: tuple[str, ...] = ()
    seconds: float = 60.0


@dataclass
class Run:
    """One run: its device, its rows so far, and what its cases share."""

    device: torch.device
    smoke: bool
    minutes: float
    backend: str
    console: Console
    rows: list[Row] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    shared: dict[str, Any] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def red(self) -> set[str]:
        """Ops with a check that failed or was not reached."""
        return {row["op"] for row in self.rows if row["section"] == "checks" and row["status"] not in GREEN}

    def take(self, section: str, cases: list[Case], until: float) -> None:
        """Turns the cases of a section into rows, until the share `until` of the whole time is over."""
        deadline = self.started + 60 * self.minutes * until
        origin = {
            "device": self.device.type,
            "dtype": str(DTYPE).removeprefix("torch."),
            "backend": self.backend,
            "provenance": provenance(str(self.device)),
        }
        for case in track(cases, description=section, console=self.console, transient=True):
            if not self.red & set(case.needs):
                self.rows.append({"section": section} | origin | case.labels | self._measured(case, deadline))

    def _measured(self, case: Case, deadline: float) -> Row:
        left = deadline - time.monotonic()
        if left <= 0:
            return {"status": "not reached", "reason": "the time was over before"}
        seconds = min(left, case.seconds)
        try:
            with time_limit(seconds):
                found = case.measure()
            passed = found.pop("passed", None)
            return {"status": "measured" if passed is None else "passed" if passed else "failed"} | found
        except TimeIsUp:
            return {"status": "not reached", "reason": f"stopped after {seconds:.0f} s"}
        except Skip as reason:
            return {"status": "skipped", "reason": str(reason)}
        except torch.OutOfMemoryError:
            return {"status": "skipped", "reason": f"does not fit in the GPU's {self.memory_gib:.0f} GiB"}
        except Exception as error:
            self.console.print_exception()
            return {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:300]}
        finally:
            self.tidy()

    # -------------------------------------------------------------------------------------------------------- memory
    @property
    def memory_gib(self) -> float:
        return torch.cuda.get_device_properties(self.device).total_memory / GIB

    def tidy(self) -> None:
        """Gives back what nobody holds any more."""
        gc.collect()
        if self.cuda:
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


GREEN = ("passed", "skipped")


def spread(times: list[float], name: str = "ms") -> Row:
    """Median and 10th and 90th percentile of `times`, as `name`, `name_p10` and `name_p90`."""
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return {name: statistics.median(times), f"{name}_p10": tenths[0], f"{name}_p90": tenths[-1]}


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises `TimeIsUp` in the body after so many seconds."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeIsUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
