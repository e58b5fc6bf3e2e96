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
    proximal         Proximal            which tokens are proximal
    scaling, softcap, sink_logits        as in attend; logits of distant tokens too are scaled by this layer's factor
    skip             a follower's query whose proximal tokens get at least this share leaves out the rest; None: never

The last S keys are those of the queries' own tokens, in order. A query at position i sees keys at positions j <= i.
Distant are those with ``proximal.first <= j <= i - proximal.recent``: their logits are lead_query . lead_key, all
others are query . key; one softmax goes over both, which is the paper's gate.

All float tensors may have a dtype of their own. Returns ``[B, Hq, S, Dv]``, in the dtype that `attend` returns; zeros
where nothing is seen. Differentiable in all that is float; softmax and accumulation are float32. Nothing is modified.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from .attend import QUERY_CHUNK
from .dense import grouped_logits, grouped_sinks, row_logits, weighted, weights_of
from .precision import as_sdpa, common_dtype
from .rows import Proximal

KEPT_LOGITS = 2**25  # of one layer, that are held for the gradient


@as_sdpa(5)
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
    proximal: Proximal,
    scaling: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
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
                far = seen & proximal.distant(torch.tensor(at), place) if h in followers else torch.zeros_like(seen)
                logits = row_logits(query[b, hq, s], keys[b, h], scaling, softcap)
                if h in followers:
                    f = list(followers).index(h)
                    lead = lead_query[b, f * group + hq % group, s]
                    logits = torch.where(far, row_logits(lead, lead_keys[b, f], scaling, softcap), logits)
                near_out, near_lse = attention(logits[seen & ~far], values[b, h][seen & ~far])
                far_out, far_lse = attention(logits[far], values[b, h][far])
                if at < 0 or not seen.any():
                    continue
                if sink_logits is not None:  # takes from the proximal part, which the query itself is always in
                    near_out = near_out * torch.sigmoid(near_lse - sink_logits[hq].float())
                    near_lse = torch.logaddexp(near_lse, sink_logits[hq].float())
                gate = torch.sigmoid(near_lse - far_lse)
                if skip is not None and gate >= skip:
                    gate = torch.ones_like(gate)
                out[b, hq, s] = gate * near_out + (1 - gate) * far_out
    return out


@as_sdpa(5)
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
    proximal: Proximal,
    scaling: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    skip: float | None = None,
) -> torch.Tensor:
    """Attention of several queries where followers share keys; see the module's contract.

    Works through `QUERY_CHUNK` queries at a time. Where all logits would be more than `KEPT_LOGITS`, a chunk is
    computed again for its gradient, so that no more than a chunk's lie in memory.
    """
    attend = functools.partial(
        _attend,
        followers=torch.tensor(list(followers), device=query.device),
        proximal=proximal,
        scaling=scaling,
        softcap=softcap,
        sink_logits=sink_logits,
        skip=skip,
    )
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
    proximal: Proximal,
    scaling: float,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
    skip: float | None,
) -> torch.Tensor:
    at, place = query_positions[:, None, :, None], key_positions[:, :, None]  # [B, 1, S, 1], [B, 1 or H, 1, T]
    padding = at < 0  # sees nothing, but a softmax needs something
    seen = ((place >= 0) & (place <= at)) | padding
    distant = proximal.distant(at, place).expand(-1, keys.shape[1], -1, -1)[:, followers, None]
    hidden = torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, float("-inf"))[:, :, None]
    ways = _Ways(followers, distant, hidden, scaling, softcap, skip)
    out: torch.Tensor = _Attention.apply(query, keys, values, lead_query, lead_keys, sink_logits, ways)
    return out.masked_fill(padding, 0.0)


@dataclass(frozen=True)
class _Ways:
    """How logits become weights.

    Attributes:
        followers: ``[F]`` int64.
        distant: which logits of theirs are their leads', ``[B, F, 1, S, T]`` bool.
        hidden: -inf where a query sees nothing, ``[B, 1 or H, 1, S, T]`` float32; the rest is 0.
        scaling, softcap, skip: as in `shared_attention`.
    """

    followers: torch.Tensor
    distant: torch.Tensor
    hidden: torch.Tensor
    scaling: float
    softcap: float | None
    skip: float | None


