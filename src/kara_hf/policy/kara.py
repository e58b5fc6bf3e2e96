"""Kara: when a window closes and which of its tokens survive (arXiv 2607.01237)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from ..config import KaraConfig, Pins, require
from .pins import staying, within
from .scores import SCORES, Window
from .token2chunk import token2chunk


class Counts(Protocol):
    """What is asked of a sequence: tokens seen, newest ones that are still open, slots of its sealed windows, and what
    is pinned.
    """

    @property
    def tokens(self) -> int: ...

    @property
    def open(self) -> int: ...

    @property
    def kept(self) -> int: ...

    @property
    def pins(self) -> Pins: ...


@dataclass(frozen=True)
class Seal:
    """A window that is due.

    Attributes:
        start: true position of its first token.
        keep: tokens that every KV head keeps of it.
        recent: tokens behind it that are kept whole for certain.
    """

    start: int
    keep: int
    recent: int


class KaraPolicy:
    """Decides per window of W tokens; every KV head of every layer keeps the same number k of them.

    Args:
        config: the settings.

    Attributes:
        watch: told of every window that is scored, with its scores ``[b, H, W]``, if there is somebody to tell.

    Raises:
        ValueError: `config.score` is not registered.
    """

    watch: Callable[[Window, torch.Tensor], None] | None = None

    def __init__(self, config: KaraConfig):
        self.config = config
        known = isinstance(config.score, str) and config.score in SCORES
        require(known, "score", config.score, f"one of {', '.join(sorted(SCORES))}, or registered before")
        self.score = SCORES[config.score]

    @property
    def compresses(self) -> bool:
        return self.config.kept_per_window < self.config.window

    @property
    def needs_queries(self) -> bool:
        """Whether the queries of open tokens must be held until their window seals."""
        return self.compresses and self.score.queries

    def staying_of(self, start: int, pins: Pins) -> tuple[int, ...]:
        """Places in the window that starts at a true position whose tokens stay: sinks, and what is pinned."""
        stretches = staying(self.config.sinks, pins)
        return tuple(place - start for place in within(stretches, start, start + self.config.window))

    def kept_of(self, start: int, pins: Pins = ()) -> int:
        """Tokens that every KV head keeps of the window that starts at a true position: k, or those that stay if these
        are more.
        """
        return max(self.config.kept_per_window, len(self.staying_of(start, pins)))

    def recent_of(self, kept: int) -> int:
        """R: tokens that stay whole behind sealed windows of `kept` slots, of a share the fewest that make it up; or
        what the slots lack to `least_held`.
        """
        recent = self.config.recent
        if isinstance(recent, float):
            recent = math.ceil(recent * kept / (1 - recent) - 1e-9)
        return max(recent, self.config.least_held - kept)

    def open_limit(self, sequence: Counts) -> int:
        """Open tokens that a sequence can have before a window is due: W + R - 1."""
        return self.config.window + self.certain(sequence) - 1

    def certain(self, sequence: Counts) -> int:
        """Newest tokens that stay open when the next window seals."""
        return self.recent_of(sequence.kept + self.kept_of(sequence.tokens - sequence.open, sequence.pins))

    def newest(self, sequence: Counts) -> int:
        """Newest tokens that are recent now."""
        recent = self.config.recent
        if isinstance(recent, float):
            recent = math.ceil(recent * (sequence.kept + sequence.open) - 1e-9)
        return min(max(recent, self.config.least_held - sequence.kept), sequence.open)

    def due(self, sequence: Counts, unsure: int = 0) -> list[Seal]:
        """The windows to seal, oldest first: one while W + R or more tokens are open. None where everything is kept.

        The newest `unsure` tokens, which may be taken back, do not count.
        """
        found: list[Seal] = []
        width, left = self.config.window, sequence.open - unsure
        if not self.compresses or left < width:
            return found
        start, kept = sequence.tokens - sequence.open, sequence.kept
        while left >= width:
            keep = self.kept_of(start, sequence.pins)
            recent = self.recent_of(kept + keep)
            if left - width < recent:
                break
            found.append(Seal(start, keep, recent))
            start, left, kept = start + width, left - width, kept + keep
        return found

    def select(self, window: Window) -> torch.Tensor:
        """Tokens of a window that survive where fewer than all do, ``[b, H, k]`` int64, ascending.

        Raises:
            ValueError: a score is NaN, which means NaN in the model's keys or queries.
        """
        scores = self.score.rank(window)
        if scores.isnan().any():
            raise ValueError(
                f"the {self.config.score} scores of layer {window.layer} are NaN: the model's queries or keys are "
                "not finite; load it in bfloat16 or float32"
            )
        if self.watch is not None:
            self.watch(window, scores)
        return self.pick(window, scores, self.score.chunks)

    def pick(self, window: Window, scores: torch.Tensor, chunks: bool) -> torch.Tensor:
        """What stays in a window, and of its other tokens those of the best `scores` ``[b, H, W]``: ``[b, H, k]``.

        Sinks and pinned tokens stand aside: what is left of k is chosen of the others as if these made up the window.
        """
        staying = [
            self.staying_of(start, pins)
            for start, pins in zip(window.starts, window.pins or [()] * len(window.starts), strict=True)
        ]
        if not any(staying):
            return token2chunk(scores, window.keep, window.anchors if chunks else window.keep)
        kept = torch.empty(*scores.shape[:2], window.keep, dtype=torch.int64, device=scores.device)
        for places in set(staying):
            alike = torch.tensor([b for b, each in enumerate(staying) if each == places], device=scores.device)
            stays = torch.zeros(scores.shape[2], dtype=torch.bool, device=scores.device)
            stays[list(places)] = True
            chosen = stays.expand(len(alike), scores.shape[1], -1).clone()
            rest = window.keep - len(places)
            if rest:
                anchors = (self.config.anchors_of(rest) if places else window.anchors) if chunks else rest
                others = (~stays).nonzero()[:, 0]
                picked = token2chunk(scores[alike][:, :, others], rest, anchors)
                chosen.scatter_(2, others[picked], True)
            kept[alike] = chosen.nonzero()[:, 2].view(*chosen.shape[:2], window.keep)
        return kept
