"""attend_shared: a decode step where heads look at distant tokens through the logits of their leads (PoD, 2412.02252).

What is attended to is what `shared_attention` says. Here every sequence has one query, whose token is stored already,
and the logits of leads travel from layer to layer: none of their keys is read twice.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .attend import check_fits
from .attend_rounded import add_to_both, mixed, parts_of, rounded_logits
from .backend import use_triton
from .dense import grouped_logits, grouped_sinks, row_logits, row_weights, weighted, weights_of
from .metric import add_to_metric
from .precision import as_sdpa
from .rows import ProximalKeys, Rows
from .shared_attention import skipped


@as_sdpa(2)
def attend_shared_reference(
    query: torch.Tensor,
    rows: Rows,
    scores: torch.Tensor | None,
    *,
    positions: torch.Tensor,
    leading: Sequence[int],
    scaling: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    skip: float | None = None,
    metric_power: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One query head at a time; the specification of `attend_shared`."""
    batch, heads = rows.lengths.shape
    proximal, size = rows.proximal, rows.block_size
    out = query.new_zeros(*query.shape[:3], rows.values.shape[-1])
    if scores is None:
        scores = query.new_zeros(batch, heads, query.shape[1] // heads, 1, rows.max_length, dtype=torch.float32)
    scores = _as_wide(scores, rows.max_length)
    for b in range(batch):
        for hq in range(query.shape[1]):
            h, g = divmod(hq, query.shape[1] // heads)
            length = int(rows.lengths[b, h])
            if positions[b, 0] < 0 or not length:
                continue
            block, offset = torch.arange(length) // size, torch.arange(length) % size
            value_block = rows.value_table[b, h, block]
            place = rows.positions[value_block, offset]
            if proximal is None or h not in proximal.heads:
                distant = torch.zeros_like(place, dtype=torch.bool)
                keys = rows.read(rows.keys[rows.key_table[b, h, block], offset])
            else:
                distant = proximal.bounds.distant(positions[b], place)
                keys = rows.read(proximal.keys[b, proximal.heads.index(h), proximal.places(place)])
            logits = row_logits(query[b, hq, 0], keys, scaling, softcap)
            logits = torch.where(distant, scores[b, h, g, 0, :length], logits)
            if h in leading:
                scores[b, h, g, 0, :length] = logits
            probability = row_weights(logits, None if sink_logits is None else sink_logits[hq])
            gate = 1 - probability[distant].sum()
            if skip is not None and gate >= skip and proximal is not None and h in proximal.heads:
                probability = probability.masked_fill(distant, 0.0) / gate
            out[b, hq, 0] = (probability @ rows.read(rows.values[value_block, offset]).float()).to(out.dtype)
            if metric_power is not None and rows.metric is not None:
                rows.metric[value_block, offset] += probability**metric_power
    return out, scores


@as_sdpa(2)
def attend_shared(
    query: torch.Tensor,
    rows: Rows,
    scores: torch.Tensor | None,
    *,
    positions: torch.Tensor,
    leading: Sequence[int],
    scaling: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    skip: float | None = None,
    metric_power: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each sequence's newest token over rows some of whose keys are another layer's: a decode step.

    `skip`, which says what a model would answer and saves nothing here, is left to plain torch everywhere, and so are
    rows that are rounded in part.

    Args:
        query: ``[B, Hq, 1, Dk]``, of tokens that are stored already.
        rows: where heads in `rows.proximal` follow. Followers and leads hold the same tokens in the same slots.
        scores: ``[B, H, G, 1, T]`` float32, logits of the leads by slot, anything where they hold nothing; modified
            in place, or copied where these rows lead and may be longer than T; no follower is. None below the
            first lead.
        positions: ``[B, 1]`` int32, true positions of the queries; negative: padding, which sees nothing.
        leading: heads that another layer follows, whose logits are handed on.
        scaling, softcap, sink_logits, metric_power: as in `attend`.
        skip: as in the module's contract.

    Returns:
        The attention ``[B, Hq, 1, Dv]``, zeros where nothing is seen, in the dtype that `attend` returns, and `scores`
        for the layers above.

    Raises:
        ValueError: a head follows, and there are no scores; or as `attend`.
    """
    check_fits(query, rows, metric_power)
    proximal = rows.proximal
    if proximal is not None and scores is None:
        raise ValueError(f"heads {proximal.heads} follow, and there are no scores of their leads")
    if rows.rounded is not None:
        return attend_shared_rounded(
            query,
            rows,
            scores,
            positions=positions,
            leading=leading,
            scaling=scaling,
            softcap=softcap,
            sink_logits=sink_logits,
            skip=skip,
            metric_power=metric_power,
        )
    if skip is None and use_triton(query, query.shape[-1], rows.values.shape[-1], dtypes=rows.dtypes):
        from .triton_.attend_shared import attend_shared as attend_shared_triton

        return attend_shared_triton(
            query,
            rows,
            scores,
            positions=positions,
            leading=leading,
            scaling=scaling,
            softcap=softcap,
            sink_logits=sink_logits,
            metric_power=metric_power,
        )

    keys, values = rows.dense()
    here = None  # positions are not asked for where slots say everything
    if not rows.uniform or (proximal is not None and not (rows.in_order and skip is None)):
        here = rows.dense_positions()
    if proximal is None or scores is None:
        logits = grouped_logits(query, keys, scaling, softcap)
        if scores is None:
            scores = logits
        elif leading:
            scores = _as_wide(scores, rows.max_length)
            _hand_on(scores, logits, leading)
    else:
        by_head = query.unflatten(1, (rows.lengths.shape[1], -1))
        scores = _as_wide(scores, rows.max_length)
        logits = scores[..., : rows.max_length].clone()
        if len(proximal.rest):
            logits[:, proximal.rest] = grouped_logits(by_head[:, proximal.rest].flatten(1, 2), keys, scaling, softcap)
            _hand_on(scores, logits, leading)
        queries = query if len(proximal.heads) == by_head.shape[1] else by_head[:, proximal.index].flatten(1, 2)
        _put_own(
            logits, grouped_logits(queries, rows.read(proximal.keys), scaling, softcap), rows, proximal, positions, here
        )
    sink_logits = grouped_sinks(sink_logits, logits.shape[1])
    stored = None if rows.uniform or here is None else here[:, :, None, None] >= 0
    if stored is None:
        weights = weights_of(logits, sink_logits)
    else:
        weights = weights_of(logits.masked_fill(~stored, float("-inf")), sink_logits)
        weights = weights.masked_fill(~stored.any(-1, keepdim=True), 0.0)
    if proximal is not None and here is not None and skip is not None:
        distant = proximal.bounds.distant(positions[:, None], here)
        distant = (distant if distant.shape[1] == 1 else distant[:, proximal.index])[:, :, None, None]
        weights = weights.index_copy(1, proximal.index, skipped(weights[:, proximal.index], distant, skip))
    padding = positions[:, None] < 0
    if metric_power is not None:
        received = (weights.detach() ** metric_power).sum((2, 3))
        add_to_metric(rows, received.masked_fill(padding, 0.0))
    return weighted(weights, values, query.dtype).masked_fill(padding[..., None], 0.0), scores


def _hand_on(scores: torch.Tensor, logits: torch.Tensor, leading: Sequence[int]) -> None:
    for head in leading:
        scores[:, head, ..., : logits.shape[-1]] = logits[:, head]


def _as_wide(scores: torch.Tensor, tokens: int) -> torch.Tensor:
    """`scores` of at least so many tokens; layers whose heads hold different numbers differ in the most."""
    missing = tokens - scores.shape[-1]
    return F.pad(scores, (0, missing)) if missing > 0 else scores


def _put_own(
    logits: torch.Tensor,
    own: torch.Tensor,
    rows: Rows,
    proximal: ProximalKeys,
    positions: torch.Tensor,
    here: torch.Tensor | None,
) -> None:
    """Writes the followers' `own` logits ``[B, F, G, 1, R]`` of proximal tokens into `logits` ``[B, H, G, 1, T]``.

    `here` are the rows' `dense_positions`; None: slots of rows that are all of one length say it.
    """
    if here is None:
        everyone = len(proximal.heads) == logits.shape[1]
        for start, stop, place in proximal.runs(rows.max_length):
            part = own.narrow(-1, place, stop - start)
            if everyone:
                logits.narrow(-1, start, stop - start).copy_(part)
            else:
                logits[:, proximal.index, :, :, start:stop] = part
        return
    here = here if here.shape[1] == 1 else here[:, proximal.index]
    shown = (here >= 0) & ~proximal.bounds.distant(positions[:, None], here)
    places = proximal.places(here).clamp(0, max(0, own.shape[-1] - 1))[:, :, None, None]
    spread = own.gather(-1, places.expand(-1, own.shape[1], own.shape[2], 1, -1).long())
    logits[:, proximal.index] = torch.where(shown[:, :, None, None], spread, logits[:, proximal.index])


@as_sdpa(2)
def lead_scores(
    query: torch.Tensor, leads: list[Rows], heads: Sequence[int], *, scaling: float, softcap: float | None = None
) -> torch.Tensor:
    """Logits of a layer's own queries with its leads' keys: the scores of followers whose distant query is "own".

    Args:
        query: ``[B, Hq, 1, Dk]``.
        leads: rows of the lead of each head in `heads`.
        heads: the followers.
        scaling, softcap: as in `attend`.

    Returns:
        ``[B, H, G, 1, T]`` float32; anything in other heads and where a row has no token.
    """
    batch, heads_in_all = leads[0].lengths.shape
    group = query.shape[1] // heads_in_all
    longest = max(rows.max_length for rows in leads)
    if any(rows.rounded is not None for rows in leads):
        return _lead_scores_rounded(query, leads, heads, scaling, softcap)
    scores = query.new_zeros(batch, heads_in_all, group, 1, longest, dtype=torch.float32)
    if use_triton(query, query.shape[-1], dtypes=tuple(rows.keys.dtype for rows in leads)):
        from .triton_.attend_shared import lead_scores as lead_scores_triton

        lead_scores_triton(query, leads, heads, scores, scaling=scaling, softcap=softcap)
        return scores

    for head, rows in zip(heads, leads, strict=True):
        fresh = grouped_logits(query[:, head * group : (head + 1) * group], rows.keys_of(head), scaling, softcap)
        scores[:, head : head + 1, ..., : rows.max_length] = fresh
    return scores


def attend_shared_rounded(
    query: torch.Tensor,
    rows: Rows,
    scores: torch.Tensor | None,
    *,
    positions: torch.Tensor,
    leading: Sequence[int],
    scaling: float,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
    skip: float | None,
    metric_power: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attend_shared`, of rows that are rounded in part, all of whose records are of distant tokens."""
    rounded, proximal, (keys, values) = parts_of(rows), rows.proximal, rows.dense()
    here, slots = rows.all_positions(), rows.all_slots()[:, :, None, None]
    by_head = query.unflatten(1, (rows.lengths.shape[1], -1))
    places = slots.expand(-1, -1, by_head.shape[2], -1, -1)
    wide = query.new_zeros(*places.shape[:-1], 0, dtype=torch.float32) if scores is None else scores
    wide = _as_wide(wide, rows.columns + 1)  # one place for columns without a token
    logits = wide.gather(-1, places)
    asking = by_head if proximal is None else by_head[:, proximal.rest]
    if asking.shape[1]:
        asking = asking.flatten(1, 2)
        own = [rounded_logits(asking, rounded, scaling, softcap), grouped_logits(asking, keys, scaling, softcap)]
        logits = torch.cat(own, -1) if proximal is None else logits.index_copy(1, proximal.rest, torch.cat(own, -1))
    if proximal is not None:
        following = by_head[:, proximal.index].flatten(1, 2)
        near = grouped_logits(following, rows.read(proximal.keys), scaling, softcap)
        _put_own(logits, near, rows, proximal, positions, here)
    for head in leading:
        wide[:, head].scatter_(-1, places[:, head], logits[:, head])
    stored = here[:, :, None, None] >= 0
    weights = weights_of(logits.masked_fill(~stored, float("-inf")), grouped_sinks(sink_logits, logits.shape[1]))
    weights = weights.masked_fill(~stored.any(-1, keepdim=True), 0.0)
    if proximal is not None and skip is not None:
        distant = proximal.bounds.distant(positions[:, None], here)[:, proximal.index][:, :, None, None]
        weights = weights.index_copy(1, proximal.index, skipped(weights[:, proximal.index], distant, skip))
    padding = positions[:, None] < 0
    if metric_power is not None:
        add_to_both(rows, (weights.detach() ** metric_power).sum((2, 3)).masked_fill(padding, 0.0))
    return mixed(weights, rows, values, query.dtype).masked_fill(padding[..., None], 0.0), wide


def _lead_scores_rounded(
    query: torch.Tensor, leads: list[Rows], heads: Sequence[int], scaling: float, softcap: float | None
) -> torch.Tensor:
    """As `lead_scores`, of leads that are rounded in part."""
    group = query.shape[1] // leads[0].lengths.shape[1]
    longest = max(rows.columns for rows in leads) + 1
    scores = query.new_zeros(len(query), leads[0].lengths.shape[1], group, 1, longest, dtype=torch.float32)
    for head, rows in zip(heads, leads, strict=True):
        keys, slots = rows.all_keys()[:, head : head + 1], rows.all_slots()[:, head, None, None]
        fresh = grouped_logits(query[:, head * group : (head + 1) * group], keys, scaling, softcap)[:, 0]
        scores[:, head].scatter_(-1, slots.expand_as(fresh), fresh)
    return scores
