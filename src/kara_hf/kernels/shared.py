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

A query at position i sees the keys at positions j <= i. Distant are those with ``near.first <= j <= i - near.recent``:
their logits are lead_query . lead_key, all others query . key; one softmax goes over both, which is the paper's gate.

Returns ``[B, Hq, S, Dv]`` in the query's dtype; zeros where nothing is seen. Differentiable in all that is float;
softmax and accumulation are float32. Nothing is modified.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from .attend import QUERY_CHUNK


@dataclass(frozen=True)
class Near:
    """Which tokens are proximal: the `first` of a sequence, and the newest `recent`, the query's own among them."""

    first: int
    recent: int

    def distant(self, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
        """Which keys are distant to a query; the two broadcast."""
        return (key_positions >= self.first) & (key_positions <= query_positions - self.recent)


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

    Works through `QUERY_CHUNK` queries at a time, and computes a chunk again for its gradient, so that no more than a
    chunk's logits lie in memory.
    """
    settings: dict[str, Any] = {
        "followers": torch.tensor(list(followers), device=query.device),
        "key_positions": key_positions,
        "near": near,
        "scaling": scaling,
        "softcap": softcap,
        "sinks": sinks,
        "skip": skip,
    }
    attend = functools.partial(_chunk, **settings)
    several = query.shape[2] > QUERY_CHUNK
    parts = []
    for begin in range(0, query.shape[2], QUERY_CHUNK):
        part = slice(begin, begin + QUERY_CHUNK)
        given = (query[:, :, part], keys, values, lead_query[:, :, part], lead_keys, query_positions[:, part])
        if several and torch.is_grad_enabled():
            parts.append(checkpoint(attend, *given, use_reentrant=False))
        else:
            parts.append(attend(*given))
    return torch.cat(parts, 2) if several else parts[0]


def _chunk(query: torch.Tensor, *given: torch.Tensor, **settings: Any) -> torch.Tensor:
    with torch.autocast(query.device.type, enabled=False):
        return _attend(query, *given, **settings)


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lead_query: torch.Tensor,
    lead_keys: torch.Tensor,
    query_positions: torch.Tensor,
    *,
    followers: torch.Tensor,
    key_positions: torch.Tensor,
    near: Near,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    skip: float | None,
) -> torch.Tensor:
    batch, query_heads, new, _ = query.shape
    group = query_heads // keys.shape[1]
    at, place = query_positions[:, None, :, None], key_positions[:, :, None]  # [B, 1, S, 1], [B, 1 or H, 1, T]
    seen = (place >= 0) & (place <= at)
    distant = near.distant(at, place).expand(-1, keys.shape[1], -1, -1)[:, followers, None]
    logits = grouped_logits(query, keys, group, scaling)
    shared = grouped_logits(lead_query, lead_keys, group, scaling)
    logits = logits.index_copy(1, followers, torch.where(distant, shared, logits[:, followers]))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~seen[:, :, None], float("-inf"))
    weights = weights_of(logits, sinks)
    if skip is not None:
        weights = weights.index_copy(1, followers, skipped(weights[:, followers], distant, skip))
    weights = weights.masked_fill(~seen[:, :, None].any(-1, keepdim=True), 0.0)
    out = weights.to(values.dtype).flatten(2, 3) @ values
    return out.to(query.dtype).reshape(batch, query_heads, new, -1)


def grouped_logits(query: torch.Tensor, keys: torch.Tensor, group: int, scaling: float) -> torch.Tensor:
    """Scaled products of queries ``[B, H * G, S, D]`` and keys ``[B, H, T, D]``: ``[B, H, G, S, T]`` float32."""
    batch, _, new, size = query.shape
    rows = query.reshape(batch, keys.shape[1], group * new, size)
    return (rows.float() * scaling @ keys.float().transpose(-1, -2)).view(batch, keys.shape[1], group, new, -1)


def weights_of(logits: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Softmax of ``[B, H, G, S, T]`` over tokens and, where there are `sinks` ``[Hq]``, a sink that gives no value."""
    weights = logits.softmax(-1)
    if sinks is None:
        return weights
    sink = sinks.float().view(logits.shape[1], logits.shape[2], 1, 1)
    return weights * torch.sigmoid(logits.logsumexp(-1, keepdim=True) - sink)


def skipped(weights: torch.Tensor, distant: torch.Tensor, skip: float) -> torch.Tensor:
    """`weights` of followers without distant tokens where the others have at least `skip` of them (PoD §2.3)."""
    near = weights.masked_fill(distant, 0.0)
    gate = 1 - (weights - near).sum(-1, keepdim=True)
    return torch.where(gate >= skip, near / gate, weights)
