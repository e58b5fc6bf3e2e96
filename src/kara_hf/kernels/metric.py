"""The metric of stored tokens: what attention gave them, added up."""

import torch

from .append import slot_index
from .rows import Rows


def add_to_metric(rows: Rows, received: torch.Tensor) -> None:
    """Adds to every token's metric what it `received`, ``[B, H, max_length]``, which is 0 where there is no token."""
    assert rows.metric is not None
    if rows.contiguous:
        metric = rows.in_place[3]
        assert metric is not None
        metric.narrow(2, 0, rows.max_length).add_(received)
        return
    slots = torch.arange(rows.max_length, device=received.device, dtype=torch.int32)
    stored = slots < rows.lengths[..., None]
    where = slot_index(rows.value_table, slots.expand(received.shape), rows.block_size)[stored]
    rows.metric.flatten()[where] += received[stored]
