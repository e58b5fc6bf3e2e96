"""Memory goes with the last reference, and copies are whole or refused by name."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from support.architectures import build

from kara_hf import KaraCache, KVCompressCache, PoDCache, PoDSharing

SMALL = {"window": 16, "recent": 8, "block_size": 4}
SHARED = PoDSharing(lead=((0, 0), (0, 1), (0, 1)), sinks=1, recent=5)
CACHES = {
    "kara": lambda model: KaraCache(model, retention=0.5, **SMALL),
    "kara, shared": lambda model: KaraCache(model, retention=0.5, sharing=SHARED, **SMALL),
    "kv-compress": lambda model: KVCompressCache(model, max_cache_tokens=32, protected=4, sinks=2, block_size=4),
    "kv-compress, shared": lambda model: KVCompressCache(model, retention=0.5, sharing=SHARED, block_size=4),
    "pod": lambda model: PoDCache(model, SHARED, block_size=4),
}


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("use", ["new", "read", "generated", "reset", "failed", "copied"])
@pytest.mark.parametrize("kind", sorted(CACHES))
def test_a_cache_is_freed_by_its_last_reference(kind, use, no_collector):
    model = build("llama")
    cache = CACHES[kind](model)
    ids = torch.randint(3, 90, (2, 30))
    if use == "read":
        model(ids, past_key_values=cache, use_cache=True)
    elif use != "new":
        model.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False)
    if use == "reset":
        cache.reset()
    if use == "failed":
        with pytest.raises(ValueError, match="3 sequences"):
            model(ids[:1].repeat(3, 1), past_key_values=cache, use_cache=True)
    if use == "copied":
        twin = copy.deepcopy(cache)
        gone = weakref.ref(twin), weakref.ref(twin.layers[0])
        del twin
        assert [each() for each in gone] == [None, None]
    parts = [cache, cache.state, cache.steps, cache.compression, cache.meter, *cache.layers]
    parts += (
        [tensor for layer in cache.layers if layer.store is not None for tensor in layer.store.tensors()]
        if (use != "read")
        else []
    )
    gone = [weakref.ref(part) for part in parts]
    del cache, parts
    assert [each() for each in gone if each() is not None] == []


def test_copies_say_what_to_use():
    model = build("llama")
    cache = KaraCache(model, retention=0.5, **SMALL)
    model.generate(torch.arange(3, 30)[None], past_key_values=cache, max_new_tokens=20, do_sample=False)
    with pytest.raises(TypeError, match=r"shares its layers.*copy.deepcopy\(cache\), or cache.save"):
        copy.copy(cache)
    for attempt in (lambda: pickle.dumps(cache), lambda: torch.save(cache, io.BytesIO())):
        with pytest.raises(TypeError, match=r"belongs to a model in this process.*cache.save\(.*KaraCache.load"):
            attempt()
    twin = copy.deepcopy(cache)
    ids = torch.tensor([[7]])
    assert torch.equal(model(ids, past_key_values=twin).logits, model(ids, past_key_values=cache).logits)
    with pytest.raises(ValueError, match="copies layers of its cache"):
        copy.deepcopy(cache.layers[0])
