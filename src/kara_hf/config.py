"""Settings of the methods: plain data that is checked when it is made and survives a round trip through JSON."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Self


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Raises ValueError naming the setting, its value and what would be accepted."""
    if not condition:
        raise ValueError(f"{name}={value!r} is not possible: {name} must be {expected}")


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class KaraConfig:
    """Settings of Kara (arXiv 2607.01237): what is kept of every window of tokens.

    Attributes:
        retention: share of a window's tokens that each KV head keeps, in (0, 1].
        window: tokens in a window; a multiple of `block_size`.
        recent: newest tokens that are always kept whole.
        score: name of the score that ranks a window's tokens; `KaraPolicy` refuses one that is not registered.
        anchor_share: share of the kept tokens that are picked singly, by score, before Token2Chunk fills gaps between
            them, in (0, 1]; 1 is plain top-k.
        compress_prompt: whether the prompt is walked in windows too; otherwise it is kept whole.
        block_size: slots per block.
        seed: of the random scores.

    Raises:
        ValueError: a setting is out of range; the message names it, its value and the range.
    """

    retention: float = 0.25
    window: int = 256
    recent: int = 32
    score: str = "bidirectional"
    anchor_share: float = 0.5
    compress_prompt: bool = False
    block_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        require(
            is_number(self.retention) and 0 < self.retention <= 1, "retention", self.retention, "a number in (0, 1]"
        )
        require(
            is_int(self.block_size) and self.block_size >= 1, "block_size", self.block_size, "a whole number from 1 on"
        )
        require(is_int(self.window) and self.window >= 2, "window", self.window, "a whole number of tokens from 2 on")
        require(
            self.window % self.block_size == 0,
            "window",
            self.window,
            f"a multiple of block_size={self.block_size}, so that sealing it frees whole blocks; round it or lower "
            "block_size",
        )
        require(is_int(self.recent) and self.recent >= 0, "recent", self.recent, "a whole number of tokens from 0 on")
        require(
            is_number(self.anchor_share) and 0 < self.anchor_share <= 1,
            "anchor_share",
            self.anchor_share,
            "a number in (0, 1]",
        )
        require(isinstance(self.compress_prompt, bool), "compress_prompt", self.compress_prompt, "True or False")
        require(is_int(self.seed), "seed", self.seed, "a whole number")

    @property
    def kept_per_window(self) -> int:
        """k = max(1, round(retention * window)), the tokens a KV head keeps of each window."""
        return max(1, round(self.retention * self.window))

    @property
    def anchors(self) -> int:
        """m = max(1, round(anchor_share * k)), the tokens picked singly."""
        return max(1, round(self.anchor_share * self.kept_per_window))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises TypeError on an unknown setting, ValueError on one out of range."""
        data: dict[str, Any] = json.loads(text)
        return cls(**data)
