"""The second half of an observing attend: tokens add to their metric what attention gave them.

Every program owns a range of one row's slots and goes through all queries of that row, so nothing is added atomically
and the result is the same every time.
"""

import torch
import triton
import triton.language as tl

from ..rows import Rows
from .common import count_seen, pool_slots
from .configs import OBSERVE


@triton.jit(do_not_specialize=["new", "value_width"])
def observe_kernel(
    observed,
    totals,
    metric,
    value_table,
    lengths,
    num_unseen,
    value_width,
    block_size,
    heads,
    group,
    new,
    width,
    TILE_QUERIES: tl.constexpr,
    TILE_SLOTS: tl.constexpr,
    SQUARE: tl.constexpr,
):
    """Adds to a range of a row's slots what they received: programs (B * H, ranges of slots).

    observed, totals     [B, Hq, S, width] and [B, Hq, S] float32, to base 2
    metric               [Nv, P] float32, added to
    value_table          [B, H, value_width] int32
    lengths              [B, H] int32
    num_unseen           [B, S] int32, or None
    """
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * TILE_SLOTS
    slot = first + tl.arange(0, TILE_SLOTS)
    length = tl.load(lengths + row)
    received = tl.zeros([TILE_SLOTS], tl.float32)
    for start in range(0, tl.where(first < length, group * new, 0), TILE_QUERIES):
        # The queries of a row follow one another in [B, Hq, S].
        query = start + tl.arange(0, TILE_QUERIES)
        inside = query < group * new
        seen = count_seen(lengths, num_unseen, row, heads, query % new, inside, new)
        place = row * group * new + query
        total = tl.load(totals + place, mask=inside, other=0.0)
        logits = observed + (place * width)[:, None] + slot[None, :]
        visible = slot[None, :] < seen[:, None]
        weights = tl.exp2(tl.load(logits, mask=visible, other=float("-inf")) - total[:, None])
        if SQUARE:
            weights = weights * weights
        received += tl.sum(weights, 0)
    stored = slot < length
    to = metric + pool_slots(value_table + row * value_width, slot, stored, block_size)
    tl.store(to, tl.load(to, mask=stored, other=0.0) + received, mask=stored)


def add_observed(
    rows: Rows, observed: torch.Tensor, totals: torch.Tensor, num_unseen: torch.Tensor | None, metric_power: int
) -> None:
    """Adds to `rows.metric` the probabilities, to the power of `metric_power`, that these logits make.

    Args:
        observed: logits to base 2, ``[B, Hq, S, width]`` float32; read where a query sees a token.
        totals: log to base 2 of the sum of each query's exponentials, sinks included, ``[B, Hq, S]`` float32.
        num_unseen: as in attend.
    """
    batch, query_heads, new, width = observed.shape
    heads = rows.lengths.shape[1]
    observe_kernel[batch * heads, triton.cdiv(rows.max_length, OBSERVE["TILE_SLOTS"])](
        observed,
        totals,
        rows.metric,
        rows.value_table,
        rows.lengths,
        num_unseen,
        rows.value_table.shape[2],
        rows.block_size,
        heads,
        query_heads // heads,
        new,
        width,
        SQUARE=metric_power == 2,
        **OBSERVE,
    )
