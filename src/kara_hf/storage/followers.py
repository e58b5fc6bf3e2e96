"""The paged store of a layer some of whose heads follow another layer's (PoD, 2412.02252)."""

from dataclasses import replace
from typing import NotRequired, TypedDict, Unpack

import numpy as np
import torch

from ..kernels import Proximal, Rows
from .blocks import spread_table, upload
from .meter import MemoryMeter
from .paged import PagedStore
from .proximal import ProximalRing
from .saved import Saved


class StoreSettings(TypedDict):
    """Arguments of `PagedStore` by name."""

    dtypes: tuple[torch.dtype, torch.dtype]
    device: torch.device
    block_size: int
    meter: MemoryMeter
    metric: NotRequired[bool]
    tight: NotRequired[bool]
    steady: NotRequired[bool]


def paged_store(
    shape: tuple[int, ...],
    sizes: tuple[int, int],
    *,
    followers: tuple[int, ...] = (),
    proximal: Proximal | None = None,
    **settings: Unpack[StoreSettings],
) -> PagedStore:
    """A `PagedStore` of this shape, and these sizes and settings; a `FollowerStore` where there are `followers`."""
    if not followers:
        return PagedStore(shape, sizes, **settings)
    if proximal is None:
        raise ValueError(f"heads {followers} follow, and proximal=None does not say which of their keys are stored")
    return FollowerStore(shape, sizes, followers=followers, proximal=proximal, **settings)


class FollowerStore(PagedStore):
    """A `PagedStore` in which some heads, that follow, store the keys of proximal tokens only: in a ring of their own.

    Args:
        shape: B sequences and H KV heads.
        sizes: Dk and Dv, of a key and of a value.
        followers: heads that follow, ascending.
        proximal: what is proximal.
        settings: as of `PagedStore`.
    """

    proximal: ProximalRing

    def __init__(
        self,
        shape: tuple[int, ...],
        sizes: tuple[int, int],
        *,
        followers: tuple[int, ...],
        proximal: Proximal,
        **settings: Unpack[StoreSettings],
    ):
        self._whole = np.setdiff1d(np.arange(shape[1]), followers)  # heads whose keys are in blocks
        self._key_table = settings["meter"].zeros((*shape, 0), torch.int32, settings["device"])
        self.proximal = ProximalRing(
            shape,
            followers,
            sizes[0],
            proximal,
            dtype=settings["dtypes"][0],
            device=settings["device"],
            block_size=settings["block_size"],
            meter=settings["meter"],
        )
        super().__init__(shape, sizes, **settings)

    @property
    def paged_bytes(self) -> int:
        return super().paged_bytes + self.proximal.nbytes + self._key_table.nbytes

    @property
    def stored_bytes(self) -> int:
        return super().stored_bytes + self.proximal.held * self.slot_bytes[0]

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return *super().tensors(), self.proximal.rows.keys

    def sync_lengths(self) -> np.ndarray:
        excess = super().sync_lengths()
        if excess.any():
            self.proximal.count(-excess)
            self._changed()
        return excess

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
        super().fill(keys, values, positions, metric, real, kept, ahead)
        self.proximal.append(keys, positions, real)
        self.proximal.count(real.sum(1).cpu().numpy())
        self._changed()

    def crop(self, tokens: np.ndarray) -> None:
        self.sync_lengths()
        self.proximal.crop(tokens)
        super().crop(tokens)

    def rollback(self, tokens: np.ndarray) -> None:
        self.sync_lengths()
        self.proximal.rollback(tokens)
        super().crop(tokens)

    def commit(self) -> None:
        self.proximal.commit()

    def widen(self, spare: int) -> None:
        self.proximal.widen(spare)
        self._changed()

    def fork(self, index: np.ndarray) -> None:
        super().fork(index)
        self.proximal.fork(index)
        self._changed()

    def fork_bytes(self, index: np.ndarray) -> int:
        return super().fork_bytes(index) + self.proximal.fork_bytes(index)

    def reset(self, sequences: np.ndarray) -> None:
        self.sync_lengths()
        self.proximal.reset(sequences)
        super().reset(sequences)

    def close(self) -> None:
        super().close()
        self.proximal.close()
        self.meter.uncount(self._key_table)

    def saved(self) -> Saved:
        return {**super().saved(), "proximal": self.proximal.saved()}

    def restore(self, saved: Saved) -> None:
        self.proximal.restore(saved["proximal"])
        super().restore(saved)

    def _of_keys(self, rows: np.ndarray) -> np.ndarray:
        return rows[:, self._whole]

    def _growth(self, tokens: int, blocks: np.ndarray) -> int:
        return self.proximal.growth(tokens) + super()._growth(tokens, blocks)

    def _grow(self, tokens: int, blocks: np.ndarray, in_order: bool = False) -> None:
        self.proximal.grow(tokens)
        super()._grow(tokens, blocks, in_order)

    def _write(
        self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, real: torch.Tensor | None
    ) -> None:
        super()._write(keys, values, positions, real)
        self.proximal.append(keys, positions, real)

    def _count(self, tokens: np.ndarray | int) -> None:
        self.proximal.count(tokens)
        super()._count(tokens)

    def _read_keys(self, sequence: int, head: int, length: int) -> torch.Tensor:
        """None of a head that follows."""
        place = np.flatnonzero(self._whole == head)
        return super()._read_keys(sequence, int(place[0]), length) if len(place) else self.keys.pools[0][:0, 0]

    def _room(self) -> int:
        return min(super()._room(), self.proximal.room())

    def _changed(self) -> None:
        columns = self.values.table.shape[2]
        table = spread_table(self.keys.host_table, self._whole, self.lengths.shape, columns)
        fresh = self.meter.count(upload(table, self.device))
        self.meter.uncount(self._key_table)
        self._key_table = fresh
        super()._changed()

    def _make_rows(self, lengths: torch.Tensor, longest: int) -> Rows:
        """With a row of -1 in the key table for each follower; keys and values may have different numbers of blocks."""
        rows = super()._make_rows(lengths, longest)
        same = not len(self._whole) or self.keys.table.shape[2] == self.values.table.shape[2]
        contiguous = same and rows.contiguous
        return replace(rows, key_table=self._key_table, proximal=self.proximal.rows, starts=None, contiguous=contiguous)
