"""`PoDCache` end to end: exact where nothing is shared, a forward with shared keys everywhere else, and its bytes."""

import copy
import dataclasses
import importlib
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.architectures import build
from support.batches import left_padded, prompt
from support.caches import live_tensors, state
from support.marks import most_examples
from support.sharing import HEADS, LAYERS, LEAD, LONG, SHARED, close, deep
from transformers import DynamicCache

from kara_hf import PoDCache, PoDSharing, PoolExhausted
from kara_hf.kernels import Proximal, shared_attention, shared_attention_reference
from kara_hf.pod.forward import SharedForward


@pytest.fixture(scope="module")
def model():
    return deep()


VARIANTS = pytest.mark.parametrize(
    "sharing",
    [
        SHARED,
        dataclasses.replace(SHARED, distant_query="own"),
        dataclasses.replace(SHARED, sinks=0, recent=1),
        dataclasses.replace(SHARED, skip=0.6),
        dataclasses.replace(SHARED, lead=((0, 0),) * LAYERS, sinks=1, recent=9),
    ],
    ids=["lead", "own", "one-proximal", "skip", "one-group"],
)


def pod(sharing: PoDSharing) -> PoDSharing:
    return dataclasses.replace(sharing, prefill="pod")


@torch.no_grad()
def whole(model, sharing: PoDSharing, **inputs) -> torch.Tensor:
    """Logits of one forward in which keys are shared, without a cache."""
    with SharedForward(model, sharing):
        return model(**inputs, use_cache=False).logits


@torch.no_grad()
def in_steps(model, cache, ids: torch.Tensor, steps: list[int]) -> torch.Tensor:
    """Logits of a sequence that comes in so many tokens at a time."""
    parts = [model(input_ids=part, past_key_values=cache).logits for part in ids.split(steps, 1)]
    return torch.cat(parts, 1)


# --------------------------------------------------------------------------------- equal to the base model
@pytest.mark.parametrize("prefill", ["dense", "pod"])
@pytest.mark.parametrize(
    "sharing",
    [PoDSharing.none(LAYERS, HEADS, sinks=1, recent=3), dataclasses.replace(SHARED, recent=200)],
    ids=["all-lead", "all-proximal"],
)
def test_equals_the_base_model(model, sharing, prefill):
    sharing = dataclasses.replace(sharing, prefill=prefill)
    rows = [prompt(n, seed=n)["input_ids"][0] for n in (31, 9, 50)]
    for inputs in (prompt(30), left_padded(rows)):
        expected = model.generate(**inputs, **LONG, output_logits=True, return_dict_in_generate=True)
        got = model.generate(
            **inputs, past_key_values=PoDCache(model, sharing), **LONG, output_logits=True, return_dict_in_generate=True
        )
        assert torch.equal(got.sequences, expected.sequences)
        close(torch.stack(got.logits), torch.stack(expected.logits))


# ------------------------------------------------------------------- equal to the forward with shared keys
@VARIANTS
@pytest.mark.parametrize("steps", [[60], [40, *[1] * 20], [1] * 60, [13, 1, 1, 7, 20, 1, 17], [2, 58]], ids=str)
def test_cached_equals_one_forward(model, sharing, steps):
    ids = prompt(60, batch=2)["input_ids"]
    expected = whole(model, sharing, input_ids=ids)
    close(in_steps(model, PoDCache(model, pod(sharing)), ids, steps), expected)


@VARIANTS
def test_sharing_changes_something(model, sharing):
    ids = prompt(60, batch=2)["input_ids"]
    with torch.no_grad():
        assert (whole(model, sharing, input_ids=ids) - model(ids, use_cache=False).logits).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gemma3_text", "gpt_oss"])
