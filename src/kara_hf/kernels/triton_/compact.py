"""compact in Triton: tokens are gathered into a buffer, then written, because a slot may be read and written.

Moves may come in any order, so no order of in-place moves would be right for all of them.
"""

import torch
import triton
import triton.language as tl

from ..rows import Rows
from .common import check_paged, on_its_device, pool_slots
from .configs import COPY_TILE, copy_config


@triton.jit
def copy_row(source, target, source_slot, target_slot, valid, size, PAD: tl.constexpr):
    """Copies `SIZE` elements from each source slot to its target slot."""
    at = tl.arange(0, PAD)[None, :]
    fits = valid[:, None] & (at < size)
    tl.store(
        target + target_slot[:, None] * size + at, tl.load(source + source_slot[:, None] * size + at, mask=fits), fits
    )


@triton.jit(do_not_specialize=["count", "key_width", "value_width"])
def compact_kernel(
    keys,
    values,
    positions,
    metric,
    key_table,
    value_table,
    held_keys,
    held_values,
    held_positions,
    held_metric,
    sequences,
    source,
    target,
    key_width,
    value_width,
    block_size,
    heads,
    count,
    key_size,
    value_size,
    PAD: tl.constexpr,
    TILE: tl.constexpr,
    GATHER: tl.constexpr,
):
    """Gathers a tile of a row's moves into buffers, or writes it from there: programs (tiles of n, b * H).

    keys, values         [Nk, P, Dk], [Nv, P, Dv] any float
    positions, metric    [Nv, P] int32, and [Nv, P] float32 or None
    key_table            [B, H, key_width] int32; -1 where a head keeps its keys elsewhere
    value_table          [B, H, value_width] int32
    held_...             [b * H * n, ...] of each pool's dtype: written with GATHER, else read
    sequences            [b] int64
    source, target       [b, H, n] int32; a negative target is no move
    """
    named = tl.program_id(1).to(tl.int64)
    row = tl.load(sequences + named // heads).to(tl.int64) * heads + named % heads
    token = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    held = named * count + token
    slot = tl.load(target + held, mask=token < count, other=-1).to(tl.int64)
    moved = slot >= 0
    if GATHER:
        slot = tl.load(source + held, mask=moved, other=0).to(tl.int64)
    key_slot = pool_slots(key_table + row * key_width, slot, moved, block_size)
    value_slot = pool_slots(value_table + row * value_width, slot, moved, block_size)
    keyed = moved & (key_slot >= 0)  # a head that keeps its keys elsewhere has no block of keys: -1 is in the table
    if GATHER:
        copy_row(keys, held_keys, key_slot, held, keyed, key_size, PAD)
        copy_row(values, held_values, value_slot, held, moved, value_size, PAD)
        copy_row(positions, held_positions, value_slot, held, moved, 1, 1)
        if metric is not None:
            copy_row(metric, held_metric, value_slot, held, moved, 1, 1)
    else:
        copy_row(held_keys, keys, held, key_slot, keyed, key_size, PAD)
        copy_row(held_values, values, held, value_slot, moved, value_size, PAD)
        copy_row(held_positions, positions, held, value_slot, moved, 1, 1)
        if metric is not None:
            copy_row(held_metric, metric, held, value_slot, moved, 1, 1)


@on_its_device
def compact(rows: Rows, sequences: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    """As `kara_hf.kernels.compact`."""
    check_paged(rows)
    if not target.numel():
        return
    pools = (rows.keys, rows.values, rows.positions, rows.metric)
    held = [None if pool is None else pool.new_empty(target.numel(), *pool.shape[2:]) for pool in pools]
    named, heads, count = target.shape
    sizes = rows.keys.shape[-1], rows.values.shape[-1]
    for gather in (True, False):
        compact_kernel[triton.cdiv(count, COPY_TILE), named * heads](
            *pools,
            rows.key_table,
            rows.value_table,
            *held,
            sequences.contiguous(),
            source.contiguous(),
            target.contiguous(),
            rows.key_table.shape[2],
            rows.value_table.shape[2],
            rows.block_size,
            heads,
            count,
            *sizes,
            GATHER=gather,
            **copy_config(max(sizes)),
        )
