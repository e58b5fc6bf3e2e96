"""The first tokens of a sequence stay, on a model that cannot do without them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.architectures import build
from support.caches import feed
from support.marks import most_examples
from support.oracle import check
from support.sink_model import sink_model, texts
from transformers import DynamicCache

from kara_hf import KaraCache, KVCompressCache

SMALL = {"window": 16, "recent": 4, "block_size": 4, "retention": 0.25, "compress_prompt": True}


@pytest.fixture(scope="module")
def model():
    return sink_model()


def loss(model, cache):
    """Of the second half of texts that are read four tokens at a time."""
    ids = texts(8, 128, seed=10**6)
    logits = torch.cat(list(feed(model, cache, ids, [4] * 32)), dim=1)[:, 64:-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 65:].flatten()).item()


def test_the_model_has_a_sink(model):
    assert loss(model, DynamicCache(config=model.config)) < 0.01
    model.set_attn_implementation("eager")
    shares = model(texts(2, 60), output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    ordinary = texts(2, 60)[:, None, :].expand(-1, 2, -1) != 1
    for share in shares:
        assert share[..., 0][ordinary].min() > 0.9


@pytest.mark.parametrize("score", ["random", "recency"])
def test_controls_keep_the_sinks_that_the_model_cannot_do_without(model, score):
    assert loss(model, KaraCache(model, score=score, sinks=0, **SMALL)) > 5
    assert loss(model, KaraCache(model, score=score, **SMALL)) < 0.01
    assert loss(model, KVCompressCache(model, max_cache_tokens=24, protected=4, sinks=4, block_size=4)) < 0.01


@pytest.mark.parametrize("prompt", [1, 3, 17])
def test_sinks_behind_a_prompt_that_is_shorter(prompt):
    """The prompt is kept whole, and what is missing of the sinks behind it."""
    model = build("llama")
    cache = KaraCache(model, **SMALL | {"compress_prompt": False, "score": "recency", "sinks": 6})
    ids = torch.randint(3, 100, (2, 60))
    list(feed(model, cache, ids, [prompt] + [1] * (60 - prompt)))
    for head in range(2):
        kept = cache.kept_positions(1, 1, head).tolist()
        assert kept[: max(6, prompt)] == list(range(max(6, prompt)))
        assert len(kept) == 60 - sum(16 - max(4, 6 - start) for start in range(prompt, 60 - 4 - 16 + 1, 16))


@pytest.mark.parametrize("sinks", [3, 20])
@pytest.mark.parametrize("score", ["bidirectional", "random"])
def test_what_is_left_is_attended_to_exactly(score, sinks):
    assert check("llama", [3, 0], lambda model: KaraCache(model, score=score, sinks=sinks, **SMALL)) > 0


@most_examples(5)
@given(
    padding=st.lists(st.integers(0, 20), min_size=2, max_size=3),
    sinks=st.integers(0, 20),
    compress_prompt=st.booleans(),
    score=st.sampled_from(["bidirectional", "random"]),
)
def test_every_sequence_keeps_its_own_sinks_as_it_would_alone(padding, sinks, compress_prompt, score):
    model, given_settings = build("llama"), SMALL | {"compress_prompt": compress_prompt, "score": score, "sinks": sinks}
    ids = torch.randint(3, 100, (len(padding), 60))
    mask = torch.ones_like(ids)
    for b, pad in enumerate(padding):
        mask[b, :pad] = 0
    together = KaraCache(model, **given_settings)
    list(feed(model, together, ids, [21] + [1] * 39, mask))
    for b, pad in enumerate(padding):
        alone = KaraCache(model, **given_settings)
        list(feed(model, alone, ids[b : b + 1, pad:], [21 - pad] + [1] * 39))
        for layer in range(3):
            kept = together.kept_positions(layer, b, 1).tolist()
            assert kept[:sinks] == list(range(min(sinks, 60 - pad)))
            assert kept == alone.kept_positions(layer, 0, 1).tolist()
