"""What everything in a cache shares: its model, layers, sequences and memory; it is handed out, the cache is not."""

from dataclasses import dataclass, field
from typing import Any

import torch

from ..config import Pins
from ..policy.sharing import PoDSharing
from ..storage import MemoryMeter
from .bound_model import BoundModel
from .layer import CompressedLayer
from .sequence import Sequence


@dataclass
class CacheState:
    """Handed to the compression, the steps and the graph of a cache.

    Attributes:
        binding: the model.
        meter: counts every byte.
        sharing: which layers share keys, or None.
        steady: whether memory must lie still between compressions.
        layers: of all kinds, as `transformers.Cache.layers`, which is the same list.
        compressed_layers: the compressed layers, in order; once something is stored those that the model runs.
        sequences: what is known of each sequence.
        columns: tokens seen, padding included.
        pins: what is pinned in sequences that are still to come.
        padding: which of the first columns hold tokens, ``[B, n]`` bool; those behind, and all if it is None, do.
    """

    binding: BoundModel
    meter: MemoryMeter
    sharing: PoDSharing | None = None
    steady: bool = False
    layers: list[Any] = field(default_factory=list)
    compressed_layers: list[CompressedLayer] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list)
    columns: int = 0
    pins: Pins = ()
    padding: torch.Tensor | None = None

    @property
    def all_compressed_layers(self) -> list[CompressedLayer]:
        """The compressed layers, those that the model never runs among them."""
        return [layer for layer in self.layers if isinstance(layer, CompressedLayer)]

    @property
    def room(self) -> int:
        """Tokens that every row can take before memory has to be arranged."""
        return min(layer.paged().room for layer in self.compressed_layers)

    def reserve(self, tokens: int) -> None:
        """Makes room for `tokens` more in every row. Raises `PoolExhausted`; what is stored has not changed then."""
        for layer in self.compressed_layers:
            layer.paged().reserve(tokens)

    def count_columns(self, columns: int) -> None:
        """Says how many tokens were seen, to the layers too."""
        self.columns = columns
        for layer in self.all_compressed_layers:
            layer.seen = columns

    @torch.inference_mode(False)  # what is held is used again, perhaps outside inference mode
    def hold_padding(self, padding: torch.Tensor | None) -> None:
        """Holds another `padding`, which is counted as all that is held."""
        if self.padding is not None:
            self.meter.uncount(self.padding)
        self.padding = None if padding is None else self.meter.count(padding.clone())

    def arrange(self, index: list[int]) -> None:
        """Makes sequence i what sequence ``index[i]`` was, in all that does not lie in layers."""
        self.sequences = [self.sequences[b] for b in index]
        if self.padding is not None:
            self.hold_padding(self.padding[torch.tensor(index, device=self.padding.device)])
