"""`KVCompressCache` end to end: exact where nothing is evicted, dense attention without the evicted tokens where
something is, and within its budget, in blocks and in bytes, all the way.
"""

import copy
import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.architectures import ARCHITECTURES, build
from support.batches import left_padded, prompt
from support.caches import feed, kept, live_tensors, memory_of, rows_of, state
from support.marks import most_examples, slow
from support.oracle import check
from transformers import DynamicCache

from kara_hf import KVCompressCache, PoolExhausted, detach
from kara_hf.integration.attention import CarriedKey
from kara_hf.storage import Blocks, PagedStore


@pytest.fixture(scope="module")
def model():
    return build("llama")


PUBLISHED = {"votes": "sum", "levels": None}
SMALL = {"block_size": 4, "protected": 6, "sinks": 2, "observation": 8, "pool": 3}  # no row has less than 2 blocks
SMALL |= PUBLISHED
CUT = {"max_cache_tokens": 20, **SMALL}
LONG = {"max_new_tokens": 34, "do_sample": False}
KEEP_ALL = pytest.mark.parametrize("keep", [{"retention": 1.0}, {"max_cache_tokens": 512}], ids=["share", "cap"])
ROWS = 6  # of a sequence in the small llama: 3 layers with 2 heads


def make(**chosen) -> Callable[..., KVCompressCache]:
    return lambda model: KVCompressCache(model, **SMALL | chosen)


def metric_of(cache: KVCompressCache, layer: int, sequence: int, head: int) -> torch.Tensor:
    """Metric of one row's tokens in the order of their positions, ``[T]``."""
    store = cache.layers[layer].stored()
    metric, positions = (part[sequence, head, : store.lengths[sequence, head]] for part in store.ranked())
    return metric[positions.argsort()]


def blocks_in_use(cache: KVCompressCache) -> np.ndarray:
    """Blocks that hold a token, over all rows of each sequence, ``[B]``."""
    size = cache.compression.block_size
    return (-(-cache.report().kept.numpy() // size)).sum((0, 2))


def run(model, cache, ids: torch.Tensor, steps: list[int], mask: torch.Tensor | None = None) -> torch.Tensor:
    """All the logits of `feed`."""
    return torch.cat(list(feed(model, cache, ids, steps, mask)), dim=1)


def assert_promises(cache: KVCompressCache, decoding: bool = True) -> None:
    """What holds for every cache after every step, of a llama."""
    config, report = cache.policy.config, cache.report()
    tokens = report.seen.numpy()
    for layer, b, h in rows_of(cache):
        positions = cache.kept_positions(layer, b, h).tolist()
        assert positions == sorted(set(positions))
        seen = int(tokens[b])
        assert set(positions) >= {*range(min(config.sinks, seen)), *range(max(0, seen - config.protected), seen)}
        assert len(positions) >= min(seen, config.sinks + config.protected + config.floor)
    assert report.resident_bytes == memory_of(cache)
    if decoding and config.continual:
        assert (blocks_in_use(cache) <= cache.policy.budget_blocks(tokens + config.block_size, ROWS)).all()
        if config.max_cache_tokens is not None:
            assert report.resident_bytes <= most_bytes(cache)


def most_bytes(cache: KVCompressCache) -> int:
    """The documented bound: the budget, one free block for each row, and tables and lengths."""
    config = cache.policy.config
    batch = len(cache.sequences)
    blocks = batch * (config.max_cache_tokens * ROWS // config.block_size + ROWS)
    widest = max(layer.paged().keys.table.shape[2] for layer in cache.compressed_layers)
    token = sum(cache.compressed_layers[0].stored().slot_bytes) + 4 + 4  # its position and its metric
    return blocks * config.block_size * token + batch * ROWS * (2 * 4 * widest + 4)


# --------------------------------------------------------------------------------------------------- nothing is evicted
@KEEP_ALL
@pytest.mark.parametrize("group", [1, slow(2), 4, slow(8)])
def test_tokens_and_logits_of_a_padded_batch_are_those_of_the_full_cache(group, keep, monkeypatch):
    llama = ARCHITECTURES["llama"]
    heads = {"num_attention_heads": 8, "head_dim": 8, "num_key_value_heads": 8 // group}
    monkeypatch.setitem(ARCHITECTURES, "grouped", dataclasses.replace(llama, config=llama.config | heads))
    model = build("grouped")
    batch = left_padded([prompt(n, seed=n)["input_ids"][0] for n in (33, 7, 52, 1)])
    expected, actual = (
        model.generate(**batch, past_key_values=cache, return_dict_in_generate=True, output_logits=True, **LONG)
        for cache in (DynamicCache(config=model.config), make(**keep)(model))
    )
    assert actual.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(expected.logits), atol=2e-5, rtol=1e-4)


WAYS = {
    "sampling": {"do_sample": True, "temperature": 0.9, "num_return_sequences": 3},
    "beams": {"num_beams": 4, "num_return_sequences": 2},
    "chunks": {"prefill_chunk_size": 9},
    "prompt-lookup": {"prompt_lookup_num_tokens": 4},
    "assistant": {},
}


@KEEP_ALL
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("way", WAYS)
def test_ways_to_generate(way, name, keep):
    model = build(name)
    extra = {"assistant_model": build(name, seed=1)} if way == "assistant" else {}
    batch = prompt(32, batch=1 if way in ("prompt-lookup", "assistant") else 2)
    outputs = []
    for cache in (None, make(**keep)(model)):
        torch.manual_seed(5)
        settings = {"do_sample": False, "max_new_tokens": 24} | WAYS[way] | extra
        outputs.append(model.generate(**batch, past_key_values=cache, **settings).tolist())
    assert outputs[0] == outputs[1]


@KEEP_ALL
def test_conversation(model, keep):
    turns = []
    for cache in (DynamicCache(config=model.config), make(**keep)(model)):
        ids = prompt(30)["input_ids"]
        for turn in range(3):
            more = {"max_new_tokens": 14, "do_sample": False}
            ids = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **more)
            turns.append(ids.tolist())
            ids = torch.cat([ids, prompt(12, seed=turn)["input_ids"]], dim=1)
    assert turns[:3] == turns[3:]


@KEEP_ALL
def test_a_model_wrapped_by_peft(keep):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(build("llama"), config).eval()
    expected = model.generate(**prompt(), **LONG)
    assert model.generate(**prompt(), past_key_values=make(**keep)(model), **LONG).tolist() == expected.tolist()


@KEEP_ALL
def test_rearranged_copied_and_reset(model, keep):
    """All at once: what became of a sequence goes on as it would have gone on alone, before decoding and within."""
    ids = prompt(50, batch=3)["input_ids"]
    expected = run(model, DynamicCache(config=model.config), ids, [50])
    cache = make(**keep)(model)
    for start in (20, 30):
        run(model, cache, ids, [20] + [1] * (start - 20))
        other = copy.deepcopy(cache)
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3, 5]))
        for each, order in ((cache, [2, 0, 0]), (other, [0, 1, 2])):
            assert each.report().resident_bytes == memory_of(each)
            logits = run(model, each, ids[order], [1] * (50 - start))
            torch.testing.assert_close(logits, expected[order, start:], atol=2e-5, rtol=1e-4)
        cache.reset()
        assert cache.report().resident_bytes == memory_of(cache) == 0


