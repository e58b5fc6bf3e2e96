"""Bad input is named with its remedy, and the cache stays as it was."""

import pytest
import torch
from support.architectures import build
from support.caches import state
from transformers import AutoModelForSeq2SeqLM, DynamicCache, GenerationMixin, T5Config

from kara_hf import KaraCache, PoolExhausted, attach, detach

SMALL = {"window": 16, "recent": 8, "block_size": 8}
GREEDY = {"max_new_tokens": 30, "do_sample": False}


@pytest.fixture
def model():
    return build("llama")


def prompt(tokens: int = 20, batch: int = 1) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 100, (batch, tokens), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def used(model, **settings) -> KaraCache:
    cache = KaraCache(model, **SMALL, **settings)
    model.generate(**prompt(batch=2), past_key_values=cache, **GREEDY)
    return cache


SETTINGS = [
    ("retention", 0, r"retention=0 .*\(0, 1\]"),
    ("retention", 1.2, r"retention=1.2 .*\(0, 1\]"),
    ("retention", float("nan"), "retention=nan"),
    ("retention", "0.2", "retention='0.2'"),
    ("window", 1, "window=1 .*from 2 on"),
    ("window", 40, "window=40 .*multiple of block_size=16"),
    ("window", 2.5, "window=2.5"),
    ("recent", -1, "recent=-1 .*from 0 on"),
    ("block_size", 0, "block_size=0 .*from 1 on"),
    ("anchor_share", 0, r"anchor_share=0 .*\(0, 1\]"),
    ("anchor_share", 1.5, "anchor_share=1.5"),
    ("score", "bidirektional", "score='bidirektional' .*one of .*bidirectional"),
    ("compress_prompt", "yes", "compress_prompt='yes' .*True or False"),
    ("seed", 0.5, "seed=0.5"),
    ("max_bytes", 100, r"max_bytes=100 .*at least one block .*2048 bytes"),
    ("max_bytes", 2e9, "max_bytes=2000000000.0"),
]


@pytest.mark.parametrize(("name", "value", "message"), SETTINGS, ids=[f"{n}={v}" for n, v, _ in SETTINGS])
def test_settings(model, name, value, message):
    with pytest.raises(ValueError, match=message):
        KaraCache(model, **{name: value})
    assert model.config._attn_implementation == "sdpa"  # not attached by a call that failed


def test_models_that_cannot_work(model):
    with pytest.raises(TypeError, match=r"got Linear; load it with AutoModelForCausalLM"):
        KaraCache(torch.nn.Linear(2, 2))
    tiny = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    encoder_decoder = AutoModelForSeq2SeqLM.from_config(tiny)
    for call in (KaraCache, attach):
        with pytest.raises(ValueError, match=r"encoder-decoder.*use a decoder-only model"):
            call(encoder_decoder)
        with pytest.raises(ValueError, match=r"BloomForCausalLM neither takes.*or use another model class"):
            call(build("bloom"))


