"""A prompt that `generate` hands over as a whole is cut layer by layer, to what a pass over all layers leaves of it."""

import pytest
import torch
from support.architectures import build
from support.batches import ids, left_padded, prompt
from support.caches import feed, kept, memory_of, state
from support.marks import few, slow
from support.sharing import SHARED, deep

from kara_hf import KVCompressCache

SMALL = {"block_size": 4, "observation": 8, "pool": 3}
CUT = SMALL | {"max_cache_tokens": 24}
SHARE = SMALL | {"retention": 0.3, "min_cache_tokens": 16}
GREEDY = {"max_new_tokens": 14, "min_new_tokens": 14, "do_sample": False}
VARIANTS = {
    "tokens": CUT,
    "share": SHARE,
    "sum": CUT | {"votes": "sum", "protected": 6},
    "l1": CUT | {"metric": "l1"},
    "random": CUT | {"metric": "random"},
    "recency": SHARE | {"metric": "recency"},
    "all queries": CUT | {"observation": None},
    "prompt alone": CUT | {"continual": False},
    "no votes later": CUT | {"accumulate": False},
    "pinned": CUT | {"pin": [(9, 12)]},
    "enough": SMALL | {"max_cache_tokens": 256},
    "whole": SMALL | {"retention": 1.0},
    "bits": SMALL | {"bits": 4, "retention": 0.6, "protected": 8},
    "bits alone": SMALL | {"bits": 8, "retention": 1.0},
}


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.mark.parametrize("kind", few(list(VARIANTS), "tokens", "share", "random", "all queries", "bits"))
def test_it_is_what_one_pass_over_all_layers_leaves(model, kind):
    """In a padded batch, one of whose sequences is within the budget, and at every step from then on."""
    batch = left_padded([ids(190, 1), ids(130, 2), ids(11, 3)])
    once, layerwise = (KVCompressCache(model, **VARIANTS[kind]) for _ in range(2))
    out = model.generate(**batch, past_key_values=layerwise, **GREEDY)
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 14, dtype=torch.long)], 1)
    logits = list(feed(model, once, out, [190, *[1] * 13], mask))
    assert torch.cat([each[:, -1:].argmax(-1) for each in logits], 1).equal(out[:, 190:])
    assert state(layerwise) == state(once) and layerwise.sequences == once.sequences
    assert layerwise.compression.steps_to_compression() == once.compression.steps_to_compression()
    assert layerwise.report().resident_bytes == memory_of(layerwise)
    if layerwise.policy.compresses and kind != "enough":
        assert layerwise.report().kept.float().mean() < 80


@pytest.mark.parametrize("kind", ["tokens", "bits"])
@pytest.mark.parametrize(
    "way", [{}, slow({"num_beams": 3}), slow({"do_sample": True, "num_return_sequences": 2})], ids=str
)
def test_one_layer_at_most_holds_the_prompt(kind, way):
    model, held = deep(), {}
    for name, more in (("layerwise", {}), ("once", {"levels": None})):
        cache = KVCompressCache(model, **VARIANTS[kind] | {"retention": None, "max_cache_tokens": 80} | more)
        model.generate(**prompt(400, batch=1), past_key_values=cache, **GREEDY | way)
        held[name] = cache.report()
    layer = held["layerwise"].full_bytes / 6 * 400 / 414
    one = held["layerwise"]
    assert held["once"].peak_bytes > 6 * layer / way.get("num_beams", way.get("num_return_sequences", 1))
    # Beside keys and values a prompt has positions, a metric and a few queries.
    assert one.peak_bytes < one.resident_bytes + 1.5 * layer


@pytest.mark.parametrize("why", ["heads differ", "cap", "sharing", "chunks", "drafts"])
def test_where_layers_cannot_be_cut_alone_the_prompt_is_cut_once(why):
    model = deep()
    more = {"heads differ": {"levels": None}, "cap": {"max_bytes": 10**9}, "sharing": {"sharing": SHARED}}.get(why, {})
    way = {"chunks": {"prefill_chunk_size": 60}, "drafts": {"prompt_lookup_num_tokens": 3}}.get(why, {})
    cache = KVCompressCache(model, **CUT, **more)
    given = prompt(200, batch=1)
    out = model.generate(**given, past_key_values=cache, **GREEDY, **way)
    assert cache.report().peak_bytes > cache.report().full_bytes * 0.9
    if not way:
        once = KVCompressCache(model, **CUT, **more)
        list(feed(model, once, out, [200, *[1] * 13]))
        assert kept(once) == kept(cache)


@pytest.mark.parametrize("chunk", [None, 64])
def test_what_is_read_without_generating_waits_for_what_follows_unless_it_is_complete(model, chunk):
    text = ids(150)[None]
    caches = waiting, complete, generated = [KVCompressCache(model, **CUT, prefill_chunk=chunk) for _ in range(3)]
    model.generate(text, past_key_values=generated, max_new_tokens=1, do_sample=False)
    logits = waiting.read(text), complete.read(text, complete=True)
    assert logits[0].equal(logits[1]) and state(complete) == state(generated)
    assert (waiting.report().kept == 150).all() or chunk
    assert (complete.report().kept <= 24).all() or chunk
    after = [list(feed(model, cache, torch.cat([text, ids(20, 4)[None]], 1), [1] * 20)) for cache in caches]
    assert all(one.equal(other) for one, other in zip(after[0], after[1], strict=True))
    assert state(waiting) == state(complete)


def test_that_a_prompt_is_complete_is_not_said_of_the_next_one(model):
    cache = KVCompressCache(model, **CUT)
    with pytest.raises(IndexError):
        cache.read(torch.tensor([[10**6]]), complete=True)
    cache.read(ids(150)[None])
    assert (cache.report().kept == 150).all()


def test_a_turn_behind_it_is_taken_and_what_was_announced_does_not_outlive_it(model):
    cache, given = KVCompressCache(model, **CUT), prompt(150, batch=1)
    first = model.generate(**given, past_key_values=cache, max_new_tokens=1, do_sample=False)
    assert cache.report().kept.float().mean() <= 24
    second = torch.cat([first, ids(20, 5)[None]], 1)
    out = model.generate(second, past_key_values=cache, **GREEDY)
    assert out.shape[1] == 171 + 14 and cache.report().seen.tolist() == [171 + 13]
    cache.reset()
    list(feed(model, cache, given["input_ids"], [150]))
    assert (cache.report().kept == 150).all()


def test_a_prompt_that_fails_in_a_later_layer_leaves_nothing(model):
    cache, given = KVCompressCache(model, **CUT), prompt(90, batch=2)
    failing = model.model.layers[-1].self_attn.o_proj.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.generate(**given, past_key_values=cache, **GREEDY)
    failing.remove()
    cache.reset()
    assert memory_of(cache) == 0 == cache.report().resident_bytes
    fresh = KVCompressCache(model, **CUT)
    outs = [model.generate(**given, past_key_values=each, **GREEDY) for each in (cache, fresh)]
    assert outs[0].equal(outs[1]) and state(cache) == state(fresh)