def test_several_caches_on_one_model(model):
    """Each does what it does alone, while the others are fed in turn."""
    ids = prompt(58)["input_ids"]
    kinds = [{"retention": 1.0}, CUT, {"retention": 0.3, "levels": 2}, CUT | {"accumulate": False}]
    steps = [40] + [1] * 18
    together = [make(**kind)(model) for kind in kinds]
    logits = zip(*zip(*(feed(model, cache, ids, steps) for cache in together), strict=True), strict=True)
    for kind, several, cache in zip(kinds, logits, together, strict=True):
        alone = make(**kind)(model)
        assert torch.equal(run(model, alone, ids, steps), torch.cat(several, dim=1))
        assert kept(alone) == kept(cache)


@pytest.mark.parametrize("tokens", [1, 3, 12], ids=str)
def test_a_prompt_shorter_than_the_budget_and_the_window(model, tokens):
    expected = model.generate(**prompt(tokens), max_new_tokens=8, do_sample=False)
    cache = make(**CUT, **{})(model)
    out = model.generate(**prompt(tokens), past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert out.tolist() == expected.tolist()
    assert cache.report().kept.unique().tolist() == [tokens + 7]
    model.generate(out, attention_mask=torch.ones_like(out), past_key_values=cache, **LONG)
    assert_promises(cache)


# ----------------------------------------------------------------------------------------------------------- the oracle
TURNS = [[24, 1, 1, 9, 1, 30, 1, 1], [11, 12, 5, *[1] * 14, 7, 8, 1, 1]]
VARIANTS = [
    {},
    {"continual": False},
    {"accumulate": False},
    {"observation": None, "pool": 1},
    {"levels": 1},
    {"levels": 2, "floor": 3},
    {"sinks": 0, "protected": 1},
    {"metric": "l1", "pool": 1},
    {"block_size": 1, "max_cache_tokens": 13},
    {"block_size": 16, "max_cache_tokens": 40, "protected": 3},
    {"retention": 0.3},
    {"metric": "random", "seed": 3},
    {"metric": "recency"},
]


def cut(**chosen) -> Callable[..., KVCompressCache]:
    return make(**({} if "retention" in chosen else {"max_cache_tokens": 16}) | chosen)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt-oss", "qwen3-next"])
def test_attention_is_dense_attention_without_the_evicted(name):
    assert check(name, [3, 0], cut(), [30] + [1] * 18, first=True) > 0


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("steps", [[40] + [1] * 16, *TURNS], ids=["tokens", "turns", "chunks"])
def test_attention_with_every_setting(steps, variant):
    assert check("llama", [0, 9], cut(**variant), steps, first=True) > 0


@pytest.mark.parametrize("name", ["gemma2", "gpt-oss"])
@pytest.mark.parametrize("steps", TURNS, ids=["turns", "chunks"])
def test_turns_of_other_models(name, steps):
    assert check(name, [5, 0], cut(), steps, first=True) > 0


# ----------------------------------------------------------------------------------------------------------- the metric
class Votes:
    """The metric by its formula, from the oracle's attention weights: query by query and token by token."""

    def __init__(self, padding: list[int], observation: int | None, pool: int, power: int = 2):
        self.padding, self.observation, self.pool, self.power = padding, observation, pool, power
        self.queries: list[list[torch.Tensor]] = []  # of the prompt or turn, weights of each layer [B, Hq, columns]
        self.alive: dict[Any, list[int]] = {}
        self.metric: dict[Any, dict[int, float]] = {}
        self.compared = 0

    def __call__(self, cache: KVCompressCache, out, seen: int) -> None:
        layers = cache.report().layers
        new = out.logits.shape[1]
        for s in range(new):
            columns = seen - new + s + 1
            self.queries.append([out.attentions[layer][:, :, s, :columns] for layer in layers])
        for row in rows_of(cache):
            self.alive.setdefault(row, [])
            if new > 1:
                self.alive[row] += range(max(0, seen - new - self.padding[row[1]]), seen - self.padding[row[1]])
        if new > 1:
            return
        *votes, last = self.queries
        self.queries = []
        for row in rows_of(cache):
            layer, b, h = row
            metric = self.metric.setdefault(row, {})
            for position in self.alive[row]:
                metric.setdefault(position, 0.0)
            group = out.attentions[layer].shape[1] // cache.layers[layer].stored().lengths.shape[1]
            for head in range(h * group, (h + 1) * group) if votes else ():
                raw = [
                    sum(
                        float(query[layers.index(layer)][b, head, position + self.padding[b]]) ** self.power
                        for query in votes[-(self.observation or len(votes)) :]
                        if position + self.padding[b] < query[0].shape[2] and self.padding[b] < query[0].shape[2]
                    )
                    for position in self.alive[row]
                ]
                for i, position in enumerate(self.alive[row]):
                    metric[position] += max(raw[max(0, i - self.pool // 2) : i + self.pool // 2 + 1])
            self.alive[row] = cache.kept_positions(*row).tolist()
            self.metric[row] = {position: metric.get(position, 0.0) for position in self.alive[row]}
            for head in range(h * group, (h + 1) * group):
                for position in self.alive[row]:
                    weight = last[layers.index(layer)][b, head, position + self.padding[b]]
                    self.metric[row][position] += float(weight) ** self.power
            torch.testing.assert_close(
                metric_of(cache, *row), torch.tensor(list(self.metric[row].values())), atol=1e-5, rtol=1e-4
            )
            self.compared += 1


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("llama", {}),
        ("llama", {"observation": None, "pool": 1}),
        ("llama", {"metric": "l1", "observation": 50}),
        ("gpt-oss", {}),
        ("gemma2", {"pool": 1}),
    ],
    ids=str,
)
@pytest.mark.parametrize("steps", [[24, *[1] * 8], [9, 8, 7, *[1] * 9, 5, 6, 1, 1]], ids=["whole", "turns"])
def test_the_metric_is_that_of_the_eager_weights(name, chosen, steps):
    chosen = {"observation": 8, "pool": 3} | chosen
    votes = Votes([4, 0], chosen["observation"], chosen["pool"], 1 if chosen.get("metric") == "l1" else 2)
    check(name, votes.padding, cut(**chosen), steps, first=True, after=votes)
    assert votes.compared > 40


@pytest.mark.parametrize("observation", [8, 60, None], ids=str)
@pytest.mark.parametrize(("chunk", "shorter"), [(5, 43), (8, 47), (17, 31), (35, 13)])
def test_a_prompt_in_chunks_is_judged_like_a_whole_one(model, chunk, shorter, observation):
    batch = left_padded([prompt(n, seed=n)["input_ids"][0] for n in (47, shorter)])
    ids = torch.cat([batch["input_ids"], prompt(20, batch=2)["input_ids"]], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 20, dtype=torch.long)], dim=1)
    chosen = CUT | {"observation": observation, "pool": 3 if observation else 1}
    whole, parts = make(**chosen)(model), make(**chosen)(model)
    chunks = [chunk] * (47 // chunk) + [47 % chunk] * (47 % chunk > 0)
    assert chunks[-1] > 1
    outputs = [run(model, cache, ids, [*first, *[1] * 20], mask) for cache, first in ((whole, [47]), (parts, chunks))]
    real = mask.bool()
    torch.testing.assert_close(outputs[0][real], outputs[1][real], atol=2e-5, rtol=1e-4)
    for row in rows_of(whole):
        assert torch.equal(whole.kept_positions(*row), parts.kept_positions(*row))
        torch.testing.assert_close(metric_of(whole, *row), metric_of(parts, *row), atol=1e-5, rtol=1e-4)


def test_generate_in_chunks_is_generate(model):
    outputs = {}
    for chunk in (None, 9, 16):
        cache = make(**CUT)(model)
        extra = {} if chunk is None else {"prefill_chunk_size": chunk}
        outputs[chunk] = model.generate(**prompt(47), past_key_values=cache, **LONG, **extra).tolist(), kept(cache)
    assert outputs[None] == outputs[9] == outputs[16]


@pytest.mark.parametrize(
    "chosen",
    [{"levels": 2}, *(slow(each) for each in ({}, {"max_cache_tokens": 32}, {"retention": 0.4}, {"continual": False}))],
    ids=str,
)
def test_a_padded_batch_keeps_what_single_runs_keep(model, chosen):
    """Sequences that are over the budget from the start, later, or not at all, through many passes."""
    lengths, steps = (23, 60, 5, 1), 30
    rows = [prompt(n + steps, seed=n)["input_ids"][0] for n in lengths]
    ids = left_padded([row[:n] for row, n in zip(rows, lengths, strict=True)])
    tail = torch.stack([row[n:] for row, n in zip(rows, lengths, strict=True)])
    mask = torch.cat([ids["attention_mask"], torch.ones_like(tail)], dim=1)
    batch = cut(**chosen)(model)
    together = feed(model, batch, torch.cat([ids["input_ids"], tail], dim=1), [60] + [1] * steps, mask)
    singles = [cut(**chosen)(model) for _ in rows]
    alone = [
        feed(model, single, row[None], [n] + [1] * steps) for single, row, n in zip(singles, rows, lengths, strict=True)
    ]
    for step, (logits, *each) in enumerate(zip(together, *alone, strict=True)):
        torch.testing.assert_close(logits[:, -1], torch.stack([own[0, -1] for own in each]), atol=2e-5, rtol=1e-4)
        if step % 5 == 0:
            assert [kept(batch, b) for b in range(len(rows))] == [kept(single) for single in singles]


# ---------------------------------------------------------------------------------------------------- budgets and bytes
@pytest.mark.parametrize(
    ("chosen", "steps"),
    [({}, 90), slow({}, 300), slow({"levels": 1}, 300), slow({"accumulate": False, "sinks": 0}, 300)],
    ids=str,
)
def test_hundreds_of_steps_within_the_budget(model, chosen, steps):
    cache = cut(**chosen)(model)
    batch = left_padded([prompt(n, seed=n)["input_ids"][0] for n in (40, 3)])
    ids = torch.cat([batch["input_ids"], prompt(steps, batch=2)["input_ids"]], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, steps, dtype=torch.long)], dim=1)
    resident = []
    for step, _ in enumerate(feed(model, cache, ids, [40] + [1] * steps, mask)):
        if step:
            assert (blocks_in_use(cache) <= 16 * ROWS // 4).all()
            resident.append(cache.meter.held)
        if step % 10 == 1:
            assert cache.report().resident_bytes == memory_of(cache) <= most_bytes(cache)
        if step % 50 == 1:
            assert_promises(cache)
    assert max(resident[2 * steps // 3 :]) <= max(resident[steps // 3 : 2 * steps // 3]), "no drift"
    assert blocks_in_use(cache).min() > 16 * ROWS // 4 - ROWS, "and the budget is used"


def test_budgets_by_share_grow_with_what_was_seen(model):
    cache = make(retention=0.25)(model)
    for step, _ in enumerate(feed(model, cache, prompt(120)["input_ids"], [40] + [1] * 80)):
        assert_promises(cache, decoding=step > 0)
    report = cache.report()
    assert report.nominal_bytes < 0.36 * report.full_bytes


def test_without_continual_eviction_the_cache_grows_behind_the_prompt(model):
    cache = cut(continual=False)(model)
    ids = prompt(100)["input_ids"]
    run(model, cache, ids, [60])
    cache.compress()
    assert blocks_in_use(cache).tolist() == [16 * ROWS // 4], "the whole budget is the prompt's"
    before = kept(cache)
    run(model, cache, ids, [1] * 40)
    assert kept(cache) == {row: [*positions, *range(60, 100)] for row, positions in before.items()}
    assert cache.report().resident_bytes == memory_of(cache)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_pool_never_holds_the_prompt(model, monkeypatch, batch):
    cache = cut()(model)
    fill, seen = PagedStore.fill, []

    def watched(store, *args):
        fill(store, *args)
        pools = [layer.store for layer in cache.compressed_layers if isinstance(layer.store, PagedStore)]
        seen.append(sum(each.paged_bytes for each in {store, *pools}))

    monkeypatch.setattr(PagedStore, "fill", watched)
    ids = prompt(202, batch=batch)["input_ids"]
    run(model, cache, ids, [200])
    dense = cache.report()
    assert dense.resident_bytes == memory_of(cache) >= dense.full_bytes
    run(model, cache, ids, [1])
    assert len(seen) == 3 and max(seen) <= most_bytes(cache) < dense.full_bytes / 6
    assert cache.report().peak_bytes <= dense.resident_bytes + max(seen)


@pytest.mark.parametrize("chosen", [{}, {"continual": False}, {"retention": 0.5}], ids=str)
def test_pools_are_moved_at_most_once_a_pass(model, monkeypatch, chosen):
    """On a CPU rows are put in order then, to be read in place until the next one; without passes they seldom move."""
    moved, relayout = [], Blocks._relayout
    monkeypatch.setattr(Blocks, "_relayout", lambda blocks, *args: (moved.append(1), relayout(blocks, *args)))
    chosen = {"max_cache_tokens": 200} | chosen if "retention" not in chosen else chosen
    cache = make(**chosen | {"block_size": 2})(model)
    steps = 80
    run(model, cache, prompt(220)["input_ids"], [140] + [1] * steps)
    pools, passes = 2 * 3, steps // 2 + 1
    assert len(moved) <= pools * (passes if cache.policy.config.continual else passes / 3)
    assert cache.compressed_layers[0].paged().rows().starts is not None


@pytest.mark.parametrize("chosen", [{}, {"prefill_chunk": 35}], ids=str)
def test_pools_stay_where_they_are_while_heads_keep_equally_many(model, monkeypatch, chosen):
    """What a pass frees is what the tokens before the next one need."""
    cache = make(max_cache_tokens=40, levels=1, **chosen)(model)
    ids = prompt(220)["input_ids"]
    run(model, cache, ids, [35] * 4 + [1] * 8)
    held, moved = cache.report().resident_bytes, []
    monkeypatch.setattr(Blocks, "_relayout", lambda *given: moved.append(given))
    run(model, cache, ids, [1] * 60)
    assert not moved and cache.report().resident_bytes == held == memory_of(cache)


@pytest.mark.parametrize("modes", ["inggnni", slow("niginng")])
def test_grad_and_inference_modes_may_change(model, modes):
    """What was stored in one mode is evicted, observed and written again in another."""
    contexts = {"i": torch.inference_mode, "n": torch.no_grad, "g": torch.enable_grad}
    ids = prompt(100)["input_ids"]
    for observation in (8, None):
        straight, cache = (make(**CUT | {"observation": observation})(model) for _ in range(2))
        expected = run(model, straight, ids, [30, 10, *[1] * 20])
        actual, start = [], 0
        for number, new in enumerate([30, 10, *[1] * 20]):
            with contexts[modes[number % len(modes)]]():
                out = model(ids[:, start : start + new], past_key_values=cache, use_cache=True).logits
            actual.append(out.detach().clone())
            start += new
        torch.testing.assert_close(torch.cat(actual, dim=1), expected, atol=2e-5, rtol=1e-4)
        assert kept(cache) == kept(straight)
        assert not any(tensor.requires_grad for tensor in live_tensors(cache))


def test_nothing_stays_alive_after_reset(model):
    def total() -> int:
        gc.collect()
        found = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, CarriedKey)]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}.values())

    model.generate(**prompt(40), past_key_values=cut()(model), **LONG)
    before = total()
    cache = cut()(model)
    for tokens in (1, 40):
        model.generate(**prompt(40, batch=2), past_key_values=cache, max_new_tokens=tokens, do_sample=False)
        assert total() - before == cache.report().resident_bytes > 0
        cache.reset()
        assert total() == before


