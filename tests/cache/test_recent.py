"""A share of what is held that is recent: it grows with the sequence, and nobody but the policy notices."""

import pytest
import torch
from support.architectures import build
from support.caches import feed
from support.marks import slow
from support.oracle import check

import kara_hf.methods.peer_scores  # noqa: F401  registers snapkv
from kara_hf import KaraCache

SMALL = {"window": 16, "block_size": 4, "retention": 0.25, "compress_prompt": True}


@pytest.mark.parametrize(("share", "tokens"), [(0.3, 300), (0.7, 300)])
def test_the_recent_tokens_grow_with_what_is_held(share, tokens):
    model, ids = build("llama"), torch.randint(3, 100, (1, tokens))
    cache = KaraCache(model, recent=share, score="recency", **SMALL)
    counts = []
    for _ in feed(model, cache, ids, [60] + [10] * ((tokens - 60) // 10)):
        (sequence,) = cache.sequences
        held = len(cache.kept_positions(1))
        start, stop, kind = cache.chunks(1)[-1]
        assert kind == "recent" and stop == sequence.tokens
        if sequence.segments:
            assert sequence.open >= share * held and stop - start >= share * held - 1
            assert sequence.open - 16 < share * (held + 4 - 16) + 1, "the next window would seal if it could"
        counts.append(stop - start)
    assert counts[-1] > 1.4 * counts[5] > 0
    assert cache.report().kept.max() == cache.report().kept.min() < tokens


@pytest.mark.parametrize("recent", [0.5, 8])
def test_the_begin_is_whole_up_to_the_floor(recent):
    """While tokens are decoded one by one; later as many are held as without a floor."""
    model, ids = build("llama"), torch.randint(3, 100, (1, 150))
    settings = SMALL | {"recent": recent, "compress_prompt": False}
    caches = [KaraCache(model, min_cache_tokens=least, **settings) for least in (24, 0)]
    counts = [[len(cache.kept_positions(1)) - 8 for _ in feed(model, cache, ids, [8] + [1] * 142)] for cache in caches]
    whole = next(place for place, (mine, seen) in enumerate(zip(counts[0], range(143), strict=True)) if mine < seen)
    assert whole >= 24 + 12 and min(counts[0][whole:]) >= 24, "nothing is dropped before, and never too much"
    assert counts[0][-1] == counts[1][-1] < 120 and max(counts[0]) == max(counts[1])


@pytest.mark.parametrize(
    "settings",
    [{}, {"min_cache_tokens": 30}, *map(slow, ({"queries": 3}, {"score": "snapkv"}, {"score": "random"}))],
    ids=str,
)
def test_sequences_in_a_batch_are_as_alone_and_exact(settings):
    made = {"recent": 0.4, **settings, **SMALL}
    assert check("llama", [9, 0], lambda model: KaraCache(model, **made)) > 0
    model, ids, mask = build("llama"), torch.randint(3, 100, (2, 70)), torch.ones(2, 70, dtype=torch.long)
    mask[0, :13] = 0
    together = KaraCache(model, **made)
    list(feed(model, together, ids, [40] + [1] * 30, mask))
    for b, pad in enumerate((13, 0)):
        alone = KaraCache(model, **made)
        list(feed(model, alone, ids[b : b + 1, pad:], [40 - pad] + [1] * 30))
        for layer in range(3):
            assert torch.equal(together.kept_positions(layer, b, 0), alone.kept_positions(layer, 0, 0))
