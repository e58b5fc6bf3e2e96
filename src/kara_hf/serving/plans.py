"""What is known of a request that can be compressed, and what is to be done to it."""

from dataclasses import dataclass, field

from ..cache.sequence import Kind, Segment
from ..config import Pins


@dataclass
class ServedRequest:
    """A request with tokens that can be evicted. Its stored tokens are numbered without gaps; positions count on.

    Attributes:
        key: of the request.
        settled: stored tokens in front of the open ones: the prompt, or what stayed of it, and the survivors of sealed
            windows.
        stored: tokens in the pool.
        prompt: tokens of a prompt that is still to be compressed; 0: it was, or stays whole.
        kept: survivors of sealed windows.
        evicted: tokens dropped: a stored token behind them is at position number + evicted.
        windows: windows sealed so far.
        segments: the prompt that was compressed and the sealed windows, oldest first, at true positions.
        slots: where those queries of open tokens that are held are, oldest first; empty for a score without queries.
        voters: where the queries of the last tokens of a prompt that is still to be compressed are.
        pins: true positions that are pinned.
    """

    key: str
    settled: int
    stored: int
    prompt: int = 0
    kept: int = 0
    evicted: int = 0
    windows: int = 0
    segments: tuple[Segment, ...] = ()
    slots: list[int] = field(default_factory=list)
    voters: list[int] = field(default_factory=list)
    pins: Pins = ()

    @property
    def open(self) -> int:
        return max(0, self.stored - self.settled)

    def settle(self) -> None:
        """What is open now stays whole."""
        self.settled = max(self.settled, self.stored)

    @property
    def tokens(self) -> int:
        """Tokens seen."""
        return self.stored + self.evicted

    def position(self, number: int) -> int:
        """The true position of a stored token that is not inside a segment, or the first one of."""
        for segment in self.segments:
            if segment.start >= number:
                break
            number += dropped(segment)
        return number

    def evict(self, kind: Kind, start: int, width: int, keep: int) -> None:
        """Books that of the `width` stored tokens from `start` on `keep` stay in every head."""
        first, last = self.position(start), self.position(start + width)
        apart = [segment for segment in self.segments if not first <= segment.start < last]
        self.segments = tuple(sorted([*apart, Segment(kind, first, last, keep)], key=lambda segment: segment.start))
        self.stored -= width - keep
        self.evicted += width - keep


@dataclass(frozen=True)
class EvictionPlan:
    """What is done to one request: from the stored token `start` on, of the `width` tokens in each of `count` windows
    `keep` stay in every head. Each is judged by so many `queries`, its own and of the tokens behind it. A `findable`
    plan leaves the blocks that it empties to be found by their content, until their room is needed.
    """

    request: ServedRequest
    start: int
    count: int
    width: int
    keep: int
    queries: int
    findable: bool = False

    @property
    def dropped(self) -> int:
        return self.count * (self.width - self.keep)

    @property
    def stored_after(self) -> int:
        return self.request.stored - self.dropped


def dropped(segment: Segment) -> int:
    """Tokens of a stretch that no head stores."""
    return segment.stop - segment.start - segment.slots


def blocks(tokens: int, page: int) -> int:
    """Blocks of `page` tokens that hold `tokens`."""
    return -(-tokens // page)
