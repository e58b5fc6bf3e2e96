"""Dense attention with -inf at every evicted token: what a compressed cache's logits are compared with."""

import copy
import sys
from collections.abc import Callable

import torch
from support.architectures import build
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from kara_hf import CompressedCache

EVICTED: dict[int, torch.Tensor] = {}  # layer -> [B, H, columns] bool


def evicted_of(cache: CompressedCache, columns: int, padding: list[int]) -> dict[int, torch.Tensor]:
    """Which of the first `columns` each layer does not store, ``[B, H, columns]`` bool; padding counts as stored."""
    report = cache.report()
    masks = {}
    for layer in report.layers:
        heads = cache.layers[layer].store.lengths.shape[1]
        mask = torch.ones(len(padding), heads, columns, dtype=torch.bool)
        for b, pad in enumerate(padding):
            for h in range(heads):
                kept = cache.kept_positions(layer, b, h) + pad
                mask[b, h, kept[kept < columns]] = False
            mask[b, :, :pad] = False  # the padding mask hides those
        masks[layer] = mask
    return masks


def masked_attention(module, query, key, value, attention_mask, **kwargs):
    """The model's own eager attention with -inf at evicted keys."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    evicted = EVICTED.get(module.layer_idx)
    if evicted is not None and key.shape[2] >= evicted.shape[2]:
        extra = torch.zeros(*evicted.shape[:2], 1, key.shape[2])
        extra[..., : evicted.shape[2]].masked_fill_(evicted[:, :, None], torch.finfo(torch.float32).min)
        extra = extra.repeat_interleave(query.shape[1] // evicted.shape[1], dim=1)
        attention_mask = extra if attention_mask is None else attention_mask[..., : key.shape[2]] + extra
    return eager(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register("oracle", masked_attention)
AttentionMaskInterface.register("oracle", ALL_MASK_ATTENTION_FUNCTIONS["eager"])


@torch.no_grad()
def check(
    name: str | PreTrainedModel,
    padding: list[int],
    make: Callable[..., CompressedCache],
    steps: list[int] | None = None,
    first: bool = False,
    after: Callable[..., None] = lambda *_: None,
    attention: str = "oracle",
) -> int:
    """Runs the named (or given) model on ``make(model)`` and on the oracle, in `steps`; compares the logits of each.

    Args:
        padding: columns of padding on the left of each sequence.
        first: whether a step first evicts and then attends, instead of the other way round.
        after: called with the cache, the oracle's output and the number of columns after every step.
        attention: what the oracle attends with.

    Returns:
        The most (sequence, head, position) that any layer had evicted.
    """
    steps = steps or [24] + [1] * 38
    model = build(name) if isinstance(name, str) else copy.deepcopy(name)
    oracle = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    oracle.set_attn_implementation(attention)
    cache = make(model)
    dense = DynamicCache(config=model.config)
    ids = torch.randint(3, 100, (len(padding), sum(steps)))
    mask = torch.ones_like(ids)
    for b, pad in enumerate(padding):
        mask[b, :pad] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    seen, evictions = 0, 0
    try:
        for new in steps:
            EVICTED.clear()
            if seen and not first:
                EVICTED.update(evicted_of(cache, seen, padding))
            inputs = {
                "input_ids": ids[:, seen : seen + new],
                "attention_mask": mask[:, : seen + new],
                "position_ids": positions[:, seen : seen + new],
            }
            actual = model(**inputs, past_key_values=cache, use_cache=True).logits
            if seen and first:
                EVICTED.update(evicted_of(cache, seen, padding))
            evictions = max([evictions, *(int(evicted.sum()) for evicted in EVICTED.values())])
            expected = oracle(**inputs, past_key_values=dense, use_cache=True, output_attentions=True)
            real = mask[:, seen : seen + new].bool()
            torch.testing.assert_close(actual[real], expected.logits[real], atol=2e-5, rtol=1e-4)
            seen += new
            after(cache, expected, seen)
    finally:
        EVICTED.clear()
    assert cache.get_seq_length() == seen == dense.get_seq_length()
    return evictions
