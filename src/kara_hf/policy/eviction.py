"""Which blocks of a sequence are freed, and which tokens go for it (KV-Compress, arXiv 2410.00161).

Sequences are compressed side by side and never compete. Dims: B sequences, R rows of a sequence (its KV heads in all
layers; rows that only pad have length 0), N slots, M moves. A token that goes is *dropped*, a block that goes *freed*.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Eviction:
    """What a pass decided.

    Attributes:
        freed: blocks that each row gives up, ``[B, R]`` int64.
        lengths: tokens that each row has afterwards, ``[B, R]`` int64; whole blocks in every row that gives one up.
        dropped: which slots lose their token, ``[B, R, N]`` bool.
    """

    freed: torch.Tensor
    lengths: torch.Tensor
    dropped: torch.Tensor


def evict(
    metric: torch.Tensor,
    evictable: torch.Tensor,
    lengths: torch.Tensor,
    quota: torch.Tensor,
    *,
    block_size: int,
    least: int | torch.Tensor = 0,
    levels: int | None = None,
    weights: torch.Tensor | None = None,
) -> Eviction:
    """Frees the cheapest blocks over all rows of each sequence.

    The first block that a row frees costs it the tokens of its last, partly filled block, every further one
    `block_size` tokens, always those with the smallest metric; the *price* of a block is the largest metric among the
    tokens that have to go for it. The `quota` blocks of the lowest price are freed. Equal prices go to the earlier row,
    equal metrics to the earlier slot, so that a sequence loses the same tokens whatever batch it is in.

    With `levels`, rows that give up blocks end with at most `levels` different lengths per sequence; see `level`.

    Args:
        metric: ``[B, R, N]`` float32, larger is better kept; NaN counts as 0. Behind a row's length: anything.
        evictable: ``[B, R, N]`` bool, False for tokens that must stay. Behind a row's length: anything.
        lengths: ``[B, R]`` integer, tokens in each row, at most N.
        quota: ``[B]`` integer, blocks to free; where fewer can be freed, fewer are.
        block_size: P.
        least: blocks that no row is cut below, a number or ``[B]`` integer.
        levels: different block counts of compressed rows, or None for any number.
        weights: ``[R]`` integer, how many blocks a block of each row counts for, because other rows follow it; None: 1.

    Returns:
        The `Eviction`. Exactly min(quota, feasible) blocks of a sequence are freed, at least that many with `levels`
        and with `weights`.
        Rows that free none lose no token. Nothing is modified.

    Raises:
        ValueError: shapes do not fit.
    """
    slots = metric.shape[-1]
    if evictable.shape != metric.shape or lengths.shape != metric.shape[:2] or quota.shape != metric.shape[:1]:
        raise ValueError(
            f"metric {tuple(metric.shape)}, evictable {tuple(evictable.shape)}, lengths {tuple(lengths.shape)} and "
            f"quota {tuple(quota.shape)} do not fit; expected [B, R, N], [B, R, N], [B, R] and [B]"
        )
    lengths = lengths.long()
    slot = torch.arange(slots, device=metric.device)
    evictable = evictable & (slot < lengths[..., None])
    # Infinite metrics become the largest finite ones, so that infinity is left to mark what has to stay.
    metric = metric.nan_to_num(nan=0.0).masked_fill(~evictable, float("inf"))
    ascending, order = metric.sort(dim=-1, stable=True)

    blocks = -(-lengths // block_size)
    hanging = torch.where(blocks > 0, lengths - (blocks - 1) * block_size, block_size)  # tokens in the last block
    feasible = 1 + (evictable.sum(-1) - hanging) // block_size
    least = torch.as_tensor(least, device=metric.device).view(-1, 1)
    feasible = torch.minimum(feasible, (blocks - least).clamp(min=0))

    nth = torch.arange(-(-slots // block_size), device=metric.device)
    last = hanging[..., None] + nth * block_size - 1  # the last token to go for the nth block, in ascending order
    price = ascending.gather(-1, last.clamp(max=slots - 1)).masked_fill(nth >= feasible[..., None], float("inf"))
    # The prices of a row never fall, and a stable sort keeps equal ones in order: every row frees a prefix.
    ranking = price.flatten(1).sort(dim=-1, stable=True).indices
    place = torch.arange(ranking.shape[1], device=metric.device)
    if weights is None:
        picked = place < torch.minimum(quota.long(), feasible.sum(1))[:, None]
    else:
        worth = weights.long()[ranking // price.shape[2]]
        picked = (worth.cumsum(1) - worth < quota[:, None]) & (place < feasible.sum(1, keepdim=True))
    freed = torch.zeros_like(picked).scatter(1, ranking, picked).view(price.shape).sum(-1)

    if levels is not None:
        freed = blocks - level(blocks - freed, blocks - feasible, blocks, levels, weights)
    drops = torch.where(freed > 0, hanging + (freed - 1) * block_size, 0)
    dropped = torch.zeros_like(evictable).scatter(-1, order, slot < drops[..., None])
    return Eviction(freed, lengths - drops, dropped)


def level(
    kept: torch.Tensor, fewest: torch.Tensor, blocks: torch.Tensor, levels: int, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Rounds the blocks that rows keep to at most `levels` different counts per sequence, without keeping more in all.

    Rows that keep similar counts form a group. The groups are those for which the squared deviations of all counts from
    their group's mean, rounded down, add up to the least: where prices have decided, a block is worth about the same in
    every row, so that moving blocks between rows loses little at first, and more with the square of what is moved. Each
    group is then filled up to one level, the highest that its blocks pay for; what it leaves over goes to the next, of
    rows that keep more. Whatever its level, a row never keeps more than it has nor less than it must.

    Args:
        kept: ``[B, R]`` int64, blocks that each row would keep; between `fewest` and `blocks`.
        fewest: ``[B, R]`` int64, blocks that a row cannot go below. Where rows differ in this (beyond having no more
            than that), a row may keep its `fewest` above the level of its group.
        blocks: ``[B, R]`` int64, blocks that each row has.
        levels: from 1 on.
        weights: ``[R]`` integer, how many blocks a block of each row counts for; None: 1.

    Returns:
        ``[B, R]`` int64, between `fewest` and `blocks`, of a sum that is at most that of `kept` in every sequence.
    """
    rows = kept.shape[1]
    worth = kept.new_ones(rows) if weights is None else weights.long()
    ascending, order = kept.sort(dim=1, stable=True)
    free = (fewest < blocks).gather(1, order)  # other rows have no choice, and no part in choosing the groups
    start = _groups(ascending, free, min(levels, rows))
    group = (torch.arange(rows, device=kept.device)[:, None] >= start[:, None]).sum(-1)
    group = torch.zeros_like(order).scatter(1, order, group)

    highest = int(blocks.max()) if blocks.numel() else 0
    height = torch.arange(highest + 1, device=kept.device).expand(*kept.shape, -1)
    filled = torch.maximum(torch.minimum(height, blocks[..., None]), fewest[..., None])  # row by row, at every level
    budget = kept.new_zeros(kept.shape[0])
    levelled = kept
    for index in range(start.shape[1] + 1):
        mine = group == index
        budget = budget + (kept * mine * worth).sum(1)
        total = (filled * (mine * worth)[..., None]).sum(1)
        best = (total <= budget[:, None]).sum(1, keepdim=True) - 1
        levelled = torch.where(mine, filled.gather(2, best[:, None].expand(-1, rows, 1))[..., 0], levelled)
        budget = budget - total.gather(1, best)[:, 0]
    return levelled


