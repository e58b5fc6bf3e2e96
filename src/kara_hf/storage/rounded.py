"""A store whose rows are rounded in part: tokens that have settled are stored in few bits, in front of all others."""

from collections.abc import Iterator

import numpy as np
import torch

from ..kernels import Rows
from .blocks import upload
from .paged import PagedStore
from .proximal import ProximalRing
from .records import RecordStore
from .saved import Saved
from .store import Store


class RoundedStore(Store):
    """Two `PagedStore` that make up the rows together: one of records, and behind it one of whole tokens.

    New tokens come whole. `settle` moves tokens from there into the records, where they are rounded; none ever comes
    back, and none is rounded twice. Slots of a row count its records first.

    Args:
        whole: tokens in the model's dtype; empty.
        records: tokens that are rounded; empty.
        first: the first tokens of a sequence, which stay whole.
    """

    def __init__(self, whole: PagedStore, records: RecordStore, first: int):
        self.whole, self.records, self.first = whole, records, first
        self.meter, self.device, self.block_size = whole.meter, whole.device, whole.block_size

    # ------------------------------------------------------------------------------------------------ what it holds
    @property
    def lengths(self) -> np.ndarray:  # type: ignore[override]
        return self.whole.lengths + self.records.lengths

    @property
    def newest_lengths(self) -> np.ndarray:
        """As `PagedStore.newest_lengths`."""
        return self.whole.lengths

    @property
    def proximal(self) -> ProximalRing | None:
        return self.whole.proximal

    @property
    def room(self) -> int:
        """As of `PagedStore`."""
        return self.whole.room

    @property
    def paged_bytes(self) -> int:
        """As of `PagedStore`."""
        return self.whole.paged_bytes + self.records.paged_bytes

    @property
    def sizes(self) -> tuple[int, int]:
        """Dk and Dv."""
        return self.whole.sizes

    @property
    def slot_bytes(self) -> tuple[int, int]:
        """Bytes of one token's key and of its value in one row while they are whole."""
        return self.whole.slot_bytes

    @property
    def stored_bytes(self) -> int:
        """As of `PagedStore`; of what is rounded the bytes of its records."""
        return self.whole.stored_bytes + self.records.stored_bytes

    def rows(self) -> Rows:
        """As of `PagedStore`."""
        rows = self.whole.rows()
        records = self.records.rows()
        rows.rounded = records if records.max_length else None  # type: ignore[assignment]
        return rows

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """As of `PagedStore`."""
        return *self.whole.tensors(), *self.records.tensors(), self.records.frame

    def read(self, sequence: int, head: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `Store.read`, with what the records stand for in the dtypes of the others."""
        parts = zip(self.records.read(sequence, head), self.whole.read(sequence, head), strict=True)
        keys, values, positions = (torch.cat([rounded.to(whole.dtype), whole]) for rounded, whole in parts)
        return keys, values, positions

    # --------------------------------------------------------------------------------------------------- new tokens
    def reserve(self, tokens: int) -> None:
        self.whole.reserve(tokens)

    def append(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        real: torch.Tensor | None = None,
        *,
        sync: bool = True,
    ) -> None:
        self.whole.append(keys, values, positions, real, sync=sync)

    def count(self, new: int) -> None:
        """As of `PagedStore`."""
        self.whole.count(new)

    def sync_lengths(self) -> np.ndarray:
        return self.whole.sync_lengths()

    def commit(self) -> None:
        """As of `PagedStore`."""
        self.whole.commit()

    def widen(self, spare: int) -> None:
        """As of `PagedStore`."""
        self.whole.widen(spare)

    def rollback(self, tokens: np.ndarray) -> None:
        """Undoes the last `append`, of `tokens` ``[B]``, which are whole."""
        self.whole.rollback(tokens)

    # ------------------------------------------------------------------------------------------------- what settles
    def own_edges(self) -> None:
        """Copies the blocks that `settle` writes into and that sequences share. Raises `PoolExhausted`; nothing that is
        stored has changed then.
        """
        self.sync_lengths()
        everyone = np.arange(len(self.lengths))
        self.whole.unshare(everyone, np.zeros_like(everyone), int(self.whole.lengths.max(initial=0)))
        self.records.own_last()

    def settle(self, chosen: torch.Tensor) -> None:
        """Rounds those of the whole tokens that are `chosen` ``[B, H, N]`` bool, N at least their longest row.

        Raises `PoolExhausted`; nothing that is stored has changed then.
        """
        self.own_edges()
        store = self.whole
        longest = int(store.lengths.max(initial=0))
        chosen = chosen[:, :, :longest]
        if not bool(chosen.any()):
            return
        rows = store.rows()
        beside = store.ranked()[0] if rows.metric is not None else None
        keys, values = rows.dense()
        self.records.add(keys, values, rows.dense_positions(), beside, chosen)
        slots = torch.arange(longest, dtype=torch.int32, device=self.device)
        stays = ~chosen & (slots < rows.lengths[..., None])
        lengths = stays.sum(2, dtype=torch.int32)
        store.evict(*_closing_up(stays, slots), lengths.cpu().numpy())

    def fill(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        metric: torch.Tensor,
        real: torch.Tensor,
        kept: torch.Tensor,
        ahead: int,
        settled: torch.Tensor,
    ) -> None:
        """As of `PagedStore`; those of `kept` that are `settled` ``[B, H, S]`` bool are rounded at once."""
        self.meter.require(self.fill_bytes(real, kept, ahead, settled))
        self.whole.fill(keys, values, positions, metric, real, kept & ~settled, ahead)
        self.records.add(self.whole.rows().of_keys(keys), values, positions[:, None], metric, kept & settled)

    def fill_bytes(self, real: torch.Tensor, kept: torch.Tensor, ahead: int, settled: torch.Tensor) -> int:
        """Bytes that `fill` takes."""
        return self.whole.fill_bytes(real, kept & ~settled, ahead) + self.records.add_bytes(kept & settled)

    # -------------------------------------------------- windows, each of them whole or rounded, counted from the oldest
    def slots(self, start: np.ndarray, tokens: int) -> torch.Tensor:
        """As of `PagedStore`."""
        return self.whole.slots(start, tokens)

    def window(self, sequences: np.ndarray, start: np.ndarray, tokens: int) -> torch.Tensor:
        """As of `PagedStore`."""
        store, place = self._where(sequences, start)
        return store.window(sequences, place, tokens).to(self.whole.keys.pools[0].dtype)

    def window_values(self, sequences: np.ndarray, start: np.ndarray, tokens: int) -> torch.Tensor:
        """As of `PagedStore`."""
        store, place = self._where(sequences, start)
        return store.window_values(sequences, place, tokens).to(self.whole.values.pools[0].dtype)

    def unshare(self, sequences: np.ndarray, start: np.ndarray, count: int) -> None:
        store, place = self._where(sequences, start)
        if store is self.records:
            store.unshare(sequences, place, int((self._before(sequences) - place).max()))
            place = np.full_like(place, self.first)
        self.whole.unshare(sequences, place, count)

    def keep(self, sequences: np.ndarray, start: np.ndarray, slots: torch.Tensor) -> None:
        store, place = self._where(sequences, start)
        before = self._before(sequences)
        if store is self.records:
            count = int((slots[0, 0] < self.first + int(before[0])).sum())  # the same in all rows
            store.keep(sequences, place, slots[:, :, :count] - self.first)
            place, slots = np.full_like(place, self.first), slots[:, :, count:]
            if slots.shape[2] == int(self.whole.lengths[sequences[0], 0]) - self.first:  # nothing goes from there
                return
        self.whole.keep(sequences, place, slots - upload(before, self.device)[:, None, None])

    def _where(self, sequences: np.ndarray, start: np.ndarray) -> tuple[PagedStore, np.ndarray]:
        """The part that has the slots from `start` ``[b]`` on, which are counted from a sequence's oldest token, and
        where it has them. The first tokens are whole, the records come behind them, then all others.
        """
        before = self._before(sequences)
        rounded = (start >= self.first) & (start < self.first + before)
        return (self.records, start - self.first) if rounded.any() else (self.whole, start - before)

    def _before(self, sequences: np.ndarray) -> np.ndarray:
        """Records of the named sequences, all of whose rows have as many, ``[b]``."""
        return self.records.lengths[sequences, 0]

    # -------------------------------------------------------------------------------------------------- what is evicted
    def ranked(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As of `PagedStore`."""
        before = torch.from_numpy(self.records.lengths).to(self.device)[..., None].long()
        slots = torch.arange(int(self.lengths.max(initial=0)), device=self.device)
        behind = slots - before

        def joined(rounded: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
            places = torch.where(behind < 0, slots, rounded.shape[2] + behind)
            both = torch.cat([rounded, whole, whole[:, :, :1]], 2)  # one place at least
            return both.gather(2, places.clamp(max=both.shape[2] - 1))

        (metric, positions), (newer, places) = self.records.ranked(), self.whole.ranked()
        return joined(metric, newer), joined(positions, places)

    def add_metric(self, sequence: int, head: int, metric: torch.Tensor) -> None:
        """As of `PagedStore`."""
        before = int(self.records.lengths[sequence, head])
        self.records.add_metric(sequence, head, metric[:before])
        self.whole.add_metric(sequence, head, metric[before:])

    def parts(self, slots: torch.Tensor) -> Iterator[tuple[PagedStore, torch.Tensor]]:
        """The stores that rows are made of, and what `slots` ``[B, H, N]`` bool says of each one's own."""
        before = torch.from_numpy(self.records.lengths).to(self.device)[..., None].long()
        slots = torch.nn.functional.pad(slots, (0, 1))
        for store, first in ((self.records, torch.zeros_like(before)), (self.whole, before)):
            places = torch.arange(int(store.lengths.max(initial=0)), device=self.device)
            lengths = torch.from_numpy(store.lengths).to(self.device)[..., None]
            chosen = slots.gather(2, (first + places).clamp(max=slots.shape[2] - 1))
            yield store, chosen & (places < lengths)

    def free_blocks(self) -> None:
        """As of `PagedStore`."""
        self.records.free_blocks()
        self.whole.free_blocks()

    # ------------------------------------------------------------------------------------------------- whole sequences
    def crop(self, tokens: np.ndarray) -> None:
        """As `Store.crop`. Of whole tokens those that were first are dropped last."""
        self.sync_lengths()
        rounded, whole = self.records.lengths.min(1), self.whole.lengths.min(1)
        newest = np.minimum(tokens, whole - np.where(rounded > 0, np.minimum(self.first, whole), 0))
        from_records = np.minimum(tokens - newest, rounded)
        if from_records.any():
            self.records.crop(from_records)
            if self.proximal is not None:
                self.proximal.crop(from_records)
        self.whole.crop(tokens - from_records)

    def fork(self, index: np.ndarray) -> None:
        self.sync_lengths()
        self.meter.require(self.fork_bytes(index))
        self.whole.fork(index)
        self.records.fork(index)

    def fork_bytes(self, index: np.ndarray) -> int:
        """As of `PagedStore`."""
        return self.whole.fork_bytes(index) + self.records.fork_bytes(index)

    def reset(self, sequences: np.ndarray) -> None:
        self.whole.reset(sequences)
        self.records.reset(sequences)

    def saved(self) -> Saved:
        """As of `PagedStore`."""
        return {"whole": self.whole.saved(), "records": self.records.saved()}

    def restore(self, saved: Saved) -> None:
        """As of `PagedStore`."""
        self.whole.restore(saved["whole"])
        self.records.restore(saved["records"])

    def close(self) -> None:
        """As of `PagedStore`."""
        self.whole.close()
        self.records.close()


def _closing_up(stays: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Moves, source and target ``[B, H, M]`` int32, after which the slots that `stays` ``[B, H, N]`` are in front, in
    order.
    """
    target = stays.cumsum(2, dtype=torch.int32) - 1
    most = int((target[..., -1] + 1).max())
    order = (~stays).to(torch.int8).argsort(dim=2, stable=True)[..., :most]
    source = slots.expand(stays.shape).gather(2, order)
    moved = stays.gather(2, order) & (target.gather(2, order) != source)
    return source, target.gather(2, order).masked_fill(~moved, -1)
