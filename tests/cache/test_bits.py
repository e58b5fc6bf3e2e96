"""Tokens that have settled are stored in few bits: attention is over what their records stand for, and all else is as
in a cache that stores them whole.
"""

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import test_decode
import test_pod_selection
import torch
from support.architectures import ARCHITECTURES, _small, build
from support.batches import left_padded, prompt
from support.caches import memory_of, state
from support.interpreter import run
from support.marks import few
from support.oracle import EVICTED, evicted_of
from support.sharing import SHARED, deep
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from kara_hf import KaraCache, KaraConfig, KVCompressCache, KVCompressConfig, PoDCache, PoolExhausted
from kara_hf.cache import budget_compression, compressed, rounding, steps
from kara_hf.serving.config import ServingConfig

KARA = {"window": 16, "recent": 8, "sinks": 2, "block_size": 4, "score": "random"}
KV = {"protected": 8, "sinks": 2, "block_size": 4, "observation": 8}
LONG = {"max_new_tokens": 40, "do_sample": False}
LATENT = {"deepseek-v2", "deepseek-v3"}
PROMPT = 90  # long enough for a first frame


def kara(**settings):
    return lambda model, **more: KaraCache(model, **KARA | {"bits": 4} | settings | more)


def kv(**settings):
    return lambda model, **more: KVCompressCache(model, **KV | {"bits": 4} | settings | more)


CACHES = {
    "kara-all": kara(retention=1.0),
    "kara-prompt": kara(retention=0.5),
    "kara-windows": kara(retention=0.5, compress_prompt=True),
    "kara-share": kara(retention=0.7, compress_prompt=True, recent=0.7),
    "kv-compress": kv(retention=0.8),
    "kv-compress-all": kv(retention=1.0),
    "kv-compress-prompt": kv(max_cache_tokens=88, continual=False),
}
EVERY = pytest.mark.parametrize("name", CACHES)


def some(*names):
    """These kinds of caches in `make test`; each is in one test at least."""
    return pytest.mark.parametrize("name", few(list(CACHES), *names))


@pytest.fixture(scope="module")
def model():
    return build("llama")


def records_of(cache):
    """Tokens of each row that are rounded, ``[layer, B, H]``."""
    return np.stack([layer.store.records.lengths for layer in cache.compressed_layers])


# -------------------------------------------------------------------------------------------------------------- oracle
def mirror(cache, dense, padding, columns):
    """Puts what the rows of `cache` hold of the first columns into `dense`."""
    for layer in cache.compressed_layers:
        for b, h in np.ndindex(*layer.stored().lengths.shape):
            keys, values, positions = layer.stored().read(b, h)
            old = positions + padding[b] < columns
            for part, mine in ((dense.layers[layer.index].keys, keys), (dense.layers[layer.index].values, values)):
                if len(mine):  # keys that another layer stores are not here
                    part[b, h, positions[old] + padding[b]] = mine[old]