@most_examples(12)
@given(data=st.data())
def test_any_settings_and_any_steps(data):
    draw = data.draw
    chosen = {
        "block_size": draw(st.sampled_from([1, 2, 4, 8])),
        "protected": draw(st.integers(1, 9)),
        "sinks": draw(st.integers(0, 5)),
        "floor": draw(st.sampled_from([0, 0, 3])),
        "observation": draw(st.sampled_from([1, 8, 100, None])),
        "levels": draw(st.sampled_from([None, None, 1, 2])),
        "continual": draw(st.booleans()),
        "accumulate": draw(st.booleans()),
    }
    least = -(-sum(chosen[name] for name in ("protected", "sinks", "floor")) // chosen["block_size"]) + 1
    extra = draw(st.integers(0, 20))
    budget = draw(st.sampled_from([{"max_cache_tokens": least * chosen["block_size"] + extra}, {"retention": 0.3}]))
    padding = draw(st.lists(st.integers(0, 20), min_size=1, max_size=3))
    padding[draw(st.integers(0, len(padding) - 1))] = 0
    later = draw(st.lists(st.sampled_from([1] * 9 + [2, 7, 19]), min_size=3, max_size=40))

    def after(cache, out, seen):
        assert_promises(cache, decoding=out.logits.shape[1] == 1)

    torch.manual_seed(1)
    check("llama", padding, lambda model: KVCompressCache(model, **chosen, **budget), [25, *later], True, after)


# --------------------------------------------------------------------------------------------------- positions and rows
def test_rows_are_ragged_and_positions_true(model):
    cache = cut(max_cache_tokens=32)(model)
    seen: list[int] = []
    handle = model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"][0, -1].item()), with_kwargs=True
    )
    try:
        out = model.generate(**prompt(50), past_key_values=cache, **LONG)
        with torch.no_grad():
            model(torch.tensor([[5]]), past_key_values=cache, use_cache=True)  # without explicit position_ids
    finally:
        handle.remove()
    assert seen == [*range(49, 83), 83] and cache.get_seq_length() == 84
    lengths = cache.report().kept
    assert (lengths[:, 0, 0] != lengths[:, 0, 1]).any() and len(lengths.unique()) > 2
    assert len({tuple(positions) for positions in kept(cache).values()}) == ROWS

    dense = DynamicCache(config=model.config)
    with torch.no_grad():
        model(out[:, :50], past_key_values=dense, use_cache=True)
        for n in range(50, 83):  # the same shapes, hence the same rounding
            model(out[:, n : n + 1], past_key_values=dense, use_cache=True)
    for layer, _, head in rows_of(cache):
        keys, values, positions = cache.layers[layer].store.read(0, head)
        same = positions < (83 if layer == 0 else 50)  # behind the prompt, deeper layers see what evictions changed
        assert same.sum() > 2
        assert torch.equal(keys[same], dense.layers[layer].keys[0, head, positions[same]])
        assert torch.equal(values[same], dense.layers[layer].values[0, head, positions[same]])


