"""Attaching is invisible: to other caches, to no cache, to other models, to what is saved, and when it is over."""

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
from support.architectures import build
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kara_hf import KaraCache, KVCompressCache, PoDCache, PoDSharing, attach, detach
from kara_hf.integration.attach import is_attached

SMALL = {"window": 16, "recent": 8, "block_size": 4}
LEAD = tuple((layer, layer) for layer in range(3))
CACHES = {
    "kara": lambda model: KaraCache(model, retention=0.5, **SMALL),
    "kv-compress": lambda model: KVCompressCache(model, max_cache_tokens=32, protected=4, sinks=2, block_size=4),
    "pod": lambda model: PoDCache(model, PoDSharing(lead=((0, 0), (0, 0), (2, 2)), sinks=2, recent=8), block_size=4),
}
IDS = torch.arange(40)[None] % 90 + 5


def surroundings(model):
    """Everything outside the model's modules that attaching might touch, and the model's own attributes."""
    type(model)._can_set_attn_implementation()  # whose answer Transformers remembers on the class
    classes = [dict(vars(kind)) for kind in (AttentionInterface, AttentionMaskInterface, type(model))]
    mappings = [dict(kind._global_mapping) for kind in (AttentionInterface, AttentionMaskInterface)]
    local = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    modules = [(len(module._forward_hooks), sorted(vars(module))) for module in model.modules()]
    return classes, mappings, local, modules, model.config.to_dict(), model.config._attn_implementation


@torch.no_grad()
def computed(model, implementation=None):
    """What the model computes without a cache of ours: bit for bit."""
    cache = DynamicCache(config=model.config)
    first = model(IDS, past_key_values=cache, use_cache=True).logits
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :7] = 0
    padded = model(IDS.repeat(2, 1), attention_mask=mask, use_cache=False).logits
    return model(IDS, use_cache=False).logits, first, model(IDS[:, :1], past_key_values=cache).logits, padded


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", sorted(CACHES))
def test_a_cache_changes_nothing_for_others(kind, implementation):
    model, other = build("llama"), build("qwen3", seed=1)
    for each in (model, other):
        each.set_attn_implementation(implementation)
    before, own = surroundings(model), [computed(each) for each in (model, other)]
    cache = CACHES[kind](model)
    for _ in range(2):
        assert model.config._attn_implementation == implementation
        for each, expected in zip((model, other), own, strict=True):
            assert all(map(torch.equal, computed(each), expected))
        model.generate(IDS, past_key_values=cache, max_new_tokens=30, do_sample=False)
        cache.reset()
    del cache
    assert surroundings(model) == before
    assert all(map(torch.equal, computed(model), own[0]))


def test_what_was_put_on_goes_with_the_last_holder():
    model = build("llama")
    before = surroundings(model)
    first, second = (KaraCache(model, retention=0.5, **SMALL) for _ in range(2))
    twin = copy.deepcopy(first)
    del first, second
    assert is_attached(model), "a copy holds on"
    del twin
    assert not is_attached(model) and surroundings(model) == before
    with attach(model):
        with attach(model):
            pass
        assert is_attached(model)
    assert surroundings(model) == before
    attach(model)
    with attach(model):
        pass
    assert is_attached(model), "a call of attach lasts until detach"
    cache = KaraCache(model, retention=0.5, **SMALL)
    detach(model)
    detach(model)
    assert surroundings(model) == before
    with pytest.raises(RuntimeError, match="it was detached"):
        model(IDS, past_key_values=cache, use_cache=True)
    attach(model)
    model(IDS, past_key_values=cache, use_cache=True)
    detach(model)
    assert surroundings(model) == before


