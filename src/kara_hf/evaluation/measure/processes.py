"""Several processes that measure together, as `accelerate launch` and torchrun start them."""

import os
from typing import Any

from ...integration.loading import find_device
from ...needs import Need, Package, extra

PARALLEL = Package("accelerate", extra("evaluate"))


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def needed() -> list[Need]:
    """What they need."""
    return [PARALLEL] if world_size() > 1 else []


class Rank:
    """Which part of the work is this process's; all of it, where there is only one.

    Args:
        device: name of the device that was asked for, or None.

    Attributes:
        number: of this process, from 0 on.
        processes: how many there are.
        device: that this process is to use, or None.
    """

    def __init__(self, device: str | None):
        self.number, self.processes, self.device = 0, 1, device
        self._state: Any = None
        if world_size() > 1:
            from accelerate import PartialState

            self._state = PartialState(cpu=find_device(device).type == "cpu")
            self.number, self.processes = self._state.process_index, self._state.num_processes
            self.device = str(self._state.device)

    def barrier(self) -> None:
        """Waits for the other processes."""
        if self._state is not None:
            self._state.wait_for_everyone()
