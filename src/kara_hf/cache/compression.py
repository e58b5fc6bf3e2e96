"""What a policy does to a cache at the points of a step: the protocol that each kind of policy implements once."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..storage import PagedStore, Prompt
from .sequence import Kind, Sequence

if TYPE_CHECKING:
    from .layer import LayerState, Step, StoreLayer


class Compression(Protocol):
    """The glue between a policy, which decides, and the layers of a cache, which hold.

    In the order of a step: `begin`; for every layer `new_store`, `observes`, `stored` and `layer_done`; `done`.
    """

    block_size: int

    def layer_state(self) -> "LayerState":
        """What a layer holds beside its store, empty."""

    def begin(self, step: "Step") -> None:
        """A step is about to store its tokens: compresses what has to be compressed before, makes room for them, and
        sets `step.after`. Raises `PoolExhausted`; the cache is then as it was, or only more compressed.
        """

    def new_store(self, layer: "StoreLayer", keys: torch.Tensor, values: torch.Tensor) -> PagedStore | Prompt:
        """An empty store for a layer whose first keys and values these are."""

    def observes(self, step: "Step") -> int | None:
        """The power of the probabilities that attention adds to the metric of what it sees in this step, or None."""

    def stored(
        self, layer: "StoreLayer", step: "Step", query: torch.Tensor, key: torch.Tensor, present: torch.Tensor | None
    ) -> None:
        """A layer has stored and attended: holds what is needed of it later.

        Args:
            query: ``[B, Hq, S, D]``, as attention saw them.
            key: ``[B, H, S, D]`` as attention saw them; where a latent was expanded ``[B, Hq, M + S, D]``, everything.
            present: for expanded keys which of them hold a token, ``[B, M + S]`` bool; else None.
        """

    def layer_done(self, layer: "StoreLayer", step: "Step") -> None:
        """A layer is done with a step, and its attention has been answered."""

    def done(self, step: "Step") -> list[Sequence]:
        """All layers are done: compresses what is due, and returns what the sequences are now."""

    def compress(self) -> None:
        """Compresses what waits for the next decode step. Raises `PoolExhausted`; what is stored is consistent then."""

    def calm_steps(self) -> int:
        """Decode steps from here on in which nothing is compressed."""

    def still_steps(self) -> int:
        """Decode steps from here on that only append: nothing is compressed and no memory is arranged."""

    def constants(self) -> tuple[torch.Tensor | None, ...]:
        """What decode steps read on the device that only a compression changes."""

    def limits(self, sequence: Sequence) -> list[tuple[int, Kind]]:
        """Where the stretches of a sequence stop, and what each of them is, in order."""

    def uncroppable(self, number: int, sequence: Sequence, count: int) -> str:
        """Why the newest `count` tokens of sequence `number` cannot be taken off."""


# From a cache and its policy to what carries the policy out.
Factory = Callable[[Any, Any], Compression]
_FACTORIES: dict[type, Factory] = {}


def register_compression(policy_type: type, factory: Factory) -> None:
    """Makes ``factory(cache, policy)`` what carries out policies of exactly that type.

    Raises:
        ValueError: there is one already.
    """
    if policy_type in _FACTORIES:
        raise ValueError(f"{policy_type.__name__} has a compression already: {_FACTORIES[policy_type].__name__}")
    _FACTORIES[policy_type] = factory


def compression_of(policy: object) -> Factory:
    """What carries out such a policy. Raises TypeError if nothing was registered."""
    if type(policy) not in _FACTORIES:
        raise TypeError(f"there is no compression for {type(policy).__name__}; register one with register_compression")
    return _FACTORIES[type(policy)]
