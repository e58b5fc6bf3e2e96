"""Stretches of true positions that nothing evicts: sinks, and what was pinned."""

from collections.abc import Iterator
from functools import lru_cache

from ..config import Pins, merged


@lru_cache(maxsize=256)
def staying(sinks: int, pins: Pins) -> Pins:
    """Stretches of everything that stays: the first `sinks` tokens, and `pins`."""
    return merged(((0, sinks), *pins))


def within(stretches: Pins, start: int, stop: int) -> Iterator[int]:
    """Positions from `start` to `stop` that are in one of the `stretches`, ascending."""
    for first, last in stretches:
        yield from range(max(first, start), min(last, stop))
