"""Pinned tokens are never evicted, whatever decides, and the budget counts them first."""

import copy
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.architectures import build
from support.batches import ids, prompt
from support.caches import feed, kept, rows_of
from support.marks import most_examples, slow
from support.oracle import check
from support.sharing import SHARED, deep

from kara_hf import CompressedCache, KaraCache, KaraConfig, KVCompressCache, KVCompressConfig, PoDCache, PoolExhausted
from kara_hf.cache.plan import plan
from kara_hf.config import as_pins, parse_pins

KARA = {"retention": 0.25, "window": 16, "recent": 4, "block_size": 4, "compress_prompt": True}
KV = {"max_cache_tokens": 64, "protected": 4, "block_size": 4, "observation": 8}
CACHES = {
    "kara": lambda model, **pins: KaraCache(model, **KARA, **pins),
    "kara, prompt whole": lambda model, **pins: KaraCache(model, **KARA | {"compress_prompt": False}, **pins),
    "kara, published": lambda model, **pins: KaraCache(
        model, **KARA | {"retention": 0.4}, score="bidirectional", queries=None, **pins
    ),
    "kara, a share": lambda model, **pins: KaraCache(model, **KARA | {"recent": 0.5}, **pins),
    "kara, recency": lambda model, **pins: KaraCache(model, **KARA | {"sinks": 0}, score="recency", **pins),
    "kara, bits": lambda model, **pins: KaraCache(model, **KARA | {"retention": 0.6}, bits=4, **pins),
    "kara, pod": lambda model, **pins: KaraCache(model, **KARA, sharing=SHARED, **pins),
    "kv": lambda model, **pins: KVCompressCache(model, **KV, **pins),
    "kv, a share": lambda model, **pins: KVCompressCache(model, **KV | {"protected": 0.5}, **pins),
    "kv, ragged": lambda model, **pins: KVCompressCache(model, **KV, levels=None, votes="sum", **pins),
    "kv, retention": lambda model, **pins: KVCompressCache(
        model, **KV | {"max_cache_tokens": None, "retention": 0.2}, **pins
    ),
    "kv, recency": lambda model, **pins: KVCompressCache(model, **KV, metric="recency", **pins),
    "kv, bits": lambda model, **pins: KVCompressCache(model, **KV | {"max_cache_tokens": 96}, bits=4, **pins),
    "kv, pod": lambda model, **pins: KVCompressCache(model, **KV, sharing=SHARED, **pins),
}
STEPS = [40, *[1] * 6, 9, *[1] * 20, 5, 1]  # 81 tokens


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.fixture(scope="module")
def shared():
    return deep()


def assert_pinned(cache):
    """Every row has what is pinned of the tokens seen."""
    assert any(sequence.pins for sequence in cache.sequences)
    for layer, b, h in rows_of(cache):
        wanted = {place for start, end in cache.sequences[b].pins for place in range(start, end)}
        there = set(cache.kept_positions(layer, b, h).tolist())
        assert there >= {place for place in wanted if place < cache.sequences[b].tokens}