@torch.no_grad()
def check(model, make, padding, forwards, first, attention="oracle"):
    """The logits of every step are those of dense attention over what the cache holds: the records' numbers, and
    nothing of what was evicted. `first`: a step first compresses and then attends. `attention`: what the oracle attends
    with; with None its own, which knows of no eviction.
    """
    oracle = copy.deepcopy(model)
    if attention is not None:
        model.set_attn_implementation("eager")
        oracle.set_attn_implementation(attention)
    cache, dense = make(model), DynamicCache(config=model.config)
    ids = torch.randint(3, 100, (len(padding), sum(forwards)), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for b, pad in enumerate(padding):
        mask[b, :pad] = 0
    positions, seen = (mask.cumsum(1) - 1).clamp(min=0), 0

    def compare():
        EVICTED.clear()
        EVICTED.update(evicted_of(cache, seen, padding))
        mirror(cache, dense, padding, seen)

    try:
        for new in forwards:
            inputs = {
                "input_ids": ids[:, seen : seen + new],
                "attention_mask": mask[:, : seen + new],
                "position_ids": positions[:, seen : seen + new],
            }
            if seen and not first:
                compare()
            actual = model(**inputs, past_key_values=cache, use_cache=True).logits
            if seen and first:
                compare()
            expected = oracle(
                **inputs, past_key_values=dense, use_cache=True, output_attentions=attention is not None
            ).logits
            real = mask[:, seen : seen + new].bool()
            torch.testing.assert_close(actual[real], expected[real], atol=1e-4, rtol=1e-3)
            seen += new
    finally:
        EVICTED.clear()
    return cache


@EVERY
@pytest.mark.parametrize("bits", [{"bits": 8}, {"bits": 4}, {"key_bits": 8, "value_bits": 2}], ids=str)
def test_attention_is_over_what_records_stand_for(model, name, bits):
    forwards = [2 * PROMPT] + [1] * 20 + [7] + [1] * 20
    bits = {"bits": None} | bits
    cache = check(
        build("llama"), lambda model: CACHES[name](model, **bits), [5, 0], forwards, first=name.startswith("kv")
    )
    assert (records_of(cache) > 40).all()


REFUSED = {"bloom", "falcon-alibi", "mamba2", "minimax", "mistral-sliding", "mpt"}  # with any settings
UNMASKED = {"falcon-multi-query", "falcon-new", "gemma3n", "gemma4", "zamba2"}  # the oracle does not reach all layers
SUPPORTED = [name for name in ARCHITECTURES if name not in REFUSED | LATENT]


@pytest.mark.parametrize("name", few(SUPPORTED, "llama", "gpt-oss", "gpt-neox", "gemma3", "qwen3-next", "mixtral"))
def test_every_architecture(name):
    kind = ARCHITECTURES[name]
    padding, model = [3, 0] if kind.padding else [0, 0], build(name)
    model.set_attn_implementation(kind.implementations[0])
    attention = None if name in UNMASKED else "oracle"
    cache = check(model, CACHES["kara-all"], padding, [PROMPT] + [1] * 12, first=False, attention=attention)
    assert (records_of(cache) > 64).all()
    if attention is None:
        return
    cache = check(build(name), CACHES["kv-compress"], padding, [PROMPT] + [1] * 12, first=True)
    assert (records_of(cache) > 0).any()


@pytest.mark.parametrize("name", sorted(LATENT))
@pytest.mark.parametrize("make", [CACHES["kara-all"], CACHES["kara-windows"]], ids=["all", "windows"])
def test_latents_are_refused(name, make):
    model = build(name)
    cache = make(model)
    with pytest.raises(ValueError, match=r"bits=4 is not possible with .*one latent row.*; leave bits out"):
        model(**prompt(), past_key_values=cache)
    assert cache.get_seq_length() == 0


# --------------------------------------------------------------------------------------------------------------- shared
@pytest.mark.parametrize("distant_query", ["lead", "own"])
@pytest.mark.parametrize("kind", ["pod", "kara-prompt", "kara-share", "kv-compress"])
@pytest.mark.parametrize("padding", [[0, 0], [5, 0]], ids=str)
def test_keys_that_are_shared_are_rounded_at_their_lead(kind, padding, distant_query):
    sharing = dataclasses.replace(SHARED, distant_query=distant_query)

    def make(model):
        if kind == "pod":
            return PoDCache(model, sharing, bits=4, block_size=4)
        return CACHES[kind](model, sharing=sharing)

    test_pod_selection.SHARING["now"], test_pod_selection.PADDING[:] = sharing, padding
    forwards = [150] + [1] * 20 + ([] if any(padding) else [7] + [1] * 12)
    try:
        cache = check(deep(), make, padding, forwards, first=kind == "kv-compress", attention="oracle-pod")
    finally:
        test_pod_selection.LEADS.clear()
    assert (records_of(cache)[0] > 0).any()
    layer = cache.layers[1]  # which follows in its first head
    assert len(layer.store.read(0, 0)[0]) == 0 and len(layer.store.read(0, 1)[0]) == layer.store.lengths[0, 1]


# ----------------------------------------------------------------------------------------------------- what people do
@some("kara-prompt", "kv-compress")
def test_left_padded_sequences_equal_single_runs(model, name):
    rows = [prompt(n, seed=n)["input_ids"][0] for n in (133, 7, 82)]
    batch, cache = left_padded(rows), CACHES[name](model)
    together = model.generate(**batch, past_key_values=cache, **LONG)[:, batch["input_ids"].shape[1] :]
    assert cache.report().seen.tolist() == [len(row) + 39 for row in rows]
    for b, row in enumerate(rows):
        alone = CACHES[name](model)
        single = model.generate(row[None], attention_mask=torch.ones(1, len(row)), past_key_values=alone, **LONG)
        assert single[0, len(row) :].tolist() == together[b].tolist()
        assert records_of(alone)[:, 0].tolist() == records_of(cache)[:, b].tolist()
        for layer, head in itertools.product(range(3), range(2)):
            assert torch.equal(cache.kept_positions(layer, b, head), alone.kept_positions(layer, 0, head))


@some("kara-share", "kv-compress")
def test_beams_fork_copies_and_selections(model, name):
    cache = CACHES[name](model)
    settings = {"num_beams": 3, "num_return_sequences": 2, **LONG}
    assert model.generate(**prompt(150, batch=2), past_key_values=cache, **settings).shape == (4, 190)
    assert (records_of(cache) > 0).any()
    copied = copy.deepcopy(cache)
    cache.batch_select_indices(torch.tensor([2, 0, 2]))
    assert cache.report().resident_bytes == memory_of(cache)
    for layer, (b, old), head in itertools.product(range(3), enumerate([2, 0, 2]), range(2)):
        for got, expected in zip(
            cache.layers[layer].store.read(b, head), copied.layers[layer].store.read(old, head), strict=True
        ):
            assert torch.allclose(got.double(), expected.double(), atol=1e-5)
    cache.reset()
    assert cache.report().resident_bytes == 0


@some("kara-share", "kv-compress-prompt")
@torch.no_grad()
def test_replayed_tokens_are_kept_as_decoded_ones_are(model, name):
    ids = prompt(200)["input_ids"]
    one, many = CACHES[name](model), CACHES[name](model)
    for cache in (one, many):
        model(ids[:, :100], past_key_values=cache)
        cache.compress()
    decoded = torch.cat([model(ids[:, i : i + 1], past_key_values=one).logits for i in range(100, 200)], 1)
    parts, at = [], 100
    with many.replaying():
        while at < 200:
            count = min(many.replayable, 200 - at)
            parts.append(model(ids[:, at : at + count], past_key_values=many).logits)
            at += count
    # What is rounded is the same up to the last bits, and a code may be the next one.
    torch.testing.assert_close(torch.cat(parts, 1), decoded, atol=0.1, rtol=0.0)
    assert all(torch.equal(one.kept_positions(layer), many.kept_positions(layer)) for layer in range(3))
    assert records_of(one).tolist() == records_of(many).tolist()
    assert len(parts) < 40


@pytest.mark.parametrize("name", ["kara-all", "kara-prompt", "kv-compress"])
@pytest.mark.parametrize("how", ["assistant", "lookup"])
def test_assisted_decoding_gives_the_same_tokens_where_nothing_is_rounded_meanwhile(model, name, how):
    extra = {"assistant_model": build("llama", seed=1)} if how == "assistant" else {"prompt_lookup_num_tokens": 4}
    settings = {"bits": 8, "recent" if name.startswith("kara") else "protected": 24}
    cache = CACHES[name](model, **settings)
    out = model.generate(**prompt(120), past_key_values=cache, **LONG, **extra)
    assert out.shape == (1, 160) and cache.get_seq_length() == 159
    assert (records_of(cache) > 0).any()
    assert sorted(cache.kept_positions(0).unique().tolist()) == sorted(cache.kept_positions(0).tolist())


@torch.no_grad()
@pytest.mark.parametrize("count", [3, 25, 60])
def test_rounded_tokens_can_be_cropped_where_whole_ones_could(model, count):
    ids = prompt(150)["input_ids"]
    cache, short = CACHES["kara-all"](model), CACHES["kara-all"](model)
    model(ids, past_key_values=cache)
    cache.crop(-count)
    assert cache.get_seq_length() == 150 - count
    assert cache.kept_positions(0).tolist() == list(range(150 - count))
    model(ids[:, 150 - count :], past_key_values=cache)
    assert cache.kept_positions(1).tolist() == list(range(150))
    model(ids, past_key_values=short)
    assert cache.report().resident_bytes == pytest.approx(short.report().resident_bytes, rel=0.2)


@some("kara-all", "kv-compress-all")
@torch.no_grad()
def test_a_step_that_fails_is_taken_back(model, name):
    ids = prompt(150)["input_ids"]
    cache = CACHES[name](model)
    model(ids[:, :140], past_key_values=cache)
    model(ids[:, 140:141], past_key_values=cache)
    before = state(cache)
    failing = model.model.layers[1].mlp
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(failing), "forward", lambda self, x: x if self is not failing else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids[:, 141:145], past_key_values=cache)
    assert cache.get_seq_length() == 141
    after = state(cache)
    assert after == before or name == "kv-compress" and after[0] == before[0]  # more compressed, perhaps
    model(ids[:, 141:142], past_key_values=cache)


