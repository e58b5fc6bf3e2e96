"""Blocks of slots, and which row owns which: allocation, sharing by reference count, copy on write, exact fit.

Tables and reference counts live on the host, so that no decision waits for the device; the device sees a copy of the
table that is renewed when the table changes.
"""

from collections.abc import Sequence

import numpy as np
import torch

from .meter import MemoryMeter
from .saved import Saved, check_saved, restored_tensor


@torch.inference_mode(False)
def upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy of `array` on the device, for which the host does not wait."""
    tensor = torch.tensor(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def spread_table(table: np.ndarray, heads: np.ndarray, shape: tuple[int, ...], columns: int) -> np.ndarray:
    """`table` ``[B, K, M]`` of the K `heads` alone as one of all heads, ``[*shape, columns or more]``; -1 elsewhere."""
    wide = np.full((*shape, max(table.shape[2], columns)), -1, np.int32)
    wide[:, heads, : table.shape[2]] = table
    return wide


class Blocks:
    """Pools of N blocks with P slots each, shared out to the rows of B sequences and H heads.

    Several pools may share one table (values and their positions do).

    Args:
        shape: B sequences and H heads.
        block_size: P.
        parts: shape of one slot and dtype, for every pool.
        device: where the pools live.
        meter: counts every byte held here.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        block_size: int,
        parts: Sequence[tuple[tuple[int, ...], torch.dtype]],
        device: torch.device,
        meter: MemoryMeter,
    ):
        self.block_size, self.device, self.meter = block_size, device, meter
        self.pools = [meter.zeros((0, block_size, *shape), dtype, device) for shape, dtype in parts]
        self.block_bytes = sum(pool[:0].new_empty(1, *pool.shape[1:]).nbytes for pool in self.pools)
        self.counts = np.zeros(shape, np.int32)
        self.refs = np.zeros(0, np.int32)
        self._free: np.ndarray = np.zeros(0, np.int32)
        self.first: np.ndarray | None = None  # [B, H], where the blocks of every row follow one another
        self._table_device: torch.Tensor | None = None
        self._set_table(np.zeros((*shape, 0), np.int32))

    # ------------------------------------------------------------------------------------------------ what others read
    @property
    def table(self) -> torch.Tensor:
        """Block ids on the device, ``[B, H, M]`` int32, -1 past a row's last block."""
        assert self._table_device is not None
        return self._table_device

    @property
    def host_table(self) -> np.ndarray:
        """The same on the host."""
        return self._host

    @property
    def held_blocks(self) -> int:
        """Blocks in the pool, used or free."""
        return len(self.refs)

    @property
    def num_free(self) -> int:
        return len(self._free)

    # ------------------------------------------------------------------------------------------------- what others do
    def grow(self, counts: np.ndarray, in_order: bool = False) -> None:
        """Gives every row at least `counts` ``[B, H]`` blocks. Raises `PoolExhausted` before anything changes.

        With `in_order`, rows that get some lie one behind the other afterwards, and no block is free.
        """
        self.meter.require(self.growth(counts))
        counts = np.maximum(counts, self.counts)
        new = int((counts - self.counts).sum())
        if new == 0:
            return
        if new > self.num_free or in_order:
            self._relayout(counts)
            return
        table = self._widened(int(counts.max()))
        columns = np.arange(table.shape[2])
        table[(columns >= self.counts[..., None]) & (columns < counts[..., None])] = self._take(new)
        self.counts = counts
        self._set_table(table)

    def shrink(self, counts: np.ndarray, slack: float) -> None:
        """Gives back the blocks past `counts` ``[B, H]`` once more than `slack` blocks of the pool are unused.

        Until then rows keep them for the tokens to come: where blocks lie does not change, and rows stay contiguous.
        """
        unused = self.num_free + int((self.counts - counts).sum())
        if unused > slack:
            self.free_blocks(counts)
            self._relayout(self.counts)

    def free_blocks(self, counts: np.ndarray) -> None:
        """Makes the blocks past `counts` ``[B, H]`` free for other rows."""
        self._assign(np.where(np.arange(self._host.shape[2]) < counts[..., None], self._host, -1))

    def fork(self, index: np.ndarray, counts: np.ndarray) -> None:
        """Makes sequence i a reference to what sequence ``index[i]`` has in its first `counts` ``[B, H]`` blocks."""
        used = np.where(np.arange(self._host.shape[2]) < counts[..., None], self._host, -1)
        self._assign(used[index])
        if self.num_free > max(self.counts.size, self.held_blocks // 8):
            self._relayout(self.counts)

    def own(self, first: np.ndarray, last: np.ndarray) -> None:
        """Makes blocks `first` up to `last` (exclusive) ``[B, H]`` of every row its own, copying those it shares."""
        columns = np.arange(self._host.shape[2])
        wanted = (columns >= first[..., None]) & (columns < np.minimum(last, self.counts)[..., None])
        wanted[wanted] = self.refs[self._host[wanted]] > 1
        ids = self._host[wanted]
        if not len(ids):
            return
        # Where all sharers want their own, the first one keeps the block.
        _, where, inverse, asked = np.unique(ids, return_index=True, return_inverse=True, return_counts=True)
        copy = np.ones(len(ids), bool)
        copy[where[asked == self.refs[ids[where]]]] = False
        new = int(copy.sum())
        if new > self.num_free:
            self._relayout(self.counts, spare=new)
            ids = self._host[wanted]
        fresh = self._take(new)
        source, target = self._ids(ids[copy]), self._ids(fresh)
        for pool in self.pools:
            pool[target] = pool[source]
        ids[copy] = fresh
        table = self._host.copy()
        table[wanted] = ids
        self._assign(table)

    def shares(self, first: np.ndarray) -> bool:
        """Whether any row shares a block at or past block `first` ``[B, H]`` with another row."""
        if not (self.refs > 1).any():
            return False
        columns = np.arange(self._host.shape[2])
        wanted = (columns >= first[..., None]) & (columns < self.counts[..., None])
        return bool((self.refs[self._host[wanted]] > 1).any())

    def growth(self, counts: np.ndarray) -> int:
        """Bytes that `grow` to `counts` takes."""
        counts = np.maximum(counts, self.counts)
        blocks = int((counts - self.counts).sum()) - self.num_free
        return max(0, blocks) * self.block_bytes + self.table_bytes(counts) - self.table.nbytes

    def table_bytes(self, counts: np.ndarray) -> int:
        """Bytes of the table on the device if rows had `counts` ``[B, H]`` blocks."""
        return counts.size * int(counts.max(initial=0)) * self.table.itemsize

    def close(self) -> None:
        """Stops counting what is held here; the object is not used afterwards."""
        for tensor in (*self.pools, self.table):
            self.meter.uncount(tensor)
        self.pools = []

    def saved(self) -> Saved:
        """What is held here; see `kara_hf.storage.saved`."""
        return {"pools": list(self.pools), "table": self._host}

    def restore(self, saved: Saved, lengths: np.ndarray) -> None:
        """Takes back what `saved` gave of rows with these `lengths` ``[B, H]``. Raises ValueError, `PoolExhausted`."""
        pools, blocks = saved["pools"], len(saved["pools"][0])
        for pool, own in zip(pools, self.pools, strict=True):
            check_saved("a pool", pool, (blocks, *own.shape[1:]), own.dtype)
        check_saved("a table", saved["table"], (*self.counts.shape, None), torch.int32)
        table = saved["table"].numpy().copy()
        held = table >= 0
        if (table < -1).any() or (table >= blocks).any() or (held[..., 1:] > held[..., :-1]).any():
            raise ValueError(f"a table names blocks that are not among {blocks}, or leaves some out")
        if (lengths < 0).any() or (lengths > held.sum(-1) * self.block_size).any():
            raise ValueError("rows are longer than their blocks")
        self.pools = [
            restored_tensor(pool, self.device, self.meter, old) for pool, old in zip(pools, self.pools, strict=True)
        ]
        self.refs = np.zeros(blocks, np.int32)
        self._assign(table)

    # ------------------------------------------------------------------------------------------------------- internal
    def _take(self, n: int) -> np.ndarray:
        taken, self._free = self._free[:n], self._free[n:]
        self.refs[taken] = 1
        return taken

    def _ids(self, ids: np.ndarray) -> torch.Tensor:
        return upload(ids.astype(np.int64), self.device)

    def _widened(self, columns: int) -> np.ndarray:
        table = np.full((*self.counts.shape, max(columns, self._host.shape[2])), -1, np.int32)
        table[..., : self._host.shape[2]] = self._host
        return table

    def _assign(self, table: np.ndarray) -> None:
        """Adopts a table whose ids exist, and derives counts, references and free blocks from it."""
        self.counts = (table >= 0).sum(-1).astype(np.int32)
        self.refs = np.bincount(table[table >= 0], minlength=len(self.refs)).astype(np.int32)
        self._free = np.flatnonzero(self.refs == 0).astype(np.int32)
        self._set_table(table)

    def _set_table(self, table: np.ndarray) -> None:
        self._host = np.ascontiguousarray(table[..., : int(self.counts.max(initial=0))])
        fresh = upload(self._host, self.device)
        if self._table_device is not None and self._table_device.shape == fresh.shape:
            self._table_device.copy_(fresh)
        else:
            if self._table_device is not None:
                self.meter.uncount(self._table_device)
            self._table_device = self.meter.count(fresh)
        self.contiguous = bool((self._host.reshape(-1) == np.arange(self._host.size)).all())
        ids = self._host[:, :, :1] + np.arange(self._host.shape[2])
        in_order = self._host.size and bool(((self._host == ids) | (self._host < 0)).all())
        self.first = np.maximum(self._host[:, :, 0], 0) if in_order else None

    @torch.inference_mode(False)
    def _relayout(self, counts: np.ndarray, spare: int = 0) -> None:
        """Moves everything into pools of exactly the blocks that `counts` ``[B, H]`` asks for, row after row, plus
        `spare`.

        A block that several rows share keeps one place. Raises `PoolExhausted` before anything changes.
        """
        table = self._widened(int(counts.max(initial=0)))
        used = np.arange(table.shape[2]) < counts[..., None]
        old = table[used]
        ids, first = np.unique(old, return_index=True)
        ids, first = ids[ids >= 0], first[ids >= 0]
        takes = old < 0
        takes[first] = True
        place = np.cumsum(takes) - 1
        moved = np.zeros(max(len(self.refs), 1), np.int64)
        moved[ids] = place[first]
        blocks = int(takes.sum()) + spare
        table_bytes = self.table_bytes(counts) - self.table.nbytes
        self.meter.require((blocks - self.held_blocks) * self.block_bytes + table_bytes)

        source, target = self._ids(ids), self._ids(place[first])
        in_place = self.contiguous and bool((counts == counts.flat[0]).all())
        for i, pool in enumerate(self.pools):
            fresh = self.meter.zeros((blocks, *pool.shape[1:]), pool.dtype, self.device)
            if in_place and counts.size:
                rows, had, has = counts.size, self._host.shape[2], int(counts.flat[0])
                same = min(had, has)
                old_rows = pool[: rows * had].view(rows, had, *pool.shape[1:])
                fresh[: rows * has].view(rows, has, *pool.shape[1:])[:, :same] = old_rows[:, :same]
            else:
                fresh[target] = pool[source]
            self.meter.uncount(pool)
            self.pools[i] = fresh
        table = np.full_like(table, -1)
        table[used] = np.where(old < 0, place, moved[np.maximum(old, 0)])
        self.refs = np.zeros(blocks, np.int32)
        self._assign(table)
