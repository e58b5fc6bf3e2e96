"""compact: move the survivors of some rows together.

    rows       Rows, modified in place: keys, values, positions of the named sequences from slot `start` on
    sequences  [b] int64     which sequences
    start      [b] int32     first logical slot that is written
    slots      [b, H, n] int32   logical slots that survive, read before anything is written; slot i of the result
               is ``start + i``

Blocks that are written must be owned by one row alone. Lengths are the store's to set. n = 0 writes nothing.
"""

import torch

from .append import slot_index
from .backend import use_triton
from .rows import Rows


def compact_reference(rows: Rows, sequences: torch.Tensor, start: torch.Tensor, slots: torch.Tensor) -> None:
    """One token at a time; the specification of `compact`."""
    size = rows.block_size
    for index, b in enumerate(sequences.tolist()):
        for h in range(slots.shape[1]):
            read = []
            for slot in slots[index, h].tolist():
                key_block, value_block = (
                    int(rows.key_table[b, h, slot // size]),
                    int(rows.value_table[b, h, slot // size]),
                )
                at = slot % size
                token = (rows.keys[key_block, at], rows.values[value_block, at], rows.positions[value_block, at])
                read.append([part.clone() for part in token])
            for slot, (key, value, position) in enumerate(read, start=int(start[index])):
                key_block, value_block = (
                    int(rows.key_table[b, h, slot // size]),
                    int(rows.value_table[b, h, slot // size]),
                )
                rows.keys[key_block, slot % size] = key
                rows.values[value_block, slot % size] = value
                rows.positions[value_block, slot % size] = position


def compact(rows: Rows, sequences: torch.Tensor, start: torch.Tensor, slots: torch.Tensor) -> None:
    """Moves surviving tokens of the named sequences to consecutive slots; see the module's contract."""
    if use_triton(rows.keys, rows.keys.shape[-1], rows.values.shape[-1]):
        from .triton_.compact import compact as compact_triton

        return compact_triton(rows, sequences, start, slots)

    target = start[:, None, None] + torch.arange(slots.shape[2], device=slots.device, dtype=slots.dtype)
    target = target.expand_as(slots)
    for table, pools in ((rows.key_table, (rows.keys,)), (rows.value_table, (rows.values, rows.positions))):
        chosen = table.index_select(0, sequences)
        source = slot_index(chosen, slots, rows.block_size).reshape(-1)
        destination = slot_index(chosen, target, rows.block_size).reshape(-1)
        for pool in pools:
            flat = pool.flatten(0, 1)
            flat[destination] = flat[source]