def assert_in_budget(cache):
    """After a step that decoded."""
    policy = cache.policy
    if isinstance(policy.config, KVCompressConfig):
        tokens = cache.report().seen.numpy() + policy.config.block_size
        used = (-(-cache.report().kept.numpy() // policy.config.block_size)).sum((0, 2))
        rows = sum(1 for _, b, _ in rows_of(cache) if b == 0)
        assert (used <= policy.budget_blocks(tokens, rows, [s.pins for s in cache.sequences])).all()


stretches = st.lists(st.tuples(st.integers(0, 75), st.integers(1, 12)), min_size=1, max_size=3)


@most_examples(28)
@given(
    kind=st.sampled_from(list(CACHES)),
    spans=stretches,
    later=st.tuples(st.integers(50, 75), st.integers(1, 12)),
    padding=st.integers(0, 9),
)
def test_every_row_has_what_is_pinned(model, shared, kind, spans, later, padding):
    model = shared if kind.endswith("pod") else model
    cache = CACHES[kind](model, pin=[(start, start + count) for start, count in spans])
    batch, mask = torch.stack([ids(sum(STEPS), 1), ids(sum(STEPS), 2)]), torch.ones(2, sum(STEPS), dtype=torch.long)
    mask[0, :padding] = 0
    for step, _ in enumerate(feed(model, cache, batch, STEPS, mask)):
        if step in (6, 17, 27):
            assert_pinned(cache)
            assert_in_budget(cache)
        if step == 3:
            cache.pin(later[0], sum(later), sequence=1)
    assert_pinned(cache)
    assert any(start <= later[0] < end for start, end in cache.sequences[1].pins)


@pytest.mark.parametrize("kind", ["kara", slow("kara, published"), "kv", slow("kv, ragged")])
def test_what_is_left_is_attended_to_exactly(kind):
    pin = [(6, 11), (30, 33)]
    made = lambda model: CACHES[kind](model, pin=pin)  # noqa: E731
    assert check("llama", [3, 0], made, [70] + [1] * 25, first=kind.startswith("kv")) > 0


@pytest.mark.parametrize("kind", ["kara", "kv, retention"])
def test_where_everything_is_kept_nothing_changes(model, kind):
    cache = CACHES[kind](model, pin=[(3, 9), (50, 70)])
    object.__setattr__(cache.policy.config, "retention", 1.0)
    expected = model.generate(**prompt(40), max_new_tokens=40, do_sample=False)
    assert model.generate(**prompt(40), past_key_values=cache, max_new_tokens=40, do_sample=False).equal(expected)


def test_a_window_of_more_pinned_tokens_than_it_keeps_keeps_these_alone(model):
    """k is 4; what lies across the border of two windows counts in both."""
    cache = KaraCache(model, **KARA, sinks=0, pin=[(5, 18)])
    list(feed(model, cache, ids(60)[None], [60]))
    for row in kept(cache).values():
        assert [place for place in row if place < 16] == list(range(5, 16))
        assert len([place for place in row if 16 <= place < 32]) == 4 and row[11:13] == [16, 17]


def test_what_is_left_of_a_window_is_chosen_as_if_the_pinned_were_not_there(model):
    """Recency keeps the last tokens, and a chunk goes on behind pinned ones."""
    cache = KaraCache(model, **KARA, sinks=1, score="recency", pin=[(13, 16)])
    list(feed(model, cache, ids(40)[None], [40]))
    assert all(row[:5] == [0, 13, 14, 15, 28] for row in kept(cache).values())
    wide = KaraCache(model, **KARA | {"retention": 0.5}, sinks=1, score="recency", pin=[(13, 15)])
    list(feed(model, wide, ids(40)[None], [40]))
    assert all(row[:8] == [0, 9, 10, 11, 12, 13, 14, 15] for row in kept(wide).values())


@pytest.mark.parametrize("kind", ["kara", "kv"])
def test_pinning_a_cache_in_use(model, kind):
    cache, batch = CACHES[kind](model), torch.stack([ids(110, 1), ids(110, 2)])
    cache.pin(2, 6)
    list(feed(model, cache, batch, [40]))
    list(feed(model, cache, batch, [1] * 36))
    evicted = next(place for place in range(8, 50) if any(place not in row for row in kept(cache, 1).values()))
    before, state = cache.sequences, cache.report().to_dict()
    with pytest.raises(ValueError, match="pin.0, 50. is not possible: of sequence 0 the tokens .* were evicted"):
        cache.pin(0, 50)
    with pytest.raises(ValueError, match=f"of sequence 1 the tokens {evicted} were"):
        cache.pin(evicted, evicted + 1, sequence=1)
    with pytest.raises(IndexError, match="sequence 2 is not there; the cache has 2"):
        cache.pin(0, 1, sequence=2)
    assert cache.sequences == before and cache.report().to_dict() == state
    cache.pin(74, 90, sequence=1)  # some of them were seen
    list(feed(model, cache, batch, [1] * 34))
    assert [sequence.pins for sequence in cache.sequences] == [((2, 6),), ((2, 6), (74, 90))]
    assert_pinned(cache)
    assert_in_budget(cache)
    assert not all(set(range(74, 90)) <= set(row) for row in kept(cache, 0).values())


@pytest.mark.parametrize("kind", ["kara", "kv"])
def test_pins_go_along(model, kind, tmp_path):
    """Forks, copies, files, turns, what is cropped and read again; a reset leaves those of the settings."""
    cache, batch = CACHES[kind](model, pin=[(8, 12)]), torch.stack([ids(110, 1), ids(110, 2)])
    list(feed(model, cache, batch, [40]))
    cache.pin(60, 66, sequence=1)
    cache.save(tmp_path / "saved.safetensors")
    others = [copy.deepcopy(cache), CompressedCache.load(tmp_path / "saved.safetensors", model)]
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    for each in (cache, *others):
        list(feed(model, each, batch, [1] * 8))
        each.crop(-2)
        list(feed(model, each, batch, [2, 18, *[1] * 14]))
        assert [sequence.pins for sequence in each.sequences] == [((8, 12),), ((8, 12), (60, 66))]
        assert_pinned(each)
    assert kept(cache, 1) == kept(others[0], 1) == kept(others[1], 1)
    cache.reset()
    list(feed(model, cache, batch, [40]))
    assert [sequence.pins for sequence in cache.sequences] == [((8, 12),)] * 2
    empty = CACHES[kind](model)
    empty.pin(3, 5)
    empty.save(tmp_path / "empty.safetensors")
    loaded = CompressedCache.load(tmp_path / "empty.safetensors", model)
    list(feed(model, loaded, batch, [40]))
    assert loaded.sequences[0].pins == ((3, 5),)
    loaded.reset()
    list(feed(model, loaded, batch, [40]))
    assert loaded.sequences[0].pins == ()


def test_a_failed_first_step_leaves_the_pins(model):
    cache = CACHES["kara"](model)
    cache.pin(3, 5)
    with pytest.raises(ValueError, match="nothing but padding"):
        list(feed(model, cache, ids(10)[None], [10], torch.zeros(1, 10, dtype=torch.long)))
    list(feed(model, cache, ids(30)[None], [30]))
    assert cache.sequences[0].pins == ((3, 5),)


def test_drafts_and_beams(model):
    for extra in ({"prompt_lookup_num_tokens": 4}, {"num_beams": 3}):
        cache = CACHES["kv"](model, pin=[(10, 15), (50, 55)])
        model.generate(**prompt(40), past_key_values=cache, max_new_tokens=36, do_sample=False, **extra)
        assert_pinned(cache)


def test_kinds(model):
    cache = KaraCache(model, **KARA | {"compress_prompt": False, "retention": 1.0}, pin=[(4, 9), (20, 33)])
    list(feed(model, cache, ids(60)[None], [24, *[1] * 36]))
    told = [(0, 4, "prompt"), (4, 9, "pinned"), (9, 20, "prompt"), (20, 33, "pinned")]
    assert cache.chunks(1) == [*told, (33, 56, "open"), (56, 60, "recent")]
    cache = CACHES["kv"](model, pin=[(4, 9), (70, 90)])
    list(feed(model, cache, ids(80)[None], [40, *[1] * 40]))
    told = cache.chunks(2, 0, 1)
    assert (4, 9, "pinned") in told and told[-1] == (70, 80, "pinned")
    assert [place for start, end, _ in told for place in range(start, end)] == cache.kept_positions(2, 0, 1).tolist()


# ------------------------------------------------------------------------------------------------------ what is refused
def test_a_budget_that_cannot_hold_them_is_refused_with_the_numbers(model):
    numbers = (
        "max_cache_tokens=64 .* from 76 on: every row keeps 18 blocks of 4 for sinks=4, 61 pinned tokens, protected=4"
    )
    with pytest.raises(ValueError, match=numbers):
        KVCompressCache(model, **KV, pin=[(2, 40), (50, 75)])
    cache = KVCompressCache(model, **KV, pin=[(2, 40)])
    with pytest.raises(ValueError, match=numbers):
        cache.pin(50, 75)
    list(feed(model, cache, ids(80)[None], [40]))
    with pytest.raises(ValueError, match=numbers):
        cache.pin(50, 75)
    assert cache.sequences[0].pins == ((2, 40),)
    most = KVCompressConfig(**KV, pin=[(4, 56)])
    assert most.least_blocks + 1 == 64 // 4


@pytest.mark.parametrize("kind", ["kara", "kv"])
def test_a_cap_that_cannot_hold_them_says_so(model, kind):
    free = CACHES[kind](model, pin=[(0, 50)])
    list(feed(model, free, ids(60)[None], [20, *[1] * 40]))
    most = free.report().resident_bytes // 2
    cache = CACHES[kind](model, max_bytes=most, pin=[(0, 50)])
    with pytest.raises(PoolExhausted, match=rf"holds \d+ bytes and needs \d+ more, past max_bytes={most}"):
        list(feed(model, cache, ids(60)[None], [20, *[1] * 40]))


@pytest.mark.parametrize(
    ("pin", "named"),
    [
        ([(5, 5)], "pin=(5, 5)"),
        ([(0, 3), (-1, 2)], "pin=(-1, 2)"),
        ([(1.0, 2)], "pin=(1.0, 2)"),
        ((0, 10), "pin=0"),
        (7, "pin=7"),
        ("system", "system_pin(tokenizer, messages)"),
    ],
)
def test_what_is_no_stretch_is_named(pin, named):
    for settings in (KaraConfig, lambda **pins: KVCompressConfig(retention=0.5, **pins)):
        with pytest.raises(ValueError, match=re.escape(named)):
            settings(pin=pin)


def test_stretches_are_put_in_order():
    assert as_pins([(7, 9), (1, 3), (3, 5), (8, 12)]) == ((1, 5), (7, 12))
    assert parse_pins(" 20:30, 0:4 ") == ((0, 4), (20, 30)) and parse_pins("") == ()
    for text in ("4", "1:2:3", "a:3", "5:2"):
        with pytest.raises(ValueError, match="pin="):
            parse_pins(text)
    config = KVCompressConfig(retention=0.5, pin=[(1, 3)])
    assert KVCompressConfig.from_json(config.to_json()) == config


def test_a_cache_that_keeps_everything_can_be_pinned(shared):
    cache = PoDCache(shared, SHARED)
    list(feed(shared, cache, ids(30)[None], [20]))
    cache.pin(5, 10)
    assert cache.chunks(1)[1] == (5, 10, "pinned")


def test_plans_count_them(model):
    settings = KaraConfig(**KARA | {"compress_prompt": False}, pin=[(10, 60)])
    cache, most = CACHES["kara, prompt whole"](model, pin=[(10, 60)]), 0
    for _ in feed(model, cache, ids(110)[None], [4, *[1] * 106]):
        most = max(most, int(cache.report().kept.max()))
    assert plan(model.config, settings, 110, prompt=4, dtype=torch.float32).tokens == most
    free, pinned = (plan(model.config, KVCompressConfig(retention=0.1, pin=pins), 2000) for pins in ((), [(100, 600)]))
    assert 400 < pinned.tokens - free.tokens <= 500