def test_other_attentions(name):
    """Norms on keys, capped scores, layers that slide in between, and sinks in the softmax."""
    changes = {}
    kinds = ["full_attention"] * LAYERS
    if name == "gemma3_text":
        kinds = ["full_attention", "sliding_attention", "full_attention"] * 2
        changes = {"layer_types": kinds, "sliding_window": 8}
    if name in ("gemma2", "gpt_oss"):
        changes = {"layer_types": kinds, "sliding_window": 8}
    if name == "gpt_oss":
        changes |= {"num_local_experts": 2, "num_experts_per_tok": 1}
    if name == "gemma2":
        changes |= {"attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16, "attn_implementation": "eager"}
    model = deep(name, **changes)
    full = [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
    lead = tuple((full[0] if layer in full else layer,) * HEADS for layer in range(LAYERS))
    sharing = PoDSharing(lead=lead, sinks=2, recent=5, prefill="pod")
    ids = prompt(40)["input_ids"]
    expected = whole(model, sharing, input_ids=ids)
    for steps in ([40], [20, *[1] * 20], [9, 31]):
        close(in_steps(model, PoDCache(model, sharing), ids, steps), expected)


@pytest.mark.parametrize("distant_query", ["lead", "own"])
@pytest.mark.parametrize("prefill", ["dense", "pod"])
def test_generate_equals_greedy(model, prefill, distant_query):
    """Against a forward over everything for each token; with a dense prefill only behind a prompt of one token."""
    sharing = dataclasses.replace(SHARED, prefill=prefill, distant_query=distant_query)
    ids = prompt(25 if prefill == "pod" else 1)["input_ids"]
    expected = ids
    for _ in range(30):
        expected = torch.cat([expected, whole(model, sharing, input_ids=expected)[:, -1:].argmax(-1)], 1)
    got = model.generate(ids, past_key_values=PoDCache(model, sharing), max_new_tokens=30, do_sample=False)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("prefill", ["dense", "pod"])
@pytest.mark.parametrize("distant_query", ["lead", "own"])
def test_left_padded_sequences_equal_single_runs(model, prefill, distant_query):
    sharing = dataclasses.replace(SHARED, prefill=prefill, distant_query=distant_query)
    rows = [prompt(n, seed=n)["input_ids"][0] for n in (33, 7, 1)]
    settings = {**LONG, "output_logits": True, "return_dict_in_generate": True}
    cache = PoDCache(model, sharing)
    together = model.generate(**left_padded(rows), past_key_values=cache, **settings)
    for b, row in enumerate(rows):
        single = PoDCache(model, sharing)
        alone = model.generate(row[None], past_key_values=single, **settings)
        close(torch.stack(together.logits)[:, b], torch.stack(alone.logits)[:, 0])
        for layer, head in itertools.product(range(LAYERS), range(HEADS)):
            assert torch.equal(cache.kept_positions(layer, b, head), single.kept_positions(layer, 0, head))


def test_turns_of_a_padded_batch(model):
    """A later turn of several tokens, with padding, is one causal sequence with what came before."""
    rows = [prompt(n, seed=n)["input_ids"][0] for n in (20, 12)]
    turns = [prompt(n, seed=n + 50)["input_ids"][0] for n in (15, 6)]
    first, second = left_padded(rows), left_padded(turns)
    cache = PoDCache(model, pod(SHARED))
    with torch.no_grad():
        places = (first["attention_mask"].cumsum(1) - 1).clamp(min=0)
        model(**first, position_ids=places, past_key_values=cache)
        mask = torch.cat([first["attention_mask"], second["attention_mask"]], 1)
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, first["input_ids"].shape[1] :]
        got = model(
            input_ids=second["input_ids"], attention_mask=mask, position_ids=places, past_key_values=cache
        ).logits
    for b, (row, turn) in enumerate(zip(rows, turns, strict=True)):
        expected = whole(model, SHARED, input_ids=torch.cat([row, turn])[None])
        close(got[b, -len(turn) :], expected[0, -len(turn) :])


# --------------------------------------------------------------------------------- one softmax
@st.composite
def attention_cases(draw):
    heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    followers = sorted(draw(st.sets(st.integers(0, heads - 1), min_size=1)))
    tokens = draw(st.integers(1, 12))
    new = draw(st.integers(1, tokens))
    return {
        "heads": heads,
        "group": group,
        "followers": followers,
        "tokens": tokens,
        "new": new,
        "proximal": Proximal(draw(st.integers(0, 4)), draw(st.integers(1, 6))),
        "softcap": draw(st.sampled_from([None, 2.0])),
        "sink_logits": draw(st.booleans()),
        "skip": draw(st.sampled_from([None, 0.4])),
        "padding": draw(st.integers(0, tokens - 1)),
        "seed": draw(st.integers(0, 99)),
    }


def given_attention(case):
    """Tensors and settings of both functions."""
    heads, group, tokens, new = case["heads"], case["group"], case["tokens"], case["new"]
    make = torch.Generator().manual_seed(case["seed"])

    def draw(*shape):
        return torch.randn(*shape, generator=make, requires_grad=True)

    positions = torch.arange(tokens, dtype=torch.int32).expand(2, -1).clone()
    positions[1] = (positions[1] - case["padding"]).clamp(min=-1)
    given = (
        draw(2, heads * group, new, 8),
        draw(2, heads, tokens, 8),
        draw(2, heads, tokens, 6),
        draw(2, len(case["followers"]) * group, new, 8),
        draw(2, len(case["followers"]), tokens, 8),
    )
    settings = {
        "followers": case["followers"],
        "query_positions": positions[:, -new:],
        "key_positions": positions[:, None],
        "proximal": case["proximal"],
        "scaling": 0.6,
        "softcap": case["softcap"],
        "sink_logits": draw(heads * group) if case["sink_logits"] else None,
        "skip": case["skip"],
    }
    return given, settings


@given(attention_cases())
def test_the_gate_is_one_softmax(case):
    given, settings = given_attention(case)
    close(shared_attention(*given, **settings), shared_attention_reference(*given, **settings), 1e-5)


@given(attention_cases())
def test_its_gradient_is_that_of_the_gate(case):
    given, settings = given_attention(case)
    wanted = [part for part in (*given, settings["sink_logits"]) if part is not None]
    found = []
    for op in (shared_attention, shared_attention_reference):
        out = op(*given, **settings)
        seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        gradients = torch.autograd.grad((out * seed).sum(), wanted, allow_unused=True)
        found.append([torch.zeros_like(p) if g is None else g for g, p in zip(gradients, wanted, strict=True)])
    for got, expected in zip(*found, strict=True):
        close(got, expected, 1e-5)


def test_many_queries_are_taken_in_chunks(monkeypatch, model):
    ids = prompt(60)["input_ids"]
    expected = whole(model, SHARED, input_ids=ids)
    module = importlib.import_module("kara_hf.kernels.shared_attention")
    monkeypatch.setattr(module, "QUERY_CHUNK", 7)
    monkeypatch.setattr(module, "KEPT_LOGITS", 7)
    close(whole(model, SHARED, input_ids=ids), expected, 1e-5)
    with SharedForward(model, SHARED):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        chunked = [p.grad.clone() for p in model.parameters()]
        monkeypatch.undo()
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for a, parameter in zip(chunked, model.parameters(), strict=True):
        close(a, parameter.grad, 1e-5)
    model.zero_grad()


# --------------------------------------------------------------------------------- bytes
@VARIANTS
@pytest.mark.parametrize("tokens", [4, 30, 100])
def test_stored_bytes_are_the_formula(model, sharing, tokens):
    batch, size, itemsize = 3, 16, 4
    cache = PoDCache(model, sharing)
    model.generate(**prompt(tokens, batch=batch), past_key_values=cache, **LONG)
    report = cache.report()
    seen = int(report.seen[0])
    followers = sum(lead != layer for layer, heads in enumerate(sharing.lead) for lead in heads)
    rows = LAYERS * HEADS
    keys = (rows - followers) * seen + followers * min(seen, sharing.proximal)
    assert report.nominal_bytes == batch * itemsize * size * (rows * seen + keys)
    assert report.full_bytes == 2 * batch * itemsize * size * rows * seen
    assert report.nominal_bytes == pytest.approx(report.full_bytes * (1 - sharing.saving(seen)))
    memory = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in live_tensors(cache)}
    assert report.resident_bytes == sum(memory.values())


