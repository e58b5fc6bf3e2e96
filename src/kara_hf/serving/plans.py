"""What is known of a request that can be compressed, and what is to be done to it."""

from dataclasses import dataclass, field

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


def blocks(tokens: int, page: int) -> int:
    """Blocks of `page` tokens that hold `tokens`."""
    return -(-tokens // page)
