"""The paged rows of one layer, as the kernels see them.

A row is one (sequence, KV head). Its tokens lie in blocks of P slots; a block id is an index into the pool. Keys and
values have a table each, because another layer's keys may stand in for a row's own.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch


@dataclass
class Rows:
    """One layer's keys and values for B sequences and H KV heads.

    Attributes:
        keys: pool of key blocks, ``[Nk, P, Dk]``.
        values: pool of value blocks, ``[Nv, P, Dv]``.
        positions: true position of the token in every value slot, ``[Nv, P]`` int32.
        key_table: block ids, ``[B, H, M]`` int32; entries past a row's last block are -1.
        value_table: block ids, ``[B, H, M]`` int32; as ``key_table``.
        lengths: tokens stored in each row, ``[B, H]`` int32.
        max_length: upper bound of the lengths, at most ``M * P``, known without asking the device. No result depends
            on it: a CUDA graph replays a step with one bound for many lengths.
        uniform: whether every row has exactly ``max_length`` tokens.
        contiguous: whether the blocks of the rows lie one after the other in both pools, row after row, ``M`` each, so
            that a row can be read in place.
        metric: running importance of the token in every value slot, ``[Nv, P]`` float32; None where none is kept.
        starts: on the host, flat slot of each row's first token, ``[B, H]`` int64, the same in all pools, where the
            blocks of every row follow one another, so that it can be read in place; None elsewhere, and on a GPU.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    key_table: torch.Tensor
    value_table: torch.Tensor
    lengths: torch.Tensor
    max_length: int
    uniform: bool
    contiguous: bool
    metric: torch.Tensor | None = None
    starts: np.ndarray | None = None

    @property
    def block_size(self) -> int:
        return self.keys.shape[1]

    @cached_property
    def in_place(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Keys, values, positions and metric of contiguous rows as views of the pools, ``[B, H, M * P, ...]``."""
        batch, heads, blocks = self.key_table.shape
        used, slots = batch * heads * blocks, blocks * self.block_size

        def view(pool: torch.Tensor) -> torch.Tensor:
            return pool.narrow(0, 0, used).view(batch, heads, slots, *pool.shape[2:])

        metric = None if self.metric is None else view(self.metric)
        return view(self.keys), view(self.values), view(self.positions), metric

    @property
    def value_parts(self) -> tuple[torch.Tensor, ...]:
        """The pools that the value table leads to: values, positions and, where there is one, the metric."""
        beside = () if self.metric is None else (self.metric,)
        return self.values, self.positions, *beside

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys ``[B, H, max_length, Dk]`` and values; in place where rows are contiguous, else gathered.

        Slots past a row's own length hold anything.
        """
        if self.contiguous:
            keys, values, _, _ = self.in_place
            return keys.narrow(2, 0, self.max_length), values.narrow(2, 0, self.max_length)
        return (
            gather_rows(self.keys, self.key_table, self.max_length),
            gather_rows(self.values, self.value_table, self.max_length),
        )


def gather_rows(pool: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    """The first `length` slots of every row, in row order; slots past a row's own length hold anything.

    Args:
        pool: ``[N, P, *rest]``.
        table: ``[B, H, M]`` int32; -1 is read as block 0.
        length: slots to return, at most ``M * P``.

    Returns:
        ``[B, H, length, *rest]``.
    """
    batch, heads, _ = table.shape
    used = -(-length // pool.shape[1])
    ids = table[:, :, :used].clamp(min=0).reshape(-1)
    return pool.index_select(0, ids).view(batch, heads, used * pool.shape[1], *pool.shape[2:])[:, :, :length]
