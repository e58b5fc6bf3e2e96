"""window_scores: how much attention every token of a window receives from the queries of that window.

    queries   [B, Hq, n, D]  as attention saw them (after RoPE and any norm): of all W tokens, or of a sample of n that
                             `sampled_places` names
    keys      [B, H, W, D]   of a dtype of their own
    scaling   factor on q.k; softcap as in attend
    causal    False: every query attends to every key of the window, in both directions (Kara, arXiv 2607.01237)
              True: only to keys that are not behind it

Returns ``[B, H, W]`` float32: s[j] = mean over the G query heads and the n queries of softmax_j(q_i . k_j * scaling),
the softmax over the keys of the window. Each row sums to 1. Nothing is modified.
"""

import torch

from .backend import use_triton
from .dense import softcapped
from .precision import as_sdpa


def sampled_places(count: int, window: int, group: int = 1, device: torch.device | None = None) -> torch.Tensor:
    """Of which of a window's tokens a sample of `count` queries of each of the G heads of a group is, ``[G, count]``
    int64, ascending: the last of each of `count` stretches of equal length, and from head to head a G-th of a stretch
    earlier, so that all heads together see G times as many tokens.
    """
    ends = (torch.arange(1, count + 1, device=device) * window - 1) // count
    return ends - (torch.arange(group, device=device) * window // (count * group))[:, None]


@as_sdpa(2)
def window_scores_reference(
    queries: torch.Tensor,
    keys: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """One sequence and query head at a time; the specification of `window_scores`."""
    batch, query_heads, count, _ = queries.shape
    heads, window = keys.shape[1:3]
    group = query_heads // heads
    behind = torch.arange(window, device=keys.device) > sampled_places(count, window, group, keys.device)[..., None]
    scores = torch.zeros(batch, heads, window, dtype=torch.float32, device=keys.device)
    for b in range(batch):
        for hq in range(query_heads):
            logits = softcapped(queries[b, hq].float() @ keys[b, hq // group].float().T * scaling, softcap)
            if causal:
                logits = logits.masked_fill(behind[hq % group], float("-inf"))
            scores[b, hq // group] += logits.softmax(-1).mean(0) / group
    return scores


@as_sdpa(2)
def window_scores(
    queries: torch.Tensor,
    keys: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """Mean attention that each key of the window receives; see the module's contract."""
    batch, query_heads, count, _ = queries.shape
    heads, window = keys.shape[1:3]
    if query_heads % heads or not 1 <= count <= window:
        raise ValueError(
            f"queries {tuple(queries.shape)} and keys {tuple(keys.shape)} do not fit; expected [B, G * H, n, D] and "
            "[B, H, W, D] with 1 <= n <= W"
        )
    if use_triton(queries, queries.shape[-1], dtypes=(keys.dtype,)):
        from .triton_.window_scores import window_scores as window_scores_triton

        return window_scores_triton(queries, keys, scaling=scaling, softcap=softcap, causal=causal)

    grouped = queries.float().reshape(batch, heads, -1, queries.shape[-1])
    logits = softcapped(grouped @ keys.float().transpose(-1, -2) * scaling, softcap)
    if causal:
        places = sampled_places(count, window, query_heads // heads, keys.device).view(-1, 1)
        logits = logits.masked_fill(torch.arange(window, device=keys.device) > places, float("-inf"))
    return logits.softmax(-1).mean(2)