def _groups(values: torch.Tensor, counts: torch.Tensor, groups: int) -> torch.Tensor:
    """Cuts ascending `values` ``[B, R]`` into groups, with the least squared deviations from means rounded down.

    `counts` ``[B, R]`` bool says which values matter. Returns where the groups after the first start, ascending, ``[B,
    groups - 1]`` int64. Exact, by dynamic programming over the number of groups; some may be empty.
    """
    weight = counts.double()
    sums = [F.pad((weight * values.double() ** n).cumsum(1), (1, 0)) for n in range(3)]
    inside, total, squares = (prefix[:, None, :] - prefix[:, :, None] for prefix in sums)
    mean = (total / inside.clamp(min=1)).floor()
    spread = squares - 2 * mean * total + mean**2 * inside  # [b, i, j]: of a group of the values i to j - 1
    size = spread.shape[1]
    spread = spread.masked_fill(torch.ones(size, size, dtype=torch.bool, device=values.device).tril(-1), float("inf"))
    best = spread[:, 0]
    cuts: list[torch.Tensor] = []
    for _ in range(groups - 1):
        best, cut = (best[:, :, None] + spread).min(1)
        cuts.append(cut)
    starts = [torch.full_like(values[:, :1], size - 1)]  # where a group behind the last would start
    for cut in reversed(cuts):
        starts.insert(0, cut.gather(1, starts[0]))
    return torch.cat(starts[:-1], 1) if cuts else values[:, :0]


def moves(dropped: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which survivors fill the holes that a pass leaves below each row's new length.

    The i-th lowest hole takes the i-th highest survivor. Every source lies at or above the new length and every target
    below it, no slot turns up twice, and what a target held is dropped: moves may be made in any order, in place.

    Args:
        dropped: ``[B, R, N]`` bool, from `evict`.
        lengths: ``[B, R]`` int64, tokens in each row afterwards.

    Returns:
        Source and target slots, each ``[B, R, M]`` int32; M is the largest number of moves of any row, and rows with
        fewer are filled up with -1. Waits for the device, to learn M.
    """
    slot = torch.arange(dropped.shape[-1], device=dropped.device)
    below = slot < lengths[..., None]
    before = lengths + dropped.sum(-1)
    holes = dropped & below
    survivors = ~dropped & ~below & (slot < before[..., None])
    count = holes.sum(-1, keepdim=True)
    most = int(count.max()) if count.numel() else 0
    upward = holes.cumsum(-1) - 1
    downward = count - survivors.cumsum(-1)

    def listed(chosen: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
        slots = slot.to(torch.int32).expand_as(chosen)
        empty = torch.full((*chosen.shape[:-1], most + 1), -1, dtype=torch.int32, device=chosen.device)
        return empty.scatter(-1, rank.masked_fill(~chosen, most), slots)[..., :most]  # place `most` takes all others

    return listed(survivors, downward), listed(holes, upward)
