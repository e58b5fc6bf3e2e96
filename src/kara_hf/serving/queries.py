"""Queries of open tokens of all requests of an engine, in slots that any request may use."""

import torch


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

    def give(self, slots: list[int]) -> None:
        """Frees `slots`."""
        self._free += slots
        if not self.used:
            self.layers.clear()
            self._free, self.slots = [], 0

    def put(self, layer: int, slots: torch.Tensor, queries: torch.Tensor) -> None:
        """Writes `queries` ``[n, Hq, D]`` of a layer to `slots` ``[n]`` int64."""
        if layer not in self.layers:
            self.layers[layer] = queries.new_zeros(self.slots, *queries.shape[1:])
        self.layers[layer].index_copy_(0, slots, queries)
