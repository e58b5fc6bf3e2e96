"""A prompt that is cut as it is read: no more than the budget and one chunk is ever held."""

import pytest
import torch
from support.architectures import build
from support.batches import ids, left_padded, prompt
from support.caches import feed, kept, memory_of, rows_of, state
from support.marks import few, slow
from support.oracle import check
from support.sharing import SHARED, deep
from transformers import DynamicCache

from kara_hf import CompressedCache, KaraCache, KaraConfig, KVCompressCache, KVCompressConfig
from kara_hf.cache.budget_compression import BudgetCompression
from kara_hf.integration.prefill import read_ahead

KV = {"max_cache_tokens": 32, "block_size": 4, "observation": 4}
KARA = {"retention": 0.25, "window": 16, "recent": 4, "block_size": 4, "compress_prompt": True}
GREEDY = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    return build("llama")


def slot_bytes(cache):
    """Of a token in all rows of a sequence, with position and metric."""
    return sum(sum(cache.layer(layer).stored().slot_bytes) + 8 for layer, b, _ in rows_of(cache) if b == 0)


@pytest.mark.parametrize("chunk", [16, slow(8)])
@pytest.mark.parametrize("kind", few(["tokens", "share", "ragged", "bits", "pod", "kara"], "tokens", "bits", "kara"))
def test_the_budget_and_one_chunk_are_all_that_is_held(kind, chunk, model):
    """In tokens, and at any moment in bytes: the pool of one layer's keys or values is there twice while it grows."""
    model = deep() if kind == "pod" else model
    more = {"bits": {"bits": 4, "max_cache_tokens": 80}, "pod": {"sharing": SHARED}, "ragged": {"levels": None}}
    share = {"share": {"max_cache_tokens": None, "retention": 0.2}}
    if kind == "kara":
        cache = KaraCache(model, **KARA, prefill_chunk=chunk)
    else:
        cache = KVCompressCache(model, **KV | more.get(kind, {}) | share.get(kind, {}), prefill_chunk=chunk)
    given, most = ids(160)[None], []
    hook = model.register_forward_hook(lambda *_: most.append(float(cache.report().kept.float().mean())))
    cache.read(given)
    hook.remove()
    seen, config = 160, cache.policy.config
    budget = {"kara": 20 + (seen + 16) / 4, "share": 12 + seen / 5}.get(kind, getattr(config, "max_cache_tokens", 0))
    assert len(most) == -(-160 // chunk) and max(most) <= budget + chunk
    report = cache.report()
    assert report.resident_bytes == memory_of(cache)
    if kind not in ("bits", "pod"):
        sealed = chunk if kind == "kara" else 0  # windows of the chunk are sealed behind it
        held = (max(most) + sealed + config.block_size) * slot_bytes(cache)
        assert report.peak_bytes <= held * (1 + 1 / 6) + report.query_bytes + 4096
        assert report.peak_bytes < 0.7 * report.full_bytes


@pytest.mark.parametrize("variant", [{}, {"levels": None, "votes": "sum"}, slow({"observation": None})], ids=str)
def test_attention_is_exact_with_what_is_left(variant):
    made = lambda model: KVCompressCache(model, **KV | variant, prefill_chunk=16)  # noqa: E731
    assert check("llama", [3, 0], made, [16, 16, 9, *[1] * 6, 16, 16, 1, 1], first=True) > 0


@pytest.mark.parametrize("kind", [KVCompressCache, KaraCache])
def test_chunks_of_ours_of_transformers_and_of_the_caller_are_the_same(model, kind):
    batch = left_padded([ids(64, 1), ids(51, 2)])
    ours, theirs, callers, read = (
        kind(model, **(KARA if kind is KaraCache else KV), prefill_chunk=16) for _ in range(4)
    )
    first = model.generate(**batch, past_key_values=ours, **GREEDY)
    second = model.generate(**batch, past_key_values=theirs, prefill_chunk_size=16, **GREEDY)
    assert first.equal(second) and state(ours) == state(theirs)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 12, dtype=torch.long)], 1)
    list(feed(model, callers, first, [16] * 4 + [1] * 11, mask))
    assert state(callers) == state(ours)
    logits = read.read(**batch)
    assert logits.argmax(-1).equal(first[:, 64])
    list(feed(model, read, first, [1] * 11, mask))
    assert state(read) == state(ours)


