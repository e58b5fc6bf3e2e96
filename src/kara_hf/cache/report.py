"""What a cache holds, in tokens and bytes."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from .layer import CompressedLayer
from .state import CacheState


@dataclass(frozen=True)
class CacheReport:
    """A cache's own account of itself; only compressed (full-attention) layers are counted unless said otherwise.

    Attributes:
        seen: tokens the model has processed, padding left out, ``[sequence]`` int64.
        kept: tokens stored, ``[layer, sequence, head]`` int64.
        layers: the model's layer index of each entry of `kept`.
        full_bytes: what a cache without compression would hold for the tokens seen.
        nominal_bytes: keys and values of the tokens kept, and nothing else; of rounded ones their records.
        resident_bytes: everything held: blocks (free ones too), tables, lengths, positions, buffered queries.
        peak_bytes: the most that was resident at any moment, copies made while a pool grows included.
        other_bytes: held by the layers that are not compressed (sliding-window, linear, recurrent).
        query_bytes: those of `resident_bytes` that are queries, which scores and votes need.
    """

    seen: torch.Tensor
    kept: torch.Tensor
    layers: list[int]
    full_bytes: int
    nominal_bytes: int
    resident_bytes: int
    peak_bytes: int
    other_bytes: int
    query_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
        return {
            name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in asdict(self).items()
        }


def make_report(state: CacheState) -> CacheReport:
    """What a cache holds whose host knows everything; see `kara_hf.cache.steps.Steps.look`."""
    layers = [layer for layer in state.compressed_layers if layer.store is not None]
    seen = [sequence.tokens for sequence in state.sequences]
    full = nominal = 0
    kept = []
    for layer in layers:
        store = layer.stored()
        full += sum(seen) * store.lengths.shape[1] * sum(store.slot_bytes)
        nominal += store.stored_bytes
        kept.append(torch.from_numpy(store.lengths.astype(np.int64)))
    heads = max((lengths.shape[1] for lengths in kept), default=0)
    padded = [torch.nn.functional.pad(lengths, (0, heads - lengths.shape[1])) for lengths in kept]
    others = [layer for layer in state.layers if not isinstance(layer, CompressedLayer)]
    return CacheReport(
        seen=torch.tensor(seen, dtype=torch.long),
        kept=torch.stack(padded) if padded else torch.zeros(0, 0, 0, dtype=torch.long),
        layers=[layer.index for layer in layers],
        full_bytes=full,
        nominal_bytes=nominal,
        resident_bytes=state.meter.held,
        peak_bytes=state.meter.peak,
        other_bytes=sum(tensor.nbytes for layer in others for tensor in _tensors(vars(layer))),
        query_bytes=sum(layer.state.query_bytes for layer in layers),
    )


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested containers."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)
