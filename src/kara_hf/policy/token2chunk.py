"""From scores to kept tokens: Token2Chunk (Kara, arXiv 2607.01237) and plain top-k, for any number of rows at once."""

import torch


def top_tokens(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Places of the `keep` largest of `scores` ``[..., W]``, ascending, ties to the earlier: ``[..., keep]`` int64."""
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :keep].sort(dim=-1).values


def token2chunk(scores: torch.Tensor, keep: int, anchors: int) -> torch.Tensor:
    """Expands the best single tokens into contiguous chunks of any length at any place.

    The `anchors` best tokens are taken. The tokens strictly between two neighbouring anchors are a gap; filling it
    makes one chunk of both. Gaps are filled in order of falling mean score while they fit what is left of `keep`; one
    that does not fit is passed over. What is left then goes to the best single tokens. ``anchors == keep`` is top-k.

    Args:
        scores: ``[..., W]`` float.
        keep: k, tokens to keep of each row, 1 to W.
        anchors: m, 1 to k.

    Returns:
        ``[..., keep]`` int64, ascending. Ties are broken towards the earlier token and the earlier gap.
    """
    if anchors == keep:
        return top_tokens(scores, keep)
    shape, width = scores.shape, scores.shape[-1]
    scores = scores.reshape(-1, width).float()
    taken = torch.zeros_like(scores, dtype=torch.bool)
    picked = top_tokens(scores, anchors)
    taken.scatter_(1, picked, True)

    if anchors > 1:
        # The tokens behind the i-th anchor add up in place i; nothing from outside a gap enters its sum.
        behind = taken.cumsum(1)
        total = torch.zeros(scores.shape[0], anchors + 1, dtype=torch.float64, device=scores.device)
        total.scatter_add_(1, behind, scores.double().masked_fill(taken, 0.0))
        left, right = picked[:, :-1], picked[:, 1:]
        size = right - left - 1
        mean = total[:, 1:anchors] / size  # an empty gap has 0 / 0
        order = mean.nan_to_num(nan=float("-inf")).argsort(dim=1, descending=True, stable=True)
        sizes = size.gather(1, order)
        budget = torch.full_like(sizes[:, 0], keep - anchors)
        filled = torch.zeros_like(sizes, dtype=torch.bool)
        for gap in range(sizes.shape[1]):  # greedy by nature: what fits depends on what was filled before
            filled[:, gap] = sizes[:, gap] <= budget
            budget = budget - sizes[:, gap] * filled[:, gap]
        # A filled gap runs from its left anchor to its right one: +1 at the start, -1 at the end, summed up.
        inside = torch.zeros_like(filled).scatter_(1, order, filled).to(torch.int32)
        edges = torch.zeros(scores.shape[0], width, dtype=torch.int32, device=scores.device)
        edges.scatter_add_(1, left, inside).scatter_add_(1, right, -inside)
        taken |= edges.cumsum(1) > 0

    # Taken tokens outrank all others, so the best single tokens fill exactly what is left.
    ranked = scores.masked_fill(taken, float("inf"))
    return top_tokens(ranked, keep).view(*shape[:-1], keep)
