"""window_scores in Triton: two passes over tiles of the n x W attention, which never lies in memory.

The first finds every query's log-sum-exp, the second adds up what each key receives. Nothing is added atomically, so
the result is the same every time.
"""

import torch
import triton
import triton.language as tl

from ..precision import common_dtype
from .common import NOTHING, attention_logits, on_its_device
from .configs import means_config, totals_config


@triton.jit(do_not_specialize=["window", "count"])
def query_totals_kernel(
    queries,
    keys,
    totals,
    scaling,
    softcap,
    query_stride_b,
    query_stride_h,
    query_stride_s,
    key_stride_b,
    key_stride_h,
    key_stride_s,
    heads,
    group,
    window,
    count,
    size,
    PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Log to base 2 of each query's sum of exponentials: programs (B * Hq, tiles of n).

    queries              [B, Hq, n, D], of any strides but the last, any float
    keys                 [B, H, W, D], the same, of the same dtype
    totals               [B, Hq, n] float32, written
    """
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // (heads * group), row % (heads * group)
    earlier = (head % group) * window // (count * group)
    query = tl.program_id(1) * TILE + tl.arange(0, TILE)
    queries += batch * query_stride_b + head * query_stride_h
    keys += batch * key_stride_b + head // group * key_stride_h
    query_rows = queries + (query.to(tl.int64) * query_stride_s)[:, None]
    peak = tl.full([TILE], NOTHING, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    stop = window
    if CAUSAL:
        stop = tl.minimum(window, ((tl.program_id(1) + 1) * TILE * window - 1) // count + 1)
    for start in range(0, stop, TILE):
        key = start + tl.arange(0, TILE)
        key_columns = keys + (key.to(tl.int64) * key_stride_s)[None, :]
        logits = attention_logits(
            query_rows,
            query < count,
            key_columns,
            key < window,
            scaling,
            softcap,
            size,
            PAD,
            CHUNK,
            TILE,
            TILE,
            SOFTCAP,
        )
        seen = (key < window)[None, :]
        if CAUSAL:
            seen = seen & (key[None, :] <= (((query + 1) * window - 1) // count - earlier)[:, None])
        logits = tl.where(seen, logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        total = total * tl.exp2(peak - higher) + tl.sum(tl.exp2(logits - higher[:, None]), 1)
        peak = higher
    tl.store(totals + row * count + query, peak + tl.log2(total), mask=query < count)


@triton.jit(do_not_specialize=["window", "count"])
def key_means_kernel(
    queries,
    keys,
    totals,
    scores,
    scaling,
    softcap,
    query_stride_b,
    query_stride_h,
    query_stride_s,
    key_stride_b,
    key_stride_h,
    key_stride_s,
    heads,
    group,
    window,
    count,
    size,
    PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Mean over the queries of all G heads of what each key receives: programs (B * H, tiles of W).

    queries              [B, Hq, n, D], of any strides but the last, any float
    keys                 [B, H, W, D], the same, of the same dtype
    totals               [B, Hq, n] float32, of the first pass
    scores               [B, H, W] float32, written
    """
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, row % heads
    key = tl.program_id(1) * TILE + tl.arange(0, TILE)
    keys += batch * key_stride_b + head * key_stride_h
    key_columns = keys + (key.to(tl.int64) * key_stride_s)[None, :]
    received = tl.zeros([TILE], tl.float32)
    first = 0
    if CAUSAL:
        first = tl.program_id(1) * TILE * count // window
    for member in range(group):
        query_head = head * group + member
        earlier = member * window // (count * group)
        query_first = queries + batch * query_stride_b + query_head * query_stride_h
        for start in range(first, count, TILE):
            query = start + tl.arange(0, TILE)
            query_rows = query_first + (query.to(tl.int64) * query_stride_s)[:, None]
            logits = attention_logits(
                query_rows,
                query < count,
                key_columns,
                key < window,
                scaling,
                softcap,
                size,
                PAD,
                CHUNK,
                TILE,
                TILE,
                SOFTCAP,
            )
            place = (batch * heads * group + query_head) * count + query
            total = tl.load(totals + place, mask=query < count, other=0.0)
            seen = (query < count)[:, None]
            if CAUSAL:
                seen = seen & (key[None, :] <= (((query + 1) * window - 1) // count - earlier)[:, None])
            received += tl.sum(tl.where(seen, tl.exp2(logits - total[:, None]), 0.0), 0)
    tl.store(scores + row * window + key, received / (group * count), mask=key < window)


@on_its_device
def window_scores(
    queries: torch.Tensor,
    keys: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """As `kara_hf.kernels.window_scores`."""
    batch, query_heads, count, size = queries.shape
    heads, window = keys.shape[1:3]
    common = common_dtype(queries, keys)
    queries, keys = (part.to(common) for part in (queries, keys))
    queries, keys = (part if part.stride(-1) == 1 else part.contiguous() for part in (queries, keys))
    scores = queries.new_empty(batch, heads, window, dtype=torch.float32)
    if not scores.numel():
        return scores
    totals = queries.new_empty(batch, query_heads, count, dtype=torch.float32)
    settings = (
        scaling,
        softcap or 1.0,
        *queries.stride()[:3],
        *keys.stride()[:3],
        heads,
        query_heads // heads,
        window,
        count,
        size,
    )
    flags = {"SOFTCAP": softcap is not None, "CAUSAL": causal}
    of_totals, of_means = (config(queries.dtype, size) | flags for config in (totals_config, means_config))
    programs = batch * query_heads, triton.cdiv(count, of_totals["TILE"])
    query_totals_kernel[programs](queries, keys, totals, *settings, **of_totals)
    programs = batch * heads, triton.cdiv(window, of_means["TILE"])
    key_means_kernel[programs](queries, keys, totals, scores, *settings, **of_means)
    return scores