@pytest.mark.parametrize("name", ["kara-all", "kv-compress"])
@torch.no_grad()
def test_under_a_cap_a_step_is_refused_or_makes_room(model, name):
    ids = prompt(200)["input_ids"]
    free = CACHES[name](model)
    model(ids[:, :140], past_key_values=free)
    for at in range(140, 190):
        model(ids[:, at : at + 1], past_key_values=free)
    limit = int(free.report().resident_bytes * 0.9)
    cache = CACHES[name](model, max_bytes=limit)
    try:
        model(ids[:, :140], past_key_values=cache)
        for at in range(140, 200):
            model(ids[:, at : at + 1], past_key_values=cache)
            assert cache.meter.held - cache.meter.lent <= limit
    except PoolExhausted:
        assert name == "kara-all"
    assert cache.meter.held - cache.meter.lent <= limit and cache.report().resident_bytes == memory_of(cache)


@pytest.mark.parametrize(
    ("make", "most"),
    [
        (kara(retention=1.0, recent=0.5), 2 + 32 + 16),
        (kara(retention=0.5, recent=0.5, compress_prompt=True), 2 + 32 + 16),
        (kv(retention=1.0, protected=0.5), 2 + 32 + 16),
    ],
    ids=["kara", "kara-windows", "kv"],
)
def test_of_a_share_of_newest_tokens_few_stay_whole(model, make, most):
    cache = make(model)
    with torch.no_grad():
        model(**prompt(300), past_key_values=cache)
        for token in range(20):
            model(torch.tensor([[7 + token]]), past_key_values=cache)
            whole = np.stack([layer.store.whole.lengths for layer in cache.compressed_layers])
            assert (whole <= most).all() and (records_of(cache) > 60).all()