def test_chunks(model):
    cache = cut()(model)
    ids = prompt(80)["input_ids"]

    def kinds(head: int = 0) -> list[tuple[int, int, str]]:
        runs = cache.chunks(1, 0, head)
        assert [p for start, stop, _ in runs for p in range(start, stop)] == cache.kept_positions(1, 0, head).tolist()
        return runs

    run(model, cache, ids, [40])
    assert kinds() == [(0, 34, "open"), (34, 40, "recent")], "nothing was decided yet"
    run(model, cache, ids, [1])
    *sealed, recent = kinds()
    assert {kind for _, _, kind in sealed} == {"sealed"} and sealed[0][0] == 0 and len(sealed) > 1
    assert recent == (35, 41, "recent")
    run(model, cache, ids, [20])
    assert kinds()[-2:] == [(41 - 6 + 0, 55, "open"), (55, 61, "recent")] or kinds()[-1] == (55, 61, "recent")
    assert [kind for _, _, kind in kinds() if kind == "open"] == ["open"]


# ----------------------------------------------------------------------------------------------------- cap on the bytes
def tightest(model, batch: int = 1) -> int:
    """Bytes with two blocks that every row keeps and one for new tokens: no cap below that can be held."""
    head = model.config.head_dim
    return batch * ROWS * (3 * (4 * (2 * head * 4 + 8) + 2 * 4) + 4)


