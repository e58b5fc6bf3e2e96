"""compact: move tokens of some rows to other slots.

    rows       Rows, modified in place: keys, values, positions and metric of the slots that are moved to
    sequences  [b] int64         which sequences
    source     [b, H, n] int32   logical slots that are read, all of them before anything is written
    target     [b, H, n] int32   logical slots that get what those had; negative: no move here, and `source` is anything

The targets of a row are different slots, in blocks that it alone owns. Lengths are the store's to set.
"""

import torch

from .append import slot_index
from .backend import use_triton
from .rows import Rows


def compact_reference(rows: Rows, sequences: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    """One token at a time; the specification of `compact`."""
    size = rows.block_size
    tables = (rows.key_table, *[rows.value_table] * len(rows.value_parts))
    for index, b in enumerate(sequences.tolist()):
        for h in range(source.shape[1]):
            moves = list(zip(source[index, h].tolist(), target[index, h].tolist(), strict=True))
            for pool, table in zip((rows.keys, *rows.value_parts), tables, strict=True):
                if pool is rows.keys and rows.proximal is not None and h in rows.proximal.heads:
                    continue
                read = [pool[table[b, h, old // size], old % size].clone() if new >= 0 else None for old, new in moves]
                for (_, new), part in zip(moves, read, strict=True):
                    if part is not None:
                        pool[table[b, h, new // size], new % size] = part


def compact(rows: Rows, sequences: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    """Moves tokens of the named sequences within their rows; see the module's contract."""
    records = rows.keys.dtype == torch.uint8  # few, between steps: plain torch moves them everywhere
    if not records and use_triton(rows.keys, rows.keys.shape[-1], rows.values.shape[-1], dtypes=rows.dtypes):
        from .triton_.compact import compact as compact_triton

        return compact_triton(rows, sequences, source, target)

    parts = (
        (rows.of_keys(rows.key_table), (rows.keys,), rows.of_keys(source), rows.of_keys(target)),
        (rows.value_table, rows.value_parts, source, target),
    )
    for table, pools, old, new in parts:
        chosen, moved = table.index_select(0, sequences), new >= 0
        here, there = (slot_index(chosen, slots.clamp(min=0), rows.block_size)[moved] for slots in (old, new))
        for pool in pools:
            flat = pool.flatten(0, 1)
            flat[there] = flat[here]