def test_a_rounded_window_is_judged_by_what_its_records_stand_for(model):
    cache, rounded = kara(retention=0.7, recent=0.7, score="key-difference")(model), []

    def watch(window, scores):
        store = cache.layers[window.layer].store
        for b, h in np.ndindex(*window.keys.shape[:2]):
            keys, _, positions = store.read(b, h)
            order = positions.argsort()
            chosen = (positions[order] >= window.starts[b]) & (positions[order] < window.starts[b] + KARA["window"])
            assert torch.equal(window.keys[b, h], keys[order][chosen])
        first = store.lengths.min() - store.newest_lengths.min()
        rounded.append(int(first) > int((store.read(0, 0)[2] < window.starts[0]).sum()) - KARA["sinks"])

    cache.policy.watch = watch
    with torch.no_grad():
        model(**prompt(40), past_key_values=cache)
        for token in range(150):
            model(torch.tensor([[token % 90 + 3]]), past_key_values=cache)
    assert rounded[-1]


def test_a_window_that_is_rounded_is_not_cropped_in_part(model):
    cache = CACHES["kara-share"](model)
    with torch.no_grad():
        model(**prompt(300), past_key_values=cache)
        whole = int(cache.compressed_layers[0].store.whole.lengths[0, 0]) - KARA["sinks"]
        kept = cache.report().kept.tolist()
        with pytest.raises(
            ValueError, match=rf"crop\(-{whole + 1}\) .* in few bits, of which only the last {whole} tok"
        ):
            cache.crop(-whole - 1)
        assert cache.report().kept.tolist() == kept
        cache.crop(-whole - KARA["window"])
        rounded = records_of(cache)
        for _ in range(2 * KARA["window"] + 40):
            model(torch.tensor([[7]]), past_key_values=cache)
    assert cache.get_seq_length() == 300 - whole - KARA["window"] + 2 * KARA["window"] + 40
    assert (records_of(cache) != rounded).all()


