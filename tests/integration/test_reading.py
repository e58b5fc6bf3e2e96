"""A prompt that was read once fills any cache as the model's own forward would, bit for bit."""

import pytest
import torch
from support.architectures import build
from support.batches import ids, left_padded
from support.caches import state
from transformers import DynamicCache

from kara_hf import KaraCache, KVCompressCache, PoDCache, PoDSharing
from kara_hf.integration.generation import for_forward
from kara_hf.integration.reading import Reading

SMALL = {"window": 16, "recent": 4, "block_size": 4}
SHARED = PoDSharing(lead=((0, 0), (0, 1), (0, 1)), sinks=1, recent=5)
CACHES = {
    "kara": lambda model: KaraCache(model, retention=0.5, compress_prompt=True, **SMALL),
    "kara-prompt-kept": lambda model: KaraCache(model, retention=0.5, **SMALL),
    "kv-compress": lambda model: KVCompressCache(model, max_cache_tokens=24, protected=8, block_size=4),
    "pod": lambda model: PoDCache(model, SHARED, block_size=4),
    "dynamic": lambda model: DynamicCache(config=model.config),
}


def read_and_go_on(model, cache, inputs, read):
    """Logits of three single tokens behind the prompt."""
    mask, logits = inputs["attention_mask"], []
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    if read is None:
        model(**inputs, position_ids=positions, **for_forward(model, cache))
    else:
        assert read.fits(cache)
        read.into(cache)
    for step in range(3):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        token = torch.full_like(mask[:, :1], 7 + step)
        places = mask.sum(1, keepdim=True) - 1
        given = {"input_ids": token, "attention_mask": mask, "position_ids": places}
        logits.append(model(**given, **for_forward(model, cache)).logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize(  # one model tries every cache
    ("name", "kind", "padded"),
    [
        *(("llama", kind, padded) for kind in CACHES for padded in (False, True)),
        *((name, kind, True) for name in ("gemma3", "gpt-oss") for kind in ("kara", "dynamic")),
    ],
)
@torch.no_grad()
def test_as_if_the_model_had_read_it(name, kind, padded):
    model = build(name)
    if name == "gpt-oss":
        model.set_attn_implementation("eager")
    inputs = left_padded([ids(50), ids(31 if padded else 50, seed=1)])
    read = Reading(model, **inputs)
    anew, filled = CACHES[kind](model), CACHES[kind](model)
    expected = read_and_go_on(model, anew, inputs, None)
    assert torch.equal(read_and_go_on(model, filled, inputs, read), expected)
    if kind != "dynamic":
        assert state(filled) == state(anew)
        assert filled.report().resident_bytes == anew.report().resident_bytes
    again = CACHES[kind](model)  # nothing that was filled has changed the reading
    assert torch.equal(read_and_go_on(model, again, inputs, read), expected)


@torch.no_grad()
def test_what_follows_the_prompt():
    model = build("llama")
    inputs = left_padded([ids(20), ids(9, seed=1)])
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    expected = model(**inputs, position_ids=positions, logits_to_keep=1, **for_forward(model, cache)).logits[:, -1]
    read = Reading(model, **inputs)
    assert torch.equal(read.logits, expected) and read.seconds > 0


@pytest.mark.parametrize("name", ["qwen3-next", "falcon-h1", "deepseek-v3", "falcon-new"])
@torch.no_grad()
def test_caches_that_hold_more_than_keys_and_values_do_not_fit(name):
    """Recurrent states, latent rows, attention that nobody could watch."""
    model = build(name)
    read = Reading(model, **left_padded([ids(20)]))
    assert not read.fits(DynamicCache(config=model.config))
    assert not read.fits(KaraCache(model, **SMALL))


@torch.no_grad()
def test_prompts_that_are_computed_with_shared_keys_do_not_fit():
    model = build("llama")
    read = Reading(model, **left_padded([ids(20)]))
    sharing = PoDSharing(lead=SHARED.lead, sinks=1, recent=5, prefill="pod")
    assert not read.fits(PoDCache(model, sharing, block_size=4))
    assert not any("attention_hook" in vars(module) for module in model.modules())
