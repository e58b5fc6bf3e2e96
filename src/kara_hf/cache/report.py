"""What a cache holds, in tokens and bytes."""

from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class CacheReport:
    """A cache's own account of itself; only compressed (full-attention) layers are counted unless said otherwise.

    Attributes:
        seen: tokens the model has processed, padding left out, ``[sequence]`` int64.
        kept: tokens stored, ``[layer, sequence, head]`` int64.
        layers: the model's layer index of each entry of `kept`.
        full_bytes: what a cache without compression would hold for the tokens seen.
        nominal_bytes: keys and values of the tokens kept, and nothing else.
        resident_bytes: everything held: blocks (free ones too), tables, lengths, positions, buffered queries.
        peak_bytes: the most that was resident at any moment, copies made while a pool grows included.
        other_bytes: held by the layers that are not compressed (sliding-window, linear, recurrent).
    """

    seen: torch.Tensor
    kept: torch.Tensor
    layers: list[int]
    full_bytes: int
    nominal_bytes: int
    resident_bytes: int
    peak_bytes: int
    other_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
        return {
            name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in asdict(self).items()
        }