@pytest.mark.parametrize("continual", [True, False])
@pytest.mark.parametrize("share", [0, 0.2, 0.5], ids=str)
def test_a_cap_is_held_by_evicting_more(model, share, continual):
    free = make(max_cache_tokens=60, continual=continual)(model)
    batch = left_padded([prompt(n, seed=n)["input_ids"][0] for n in (70, 9)])
    settings = {**batch, "max_new_tokens": 60, "do_sample": False}
    model.generate(**settings, past_key_values=free)
    padding = batch["attention_mask"].numel()  # which columns hold tokens is held too, a byte each
    need, least = free.report().resident_bytes, tightest(model, 2) + padding
    limit = int(least + share * (need - least))
    cache = make(max_cache_tokens=60, continual=continual, max_bytes=limit)(model)
    resident = []

    def note(*_):
        if cache.columns > 70:
            assert cache.meter.lent == 0
            resident.append(cache.meter.held)

    handle = model.register_forward_hook(note)
    try:
        out = model.generate(**settings, past_key_values=cache)
    finally:
        handle.remove()
    assert out.shape[1] == 130 and len(resident) > 50
    assert limit / 2 < max(resident) <= limit
    assert_promises(cache, decoding=False)


def test_a_cap_of_what_the_budget_needs_changes_nothing(model):
    """Though the prompt is far larger, and although pools hold free blocks where nobody asks for their bytes."""
    ids, steps = prompt(200)["input_ids"], [80] + [1] * 40
    free, need = cut()(model), []
    for _ in feed(model, free, ids, steps):
        blocks = -(-free.report().kept[:, 0].numpy() // 4)
        need.append(int(blocks.sum()) * 4 * (2 * 16 * 4 + 8) + 2 * (2 * 4 * blocks.max(1) + 4).sum())
    exact = cut(max_bytes=int(max(need[1:])))(model)
    run(model, exact, ids, steps)
    assert kept(exact) == kept(free)
    assert exact.report().resident_bytes <= max(need[1:])


def test_a_cap_that_cannot_be_held(model):
    limit = tightest(model, 2) - 1
    cache = make(max_cache_tokens=60, max_bytes=limit)(model)
    ids = prompt(60, batch=2)["input_ids"]
    run(model, cache, ids, [40])
    before = state(cache)
    for _ in range(2):
        with pytest.raises(PoolExhausted, match=rf"holds \d+ bytes and needs \d+ more, past max_bytes={limit}"):
            run(model, cache, ids, [1])
        assert state(cache) == before and cache.report().resident_bytes == memory_of(cache)
    with pytest.raises(PoolExhausted):
        cache.compress()
    cache.meter.max_bytes = None
    run(model, cache, ids, [1] * 20)
    assert_promises(cache)
    free = make(max_cache_tokens=60)(model)
    run(model, free, ids, [40] + [1] * 20)
    assert all(kept(cache, b) == kept(free, b) for b in range(2)), "as if nothing had happened"


def test_a_cap_that_cannot_be_held_any_more(model):
    """While decoding: as much as possible was evicted, and the cache goes on once there is more."""
    cache = make(max_cache_tokens=60)(model)
    ids = prompt(200, batch=2)["input_ids"]
    run(model, cache, ids, [40] + [1] * 30)
    cache.meter.max_bytes = tightest(model, 2) - 1
    seen = cache.get_seq_length()
    with pytest.raises(PoolExhausted):
        run(model, cache, ids, [1] * 30)
    assert seen <= cache.get_seq_length() < seen + 30
    seen = cache.get_seq_length()
    with pytest.raises(PoolExhausted):
        run(model, cache, ids, [1])
    assert cache.get_seq_length() == seen and cache.report().seen.tolist() == [seen, seen]
    assert_promises(cache, decoding=False)
    cache.meter.max_bytes = None
    run(model, cache, ids, [1] * 20)
    assert_promises(cache)


def test_a_turn_that_does_not_fit_makes_older_tokens_go(model):
    """Also the next chunk of a prompt: what is there is judged by the queries so far."""
    ids = prompt(120)["input_ids"]
    limit = 2 * tightest(model)
    for steps in ([40, *[1] * 10, 12, 1], [20, 12, 12, 12, 1, 1]):
        cache = make(max_cache_tokens=60, max_bytes=limit)(model)
        for _ in feed(model, cache, ids, steps):
            assert cache.meter.held - cache.meter.lent <= limit
            newest = {*range(cache.columns - 12, cache.columns)} if cache.compression.undecided else set()
            assert all(newest <= set(positions) for positions in kept(cache).values())
            assert_promises(cache, decoding=False)
        with pytest.raises(PoolExhausted):
            run(model, cache, ids, [60])
        assert cache.get_seq_length() == sum(steps)
        assert_promises(cache, decoding=False)
        run(model, cache, ids, [1] * 5)


def test_the_longer_sequence_gives_more_when_the_shorter_one_cannot(model):
    batch = left_padded([prompt(90)["input_ids"][0], prompt(3)["input_ids"][0]])
    cache = make(max_cache_tokens=100, max_bytes=2 * tightest(model))(model)
    model.generate(**batch, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert cache.report().kept[:, 1].unique().tolist() == [6]
    assert cache.meter.held > 1.7 * tightest(model)


def test_without_a_metric_a_cap_raises(model):
    cache = make(retention=1.0, max_bytes=60_000)(model)
    with pytest.raises(PoolExhausted):
        model.generate(**prompt(40), past_key_values=cache, max_new_tokens=300, do_sample=False)
    assert cache.report().kept.unique().tolist() == cache.report().seen.tolist()


# ----------------------------------------------------------------------------------------- turns, cropping and failures
def test_compress_before_a_question(model):
    ids = prompt(90)["input_ids"]
    cache = cut()(model)
    cache.compress()  # there is nothing
    run(model, cache, ids, [60])
    dense = cache.report().resident_bytes
    cache.compress()
    before = kept(cache)
    assert cache.report().resident_bytes < dense / 3
    cache.compress()
    assert kept(cache) == before
    run(model, cache, ids, [10])
    assert kept(cache) == {row: [*positions, *range(60, 70)] for row, positions in before.items()}, "a turn is whole"
    run(model, cache, ids, [1])
    assert_promises(cache)
    late = cut()(model)
    run(model, late, ids, [70, 1])
    assert kept(late) != kept(cache)


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize(
    ("before", "after", "logits_too"),
    [
        ([40, 1], [1, 1], True),
        ([40, 1], [12], True),
        ([40, 1, 1], [5, 6], True),
        ([10, 1], [1, 1, 1], True),
        ([12], [1, 1, 1], True),
        ([40, 1, 5], [8], False),  # the newest queries vote, and those are gone
        ([40], [7], False),
    ],
    ids=str,
)
def test_crop_of_open_tokens_is_exact(model, before, after, logits_too, padding):
    ids = prompt(90)["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, :padding] = 0
    cache = cut(accumulate=False)(model)
    run(model, cache, ids, before, mask)
    reference = copy.deepcopy(cache)
    run(model, cache, ids, after, mask)
    cache.crop(-sum(after))
    assert state(cache) == state(reference)
    assert cache.report().resident_bytes == memory_of(cache)
    logits = [run(model, each, ids, [1] * 25, mask) for each in (cache, reference)]
    if logits_too:
        torch.testing.assert_close(*logits, atol=2e-5, rtol=1e-4)
        assert kept(cache) == kept(reference)
    assert_promises(cache)


@pytest.mark.parametrize("steps", [[40], [40, 1, 12]], ids=str)
def test_crop_of_a_part(model, steps):
    """Of a prompt or turn that waits to be cut: the rest of it is there, and votes with the queries that are left."""
    ids = prompt(90)["input_ids"]
    left = {"observation": 3} if len(steps) == 1 else {}  # queries; a prompt that was cut before is judged by all 8
    cache, reference = cut()(model), cut(**left)(model)
    run(model, cache, ids, steps)
    run(model, reference, ids, [*steps[:-1], steps[-1] - 5])
    cache.crop(-5)
    (*seen, rows), (*wanted, others) = state(cache), state(reference)
    assert seen == wanted
    for (*place, row), (*other, same) in zip(rows, others, strict=True):
        assert place == other
        for part, expected in zip(row, same, strict=True):  # some processors round longer products otherwise
            torch.testing.assert_close(torch.tensor(part), torch.tensor(expected))
    if left:
        for each in (cache, reference):
            each.compress()
        for row in rows_of(cache):
            torch.testing.assert_close(metric_of(cache, *row), metric_of(reference, *row), atol=1e-5, rtol=1e-4)
    run(model, cache, ids, [1] * 20)
    assert_promises(cache)
    cache.reset()
    assert cache.report().resident_bytes == 0


def test_crop_past_an_eviction_changes_nothing(model):
    cache = cut()(model)
    run(model, cache, prompt(50, batch=2)["input_ids"], [40, 1, 1])
    before = state(cache)
    with pytest.raises(ValueError, match=r"crop\(-3\) .* behind the last eviction, 2 tokens ago in sequence 0"):
        cache.crop(-3)
    assert state(cache) == before
    cache.crop(-2)
    assert cache.get_seq_length() == 40 and cache.report().seen.tolist() == [40, 40]


def test_drafts_that_are_refused_leave_no_trace(model):
    ids = prompt(120)["input_ids"]
    plain, drafted = cut()(model), cut()(model)
    drafted.activate_past_recording()
    run(model, plain, ids, [20])
    run(model, drafted, ids, [20])
    with torch.no_grad():
        for n in range(20, 60):
            expected = model(ids[:, n : n + 1], past_key_values=plain, use_cache=True).logits[0, -1]
            wrong = torch.cat([ids[:, n : n + 1], torch.full((1, 3), 7)], dim=1)
            actual = model(wrong, past_key_values=drafted, use_cache=True).logits[0, 0]
            drafted.crop(-3)
            assert_promises(drafted)
            if n == 20:  # later ones are evicted by different votes: drafts have none
                torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)
    assert drafted.get_seq_length() == plain.get_seq_length()


@pytest.mark.parametrize("how", ["assistant", "prompt-lookup"])
def test_assisted_decoding_within_the_budget(model, how):
    extra = {"assistant_model": build("llama", seed=1)} if how == "assistant" else {"prompt_lookup_num_tokens": 4}
    cache = cut()(model)
    out = model.generate(**prompt(40), past_key_values=cache, **LONG, **extra)
    assert out.shape[1] == 74
    assert_promises(cache)


@pytest.mark.parametrize("where", ["decode", "pass", "turn"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_step_that_fails_late_is_taken_back(name, where):
    model = build(name)
    ids = prompt(90)["input_ids"]
    cache = cut(accumulate=False)(model)
    run(model, cache, ids, [40] + [1] * (12 if where == "pass" else 10))
    assert (cache.compression.steps_to_compression() < 1) == (where == "pass")
    reference = copy.deepcopy(cache)
    new = [9] if where == "turn" else [1]
    late = model.model.layers[-1].self_attn.k_proj

    def interrupt(*_):
        raise KeyboardInterrupt

    def poison(module, args, out):
        return out + float("nan")

    for error, register, hook in (
        (KeyboardInterrupt, late.register_forward_pre_hook, interrupt),
        (ValueError, late.register_forward_hook, poison),
    ):
        before, handle = kept(cache), register(hook)
        with pytest.raises(error):
            run(model, cache, ids, new)
        handle.remove()
        assert cache.get_seq_length() == reference.get_seq_length()
        if where != "pass":  # a pass that came first stands
            assert kept(cache) == before
        assert cache.report().resident_bytes == memory_of(cache)
    logits = [run(model, each, ids, [*new, *[1] * 20]) for each in (cache, reference)]
    torch.testing.assert_close(*logits, atol=1e-6, rtol=1e-5)
    assert kept(cache) == kept(reference)


def test_a_first_step_that_fails_leaves_nothing(model):
    cache = cut()(model)
    handle = model.model.layers[-1].self_attn.k_proj.register_forward_hook(lambda m, a, out: out * float("nan"))
    with pytest.raises(ValueError, match="NaN or infinite"):
        run(model, cache, prompt(40)["input_ids"], [40])
    handle.remove()
    assert cache.report().resident_bytes == memory_of(cache) == 0 and cache.get_seq_length() == 0
    again = model.generate(**prompt(40), past_key_values=cache, **LONG)
    assert again.tolist() == model.generate(**prompt(40), past_key_values=cut()(model), **LONG).tolist()


def test_votes_that_are_nan_do_not_break_eviction(model):
    """NaN queries in the last layer reach no key; what they voted counts as nothing."""
    cache = cut()(model)
    ids = prompt(90)["input_ids"]
    handle = model.model.layers[-1].self_attn.q_proj.register_forward_hook(lambda m, a, out: out * float("nan"))
    run(model, cache, ids, [40, 1, 1])
    handle.remove()
    assert_promises(cache)
    assert metric_of(cache, 2, 0, 0).isnan().any()
    logits = run(model, cache, ids, [1] * 30)
    assert logits.isfinite().all()
    assert_promises(cache)


def test_latent_attention_is_refused():
    model = build("deepseek-v3")
    cache = cut()(model)
    with pytest.raises(ValueError, match=r"one latent row for all its heads .*; use KaraCache for this model"):
        model.generate(**prompt(), past_key_values=cache, **LONG)
    assert cache.get_seq_length() == 0 and cache.report().resident_bytes == memory_of(cache) == 0


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({}, "give exactly one of them"),
        ({"max_cache_tokens": 64, "retention": 0.5}, "max_cache_tokens=64 and retention=0.5 .* give exactly one"),
        ({"max_cache_tokens": 63}, "max_cache_tokens=63 .*from 64 on"),
        ({"retention": 0}, r"retention=0 .*\(0, 1\]"),
        ({"retention": 0.5, "max_bytes": 10}, "max_bytes=10 .*at least one block"),
    ],
    ids=str,
)
def test_settings_that_are_not_possible(chosen, message):
    model = build("llama")
    with pytest.raises(ValueError, match=message):
        KVCompressCache(model, **chosen)
    assert model.config._attn_implementation == "sdpa"


def test_detached_the_model_is_its_own():
    model = build("llama")
    expected = model.generate(**prompt(), **LONG)
    model.generate(**prompt(), past_key_values=cut()(model), **LONG)
    detach(model)
    assert model.generate(**prompt(), **LONG).tolist() == expected.tolist()


# ---------------------------------------------------------------------------------------------------------------- forks
def test_forks_are_evicted_like_sequences_that_were_never_forked(model):
    """Sequences are exchanged at every phase of a pass; then each has what a run of its own history has."""
    cache = cut()(model)
    shared = prompt(30)["input_ids"]
    history = shared.repeat(3, 1)
    run(model, cache, history, [30])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for step in range(27):
            new = torch.randint(3, 100, (3, 1), generator=generator)
            model(new, past_key_values=cache, use_cache=True)
            history = torch.cat([history, new], dim=1)
            if step % 3 != 1:
                order = torch.randint(0, 3, (3,), generator=generator)
                cache.reorder_cache(order)
                history = history[order]
            assert_promises(cache)
    for b in range(3):
        alone = cut()(model)
        run(model, alone, history[b : b + 1], [30] + [1] * 27)
        assert kept(alone) == kept(cache, b)
        for layer, _, h in rows_of(alone):
            torch.testing.assert_close(
                metric_of(cache, layer, b, h), metric_of(alone, layer, 0, h), atol=1e-5, rtol=1e-4
            )


def test_beams_are_evicted_like_sequences_decoded_one_by_one(model):
    cache = cut()(model)
    out = model.generate(
        **prompt(24), past_key_values=cache, num_beams=3, num_return_sequences=3, return_dict_in_generate=True, **LONG
    )
    for b in range(3):
        alone = cut()(model)
        run(model, alone, out.sequences[b : b + 1, :-1], [24] + [1] * 33)
        assert kept(alone) in [kept(cache, row) for row in range(3)]


def test_a_prompt_is_forked_before_it_is_cut(model):
    ids = prompt(60, batch=2)["input_ids"]
    cache, straight = cut()(model), cut()(model)
    run(model, cache, ids, [40])
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    assert cache.report().resident_bytes == memory_of(cache)
    run(model, straight, ids[1:], [40] + [1] * 20)
    run(model, cache, ids[[1, 1]], [1] * 20)
    assert kept(cache, 0) == kept(cache, 1) == kept(straight)


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.batch_repeat_interleave(8),
        lambda cache: cache.reorder_cache(torch.tensor([0, 1] * 8)),
        lambda cache: cache.batch_select_indices(torch.tensor([1, 0] * 8)),
    ],
    ids=["repeat", "reorder", "select"],
)
def test_rearranging_past_the_cap_changes_nothing(model, change):
    cache = cut()(model)
    run(model, cache, prompt(60, batch=2)["input_ids"], [40] + [1] * 10)
    cache.meter.max_bytes = cache.meter.held + 1000
    before = state(cache)
    with pytest.raises(PoolExhausted, match="raise max_bytes"):
        change(cache)
    assert state(cache) == before and cache.batch_size == 2


