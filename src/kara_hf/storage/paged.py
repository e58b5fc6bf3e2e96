"""The paged store of one layer: ragged rows of keys, values and positions in blocks."""

from collections.abc import Iterator

import numpy as np
import torch

from ..kernels import Rows, append, compact, gather_rows, slot_index
from .blocks import Blocks, upload
from .meter import MemoryMeter
from .proximal import ProximalRing
from .saved import Saved, restored_array
from .store import Store

SLACK = 1 / 8  # share of a pool that may be unused before it is given back
HEADROOM = 1 / 32  # blocks reserved ahead, as a share of those in use: bounds both unused memory and copying


class PagedStore(Store):
    """A `Store` in blocks of `block_size` slots; each block belongs to one head of one sequence, so freeing it is real.

    Args:
        shape: B sequences and H KV heads.
        sizes: Dk and Dv, of a key and of a value.
        dtypes: of keys and of values, which need not be the same.
        device: of everything but the host's tables.
        block_size: P.
        meter: counts every byte.
        metric: whether every slot has a running importance, float32. Sequences then share no blocks: each adds to its.
        tight: whether no row has blocks reserved beyond what is asked for, and what is free beyond one block of each
            row is given back.
        steady: whether `rows` stay as they are, bound for bound, while there is `room`, so that a CUDA graph can be
            replayed on them.
        positions: whether every slot knows its token's position.
    """

    proximal: ProximalRing | None = None  # keys of heads that do not have theirs in blocks

    def __init__(
        self,
        shape: tuple[int, ...],
        sizes: tuple[int, int],
        *,
        dtypes: tuple[torch.dtype, torch.dtype],
        device: torch.device,
        block_size: int,
        meter: MemoryMeter,
        metric: bool = False,
        tight: bool = False,
        steady: bool = False,
        positions: bool = True,
    ):
        self.block_size, self.meter, self.device = block_size, meter, device
        self.tight, self.steady, self.sizes = tight, steady, sizes
        key, value = ((sizes[0],), dtypes[0]), ((sizes[1],), dtypes[1])
        position = (() if positions else (0,), torch.int32)
        beside = [position, ((), torch.float32)] if metric else [position]
        self.lengths = np.zeros(shape, np.int32)
        self.keys = Blocks(self._of_keys(self.lengths).shape, block_size, [key], device, meter)
        self.values = Blocks(shape, block_size, [value, *beside], device, meter)
        self.shares = not metric
        self.in_order = True  # whether slot s of every row holds position s
        self.room = 0  # tokens that every row can take before anything has to be arranged
        self._exact = True
        self._rows: Rows | None = None
        self._changed()

    @property
    def newest_lengths(self) -> np.ndarray:
        """Tokens of every row's part that new ones join, ``[B, H]``: what `rows` say that lengths are."""
        return self.lengths

    @property
    def paged_bytes(self) -> int:
        """Bytes in blocks, tables and lengths."""
        blocks = sum(b.held_blocks * b.block_bytes + b.table.nbytes for b in (self.keys, self.values))
        return blocks + self.rows().lengths.nbytes

    @property
    def slot_bytes(self) -> tuple[int, int]:
        """Bytes of one token's key and of its value in one row."""
        keys, values = self.keys.pools[0], self.values.pools[0]
        return keys.shape[-1] * keys.itemsize, values.shape[-1] * values.itemsize

    @property
    def stored_bytes(self) -> int:
        """Bytes of the keys and values of the tokens stored, without the room that is left in blocks."""
        key, value = self.slot_bytes
        return int(self._of_keys(self.lengths).sum()) * key + int(self.lengths.sum()) * value

    def rows(self) -> Rows:
        """What the kernels read and write. Valid until the next call that changes the store."""
        assert self._rows is not None
        return self._rows

    def reserve(self, tokens: int) -> None:
        if tokens <= self.room:
            return
        needed = -(-(self.lengths + tokens) // self.block_size)
        even = self.keys.contiguous and self.values.contiguous and self.meter.max_bytes is None
        if not self.tight or even:  # before anything was evicted, tight rows grow like any others
            headroom = HEADROOM / 2 if self.tight else HEADROOM
            needed = np.where(needed > self.values.counts, needed + (needed * headroom).astype(np.int32), needed)
        self.meter.require(self._growth(tokens, needed))  # all grow or none does
        in_order = self.tight and self.device.type == "cpu"  # copied once there, instead of gathered at every step
        try:
            self._grow(tokens, needed, in_order)
            for blocks, lengths in self._pools():  # a shared last block is about to be written
                blocks.own(lengths // self.block_size, blocks.counts)
        finally:  # pools may have moved before something failed
            self._changed()

    def append(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        real: torch.Tensor | None = None,
        *,
        sync: bool = True,
    ) -> None:
        new = keys.shape[2]
        self.reserve(new)
        rows = self.rows()
        self._write(keys, values, positions, real)
        if real is None or not sync:
            rows.lengths += new if real is None else real.sum(1, keepdim=True, dtype=torch.int32)
            rows.uniform &= real is None
            self._exact &= real is None
            self.count(new)
        else:
            self.sync_lengths()
            self._count(real.sum(1, dtype=torch.int32).cpu().numpy())
            self._changed()

    def count(self, new: int) -> None:
        """The host's part of `append`: counts `new` tokens more in every row, and at least as many real ones."""
        self._count(new)
        self.room -= new
        if not self.steady:
            self.rows().max_length += new

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What a decode step reads and writes."""
        rows = self.rows()
        return *self.keys.pools, *self.values.pools, rows.key_table, rows.value_table, rows.lengths

    def sync_lengths(self) -> np.ndarray:
        if self._exact:
            return np.zeros(len(self.lengths), np.int32)
        assumed, self.lengths = self.lengths, self.rows().lengths.cpu().numpy().copy()
        self._exact = True
        self._changed()
        return (assumed - self.lengths)[:, 0]

    def unshare(self, sequences: np.ndarray, start: np.ndarray, count: int) -> None:
        first = np.full_like(self.lengths, np.iinfo(np.int32).max)
        first[sequences] = (start // self.block_size)[:, None]
        last = np.zeros_like(self.lengths)
        last[sequences] = -(-(start + count) // self.block_size)[:, None]
        try:
            self.keys.own(self._of_keys(first), self._of_keys(last))
            self.values.own(first, last)
        finally:  # pools may have moved before something failed
            self._changed()

    def keep(self, sequences: np.ndarray, start: np.ndarray, slots: torch.Tensor) -> None:
        count = slots.shape[2]
        self.unshare(sequences, start, count)
        compact(self.rows(), self._index(sequences), slots.to(torch.int32), self.slots(start, count))
        self.lengths[sequences] = (start + count)[:, None].astype(np.int32)
        self.in_order = False
        self._fit()

    def fill(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        metric: torch.Tensor,
        real: torch.Tensor,
        kept: torch.Tensor,
        ahead: int,
    ) -> None:
        """Fills the empty store with the tokens that each row keeps of a prompt, in their order.

        Args:
            keys, values: ``[B, H, S, Dk]`` and ``[B, H, S, Dv]``.
            positions, real: ``[B, S]`` int32, and bool, False for padding.
            metric, kept: ``[B, H, S]`` float32 and bool.
            ahead: tokens for which every row gets room beyond.

        Raises:
            PoolExhausted: there is no room under the cap; the store is still empty.
        """
        self.meter.require(self.fill_bytes(real, kept, ahead))
        lengths = kept.sum(2, dtype=torch.int32).cpu().numpy()
        self._grow(int(real.sum(1).max()) + ahead, -(-(lengths + ahead) // self.block_size))
        self.lengths, self.in_order = lengths, bool((kept == real[:, None]).all())
        self._changed()
        slots = (kept.cumsum(2, dtype=torch.int32) - 1).clamp(min=0)
        whole = self.rows().of_keys
        where_key = slot_index(self.keys.table, whole(slots), self.block_size)[whole(kept)]
        where_value = slot_index(self.values.table, slots, self.block_size)[kept]
        self.keys.pools[0].flatten(0, 1)[where_key] = whole(keys)[whole(kept)]
        parts = (values, positions[:, None].expand(kept.shape), metric)
        for pool, part in zip(self.values.pools, parts, strict=False):  # without a metric in the store, none is kept
            pool.flatten(0, 1)[where_value] = part[kept]

    def fill_bytes(self, real: torch.Tensor, kept: torch.Tensor, ahead: int) -> int:
        """Bytes that `fill` takes."""
        blocks = -(-(kept.sum(2, dtype=torch.int32).cpu().numpy() + ahead) // self.block_size)
        return self._growth(int(real.sum(1).max()) + ahead, blocks)

    def ranked(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Metric and true position of every slot, ``[B, H, N]``; behind a row's length anything."""
        _, positions, metric = self.values.pools
        longest = int(self.lengths.max(initial=0))
        return gather_rows(metric, self.values.table, longest), gather_rows(positions, self.values.table, longest)

    def add_metric(self, sequence: int, head: int, metric: torch.Tensor) -> None:
        """Adds to the metric of one row, ``[T]`` float32 in slot order."""
        slots = torch.arange(len(metric), dtype=torch.int32, device=self.device)[None, None]
        row = self.values.table[sequence : sequence + 1, head : head + 1]
        self.values.pools[2].view(-1)[slot_index(row, slots, self.block_size)[0, 0]] += metric

    def evict(self, source: torch.Tensor, target: torch.Tensor, lengths: np.ndarray, ahead: int = 0) -> None:
        """Moves tokens of every row from slots `source` to `target` ``[B, H, M]`` int32, where it is not negative, and
        keeps the first `lengths` ``[B, H]`` slots, and blocks of the row that `ahead` tokens more would fill.
        """
        if source.shape[2]:
            everyone = torch.arange(len(lengths), device=self.device)
            compact(self.rows(), everyone, source, target)
        self.in_order = False
        self.lengths = lengths.astype(np.int32)
        self._fit(ahead)

    def parts(self, slots: torch.Tensor) -> Iterator[tuple["PagedStore", torch.Tensor]]:
        """The stores that rows are made of, this one, and what `slots` ``[B, H, N]`` bool says of each one's own."""
        yield self, slots

    def free_blocks(self) -> None:
        """Gives back every block that holds no token."""
        for blocks, lengths in self._pools():
            blocks.shrink(self._used(lengths), 0)
        self._changed()

    def crop(self, tokens: np.ndarray) -> None:
        self.sync_lengths()
        self.lengths -= tokens[:, None].astype(np.int32)
        self._fit()

    def rollback(self, tokens: np.ndarray) -> None:
        """Undoes the last `append`, of `tokens` ``[B]``."""
        self.crop(tokens)

    def commit(self) -> None:
        """The last `append` will not be taken back."""

    def widen(self, spare: int) -> None:
        """Makes it possible to crop `spare` tokens from now on; whole keys make it so always."""

    def fork(self, index: np.ndarray) -> None:
        self.sync_lengths()
        self.meter.require(self.fork_bytes(index))
        used = [self._used(lengths) for _, lengths in self._pools()]
        self.lengths = self.lengths[index]
        try:
            for (blocks, lengths), count in zip(self._pools(), used, strict=True):
                blocks.fork(index, count)
                if not self.shares:
                    blocks.own(np.zeros_like(lengths), blocks.counts)
        finally:
            self._changed()

    def fork_bytes(self, index: np.ndarray) -> int:
        """Bytes that `fork` takes: for tables and lengths, and for blocks where sequences do not share them."""
        total = self.lengths[index].nbytes - self.lengths.nbytes
        for blocks, lengths in self._pools():
            used = self._used(lengths)[index]
            total += blocks.table_bytes(used) - blocks.table.nbytes
            if not self.shares:
                total += max(0, int(used.sum()) - blocks.held_blocks) * blocks.block_bytes
        return total

    def reset(self, sequences: np.ndarray) -> None:
        self.sync_lengths()
        self.lengths[sequences] = 0
        self._fit()

    def read(self, sequence: int, head: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self.sync_lengths()
        length = int(self.lengths[sequence, head])
        row = self.values.table[sequence : sequence + 1, head : head + 1]
        values, positions = (gather_rows(pool, row, length)[0, 0] for pool in self.values.pools[:2])
        return self._read_keys(sequence, head, length), values, positions.long()

    def window(self, sequences: np.ndarray, start: np.ndarray, tokens: int) -> torch.Tensor:
        """Keys of `tokens` slots from `start` ``[b]`` on, of the named sequences ``[b]`` and the K heads whose keys are
        stored whole: ``[b, K, tokens, Dk]``.
        """
        slots = self.rows().of_keys(self.slots(start, tokens))
        return self._read_slots(self.keys, sequences, slots)

    def window_values(self, sequences: np.ndarray, start: np.ndarray, tokens: int) -> torch.Tensor:
        """As `window` the values, of all heads: ``[b, H, tokens, Dv]``."""
        return self._read_slots(self.values, sequences, self.slots(start, tokens))

    def _read_slots(self, blocks: Blocks, sequences: np.ndarray, slots: torch.Tensor) -> torch.Tensor:
        """What the first pool of `blocks` has in `slots` ``[b, K, n]`` of the named sequences, ``[b, K, n, D]``."""
        flat = slot_index(blocks.table[self._index(sequences)], slots, self.block_size)
        return blocks.pools[0].flatten(0, 1)[flat]

    def slots(self, start: np.ndarray, tokens: int) -> torch.Tensor:
        """Logical slots `start` ``[b]`` to `start` + `tokens` for every head: ``[b, H, tokens]`` int32."""
        first = upload(start.astype(np.int32), self.device)[:, None, None]
        steps = torch.arange(tokens, dtype=torch.int32, device=self.device)
        return (first + steps).expand(-1, self.lengths.shape[1], -1)

    def close(self) -> None:
        """Stops counting what is held here; the object is not used afterwards."""
        self.keys.close()
        self.values.close()
        self.meter.uncount(self.rows().lengths)

    def saved(self) -> Saved:
        """What is held here; see `kara_hf.storage.saved`."""
        return {"lengths": self.lengths, "in_order": self.in_order, "blocks": [b.saved() for b, _ in self._pools()]}

    def restore(self, saved: Saved) -> None:
        """Takes back, into a new store, what `saved` gave. Raises ValueError and `PoolExhausted`."""
        self.lengths, self.in_order = restored_array(saved, "lengths", self.lengths), bool(saved["in_order"])
        for held, (blocks, lengths) in zip(saved["blocks"], self._pools(), strict=True):
            blocks.restore(held, lengths)
        self._changed()

    # ------------------------------------------------------------------------ what is different where some heads follow
    def _of_keys(self, rows: np.ndarray) -> np.ndarray:
        """What `rows` ``[B, H]`` says of the K heads whose keys are in blocks, ``[B, K]``."""
        return rows

    def _growth(self, tokens: int, blocks: np.ndarray) -> int:
        """Bytes that `_grow` takes."""
        return self.keys.growth(self._of_keys(blocks)) + self.values.growth(blocks)

    def _grow(self, tokens: int, blocks: np.ndarray, in_order: bool = False) -> None:
        """Gives every row at least `blocks` ``[B, H]``, and every sequence room for `tokens` more."""
        self.keys.grow(self._of_keys(blocks), in_order)
        self.values.grow(blocks, in_order)

    def _write(
        self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, real: torch.Tensor | None
    ) -> None:
        """Writes new tokens where there is room; they are not counted yet."""
        append(self.rows(), keys, values, positions, real)

    def _count(self, tokens: np.ndarray | int) -> None:
        """Counts so many more tokens in all rows, or ``[B]`` in those of each sequence."""
        self.lengths = self.lengths + (tokens if isinstance(tokens, int) else tokens[:, None])

    def _read_keys(self, sequence: int, head: int, length: int) -> torch.Tensor:
        """Keys ``[T, Dk]`` of one row that are in blocks."""
        row = self.keys.table[sequence : sequence + 1, head : head + 1]
        return gather_rows(self.keys.pools[0], row, length)[0, 0]

    def _room(self) -> int:
        """Tokens that every row has blocks for."""
        return min(
            int((blocks.counts * self.block_size - part).min(initial=np.iinfo(np.int32).max))
            for blocks, part in self._pools()
        )

    def _index(self, sequences: np.ndarray) -> torch.Tensor:
        return upload(sequences.astype(np.int64), self.device)

    def _pools(self) -> tuple[tuple[Blocks, np.ndarray], tuple[Blocks, np.ndarray]]:
        """Blocks of keys and of values, each with the lengths of its rows."""
        return (self.keys, self._of_keys(self.lengths)), (self.values, self.lengths)

    def _used(self, lengths: np.ndarray) -> np.ndarray:
        return -(-lengths // self.block_size)

    def _fit(self, ahead: int = 0) -> None:
        """Gives back blocks that hold no token, nor one of `ahead` more in every row, once they are worth a move."""
        for blocks, lengths in self._pools():
            used = self._used(lengths + ahead)
            if self.tight:  # rows that lack blocks are about to take some of those that are free
                blocks.free_blocks(used)
                blocks.shrink(used, 0 if ahead and (blocks.counts >= used).all() else 2 * used.size)
            else:
                blocks.shrink(used, SLACK * blocks.held_blocks)
        self._changed()

    def _changed(self) -> None:
        """Derives from the tables and lengths what the hot path wants ready."""
        lengths = self.lengths
        longest = int(lengths.max(initial=0))
        shared = any(blocks.shares(part // self.block_size) for blocks, part in self._pools())
        self.room = 0 if shared or not lengths.size else self._room()
        if self._rows is None or self._rows.lengths.shape != lengths.shape:
            if self._rows is not None:
                self.meter.uncount(self._rows.lengths)
            device_lengths = self.meter.count(upload(lengths, self.device))
        else:
            device_lengths = self._rows.lengths
            if self._exact:  # otherwise the device knows better
                device_lengths.copy_(upload(lengths, self.device))
        self._rows = self._make_rows(device_lengths, longest)

    def _make_rows(self, lengths: torch.Tensor, longest: int) -> Rows:
        """For `rows`: what the kernels see, of `lengths` on the device, of which `longest` is the largest."""
        starts = None
        if self.device.type == "cpu":  # a GPU reads through the table, and would have to be asked for the lengths
            keys, values = self.keys.first, self.values.first
            if keys is not None and values is not None and np.array_equal(keys, values):
                starts = keys.astype(np.int64) * self.block_size
        return Rows(
            keys=self.keys.pools[0],
            values=self.values.pools[0],
            positions=self.values.pools[1],
            key_table=self.keys.table,
            value_table=self.values.table,
            lengths=lengths,
            max_length=self.values.table.shape[2] * self.block_size if self.steady else longest,
            uniform=self._exact and not self.steady and bool((self.lengths == longest).all()),
            contiguous=self.keys.contiguous and self.values.contiguous,
            metric=None if self.shares else self.values.pools[2],
            starts=starts,
            in_order=self.in_order,
        )