def test_a_turn_is_rounded_as_a_prompt_is(model):
    cache = CACHES["kara-prompt"](model)
    with torch.no_grad():
        model(**prompt(100), past_key_values=cache)
        first = records_of(cache)
        model(prompt(50, seed=5)["input_ids"], past_key_values=cache)
    assert (first == 90).all() and (records_of(cache) == 140).all()


# ---------------------------------------------------------------------------------------------------------------- bytes
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("bits, most", [(4, 0.30), (8, 0.56)])
def test_bytes_at_retention_1(size, bits, most):
    """Of bfloat16's at 4,096 tokens, everything counted; what is nominal follows from sizes alone."""
    config = AutoConfig.for_model(**_small("llama", num_hidden_layers=1, head_dim=size, max_position_embeddings=8192))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    cache = KaraCache(model, retention=1.0, recent=32, sinks=4, block_size=16, bits=bits)
    with torch.no_grad():
        for ids in prompt(4096)["input_ids"].split(1024, 1):
            model(ids, past_key_values=cache)
        report = cache.report()
        assert report.resident_bytes == memory_of(cache)
        assert report.resident_bytes <= most * report.full_bytes and report.full_bytes == 4096 * 2 * 2 * 2 * size
        whole = 4096 - int(records_of(cache)[0, 0, 0])
        width = size * bits // 8 + 4
        assert 36 <= whole < 36 + 16 and report.nominal_bytes == 2 * 2 * ((4096 - whole) * width + whole * 2 * size)
        block_a_row = 2 * 2 * 16 * (2 * size + width)
        assert report.resident_bytes <= 1.03 * report.nominal_bytes + block_a_row
        for _ in range(20):
            model(torch.tensor([[5]]), past_key_values=cache)
            assert cache.report().resident_bytes <= most * cache.report().full_bytes


@EVERY
def test_resident_bytes_are_the_live_tensors(model, name):
    cache = CACHES[name](model)
    model.generate(**left_padded([prompt(n, seed=n)["input_ids"][0] for n in (120, 90)]), past_key_values=cache, **LONG)
    report = cache.report()
    assert report.resident_bytes == memory_of(cache) and report.peak_bytes >= report.resident_bytes
    assert report.nominal_bytes < report.kept.sum() * report.full_bytes / (report.seen.sum() * 6)


