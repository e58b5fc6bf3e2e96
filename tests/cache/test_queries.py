"""Queries of a sample of tokens: which they are, what they weigh, and that nobody but the score notices."""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.architectures import build
from support.caches import feed
from support.marks import few, most_examples, slow
from support.oracle import check

import kara_hf.methods.peer_scores  # noqa: F401  registers snapkv
from kara_hf import KaraCache
from kara_hf.kernels import sampled_places
from kara_hf.policy import KaraPolicy
from kara_hf.policy.scores import SCORES, recency, register_score
from kara_hf.storage import MemoryMeter, QueryBuffer, Sampling

SMALL = {"window": 16, "recent": 5, "block_size": 4, "retention": 0.5}


@given(st.integers(1, 24), st.integers(1, 4), st.data())
def test_sampling_is_even_and_the_same_for_every_window(window, group, data):
    sampling = Sampling(data.draw(st.integers(1, window)), window, group)
    one = sampling.tokens_of(0, sampling.count)
    assert np.array_equal(one, sampled_places(sampling.count, window, group).numpy())
    later = sampling.tokens_of(sampling.count, 3 * sampling.count)
    assert np.array_equal(later, np.concatenate([one + window, one + 2 * window], axis=1))
    for tokens in range(3 * window):
        places = [
            [(token + earlier) * sampling.count // window for token in range(tokens)] for earlier in sampling.earlier
        ]
        assert sampling.places(tokens) == max((place + 1 for row in places for place in row), default=0)
        assert sampling.tokens(sampling.places(tokens)) >= tokens
        held = sampling.tokens_of(0, sampling.place(tokens))
        assert (held < tokens).all(), "what is read has come"
        for row, mine in zip(places, held.tolist(), strict=True):
            assert mine == [max(t for t, place in enumerate(row) if place == i) for i in range(len(mine))]
    every = set(sampling.tokens_of(0, sampling.places(4 * window)).flatten().tolist())
    for start, new in itertools.product(range(3 * window), (0, 1, 2, window)):
        assert sampling.among(start, start + new) == any(token in every for token in range(start, start + new))


@example(count=3, group=2, steps=[(10, False), (10, False), (2, False)], ragged=True)  # nothing new in a row
@most_examples(30)
@given(
    count=st.integers(1, 9),
    group=st.integers(1, 3),
    steps=st.lists(st.tuples(st.integers(1, 12), st.booleans()), min_size=1, max_size=6),
    ragged=st.booleans(),
)
def test_the_buffer_holds_the_sample_whatever_the_steps(count, group, steps, ragged):
    """Token after token, or several at once, with padding among them or not; a query is the number of its token."""
    sampling = Sampling(count, 9, group)
    buffer = QueryBuffer(2, 2 * group, 1, torch.float32, torch.device("cpu"), MemoryMeter(), sampling)
    tokens = np.zeros(2, np.int64)
    for new, alone in steps:
        new = 1 if alone else new
        real = torch.rand(2, new) < 0.6 if ragged else None
        brought = torch.full((2, new), -1.0) if ragged else torch.zeros(2, new)
        for b in range(2):
            which = slice(None) if real is None else real[b]
            brought[b, which] = torch.arange(int(brought[b, which].numel())).float() + int(tokens[b])
        queries = brought[:, None, :, None].expand(-1, 2 * group, -1, -1)
        if alone:
            buffer.reserve(int(tokens.max()) + 1)
            buffer.put(queries, torch.from_numpy(tokens)[:, None])
        else:
            buffer.append(queries, tokens, real)
        tokens = tokens + (new if real is None else real.sum(1).numpy())
    for b, seen in enumerate(tokens.tolist()):
        held = buffer.window(torch.tensor([b]), 0, seen)[0, ..., 0]
        assert torch.equal(held, torch.from_numpy(np.tile(sampling.tokens_of(0, sampling.place(seen)), (2, 1))).float())


def windows_of(monkeypatch) -> list:
    seen, select = [], KaraPolicy.select

    def watched(policy, window):
        seen.append(window)
        return select(policy, window)

    monkeypatch.setattr(KaraPolicy, "select", watched)
    return seen


@pytest.mark.parametrize("steps", [[40] + [1] * 40, [7] * 11, slow([4] + [1] * 76)], ids=["first", "steps", "tokens"])
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
    sampling = Sampling(count, 16, 2)
    sample, behind = (torch.from_numpy(np.tile(sampling.tokens_of(0, sampling.place(n)), (2, 1))) for n in (16, 5))
    assert len(found[0]) == len(found[1]) >= 3 * 4
    for whole, part in zip(*found, strict=True):
        heads = torch.arange(4)[:, None]
        assert torch.equal(part.queries, whole.queries[:, heads, sample])
        assert torch.equal(part.later, whole.later[:, heads, behind])


@pytest.fixture(autouse=True)
def indifferent_score():
    """Keeps the same tokens whatever the queries are, so that hidden states stay those of the other run."""
    register_score("recency-of-queries", queries=True)(recency)
    yield
    del SCORES["recency-of-queries"]


@pytest.mark.parametrize("score", few(["bidirectional", "causal", "random-chunks", "snapkv"], "causal", "snapkv"))
@pytest.mark.parametrize("compress_prompt", [True, False])
def test_what_is_left_is_attended_to_exactly(score, compress_prompt):
    make = {"score": score, "queries": 3, "compress_prompt": compress_prompt, **SMALL}
    assert check("llama", [3, 0], lambda model: KaraCache(model, **make)) > 0
    assert check("deepseek-v3", [3, 0], lambda model: KaraCache(model, **make), [24] + [1] * 25) > 0


@most_examples(5)
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
            assert report.query_bytes <= query * (Sampling(count, 16, 2).places(21) + count)
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
