"""The eviction metric of KV-Compress (arXiv 2410.00161): what every cached token is worth to the queries that voted."""

import torch
import torch.nn.functional as F

from ..kernels import as_sdpa, softcapped

CHUNK_ELEMENTS = 2**24  # attention probabilities that are held at once, in float32


@torch.no_grad()
@as_sdpa(2)
def observe(
    queries: torch.Tensor,
    keys: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    power: int = 2,
    pool: int = 7,
) -> torch.Tensor:
    """The votes of the last w tokens of one sequence on all its T tokens.

        m[h, k] = sum over the G query heads g of h of maxpool_k( sum over the w queries q of p_g[q, k] ** power )

    with p the causal attention probabilities over all keys, in float32. Works through queries and KV heads in chunks,
    so that memory stays bounded however long the window is; the chunks change the result by rounding only.

    Args:
        queries: ``[Hq, w, D]`` of the last w tokens, 1 <= w <= T, as attention saw them (after RoPE and any norm).
        keys: ``[H, T, D]`` in the order of their positions, as attention saw them; Hq = G * H.
        scaling: factor on q.k.
        softcap: c: logits become c * tanh(logits / c); None: left alone.
        sink_logits: ``[Hq]`` or None: the model's learned logit per query head that takes probability and gives no
            value.
        power: 2 for the L2 metric, 1 for L1.
        pool: width of the max-pool along keys, per query head, odd; 1 leaves it out. Beyond the ends there is nothing.

    Returns:
        ``[H, T]`` float32, not negative. Nothing is modified, no gradient flows.

    Raises:
        ValueError: shapes do not fit or `pool` is even.
    """
    (query_heads, window, dim), (heads, total, _) = queries.shape, keys.shape
    if query_heads % heads or keys.shape[2] != dim or not 1 <= window <= total:
        raise ValueError(
            f"queries {tuple(queries.shape)} and keys {tuple(keys.shape)} do not fit; expected [G * H, w, D] and "
            "[H, T, D] with 1 <= w <= T"
        )
    if pool % 2 != 1:
        raise ValueError(f"pool={pool} is not possible: the max-pool is symmetric, so its width must be odd")
    group = query_heads // heads
    queries = queries.unflatten(0, (heads, group))
    sink_logits = None if sink_logits is None else sink_logits.float().view(heads, group, 1, 1)
    votes = torch.zeros(heads, group, total, dtype=torch.float32, device=keys.device)
    some_queries = min(window, max(1, CHUNK_ELEMENTS // (group * total)))
    some_heads = max(1, CHUNK_ELEMENTS // (group * some_queries * total))
    for head in range(0, heads, some_heads):
        part = slice(head, head + some_heads)
        part_keys = keys[part].float().transpose(1, 2)
        for first in range(0, window, some_queries):
            chunk = queries[part, :, first : first + some_queries].float()
            new = chunk.shape[2]
            seen = total - window + first + new
            # The G query heads of a group become rows of one matrix, so that each key is read once for all of them.
            logits = (chunk.flatten(1, 2) @ part_keys[:, :, :seen]).mul_(scaling).unflatten(1, (group, new))
            logits = softcapped(logits, softcap)
            later = torch.ones(new, seen, dtype=torch.bool, device=keys.device).triu(seen - new + 1)
            logits = logits.masked_fill_(later, float("-inf"))
            norm = logits.logsumexp(-1, keepdim=True)
            if sink_logits is not None:
                norm = torch.logaddexp(norm, sink_logits[part])
            votes[part, :, :seen] += logits.sub_(norm).mul_(power).exp_().sum(2)
    return F.max_pool1d(votes, pool, stride=1, padding=pool // 2).sum(1)
