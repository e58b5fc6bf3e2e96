"""Similarities of layers, made by hand."""

import torch

from kara_hf import PoDSharing
from kara_hf.pod.explore import LayerSimilarity


def made(similarity, *, kinds=None, devices=None, **changes) -> LayerSimilarity:
    """A similarity by hand: ``[H, L, L]``, or for one head ``[L, L]``."""
    similarity = torch.as_tensor(similarity, dtype=torch.float32)
    similarity = similarity[None] if similarity.ndim == 2 else similarity
    layers = similarity.shape[1]
    fields = {"tokens": (64, 64), "queries": 4, "region": "all", "sinks": 2, "recent": 6, "model": {}} | changes
    return LayerSimilarity(similarity, kinds or ("full",) * layers, devices or ("cpu",) * layers, **fields)


def symmetric(entries: dict[tuple[int, int], float], layers: int) -> torch.Tensor:
    out = torch.eye(layers)
    for (a, b), value in entries.items():
        out[a, b] = out[b, a] = value
    return out


def drawn(seed: int, heads: int = 2, layers: int = 7) -> LayerSimilarity:
    rng = torch.Generator().manual_seed(seed)
    values = torch.rand(heads, layers, layers, generator=rng).mul(20).round().div(20)  # ties are common
    upper = values.triu(1)
    return made(upper + upper.mT + torch.eye(layers))


def leads(sharing: PoDSharing, head: int = 0) -> list[int]:
    return [heads[head] for heads in sharing.lead]
