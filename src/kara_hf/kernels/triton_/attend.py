"""attend in Triton: split-K attention over paged rows, all query heads of a row in one program.

The query rows of one (sequence, KV head) are ordered token by token, its G query heads side by side. A program takes
`tile_queries` of them and reads one range of the row's tokens, in tiles of `tile_keys`; the ranges are merged by their
log-sum-exp. Work follows a row's own length: what a short row lacks is not read.

What is observed takes a second kernel, because a probability is known once all ranges are merged: this one leaves the
logits, and with one range what they add up to.
"""

import torch
import triton
import triton.language as tl

from ..rows import Rows
from .attend_rounded import RoundedAttention
from .common import (
    NOTHING,
    add_values,
    attention_logits,
    check_paged,
    count_seen,
    leave_attention,
    on_its_device,
    pool_slots,
    processors,
    read_dtypes,
)
from .configs import attend_config
from .merge import merge_into
from .observe import add_observed
from .split import WAVES, WIDTH_STEP, plan_splits


@triton.jit(do_not_specialize=["new", "span", "key_width", "value_width"])
def attend_kernel(
    query,
    keys,
    values,
    key_table,
    value_table,
    lengths,
    num_unseen,
    sink_logits,
    out,
    parts,
    lse,
    observed,
    totals,
    scaling,
    softcap,
    query_stride_b,
    query_stride_h,
    query_stride_s,
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
    KEY_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE_QUERIES: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Attention of a tile of a row's queries over a range of its tokens: programs (B * H, splits, tiles of G * S).

    query                [B, Hq, S, Dk], of any strides but the last, any float: products are of its dtype
    keys, values         [Nk, P, Dk], [Nv, P, Dv]   any float; of the same dtype or not
    key_table            [B, H, key_width] int32
    value_table          [B, H, value_width] int32
    lengths              [B, H] int32
    num_unseen           [B, S] int32, or None
    sink_logits          [Hq] any float, or None
    out                  [B, S, Hq, Dv] any float, where one range has all tokens
    parts, lse           [splits, B, Hq, S, Dv] and [splits, B, Hq, S] float32, elsewhere
    observed, totals     [B, Hq, S, width] and [B, Hq, S] float32, to base 2, or None

    Writes `out`, or `parts` and `lse`; and `observed` and, where one range has all tokens, `totals`.
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    batch = row // heads
    place = tl.program_id(2) * TILE_QUERIES + tl.arange(0, TILE_QUERIES)
    inside = place < group * new
    token = place // group
    head = (row % heads) * group + place % group

    result = (batch * heads * group + head) * new + token
    seen = count_seen(lengths, num_unseen, row, heads, token, inside, new)
    first = split * span
    stop = tl.minimum(tl.max(seen, 0), first + span)

    query += batch * query_stride_b
    query_rows = query + (head * query_stride_h + token.to(tl.int64) * query_stride_s)[:, None]
    key_table += row * key_width
    value_table += row * value_width

    peak = tl.full([TILE_QUERIES], NOTHING, tl.float32)
    total = tl.zeros([TILE_QUERIES], tl.float32)
    acc = tl.zeros([TILE_QUERIES, VALUE_PAD], tl.float32)
    for start in range(first, stop, TILE_KEYS):
        slot = start + tl.arange(0, TILE_KEYS)
        stored = slot < stop
        key_rows = keys + (pool_slots(key_table, slot, stored, block_size) * key_size)[None, :]
        logits = attention_logits(
            query_rows,
            inside,
            key_rows,
            stored,
            scaling,
            softcap,
            key_size,
            KEY_PAD,
            CHUNK,
            TILE_QUERIES,
            TILE_KEYS,
            SOFTCAP,
        )
        visible = slot[None, :] < seen[:, None]
        if observed is not None:
            tl.store(observed + (result * width)[:, None] + slot[None, :], logits, mask=visible)
        logits = tl.where(visible, logits, float("-inf"))
        value_slots = pool_slots(value_table, slot, stored, block_size)
        acc, peak, total = add_values(
            acc, peak, total, logits, query, values, value_slots, stored, value_size, VALUE_PAD
        )

    # out is laid out [B, S, Hq, Dv], so that the transpose that follows attention is contiguous already.
    place = (batch * new + token) * heads * group + head
    queries = tl.num_programs(0).to(tl.int64) * group * new
    leave_attention(
        acc,
        peak,
        total,
        inside,
        head,
        result,
        place,
        queries,
        sink_logits,
        out,
        parts,
        lse,
        totals,
        value_size,
        VALUE_PAD,
    )


@on_its_device
def attend(
    query: torch.Tensor,
    rows: Rows,
    *,
    scaling: float,
    num_unseen: torch.Tensor | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    metric_power: int | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """As `kara_hf.kernels.attend`, of rows that hold something. `splits` forces a number of ranges."""
    batch, query_heads, new, key_size = query.shape
    check_paged(rows)
    dtype, (common, itemsize) = query.dtype, read_dtypes(query, rows)
    rounded = None if rows.rounded is None else RoundedAttention(query, rows, rows.rounded, common)
    query = query.to(common)
    heads, value_size = rows.lengths.shape[1], rows.values.shape[-1]
    group = query_heads // heads
    if query.stride(-1) != 1:
        query = query.contiguous()
    num_unseen = None if num_unseen is None else num_unseen.contiguous()
    sink_logits = None if sink_logits is None else sink_logits.contiguous()
    constants = attend_config(itemsize, key_size, value_size, group * new, metric_power is not None)
    tiles = -(-group * new // constants["TILE_QUERIES"])
    target = WAVES * processors(query.device)
    splits, span = plan_splits(batch * heads * tiles, rows.max_length, constants["TILE_KEYS"], splits, target)

    def scratch(*shape: int) -> torch.Tensor:
        return query.new_empty(shape, dtype=torch.float32)

    if rounded is not None:
        splits = max(2, splits)  # of one alone the kernel would leave no part to merge

    out = query.new_empty(batch, new, query_heads, value_size, dtype=dtype).transpose(1, 2)
    kept = splits if splits > 1 else 0  # of one range no part is kept: the kernel writes `out`
    kept += 0 if rounded is None else rounded.splits
    parts, lse = scratch(kept, batch, query_heads, new, value_size), scratch(kept, batch, query_heads, new)
    width = -(-rows.max_length // WIDTH_STEP) * WIDTH_STEP
    observed = totals = None
    if metric_power is not None:
        observed, totals = scratch(batch, query_heads, new, width), scratch(batch, query_heads, new)
    if not out.numel():
        return out
    attend_kernel[batch * heads, splits, tiles](
        query,
        rows.keys,
        rows.values,
        rows.key_table,
        rows.value_table,
        rows.lengths,
        num_unseen,
        sink_logits,
        out,
        parts,
        lse,
        observed,
        totals,
        scaling,
        softcap or 1.0,
        query.stride(0),
        query.stride(1),
        query.stride(2),
        rows.key_table.shape[2],
        rows.value_table.shape[2],
        rows.block_size,
        heads,
        group,
        new,
        span,
        width,
        key_size,
        value_size,
        SOFTCAP=softcap is not None,
        **constants,
    )
    if rounded is not None:
        observes = metric_power is not None
        rounded.run(parts[splits:], lse[splits:], num_unseen, observes, scaling, softcap)
    if splits > 1:
        merge_into(out, parts, lse, sink_logits, totals)
    if metric_power is not None and observed is not None and totals is not None:
        add_observed(rows, observed, totals, num_unseen, metric_power)
        if rounded is not None:
            rounded.add_observed(totals, metric_power)
    return out
