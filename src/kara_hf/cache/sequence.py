"""What is known of a sequence whichever layer or head one asks: tokens seen, what is settled, and what is pinned.

A sequence, oldest first: ``[ prompt, whole ][ sealed windows ] ... [ open tokens, the newest of them recent ]``.
"""

from dataclasses import dataclass, replace
from typing import Literal

from ..config import Pins
from ..policy import KaraPolicy

Kind = Literal["pinned", "prompt", "sealed", "open", "recent"]


@dataclass(frozen=True)
class Segment:
    """A settled stretch of a sequence: true positions `start` to `stop`, of which every head stores `slots` tokens."""

    kind: Kind
    start: int
    stop: int
    slots: int


@dataclass(frozen=True)
class Sequence:
    """What is known of one sequence, the same in every layer and head.

    Attributes:
        tokens: real tokens seen; the next one has this position.
        open: newest tokens, stored whole, that may still be sealed.
        segments: everything before them.
        voters: true positions whose queries voted on what is kept, in stretches ``(start, stop)``, ascending.
        pins: true positions that are never evicted, seen or not, likewise.
    """

    tokens: int = 0
    open: int = 0
    segments: tuple[Segment, ...] = ()
    voters: tuple[tuple[int, int], ...] = ()
    pins: Pins = ()

    @property
    def settled(self) -> int:
        """Slots in front of the open tokens."""
        return sum(segment.slots for segment in self.segments)

    @property
    def kept(self) -> int:
        """Slots of the sealed windows."""
        return sum(segment.slots for segment in self.segments if segment.kind == "sealed")

    @property
    def windows(self) -> int:
        """Windows sealed so far."""
        return sum(segment.kind == "sealed" for segment in self.segments)

    def extended(self, count: int, whole: bool) -> "Sequence":
        """With `count` tokens more: open ones, or a prompt that is kept whole together with what is open before it."""
        tokens = self.tokens + count
        if not whole:
            return replace(self, tokens=tokens, open=self.open + count)
        start, before = self.tokens - self.open, self.segments
        if before and before[-1].kind == "prompt":  # the next chunk of the same prompt
            start, before = before[-1].start, before[:-1]
        prompt = Segment("prompt", start, tokens, tokens - start)
        return replace(self, tokens=tokens, open=0, segments=(*before, prompt))

    def without(self, padding: int) -> "Sequence":
        """With `padding` open tokens fewer, which turned out to be none."""
        tokens = self.tokens - padding
        return replace(self, tokens=tokens, open=self.open - padding, voters=self._voters_before(tokens))

    def voted(self, count: int) -> "Sequence":
        """With the queries of the newest `count` tokens among those that voted."""
        start, before = self.tokens - count, self.voters
        if not count:
            return self
        if before and before[-1][1] >= start:
            start, before = min(start, before[-1][0]), before[:-1]
        return replace(self, voters=(*before, (start, self.tokens)))

    def _voters_before(self, tokens: int) -> tuple[tuple[int, int], ...]:
        return tuple((start, min(stop, tokens)) for start, stop in self.voters if start < tokens)

    def sealed(self, policy: KaraPolicy, unsure: int = 0) -> "Sequence":
        """With every window that is due turned into a sealed segment; see `KaraPolicy.due`."""
        due, width = policy.due(self, unsure), policy.config.window
        new = (Segment("sealed", seal.start, seal.start + width, seal.keep) for seal in due)
        return replace(self, open=self.open - len(due) * width, segments=(*self.segments, *new))

    def cropped(self, count: int) -> "Sequence | None":
        """Without its newest `count` tokens, or None if some of them are sealed."""
        left, tokens = max(0, count - self.open), self.tokens - count
        segments = list(self.segments)
        while left:
            if not segments or segments[-1].kind == "sealed":
                return None
            last = segments.pop()
            if last.slots > left:
                segments.append(replace(last, stop=last.stop - left, slots=last.slots - left))
            left = max(0, left - last.slots)
        voters = self._voters_before(tokens)
        return Sequence(tokens, max(0, self.open - count), tuple(segments), voters, self.pins)


def with_pins(limits: list[tuple[int, Kind]], pins: Pins) -> list[tuple[int, Kind]]:
    """`limits` of the stretches of a sequence, where what is pinned makes stretches of its own."""
    found: list[tuple[int, Kind]] = []
    start = 0
    for stop, kind in limits:
        for first, last in pins:
            if start < last and first < stop:
                if start < first:
                    found.append((first, kind))
                elif found and found[-1][1] == "pinned":  # goes on behind a limit
                    found.pop()
                start = min(last, stop)
                found.append((start, "pinned"))
        if start < stop:
            found.append((stop, kind))
            start = stop
    return found
