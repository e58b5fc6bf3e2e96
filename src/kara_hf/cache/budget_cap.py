"""What rows of blocks weigh, and by how much they would pass a cap on the bytes (KV-Compress)."""

import sys
from collections.abc import Iterator

import numpy as np

from ..storage import RoundedStore
from .layer import CompressedLayer
from .rounding import OPENING, Rounding
from .state import CacheState


def rows_of(state: CacheState) -> Iterator[tuple[CompressedLayer, slice]]:
    """The layers, and which rows of a sequence each of them has."""
    first = 0
    for layer in state.compressed_layers:
        heads = layer.stored().lengths.shape[1]
        yield layer, slice(first, first + heads)
        first += heads


class BudgetCap:
    """The cap of a cache whose rows are cut block by block.

    Args:
        state: of the cache.
        rounding: how tokens are rounded, or None.
        block_size: P.
    """

    def __init__(self, state: CacheState, rounding: Rounding | None, block_size: int):
        self.state, self.rounding, self.block_size = state, rounding, block_size

    def blocks_past(self, lengths: np.ndarray, ahead: int) -> int:
        """By how many blocks the cap is passed if rows have `lengths` ``[B, R]`` and room for `ahead` tokens more."""
        meter = self.state.meter
        if meter.max_bytes is None:
            return 0
        need, block = meter.held - meter.lent, sys.maxsize
        for layer, rows in rows_of(self.state):
            need += self._bytes_of(layer, lengths[:, rows], ahead) - layer.stored().paged_bytes
            # What a block of a row is worth at least: where its keys are another layer's, its values.
            key, value = layer.stored().slot_bytes
            if self.rounding is not None:  # what goes is rounded, as nearly all that may go
                key, value = self.rounding.widths(layer.stored().sizes)
            block = min(block, self.block_size * (value + 8 + (0 if layer.followers else key)))
        return -(-(need - meter.max_bytes) // block)

    def _bytes_of(self, layer: CompressedLayer, lengths: np.ndarray, ahead: int) -> int:
        """Bytes of a layer in blocks whose rows have `lengths` ``[B, H]`` and room for `ahead` tokens more."""
        store = layer.stored()
        key, value = store.slot_bytes
        rounded = self._records(layer, lengths)
        blocks = -(-(lengths - rounded + ahead) // self.block_size)
        of_keys = blocks if layer.deciding is None else blocks[:, list(layer.deciding)]
        tables = (blocks.size + of_keys.size) * int(blocks.max()) * 4 + blocks.size * 4
        held = self.block_size * (int(of_keys.sum()) * key + int(blocks.sum()) * (value + 4 + 4))  # position and metric
        if layer.followers:
            tokens = np.array([sequence.tokens for sequence in self.state.sequences])
            tables += blocks.size * int(blocks.max()) * 4 + blocks.shape[1] * 8
            held += (
                len(layer.followers)
                * len(blocks)
                * key
                * layer.proximal_places(int(tokens.max()) + ahead, self.block_size)
            )
        if self.rounding is not None:
            records = -(-rounded // self.block_size)
            held += self.rounding.record_bytes(layer, records, self.block_size)
        return held + tables

    def _records(self, layer: CompressedLayer, lengths: np.ndarray) -> np.ndarray:
        """How many tokens of rows with `lengths` ``[B, H]`` are records after a pass, ``[B, H]``."""
        if self.rounding is None:
            return np.zeros_like(lengths)
        found = np.maximum(0, lengths - self.rounding.first - self.rounding.near)
        store = layer.store
        begun = store.records.lengths > 0 if isinstance(store, RoundedStore) else np.zeros(lengths.shape, bool)
        return np.where(begun | (found >= OPENING), found, 0)
