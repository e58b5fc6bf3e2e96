"""One forward in progress."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..kernels import Rows
from ..storage import Prompt, Stored
from .masks import Visibility
from .sequence import Sequence

_EVERYTHING = torch.iinfo(torch.int32).max

Lead = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]


@dataclass
class Step:
    """What a forward brings, and how far it has come. Layers are told everything by it and ask nobody.

    Attributes:
        new: columns that it brings, padding included.
        first: whether the cache was empty before.
        last_layer: index of the layer that took its keys last.
        waiting: whether that layer's attention has not answered yet.
        prepared: whether what it brings is known, and there is room for it.
        syncs: whether values may be read back from the device. A decode step on a GPU does not wait for any.
        real: which columns hold a token, ``[B, S]`` bool; None where all do.
        visibility: who sees whom, where that is not: tokens see all tokens up to themselves.
        counts: tokens of each sequence, ``[B]``; upper bounds in a step that does not sync.
        positions: true positions, ``[B, S]`` int32; those of padding are anything.
        recording: whether its tokens may be taken back by `crop`, at any length.
        drafts: whether they are drafts: neither part of a prompt nor of a turn.
        replayed: whether they were decoded before, and are to be treated as if they came one by one.
        complete: whether they are all of a prompt or turn, none of which will be taken back.
        after: the sequences once the step is done.
        stored: indices of the layers that have stored its tokens.
        before: what Transformers' own layers held before it, by index.
        metric_power: power of the probabilities that attention adds to the metric of what it sees, or None.
        new_store: makes the store of a layer from its first keys and values.
        rows_of: the stored rows of the layer with an index.
        scores: logits of leads for their followers in a decode step, by device; see `kara_hf.kernels.attend_shared`.
        leads: in other steps queries ``[B, Hq, S, D]``, stored keys ``[B, H, T, D]`` or None and new keys
            ``[B, H, S, D]`` of leads, by layer.
    """

    new: int
    first: bool
    last_layer: int = -1
    waiting: bool = False
    prepared: bool = False
    syncs: bool = True
    real: torch.Tensor | None = None
    visibility: Visibility | None = None
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    positions: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    recording: bool = False
    drafts: bool = False
    replayed: bool = False
    complete: bool = False
    after: list[Sequence] = field(default_factory=list)
    stored: set[int] = field(default_factory=set)
    before: dict[int, dict[str, Any]] = field(default_factory=dict)
    metric_power: int | None = None
    new_store: Callable[..., Stored | Prompt] | None = None
    rows_of: Callable[[int], Rows] | None = None
    scores: dict[torch.device, torch.Tensor] = field(default_factory=dict)
    leads: dict[int, Lead] = field(default_factory=dict)

    def hidden_on(self, device: torch.device) -> torch.Tensor | None:
        """How many of the newest stored tokens each new one must not see, ``[B, S]`` int32: none of those behind it,
        and nothing at all if it is padding. None where no token is padding.
        """
        if self.real is None:
            return None
        real = self.real.to(device)
        behind = real.sum(1, keepdim=True, dtype=torch.int32) - real.cumsum(1, dtype=torch.int32)
        return behind.masked_fill(~real, _EVERYTHING)

    def real_counts(self) -> np.ndarray:
        """Tokens of each sequence, ``[B]``, exact."""
        return self.counts if self.syncs or self.real is None else self.real.sum(1).cpu().numpy()