def test_a_model_that_is_dropped_takes_it_along():
    gc.collect()
    before = surroundings(build("llama", seed=1))
    model = build("llama")
    attach(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and surroundings(build("llama", seed=1)) == before


def test_holders_that_are_collected_while_others_are_made():
    """The collector may run at any allocation, and drop the last cache while the next one is made."""
    model, cycles = build("llama"), []
    before = surroundings(model)
    threshold = gc.get_threshold()
    try:
        gc.set_threshold(1)  # as often as it can
        for _ in range(30):
            cycles.append([KaraCache(model, retention=0.5, **SMALL)])
            cycles[-1].append(cycles[-1])
            cycles.clear()
            model(IDS[:, :4], past_key_values=KaraCache(model, retention=0.5, **SMALL), use_cache=True)
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    assert surroundings(model) == before


def test_several_models_come_and_go_in_any_order():
    models = [build("llama"), build("qwen3", seed=1), build("gemma2", seed=2)]
    before = surroundings(models[0])
    caches = [KaraCache(model, retention=1.0, **SMALL) for model in models]
    for index in (1, 0, 2):
        for model in models:
            model(IDS, use_cache=False)
        caches[index] = None
    assert surroundings(models[0]) == before


@pytest.mark.parametrize("where", ["while a cache lives", "afterwards"])
def test_a_model_can_be_saved_copied_and_pickled(where, tmp_path):
    model = build("llama")
    expected = computed(model)
    cache = KaraCache(model, retention=0.5, **SMALL)
    model.generate(IDS, past_key_values=cache, max_new_tokens=5)
    if where == "afterwards":
        del cache
    model.save_pretrained(tmp_path)
    assert "kara" not in (tmp_path / "config.json").read_text()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    copies.append(type(model).from_pretrained(tmp_path).eval())
    for each in copies:  # whose weights lie elsewhere, which may round otherwise
        for found, own in zip(computed(each), expected, strict=True):
            torch.testing.assert_close(found, own, atol=1e-5, rtol=1e-5)
    assert b"kara_hf" not in buffer.getvalue()


def test_attentions_are_given_out_afterwards():
    model = build("llama")
    model.set_attn_implementation("eager")
    expected = model(IDS, output_attentions=True, use_cache=False).attentions
    cache = KaraCache(model, retention=0.5, **SMALL)
    model.generate(IDS, past_key_values=cache, max_new_tokens=5)
    for found in (model(IDS, output_attentions=True, use_cache=False).attentions,):
        assert all(map(torch.equal, found, expected))


def test_somebody_else_wraps_the_same_place():
    """What others put over ours stays, and ours beneath it changes nothing."""
    model = build("llama")
    expected, own = computed(model), vars(AttentionInterface).get("__getitem__")
    cache = KaraCache(model, retention=0.5, **SMALL)
    ours = AttentionInterface.__getitem__
    AttentionInterface.__getitem__ = lambda self, name: ours(self, name)
    try:
        theirs = AttentionInterface.__getitem__
        del cache
        assert AttentionInterface.__getitem__ is theirs
        assert all(map(torch.equal, computed(model), expected))
    finally:
        if own is None:
            del AttentionInterface.__getitem__
        else:
            AttentionInterface.__getitem__ = own


@pytest.mark.usefixtures("compiler")
def test_another_model_is_compiled_meanwhile():
    model, other = build("llama"), build("llama", seed=1)
    expected = other(IDS, use_cache=False).logits
    cache = KaraCache(model, retention=0.5, **SMALL)
    compiled = torch.compile(other, backend="eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lru_cache")
        assert torch.equal(compiled(IDS, use_cache=False).logits, expected)
    del cache


@pytest.mark.parametrize("how", ["whole", "wrapped", "forward", "layers"])
def test_a_compiled_model_is_refused(how):
    model = build("llama")
    given = model
    if how == "whole":
        model.compile(backend="eager")
    elif how == "wrapped":
        given = torch.compile(model, backend="eager")
    elif how == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    else:
        model.model.layers[1].compile(backend="eager")
    for make in CACHES.values():
        with pytest.raises((TypeError, ValueError), match=r"is compiled \(torch.compile\).*cuda_graph=True"):
            make(given)


@pytest.mark.usefixtures("compiler")
def test_a_model_that_is_compiled_later_is_refused_when_it_generates():
    model = build("llama")
    cache = KaraCache(model, retention=0.5, **SMALL)
    model.generate(IDS, past_key_values=cache, max_new_tokens=3)
    seen = cache.report().seen.tolist()
    model.compile(backend="eager")
    with pytest.raises(ValueError, match="is compiled"):
        model.generate(IDS.repeat(1, 3), past_key_values=cache, max_new_tokens=3)
    assert cache.report().seen.tolist() == seen