def test_resident_bytes_fall(model):
    """What is held beyond the formula is the room in last blocks and the tables: a few per cent of a long sequence."""
    sharing = dataclasses.replace(SHARED, lead=((0, 0),) * LAYERS)
    reports = []
    for each in (PoDSharing.none(LAYERS, HEADS), sharing):
        cache = PoDCache(model, each)
        model.generate(**prompt(400), past_key_values=cache, max_new_tokens=20, do_sample=False)
        reports.append(cache.report())
    full, shared = reports
    overhead = full.resident_bytes - full.nominal_bytes
    assert shared.resident_bytes - shared.nominal_bytes <= overhead + full.full_bytes // 50
    assert shared.resident_bytes <= full.resident_bytes * (1 - 0.95 * sharing.saving(419))


def test_which_keys_are_stored_step_by_step():
    """The example of the paper's figure 2: one first token, the two newest, three layers in a block."""
    model = build("llama")
    sharing = PoDSharing(lead=((0, 0),) * 3, sinks=1, recent=2, prefill="pod")
    cache = PoDCache(model, sharing)
    ids = prompt(6)["input_ids"]
    in_steps(model, cache, ids[:, :5], [5])
    for expected in ([0, 3, 4], [0, 4, 5]):
        for layer in range(3):
            near = cache.layers[layer].store.proximal
            held = int(cache.report().seen[0])
            if layer == 0:
                assert near is None and cache.layers[0].store.read(0, 0)[0].shape[0] == held
                continue
            assert near.held == 2 * len(expected)
            assert near.rows.places(torch.tensor(expected)).sort().values.tolist() == [0, 1, 2]
            values = cache.layers[layer].store.read(0, 0)[1]
            assert len(values) == held
        if held == 5:
            in_steps(model, cache, ids[:, 5:], [1])


