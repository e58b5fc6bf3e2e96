"""Queries of a sample of tokens: which they are, what they weigh, and that nobody but the score notices."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.architectures import build
from support.caches import feed
from support.oracle import check

import kara_hf.methods.peer_scores  # noqa: F401  registers snapkv
from kara_hf import KaraCache
from kara_hf.policy import KaraPolicy
from kara_hf.policy.scores import SCORES, recency, register_score
from kara_hf.storage import Sampling

SMALL = {"window": 16, "recent": 5, "block_size": 4, "retention": 0.5}


@given(st.integers(1, 40), st.data())
def test_sampling_is_even_and_the_same_for_every_window(window, data):
    sampling = Sampling(data.draw(st.integers(1, window)), window)
    one = sampling.tokens_of(0, window)
    assert len(one) == sampling.count and one[-1] == window - 1
    assert sampling.tokens_of(window, 3 * window) == [token + width for width in (window, 2 * window) for token in one]
    gaps = np.diff([-1, *one])
    assert gaps.max() - gaps.min() <= 1
    for tokens in range(3 * window):
        held = sampling.tokens_of(0, tokens)
        assert len(held) == sampling.place(tokens) and all(token < tokens for token in held)
        assert sampling.places(tokens) == len({sampling.place(token) for token in range(tokens)})
        assert sampling.tokens(sampling.places(tokens)) >= tokens
        assert [max(t for t in range(4 * window) if sampling.place(t) == i) for i in range(len(held))] == held


@given(st.integers(1, 9), st.lists(st.integers(0, 30), min_size=1, max_size=3), st.integers(1, 20), st.booleans())
def test_what_is_appended_is_the_sample(count, before, new, ragged):
    """Against places, token by token; query s of sequence b is the number 100 b + s."""
    sampling, batch = Sampling(count, 9), len(before)
    queries = (100 * torch.arange(batch)[:, None] + torch.arange(new)).float()[:, None, :, None]
    real = torch.rand(batch, new) < 0.7 if ragged else None
    chosen, filled, which = sampling.of(queries, np.array(before), real)
    for b, start in enumerate(before):
        mine = chosen[b, 0, :, 0] if which is None else chosen[b, 0, which[b], 0]
        columns = [s for s in range(new) if real is None or real[b, s]]
        ends = sampling.tokens_of(start, start + len(columns))
        assert mine.tolist() == [100 * b + columns[token - start] for token in ends]
        assert filled[b] == sampling.place(start)


def windows_of(monkeypatch) -> list:
    seen, select = [], KaraPolicy.select

    def watched(policy, window):
        seen.append(window)
        return select(policy, window)

    monkeypatch.setattr(KaraPolicy, "select", watched)
    return seen


@pytest.mark.parametrize("steps", [[40] + [1] * 40, [7] * 11, [4] + [1] * 76], ids=["first", "steps", "tokens"])
@pytest.mark.parametrize("count", [1, 5, 16])
def test_windows_are_judged_by_the_sample_of_their_queries(count, steps, monkeypatch):
    """The same as are held without sampling, at the places that the sampling names, whatever the steps were."""
    model, ids, mask = build("llama"), torch.randint(3, 100, (2, 80)), torch.ones(2, 80, dtype=torch.long)
    mask[0, :3] = 0
    found = []
    for queries in (None, count):
        seen = windows_of(monkeypatch)
        cache = KaraCache(model, compress_prompt=True, queries=queries, score="recency-of-queries", **SMALL)
        list(feed(model, cache, ids, steps, mask))
        found.append(seen)
        monkeypatch.undo()
    sampling = Sampling(count, 16)
    assert len(found[0]) == len(found[1]) >= 3 * 4
    for whole, part in zip(*found, strict=True):
        assert torch.equal(part.queries, whole.queries[:, :, sampling.tokens_of(0, 16)])
        assert torch.equal(part.later, whole.later[:, :, sampling.tokens_of(0, 5)])


@pytest.fixture(autouse=True)
def indifferent_score():
    """Keeps the same tokens whatever the queries are, so that hidden states stay those of the other run."""
    register_score("recency-of-queries", queries=True)(recency)
    yield
    del SCORES["recency-of-queries"]


@pytest.mark.parametrize("score", ["bidirectional", "causal", "random-chunks", "snapkv"])
@pytest.mark.parametrize("compress_prompt", [True, False])
def test_what_is_left_is_attended_to_exactly(score, compress_prompt):
    make = {"score": score, "queries": 3, "compress_prompt": compress_prompt, **SMALL}
    assert check("llama", [3, 0], lambda model: KaraCache(model, **make)) > 0
    assert check("deepseek-v3", [3, 0], lambda model: KaraCache(model, **make), [24] + [1] * 25) > 0


@settings(max_examples=5)
@given(
    padding=st.lists(st.integers(0, 20), min_size=2, max_size=3),
    count=st.integers(1, 16),
    compress_prompt=st.booleans(),
    score=st.sampled_from(["bidirectional", "causal"]),
)
def test_every_sequence_keeps_what_it_would_alone(padding, count, compress_prompt, score):
    model = build("llama")
    given_settings = {"compress_prompt": compress_prompt, "score": score, "queries": count, **SMALL}
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
            assert torch.equal(together.kept_positions(layer, b, 1), alone.kept_positions(layer, 0, 1))


def test_a_sample_weighs_its_share():
    """There is a place for each sampled query of window and recent tokens, and no others."""
    model, ids = build("llama"), torch.randint(3, 100, (2, 75))
    weights = {}
    for count in (None, 8, 2, 1):
        cache = KaraCache(model, queries=count, **SMALL)
        list(feed(model, cache, ids, [20] + [1] * 55))
        report = cache.report()
        weights[count] = report.query_bytes
        query = sum(layer.state.queries.buffer[:, :, :1].nbytes for layer in cache.compressed_layers)
        if count:
            assert report.query_bytes <= query * (Sampling(count, 16).places(21) + count)
        buffers = sum(layer.state.queries.buffer.nbytes for layer in cache.compressed_layers)
        assert report.query_bytes == buffers and report.to_dict()["query_bytes"] == buffers
    assert weights[None] == 2 * weights[8] == 8 * weights[2] == 16 * weights[1]
    indifferent = KaraCache(model, score="recency", **SMALL)
    list(feed(model, indifferent, ids, [20, 55]))
    assert indifferent.report().query_bytes == 0


def test_forks_and_crops():
    """Sequences that were arranged, copied and cut back are judged as if that had never been."""
    model, ids = build("llama"), torch.randint(3, 100, (3, 60))
    settings = {"queries": 5, **SMALL}
    straight = KaraCache(model, **settings)
    list(feed(model, straight, ids, [10] + [1] * 50))
    cache = KaraCache(model, **settings)
    list(feed(model, cache, ids[[1, 0, 0]], [10] + [1] * 12))
    cache.crop(-4)
    list(feed(model, cache, ids[[1, 0, 0]], [1] * 9))
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache = copy.deepcopy(cache)
    list(feed(model, cache, ids[[0, 1, 0]], [1] * 33))
    for layer in range(3):
        for b, of in enumerate((0, 1, 0)):
            assert torch.equal(cache.kept_positions(layer, b, 1), straight.kept_positions(layer, of, 1))