def test_a_detached_model_raises_and_changes_nothing(model):
    cache = used(model)
    before = state(cache)
    for own in ("sdpa", "eager"):
        detach(model)
        model.set_attn_implementation(own)
        with pytest.raises(RuntimeError, match=rf"LlamaForCausalLM.*'{own}'.*kara_hf.attach\(model\)"):
            model(torch.tensor([[5], [6]]), past_key_values=cache, use_cache=True)
        assert state(cache) == before
    attach(model)
    model(torch.tensor([[5], [6]]), past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == before[0] + 1


def test_another_model(model):
    cache = used(model)
    before = state(cache)
    other = build("llama", seed=1)
    with pytest.raises(ValueError, match=r"made for another model.*KaraCache\(model\) for each model"):
        other(torch.tensor([[5], [6]]), past_key_values=cache, use_cache=True)
    assert state(cache) == before
    model(torch.tensor([[5], [6]]), past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek-v3"])
def test_another_batch_size(name):
    model = build(name)
    cache = used(model)
    before = state(cache)
    with pytest.raises(ValueError, match=r"3 sequences and the cache holds 2.*batch_repeat_interleave"):
        model(torch.tensor([[5], [6], [7]]), past_key_values=cache, use_cache=True)
    assert state(cache) == before
    model(torch.tensor([[5], [6]]), past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_nan(name, layer):
    """NaN in one layer's keys: the layers before it forget the step too, sliding ones included."""
    model = build(name)
    cache = used(model)
    before = state(cache)
    sliding = [layer.keys.clone() for layer in cache.layers if layer.is_sliding]
    bad = torch.full((1, model.config.hidden_size), float("nan"))
    layers = [each.index for each in cache.compressed_layers]
    if layer not in layers:
        layer = layers[-1]
    handle = model.model.layers[layer].self_attn.k_proj.register_forward_hook(lambda m, a, out: out + bad[0, :1])
    for ids in (torch.tensor([[5], [6]]), torch.tensor([[5, 6], [6, 7]])):
        with pytest.raises(
            ValueError, match=rf"layer {layer} are NaN or infinite; load the model in bfloat16 or float32"
        ):
            model(ids, past_key_values=cache, use_cache=True)
        assert state(cache) == before
        for old, new in zip(sliding, [layer.keys for layer in cache.layers if layer.is_sliding], strict=True):
            assert torch.equal(old, new)
    fresh = KaraCache(model, **SMALL)
    with pytest.raises(ValueError, match="NaN or infinite"):
        model(**prompt(), past_key_values=fresh, use_cache=True)
    assert fresh.get_seq_length() == 0 and fresh.report().resident_bytes == 0
    handle.remove()
    model(**prompt(), past_key_values=fresh, use_cache=True)
    assert fresh.get_seq_length() == 20


def test_empty_prompt(model):
    cache = KaraCache(model, **SMALL)
    nothing = torch.zeros(1, 2, 0, 16)
    with pytest.raises(ValueError, match=r"prompt is empty \(0 new tokens\); pass at least one"):
        cache.update(nothing, nothing, 0)
    assert cache.get_seq_length() == 0
    model.generate(**prompt(), past_key_values=cache, **GREEDY)
    assert cache.get_seq_length() == 49


def test_a_row_of_padding(model):
    cache = KaraCache(model, **SMALL)
    inputs = prompt(batch=3)
    inputs["attention_mask"][1] = 0
    with pytest.raises(ValueError, match=r"sequence 1 of the batch is nothing but padding; leave it out"):
        model.generate(**inputs, past_key_values=cache, **GREEDY)
    assert cache.get_seq_length() == 0 and cache.report().resident_bytes == 0


@pytest.mark.parametrize("where", ["prompt", "decode"])
def test_max_bytes_is_a_cap(model, where):
    free = used(model, retention=0.5)
    need = free.report().resident_bytes
    prompt_need = KaraCache(model, **SMALL, retention=0.5)
    model(**prompt(batch=2), past_key_values=prompt_need, use_cache=True)
    limit = prompt_need.report().resident_bytes + (-500 if where == "prompt" else 3000)
    assert limit < need
    cache = KaraCache(model, **SMALL, retention=0.5, max_bytes=limit)
    with pytest.raises(
        PoolExhausted, match=rf"holds \d+ bytes and needs \d+ more, past max_bytes={limit}; raise max_bytes"
    ):
        model.generate(**prompt(batch=2), past_key_values=cache, **GREEDY)
    report = cache.report()
    assert report.resident_bytes <= limit
    assert report.kept.unique().numel() <= 1  # every layer stopped at the same token
    assert cache.get_seq_length() == (0 if where == "prompt" else int(report.seen[0]))
    enough = KaraCache(model, **SMALL, retention=0.5, max_bytes=free.report().peak_bytes)
    model.generate(**prompt(batch=2), past_key_values=enough, **GREEDY)
    assert enough.report().resident_bytes == need


def test_arguments_that_would_be_lost(model):
    cache = used(model)
    before = state(cache)
    ids = torch.tensor([[5], [6]])
    with pytest.raises(ValueError, match="adds a bias to its attention scores"):
        model(ids, past_key_values=cache, use_cache=True, attention_mask=torch.ones(2, 1, 1, 50))
    model.train()
    model.model.layers[0].self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"dropout=0.1 .*call model.eval\(\)"):
        model(ids, past_key_values=cache, use_cache=True)
    assert state(cache) == before


@pytest.mark.parametrize("where", ["argument", "generation_config"])
def test_a_call_without_a_cache(model, where):
    """Every step would bring all tokens again."""
    cache = used(model)
    before = state(cache)
    if where == "generation_config":
        model.generation_config.use_cache = False
    settings = {} if where == "generation_config" else {"use_cache": False}
    with pytest.raises(ValueError, match="use_cache=False is not possible with a KaraCache.*set it to True"):
        model.generate(**prompt(60, batch=2), past_key_values=cache, **GREEDY, **settings)
    assert state(cache) == before
    model.generation_config.use_cache = True
    assert model.generate(**prompt(60, batch=2), past_key_values=cache, **GREEDY).shape == (2, 90)


def test_a_transformers_that_does_not_say_what_a_prompt_is(model, monkeypatch):
    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", lambda self, input_ids, **kwargs: {})
    with pytest.raises(ImportError, match="does not give prepare_inputs_for_generation is_first_iteration"):
        KaraCache(model)


def test_soft_capping_that_sdpa_would_drop():
    model = build("gemma2")
    model.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match="softcap"):
        model.generate(**prompt(), past_key_values=KaraCache(model, **SMALL), **GREEDY)


def test_rows_that_are_not_there(model):
    cache = used(model)
    for call in (cache.kept_positions, cache.chunks):
        for arguments, message in [
            ((9,), "layer 9 .*are \\[0, 1, 2\\]"),
            ((0, 5), "sequence 5"),
            ((0, 0, 7), "head 7"),
        ]:
            with pytest.raises(IndexError, match=message):
                call(*arguments)
    with pytest.raises(IndexError, match="cache is empty"):
        KaraCache(model).kept_positions(0)


def test_other_caches_are_not_in_the_way_after_an_error(model):
    cache = used(model)
    with pytest.raises(ValueError):
        model(torch.tensor([[5], [6], [7]]), past_key_values=cache, use_cache=True)
    dense = DynamicCache(config=model.config)
    model.generate(**prompt(), past_key_values=dense, **GREEDY)
    assert dense.get_seq_length() == 49


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.batch_repeat_interleave(64),
        lambda cache: cache.reorder_cache(torch.tensor([0, 1] * 64)),
        lambda cache: cache.batch_select_indices(torch.tensor([1, 0] * 64)),
    ],
    ids=["repeat", "reorder", "select"],
)
def test_rearranging_past_the_cap_changes_nothing(model, change):
    cache = used(model, retention=0.5)
    cache.meter.max_bytes = cache.meter.held + 2000
    before = state(cache)
    with pytest.raises(PoolExhausted, match="raise max_bytes"):
        change(cache)
    assert state(cache) == before and cache.batch_size == 2


def test_sealing_shared_blocks_past_the_cap_changes_nothing(model):
    """Sealing an open window that sequences share takes blocks of their own; without them the step is undone."""
    cache = KaraCache(model, retention=0.5, score="random", window=16, recent=0, block_size=16)
    ids = prompt(20)["input_ids"]
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
        for n in range(15):
            model(ids[:, n : n + 1], past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(3)
        before = state(cache)
        cache.meter.max_bytes = cache.meter.held
        with pytest.raises(PoolExhausted):
            model(torch.tensor([[5], [6], [7]]), past_key_values=cache, use_cache=True)
        assert state(cache) == before
        cache.meter.max_bytes = None
        model(torch.tensor([[5], [6], [7]]), past_key_values=cache, use_cache=True)
    assert cache.report().kept.unique().tolist() == [20 + 8]
