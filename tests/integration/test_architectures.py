"""What a cache keeps and frees, architecture by architecture; which classes work at all is the sweep's to say.

Each of the table's models either gives DynamicCache's tokens and the promised savings, or refuses with its reason.
"""

import pytest
import torch
import transformers
from packaging.version import Version
from support.architectures import ARCHITECTURES, build
from support.marks import few
from transformers import DynamicCache

from kara_hf import KaraCache, KVCompressCache, detach

PROMPT, NEW = 16, 34
KARA = {"window": 8, "recent": 4, "block_size": 4}
BLOCKS = {"protected": 8, "block_size": 8}

REFUSED = {
    "bloom": "takes its attention function from its config",
    "falcon-alibi": "adds a bias to its attention scores",
    "mamba2": "no full-attention layer",
    "minimax": "uses a cache class of its own",
    "mistral-sliding": "no full-attention layer",
    "mpt": "takes its attention function from its config",
}

# Models that an older Transformers does not let anyone reach, and the version that does.
SINCE = {name: since for name, since in {"gptj": "5.24"}.items() if Version(transformers.__version__) < Version(since)}
REFUSED |= dict.fromkeys(SINCE, "takes its attention function from its config")


def load(name: str):
    model = build(name)
    implementations = ARCHITECTURES[name].implementations
    if model.config.get_text_config(decoder=True)._attn_implementation not in implementations:
        model.set_attn_implementation(implementations[0])
    return model


SUPPORTED = [name for name in ARCHITECTURES if name not in REFUSED]


@pytest.mark.parametrize("name", few(SUPPORTED, "llama", "gemma3", "gpt-oss", "deepseek-v3", "qwen3-next"))
def test_supported(name):
    model = load(name)
    ids = torch.randint(3, 100, (2, PROMPT))
    settings = {"max_new_tokens": NEW, "do_sample": False}
    expected = expected_tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    cache = KaraCache(model, retention=1.0, **KARA)
    assert (
        model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **settings).tolist()
        == expected.tolist()
    )

    if ARCHITECTURES[name].padding:
        padded, mask = ids.clone(), torch.ones_like(ids)
        padded[1, :7], mask[1, :7] = 0, 0
        expected = model.generate(
            padded, attention_mask=mask, past_key_values=DynamicCache(config=model.config), **settings
        )
        cache = KaraCache(model, retention=1.0, **KARA)
        actual = model.generate(padded, attention_mask=mask, past_key_values=cache, **settings)
        assert actual.tolist() == expected.tolist()
        assert cache.report().seen.tolist() == [PROMPT + NEW - 1, PROMPT + NEW - 1 - 7]

    cache = KaraCache(model, retention=0.25, **KARA)
    model.generate(ids, past_key_values=cache, attention_mask=torch.ones_like(ids), **settings)
    report = cache.report()
    open_tokens = (NEW - 1) - 3 * 8
    assert report.kept.unique().tolist() == [PROMPT + 3 * 2 + open_tokens]
    assert report.nominal_bytes * (PROMPT + NEW - 1) == report.full_bytes * (PROMPT + 3 * 2 + open_tokens)
    rows = report.kept.numel()
    stored = report.nominal_bytes // int(report.kept.sum())
    blocks = -(-(int(report.kept.max()) // 4 + 1) * 9 // 8) + 1  # documented slack: an eighth, and a block being filled
    queries = sum(
        layer.state.queries.buffer.nbytes for layer in cache.compressed_layers if layer.state.queries is not None
    )
    assert report.resident_bytes <= rows * blocks * (4 * (stored + 4) + 2 * 4) + rows * 4 + queries
    kv_compress(model, ids, expected_tokens, settings)
    detach(model)


def kv_compress(model, ids, expected, settings):
    """What KVCompressCache does with the model: the same tokens while nothing has to go, then no more than promised."""
    settings = settings | {"attention_mask": torch.ones_like(ids)}
    try:
        cache = KVCompressCache(model, max_cache_tokens=96, **BLOCKS)
        assert model.generate(ids, past_key_values=cache, **settings).tolist() == expected.tolist()
    except ValueError as error:
        assert "latent attention" in str(error)
        return
    assert cache.report().kept.unique().tolist() == [PROMPT + NEW - 1]
    cache = KVCompressCache(model, max_cache_tokens=32, **BLOCKS)
    model.generate(ids, past_key_values=cache, **settings)
    kept = cache.report().kept
    assert (-(-kept // 8)).sum((0, 2)).max() <= 4 * kept[:, 0].numel()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused(name):
    model = load(name)
    ids = torch.randint(3, 100, (1, PROMPT))
    with pytest.raises(ValueError, match=REFUSED[name]):
        cache = KaraCache(model, **KARA)
        try:
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, past_key_values=cache)
        finally:
            assert cache.report().seen.tolist() == []  # nothing is left half-stored
    assert model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False).shape == (
        1,
        PROMPT + 2,
    )
