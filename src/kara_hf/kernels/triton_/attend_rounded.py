"""The rounded part of attend in Triton: codes and ranges are read, and made numbers in registers.

Work is laid out as in `attend_kernel`; what it leaves are parts, to be merged with those of the tokens that are whole.
Queries come in the frame of their row's keys, and beside them what each of them makes of the centre.
"""

import torch
import triton
import triton.language as tl

from ..rows import RoundedRows, Rows
from .common import (
    LOG2E,
    NOTHING,
    check_paged,
    count_seen,
    leave_attention,
    pool_slots,
    processors,
    tanh,
)
from .configs import attend_rounded_config
from .observe import add_observed
from .split import WAVES, WIDTH_STEP, plan_splits


@triton.jit
def numbers_of(records, ranges, slot, stored, at, size, codes, BITS: tl.constexpr):
    """Elements `at` ``[1, D]`` or ``[D, 1]`` of the records in pool slots `slot` ``[T, 1]`` or ``[1, T]``, float32.

    `ranges` is the same memory in 16-bit words; a record has `codes` bytes of codes and two bfloat16 behind them.
    """
    words = slot * (codes // 2 + 2) + codes // 2
    step = tl.load(ranges + words, mask=stored, other=0)
    lowest = tl.load(ranges + words + 1, mask=stored, other=0)
    step = (step.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    lowest = (lowest.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    packed = tl.load(records + slot * (codes + 4) + at % codes, mask=stored & (at < size), other=0)
    if BITS == 8:
        code = packed.to(tl.float32)
    else:
        code = ((packed.to(tl.int32) >> (at // codes) * BITS) & ((1 << BITS) - 1)).to(tl.float32)
    return code * step + lowest


@triton.jit(do_not_specialize=["new", "span", "key_width", "value_width"])
def attend_rounded_kernel(
    query,
    beside,
    keys,
    key_ranges,
    values,
    value_ranges,
    key_table,
    value_table,
    lengths,
    whole_lengths,
    num_unseen,
    parts,
    lse,
    observed,
    scaling,
    softcap,
    key_width,
    value_width,
    block_size,
    heads,
    group,
    new,
    span,
    width,
    key_size,
    value_size,
    key_codes,
    value_codes,
    KEY_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE_QUERIES: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
):
    """Attention of a tile of a row's queries over a range of its records: programs (B * H, splits, tiles of G * S), of
    which there are two splits at least.

    query                [B, Hq, S, Dk] any float, in the keys' frame: products are of its dtype
    beside               [B, Hq, S] float32: products with the centre
    keys, values         [Nk, P, key_codes + 4], [Nv, P, value_codes + 4] uint8, records
    key_ranges, ...      the same in words of 16 bits, uint16
    key_table            [B, H, key_width] int32
    value_table          [B, H, value_width] int32
    lengths              [B, H] int32, of records
    whole_lengths        [B, H] int32, of other tokens: a query that sees none of those sees no record
    num_unseen           [B, S] int32, or None
    parts, lse           [splits, B, Hq, S, Dv] and [splits, B, Hq, S] float32, written
    observed             [B, Hq, S, width] float32, to base 2, written, -inf where a query sees nothing; or None
    """
    row = tl.program_id(0).to(tl.int64)
    batch = row // heads
    place = tl.program_id(2) * TILE_QUERIES + tl.arange(0, TILE_QUERIES)
    inside = place < group * new
    token = place // group
    head = (row % heads) * group + place % group

    result = (batch * heads * group + head) * new + token
    sees = count_seen(whole_lengths, num_unseen, row, heads, token, inside, new) > 0
    length = tl.load(lengths + row)
    first = tl.program_id(1) * span
    if observed is None:
        stop = tl.minimum(tl.max(tl.where(sees, length, 0), 0), first + span)
    else:
        stop = tl.minimum(length, first + span)

    query_rows = query + result.to(tl.int64)[:, None] * key_size
    centre = tl.load(beside + result, mask=inside, other=0.0)
    key_table += row * key_width
    value_table += row * value_width

    peak = tl.full([TILE_QUERIES], NOTHING, tl.float32)
    total = tl.zeros([TILE_QUERIES], tl.float32)
    acc = tl.zeros([TILE_QUERIES, VALUE_PAD], tl.float32)
    for start in range(first, stop, TILE_KEYS):
        slot = start + tl.arange(0, TILE_KEYS)
        stored = slot < stop
        key_slots = pool_slots(key_table, slot, stored, block_size)[None, :]
        logits = tl.zeros([TILE_QUERIES, TILE_KEYS], tl.float32)
        for begin in range(0, KEY_PAD, CHUNK):
            at = begin + tl.arange(0, CHUNK)
            part = tl.load(query_rows + at[None, :], mask=inside[:, None] & (at < key_size)[None, :], other=0.0)
            key = numbers_of(keys, key_ranges, key_slots, stored[None, :], at[:, None], key_size, key_codes, KEY_BITS)
            logits = tl.dot(part, key.to(part.dtype), logits, input_precision="ieee")
        logits = (logits + centre[:, None]) * scaling
        if SOFTCAP:
            logits = softcap * tanh(logits / softcap)
        visible = sees[:, None] & stored[None, :]
        logits = tl.where(visible, logits * LOG2E, float("-inf"))
        if observed is not None:
            where = observed + (result * width)[:, None] + slot[None, :]
            tl.store(where, logits, mask=inside[:, None] & stored[None, :])

        higher = tl.maximum(peak, tl.max(logits, 1))
        weights = tl.exp2(logits - higher[:, None])
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.sum(weights, 1)
        peak = higher
        value_slots = pool_slots(value_table, slot, stored, block_size)[:, None]
        at = tl.arange(0, VALUE_PAD)[None, :]
        value = numbers_of(values, value_ranges, value_slots, stored[:, None], at, value_size, value_codes, VALUE_BITS)
        value = value.to(query.dtype.element_ty)
        acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")

    queries = tl.num_programs(0).to(tl.int64) * group * new
    leave_attention(
        acc,
        peak,
        total,
        inside,
        head,
        result,
        result,
        queries,
        None,
        parts,
        parts,
        lse,
        None,
        value_size,
        VALUE_PAD,
    )


class RoundedAttention:
    """Attention of `query` ``[B, Hq, S, Dk]`` over the records of `rows`, to be merged with that over other tokens.

    Attributes:
        splits: parts that it makes.
    """

    def __init__(self, query: torch.Tensor, rows: Rows, rounded: RoundedRows, common: torch.dtype):
        check_paged(rounded)
        self.rows, self.rounded = rows, rounded
        batch, query_heads, new, self.key_size = query.shape
        self.heads = rows.lengths.shape[1]
        group = query_heads // self.heads
        self.value_size = rounded.value_packing.size
        framed, beside = rounded.framed(query.float().reshape(batch, self.heads, group * new, self.key_size))
        self.query = framed.view(query.shape).to(common)
        self.beside = beside.view(batch, query_heads, new).contiguous()
        self.constants = attend_rounded_config(self.key_size, self.value_size, group * new)
        tiles = triton.cdiv(group * new, self.constants["TILE_QUERIES"])
        target = WAVES * processors(query.device)
        splits, self.span = plan_splits(
            batch * self.heads * tiles, rounded.max_length, self.constants["TILE_KEYS"], None, target
        )
        self.splits = max(2, splits)  # of one alone the kernel would leave no part
        self.grid = batch * self.heads, self.splits, tiles
        self.observed: torch.Tensor | None = None

    def run(
        self,
        parts: torch.Tensor,
        lse: torch.Tensor,
        num_unseen: torch.Tensor | None,
        observes: bool,
        scaling: float,
        softcap: float | None,
    ) -> None:
        """Writes `parts` ``[splits, B, Hq, S, Dv]`` and `lse` ``[splits, B, Hq, S]``."""
        rounded, (batch, query_heads, new, _) = self.rounded, self.query.shape
        width = triton.cdiv(rounded.max_length, WIDTH_STEP) * WIDTH_STEP
        if observes:
            self.observed = parts.new_empty(batch, query_heads, new, width)
        attend_rounded_kernel[self.grid](
            self.query,
            self.beside,
            rounded.keys,
            rounded.keys.view(torch.uint16),
            rounded.values,
            rounded.values.view(torch.uint16),
            rounded.key_table,
            rounded.value_table,
            rounded.lengths,
            self.rows.lengths,
            num_unseen,
            parts,
            lse,
            self.observed,
            scaling,
            softcap or 1.0,
            rounded.key_table.shape[2],
            rounded.value_table.shape[2],
            rounded.block_size,
            self.heads,
            query_heads // self.heads,
            new,
            self.span,
            width,
            self.key_size,
            self.value_size,
            rounded.key_packing.codes,
            rounded.value_packing.codes,
            SOFTCAP=softcap is not None,
            KEY_BITS=rounded.key_packing.bits,
            VALUE_BITS=rounded.value_packing.bits,
            **self.constants,
        )

    def add_observed(self, totals: torch.Tensor, metric_power: int) -> None:
        """Adds to the metric of records what attention gave them, once `totals` are known; see `add_observed`."""
        assert self.observed is not None
        all_seen = self.rows.lengths.new_zeros(len(totals), totals.shape[2])
        add_observed(self.rounded, self.observed, totals, all_seen, metric_power)