# ------------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    "config", [KaraConfig, lambda **bits: KVCompressConfig(retention=0.5, **bits)], ids=["kara", "kv"]
)
@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ({"bits": 3}, "bits=3 is not possible: bits must be one of 8, 4, or None"),
        ({"bits": True}, "bits=True is not possible"),
        ({"bits": 4.0}, "bits=4.0 is not possible"),
        ({"bits": 4, "key_bits": 2}, "key_bits=2 is not possible: key_bits must be one of 8, 4, or None"),
        ({"bits": 4, "value_bits": 3}, "value_bits=3 is not possible: value_bits must be one of 8, 4, 2, or None"),
        ({"key_bits": 4}, "key_bits=4 with value_bits=None is not possible without bits.*give bits, or both"),
        ({"value_bits": 4}, "key_bits=None with value_bits=4 is not possible without bits"),
    ],
    ids=str,
)
def test_bits_that_nothing_is_made_for_are_refused(config, bits, message):
    with pytest.raises(ValueError, match=message):
        config(**bits)


def test_bits_survive_a_round_trip():
    config = KaraConfig(bits=4, value_bits=2)
    assert KaraConfig.from_json(config.to_json()) == config


def test_what_is_rounded_already_is_refused(model):
    cache = CACHES["kara-all"](model)
    layer = cache.layers[0]
    keys = torch.zeros(1, 2, 3, 16).to(torch.float8_e4m3fn)
    with pytest.raises(
        ValueError, match="bits=4 is not possible with keys and values of torch.float8_e4m3fn.*leave bits out"
    ):
        cache.compression.new_store(layer, keys, keys)


def test_a_graph_and_serving_are_refused(model, monkeypatch):
    monkeypatch.setattr(compressed, "check_graph", lambda *_: None)
    for make in (CACHES["kara-all"], CACHES["kv-compress"]):
        with pytest.raises(ValueError, match="cuda_graph=True is not possible with bits=4: .*leave one of them out"):
            make(model, cuda_graph=True)
    with pytest.raises(ValueError, match="bits=4 is not possible: bits must be None while serving"):
        ServingConfig.of(bits=4)


# --------------------------------------------------------------------------------------------------------------- a GPU
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no-mask"])
@pytest.mark.parametrize("name", ["kara-all", "kara-prompt", "kv-compress", "kv-compress-all"])
def test_decode_steps_wait_for_nothing(model, name, masked, monkeypatch):
    """The path of a GPU: between compressions nothing is read back, and the tokens are those of a CPU's path."""
    ids, mask = test_decode.inputs(5 if masked else 0, 100)
    expected, _ = test_decode.decode(model, CACHES[name](model), ids, mask, 40, masked)
    monkeypatch.setattr(steps, "syncs_are_free", lambda device: False)
    cache = CACHES[name](model)
    logits, waited = test_decode.decode(model, cache, ids, mask, 40, masked)
    assert len(waited) > 25 and not any(waited), waited
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
    assert (records_of(cache) > 64).all()


@pytest.mark.slow
def test_kernels_wait_for_nothing_either():
    """With the kernels of Triton's interpreter, in a process of its own."""
    pytest.importorskip("triton", reason="triton is not installed")
    flags = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "python_functions=check_*"]
    done = run(*flags, __file__, KARA_BACKEND="triton", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.parametrize("name", ["kara-all", "kv-compress"])
def check_the_kernels_themselves(model, name, monkeypatch):
    monkeypatch.setattr(steps, "syncs_are_free", lambda device: False)
    monkeypatch.setattr(rounding, "OPENING", 8)
    monkeypatch.setattr(budget_compression, "OPENING", 8)
    del model.model.layers[1:]
    model.config.num_hidden_layers, model.config.layer_types = 1, None
    ids, mask = test_decode.inputs(3, 30)
    cache = CACHES[name](model)
    logits, waited = test_decode.decode(model, cache, ids, mask, 6)
    assert len(waited) > 3 and not any(waited), waited
    monkeypatch.setenv("KARA_BACKEND", "reference")
    expected, _ = test_decode.decode(model, CACHES[name](model), ids, mask, 6)
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)
    assert (records_of(cache) > 0).all()
