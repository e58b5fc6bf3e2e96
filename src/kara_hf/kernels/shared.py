"""shared_attention: attention of heads that look at distant tokens through another layer's keys (PoD, 2412.02252 §2).

    query            [B, Hq, S, Dk]      G = Hq / H queries of each KV head, which follow one another
    keys             [B, H, T, Dk]       the layer's own; anything finite where a follower's token is distant to
                                         every query
    values           [B, H, T, Dv]       the layer's own
    lead_query       [B, F * G, S, Dk]   for distant tokens of the F followers: queries of their leads, or their own
    lead_keys        [B, F, T, Dk]       keys of their leads
    followers        F KV heads, ascending
    query_positions  [B, S] int32            true positions; negative: padding, which sees nothing
    key_positions    [B, 1 or H, T] int32    true positions; negative: nothing there
    near             Near                which tokens are proximal
    scaling, softcap, sinks              as in attend; logits of distant tokens too are scaled by this layer's factor
    skip             a follower's query whose proximal tokens get at least this share leaves out the rest; None: never

The last S keys are those of the queries' own tokens, in order. A query at position i sees keys at positions j <= i.
Distant are those with ``near.first <= j <= i - near.recent``: their logits are lead_query . lead_key, all others are
query . key; one softmax goes over both, which is the paper's gate.

Returns ``[B, Hq, S, Dv]`` in the query's dtype; zeros where nothing is seen. Differentiable in all that is float;
softmax and accumulation are float32. Nothing is modified.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .attend import QUERY_CHUNK, add_to_metric, check_fits, grouped_logits, weighted, weights_of
from .backend import use_triton
from .rows import Near, NearKeys, Rows

KEPT_LOGITS = 2**25  # of one layer, that are held for the gradient


def shared_attention_reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lead_query: torch.Tensor,
    lead_keys: torch.Tensor,
    *,
    followers: Sequence[int],
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    near: Near,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    skip: float | None = None,
) -> torch.Tensor:
    """One query at a time, proximal and distant attention joined by the gate; the specification."""
    batch, query_heads, new, _ = query.shape
    heads = keys.shape[1]
    group = query_heads // heads
    out = query.new_zeros(batch, query_heads, new, values.shape[-1])

    def attention(logits: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not len(logits):
            return value.new_zeros(value.shape[-1]).float(), torch.tensor(float("-inf"))
        return logits.softmax(0) @ value.float(), logits.logsumexp(0)

    for b in range(batch):
        for hq in range(query_heads):
            h = hq // group
            place = key_positions[b, h % key_positions.shape[1]]
            for s in range(new):
                at = int(query_positions[b, s])
                seen = (place >= 0) & (place <= at)
                far = seen & near.distant(torch.tensor(at), place) if h in followers else torch.zeros_like(seen)
                logits = keys[b, h].float() @ query[b, hq, s].float() * scaling
                if h in followers:
                    f = list(followers).index(h)
                    lead = lead_query[b, f * group + hq % group, s].float()
                    logits = torch.where(far, lead_keys[b, f].float() @ lead * scaling, logits)
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                near_out, near_lse = attention(logits[seen & ~far], values[b, h][seen & ~far])
                far_out, far_lse = attention(logits[far], values[b, h][far])
                if at < 0 or not seen.any():
                    continue
                if sinks is not None:  # takes from the proximal part, which the query itself is always in
                    near_out = near_out * torch.sigmoid(near_lse - sinks[hq].float())
                    near_lse = torch.logaddexp(near_lse, sinks[hq].float())
                gate = torch.sigmoid(near_lse - far_lse)
                if skip is not None and gate >= skip:
                    gate = torch.ones_like(gate)
                out[b, hq, s] = gate * near_out + (1 - gate) * far_out
    return out


def shared_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lead_query: torch.Tensor,
    lead_keys: torch.Tensor,
    *,
    followers: Sequence[int],
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    near: Near,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    skip: float | None = None,
) -> torch.Tensor:
    """Attention of several queries where followers share keys; see the module's contract.

    Works through `QUERY_CHUNK` queries at a time. Where all logits would be more than `KEPT_LOGITS`, a chunk is
    computed again for its gradient, so that no more than a chunk's lie in memory.
    """
    settings: dict[str, Any] = {
        "followers": torch.tensor(list(followers), device=query.device),
        "near": near,
        "scaling": scaling,
        "softcap": softcap,
        "sinks": sinks,
        "skip": skip,
    }
    attend = functools.partial(_chunk, **settings)
    several = query.shape[2] > QUERY_CHUNK
    again = torch.is_grad_enabled() and query[..., 0].numel() * keys.shape[2] > KEPT_LOGITS
    parts = []
    for begin in range(0, query.shape[2], QUERY_CHUNK):
        part = slice(begin, begin + QUERY_CHUNK)
        seen = slice(0, keys.shape[2] - query.shape[2] + min(begin + QUERY_CHUNK, query.shape[2]))
        given = [
            *(query[:, :, part], keys[:, :, seen], values[:, :, seen]),
            *(lead_query[:, :, part], lead_keys[:, :, seen], query_positions[:, part], key_positions[:, :, seen]),
        ]
        if several and again:
            parts.append(checkpoint(attend, *given, use_reentrant=False))
        else:
            parts.append(attend(*given))
    return torch.cat(parts, 2) if several else parts[0]


def _chunk(*given: Any, **settings: Any) -> torch.Tensor:
    with torch.autocast(given[0].device.type, enabled=False):
        return _attend(*given, **settings)


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lead_query: torch.Tensor,
    lead_keys: torch.Tensor,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    *,
    followers: torch.Tensor,
    near: Near,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    skip: float | None,
) -> torch.Tensor:
    at, place = query_positions[:, None, :, None], key_positions[:, :, None]  # [B, 1, S, 1], [B, 1 or H, 1, T]
    padding = at < 0  # sees nothing, but a softmax needs something
    seen = ((place >= 0) & (place <= at)) | padding
    distant = near.distant(at, place).expand(-1, keys.shape[1], -1, -1)[:, followers, None]
    logits = grouped_logits(query, keys, scaling, softcap)
    shared = grouped_logits(lead_query, lead_keys, scaling, softcap)
    if len(followers) == keys.shape[1]:
        logits = torch.where(distant, shared, logits)
    else:
        logits = logits.index_copy(1, followers, torch.where(distant, shared, logits[:, followers]))
    logits = logits.masked_fill(~seen[:, :, None], float("-inf"))
    weights = weights_of(logits, sinks)
    if skip is not None:
        weights = weights.index_copy(1, followers, skipped(weights[:, followers], distant, skip))
    return weighted(weights, values, query.dtype).masked_fill(padding, 0.0)


def skipped(weights: torch.Tensor, distant: torch.Tensor, skip: float) -> torch.Tensor:
    """`weights` of followers without distant tokens where the others have at least `skip` of them (PoD §2.3)."""
    near = weights.masked_fill(distant, 0.0)
    gate = 1 - (weights - near).sum(-1, keepdim=True)
    return torch.where(gate >= skip, near / gate, weights)


def attend_shared_reference(
    query: torch.Tensor,
    rows: Rows,
    scores: torch.Tensor | None,
    *,
    positions: torch.Tensor,
    leading: Sequence[int],
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    skip: float | None = None,
    observe: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One query head at a time; the specification of `attend_shared`."""
    batch, heads = rows.lengths.shape
    near, size = rows.near, rows.block_size
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
            if near is None or h not in near.heads:
                distant = torch.zeros_like(place, dtype=torch.bool)
                keys = rows.keys[rows.key_table[b, h, block], offset]
            else:
                distant = near.near.distant(positions[b], place)
                keys = near.keys[b, near.heads.index(h), near.places(place)]
            logits = keys.float() @ query[b, hq, 0].float() * scaling
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            logits = torch.where(distant, scores[b, h, g, 0, :length], logits)
            if h in leading:
                scores[b, h, g, 0, :length] = logits
            if sinks is not None:
                logits = torch.cat([logits, sinks[hq : hq + 1].float()])
            probability = logits.softmax(0)[:length]
            gate = 1 - probability[distant].sum()
            if skip is not None and gate >= skip and near is not None and h in near.heads:
                probability = probability.masked_fill(distant, 0.0) / gate
            out[b, hq, 0] = (probability @ rows.values[value_block, offset].float()).to(out.dtype)
            if observe is not None and rows.metric is not None:
                rows.metric[value_block, offset] += probability**observe
    return out, scores


