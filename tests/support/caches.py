"""What a cache holds and how it is fed: shared by the tests of caches."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch

from kara_hf import CompressedCache, KaraCache, KVCompressCache
from kara_hf.cache.layer import CompressedLayer


def live_tensors(cache: CompressedCache) -> list[torch.Tensor]:
    """Every tensor that can be reached from the cache's compressed layers."""
    found, todo, visited = [], [layer for layer in cache.layers if isinstance(layer, CompressedLayer)], set()
    while todo:
        thing = todo.pop()
        if id(thing) in visited or isinstance(thing, CompressedCache | type | np.ndarray | str | int | float):
            continue
        visited.add(id(thing))
        if isinstance(thing, torch.Tensor):
            found.append(thing)
        elif isinstance(thing, dict):
            todo += thing.values()
        elif isinstance(thing, list | tuple):
            todo += thing
        elif hasattr(thing, "__dict__"):
            todo += vars(thing).values()
    return found


def state(cache: KaraCache) -> list:
    """What is stored. Votes that were counted stay counted, and are left out, as the metric is that they went into."""
    rows = [
        (layer.index, b, h, [part.tolist() for part in layer.store.read(b, h)])
        for layer in cache.compressed_layers
        if layer.store is not None
        for b in range(layer.store.lengths.shape[0])
        for h in range(layer.store.lengths.shape[1])
    ]
    sequences = [dataclasses.replace(sequence, voters=()) for sequence in cache.sequences]
    return [cache.get_seq_length(), sequences, cache.report().kept.tolist(), rows]


def rows_of(cache: KVCompressCache) -> Iterator[tuple[int, int, int]]:
    """Layer, sequence and head of every row."""
    for layer in cache.compressed_layers:
        batch, heads = layer.stored().lengths.shape
        yield from ((layer.index, b, h) for b in range(batch) for h in range(heads))


def kept(cache: KVCompressCache, sequence: int = 0) -> dict[tuple[int, int], list[int]]:
    """Positions that each (layer, head) stores of a sequence."""
    return {(layer, h): cache.kept_positions(layer, b, h).tolist() for layer, b, h in rows_of(cache) if b == sequence}


def memory_of(cache: KVCompressCache) -> int:
    """Bytes of the tensors that can be reached from the cache's compressed layers."""
    storages = [
        tensor.untyped_storage() for tensor in (*live_tensors(cache), cache.state.padding) if tensor is not None
    ]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}.values())


@torch.no_grad()
def feed(model, cache, ids: torch.Tensor, steps: list[int], mask: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
    """Logits of the next `ids` ``[B, S]`` in steps, each ``[B, s, V]``. `mask` ``[B, S]`` and `ids` begin at 0."""
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for new in steps:
        part = slice(cache.get_seq_length(), cache.get_seq_length() + new)
        yield model(
            input_ids=ids[:, part],
            attention_mask=mask[:, : part.stop],
            position_ids=positions[:, part],
            past_key_values=cache,
            use_cache=True,
        ).logits
