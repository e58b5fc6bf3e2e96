"""append in Triton: every program writes a few new tokens of one row."""

import torch
import triton
import triton.language as tl

from ..rows import Rows
from .common import check_paged, on_its_device, pool_slots
from .configs import COPY_TILE, copy_config


@triton.jit(do_not_specialize=["new", "key_width", "value_width"])
def append_kernel(
    keys,
    values,
    positions,
    metric,
    key_table,
    value_table,
    lengths,
    new_keys,
    new_values,
    new_positions,
    real_before,
    key_width,
    value_width,
    block_size,
    heads,
    new,
    key_stride_b,
    key_stride_h,
    key_stride_s,
    value_stride_b,
    value_stride_h,
    value_stride_s,
    key_size,
    value_size,
    PAD: tl.constexpr,
    TILE: tl.constexpr,
):
    """Writes a tile of a row's new tokens: programs (tiles of S, B * H).

    keys, values         [Nk, P, Dk], [Nv, P, Dv] any float, written
    positions, metric    [Nv, P] int32, and [Nv, P] float32 or None, written
    key_table            [B, H, key_width] int32; -1 where a head keeps its keys elsewhere
    value_table          [B, H, value_width] int32
    lengths              [B, H] int32
    new_keys, new_values [B, H, S, Dk], [B, H, S, Dv], of any strides but the last, any float; cast to the pool's
    new_positions        [B, S] int32
    real_before          [B, S] int32: real tokens up to each one, itself included; None where all are real
    """
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    token = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    real = token < new
    slot = tl.load(lengths + row) + token
    if real_before is not None:
        # The count up to and including a token grows exactly where the token is real.
        count = tl.load(real_before + batch * new + token, mask=real, other=0)
        before = tl.load(real_before + batch * new + token - 1, mask=real & (token > 0), other=0)
        slot = tl.load(lengths + row) + before.to(tl.int64)
        real = real & (count > before)

    at = tl.arange(0, PAD)
    key_to = pool_slots(key_table + row * key_width, slot, real, block_size)
    value_to = pool_slots(value_table + row * value_width, slot, real, block_size)
    key_from = new_keys + batch * key_stride_b + head * key_stride_h + token * key_stride_s
    value_from = new_values + batch * value_stride_b + head * value_stride_h + token * value_stride_s
    # A head that keeps its keys elsewhere has no block of keys: -1 stands in the table.
    fits = (real & (key_to >= 0))[:, None] & (at < key_size)[None, :]
    tl.store(keys + key_to[:, None] * key_size + at, tl.load(key_from[:, None] + at, mask=fits), mask=fits)
    fits = real[:, None] & (at < value_size)[None, :]
    tl.store(values + value_to[:, None] * value_size + at, tl.load(value_from[:, None] + at, mask=fits), mask=fits)
    position = tl.load(new_positions + batch * new + token, mask=real)
    tl.store(positions + value_to, position, mask=real)
    if metric is not None:
        tl.store(metric + value_to, tl.zeros([TILE], tl.float32), mask=real)


@on_its_device
def append(
    rows: Rows,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    real: torch.Tensor | None = None,
) -> None:
    """As `kara_hf.kernels.append`."""
    batch, heads, new, key_size = keys.shape
    check_paged(rows)
    if not batch * heads * new:
        return
    keys, values = (part if part.stride(-1) == 1 else part.contiguous() for part in (keys, values))
    append_kernel[triton.cdiv(new, COPY_TILE), batch * heads](
        rows.keys,
        rows.values,
        rows.positions,
        rows.metric,
        rows.key_table,
        rows.value_table,
        rows.lengths,
        keys,
        values,
        positions.contiguous(),
        None if real is None else real.cumsum(1, dtype=torch.int32),
        rows.key_table.shape[2],
        rows.value_table.shape[2],
        rows.block_size,
        heads,
        new,
        *keys.stride()[:3],
        *values.stride()[:3],
        key_size,
        values.shape[-1],
        **copy_config(max(key_size, values.shape[-1])),
    )
