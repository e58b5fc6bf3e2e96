"""Queries that all requests of an engine hold, of open tokens and of prompts' ends, in blocks of its pool."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..integration.attach import decoder_config
from ..storage import Sampling
from .pool import Pool


class QueryPool:
    """Slots for queries of any request, the same in all layers, in blocks of the engine's own pool.

    A layer's page of a block has room for ``2 * page`` rows ``[H, D]``, of which a query takes G.

    Args:
        pool: whose blocks they are.
        group: G, query heads of a KV head.

    Attributes:
        each: slots in a block.
    """

    def __init__(self, pool: Pool, group: int):
        self.pool, self.group, self.each = pool, group, 2 * pool.page // group
        self._used: dict[int, int] = {}  # slots in use by block
        self._free: list[int] = []

    @property
    def used(self) -> int:
        """Slots in use."""
        return sum(self._used.values())

    @property
    def blocks(self) -> int:
        """Blocks of the pool that are taken."""
        return len(self._used)

    @property
    def nbytes(self) -> int:
        """Bytes of these."""
        return self.blocks * self.pool.block_bytes

    def check(self) -> None:
        """Raises ValueError if a block has no room for a query."""
        if not self.each:
            raise ValueError(
                f"page_size={self.pool.page} is too small: a block has no room for a query of a model with "
                f"{self.group} query heads for each KV head; make it {-(-self.group // 2)} or more"
            )

    def blocks_of(self, slots: int) -> int:
        """Blocks for so many slots."""
        return -(-slots // self.each) if slots else 0

    def take(self, count: int) -> list[int] | None:
        """`count` free slots; None: there is no room, and nothing was taken."""
        blocks = self.pool.take(self.blocks_of(max(0, count - len(self._free))))
        if blocks is None:
            return None
        for block in blocks:
            self._used[block] = 0
            self._free += range(block * self.each, (block + 1) * self.each)
        taken, self._free = self._free[:count], self._free[count:]
        for slot in taken:
            self._used[slot // self.each] += 1
        return taken

    def copy(self, slots: list[int]) -> list[int] | None:
        """As many free slots with what `slots` hold; None: there is no room."""
        copies = self.take(len(slots))
        if copies:
            sources, targets = self._rows(slots), self._rows(copies)
            for layer in self.pool.layers:
                rows = self.pool.raw(layer)
                rows[targets] = rows[sources]
        return copies

    def give(self, slots: list[int]) -> None:
        """Frees `slots`, and the blocks in which none is in use any more."""
        self._free += slots
        for slot in slots:
            self._used[slot // self.each] -= 1
        empty = sorted({block for slot in slots if not self._used[block := slot // self.each]})
        if empty:
            for block in empty:
                del self._used[block]
            self._free = [slot for slot in self._free if slot // self.each in self._used]
            self.pool.give(empty)

    def put(self, layer: int, brought: "Places", queries: torch.Tensor) -> None:
        """Writes those of `queries` ``[Hq, T, D]`` of a layer in a step that are held to where they are held."""
        rows = self.pool.raw(layer)
        heads = rows.shape[1]
        places = brought.slots // self.each * self.pool.stride + brought.slots % self.each * self.group
        held = queries[brought.heads, brought.columns].to(rows.dtype)
        rows.flatten(0, 1).index_copy_(0, places * heads + brought.heads, held)

    def read(self, layer: int, slots: Sequence[Sequence[int]]) -> torch.Tensor:
        """The queries in `slots` ``[b, n]``, ``[b, Hq, n, D]``."""
        return self.pool.raw(layer)[self._rows(slots)].flatten(2, 3).transpose(1, 2)

    def _rows(self, slots: Sequence[int] | Sequence[Sequence[int]]) -> torch.Tensor:
        """Where slots are in the pool, with a last dim more of G."""
        found = torch.tensor(slots, device=self.pool.cache.device)
        starts = found // self.each * self.pool.stride + found % self.each * self.group
        return starts[..., None] + torch.arange(self.group, device=starts.device)


@dataclass(frozen=True)
class Brought:
    """Tokens that a step brings of one request, of which queries are held: open ones, or the last of its prompt.

    Attributes:
        column: of the first of them in the step.
        before: such tokens in front of it.
        new: how many they are.
        slots: of all such tokens of the request.
        sampling: of which of them queries are held.
    """

    column: int
    before: int
    new: int
    slots: list[int]
    sampling: Sampling


@dataclass(frozen=True)
class Places:
    """Which queries of a step are held and where: slots, query heads and columns of the step, ``[N]`` int64 each."""

    slots: torch.Tensor
    heads: torch.Tensor
    columns: torch.Tensor

    @classmethod
    def of(cls, brought: Sequence[Brought], heads: int, group: int, device: torch.device) -> "Places":
        """Of a layer with so many query heads, `group` for each KV head."""
        slots, columns = [], []
        for part in brought:
            sampling = replace(part.sampling, group=group)
            first, last = sampling.place(part.before), sampling.places(part.before + part.new)
            tokens = sampling.tokens_of(first, last).clip(max=part.before + part.new - 1) - part.before
            columns.append(np.where(tokens < 0, -1, part.column + tokens))
            slots.append(part.slots[first:last])
        chosen = np.tile(np.concatenate(columns, 1), (heads // group, 1))
        head, place = np.nonzero(chosen >= 0)
        found = np.concatenate(slots).astype(np.int64)[place], head, chosen[head, place]
        return cls(*(torch.from_numpy(part).to(device) for part in found))


def query_group(model: Any) -> int:
    """Query heads of a model for each of its KV heads."""
    config: Any = decoder_config(model)
    heads: int = config.num_attention_heads
    return heads // (getattr(config, "num_key_value_heads", None) or heads)
