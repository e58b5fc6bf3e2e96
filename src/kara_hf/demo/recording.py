"""A run as data: which tokens each KV head held at every step, as changes that are few enough to be streamed.

*Seen* counts the tokens that the cache was given; it is the clock of a recording, since the last token generated is not
in the cache yet. A row is a KV head of a compressed layer. Between two changes nothing has to be said: what is open or
recent follows from the number of tokens seen. `player.js` derives the same from the same data.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ..cache.sequence import Kind, with_pins

FORMAT = 2
LISTS = ("tokens", "micros", "changes", "samples")

Rule = Literal["windows", "budget", "all"]


@dataclass
class Recording:
    """What one run did, append-only, so that it can be read while it grows.

    Attributes:
        title: what the cache is called.
        settings: what it was made with, in words.
        rule: what settles tokens: "windows" (Kara, PoD), a "budget" (KV-Compress), or nothing, since "all" is kept.
        prompt: tokens of the prompt.
        whole: how many of them are kept whole.
        recent: newest tokens that stay, by the rule.
        block: slots per block, 0 where there are none.
        rows: layer and KV head of each row.
        leads: with PoD the lead layer of each row, otherwise empty.
        pins: stretches ``[start, end]`` of positions that are pinned.
        near: with PoD the first and the newest tokens whose keys every row has of its own.
        tokens: text of each generated token.
        micros: microseconds that each of them took.
        changes: what was settled or evicted: ``seen``, the tokens seen then; ``stops``, where newly settled stretches
            end; ``dropped``, for each row the evicted positions as runs ``[start, length, start, length, ...]``;
            ``scored`` and ``scores``, runs of the same form and, for each row, the policy's scores of these positions.
        samples: readings of the cache's own report: tokens seen, bytes of what is kept, resident, peak, and of the full
            cache.
        end: how the run ended, once it has.
    """

    title: str
    settings: str
    rule: Rule
    prompt: int
    whole: int
    recent: int
    block: int = 0
    rows: list[list[int]] = field(default_factory=list)
    leads: list[int] = field(default_factory=list)
    pins: list[list[int]] = field(default_factory=list)
    near: list[int] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    micros: list[int] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)
    samples: list[list[int]] = field(default_factory=list)
    end: dict[str, Any] | None = None

    @property
    def seen(self) -> int:
        """Tokens that the cache has been given: all but the last one generated."""
        return self.prompt + len(self.tokens) - 1 if self.tokens else 0

    def head(self) -> dict[str, Any]:
        """Everything that does not grow, and how the run ended."""
        return {name: value for name, value in vars(self).items() if name not in LISTS}

    def since(self, have: dict[str, int]) -> dict[str, Any]:
        """`head`, and of every list what comes behind the first ``have[name]`` entries, for a reader that has those.

        A run goes on while it is read. A token is written behind what happened in its step, so tokens are counted
        first: changes of a step that is not read yet do no harm, a missing one would show evicted tokens as kept.
        """
        end, tokens = self.end, len(self.tokens)
        parts: dict[str, Any] = {
            name: getattr(self, name)[have.get(name, 0) : tokens if name in ("tokens", "micros") else None]
            for name in LISTS
        }
        return {**self.head(), **parts, "end": end}

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return self.since({})

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Recording":
        """Raises TypeError where an entry is missing or unknown."""
        return cls(**data)

    # ------------------------------------------------------------------------------------- what was held at any moment
    def kept_positions(self, row: int, seen: int) -> np.ndarray:
        """True positions that a row stored once `seen` tokens were seen, ``[T]`` int64, ascending."""
        alive = np.ones(seen, bool)
        for change in self.changes:
            if change["seen"] <= seen:
                alive[spread(change["dropped"][row])] = False
        return alive.nonzero()[0]

    def limits(self, seen: int) -> list[tuple[int, Kind]]:
        """Where the stretches of the sequence stopped, and what each of them was, in order, but for what is pinned."""
        stops = [stop for change in self.changes if change["seen"] <= seen for stop in change["stops"]]
        if self.rule == "budget":
            recent = max(0, seen - self.recent)
            return [(min(stops[-1] if stops else 0, recent), "sealed"), (recent, "open"), (seen, "recent")]
        settled = stops[-1] if stops else self.whole
        recent = max(settled, seen - self.recent)
        return [(self.whole, "prompt"), *((stop, "sealed") for stop in stops), (recent, "open"), (seen, "recent")]

    def chunks(self, row: int, seen: int) -> list[tuple[int, int, Kind]]:
        """As `CompressedCache.chunks`, once `seen` tokens were seen."""
        positions, found, begin = self.kept_positions(row, seen), [], 0
        for stop, kind in with_pins(self.limits(seen), tuple((start, end) for start, end in self.pins)):
            end = int(np.searchsorted(positions, stop))
            part = positions[begin:end]
            runs = np.split(part, np.flatnonzero(np.diff(part) != 1) + 1) if len(part) else []
            found += [(int(run[0]), int(run[-1]) + 1, kind) for run in runs]
            begin = end
        return found


def runs_of(positions: np.ndarray) -> list[int]:
    """Ascending positions as ``[start, length, start, length, ...]``."""
    if not len(positions):
        return []
    cuts = np.flatnonzero(np.diff(positions) != 1) + 1
    starts = positions[np.concatenate([[0], cuts])]
    lengths = np.diff(np.concatenate([[0], cuts, [len(positions)]]))
    return np.stack([starts, lengths], 1).ravel().tolist()


def spread(runs: list[int]) -> np.ndarray:
    """The positions of `runs_of`, int64."""
    parts = [np.arange(start, start + length) for start, length in zip(runs[::2], runs[1::2], strict=True)]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def rounded(scores: np.ndarray) -> list[float]:
    """Scores to three digits, which is what a reader sees of them."""
    scores = np.nan_to_num(np.asarray(scores, np.float64), posinf=1e30, neginf=-1e30)  # JSON has no infinity
    size = np.where(scores == 0, 1, np.abs(scores))
    scale = 10.0 ** (2 - np.floor(np.log10(size)))
    return (np.round(scores * scale) / scale).tolist()
