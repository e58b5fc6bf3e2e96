"""`explore`: which layers of a model look at the same tokens, and so could share keys (PoD, 2412.02252 §2.1).

similarity = explore(model, samples)          # the model runs once over each sample
sharing = similarity.group(threshold=0.5)     # as often as wanted, without the model
"""

import math
from collections.abc import Callable, Iterable
from typing import Literal

import torch
import transformers

from ..cache.bound_model import BoundModel
from ..config import is_int, require
from ..integration.attach import decoder_config, unwrap
from ..integration.shape import layer_kinds, model_name, model_shape
from ..kernels import Proximal
from ..probing.attention import Attention, Recorder
from .similarity import LayerSimilarity

__all__ = ["LayerSimilarity", "explore"]

# Most bytes of attention rows that lie in memory at once, and of what they are compared through.
ROW_BYTES = 512 << 20


def explore(
    model: torch.nn.Module,
    samples: Iterable[torch.Tensor],
    *,
    queries: int = 32,
    region: Literal["all", "distant"] = "all",
    sinks: int = 16,
    recent: int = 4080,
    progress: Callable[[int], object] | None = None,
) -> LayerSimilarity:
    """Measures how alike the layers of `model` attend; the model runs once over each sample, and is left as it was.

    Beside what that run takes there are in memory the keys of every full-attention layer and the last queries, in the
    model's dtype, and rows of attention of `ROW_BYTES` at most (but one row of each layer at least: 16 L N bytes). For
    32 layers of 8 KV heads of 128 in bfloat16 and 32,768 tokens: 2 GiB of keys, 8 MiB of queries (32 from 32 heads),
    0.5 GiB of rows.

    Args:
        model: a Transformers causal LM, or one wrapped by PEFT; it may lie on several devices.
        samples: token ids ``[N]`` int64 each, of text as the model is used on, longer than `sinks` + `recent` if the
            distant tokens are what matters.
        queries: last tokens of each sample whose attention is compared.
        region: "all" or "distant", see `LayerSimilarity`.
        sinks, recent: which tokens are not distant; of the sharing too, unless `group` is told otherwise.
        progress: called after each sample with the number of samples done.

    Raises:
        TypeError: `model` is no Transformers model.
        ValueError: a setting is out of range, a sample is too short, there is no sample, or the model has no full
            attention that can be measured.
    """
    require(is_int(queries) and queries >= 1, "queries", queries, "a whole number from 1 on")
    require(region in ("all", "distant"), "region", region, "'all' or 'distant'")
    require(is_int(sinks) and sinks >= 0, "sinks", sinks, "a whole number from 0 on")
    require(is_int(recent) and recent >= 1, "recent", recent, "a whole number from 1 on")
    inner = unwrap(model)
    config, binding = decoder_config(inner), BoundModel(inner)
    full, kinds, shape = binding.observable_layers(), layer_kinds(config), model_shape(config)
    near = Proximal(sinks, recent) if region == "distant" else None
    total = torch.zeros(int(shape["num_key_value_heads"]), len(full), len(full), dtype=torch.float64)
    devices: dict[int, str] = {}
    tokens: list[int] = []
    recorder = Recorder(set(full), queries)
    with recorder.watching(inner):
        for ids in samples:
            check_sample(ids, len(tokens), queries, near)
            layers = recorder.run(inner, ids)
            check_heads(layers, len(total), binding.name)
            total += layer_similarity(layers, near)
            tokens.append(len(ids))
            devices = {layer: str(recorded.query.device) for layer, recorded in zip(full, layers, strict=True)}
            del layers  # before there are keys of the next sample
            if progress is not None:
                progress(len(tokens))
    if not tokens:
        raise ValueError("there is no sample to measure attention on; give one at least")
    if not total.isfinite().all():
        raise ValueError("the model's attention has NaN; load it in another dtype (bfloat16 or float32)")
    similarity = torch.full((len(total), len(kinds), len(kinds)), math.nan)
    similarity[:, torch.tensor(full)[:, None], torch.tensor(full)] = (total / len(tokens)).float()
    return LayerSimilarity(
        similarity=similarity,
        kinds=tuple(kind if layer in devices else None for layer, kind in enumerate(kinds)),
        devices=tuple(devices.get(layer) for layer in range(len(kinds))),
        model=shape,
        tokens=tuple(tokens),
        queries=queries,
        region=region,
        sinks=sinks,
        recent=recent,
        origin={
            "model_name": model_name(inner) or binding.name,
            "dtype": str(inner.dtype).removeprefix("torch."),
            "transformers": transformers.__version__,
        },
    )


