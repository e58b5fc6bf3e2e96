"""merge in Triton: every program joins the parts of a few queries, one part after the other."""

import torch
import triton
import triton.language as tl

from .common import LOG2E, NOTHING, on_its_device
from .configs import MERGE_TILE, merge_config


@triton.jit(do_not_specialize=["count", "new", "queries"])
def merge_kernel(
    parts,
    lse,
    sink_logits,
    out,
    totals,
    count,
    queries,
    heads,
    new,
    size,
    PAD: tl.constexpr,
    TILE: tl.constexpr,
):
    """Joins the parts of a tile of queries: programs (tiles of B * Hq * S).

    parts, lse           [count, B, Hq, S, D] and [count, B, Hq, S] float32
    sink_logits          [Hq] any float, or None
    out                  [B, S, Hq, D] any float, written
    totals               [B, Hq, S] float32, to base 2, written; or None
    """
    query = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    valid = query < queries
    token, head, batch = query % new, query // new % heads, query // new // heads
    at = tl.arange(0, PAD)
    fits = valid[:, None] & (at < size)[None, :]

    acc = tl.zeros([TILE, PAD], tl.float32)
    peak = tl.full([TILE], NOTHING, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    if sink_logits is not None:
        peak = tl.load(sink_logits + head, mask=valid, other=0.0).to(tl.float32) * LOG2E
        total += 1.0
    for part in range(count):
        place = part * queries.to(tl.int64) + query
        logit = tl.load(lse + place, mask=valid, other=float("-inf")) * LOG2E
        # A part that had nothing to see may hold anything.
        value = tl.load(parts + place[:, None] * size + at, mask=fits & (logit > float("-inf"))[:, None], other=0.0)
        higher = tl.maximum(peak, logit)
        shrink, weight = tl.exp2(peak - higher), tl.exp2(logit - higher)
        acc = acc * shrink[:, None] + value * weight[:, None]
        total = total * shrink + weight
        peak = higher

    total = tl.where(total > 0, total, 1.0)
    if totals is not None:
        tl.store(totals + query, peak + tl.log2(total), mask=valid)
    acc = acc / total[:, None]
    result = (batch * new + token) * heads + head  # out is laid out [B, S, Hq, Dv]
    tl.store(out + result[:, None] * size + at, acc.to(out.dtype.element_ty), mask=fits)


def merge_into(
    out: torch.Tensor,
    parts: torch.Tensor,
    lse: torch.Tensor,
    sink_logits: torch.Tensor | None,
    totals: torch.Tensor | None = None,
) -> None:
    """Writes what `merge` returns to `out` ``[B, Hq, S, Dv]``, which is laid out as ``[B, S, Hq, Dv]``.

    `totals` ``[B, Hq, S]`` float32, where there is one, gets the log to base 2 of the sum of each query's exponentials,
    sinks included.
    """
    count, batch, heads, new, size = parts.shape
    queries = batch * heads * new
    merge_kernel[triton.cdiv(queries, MERGE_TILE),](
        parts,
        lse,
        sink_logits,
        out,
        totals,
        count,
        queries,
        heads,
        new,
        size,
        **merge_config(size),
    )


@on_its_device
def merge(
    parts: torch.Tensor, lse: torch.Tensor, sink_logits: torch.Tensor | None = None, *, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """As `kara_hf.kernels.merge`."""
    _, batch, heads, new, size = parts.shape
    out = parts.new_empty(batch, new, heads, size, dtype=dtype).transpose(1, 2)
    if out.numel():
        merge_into(out, parts.contiguous(), lse.contiguous(), None if sink_logits is None else sink_logits.contiguous())
    return out
