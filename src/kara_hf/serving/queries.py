"""Queries that all requests of an engine hold, of open tokens and of prompts' ends, in slots that any may use."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..storage import Sampling


class QueryPool:
    """One tensor ``[slots, Hq, D]`` per layer, made when its first queries come; slots are the same in all layers.

    The pool doubles when slots run out and gives everything back when none is in use.

    Attributes:
        layers: the tensors by index of the layer.
    """

    FIRST = 256  # slots at the start

    def __init__(self) -> None:
        self.layers: dict[int, torch.Tensor] = {}
        self.slots = 0
        self._free: list[int] = []

    @property
    def used(self) -> int:
        """Slots in use."""
        return self.slots - len(self._free)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.layers.values())

    def take(self, count: int) -> list[int]:
        """`count` free slots."""
        if count > len(self._free):
            grown = max(self.FIRST, 2 * self.slots, self.used + count)
            self._free += range(self.slots, grown)
            self.slots = grown
            for index, old in self.layers.items():
                new = old.new_zeros(grown, *old.shape[1:])
                new[: old.shape[0]] = old
                self.layers[index] = new
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def copy(self, slots: list[int]) -> list[int]:
        """As many free slots with what `slots` hold."""
        copies = self.take(len(slots))
        for tensor in self.layers.values():
            tensor[copies] = tensor[slots]
        return copies

    def give(self, slots: list[int]) -> None:
        """Frees `slots`."""
        self._free += slots
        if not self.used:
            self.layers.clear()
            self._free, self.slots = [], 0

    def put(self, layer: int, brought: "Places", queries: torch.Tensor) -> None:
        """Writes those of `queries` ``[Hq, T, D]`` of a layer in a step that are held to where they are held."""
        heads = queries.shape[0]
        flat = self._of(layer, queries, heads).flatten(0, 1)
        flat.index_copy_(0, brought.slots * heads + brought.heads, queries[brought.heads, brought.columns])

    def _of(self, layer: int, queries: torch.Tensor, heads: int) -> torch.Tensor:
        if layer not in self.layers:
            self.layers[layer] = queries.new_zeros(self.slots, heads, queries.shape[-1])
        return self.layers[layer]


@dataclass(frozen=True)
class Brought:
    """Tokens that a step brings of one request, of which queries are held: open ones, or the last of its prompt.

    Attributes:
        column: of the first of them in the step.
        before: such tokens in front of it.
        new: how many they are.
        slots: of all such tokens of the request.
        sampling: of which of them queries are held.
    """

    column: int
    before: int
    new: int
    slots: list[int]
    sampling: Sampling


@dataclass(frozen=True)
class Places:
    """Which queries of a step are held and where: slots, query heads and columns of the step, ``[N]`` int64 each."""

    slots: torch.Tensor
    heads: torch.Tensor
    columns: torch.Tensor

    @classmethod
    def of(cls, brought: Sequence[Brought], heads: int, group: int, device: torch.device) -> "Places":
        """Of a layer with so many query heads, `group` for each KV head."""
        slots, columns = [], []
        for part in brought:
            sampling = replace(part.sampling, group=group)
            first, last = sampling.place(part.before), sampling.places(part.before + part.new)
            tokens = sampling.tokens_of(first, last).clip(max=part.before + part.new - 1) - part.before
            columns.append(np.where(tokens < 0, -1, part.column + tokens))
            slots.append(part.slots[first:last])
        chosen = np.tile(np.concatenate(columns, 1), (heads // group, 1))
        head, place = np.nonzero(chosen >= 0)
        found = np.concatenate(slots).astype(np.int64)[place], head, chosen[head, place]
        return cls(*(torch.from_numpy(part).to(device) for part in found))
