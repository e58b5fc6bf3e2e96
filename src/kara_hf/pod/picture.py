"""What a picture of layers shows, however it is drawn: how alike they attend, and which of them share keys."""

import math
from dataclasses import dataclass

import numpy as np

from ..policy.sharing import PoDSharing
from .similarity import LayerSimilarity, groups_of

# More layers than these go without a number in each cell: of a map, and of the table of leads.
MOST_NUMBERS, MOST_LEADS = 8, 40
TICK_STEPS = (1, 2, 4, 5, 8, 10, 16, 20, 25, 40, 50, 100)
FOLLOWS, LEADS, ALONE, MISSING = "#c6dbef", "#fdae6b", "#f0f0f3", "#d9d9de"
OUTLINE = "#d95f02"  # with white beside it, so that it is seen on either end of the colours
BAR_LABEL = "similarity (outlined layers share keys; the first of them leads)"


@dataclass(frozen=True)
class Picture:
    """What is drawn.

    Attributes:
        title, lines: in words.
        maps: similarity of layers for each KV head, ``[H, L, L]``; NaN where it is not known.
        groups: for each KV head the layers of each group, its lead first.
        lead: ``[L, H]``, as in `PoDSharing`.
    """

    title: str
    lines: tuple[str, ...]
    maps: np.ndarray
    groups: list[list[list[int]]]
    lead: np.ndarray

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of maps."""
        rows = max(1, round(math.sqrt(len(self.maps) / 1.7)))
        return rows, -(-len(self.maps) // rows)

    @property
    def ticks(self) -> list[int]:
        """Layers that are named on an axis."""
        layers, most = len(self.lead), max(6, 32 // self.grid[1])
        step = next((step for step in TICK_STEPS if layers <= step * most), layers)
        return list(range(0, layers, step))

    @property
    def numbered(self) -> bool:
        """Whether there is room for a number in each cell of a map."""
        return len(self.lead) * self.grid[1] <= 2 * MOST_NUMBERS

    @property
    def named(self) -> bool:
        """Whether there is room for the lead in each cell of the table of leads."""
        return len(self.lead) <= MOST_LEADS and len(self.maps) <= 16

    @property
    def dense(self) -> bool:
        """Whether maps are so small, or layers so many, that titles must be short and outlines thin."""
        return self.grid[1] > 5 or len(self.lead) > MOST_LEADS

    @property
    def low(self) -> float:
        """Where the colours begin: just below the lowest similarity."""
        lowest = np.nanmin(self.maps) if np.isfinite(self.maps).any() else 0.0
        return math.floor(min(lowest, 0.9) * 10) / 10

    @property
    def roles(self) -> np.ndarray:
        """``[L, H]``: 0 alone, 1 follows another layer, 2 leads others."""
        own = np.arange(len(self.lead))[:, None]
        roles = (self.lead != own).astype(int)
        for head, groups in enumerate(self.groups):
            roles[[group[0] for group in groups if len(group) > 1], head] = 2
        return roles

    def name(self, head: int) -> str:
        follow = int((self.roles[:, head] == 1).sum())
        return f"head {head}" if self.dense else f"KV head {head}: {follow} of {len(self.lead)} follow"


def picture_of(similarity: LayerSimilarity, sharing: PoDSharing) -> Picture:
    origin, tokens = sharing.origin, 8 * sharing.proximal
    name = similarity.origin.get("model_name", "the model")
    samples = f"{len(similarity.tokens)} sample{'s'[: len(similarity.tokens) > 1]}"
    rule = f"threshold {origin['threshold']:.3g} ({origin['compare']}): " if "threshold" in origin else ""
    return Picture(
        title=f"Which layers of {name} attend alike, and which share keys",
        lines=(
            f"1 - Jensen-Shannon divergence of attention to {similarity.region} tokens, by the last "
            f"{similarity.queries} queries of {samples} of {max(similarity.tokens):,} tokens",
            f"{rule}{sharing.followers_share:.0%} of the (layer, KV head) pairs follow, which saves "
            f"{sharing.saving(tokens):.1%} of the cache of {tokens:,} tokens",
        ),
        maps=similarity.similarity.numpy().astype(float),
        groups=[groups_of(sharing, head) for head in range(sharing.heads)],
        lead=np.array(sharing.lead),
    )
