"""The rounded part of a layer's rows: a paged store whose keys and values are records of few bits."""

import numpy as np
import torch

from ..kernels.append import slot_index
from ..kernels.rounding import Packing, frame_of, into_frame, out_of_frame
from ..kernels.rows import RoundedRows, Rows
from .blocks import spread_table, upload
from .meter import MemoryMeter
from .paged import PagedStore
from .saved import Saved, check_saved, restored_tensor


class RecordStore(PagedStore):
    """A `PagedStore` of records; see `kara_hf.kernels.rounding`. It grows by what it takes and no more.

    Args:
        shape: B sequences and H KV heads.
        packings: of keys and of values.
        device, block_size, meter, metric, tight: as of `PagedStore`.
        begin: position of the first token of every row, where rows will hold all tokens from there on in order, so that
            nobody needs to store positions; None: positions are stored.
        followers: heads whose keys are another layer's, ascending.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        packings: tuple[Packing, Packing],
        *,
        device: torch.device,
        block_size: int,
        meter: MemoryMeter,
        metric: bool = False,
        tight: bool = False,
        begin: int | None = None,
        followers: tuple[int, ...] = (),
    ):
        self.packings, self.begin = packings, begin
        self._with_keys = np.setdiff1d(np.arange(shape[1]), followers)
        self._key_index = None if not followers else meter.count(upload(self._with_keys.astype(np.int64), device))
        self._spread: torch.Tensor | None = None  # the table of keys with rows for heads that have none
        heads = len(self._with_keys)
        self.frame = meter.zeros((shape[0], heads, 2, packings[0].size), torch.float32, device)
        super().__init__(
            shape,
            (packings[0].width, packings[1].width),
            dtypes=(torch.uint8, torch.uint8),
            device=device,
            block_size=block_size,
            meter=meter,
            metric=metric,
            tight=tight,
            positions=begin is None,
        )

    @property
    def paged_bytes(self) -> int:
        beside = [part.nbytes for part in (self.frame, self._key_index, self._spread) if part is not None]
        return super().paged_bytes + sum(beside)

    def add(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        metric: torch.Tensor | None,
        chosen: torch.Tensor,
    ) -> None:
        """Rounds tokens and puts them behind those of their rows, in order. No row shares its last block.

        Args:
            keys: ``[B, K, S, Dk]``, of the heads whose keys are stored here.
            values: ``[B, H, S, Dv]``.
            positions: ``[B, 1 or H, S]`` int32.
            metric: ``[B, H, S]`` float32, of a store that has one.
            chosen: which of them, ``[B, H, S]`` bool.

        Raises:
            PoolExhausted: there is no room under the cap; nothing has changed then.
        """
        counts = chosen.sum(2, dtype=torch.int32).cpu().numpy()
        if not counts.any():
            return
        needed = self._blocks_for(counts)
        self.meter.require(self._growth(0, needed))
        try:
            self._grow(0, needed)
        finally:  # pools may have moved before something failed
            self._changed()
        rows = self.rows()
        of_keys = chosen if self._key_index is None else chosen[:, self._key_index]
        opened = rows.of_keys(rows.lengths == 0) & of_keys.any(2)
        if bool(opened.any()):
            self.frame.copy_(torch.where(opened[..., None, None], frame_of(keys, of_keys), self.frame))
        slots = rows.lengths[..., None] + chosen.cumsum(2, dtype=torch.int32) - 1
        slots = slots.masked_fill(~chosen, 0)  # needs no block: any that exists stands in
        where_key = slot_index(self.keys.table, rows.of_keys(slots), self.block_size)[of_keys]
        where_value = slot_index(self.values.table, slots, self.block_size)[chosen]
        self.keys.pools[0].flatten(0, 1)[where_key] = self.packings[0].pack(into_frame(keys, self.frame))[of_keys]
        self.values.pools[0].flatten(0, 1)[where_value] = self.packings[1].pack(values[chosen])
        beside = [] if self.begin is not None else [(1, positions.expand(chosen.shape))]
        beside += [] if self.shares or metric is None else [(2, metric)]
        for place, part in beside:
            self.values.pools[place].flatten()[where_value] = part[chosen]
        self.lengths = self.lengths + counts
        self._changed()

    def own_last(self) -> None:
        """Copies the last block of every row that shares it, which `add` writes into. Raises `PoolExhausted`."""
        try:
            for blocks, lengths in self._pools():
                blocks.own(lengths // self.block_size, blocks.counts)
        finally:
            self._changed()

    def add_bytes(self, chosen: torch.Tensor) -> int:
        """Bytes that `add` takes."""
        return self._growth(0, self._blocks_for(chosen.sum(2, dtype=torch.int32).cpu().numpy()))

    def _blocks_for(self, more: np.ndarray) -> np.ndarray:
        return -(-(self.lengths + more) // self.block_size)

    def read(self, sequence: int, head: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the records of one row stand for, float32; no keys of a head that follows."""
        keys, values, positions = super().read(sequence, head)
        place = np.flatnonzero(self._with_keys == head)
        if len(place):
            frame = self.frame[sequence : sequence + 1, int(place[0]) : int(place[0]) + 1]
            numbers = out_of_frame(self.packings[0].unpack(keys)[None, None], frame)[0, 0]
        else:
            numbers = self.frame.new_zeros(0, self.packings[0].size)
        if self.begin is not None:
            positions = torch.arange(self.begin, self.begin + len(values), device=self.device)
        return numbers, self.packings[1].unpack(values), positions

    def window(self, sequences: np.ndarray, start: np.ndarray, tokens: int) -> torch.Tensor:
        """As of `PagedStore`, what the records stand for, float32."""
        frame = self.frame[self._index(sequences)]
        return out_of_frame(self.packings[0].unpack(super().window(sequences, start, tokens)), frame)

    def window_values(self, sequences: np.ndarray, start: np.ndarray, tokens: int) -> torch.Tensor:
        """As of `PagedStore`, what the records stand for, float32."""
        return self.packings[1].unpack(super().window_values(sequences, start, tokens))

    def fork(self, index: np.ndarray) -> None:
        super().fork(index)
        chosen = torch.from_numpy(index.astype(np.int64)).to(self.device)
        fresh = self.meter.count(self.frame.index_select(0, chosen))
        self.meter.uncount(self.frame)
        self.frame = fresh
        self._changed()

    def fork_bytes(self, index: np.ndarray) -> int:
        more = len(index) - len(self.frame)
        return super().fork_bytes(index) + more * self.frame[:1].nbytes

    def close(self) -> None:
        super().close()
        for part in (self.frame, self._key_index, self._spread):
            if part is not None:
                self.meter.uncount(part)

    def saved(self) -> Saved:
        return {**super().saved(), "frame": self.frame}

    def restore(self, saved: Saved) -> None:
        check_saved("a frame", saved["frame"], tuple(self.frame.shape), self.frame.dtype)
        self.frame = restored_tensor(saved["frame"], self.device, self.meter, self.frame)
        super().restore(saved)

    def _of_keys(self, rows: np.ndarray) -> np.ndarray:
        return rows if len(self._with_keys) == rows.shape[1] else rows[:, self._with_keys]

    def _read_keys(self, sequence: int, head: int, length: int) -> torch.Tensor:
        place = np.flatnonzero(self._with_keys == head)
        return super()._read_keys(sequence, int(place[0]), length) if len(place) else self.keys.pools[0][:0, 0]

    def _make_rows(self, lengths: torch.Tensor, longest: int) -> Rows:
        rows = super()._make_rows(lengths, longest)
        given = dict(vars(rows))
        if self._key_index is not None:
            fresh = self.meter.count(upload(self._key_table(), self.device))
            if self._spread is not None:
                self.meter.uncount(self._spread)
            self._spread = fresh
            same = bool(len(self._with_keys)) and self.keys.table.shape[2] == self.values.table.shape[2]
            given |= {"key_table": fresh, "starts": None, "contiguous": same and rows.contiguous}
        key_packing, value_packing = self.packings
        return RoundedRows(
            **given,
            key_packing=key_packing,
            value_packing=value_packing,
            frame=self.frame,
            begin=self.begin or 0,
            with_keys=self._key_index,
        )

    def _key_table(self) -> np.ndarray:
        columns = self.values.table.shape[2]
        return spread_table(self.keys.host_table, self._with_keys, self.lengths.shape, columns)
