"""Rows that are rounded in part, drawn for the kernels, and the same rows whole."""

from dataclasses import replace

import torch

from kara_hf.kernels import RoundedRows
from kara_hf.kernels.rounding import Packing, frame_of, into_frame

from .kernel_cases import make_rows, read_row


def with_records(rows, lengths, bits, *, block_size, layout="shuffled", begin=None, unused=0):
    """`rows` behind records of random tokens: of each row as many as `lengths` [B][H] says.

    Slots that nobody wrote hold `unused` bytes.
    """
    sizes, heads = (rows.keys.shape[-1], rows.values.shape[-1]), len(lengths[0])
    metric = rows.metric is not None
    drawn = make_rows(lengths, block_size=block_size, dims=sizes, layout=layout, unused=0.0, metric=metric)
    packings = [Packing(size, count) for size, count in zip(sizes, bits, strict=True)]
    longest = drawn.max_length
    keys = torch.zeros(len(lengths), heads, max(1, longest), sizes[0])
    chosen = torch.arange(max(1, longest)) < drawn.lengths[..., None]
    for b in range(len(lengths)):
        for h in range(heads):
            keys[b, h, : lengths[b][h]] = 3 + 2 * read_row(drawn, b, h)[0]
    frame = frame_of(keys, chosen)
    records = into_frame(keys, frame)
    pools = [
        torch.full((*pool.shape[:2], p.width), unused, dtype=torch.uint8)
        for pool, p in zip((drawn.keys, drawn.values), packings, strict=True)
    ]
    for b in range(len(lengths)):
        for h in range(heads):
            values = read_row(drawn, b, h)[1]
            for slot in range(lengths[b][h]):
                block, at = slot // block_size, slot % block_size
                pools[0][drawn.key_table[b, h, block], at] = packings[0].pack(records[b, h, slot])
                pools[1][drawn.value_table[b, h, block], at] = packings[1].pack(values[slot])
    given = {**vars(drawn), "keys": pools[0], "values": pools[1]}
    given.pop("in_place", None)
    rounded = RoundedRows(**given, key_packing=packings[0], value_packing=packings[1], frame=frame, begin=begin or 0)
    if begin is not None:
        rounded = replace(rounded, positions=rounded.positions[..., None][..., :0])
    return replace(rows, rounded=rounded)


def whole(rows, b, h):
    """Keys, values and metric of one row: what records stand for, and the other tokens behind, float32."""
    length = int(rows.rounded.lengths[b, h])
    keys, values = (part[b, h, :length] for part in rows.rounded.dense())
    own = read_row(rows, b, h)
    metric = None
    if rows.metric is not None:
        metric = torch.cat([read_row(rows.rounded, b, h)[3], own[3]])
    return torch.cat([keys, own[0].float()]), torch.cat([values, own[1].float()]), metric
