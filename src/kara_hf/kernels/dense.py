"""Attention over dense tensors, which all of plain torch is made of: logits, weights, and what they sum up to.

Shapes: query ``[B, Hq, S, Dk]``, keys ``[B, H, T, Dk]`` and values ``[B, H, T, Dv]``, each of any float dtype; the G =
Hq / H query heads of a group follow one another. Softmax and accumulation are float32.
"""

from functools import reduce
from typing import TypedDict

import torch
import torch.nn.functional as F

from .precision import as_sdpa, common_dtype

KEY_CHUNK = 1024  # half-precision tokens that are float32 at once


class LogitSettings(TypedDict):
    """What logits are made with, beside queries and keys; see `attend`."""

    scaling: float
    softcap: float | None
    sink_logits: torch.Tensor | None


def softcapped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """c * tanh(`logits` / c) where `softcap` is c (Gemma-2); None leaves them alone."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@as_sdpa(3)
def attend_masked(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of `query` ``[B, Hq, S, Dk]`` over dense `keys` and `values` ``[B, H, T, D]``: ``[B, Hq, S, Dv]``.

    `mask` ``[B, 1 or H, S, T]`` bool says what is seen, None means everything. A query that sees nothing gets zeros.
    The rest is as in `attend`, the dtype of the result too.
    """
    if softcap is not None or sink_logits is not None:
        return weighted(probabilities(query, keys, mask, scaling, softcap, sink_logits), values, query.dtype)
    batch, query_heads, new, _ = query.shape
    heads = keys.shape[1]
    group = query_heads // heads
    # The G query heads of a group become rows of one matrix, so that each key is read once for all of them.
    grouped = query.reshape(batch, heads, group * new, -1)
    if mask is not None:
        mask = mask[:, :, None].expand(-1, -1, group, -1, -1).flatten(2, 3)
    common = common_dtype(query, keys, values)
    grouped, keys, values = grouped.to(common), keys.to(common), values.to(common)
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scaling)
    if mask is not None:  # a query that sees nothing gets zeros, whatever the backend made of it
        out = out.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return out.to(query.dtype).reshape(batch, query_heads, new, -1)


def probabilities(
    query: torch.Tensor,
    keys: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """What part of its attention each query gives each token, ``[B, H, G, S, T]`` float32.

    Arguments as in `attend_masked`. A query that sees nothing gives nothing.
    """
    logits = grouped_logits(query, keys, scaling, softcap)
    sink_logits = grouped_sinks(sink_logits, keys.shape[1])
    if mask is None:
        return weights_of(logits, sink_logits)
    weights = weights_of(logits.masked_fill(~mask[:, :, None], float("-inf")), sink_logits)
    return weights.masked_fill(~mask[:, :, None].any(-1, keepdim=True), 0.0)


def grouped_logits(
    query: torch.Tensor, keys: torch.Tensor, scaling: float, softcap: float | None = None
) -> torch.Tensor:
    """Scaled products of queries ``[B, H * G, S, D]`` and keys ``[B, H, T, D]``: ``[B, H, G, S, T]`` float32."""
    batch, query_heads, new, _ = query.shape
    heads = keys.shape[1]
    group = query_heads // heads
    grouped = (query.float() * scaling).reshape(batch, heads, group * new, -1)
    products = [grouped @ part.float().transpose(-1, -2) for part in _parts(keys)]
    logits = torch.cat(products, -1) if len(products) > 1 else products[0]
    logits = logits.view(batch, heads, group, new, -1)
    return softcapped(logits, softcap)


def weights_of(logits: torch.Tensor, sink_logits: torch.Tensor | None) -> torch.Tensor:
    """Softmax of `logits` ``[..., T]`` over tokens and, with `sink_logits` ``[..., 1]``, one more that has no value."""
    weights = logits.softmax(-1)
    if sink_logits is None:  # e^l / (sum + e^sink) is the softmax times sum / (sum + e^sink)
        return weights
    return weights * torch.sigmoid(logits.logsumexp(-1, keepdim=True) - sink_logits.float())


def grouped_sinks(sink_logits: torch.Tensor | None, heads: int) -> torch.Tensor | None:
    """`sink_logits` ``[H * G]`` beside logits ``[B, H, G, S, T]``: ``[H, G, 1, 1]``."""
    return None if sink_logits is None else sink_logits.view(heads, -1, 1, 1)


def weighted(weights: torch.Tensor, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sum of `values` weighted as `probabilities` says: ``[B, Hq, S, Dv]``."""
    parts = _parts(values)
    shares = weights.flatten(2, 3).split([part.shape[2] for part in parts], -1)
    out = reduce(torch.add, (share @ part.float() for share, part in zip(shares, parts, strict=True)))
    return out.to(dtype).reshape(weights.shape[0], -1, weights.shape[3], values.shape[-1])


def _parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`tensor` ``[B, H, T, D]`` in parts that are made float32 one at a time: no float32 copy of all is held."""
    return tensor.split(KEY_CHUNK, 2) if tensor.itemsize < 4 else (tensor,)


def row_logits(query: torch.Tensor, keys: torch.Tensor, scaling: float, softcap: float | None) -> torch.Tensor:
    """Of references: logits of one query ``[D]`` with the keys ``[T, D]`` of its row, ``[T]`` float32."""
    return softcapped(keys.float() @ query.float() * scaling, softcap)


def row_weights(logits: torch.Tensor, sink: torch.Tensor | None) -> torch.Tensor:
    """Of references: what part of its attention a query gives each token, ``[T]``; `sink` is one logit more."""
    if sink is None:
        return logits.softmax(0)
    return torch.cat([logits, sink.float().view(1)]).softmax(0)[:-1]
