"""append: write new tokens behind the last stored token of their rows.

    rows       Rows, modified in place: keys, values, positions, and the metric, which starts at 0 (not lengths: the
               store counts)
    keys       [B, H, S, Dk]  new keys; those of heads in rows.proximal are left to the store
    values     [B, H, S, Dv]  new values
    positions  [B, S] int32   true position of each new token
    real       [B, S] bool or None   False marks padding, which is not written; None: every token is real

Keys and values are stored in the dtype of their pool. Those of a dtype that would lose by it raise ValueError before
anything is written. Blocks for every real token must be in the tables already, owned by one row alone. S = 0 writes
nothing.
"""

import torch

from .backend import use_triton
from .rows import Rows


def slot_index(table: torch.Tensor, slots: torch.Tensor, block_size: int) -> torch.Tensor:
    """Flat pool slot (``block * P + offset``) of logical slots `slots` ``[B, H, n]``: ``[B, H, n]`` int64."""
    blocks = table.gather(2, (slots // block_size).long()).long()
    return blocks * block_size + slots % block_size


def check_stored_as(dtype: torch.dtype, **new: torch.Tensor) -> None:
    """Raises ValueError unless a pool of `dtype` holds the one `new` tensor, keys or values, without loss."""
    for name, tensor in new.items():
        if torch.promote_types(tensor.dtype, dtype) != dtype:
            raise ValueError(
                f"{name} of {tensor.dtype} are to join {name} stored in {dtype}, which would round them; give every "
                "forward of one cache the same dtypes (one torch.autocast around all of them, or none)"
            )


def append_reference(
    rows: Rows,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    real: torch.Tensor | None = None,
) -> None:
    """One token at a time; the specification of `append`."""
    batch, heads, new, _ = keys.shape
    size = rows.block_size
    for b in range(batch):
        for h in range(heads):
            slot = int(rows.lengths[b, h])
            for s in range(new):
                if real is not None and not real[b, s]:
                    continue
                key_block, value_block = (
                    int(rows.key_table[b, h, slot // size]),
                    int(rows.value_table[b, h, slot // size]),
                )
                if rows.proximal is None or h not in rows.proximal.heads:
                    rows.keys[key_block, slot % size] = keys[b, h, s]
                rows.values[value_block, slot % size] = values[b, h, s]
                rows.positions[value_block, slot % size] = positions[b, s]
                if rows.metric is not None:
                    rows.metric[value_block, slot % size] = 0.0
                slot += 1


def append(
    rows: Rows,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    real: torch.Tensor | None = None,
) -> None:
    """Writes keys, values and positions of new tokens into `rows`; see the module's contract."""
    check_stored_as(rows.keys.dtype, keys=keys)
    check_stored_as(rows.values.dtype, values=values)
    if use_triton(keys, keys.shape[-1], values.shape[-1], dtypes=(values.dtype, *rows.dtypes)):
        from .triton_.append import append as append_triton

        return append_triton(rows, keys, values, positions, real)

    new = keys.shape[2]
    if real is None and rows.uniform and rows.contiguous:
        *places, metric = rows.in_place
        for place, source in zip(places, (rows.of_keys(keys), values, positions[:, None]), strict=True):
            place.narrow(2, rows.max_length, new).copy_(source)
        if metric is not None:
            metric.narrow(2, rows.max_length, new).zero_()
        return

    heads = keys.shape[1]
    if real is None and rows.starts is not None:
        first = torch.from_numpy(rows.starts) + rows.lengths
        where = first.flatten() if new == 1 else (first[..., None] + torch.arange(new)).flatten()
        sources = (keys, values, positions[:, None].expand(-1, heads, -1))
        for pool, source in zip((rows.keys, rows.values, rows.positions), sources, strict=True):
            pool.flatten(0, 1).index_copy_(0, where, source.flatten(0, 2).to(pool.dtype))
        if rows.metric is not None:
            rows.metric.flatten().index_fill_(0, where, 0.0)
        return
    if real is None:
        offset = torch.arange(new, device=keys.device, dtype=torch.int32).expand(keys.shape[0], new)
    else:
        offset = real.cumsum(1, dtype=torch.int32) - 1
    slots = rows.lengths[:, :, None] + offset[:, None]
    if real is not None:
        if not real.any():
            return
        slots = slots.masked_fill(~real[:, None], 0)  # padding needs no block: any that exists stands in
    written = None if real is None else real[:, None].expand(-1, heads, -1)
    chosen = slice(None) if written is None else written.reshape(-1)
    chosen_keys = slice(None) if written is None else rows.of_keys(written).reshape(-1)
    where_key = slot_index(rows.of_keys(rows.key_table), rows.of_keys(slots), rows.block_size).reshape(-1)[chosen_keys]
    where_value = slot_index(rows.value_table, slots, rows.block_size).reshape(-1)[chosen]
    rows.keys.flatten(0, 1)[where_key] = rows.of_keys(keys).flatten(0, 2)[chosen_keys].to(rows.keys.dtype)
    rows.values.flatten(0, 1)[where_value] = values.flatten(0, 2)[chosen].to(rows.values.dtype)
    rows.positions.flatten()[where_value] = positions[:, None].expand(-1, heads, -1).reshape(-1)[chosen]
    if rows.metric is not None:
        rows.metric.flatten()[where_value] = 0.0
