"""attend: attention of new queries over paged rows.

    query     [B, Hq, S, Dk]  queries of the S newest tokens, which are already stored
    rows      Rows            H KV heads; the G = Hq / H query heads of a group follow one another
    hidden    [B, S] int32 or None   how many of a sequence's newest tokens a query may NOT see.
              None: query s does not see the S - 1 - s tokens behind it (plain causal order, no padding)
    scaling   factor on q.k
    softcap   c: logits become c * tanh(logits / c) (Gemma-2); None: left alone
    sinks     [Hq] or None: a learned logit per query head that takes probability and gives no value (gpt-oss)

Returns ``[B, Hq, S, Dv]`` in the query's dtype. A query that sees no token gets zeros. Nothing is modified.
Softmax and accumulation are float32. Shapes that do not fit raise ValueError.
"""

import torch
import torch.nn.functional as F

from .backend import use_triton
from .rows import Rows, gather_rows

QUERY_CHUNK = 256  # queries handled at once, so that a long new turn does not build an S x T mask


def attend_reference(
    query: torch.Tensor,
    rows: Rows,
    *,
    scaling: float,
    hidden: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """One query at a time, float32; the specification of `attend`."""
    batch, query_heads, new, _ = query.shape
    group = query_heads // rows.lengths.shape[1]
    out = query.new_zeros(batch, query_heads, new, rows.values.shape[-1])
    for b in range(batch):
        for hq in range(query_heads):
            h = hq // group
            length = int(rows.lengths[b, h])
            keys = gather_rows(rows.keys, rows.key_table[b : b + 1, h : h + 1], length)[0, 0].float()
            values = gather_rows(rows.values, rows.value_table[b : b + 1, h : h + 1], length)[0, 0].float()
            for s in range(new):
                seen = length - (new - 1 - s if hidden is None else int(hidden[b, s]))
                if seen <= 0:
                    continue
                logits = keys[:seen] @ query[b, hq, s].float() * scaling
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                if sinks is not None:
                    logits = torch.cat([logits, sinks[hq : hq + 1].float()])
                out[b, hq, s] = (logits.softmax(0)[:seen] @ values[:seen]).to(out.dtype)
    return out


def attend(
    query: torch.Tensor,
    rows: Rows,
    *,
    scaling: float,
    hidden: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of the newest tokens over everything their rows store; see the module's contract."""
    batch, query_heads, new, key_dim = query.shape
    heads = rows.lengths.shape[1]
    if query_heads % heads or key_dim != rows.keys.shape[-1] or batch != rows.lengths.shape[0]:
        raise ValueError(
            f"query of shape {tuple(query.shape)} does not fit rows of {rows.lengths.shape[0]} sequences, {heads} KV "
            f"heads and key size {rows.keys.shape[-1]}; expected [B, G * H, S, Dk]"
        )
    if rows.max_length == 0:
        return query.new_zeros(batch, query_heads, new, rows.values.shape[-1])
    if use_triton(query, key_dim, rows.values.shape[-1]):
        from .triton_.attend import attend as attend_triton

        return attend_triton(query, rows, scaling=scaling, hidden=hidden, softcap=softcap, sinks=sinks)

    keys, values = rows.dense()
    if new == 1 and hidden is None and rows.uniform:
        return attend_masked(query, keys, values, None, scaling, softcap, sinks)

    if hidden is None:
        hidden = torch.arange(new - 1, -1, -1, device=query.device, dtype=torch.int32).expand(batch, new)
    slots = torch.arange(rows.max_length, device=query.device, dtype=torch.int32)
    parts = []
    for start in range(0, new, QUERY_CHUNK):
        chunk = slice(start, start + QUERY_CHUNK)
        mask = slots < (rows.lengths[:, :, None] - hidden[:, None, chunk])[..., None]
        parts.append(attend_masked(query[:, :, chunk], keys, values, mask, scaling, softcap, sinks))
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def attend_masked(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of `query` ``[B, Hq, S, Dk]`` over dense `keys` and `values` ``[B, H, T, D]``: ``[B, Hq, S, Dv]``.

    `mask` ``[B, 1 or H, S, T]`` bool says what is seen, None means everything. The rest as in the module's contract.
    """
    batch, query_heads, new, _ = query.shape
    heads, value_dim = keys.shape[1], values.shape[-1]
    group = query_heads // heads
    # The G query heads of a group become rows of one matrix, so that each key is read once for all of them.
    grouped = query.reshape(batch, heads, group * new, -1)
    if mask is not None:
        mask = mask[:, :, None].expand(-1, -1, group, -1, -1).flatten(2, 3)
    if softcap is None and sinks is None:
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scaling)
    else:
        logits = grouped.float() @ keys.float().transpose(-1, -2) * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if mask is not None:
            logits = logits.masked_fill(~mask, float("-inf"))
        peak = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
        if sinks is not None:
            sink = sinks.float().view(1, heads, group, 1).expand(batch, -1, -1, new).reshape(batch, heads, -1, 1)
            peak = torch.maximum(peak, sink)
        weights = torch.exp(logits - peak)
        total = weights.sum(-1, keepdim=True)
        if sinks is not None:
            total = total + torch.exp(sink - peak)
        out = ((weights / total) @ values.float()).to(query.dtype)
    if mask is not None:  # a query that sees nothing gets zeros, whatever the backend made of it
        out = out.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return out.reshape(batch, query_heads, new, value_dim)
