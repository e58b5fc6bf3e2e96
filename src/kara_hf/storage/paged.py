"""The paged store of one layer: ragged rows of keys, values and positions in blocks."""

from typing import Protocol

import numpy as np
import torch

from ..kernels import Rows, append, compact, gather_rows, slot_index
from .blocks import Blocks
from .meter import MemoryMeter

HEADROOM = 1 / 32  # blocks reserved ahead, as a share of a row's blocks: bounds both unused memory and copying


class Store(Protocol):
    """What a cache asks of one layer's storage. Rows are (sequence, head); slots count a row's tokens from 0."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens stored in each row, ``[B, H]`` int32, on the host."""

    def reserve(self, tokens: int) -> None:
        """Makes room for `tokens` more in every row. Raises `PoolExhausted` and changes nothing that is stored."""

    def append(
        self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, real: torch.Tensor | None = None
    ) -> None:
        """Stores new tokens: `keys` ``[B, H, S, Dk]``, `values` ``[B, H, S, Dv]``, `positions` and `real` ``[B,
        S]``.
        """

    def unshare(self, sequences: np.ndarray, start: np.ndarray, count: int) -> None:
        """Copies the blocks that `count` slots from `start` ``[b]`` on share with other sequences.

        `keep` does that first; afterwards it needs no more memory. Raises `PoolExhausted`; changes nothing that is
        stored.
        """

    def keep(self, sequences: np.ndarray, start: np.ndarray, slots: torch.Tensor) -> None:
        """Keeps of the named sequences ``[b]`` the slots below `start` ``[b]`` and `slots` ``[b, H, n]``, no others."""

    def crop(self, tokens: np.ndarray) -> None:
        """Drops the newest `tokens` ``[B]`` of every sequence."""

    def fork(self, index: np.ndarray) -> None:
        """Makes sequence i the same as sequence ``index[i]`` was, by reference."""

    def free(self, sequences: np.ndarray) -> None:
        """Empties the named sequences and gives their memory back."""

    def read(self, sequence: int, head: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys ``[T, Dk]``, values ``[T, Dv]`` and positions ``[T]`` of one row, in slot order."""


class PagedStore:
    """A `Store` in blocks of `block_size` slots; each block belongs to one head of one sequence, so freeing it is real.

    Args:
        rows: B sequences and H KV heads.
        sizes: Dk and Dv, of a key and of a value.
        dtype: of keys and values.
        device: of everything but the host's tables.
        block_size: P.
        meter: counts every byte.
    """

    def __init__(
        self,
        rows: tuple[int, ...],
        sizes: tuple[int, int],
        *,
        dtype: torch.dtype,
        device: torch.device,
        block_size: int,
        meter: MemoryMeter,
    ):
        self.block_size, self.meter, self.device = block_size, meter, device
        key, value, position = ((sizes[0],), dtype), ((sizes[1],), dtype), ((), torch.int32)
        self.keys = Blocks(rows, block_size, [key], device, meter)
        self.values = Blocks(rows, block_size, [value, position], device, meter)
        self._lengths = torch.zeros(rows, dtype=torch.int32)
        self._rows: Rows | None = None
        self._changed()

    @property
    def lengths(self) -> np.ndarray:
        """Tokens stored in each row, ``[B, H]`` int32; a view that can be written."""
        return self._lengths.numpy()

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value in one row."""
        return sum(pool.shape[-1] * pool.itemsize for pool in (self.keys.pools[0], self.values.pools[0]))

    def rows(self) -> Rows:
        """What the kernels read and write. Valid until the next call that changes the store."""
        assert self._rows is not None
        return self._rows

    def reserve(self, tokens: int) -> None:
        if tokens <= self._room:
            return
        needed = -(-(self.lengths + tokens) // self.block_size)
        needed = np.where(needed > self.keys.counts, needed + (needed * HEADROOM).astype(np.int32), needed)
        self.meter.require(self.keys.growth(needed) + self.values.growth(needed))  # both grow or neither does
        try:
            self.keys.grow(needed)
            self.values.grow(needed)
            for blocks in (self.keys, self.values):  # a shared last block is about to be written
                blocks.own(self.lengths // self.block_size, blocks.counts)
        finally:  # pools may have moved before something failed
            self._changed()

    def append(
        self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, real: torch.Tensor | None = None
    ) -> None:
        new = keys.shape[2]
        self.reserve(new)
        rows = self.rows()
        append(rows, keys, values, positions, real)
        if real is None:
            self._lengths += new
            if rows.lengths is not self._lengths:
                rows.lengths += new
            rows.max_length += new
            self._room -= new
        else:
            self._lengths += real.sum(1, keepdim=True, dtype=torch.int32).cpu()
            self._changed()

    def unshare(self, sequences: np.ndarray, start: np.ndarray, count: int) -> None:
        first = np.full_like(self.lengths, np.iinfo(np.int32).max)
        first[sequences] = (start // self.block_size)[:, None]
        last = np.zeros_like(self.lengths)
        last[sequences] = -(-(start + count) // self.block_size)[:, None]
        try:
            for blocks in (self.keys, self.values):
                blocks.own(first, last)
        finally:  # pools may have moved before something failed
            self._changed()

    def keep(self, sequences: np.ndarray, start: np.ndarray, slots: torch.Tensor) -> None:
        count = slots.shape[2]
        self.unshare(sequences, start, count)
        index = torch.from_numpy(sequences.astype(np.int64)).to(self.device)
        begin = torch.from_numpy(start.astype(np.int32)).to(self.device)
        compact(self.rows(), index, begin, slots.to(torch.int32))
        self.lengths[sequences] = (start + count)[:, None].astype(np.int32)
        self._fit()

    def crop(self, tokens: np.ndarray) -> None:
        self._lengths -= torch.from_numpy(tokens[:, None].astype(np.int32))
        self._fit()

    def fork(self, index: np.ndarray) -> None:
        self.meter.require(self.fork_bytes(index))
        used = self._used()
        for blocks in (self.keys, self.values):
            blocks.fork(index, used)
        self._lengths = torch.from_numpy(self.lengths[index])
        self._changed()

    def fork_bytes(self, index: np.ndarray) -> int:
        """Bytes that `fork` takes, for tables and lengths."""
        tables = sum(
            blocks.table_bytes(self._used()[index]) - blocks.table.nbytes for blocks in (self.keys, self.values)
        )
        return tables + self.lengths[index].nbytes - self.lengths.nbytes

    def free(self, sequences: np.ndarray) -> None:
        self.lengths[sequences] = 0
        self._fit()

    def read(self, sequence: int, head: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        length = int(self.lengths[sequence, head])
        row = (slice(sequence, sequence + 1), slice(head, head + 1))
        keys = gather_rows(self.keys.pools[0], self.keys.table[row], length)
        values, positions = (gather_rows(pool, self.values.table[row], length) for pool in self.values.pools)
        return keys[0, 0], values[0, 0], positions[0, 0].long()

    def window(self, sequences: np.ndarray, start: np.ndarray, tokens: int) -> torch.Tensor:
        """Keys of `tokens` slots from `start` ``[b]`` on, of the named sequences ``[b]``: ``[b, H, tokens, Dk]``."""
        slots = self.slots(start, tokens)
        table = self.keys.table[torch.from_numpy(sequences).to(self.device)]
        flat = slot_index(table, slots, self.block_size)
        return self.keys.pools[0].flatten(0, 1)[flat]

    def slots(self, start: np.ndarray, tokens: int) -> torch.Tensor:
        """Logical slots `start` ``[b]`` to `start` + `tokens` for every head: ``[b, H, tokens]`` int32."""
        first = torch.tensor(start, dtype=torch.int32, device=self.device)[:, None, None]
        steps = torch.arange(tokens, dtype=torch.int32, device=self.device)
        return (first + steps).expand(-1, self.lengths.shape[1], -1)

    def release(self) -> None:
        """Stops counting what is held here; the object is not used afterwards."""
        self.keys.release()
        self.values.release()
        self.meter.drop(self.rows().lengths)

    def _used(self) -> np.ndarray:
        return -(-self.lengths // self.block_size)

    def _fit(self) -> None:
        """Gives back blocks that hold no token, once they are worth a move."""
        used = self._used()
        for blocks in (self.keys, self.values):
            blocks.shrink(used)
        self._changed()

    def _changed(self) -> None:
        """Derives from the tables and lengths what the hot path wants ready."""
        lengths = self.lengths
        longest = int(lengths.max(initial=0))
        tail = lengths // self.block_size
        shared = any(blocks.shares(tail) for blocks in (self.keys, self.values))
        room = self.keys.counts * self.block_size - lengths
        self._room = 0 if shared or not room.size else int(room.min())
        if self._rows is not None:
            self.meter.drop(self._rows.lengths)
        self._rows = Rows(
            keys=self.keys.pools[0],
            values=self.values.pools[0],
            positions=self.values.pools[1],
            key_table=self.keys.table,
            value_table=self.values.table,
            lengths=self.meter.count(self._lengths.to(self.device)),
            max_length=longest,
            uniform=bool((lengths == longest).all()),
            contiguous=self.keys.contiguous and self.values.contiguous,
        )
