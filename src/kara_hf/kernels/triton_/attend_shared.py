"""attend_shared in Triton: a decode step as `attend` takes it, with keys of heads that follow left to their leads.

One program takes a (sequence, KV head) and a range of its tokens. A head whose keys are stored whole reads them as
`attend` does and, where it leads, leaves their logits. A head that follows takes the logits of distant tokens from
there and asks no pool for their keys; a tile of tokens without a proximal one costs it no product either.
"""

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl

from ..rows import Rows
from .common import (
    LN2,
    LOG2E,
    NOTHING,
    add_values,
    attention_logits,
    check_paged,
    leave_attention,
    on_its_device,
    pool_slots,
    processors,
    read_dtypes,
)
from .configs import attend_shared_config, lead_scores_config
from .merge import merge_into
from .observe import add_observed
from .split import WAVES, WIDTH_STEP, plan_splits

EVERYTHING = torch.iinfo(torch.int32).max


@triton.jit(do_not_specialize=["span", "key_width", "value_width", "recent", "first_tokens", "ring", "proximal_places"])
def attend_shared_kernel(
    query,
    keys,
    values,
    proximal_keys,
    scores,
    slot_positions,
    roles,
    positions,
    key_table,
    value_table,
    lengths,
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
    key_width,
    value_width,
    block_size,
    heads,
    group,
    span,
    width,
    scores_width,
    followers,
    proximal_places,
    first_tokens,
    recent,
    ring,
    key_size,
    value_size,
    KEY_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE_QUERIES: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """The same for one query of each sequence, where heads may follow: programs (B * H, splits, tiles of G).

    query                [B, Hq, 1, Dk], of any strides but the last, any float: products are of its dtype
    keys, values         [Nk, P, Dk], [Nv, P, Dv]   any float; of the same dtype or not
    key_table            [B, H, key_width] int32
    value_table          [B, H, value_width] int32
    lengths              [B, H] int32
    proximal_keys        [B, followers, proximal_places, Dk] any float, or None
    scores               [B, H, G, 1, scores_width] float32: read where a head follows, written where it leads
    slot_positions       [Nv, P] int32, or None where slots are positions
    roles                [H] int32, see `head_roles`
    positions            [B, 1] int32, negative for padding
    sink_logits          [Hq] any float, or None
    out                  [B, 1, Hq, Dv] any float, where one range has all tokens
    parts, lse           [splits, B, Hq, 1, Dv] and [splits, B, Hq, 1] float32, elsewhere
    observed, totals     [B, Hq, 1, width] and [B, Hq, 1] float32, to base 2, or None

    Writes what `attend_kernel` writes, and `scores`.
    """
    row = tl.program_id(0).to(tl.int64)
    batch = row // heads
    place = tl.program_id(2) * TILE_QUERIES + tl.arange(0, TILE_QUERIES)
    inside = place < group
    head = (row % heads) * group + place
    result = row * group + place

    position = tl.load(positions + batch)
    first = tl.program_id(1) * span
    stop = tl.minimum(tl.where(position < 0, 0, tl.load(lengths + row)), first + span)

    query_rows = query + (batch * query_stride_b + head * query_stride_h)[:, None]
    key_table += row * key_width
    value_table += row * value_width
    left = scores + (result * scores_width)[:, None]
    role = tl.load(roles + row % heads)
    handed_on = tl.where(role == -1, stop, 0)

    peak = tl.full([TILE_QUERIES], NOTHING, tl.float32)
    total = tl.zeros([TILE_QUERIES], tl.float32)
    acc = tl.zeros([TILE_QUERIES, VALUE_PAD], tl.float32)
    if role < 0:
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
            visible = inside[:, None] & stored[None, :]
            tl.store(left + slot[None, :], logits * LN2, mask=inside[:, None] & (slot < handed_on)[None, :])
            if observed is not None:
                tl.store(observed + (result * width)[:, None] + slot[None, :], logits, mask=visible)
            logits = tl.where(visible, logits, float("-inf"))
            value_slots = pool_slots(value_table, slot, stored, block_size)
            acc, peak, total = add_values(
                acc, peak, total, logits, query, values, value_slots, stored, value_size, VALUE_PAD
            )
    elif proximal_keys is not None:
        own_keys = proximal_keys + (batch * followers + role) * proximal_places * key_size
        for start in range(first, stop, TILE_KEYS):
            slot = start + tl.arange(0, TILE_KEYS)
            stored = slot < stop
            value_slots = pool_slots(value_table, slot, stored, block_size)
            here = slot
            if slot_positions is not None:
                here = tl.load(slot_positions + value_slots, mask=stored, other=0)
            distant = (here >= first_tokens) & (here <= position - recent)
            visible = inside[:, None] & stored[None, :]
            lent = inside[:, None] & (stored & distant)[None, :]
            logits = tl.load(left + slot[None, :], mask=lent, other=float("-inf")) * LOG2E
            proximal = stored & (distant == 0)
            if tl.max(proximal.to(tl.int32), 0) > 0:
                kept = tl.where(here < first_tokens, here, first_tokens + (here - first_tokens) % ring)
                key_rows = own_keys + (kept.to(tl.int64) * key_size)[None, :]
                own = attention_logits(
                    query_rows,
                    inside,
                    key_rows,
                    proximal,
                    scaling,
                    softcap,
                    key_size,
                    KEY_PAD,
                    CHUNK,
                    TILE_QUERIES,
                    TILE_KEYS,
                    SOFTCAP,
                )
                logits = tl.where(proximal[None, :] & inside[:, None], own, logits)
            if observed is not None:
                tl.store(observed + (result * width)[:, None] + slot[None, :], logits, mask=visible)
            acc, peak, total = add_values(
                acc, peak, total, logits, query, values, value_slots, stored, value_size, VALUE_PAD
            )

    queries = tl.num_programs(0).to(tl.int64) * group
    leave_attention(
        acc,
        peak,
        total,
        inside,
        head,
        result,
        result,
        queries,
        sink_logits,
        out,
        parts,
        lse,
        totals,
        value_size,
        VALUE_PAD,
    )


@triton.jit(do_not_specialize=["key_width"])
def lead_scores_kernel(
    query,
    keys,
    scores,
    named,
    key_table,
    lengths,
    scaling,
    softcap,
    query_stride_b,
    query_stride_h,
    key_width,
    block_size,
    heads,
    group,
    named_heads,
    scores_width,
    size,
    PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE_QUERIES: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Logits of a tile of a row's tokens: programs (tiles of tokens, B * named_heads, tiles of G).

    query                [B, Hq, 1, D], of any strides but the last, any float: products are of its dtype
    keys                 [Nk, P, D] any float
    scores               [B, H, G, 1, scores_width] float32, written in the named heads
    named                [named_heads] int32
    key_table            [B, H, key_width] int32
    lengths              [B, H] int32
    """
    batch = tl.program_id(1).to(tl.int64) // named_heads
    row = batch * heads + tl.load(named + tl.program_id(1) % named_heads)
    place = tl.program_id(2) * TILE_QUERIES + tl.arange(0, TILE_QUERIES)
    inside = place < group
    slot = tl.program_id(0) * TILE_KEYS + tl.arange(0, TILE_KEYS)
    stored = slot < tl.load(lengths + row)
    key_rows = keys + (pool_slots(key_table + row * key_width, slot, stored, block_size) * size)[None, :]
    head = (row % heads) * group + place
    query_rows = query + (batch * query_stride_b + head * query_stride_h)[:, None]
    logits = attention_logits(
        query_rows,
        inside,
        key_rows,
        stored,
        scaling,
        softcap,
        size,
        PAD,
        CHUNK,
        TILE_QUERIES,
        TILE_KEYS,
        SOFTCAP,
    )
    left = scores + ((row * group + place) * scores_width)[:, None] + slot[None, :]
    tl.store(left, logits * LN2, mask=inside[:, None] & stored[None, :])


@cache
@torch.inference_mode(False)
def on_device(numbers: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """`numbers` ``[n]`` int32, uploaded once and for good: an upload in every step would wait, and spoil a graph."""
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def head_roles(rows: Rows, leading: Sequence[int]) -> tuple[int, ...]:
    """What each head does: its place in `rows.proximal` where it follows, -1 where it leads, -2 elsewhere."""
    following = () if rows.proximal is None else rows.proximal.heads
    return tuple(
        following.index(head) if head in following else -1 if head in leading else -2
        for head in range(rows.lengths.shape[1])
    )


@on_its_device
def attend_shared(
    query: torch.Tensor,
    rows: Rows,
    scores: torch.Tensor | None,
    *,
    positions: torch.Tensor,
    leading: Sequence[int],
    scaling: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    metric_power: int | None = None,
    splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `kara_hf.kernels.attend_shared` without `skip`. `splits` forces a number of ranges."""
    batch, query_heads, _, key_size = query.shape
    check_paged(rows)
    dtype, (common, itemsize) = query.dtype, read_dtypes(query, rows)
    query = query.to(common)
    heads, value_size, proximal = rows.lengths.shape[1], rows.values.shape[-1], rows.proximal
    group = query_heads // heads
    if query.stride(-1) != 1:
        query = query.contiguous()
    positions = positions.contiguous()
    sink_logits = None if sink_logits is None else sink_logits.contiguous()
    width = triton.cdiv(rows.max_length, WIDTH_STEP) * WIDTH_STEP

    def scratch(*shape: int) -> torch.Tensor:
        return query.new_empty(shape, dtype=torch.float32)

    if scores is None:
        scores = scratch(batch, heads, group, 1, width)
    elif leading and scores.shape[-1] < rows.max_length:
        scores = torch.cat([scores, scratch(batch, heads, group, 1, width - scores.shape[-1])], -1)
    scores = scores.contiguous()

    constants = attend_shared_config(itemsize, key_size, value_size)
    tiles = triton.cdiv(group, constants["TILE_QUERIES"])
    target = WAVES * processors(query.device)
    splits, span = plan_splits(batch * heads * tiles, rows.max_length, constants["TILE_KEYS"], splits, target)
    out = query.new_empty(batch, 1, query_heads, value_size, dtype=dtype).transpose(1, 2)
    kept = splits if splits > 1 else 0  # of one range no part is kept: the kernel writes `out`
    parts, lse = scratch(kept, batch, query_heads, 1, value_size), scratch(kept, batch, query_heads, 1)
    observed = totals = None
    if metric_power is not None:
        observed, totals = scratch(batch, query_heads, 1, width), scratch(batch, query_heads, 1)
    attend_shared_kernel[batch * heads, splits, tiles](
        query,
        rows.keys,
        rows.values,
        None if proximal is None else proximal.keys,
        scores,
        None if proximal is None or rows.in_order else rows.positions,
        on_device(head_roles(rows, leading), query.device),
        positions,
        rows.key_table,
        rows.value_table,
        rows.lengths,
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
        rows.key_table.shape[2],
        rows.value_table.shape[2],
        rows.block_size,
        heads,
        group,
        span,
        width,
        scores.shape[-1],
        *(
            (0, 0, 0, 0, 0)
            if proximal is None
            else (*proximal.keys.shape[1:3], proximal.bounds.first, proximal.bounds.recent, proximal.ring)
        ),
        key_size,
        value_size,
        SOFTCAP=softcap is not None,
        **constants,
    )
    if splits > 1:
        merge_into(out, parts, lse, sink_logits, totals)
    if metric_power is not None and observed is not None and totals is not None:
        num_unseen = torch.zeros_like(positions).masked_fill(positions < 0, EVERYTHING)
        add_observed(rows, observed, totals, num_unseen, metric_power)
    return out, scores


@on_its_device
def lead_scores(
    query: torch.Tensor,
    leads: Sequence[Rows],
    heads: Sequence[int],
    scores: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
) -> None:
    """Writes what `kara_hf.kernels.lead_scores` returns to `scores`: one launch for each lead."""
    batch, all_heads, group, _, width = scores.shape
    size = query.shape[-1]
    given = query if query.stride(-1) == 1 else query.contiguous()
    for rows in {id(rows): rows for rows in leads}.values():
        check_paged(rows)
        common, itemsize = read_dtypes(given, rows)
        query, constants = given.to(common), lead_scores_config(itemsize, size)
        named = tuple(head for head, lead in zip(heads, leads, strict=True) if lead is rows)
        lead_scores_kernel[
            triton.cdiv(rows.max_length, constants["TILE_KEYS"]),
            batch * len(named),
            triton.cdiv(group, constants["TILE_QUERIES"]),
        ](
            query,
            rows.keys,
            scores,
            on_device(named, query.device),
            rows.key_table,
            rows.lengths,
            scaling,
            softcap or 1.0,
            query.stride(0),
            query.stride(1),
            rows.key_table.shape[2],
            rows.block_size,
            all_heads,
            group,
            len(named),
            width,
            size,
            SOFTCAP=softcap is not None,
            **constants,
        )
