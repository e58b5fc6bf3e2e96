"""What a cache says of itself is what it holds."""

import gc
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.architectures import build
from support.caches import live_tensors
from support.marks import most_examples

from kara_hf import KaraCache
from kara_hf.integration.attention import CarriedKey

GREEDY = {"max_new_tokens": 50, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    return build("llama")


def run(model, batch: int = 2, prompt: int = 37, **settings) -> KaraCache:
    cache = KaraCache(model, **{"window": 16, "recent": 4, "block_size": 4, "retention": 0.5, **settings})
    ids = torch.randint(3, 100, (batch, prompt), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    return cache


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek-v3"])
@pytest.mark.parametrize("settings", [{}, {"compress_prompt": True}, {"retention": 1.0}, {"score": "random"}], ids=str)
def test_resident_bytes_are_the_live_tensors(name, settings):
    cache = run(build(name), **settings)
    memory = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in live_tensors(cache)}
    padding = cache.state.padding
    memory[padding.untyped_storage().data_ptr()] = padding.nbytes
    assert cache.report().resident_bytes == sum(memory.values())
    assert cache.report().peak_bytes >= cache.report().resident_bytes


def test_nothing_else_stays_alive(model):
    """The process holds no more tensor memory than before, but for what the report says."""
    run(model)
    gc.collect()

    def total() -> int:
        storages = {}
        for thing in gc.get_objects():
            if type(thing) in (torch.Tensor, CarriedKey):
                storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        return sum(storages.values())

    before = total()
    cache = run(model)
    gc.collect()
    assert total() - before == cache.report().resident_bytes
    cache.reset()
    gc.collect()
    assert total() == before


def test_numbers(model):
    cache = run(model, compress_prompt=False)
    report = cache.report()
    assert report.seen.tolist() == [37 - 9 + 49, 37 + 49]
    assert report.layers == [0, 1, 2] and report.kept.shape == (3, 2, 2)
    generated = 49
    sealed = (generated - 4) // 16
    assert report.kept[0, :, 0].tolist() == [28 + generated - sealed * 8, 37 + generated - sealed * 8]
    token = 2 * 16 * 4
    assert report.full_bytes == int(report.seen.sum()) * 3 * 2 * token
    assert report.nominal_bytes == int(report.kept.sum()) * token
    assert json.loads(json.dumps(report.to_dict()))["kept"] == report.kept.tolist()


@most_examples(15)
@given(
    prompt=st.integers(10, 70),
    window=st.sampled_from([4, 8, 16, 24]),
    recent=st.integers(0, 20),
    retention=st.floats(0.05, 1.0),
    sinks=st.sampled_from([0, 1, 4, 30]),
    compress_prompt=st.booleans(),
    score=st.sampled_from(["bidirectional", "random", "recency", "random-chunks"]),
)
def test_what_is_kept_is_what_the_settings_promise(prompt, window, recent, retention, sinks, compress_prompt, score):
    settings = dict(window=window, recent=recent, retention=retention, compress_prompt=compress_prompt, score=score)
    cache = run(build("llama"), batch=2, prompt=prompt, sinks=sinks, **settings)
    for sequence, tokens in enumerate(cache.report().seen.tolist()):
        pinned = 0 if compress_prompt else tokens - 49
        windows = max(0, (tokens - pinned - recent) // window)
        starts = range(pinned, pinned + windows * window, window)
        k = {start: max(1, round(retention * window), min(window, sinks - start)) for start in starts}
        for layer in range(3):
            for head in range(2):
                kept = cache.kept_positions(layer, sequence, head)
                assert kept.tolist() == sorted(set(kept.tolist()))
                assert len(kept) == tokens - sum(window - count for count in k.values())
                assert set(range(min(tokens, sinks))) <= set(kept.tolist())
                assert kept[:pinned].tolist() == list(range(pinned))
                assert set(range(tokens - recent, tokens)) <= set(kept.tolist())
                for start, count in k.items():
                    assert ((kept >= start) & (kept < start + window)).sum() == count


def test_chunks_cover_what_is_kept(model):
    cache = run(model)
    for sequence in range(2):
        for head in range(2):
            chunks = cache.chunks(1, sequence, head)
            assert [p for start, end, _ in chunks for p in range(start, end)] == cache.kept_positions(
                1, sequence, head
            ).tolist()
            kinds = [kind for _, _, kind in chunks]
            assert kinds[0] == "prompt" and kinds[-1] == "recent"
            assert sorted(kinds, key=["prompt", "sealed", "open", "recent"].index) == kinds
            start, end, _ = chunks[-1]
            assert end - start == 4
    assert len(cache.chunks(1, 0, 0)) > 4


def test_a_sealed_window_never_changes(model):
    cache = KaraCache(model, window=16, recent=4, block_size=4, retention=0.5)
    ids = torch.randint(3, 100, (1, 92))
    sealed: dict[int, list[int]] = {}
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache, use_cache=True)
        for n in range(20, 92):
            model(ids[:, n : n + 1], past_key_values=cache, use_cache=True)
            kept = cache.kept_positions(1).tolist()
            for number in range((n + 1 - 20 - 4) // 16):
                survivors = [p for p in kept if 20 + number * 16 <= p < 36 + number * 16]
                assert sealed.setdefault(number, survivors) == survivors and len(survivors) == 8
    assert len(sealed) == 4


def test_memory_does_not_grow_with_what_is_evicted(model):
    """At the smallest retention, resident bytes follow the tokens kept, not the tokens seen."""
    sizes = []
    for tokens in (80, 240):
        cache = KaraCache(model, window=16, recent=4, block_size=4, retention=1 / 16, score="recency")
        model.generate(
            torch.full((1, 8), 5), attention_mask=torch.ones(1, 8), past_key_values=cache, max_new_tokens=tokens
        )
        sizes.append(cache.report())
    assert (sizes[1].resident_bytes - sizes[0].resident_bytes) < 0.15 * (sizes[1].full_bytes - sizes[0].full_bytes)