@pytest.mark.parametrize("observation", [6, None])
def test_the_mean_of_votes_is_their_sum_by_who_could_vote(observation):
    """At the first pass that ranks, of a padded batch whose prompt voted and whose answer did; then it goes on."""
    model, ids = build("llama"), torch.randint(3, 100, (2, 80))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    settings = {"max_cache_tokens": 40, "protected": 6, "block_size": 4, "observation": observation, "pool": 1}
    told = {}
    for votes in ("sum", "mean"):
        cache = KVCompressCache(model, votes=votes, **settings)
        cache.policy.watch = lambda *seen, votes=votes: told.setdefault(votes, []).append(seen)
        list(feed(model, cache, ids, [24] + [1] * 30, mask))
        assert told[votes]
        list(feed(model, cache, ids, [6] + [1] * 10, mask))
        assert_promises(cache)
    (_, total, positions, lengths), (_, mean, again, _) = told["sum"][0], told["mean"][0]
    assert torch.equal(positions, again)
    tokens = lengths.max(1).values
    for b, pad in enumerate((7, 0)):
        prompt, seen = 24 - pad, int(tokens[b])
        voters = [*range(0 if observation is None else prompt - observation, seen)]
        place = positions[b, 0, :seen]
        count = torch.tensor([sum(query >= p for query in voters) for p in place.tolist()])
        torch.testing.assert_close(mean[b, 0, :seen] * count, total[b, 0, :seen])


@pytest.mark.parametrize("limit", [slow({"max_cache_tokens": 40}), {"retention": 0.4, "min_cache_tokens": 0}], ids=str)
def test_a_share_protected_is_exact_and_as_alone(limit):
    made = {"block_size": 4, **limit}  # else as it comes: votes are means, and heads hold as much
    assert check("llama", [3, 0], lambda model: KVCompressCache(model, **made), [24] + [1] * 20, first=True) > 0
    model, ids, mask = build("llama"), torch.randint(3, 100, (2, 80)), torch.ones(2, 80, dtype=torch.long)
    mask[0, :13] = 0
    together = KVCompressCache(model, **made)
    list(feed(model, together, ids, [40] + [1] * 40, mask))
    for b, pad in enumerate((13, 0)):
        alone = KVCompressCache(model, **made)
        list(feed(model, alone, ids[b : b + 1, pad:], [40 - pad] + [1] * 40))
        assert kept(together, b) == kept(alone)
        newest = together.policy.newest(80 - pad)
        assert newest == 18 or "retention" in limit and newest > 10
