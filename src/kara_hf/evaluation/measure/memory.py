"""What a cache holds, of whatever kind it is, and what it held at most and on average while `generate` ran."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from transformers import StoppingCriteria
from transformers.cache_utils import Cache

from ...cache.compressed import CompressedCache
from ...cache.layer import CompressedLayer


def held_bytes(cache: Cache) -> int:
    """Bytes of everything that a cache holds now: by a compressed one's own count, or every storage of the layers."""
    if isinstance(cache, CompressedCache):
        others = [layer for layer in cache.layers if not isinstance(layer, CompressedLayer)]
        return cache.meter.held + _stored(others)
    return _stored(cache.layers)


def peak_bytes(cache: Cache) -> int:
    """Most bytes that a compressed cache held at any moment; of another, which grows by copying, its tensors with the
    largest one twice.
    """
    if isinstance(cache, CompressedCache):
        return cache.meter.peak + held_bytes(cache) - cache.meter.held
    sizes = [tensor.nbytes for layer in cache.layers for tensor in _tensors(layer)]
    return held_bytes(cache) + max(sizes, default=0)


class MemoryWatch(StoppingCriteria):
    """Notes what `cache` holds after every decode step. Stops nothing.

    Args:
        cache: what is watched.
        reads: whether the first step reads the prompt. It is left out: what is to be cut is still there then, whole.

    Attributes:
        most: bytes held at most.
        mean: bytes held on average.
    """

    def __init__(self, cache: Cache, reads: bool = True):
        self.cache, self.steps, self.most, self._sum = cache, -1 if reads else 0, 0, 0

    @property
    def mean(self) -> float:
        return self._sum / max(1, self.steps)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.steps += 1
        if self.steps > 0:
            held = held_bytes(self.cache)
            self.most, self._sum = max(self.most, held), self._sum + held
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class AllocatorPeak:
    """What torch's allocator gave out at most within a block, beyond what was out before it.

    Attributes:
        bytes: of a CUDA device, activations and copies included; NaN for any other.
    """

    def __init__(self, device: torch.device):
        self.device, self.bytes = device, math.nan

    def __enter__(self) -> "AllocatorPeak":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            self.bytes = float(torch.cuda.max_memory_allocated(self.device) - self._before)


def _stored(layers: list[Any]) -> int:
    storages = {}
    for layer in layers:
        for tensor in _tensors(layer):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(layer: Any) -> Iterator[torch.Tensor]:
    """The plain tensors of a layer; of a quantized one those that it is made of."""
    todo = [leaf for leaf in tree_leaves(vars(layer)) if isinstance(leaf, torch.Tensor)]
    while todo:
        tensor = todo.pop()
        if is_traceable_wrapper_subclass(tensor):
            todo += [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        else:
            yield tensor
