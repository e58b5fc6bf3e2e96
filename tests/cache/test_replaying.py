"""Replayed tokens, however many come in a forward, leave a cache as `generate` left it when it decoded them."""

import pytest
import torch
from support.marks import few
from support.sharing import SHARED, deep

from kara_hf import KaraCache, KVCompressCache, PoDCache

PROMPT, NEW = 29, 44
WINDOWS = {"window": 16, "recent": 6, "block_size": 4, "retention": 0.25}
BUDGET = {"retention": 0.3, "block_size": 4, "protected": 4, "sinks": 2, "observation": 8}
CACHES = {
    "kara": lambda model: KaraCache(model, **WINDOWS),
    "kara, prompt compressed": lambda model: KaraCache(model, **WINDOWS, compress_prompt=True),
    "everything": lambda model: KaraCache(model, **{**WINDOWS, "retention": 1.0}),
    "kv-compress": lambda model: KVCompressCache(model, **BUDGET),
    "kv-compress, without votes": lambda model: KVCompressCache(model, **BUDGET, accumulate=False),
    "kv-compress, the prompt kept": lambda model: KVCompressCache(model, **{**BUDGET, "sinks": PROMPT}),
    "kv-compress, the prompt only": lambda model: KVCompressCache(model, **BUDGET, continual=False),
    "pod": lambda model: PoDCache(model, SHARED, block_size=4),
    "kara on shared keys": lambda model: KaraCache(model, **WINDOWS, sharing=SHARED),
}


@pytest.fixture(scope="module")
def model():
    return deep()


def kept(cache):
    return {
        (layer, head): cache.kept_positions(layer, 0, head).tolist()
        for layer, heads in zip(cache.report().layers, cache.report().kept[:, 0].tolist(), strict=True)
        for head in range(len(heads))
    }


def replay(model, cache, ids, most):
    """Logits behind every token from the prompt's last one on, and in what pieces they came."""
    with torch.no_grad(), cache.replaying():
        logits, sizes = [model(ids[:, :PROMPT], past_key_values=cache, use_cache=True).logits[:, -1:]], []
        while (seen := cache.get_seq_length()) < ids.shape[1]:
            sizes.append(min(most, cache.replayable, ids.shape[1] - seen))
            part = ids[:, seen : seen + sizes[-1]]
            logits.append(model(part, past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, 1), sizes


@pytest.mark.parametrize(
    "name", few(list(CACHES), "kara", "kv-compress", "kv-compress, the prompt only", "kara on shared keys")
)
def test_replaying_is_decoding(model, name):
    prompt = torch.randint(1, 50, (1, PROMPT))
    decoded = CACHES[name](model)
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=decoded,
        max_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    report = decoded.report()
    assert (report.nominal_bytes < report.full_bytes) == ("everything" not in name)
    for most in (1, 7, 1000) if name in ("kara", "kv-compress") else (7, 1000):
        replayed = CACHES[name](model)
        logits, sizes = replay(model, replayed, out.sequences[:, :-1], most)
        assert max(sizes) <= most and (most == 1 or max(sizes) > 1)
        torch.testing.assert_close(logits[0], torch.cat(out.logits), atol=2e-5, rtol=1e-4)
        assert kept(replayed) == kept(decoded)
        assert replayed.sequences == decoded.sequences
        assert replayed.report().nominal_bytes == report.nominal_bytes


def test_outside_of_it_several_tokens_are_a_turn(model):
    ids = torch.randint(1, 50, (1, 60))
    cache = KaraCache(model, **WINDOWS)
    assert cache.replayable == 1  # the prompt comes first
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
        with pytest.raises(RuntimeError, match="stop"), cache.replaying():
            assert cache.replayable == 16 + 6 - 1  # what comes then seals a window
            raise RuntimeError("stop")
        model(ids[:, 20:], past_key_values=cache)
    assert cache.chunks(0) == [(0, 60, "prompt")]
