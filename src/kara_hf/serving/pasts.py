"""Finished requests whose compressed tokens stay in the pool, so that the next turn of a conversation begins there.

To the engine a past is a request that holds blocks and never runs. Others share these blocks, and copy those they write
to.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import numpy as np

from ..cache.sequence import Segment
from ..config import Pins
from .plans import ServedRequest, dropped
from .pool import Pool
from .requests import prompt_tokens


@dataclass(frozen=True, eq=False)
class Past:
    """What a finished request left behind.

    Attributes:
        key: under which the engine has its blocks.
        tokens: those it stands for, ``[T]`` int64.
        segments: its compressed prompt and its sealed windows, oldest first; all other tokens are stored.
    """

    key: Any
    tokens: np.ndarray
    segments: tuple[Segment, ...]

    def reach(self, tokens: np.ndarray) -> int:
        """How many of `tokens` it stands for: as many as agree, but none of a segment that agrees in part.

        0 where not even its first segment agrees. The engine finds whole tokens by itself.
        """
        first = self.segments[0].stop
        if len(tokens) < first or tokens[first - 1] != self.tokens[first - 1]:  # seen at a glance
            return 0
        length = min(len(self.tokens), len(tokens))
        agree = self.tokens[:length] == tokens[:length]
        common = length if agree.all() else int(agree.argmin())
        reach = next((each.start for each in self.segments if each.start < common < each.stop), common)
        return reach if reach >= first else 0

    def before(self, tokens: int) -> tuple[Segment, ...]:
        """The segments of its first `tokens` tokens."""
        return tuple(segment for segment in self.segments if segment.stop <= tokens)


class Found(NamedTuple):
    """A past, the tokens of a prompt that it stands for, and how many of these are not stored."""

    past: Past
    tokens: int
    evicted: int


class Pasts:
    """The pasts of an engine, those first that were made or found longest ago.

    Args:
        pool: that has their blocks.
        most: how many there may be.

    Raises:
        ValueError: there may be some, and the engine lets no request begin with blocks of others.
    """

    def __init__(self, pool: Pool, most: int):
        if most and not pool.cache.use_prefix_sharing:
            raise ValueError(
                f"conversations={most} is not possible with sliding-window layers, or with allow_block_sharing=False: "
                "requests cannot begin with blocks of others then; leave it out"
            )
        self.pool, self.most = pool, most
        self._pasts: dict[Any, Past] = {}
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._pasts)

    def __contains__(self, key: object) -> bool:
        return key in self._pasts

    def keep(self, state: Any, request: ServedRequest) -> None:
        """Takes over the blocks of a request that has ended, if it was compressed.

        The past that it began from goes, unless it stands for something that this one does not.
        """
        if not request.segments:
            return
        table = self.pool.allocator.block_table
        tokens = np.array([*state.initial_tokens, *state.generated_tokens][: request.tokens], np.int64)
        past = Past(("past", next(self._numbers)), tokens, request.segments)
        for old in list(self._pasts.values()):
            if past.reach(old.tokens) == len(old.tokens):
                self.forget(old)
        while len(self._pasts) >= self.most:
            self.forget_oldest()
        table[past.key] = table.pop(request.key)
        self._pasts[past.key] = past

    def find(self, prompt: Sequence[int]) -> Found | None:
        """The past that stands for most of a prompt, whose last token is always computed; None without any."""
        if not self._pasts:
            return None
        tokens, best = np.asarray(prompt)[:-1], None
        for past in list(self._pasts.values()):  # may be asked by other threads
            reach = past.reach(tokens) if past.key in self.pool.allocator.block_table else 0
            if reach > (best.tokens if best else 0):
                best = Found(past, reach, sum(map(dropped, past.before(reach))))
        return best

    def begin(self, state: Any, found: Found, pins: Pins) -> ServedRequest | None:
        """Lets a request begin with what was found for it. None: there is no room for a copy of its last block.

        What was open when the past ended, and the rest of the prompt, are kept whole.
        """
        past, tokens, evicted = found
        others = {key: other for key, other in self._pasts.items() if other is not past}
        self._pasts = others | {past.key: past}
        key, segments = state.request_id, past.before(tokens)
        if not self.pool.share(past.key, key, tokens - evicted):
            return None
        sealed = [segment.slots for segment in segments if segment.kind == "sealed"]
        return ServedRequest(
            key,
            settled=max(prompt_tokens(state), tokens) - evicted,
            stored=tokens - evicted,
            kept=sum(sealed),
            evicted=evicted,
            windows=len(sealed),
            segments=segments,
            pins=pins,
        )

    def forgettable_blocks(self) -> int:
        """Blocks that nobody but pasts holds."""
        full = self.pool.allocator
        held = Counter(block for key in self._pasts for block in full.block_table.get(key, ()))
        return sum(full.ledger.shared_ref_counts.get(block, 1) == holders for block, holders in held.items())

    def forget_oldest(self) -> bool:
        """Gives up the past that was made or found longest ago. False: there is none."""
        if not self._pasts:
            return False
        self.forget(next(iter(self._pasts.values())))
        return True

    def forget(self, past: Past) -> None:
        """Gives up a past. Blocks that hold whole tokens stay in the engine's cache of prefixes."""
        del self._pasts[past.key]
        self.pool.allocator.free_blocks(past.key)