def check_heads(layers: list[Attention], heads: int, name: str) -> None:
    """Raises ValueError if some layer has another number of KV heads than the model's config says."""
    found = {layer.key.shape[0] for layer in layers}
    if found != {heads}:
        raise ValueError(
            f"{name} has layers of {sorted(found)} KV heads, and its config says {heads}, which sharing does not "
            "support"
        )


def check_sample(ids: torch.Tensor, number: int, queries: int, near: Proximal | None) -> None:
    """Raises ValueError if `ids` are no token ids, or so few that some query has nothing to be compared by."""
    if near is None:
        needed, why = queries + 1, f"queries={queries} and one more"
    else:
        needed = queries + near.first + near.recent
        why = f"queries={queries}, sinks={near.first} and recent={near.recent}, so that each query has distant tokens"
    check_ids(ids, number, needed, why)


def check_ids(ids: torch.Tensor, number: int, needed: int, why: str) -> None:
    """Raises ValueError if `ids` are no token ids, or fewer than are `needed`."""
    if ids.ndim != 1 or ids.is_floating_point():
        raise ValueError(f"sample {number} must be token ids [N] int64, got {list(ids.shape)} {ids.dtype}")
    if len(ids) < needed:
        raise ValueError(f"sample {number} has {len(ids):,} tokens and needs {needed:,}: {why}")


@torch.inference_mode()
def layer_similarity(layers: list[Attention], near: Proximal | None) -> torch.Tensor:
    """Similarity of every two of L layers over one sample: ``[H, L, L]`` float64 on the CPU."""
    heads, tokens, _ = layers[0].key.shape
    count = layers[0].query.shape[0] // heads * layers[0].query.shape[1]
    chunk = max(1, ROW_BYTES // (16 * len(layers) * (tokens + 1)))
    total = torch.zeros(heads, len(layers), len(layers), dtype=torch.float64)
    for head in range(heads):
        for start in range(0, count, chunk):
            part = slice(start, min(start + chunk, count))
            rows = torch.empty(len(layers), part.stop - start, tokens + 1, device=layers[0].query.device)
            for layer, attention in enumerate(layers):
                rows[layer] = attention.rows(head, part, near)
            total[head] += js_divergence(rows).sum(-1).cpu().double()
    return 1 - total / count


def js_divergence(rows: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence, base 2, of every two of L distributions, row by row.

    Args:
        rows: ``[L, R, N]`` float32, each row adds up to 1.

    Returns:
        ``[L, L, R]`` float32 in [0, 1], symmetric; 0 exactly where two rows are equal.
    """
    entropy = torch.special.entr(rows)
    out = rows.new_zeros(len(rows), len(rows), rows.shape[1])

    def divergence(layer: int, above: slice) -> torch.Tensor:  # a function, so that nothing of one layer outlives it
        middle = torch.special.entr((rows[above] + rows[layer]).mul_(0.5))
        # Entropies are subtracted token by token: each difference is at least 0, so no digits are lost in the sum.
        return middle.sub_(entropy[above], alpha=0.5).sub_(entropy[layer], alpha=0.5).sum(-1)

    for layer in range(len(rows) - 1):
        above = slice(layer + 1, None)
        out[layer, above] = out[above, layer] = (divergence(layer, above) / math.log(2)).clamp_(0, 1)
    return out