def attend_shared(
    query: torch.Tensor,
    rows: Rows,
    scores: torch.Tensor | None,
    *,
    positions: torch.Tensor,
    leading: Sequence[int],
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    skip: float | None = None,
    observe: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each sequence's newest token over rows some of whose keys are another layer's: a decode step.

    The logits of leads travel from layer to layer, so that none of their keys is read twice. `skip`, which says what a
    model would answer and saves nothing here, is left to plain torch everywhere.

    Args:
        query: ``[B, Hq, 1, Dk]``, of tokens that are stored already.
        rows: where heads in `rows.near` follow. Followers and leads hold the same tokens in the same slots.
        scores: ``[B, H, G, 1, T]`` float32, logits of the leads, anything where they hold nothing; modified in place,
            or copied where these rows lead and may be longer than T; no follower is. None below the first lead.
        positions: ``[B, 1]`` int32, true positions of the queries; negative: padding, which sees nothing.
        leading: heads that another layer follows, whose logits are handed on.
        scaling, softcap, sinks, observe: as in `attend`.
        skip: as in the module's contract.

    Returns:
        The attention ``[B, Hq, 1, Dv]`` in the query's dtype, zeros where nothing is seen, and `scores` for the layers
        above.

    Raises:
        ValueError: a head follows, and there are no scores; or as `attend`.
    """
    check_fits(query, rows, observe)
    near = rows.near
    if near is not None and scores is None:
        raise ValueError(f"heads {near.heads} follow, and there are no scores of their leads")
    if skip is None and use_triton(query, query.shape[-1], rows.values.shape[-1]):
        from .triton_.attend_shared import attend_shared as attend_shared_triton

        settings: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "sinks": sinks, "observe": observe}
        return attend_shared_triton(query, rows, scores, positions=positions, leading=leading, **settings)

    keys, values = rows.dense()
    here = None  # positions are not asked for where slots say everything
    if not rows.uniform or (near is not None and not (rows.in_order and skip is None)):
        here = rows.dense_positions()
    if near is None or scores is None:
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
        if len(near.rest):
            logits[:, near.rest] = grouped_logits(by_head[:, near.rest].flatten(1, 2), keys, scaling, softcap)
            _hand_on(scores, logits, leading)
        queries = query if len(near.heads) == by_head.shape[1] else by_head[:, near.index].flatten(1, 2)
        _put_own(logits, grouped_logits(queries, near.keys, scaling, softcap), rows, near, positions, here)
    stored = None if rows.uniform or here is None else here[:, :, None, None] >= 0
    if stored is None:
        weights = weights_of(logits, sinks)
    else:
        weights = weights_of(logits.masked_fill(~stored, float("-inf")), sinks)
        weights = weights.masked_fill(~stored.any(-1, keepdim=True), 0.0)
    if near is not None and here is not None and skip is not None:
        distant = near.near.distant(positions[:, None], here)
        distant = (distant if distant.shape[1] == 1 else distant[:, near.index])[:, :, None, None]
        weights = weights.index_copy(1, near.index, skipped(weights[:, near.index], distant, skip))
    padding = positions[:, None] < 0
    if observe is not None:
        received = (weights.detach() ** observe).sum((2, 3))
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
    near: NearKeys,
    positions: torch.Tensor,
    here: torch.Tensor | None,
) -> None:
    """Writes the followers' `own` logits ``[B, F, G, 1, R]`` of proximal tokens into `logits` ``[B, H, G, 1, T]``.

    `here` are the rows' `dense_positions`; None: slots of rows that are all of one length say it.
    """
    if here is None:
        everyone = len(near.heads) == logits.shape[1]
        for start, stop, place in near.runs(rows.max_length):
            part = own.narrow(-1, place, stop - start)
            if everyone:
                logits.narrow(-1, start, stop - start).copy_(part)
            else:
                logits[:, near.index, :, :, start:stop] = part
        return
    here = here if here.shape[1] == 1 else here[:, near.index]
    proximal = (here >= 0) & ~near.near.distant(positions[:, None], here)
    places = near.places(here).clamp(0, max(0, own.shape[-1] - 1))[:, :, None, None]
    spread = own.gather(-1, places.expand(-1, own.shape[1], own.shape[2], 1, -1).long())
    logits[:, near.index] = torch.where(proximal[:, :, None, None], spread, logits[:, near.index])


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
    scores = query.new_zeros(batch, heads_in_all, group, 1, longest, dtype=torch.float32)
    if use_triton(query, query.shape[-1]):
        from .triton_.attend_shared import lead_scores as lead_scores_triton

        lead_scores_triton(query, leads, heads, scores, scaling=scaling, softcap=softcap)
        return scores

    for head, rows in zip(heads, leads, strict=True):
        fresh = grouped_logits(query[:, head * group : (head + 1) * group], rows.keys_of(head), scaling, softcap)
        scores[:, head : head + 1, ..., : rows.max_length] = fresh
    return scores
