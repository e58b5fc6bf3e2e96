"""Scores: what ranks the tokens of a window. Adding one is one function under `register_score`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..config import Pins
from ..kernels import window_scores
from .token2chunk import token2chunk


@dataclass(frozen=True)
class Window:
    """What a score may look at: one window of W tokens in one layer, for b sequences.

    Attributes:
        rows: H, rows that a sequence has in the store: its KV heads, or 1 where all heads share one latent row.
        keys: ``[b, H, W, D]``, as attention saw them; of every query head where a latent row is expanded.
        queries: ``[b, Hq, n, D]`` of the same tokens or of a sample of n, those of `kara_hf.kernels.sampled_places`, or
            None for a score registered with ``queries=False``.
        later: ``[b, Hq, R, D]`` of the R recent tokens behind the window, which are kept whole, or of as many as the
            same sampling hits, perhaps none; or None as `queries`.
        scaling: the layer's factor on q.k.
        softcap: the layer's soft cap on logits, or None.
        layer: index of the layer.
        sequences: which sequences of the batch these are, b numbers.
        starts: for each of the b sequences the true position of the window's first token.
        ordinals: for each of the b sequences, how many windows it had sealed before this one.
        keep: k, tokens that will be kept per head.
        anchors: m, tokens that Token2Chunk picks singly.
        seed: of the cache.
        values: ``[b, H, W, Dv]`` as they are stored, which is one latent row for all heads where there is one; or None
            for a score registered with ``values=False``.
        pins: for each of the b sequences what is pinned, by true position; empty: nothing is.
    """

    rows: int
    keys: torch.Tensor
    queries: torch.Tensor | None
    later: torch.Tensor | None
    scaling: float
    softcap: float | None
    layer: int
    sequences: list[int]
    starts: list[int]
    ordinals: list[int]
    keep: int
    anchors: int
    seed: int
    values: torch.Tensor | None = None
    pins: tuple[Pins, ...] = ()

    def attention(self, causal: bool = False, later: bool = False) -> torch.Tensor:
        """Mean attention from the window's queries to each key, over the heads of a row: ``[b, H, W]`` float32.

        With `later` the queries of the recent tokens count as well.
        """
        assert self.queries is not None, "the score is registered with queries=False"
        parts = [self.queries]
        if later and self.later is not None:
            parts += [part for part in self.later.split(self.keys.shape[2], 2) if part.shape[2]]
        count = sum(part.shape[2] for part in parts)
        scores = torch.stack(
            [
                window_scores(part, self.keys, scaling=self.scaling, softcap=self.softcap, causal=causal)
                * (part.shape[2] / count)
                for part in parts
            ]
        ).sum(0)
        return scores.unflatten(1, (self.rows, -1)).mean(2)

    def random(self, width: int) -> torch.Tensor:
        """Uniform numbers ``[b, H, width]`` that depend on seed, layer, head and ordinal alone, not on batch-mates."""
        rows = []
        for ordinal in self.ordinals:
            generator = torch.Generator().manual_seed(hash((self.seed, self.layer, ordinal)) % 2**63)
            rows.append(torch.rand(self.rows, width, generator=generator))
        return torch.stack(rows).to(self.keys.device)


@dataclass(frozen=True)
class Score:
    """A ranking and how it is used.

    Attributes:
        rank: from a `Window` to scores ``[b, H, W]``, larger is better.
        queries: whether it needs the window's queries, which must then be held until the window seals.
        values: whether it needs the window's values, which are then read from the store.
        chunks: whether Token2Chunk expands its best tokens; otherwise the k best are kept.
    """

    rank: Callable[[Window], torch.Tensor]
    queries: bool
    chunks: bool
    values: bool = False


SCORES: dict[str, Score] = {}


def register_score(
    name: str, *, queries: bool = False, values: bool = False, chunks: bool = False
) -> Callable[[Callable[[Window], torch.Tensor]], Callable[[Window], torch.Tensor]]:
    """Makes a function from `Window` to scores ``[b, H, W]`` selectable as ``score=name``.

    Raises:
        ValueError: the name is taken.
    """

    def register(rank: Callable[[Window], torch.Tensor]) -> Callable[[Window], torch.Tensor]:
        if name in SCORES:
            raise ValueError(f"score {name!r} is registered already; choose another name")
        SCORES[name] = Score(rank, queries, chunks, values)
        return rank

    return register


@register_score("bidirectional", queries=True, chunks=True)
def bidirectional(window: Window) -> torch.Tensor:
    """Mean attention from all queries of the window to each key, in both directions (Kara, arXiv 2607.01237)."""
    return window.attention()


@register_score("causal", queries=True, chunks=True)
def causal(window: Window) -> torch.Tensor:
    """The same under a causal mask: early keys collect votes from many queries and late ones from few."""
    return window.attention(causal=True)


@register_score("key-difference")
def key_difference(window: Window) -> torch.Tensor:
    """How little a key points where the window's keys point on average: 1 - cosine (KeyDiff, arXiv 2504.15364).

    Keys of tokens that are told apart get more attention than keys of the crowd. Nothing has to be held for it.
    """
    keys = window.keys.float()
    likeness = torch.nn.functional.cosine_similarity(keys, keys.mean(2, keepdim=True), dim=-1)
    return (1 - likeness).unflatten(1, (window.rows, -1)).mean(2)


@register_score("blend", queries=True)
def blend(window: Window) -> torch.Tensor:
    """Place by attention plus place by `key_difference`, from 0 for the last of the window on. Ours.

    Attention is that of `bidirectional`, from the recent tokens behind the window too. Few queries do for it
    (`KaraConfig.queries`): where their mean says little, keys decide.
    """
    return _places(window.attention(later=True)) + _places(key_difference(window))


def _places(scores: torch.Tensor) -> torch.Tensor:
    """How many of the last dimension score less, those in front of an equal one among them; NaN stays NaN."""
    return scores.argsort(dim=-1, stable=True).argsort(-1) + 0 * scores


@register_score("random")
def random(window: Window) -> torch.Tensor:
    """Random tokens: the null hypothesis of every score."""
    return window.random(window.keys.shape[2])


@register_score("random-chunks", queries=True)
def random_chunks(window: Window) -> torch.Tensor:
    """Chunks as long as those that Token2Chunk makes of the bidirectional scores, at random places."""
    scores = bidirectional(window)
    kept = token2chunk(scores, window.keep, window.anchors)
    taken = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, kept, True)
    return shuffle_runs(taken, window.random(scores.shape[2] + 1)).float() + 0 * scores  # NaN stays NaN


@register_score("recency")
def recency(window: Window) -> torch.Tensor:
    """The last tokens of the window."""
    batch, _, width, _ = window.keys.shape
    return torch.arange(width, device=window.keys.device, dtype=torch.float32).expand(batch, window.rows, width)


def shuffle_runs(taken: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Puts the runs of True in `taken` ``[..., W]`` at random places without joining or cutting any.

    Args:
        taken: ``[..., W]`` bool.
        noise: ``[..., W + 1]`` independent uniform numbers.

    Returns:
        ``[..., W]`` bool with the same run lengths, every arrangement equally likely.
    """
    width = taken.shape[-1]
    padded = torch.nn.functional.pad(taken.reshape(-1, width), (0, 1))
    follows = torch.nn.functional.pad(padded[:, :-1], (1, 0))
    # Items to shuffle: a run with the blank behind it, and every other blank. One blank more than the window has closes
    # the last run, and whatever comes last then ends with a blank that can be dropped.
    heads = ~follows
    item = heads.cumsum(1) - 1
    lengths = torch.zeros_like(item).scatter_add_(1, item, torch.ones_like(item))
    order = noise.reshape(-1, width + 1).masked_fill(lengths == 0, 2.0).argsort(1)
    ends = lengths.gather(1, order).cumsum(1)
    starts = torch.zeros_like(ends).scatter_(1, order, ends - lengths.gather(1, order))
    first = torch.zeros_like(item).scatter_reduce_(
        1, item, torch.arange(width + 1, device=item.device).expand_as(item), "amin", include_self=False
    )
    place = starts.gather(1, item) + torch.arange(width + 1, device=item.device) - first.gather(1, item)
    return torch.zeros_like(padded).scatter_(1, place, padded)[:, :width].view_as(taken)
