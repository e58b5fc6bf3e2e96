"""The paged rows of one layer, as the kernels see them.

A row is one (sequence, KV head). Its tokens lie in blocks of P slots; a block id is an index into the pool. Keys and
values have a table each, because another layer's keys may stand in for a row's own.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rows:
    """One layer's keys and values for B sequences and H KV heads.

    Attributes:
        keys: pool of key blocks, ``[Nk, P, Dk]``.
        values: pool of value blocks, ``[Nv, P, Dv]``.
        positions: true position of the token in every value slot, ``[Nv, P]`` int32.
        key_table: block ids, ``[B, H, M]`` int32; entries past a row's last block are -1.
        value_table: block ids, ``[B, H, M]`` int32; as ``key_table``.
        lengths: tokens stored in each row, ``[B, H]`` int32.
        max_length: the largest length, known without asking the device.
        uniform: whether every row has ``max_length`` tokens.
        contiguous: whether the blocks of the rows lie one after the other in both pools, row after row, ``M`` each, so
            that a row can be read in place.
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

    @property
    def block_size(self) -> int:
        return self.keys.shape[1]


def gather_rows(pool: torch.Tensor, table: torch.Tensor, length: int, contiguous: bool = False) -> torch.Tensor:
    """The first `length` slots of every row, in row order; slots past a row's own length hold anything.

    Args:
        pool: ``[N, P, *rest]``.
        table: ``[B, H, M]`` int32; -1 is read as block 0.
        length: slots to return, at most ``M * P``.
        contiguous: read the pool in place (see `Rows.contiguous`); the result is then a view.

    Returns:
        ``[B, H, length, *rest]``.
    """
    batch, heads, blocks = table.shape
    rest = pool.shape[2:]
    if contiguous:
        rows = pool.narrow(0, 0, batch * heads * blocks).view(batch, heads, blocks * pool.shape[1], *rest)
        return rows.narrow(2, 0, length)
    used = -(-length // pool.shape[1])
    ids = table[:, :, :used].clamp(min=0).reshape(-1)
    return pool.index_select(0, ids).view(batch, heads, used * pool.shape[1], *rest)[:, :, :length]
