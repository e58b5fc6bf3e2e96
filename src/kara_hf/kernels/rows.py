"""The paged rows of one layer, as the kernels see them.

A row is one (sequence, KV head). Its tokens lie in blocks of P slots; a block id is an index into the pool. Keys and
values have a table each, because another layer's keys may stand in for a row's own.
"""

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from .rounding import Packing, out_of_frame, rotation


@dataclass(frozen=True)
class Proximal:
    """Which tokens are proximal to a query: the `first` of a sequence, and the newest `recent`, its own among them."""

    first: int
    recent: int

    def distant(self, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
        """Which keys are distant to a query; the two broadcast."""
        return (key_positions >= self.first) & (key_positions <= query_positions - self.recent)


@dataclass
class ProximalKeys:
    """Keys of the F heads of a layer that store those of proximal tokens only; distant ones are another layer's.

    The key of the token at true position p lies at place p where ``p < bounds.first``, and at ``bounds.first + (p -
    bounds.first) % ring`` elsewhere, so that each new key takes the place of the oldest.

    Attributes:
        heads: KV heads, ascending.
        keys: ``[B, F, R, Dk]``; R grows up to ``bounds.first + ring``.
        bounds: what is proximal.
        ring: places of the newest tokens, at least ``bounds.recent``.
        index: `heads`, ``[F]`` int64.
        rest: the other heads, which store all their keys, ``[K]`` int64.
    """

    heads: tuple[int, ...]
    keys: torch.Tensor
    bounds: Proximal
    ring: int
    index: torch.Tensor
    rest: torch.Tensor

    def places(self, positions: torch.Tensor) -> torch.Tensor:
        """Where the keys of tokens at true `positions` lie; of the shape and dtype of `positions`."""
        first = self.bounds.first
        return torch.where(positions < first, positions, first + (positions - first) % self.ring)

    def runs(self, tokens: int) -> list[tuple[int, int, int]]:
        """Proximal positions of the last of `tokens` tokens as runs ``(start, stop, place of start)``."""
        first, oldest = self.bounds.first, max(self.bounds.first, tokens - self.bounds.recent)
        runs = [(0, min(first, tokens), 0)] if first else []
        while oldest < tokens:
            place = (oldest - first) % self.ring
            stop = min(tokens, oldest + self.ring - place)
            runs.append((oldest, stop, first + place))
            oldest = stop
        return runs


@dataclass
class Rows:
    """One layer's keys and values for B sequences and H KV heads.

    Attributes:
        keys: pool of key blocks, ``[Nk, P, Dk]``.
        values: pool of value blocks, ``[Nv, P, Dv]``; keys and values have a dtype each.
        positions: true position of the token in every value slot, ``[Nv, P]`` int32.
        key_table: block ids, ``[B, H, M]`` int32; entries past a row's last block are -1, and all of a row that is in
            `proximal`.
        value_table: block ids, ``[B, H, M]`` int32; as ``key_table``.
        lengths: tokens stored in each row, ``[B, H]`` int32.
        max_length: upper bound of the lengths, at most ``M * P``, known without asking the device. No result depends
            on it: a CUDA graph replays a step with one bound for many lengths.
        uniform: whether every row has exactly ``max_length`` tokens.
        contiguous: whether the blocks of the rows lie one after the other in both pools, row after row, ``M`` each, so
            that a row can be read in place.
        metric: running importance of the token in every value slot, ``[Nv, P]`` float32; None where none is kept.
        starts: on the host, flat slot of each row's first token, ``[B, H]`` int64, the same in all pools, where the
            blocks of every row follow one another, so that it can be read in place; None elsewhere, on a GPU, and
            where some heads are in `proximal`.
        proximal: heads that store keys of proximal tokens only, or None. `contiguous` is about the blocks of others.
        in_order: whether slot s of every row holds the token at position s.
        read_as: dtype that attention rounds keys and values to; None: it takes them as they are stored.
        rounded: tokens of the same rows that are stored in few bits, in front of all others; None: there are none. All
            else here is about the others, among which every token is that some query of a step does not see.
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
    proximal: ProximalKeys | None = None
    in_order: bool = False
    read_as: torch.dtype | None = None
    rounded: "RoundedRows | None" = None

    @property
    def columns(self) -> int:
        """Columns of `all_keys`: slots of the longest row, those of rounded tokens and of others counted apart."""
        return self.max_length + (0 if self.rounded is None else self.rounded.max_length)

    @property
    def block_size(self) -> int:
        return self.keys.shape[1]

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of keys and of values, as stored."""
        return self.keys.dtype, self.values.dtype

    @property
    def key_heads(self) -> torch.Tensor | None:
        """The K heads whose keys are stored whole, ``[K]`` int64; None: all."""
        return None if self.proximal is None else self.proximal.rest

    def read(self, part: torch.Tensor) -> torch.Tensor:
        """Keys or values as attention takes them."""
        return part if self.read_as is None or part.dtype == torch.float64 else part.to(self.read_as)

    def of_keys(self, rows: torch.Tensor) -> torch.Tensor:
        """What `rows` ``[b, H, ...]`` says of the heads whose keys are stored whole, ``[b, K, ...]``."""
        return rows if self.key_heads is None else rows.index_select(1, self.key_heads)

    @cached_property
    def in_place(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Keys ``[B, K, M * P, Dk]`` and values, positions and metric ``[B, H, M * P, ...]`` as views of the pools, of
        contiguous rows.
        """
        batch, heads, blocks = self.value_table.shape
        slots = blocks * self.block_size

        def view(pool: torch.Tensor, heads: int) -> torch.Tensor:
            return pool.narrow(0, 0, batch * heads * blocks).view(batch, heads, slots, *pool.shape[2:])

        metric = None if self.metric is None else view(self.metric, heads)
        whole = heads if self.key_heads is None else len(self.key_heads)
        return view(self.keys, whole), view(self.values, heads), view(self.positions, heads), metric

    @property
    def value_parts(self) -> tuple[torch.Tensor, ...]:
        """The pools that the value table leads to: values, positions and, where there is one, the metric."""
        beside = () if self.metric is None else (self.metric,)
        return self.values, self.positions, *beside

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys ``[B, K, max_length, Dk]`` of heads that store all, and values ``[B, H, max_length, Dv]``; in place
        where rows are contiguous, else gathered.

        Slots past a row's own length hold anything.
        """
        if self.contiguous:
            keys, values, _, _ = self.in_place
            keys, values = keys.narrow(2, 0, self.max_length), values.narrow(2, 0, self.max_length)
        else:
            keys = gather_rows(self.keys, self.of_keys(self.key_table), self.max_length)
            values = gather_rows(self.values, self.value_table, self.max_length)
        return self.read(keys), self.read(values)

    def keys_of(self, head: int) -> torch.Tensor:
        """Keys ``[B, 1, max_length, Dk]`` of a head that stores all; in place, gathered and filled up as `dense`."""
        if self.contiguous:
            before = 0 if self.proximal is None else bisect_left(self.proximal.heads, head)
            keys = self.in_place[0].narrow(1, head - before, 1).narrow(2, 0, self.max_length)
        else:
            keys = gather_rows(self.keys, self.key_table.narrow(1, head, 1), self.max_length)
        return self.read(keys)

    def dense_positions(self) -> torch.Tensor:
        """True positions ``[B, H, max_length]`` int32, or ``[B, 1, max_length]`` where rows are in order; -1 where a
        row has no token.
        """
        slots = torch.arange(self.max_length, dtype=torch.int32, device=self.lengths.device)
        if self.in_order:
            lengths, positions = self.lengths[:, :1], slots.expand(len(self.lengths), 1, -1)
        else:
            lengths, positions = self.lengths, gather_rows(self.positions, self.value_table, self.max_length)
        return positions.masked_fill(slots >= lengths[..., None], -1)

    def dense_keys(self) -> torch.Tensor:
        """Keys of every head ``[B, H, max_length, Dk]``; in `proximal` anything finite is there for distant tokens."""
        keys, _ = self.dense()
        proximal = self.proximal
        if proximal is None or self.key_heads is None:
            return keys
        batch, heads = self.lengths.shape
        places = proximal.places(self.dense_positions()).clamp(0, max(0, proximal.keys.shape[2] - 1))
        places = places if places.shape[1] == 1 else places.index_select(1, proximal.index)
        index = places[..., None].expand(-1, len(proximal.heads), -1, keys.shape[-1]).long()
        out = keys.new_empty(batch, heads, *keys.shape[2:])
        out[:, self.key_heads] = keys
        out[:, proximal.index] = self.read(proximal.keys.gather(2, index))
        return out

    def all_keys(self) -> torch.Tensor:
        """As `dense_keys` with what is rounded in front, ``[B, H, columns, Dk]``."""
        keys = self.dense_keys()
        if self.rounded is None:
            return keys
        rounded = self.rounded.dense()[0].to(keys.dtype)
        if self.key_heads is not None:
            everyone = rounded.new_zeros(*self.lengths.shape, *rounded.shape[2:])
            rounded = everyone.index_copy_(1, self.key_heads, rounded)
        return torch.cat([rounded, keys], 2)

    def all_values(self) -> torch.Tensor:
        """As `dense` with what is rounded in front, ``[B, H, columns, Dv]``."""
        values = self.dense()[1]
        return values if self.rounded is None else torch.cat([self.rounded.dense()[1].to(values.dtype), values], 2)

    def all_positions(self) -> torch.Tensor:
        """As `dense_positions` with what is rounded in front, ``[B, 1 or H, columns]``."""
        positions = self.dense_positions()
        if self.rounded is None:
            return positions
        return torch.cat([self.rounded.dense_positions(), positions.expand(*self.lengths.shape, -1)], 2)

    def all_slots(self) -> torch.Tensor:
        """Which slot of its row every column of `all_keys` is, rounded tokens counted first, ``[B, H, columns]`` int64;
        `columns` where there is no token. Rows of the same tokens in other layers may have them in other columns.
        """
        lengths = self.lengths[..., None].long()
        slots = torch.arange(self.max_length, device=lengths.device)
        if self.rounded is None:
            return torch.where(slots < lengths, slots, self.columns)
        before = self.rounded.lengths[..., None].long()
        first = torch.arange(self.rounded.max_length, device=lengths.device)
        parts = (
            torch.where(first < before, first, self.columns),
            torch.where(slots < lengths, before + slots, self.columns),
        )
        return torch.cat(parts, 2)


@dataclass(kw_only=True)
class RoundedRows(Rows):
    """Rows whose keys and values are records, uint8: what a `Rows` has settled, in front of its own tokens.

    All of `Rows` holds of them; `positions` is empty where these follow from slots. Heads whose keys are another
    layer's have none here.

    Attributes:
        key_packing, value_packing: what records of keys and of values are.
        frame: of the keys, ``[B, K, 2, Dk]`` float32; see `kara_hf.kernels.rounding`.
        begin: position of slot 0 where `positions` is empty.
        with_keys: the heads whose keys are here, ``[K]`` int64; None: all.
    """

    key_packing: Packing
    value_packing: Packing
    frame: torch.Tensor
    begin: int = 0
    with_keys: torch.Tensor | None = None

    @property
    def key_heads(self) -> torch.Tensor | None:
        return self.with_keys

    def records(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of keys ``[B, K, max_length, width]`` and of values ``[B, H, max_length, width]``, as `Rows.dense`."""
        return Rows.dense(self)

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys ``[B, K, max_length, Dk]`` and values ``[B, H, max_length, Dv]`` that the records stand for, float32."""
        keys, values = self.records()
        return out_of_frame(self.key_packing.unpack(keys), self.frame), self.value_packing.unpack(values)

    def dense_positions(self) -> torch.Tensor:
        """True positions ``[B, H, max_length]`` int32; -1 where a row has no token."""
        slots = torch.arange(self.max_length, dtype=torch.int32, device=self.lengths.device)
        if self.positions.dim() == 3:
            positions = (slots + self.begin).expand(*self.lengths.shape, -1)
        else:
            positions = gather_rows(self.positions, self.value_table, self.max_length)
        return positions.masked_fill(slots >= self.lengths[..., None], -1)

    def framed(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What `queries` ``[B, K, N, Dk]`` float32 are to keys in their frame: themselves there ``[B, K, N, Dk]``, and
        their products with the centre ``[B, K, N, 1]``. A product with a key is that in the frame plus the latter.
        """
        centre, spread = self.frame.unbind(2)
        inside = queries * spread[:, :, None] @ rotation(queries.shape[-1], queries.device)
        return inside, queries @ centre[..., None]


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