class _Attention(torch.autograd.Function):
    """Attention with a gradient of its own: of all that is as large as the logits one tensor is kept, and the products
    of the backward pass are those of the operands' dtype.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        lead_query: torch.Tensor,
        lead_keys: torch.Tensor,
        sink_logits: torch.Tensor | None,
        ways: _Ways,
    ) -> torch.Tensor:
        weights, sloped = _weights(query, keys, lead_query, lead_keys, sink_logits, ways)
        if any(ctx.needs_input_grad):
            kept = weights.to(common_dtype(query, keys, values, lead_query, lead_keys))
            ctx.save_for_backward(query, keys, values, lead_query, lead_keys, sink_logits, kept, sloped)
            ctx.ways = ways
        if ways.skip is not None:
            weights = _skip(weights, ways)
        return weighted(weights, values, query.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, keys, values, lead_query, lead_keys, sink_logits, kept, sloped = ctx.saved_tensors
        ways, dtype = ctx.ways, kept.dtype
        of_out = _grouped(gradients[0], keys.shape[1])
        used, weights = kept, kept.float()
        if ways.skip is not None:
            with torch.enable_grad():
                before = weights.requires_grad_()
                after = _skip(before, ways)
            used, weights = after.detach().to(dtype), weights.detach()
        of_values = used.flatten(2, 3).transpose(-1, -2) @ of_out.to(dtype)
        slope = (of_out.float() @ values.float().transpose(-1, -2)).view_as(kept)
        if ways.skip is not None:
            (slope,) = torch.autograd.grad(after, before, slope)
        mean = torch.linalg.vecdot(weights, slope)[..., None]
        of_sinks = None
        if sink_logits is not None:  # one token more, whose value is nothing
            of_sinks = ((weights.sum(-1, keepdim=True) - 1) * mean).sum((0, 3, 4)).view_as(sink_logits)
            of_sinks = of_sinks.to(sink_logits.dtype)
        slope = slope.sub_(mean).mul_(weights)
        if sloped is not None:
            slope *= sloped
        near = slope.to(dtype)
        every = len(ways.followers) == keys.shape[1]
        far = torch.where(ways.distant, near if every else near[:, ways.followers], 0.0)
        near = near.sub_(far) if every else near.index_add_(1, ways.followers, far, alpha=-1)
        of_query, of_keys = _of_product(near, query, keys, ways.scaling)
        of_lead_query, of_lead_keys = _of_product(far, lead_query, lead_keys, ways.scaling)
        return of_query, of_keys, of_values.to(values.dtype), of_lead_query, of_lead_keys, of_sinks, None


def _weights(
    query: torch.Tensor,
    keys: torch.Tensor,
    lead_query: torch.Tensor,
    lead_keys: torch.Tensor,
    sink_logits: torch.Tensor | None,
    ways: _Ways,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights ``[B, H, G, S, T]`` float32 before any skip, and the slope of the softcap there, if there is one."""
    logits = grouped_logits(query, keys, ways.scaling, ways.softcap)
    shared = grouped_logits(lead_query, lead_keys, ways.scaling, ways.softcap)
    if len(ways.followers) == keys.shape[1]:
        logits = torch.where(ways.distant, shared, logits)
    else:
        logits = logits.index_copy(1, ways.followers, torch.where(ways.distant, shared, logits[:, ways.followers]))
    sloped = None if ways.softcap is None else 1 - (logits / ways.softcap) ** 2
    logits += ways.hidden
    return weights_of(logits, grouped_sinks(sink_logits, keys.shape[1])), sloped


def _skip(weights: torch.Tensor, ways: _Ways) -> torch.Tensor:
    assert ways.skip is not None
    return weights.index_copy(1, ways.followers, skipped(weights[:, ways.followers], ways.distant, ways.skip))


def _grouped(query: torch.Tensor, heads: int) -> torch.Tensor:
    """``[B, H * G, S, D]`` as ``[B, H, G * S, D]``."""
    return query.reshape(query.shape[0], heads, -1, query.shape[-1])


def _of_product(
    slope: torch.Tensor, query: torch.Tensor, keys: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of queries and keys, by that of their scaled products ``[B, H, G, S, T]``."""
    of_products = slope.flatten(2, 3)
    of_query = of_products @ keys.to(slope.dtype)
    of_keys = of_products.transpose(-1, -2) @ _grouped(query, keys.shape[1]).to(slope.dtype)
    return (of_query * scaling).view_as(query).to(query.dtype), (of_keys * scaling).to(keys.dtype)


def skipped(weights: torch.Tensor, distant: torch.Tensor, skip: float) -> torch.Tensor:
    """`weights` of followers without distant tokens where the others have at least `skip` of them (PoD §2.3)."""
    proximal = weights.masked_fill(distant, 0.0)
    gate = 1 - (weights - proximal).sum(-1, keepdim=True)
    return torch.where(gate >= skip, proximal / gate, weights)
