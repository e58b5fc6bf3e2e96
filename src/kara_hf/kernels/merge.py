"""merge: attention over a whole row from attention over parts of it.

    parts   [K, B, Hq, S, Dv] float32   attention of the same queries over K disjoint sets of tokens
    lse     [K, B, Hq, S] float32       log of the sum of each part's exponentials; -inf where a part has nothing to
                                        see, and then its output is not read
    sink_logits   [Hq] or None                as in attend; they enter here, once
    dtype   of the result; None: that of `parts`

Returns ``[B, Hq, S, Dv]``. A query that no part sees anything for gets zeros. Nothing is modified.
"""

import torch

from .backend import use_triton


def merge_reference(
    parts: torch.Tensor, lse: torch.Tensor, sink_logits: torch.Tensor | None = None, *, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """One query at a time; the specification of `merge`."""
    _, batch, heads, new, size = parts.shape
    out = torch.zeros(batch, heads, new, size, dtype=dtype or parts.dtype, device=parts.device)
    for b in range(batch):
        for h in range(heads):
            for s in range(new):
                seen = [k for k in range(len(parts)) if lse[k, b, h, s] > float("-inf")]
                if not seen:
                    continue
                logits = lse[seen, b, h, s]
                if sink_logits is not None:
                    logits = torch.cat([logits, sink_logits[h : h + 1].float()])
                out[b, h, s] = (logits.softmax(0)[: len(seen)] @ parts[seen, b, h, s]).to(out.dtype)
    return out


def merge(
    parts: torch.Tensor, lse: torch.Tensor, sink_logits: torch.Tensor | None = None, *, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Joins attention over parts by their log-sum-exp; see the module's contract."""
    if parts.shape[:-1] != lse.shape or parts.dim() != 5:
        raise ValueError(
            f"parts {tuple(parts.shape)} and lse {tuple(lse.shape)} do not fit; expected [K, B, Hq, S, Dv] and "
            "[K, B, Hq, S]"
        )
    if use_triton(parts, parts.shape[-1]):
        from .triton_.merge import merge as merge_triton

        return merge_triton(parts, lse, sink_logits, dtype=dtype)

    logits = lse if sink_logits is None else torch.cat([lse, sink_logits.float()[:, None].expand_as(lse[:1])])
    empty = lse == float("-inf")
    weights = torch.softmax(logits, 0)[: len(lse)].masked_fill(empty, 0.0)
    return (weights[..., None] * parts.masked_fill(empty[..., None], 0.0)).sum(0).to(dtype or parts.dtype)