# --------------------------------------------------------------------------------- what else caches meet
def test_beams_and_copies(model):
    inputs = prompt(30, batch=2)
    expected = model.generate(**inputs, past_key_values=PoDCache(model, SHARED), num_beams=3, **LONG)
    again = model.generate(**inputs, past_key_values=PoDCache(model, SHARED), num_beams=3, **LONG)
    assert torch.equal(expected, again)
    cache = PoDCache(model, SHARED)
    ids = prompt(50)["input_ids"]
    in_steps(model, cache, ids[:, :30], [30])
    twin = copy.deepcopy(cache)
    a, b = (in_steps(model, each, ids[:, 30:], [1] * 20) for each in (cache, twin))
    close(a, b, 1e-6)


def test_rearranged_sequences_go_on_as_they_were(model):
    ids = prompt(50, batch=3)["input_ids"]
    cache = PoDCache(model, SHARED)
    in_steps(model, cache, ids[:, :30], [20, *[1] * 10])
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    got = in_steps(model, cache, ids[[2, 0, 0], 30:], [1] * 20)
    alone = PoDCache(model, SHARED)
    in_steps(model, alone, ids[:, :30], [20, *[1] * 10])
    close(got, in_steps(model, alone, ids[:, 30:], [1] * 20)[[2, 0, 0]])


def test_assisted_decoding(model):
    """Drafts that are refused are cropped, and the keys they pushed out are still there."""
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8] * 8])}
    plain = model.generate(**inputs, past_key_values=PoDCache(model, SHARED), **LONG)
    drafted = model.generate(**inputs, past_key_values=PoDCache(model, SHARED), prompt_lookup_num_tokens=6, **LONG)
    assert torch.equal(drafted, plain)


