"""Scores of other methods and probes within Kara's window, so that only the score differs."""

import torch
import torch.nn.functional as F

from ..kernels import softcapped
from ..policy import Window, register_score

POOL = 7  # SnapKV's and R-KV's width of max-pooling along tokens
BALANCE = 0.1  # R-KV's lambda: share of importance; the rest is redundancy
ALIKE = 0.5  # R-KV's threshold of cosine similarity between keys
NEWEST = 4  # R-KV's beta: newest similar tokens that a token's redundancy leaves out

PEERS = {
    "snapkv": "attention from the recent tokens, pooled (SnapKV, arXiv 2404.14469)",
    "r-kv": "the same less redundancy among keys (R-KV, arXiv 2505.24133)",
}


def observed(window: Window) -> torch.Tensor:
    """Attention that tokens of the window get from the recent tokens behind it, over the window, largest of a group,
    max-pooled along tokens: ``[b, H, W]``.
    """
    assert window.later is not None, "the score is registered with queries=True"
    queries = window.later if window.later.shape[2] else window.queries
    assert queries is not None
    grouped = queries.float().unflatten(1, (window.keys.shape[1], -1))
    logits = grouped @ window.keys.float()[:, :, None].transpose(-1, -2) * window.scaling
    votes = softcapped(logits, window.softcap).softmax(-1).mean((2, 3)).unflatten(1, (window.rows, -1)).mean(2)
    return F.max_pool1d(votes, POOL, stride=1, padding=POOL // 2)


@register_score("snapkv", queries=True)
def snapkv(window: Window) -> torch.Tensor:
    """Attention from the recent tokens, which are the observation window (SnapKV, arXiv 2404.14469)."""
    return observed(window)


@register_score("r-kv", queries=True)
def r_kv(window: Window) -> torch.Tensor:
    """Importance less redundancy (R-KV, arXiv 2505.24133): ``lambda I - (1 - lambda) softmax(mean similarity)``.

    Similarity is the cosine of keys, where it passes a threshold; the newest tokens that a token is similar to do not
    count, so that the newest copy of what is said twice stays.
    """
    importance = observed(window)
    keys = F.normalize(window.keys.float(), dim=-1)
    alike = (keys @ keys.transpose(-1, -2)).unflatten(1, (window.rows, -1)).mean(2)
    width = alike.shape[-1]
    alike = alike.masked_fill(torch.eye(width, dtype=torch.bool, device=alike.device) | (alike < ALIKE), 0.0)
    # Among the tokens (last but one dimension) that a column is similar to, the newest are left out.
    newest = (alike > 0).flip(-2).cumsum(-2).flip(-2) <= NEWEST
    redundancy = alike.masked_fill(newest, 0.0).mean(-1).softmax(-1)
    return BALANCE * importance - (1 - BALANCE) * redundancy


@register_score("random-shared")
def random_shared(window: Window) -> torch.Tensor:
    """Random tokens, the same ones in all heads of all layers."""
    rows = []
    for ordinal in window.ordinals:
        generator = torch.Generator().manual_seed(hash((window.seed, ordinal)) % 2**63)
        rows.append(torch.rand(1, window.keys.shape[2], generator=generator).expand(window.rows, -1))
    return torch.stack(rows).to(window.keys.device)
