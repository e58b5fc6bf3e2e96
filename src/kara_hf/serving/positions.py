"""True positions, which an engine that counts stored tokens does not know."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from weakref import proxy

from .requests import Requests
from .seams import SLIDING


class Positions:
    """Tells an engine's sliding-window layers, which keep rings of their own, where the tokens of requests truly are.

    Args:
        cache: the engine's.
        requests: that are known.
    """

    def __init__(self, cache: Any, requests: Requests):
        self._requests = requests
        self._turn = 0  # evicted tokens of the request that the engine deals with just now
        if SLIDING in cache.cache_allocators:
            self._correct(cache.cache_allocators[SLIDING])

    def turns(self, batch: Sequence[Any], evicted: Sequence[int]) -> list[Any]:
        """A batch of which so many tokens of each request were `evicted`, for the engine to go through."""
        return _Turns(batch, evicted, self)

    def _correct(self, allocator: Any) -> None:
        """A token's place in a ring is given by its true position."""
        kind, weak = type(allocator), proxy(allocator)
        for name in ("needs_new_blocks", "allocate_cache_to_request", "get_read_indices", "get_write_indices"):
            setattr(allocator, name, partial(self._at_true_position, getattr(kind, name), weak))
        allocator.get_seqlen_k = lambda past_length, query_length: kind.get_seqlen_k(
            weak, past_length + self._turn, query_length
        )

    def _at_true_position(
        self, own: Callable[..., Any], allocator: Any, request_id: str, past_length: int, query_length: int
    ) -> Any:
        return own(allocator, request_id, past_length + self._requests.evicted(request_id), query_length)


class _Turns(list[Any]):
    """The engine's batch, which says whose turn it is while it is gone through."""

    def __init__(self, batch: Sequence[Any], evicted: Sequence[int], positions: Positions):
        super().__init__(batch)
        self._evicted, self._positions = evicted, positions

    def __iter__(self) -> Iterator[Any]:
        for future, evicted in zip(super().__iter__(), self._evicted, strict=True):
            self._positions._turn = evicted
            yield future