def test_crop(model):
    ids = prompt(60)["input_ids"]
    cache = PoDCache(model, pod(SHARED))
    in_steps(model, cache, ids[:, :30], [30])
    before = state(cache)
    with pytest.raises(ValueError, match=r"crop\(-5\) .*layer 1.*Crop fewer tokens"):
        cache.crop(-5)
    assert state(cache) == before
    cache.crop(-1)  # the newest key took the place of one that is proximal to no later query
    got = in_steps(model, cache, ids[:, 29:], [1] * 31)
    close(got, whole(model, SHARED, input_ids=ids)[:, 29:])
    short = PoDCache(model, pod(dataclasses.replace(SHARED, recent=40)))
    in_steps(model, short, ids[:, :30], [30])
    short.crop(-20)
    close(
        in_steps(model, short, ids[:, 10:], [5, *[1] * 45]),
        whole(model, dataclasses.replace(SHARED, recent=40), input_ids=ids)[:, 10:],
    )


@pytest.mark.parametrize("tokens", [1, 4, 17])
def test_a_failed_step_is_taken_back(model, tokens, monkeypatch):
    ids = prompt(60)["input_ids"]
    expected = whole(model, SHARED, input_ids=ids)
    cache = PoDCache(model, pod(SHARED))
    in_steps(model, cache, ids[:, :30], [20, *[1] * 10])
    last = model.model.layers[-1].self_attn
    held = cache.report().resident_bytes

    def fail(*_, **__):
        raise RuntimeError("out of power")

    with monkeypatch.context() as patch:
        patch.setattr(last, "forward", fail)
        with pytest.raises(RuntimeError, match="out of power"):
            in_steps(model, cache, ids[:, 30 : 30 + tokens], [tokens])
    close(in_steps(model, cache, ids[:, 30:], [tokens, *[1] * (30 - tokens)]), expected[:, 30:])
    assert cache.report().resident_bytes >= held


def test_a_cap_is_kept(model):
    free = PoDCache(model, SHARED)
    model.generate(**prompt(100), past_key_values=free, max_new_tokens=3, do_sample=False)
    cap = free.report().resident_bytes
    cache = PoDCache(model, SHARED, max_bytes=cap)
    ids = prompt(160)["input_ids"]
    in_steps(model, cache, ids[:, :100], [100])
    with pytest.raises(PoolExhausted, match="max_bytes"):
        in_steps(model, cache, ids[:, 100:], [1] * 60)
    assert cache.report().resident_bytes <= cap
    full = PoDCache(model, PoDSharing.none(LAYERS, HEADS), max_bytes=cap)
    with pytest.raises(PoolExhausted):
        in_steps(model, full, ids[:, :100], [100])


@most_examples(25)
@given(st.data())
def test_any_sequence_of_steps(model, data):
    """Steps of any size, crops, copies of sequences: always the forward over the tokens that are there."""
    recent, sinks = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 3))
    sharing = dataclasses.replace(
        SHARED, recent=recent, sinks=sinks, distant_query=data.draw(st.sampled_from(["lead", "own"]))
    )
    cache = PoDCache(model, pod(sharing), block_size=data.draw(st.sampled_from([2, 16])))
    make = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    ids = torch.zeros(2, 0, dtype=torch.long)
    for _ in range(data.draw(st.integers(1, 6))):
        new = torch.randint(3, 100, (len(ids), data.draw(st.integers(1, 14))), generator=make)
        ids = torch.cat([ids, new], 1)
        got = in_steps(model, cache, new, [new.shape[1]])
        close(got, whole(model, sharing, input_ids=ids)[:, -new.shape[1] :])
        if data.draw(st.booleans()):
            index = data.draw(st.lists(st.integers(0, len(ids) - 1), min_size=1, max_size=3))
            cache.batch_select_indices(torch.tensor(index))
            ids = ids[index]
        count = data.draw(st.integers(0, 4))
        if 0 < count < ids.shape[1]:
            try:
                cache.crop(-count)
            except ValueError:
                continue
            ids = ids[:, :-count]


