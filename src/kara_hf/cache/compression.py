"""What a policy does to a cache at the points of a step: the protocol that each kind of policy implements once."""

from collections.abc import Callable
from typing import Any, Protocol

import torch

from ..storage import Prompt, Saved, Stored
from .layer import CompressedLayer, LayerState
from .sequence import Kind, Sequence
from .state import CacheState
from .step import Step


class Compression(Protocol):
    """The glue between a policy, which decides, and the layers of a cache, which hold.

    In the order of a step: `begin`; for every layer `new_store`, `metric_power`, `stored` and `layer_done`; `done`.
    """

    block_size: int

    def layer_state(self) -> LayerState:
        """What a layer holds beside its store, empty."""

    def begin(self, step: Step) -> None:
        """A step is about to store its tokens: compresses what has to be compressed before, makes room for them, and
        sets `step.after`. Raises `PoolExhausted`; the cache is then as it was, or only more compressed.
        """

    def new_store(self, layer: CompressedLayer, keys: torch.Tensor, values: torch.Tensor) -> Stored | Prompt:
        """An empty store for a layer whose first keys and values these are: in blocks, if nothing else is said."""
        return self.empty_store(layer, keys, values)

    def empty_store(self, layer: CompressedLayer, keys: torch.Tensor, values: torch.Tensor) -> Stored:
        """An empty store in blocks for a layer that holds keys and values like these, ``[B, H, ..., D]``."""

    def metric_power(self, step: Step) -> int | None:
        """The power of the probabilities that attention adds to the metric of what it sees in this step, or None."""

    def stored(
        self, layer: CompressedLayer, step: Step, query: torch.Tensor, key: torch.Tensor, present: torch.Tensor | None
    ) -> None:
        """A layer has stored and attended: holds what is needed of it later.

        Args:
            query: ``[B, Hq, S, D]``, as attention saw them.
            key: ``[B, H, S, D]`` as attention saw them; where a latent was expanded ``[B, Hq, M + S, D]``, everything.
            present: for expanded keys which of them hold a token, ``[B, M + S]`` bool; else None.
        """

    def layer_done(self, layer: CompressedLayer, step: Step) -> None:
        """A layer is done with a step, and its attention has been answered."""

    def done(self, step: Step) -> list[Sequence]:
        """All layers are done: compresses what is due, and returns what the sequences are now."""

    def compress(self) -> None:
        """Compresses what waits for the next decode step. Raises `PoolExhausted`; what is stored is consistent then."""

    def steps_to_compression(self) -> int:
        """Decode steps from here on in which nothing is compressed."""

    def replayable_steps(self) -> int:
        """Tokens, from 1 on, of which one forward over all of them makes what decoding them one by one makes."""

    def capturable_steps(self) -> int:
        """Decode steps from here on that only append: nothing is compressed and no memory is arranged."""

    def decoded(self, sequence: Sequence) -> Sequence:
        """The sequence with one decoded token more, of a step that was replayed."""

    def constants(self) -> tuple[torch.Tensor | None, ...]:
        """What decode steps read on the device that only a compression changes."""

    def limits(self, sequence: Sequence) -> list[tuple[int, Kind]]:
        """Where the stretches of a sequence stop, and what each of them is, in order."""

    def saved(self) -> Saved:
        """What is known between steps beside `CacheState`: nothing, unless a compression says else; see
        `kara_hf.storage.saved`.
        """
        return {}

    def restore(self, saved: Saved) -> None:
        """Takes back, when it is new, what `saved` gave."""

    def splits(self, number: int, cropped: Sequence) -> bool:
        """Whether sequence `number`, when it has become `cropped`, would end within what only goes as a whole."""

    def uncroppable(self, number: int, sequence: Sequence, count: int) -> str:
        """Why the newest `count` tokens of sequence `number` cannot be taken off."""


_COMPRESSIONS: dict[type, Callable[[CacheState, Any], Compression]] = {}


def register_compression(policy: type, compression: Callable[[CacheState, Any], Compression]) -> None:
    """Says what makes the `Compression` of a kind of policy. Raises ValueError if that was said before."""
    if policy in _COMPRESSIONS:
        raise ValueError(f"{policy.__name__} has a compression already ({_COMPRESSIONS[policy]}); register it once")
    _COMPRESSIONS[policy] = compression


def make_compression(policy: Any, state: CacheState) -> Compression:
    """The compression of a cache under `policy`. Raises TypeError if no kind of policy like it was registered."""
    if type(policy) not in _COMPRESSIONS:
        kinds = sorted(kind.__name__ for kind in _COMPRESSIONS)
        raise TypeError(f"policy={policy!r} is of no known kind; it must be one of {kinds}, or registered as they are")
    return _COMPRESSIONS[type(policy)](state, policy)
