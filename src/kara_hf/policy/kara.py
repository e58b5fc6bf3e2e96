"""Kara: when a window closes and which of its tokens survive (arXiv 2607.01237)."""

from collections.abc import Callable
from pathlib import Path

import torch

from ..config import KaraConfig, require
from .calibrated import KeyCalibration
from .scores import SCORES, Window
from .token2chunk import token2chunk, top_tokens


class KaraPolicy:
    """Decides per window of W tokens; every KV head of every layer keeps the same number k of them.

    Args:
        config: the settings.

    Attributes:
        calibration: what the score was read from, if it is none that is registered.
        watch: told of every window that is scored, with its scores ``[b, H, W]``, if there is somebody to tell.

    Raises:
        ValueError, OSError: `config.score` is neither registered nor a key calibration that can be read.
    """

    calibration: KeyCalibration | None
    watch: Callable[[Window, torch.Tensor], None] | None = None

    def __init__(self, config: KaraConfig):
        self.config, self.calibration = config, None
        named = isinstance(config.score, str)
        if named and config.score in SCORES:
            self.score = SCORES[config.score]
        else:
            somewhere = named and ("/" in config.score or Path(config.score).exists())
            known = f"one of {', '.join(sorted(SCORES))}, or the folder or hub id of a key calibration"
            require(somewhere, "score", config.score, known)
            self.calibration = KeyCalibration.from_pretrained(config.score)
            self.score = self.calibration.score

    @property
    def compresses(self) -> bool:
        return self.config.kept_per_window < self.config.window

    @property
    def needs_queries(self) -> bool:
        """Whether the queries of open tokens must be held until their window seals."""
        return self.compresses and self.score.queries

    @property
    def needs_moments(self) -> bool:
        """Whether the second moments of all queries must be held."""
        return self.compresses and self.score.moments

    @property
    def open_limit(self) -> int:
        """Open tokens that a sequence has at most once its due windows are sealed: W + R - 1."""
        return self.config.window + self.config.recent - 1

    def windows_due(self, open_tokens: int) -> int:
        """Windows to seal with `open_tokens` behind the last sealed one: one while W + R or more remain. None where
        everything is kept.
        """
        return 0 if not self.compresses else max(0, (open_tokens - self.config.recent) // self.config.window)

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
        if self.score.chunks:
            return token2chunk(scores, window.keep, window.anchors)
        return top_tokens(scores, window.keep)
