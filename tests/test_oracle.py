"""The end-to-end oracle: attention over what is stored equals dense attention with -inf at every evicted token.

A second model runs on a DynamicCache that keeps everything; its attention masks, per layer, head and true position,
what
the compressed cache evicted. The logits of every step must agree.
"""

import copy
import sys

import pytest
import torch
from architectures import build
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from kara_hf import KaraCache
from kara_hf.policy import SCORES

EVICTED: dict[int, torch.Tensor] = {}  # layer -> [B, H, columns] bool


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


def evicted_of(cache: KaraCache, columns: int, padding: list[int]) -> dict[int, torch.Tensor]:
    report = cache.report()
    masks = {}
    for layer in report.layers:
        heads = cache.layers[layer].store.lengths.shape[1]
        mask = torch.ones(len(padding), heads, columns, dtype=torch.bool)
        for b, pad in enumerate(padding):
            for h in range(heads):
                mask[b, h, cache.kept_positions(layer, b, h) + pad] = False
            mask[b, :, :pad] = False  # the padding mask hides those
        masks[layer] = mask
    return masks


@pytest.mark.parametrize("score", sorted(SCORES))
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt-oss", "qwen3-next", "deepseek-v3"])
def test_scores(name, score):
    if name != "llama" and score not in ("bidirectional", "random"):
        pytest.skip("one model tries every score")
    check(name, [3, 0], score=score, retention=0.25)


@pytest.mark.parametrize("steps", [[24, 1, 1, 9, 1, 30, 1], [40] + [1] * 40], ids=["turns", "tokens"])
@pytest.mark.parametrize("compress_prompt", [True, False])
@pytest.mark.parametrize("padding", [[0, 0], [5, 0], [0, 17]], ids=str)
def test_steps(padding, compress_prompt, steps):
    check("llama", padding, steps=steps, compress_prompt=compress_prompt, retention=0.5, anchor_share=0.6)


@torch.no_grad()
def check(name: str, padding: list[int], steps: list[int] | None = None, **settings) -> None:
    steps = steps or [24] + [1] * 45
    model = build(name)
    oracle = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    oracle.set_attn_implementation("oracle")
    cache = KaraCache(model, window=16, recent=4, block_size=4, **settings)
    dense = DynamicCache(config=model.config)
    ids = torch.randint(3, 100, (len(padding), sum(steps)))
    mask = torch.ones_like(ids)
    for b, pad in enumerate(padding):
        mask[b, :pad] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    seen, evictions = 0, 0
    for new in steps:
        EVICTED.clear()
        if seen:
            EVICTED.update(evicted_of(cache, seen, padding))
            evictions = max(evictions, max(int(m.sum()) for m in EVICTED.values()))
        inputs = {
            "input_ids": ids[:, seen : seen + new],
            "attention_mask": mask[:, : seen + new],
            "position_ids": positions[:, seen : seen + new],
        }
        actual = model(**inputs, past_key_values=cache, use_cache=True).logits
        expected = oracle(**inputs, past_key_values=dense, use_cache=True).logits
        real = mask[:, seen : seen + new].bool()
        torch.testing.assert_close(actual[real], expected[real], atol=2e-5, rtol=1e-4)
        seen += new
    EVICTED.clear()
    assert cache.get_seq_length() == seen == dense.get_seq_length()
    if settings.get("compress_prompt") or len(steps) > 30:
        assert evictions > 0