def test_without_the_setting_chunks_are_cut_once(model):
    whole, parts, cut = (KVCompressCache(model, **KV, **chunk) for chunk in ({}, {}, {"prefill_chunk": 16}))
    outs = [
        model.generate(**prompt(80), past_key_values=cache, **more, **GREEDY)
        for cache, more in ((whole, {}), (parts, {"prefill_chunk_size": 16}), (cut, {}))
    ]
    assert outs[0].equal(outs[1]) and kept(whole) == kept(parts) != kept(cut)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("way", [{}, slow({"num_beams": 3}), slow({"prompt_lookup_num_tokens": 3})], ids=str)
def test_where_nothing_has_to_go_tokens_are_those_of_the_full_cache(model, way, bits):
    batch = prompt(60, batch=1)
    expected = model.generate(**batch, past_key_values=DynamicCache(config=model.config), **GREEDY, **way)
    for cache in (
        KVCompressCache(model, max_cache_tokens=256, prefill_chunk=16, bits=bits),
        KaraCache(model, retention=1.0, prefill_chunk=7, compress_prompt=True, bits=bits),
    ):
        found = model.generate(**batch, past_key_values=cache, **GREEDY, **way)
        assert found.equal(expected) if bits is None else found.shape == expected.shape


def test_every_chunk_has_its_last_queries_vote_and_votes_stay(model):
    cache = KVCompressCache(model, **KV, prefill_chunk=16)
    cache.read(ids(48)[None])
    assert cache.sequences[0].voters == ((12, 16), (28, 32))
    cache.compress()
    assert cache.sequences[0].voters == ((12, 16), (28, 32), (44, 48))


@pytest.mark.parametrize("chunk", [None, 16])
def test_behind_the_prompt_passes_are_a_block_apart(chunk, model, monkeypatch):
    """A pass moves what every layer holds, so one for each token would make steps slow."""
    cache, done = KVCompressCache(model, **KV, prefill_chunk=chunk), []
    list(feed(model, cache, ids(77)[None], [16] * 4))
    one_pass = BudgetCompression._pass
    monkeypatch.setattr(BudgetCompression, "_pass", lambda *given: done.append(one_pass(*given)))
    list(feed(model, cache, ids(77)[None], [1] * 13))
    assert len(done) == 4


def test_a_turn_is_cut_too_and_files_and_copies_go_on(model, tmp_path):
    cache, given = KVCompressCache(model, **KV, prefill_chunk=16), ids(200)[None]
    list(feed(model, cache, given, [16, 16]))
    cache.save(tmp_path / "half.safetensors")
    loaded = CompressedCache.load(tmp_path / "half.safetensors", model)
    assert loaded.prefill_chunk == 16
    for each in (cache, loaded):
        list(feed(model, each, given, [16, *[1] * 9, 16, 16, 16, 5, 1]))
        assert each.report().kept.float().mean() <= 32
    assert state(cache) == state(loaded)


def test_a_cap_on_the_bytes_holds(model):
    free = KVCompressCache(model, **KV, prefill_chunk=8)
    free.read(ids(120)[None])
    most = free.report().resident_bytes
    cache = KVCompressCache(model, **KV | {"max_cache_tokens": 400, "protected": 4}, prefill_chunk=8, max_bytes=most)
    held = []
    hook = model.register_forward_hook(lambda *_: held.append(cache.report().resident_bytes))
    cache.read(ids(120)[None])
    hook.remove()
    queries = cache.report().query_bytes  # which are about to go
    assert max(held) <= most + queries and cache.report().kept.max() < 100


def test_embeddings_are_cut_and_what_cannot_be_is_named(model):
    batch = prompt(40)
    embedded = batch | {"inputs_embeds": model.get_input_embeddings()(batch["input_ids"])}
    del embedded["input_ids"]
    one, other = (KVCompressCache(model, **KV, prefill_chunk=16) for _ in range(2))
    expected = model.generate(**batch, past_key_values=one, **GREEDY)
    assert model.generate(**embedded, past_key_values=other, **GREEDY).equal(expected[:, 40:])
    with pytest.raises(ValueError, match="prefill_chunk=16 is not possible with pixel_values"):
        read_ahead(model, 16, batch | {"pixel_values": torch.zeros(1, 3)})


@pytest.mark.parametrize("chunk", [1, 2.0, True, "all"])
def test_what_is_no_chunk_is_named(chunk):
    for settings in (KaraConfig, lambda **given: KVCompressConfig(retention=0.5, **given)):
        with pytest.raises(ValueError, match=f"prefill_chunk={chunk!r} is not possible"):
            settings(prefill_chunk=chunk)
