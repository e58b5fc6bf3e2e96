"""Tokens that have settled are stored in few bits: attention is over what their records stand for, and all else is as
in a cache that stores them whole.
"""

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from support.architectures import ARCHITECTURES, build
from support.batches import left_padded, prompt
from support.caches import feed, memory_of, state
from support.marks import slow
from support.oracle import EVICTED, evicted_of
from support.sharing import SHARED, deep
from transformers import DynamicCache

from kara_hf import KaraCache, KaraConfig, KVCompressCache, KVCompressConfig, PoDCache, PoolExhausted
from kara_hf.cache import rounding
from kara_hf.storage import RoundedStore

KARA = {"window": 16, "recent": 8, "sinks": 2, "block_size": 4, "score": "random"}
KV = {"protected": 8, "sinks": 2, "block_size": 4, "observation": 8}
LONG = {"max_new_tokens": 40, "do_sample": False}
LATENT = {"deepseek-v2", "deepseek-v3"}
PROMPT = 90  # long enough for a first frame


def kara(**settings):
    return lambda model, **more: KaraCache(model, **KARA | {"bits": 4} | settings | more)


def kv(**settings):
    return lambda model, **more: KVCompressCache(model, **KV | {"bits": 4} | settings | more)


CACHES = {
    "kara-all": kara(retention=1.0),
    "kara-prompt": kara(retention=0.5),
    "kara-windows": kara(retention=0.5, compress_prompt=True),
    "kv-compress": kv(retention=0.8),
    "kv-compress-all": kv(retention=1.0),
    "kv-compress-prompt": kv(max_cache_tokens=88, continual=False),
}
EVERY = pytest.mark.parametrize("name", CACHES)


@pytest.fixture(scope="module")
def model():
    return build("llama")


def records_of(cache):
    """Tokens of each row that are rounded, ``[layer, B, H]``."""
    return np.stack([layer.store.records.lengths for layer in cache.compressed_layers])


# -------------------------------------------------------------------------------------------------------------- oracle
def mirror(cache, dense, padding, columns):
    """Puts what the rows of `cache` hold of the first columns into `dense`."""
    for layer in cache.compressed_layers:
        for b, h in np.ndindex(*layer.stored().lengths.shape):
            keys, values, positions = layer.stored().read(b, h)
            old = positions + padding[b] < columns
            for part, mine in ((dense.layers[layer.index].keys, keys), (dense.layers[layer.index].values, values)):
                part[b, h, positions[old] + padding[b]] = mine[old]


@torch.no_grad()
def check(model, make, padding, steps, first, attention="oracle"):
    """The logits of every step are those of dense attention over what the cache holds: the records' numbers, and
    nothing of what was evicted. `first`: a step first compresses and then attends. `attention`: what the oracle attends
    with; with None its own, which knows of no eviction.
    """
    oracle = copy.deepcopy(model)
    if attention is not None:
        model.set_attn_implementation("eager")
        oracle.set_attn_implementation(attention)
    cache, dense = make(model), DynamicCache(config=model.config)
    ids = torch.randint(3, 100, (len(padding), sum(steps)), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for b, pad in enumerate(padding):
        mask[b, :pad] = 0
    positions, seen = (mask.cumsum(1) - 1).clamp(min=0), 0

    def compare():
        EVICTED.clear()
        EVICTED.update(evicted_of(cache, seen, padding))
        mirror(cache, dense, padding, seen)

    try:
        for new in steps:
            inputs = {
                "input_ids": ids[:, seen : seen + new],
                "attention_mask": mask[:, : seen + new],
                "position_ids": positions[:, seen : seen + new],
            }
            if seen and not first:
                compare()
            actual = model(**inputs, past_key_values=cache, use_cache=True).logits
            if seen and first:
                compare()
            expected = oracle(
                **inputs, past_key_values=dense, use_cache=True, output_attentions=attention is not None
            ).logits
            real = mask[:, seen : seen + new].bool()
            torch.testing.assert_close(actual[real], expected[real], atol=1e-4, rtol=1e-3)
            seen += new
    finally:
        EVICTED.clear()
    return cache


@EVERY
@pytest.mark.parametrize("bits", [{"bits": 8}, {"bits": 4}, {"key_bits": 8, "value_bits": 2}], ids=str)
def test_attention_is_over_what_records_stand_for(model, name, bits):
    steps = [2 * PROMPT] + [1] * 20 + [7] + [1] * 20
    bits = {"bits": None} | bits
    cache = check(build("llama"), lambda model: CACHES[name](model, **bits), [5, 0], steps, first=name.startswith("kv"))
    assert (records_of(cache) > 40).all()


REFUSED = {"bloom", "falcon-alibi", "mamba2", "minimax", "mistral-sliding", "mpt"}  # with any settings
UNMASKED = {"falcon-multi-query", "falcon-new", "gemma3n", "gemma4", "zamba2"}  # the oracle does not reach all layers
SUPPORTED = [
    slow(name) if model.group == "extra" else name
    for name, model in ARCHITECTURES.items()
    if name not in REFUSED | LATENT
]


@pytest.mark.parametrize("name", SUPPORTED)
def test_every_architecture(name):
    kind = ARCHITECTURES[name]
    padding, model = [3, 0] if kind.padding else [0, 0], build(name)
    model.set_attn_implementation(kind.implementations[0])
    attention = None if name in UNMASKED else "oracle"
    cache = check(model, CACHES["kara-all"], padding, [PROMPT] + [1] * 12, first=False, attention=attention)
    assert (records_of(cache) > 64).all()
    if attention is None:
        return
    cache = check(build(name), CACHES["kv-compress"], padding, [PROMPT] + [1] * 12, first=True)
    assert (records_of(cache) > 0).any()


@pytest.mark.parametrize("name", sorted(LATENT))
@pytest.mark.parametrize("make", [CACHES["kara-all"], CACHES["kara-windows"]], ids=["all", "windows"])
def test_latents_are_refused(name, make):
    model = build(name)
    cache = make(model)
    with pytest.raises(ValueError, match=r"bits=4 is not possible with .*one latent row.*; leave bits out"):
        model(**prompt(), past_key_values=cache)
    assert cache.get_seq_length() == 0