# --------------------------------------------------------------------------------- bad input
def test_bad_sharings():
    with pytest.raises(ValueError, match=r"lead\[1\]\[0\]=2"):
        PoDSharing(lead=((0,), (2,)))
    with pytest.raises(ValueError, match=r"lead\[2\]\[0\]=1 .*leads itself"):
        PoDSharing(lead=((0,), (0,), (1,)))
    with pytest.raises(ValueError, match=r"lead\[3\]\[0\]=0 .*layer 1.*between"):
        PoDSharing(lead=((0,), (1,), (1,), (0,)))
    with pytest.raises(ValueError, match="recent=0 .*from 1 on"):
        PoDSharing.none(2, 1, recent=0)
    with pytest.raises(ValueError, match=r"skip=1.5 .*\(0, 1\]"):
        PoDSharing.none(2, 1, skip=1.5)
    with pytest.raises(ValueError, match="distant_query='mine'"):
        PoDSharing.none(2, 1, distant_query="mine")


def test_a_sharing_of_another_model(model):
    with pytest.raises(ValueError, match="another model than llama .*leads of 4 layers.*pod explore"):
        PoDCache(model, PoDSharing.none(4, HEADS))
    named = dataclasses.replace(SHARED, model={"model_type": "qwen3"})
    with pytest.raises(ValueError, match="model_type qwen3 instead of llama"):
        PoDCache(model, named)


def test_only_layers_of_one_kind_share():
    model = build("gemma3")
    layers = model.config.num_hidden_layers
    with pytest.raises(ValueError, match=r"lead\[1\]\[0\]=0 .*sliding_attention"):
        PoDCache(model, PoDSharing(lead=((0, 0),) * layers))


def test_a_window_that_saves_nothing_is_told(model):
    with pytest.warns(UserWarning, match="nothing is saved: sinks . recent = 4096 .*512"):
        PoDCache(model, PoDSharing(lead=LEAD))


def test_saved_and_loaded(tmp_path):
    sharing = dataclasses.replace(SHARED, skip=0.7, prefill="pod", origin={"threshold": 0.5})
    sharing.save_pretrained(tmp_path)
    assert PoDSharing.from_pretrained(tmp_path) == sharing
    assert PoDSharing.from_pretrained(tmp_path / "pod_sharing.json") == sharing
    with pytest.raises(FileNotFoundError, match="pod explore"):
        PoDSharing.from_pretrained(tmp_path.parent)
    file = tmp_path / "pod_sharing.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match="format 2"):
        PoDSharing.from_pretrained(tmp_path)


def test_saving_and_shares():
    assert SHARED.followers_share == pytest.approx(7 / 12 + 0 / 12, abs=0.2)
    followers = sum(lead != layer for layer, heads in enumerate(LEAD) for lead in heads)
    assert SHARED.followers_share == followers / 12
    assert SHARED.saving(7) == 0 and SHARED.saving(5) == 0
    assert SHARED.saving(14) == pytest.approx(0.5 * followers / 12 * 0.5)
    assert SHARED.leading(0) == (0,) and SHARED.leading(1) == (1,) and SHARED.followers(3) == (1,)
    assert SHARED.last_follower(0) == 2 and SHARED.last_follower(2) == 2
    numbers = np.array([SHARED.saving(n) for n in range(1, 500)])
    assert (np.diff(numbers) >= 0).all() and numbers.max() < 0.5


def test_the_first_cache_of_a_model_does_not_change_it(model):
    ids = prompt(20)["input_ids"]
    with torch.no_grad():
        before = model(ids, past_key_values=DynamicCache(config=model.config)).logits
        PoDCache(model, SHARED)
        after = model(ids, past_key_values=DynamicCache(config=model.config)).logits
    assert torch.equal(before, after)
