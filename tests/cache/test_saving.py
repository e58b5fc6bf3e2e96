"""A cache that was saved goes on from its file as if it had never been away, or is refused with the reason."""

import contextlib
import json
import os
import shutil

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version
from support.architectures import build
from support.batches import ids, left_padded
from support.caches import memory_of, state
from support.marks import few, most_examples
from support.sharing import SHARED, deep
from support.shown import FENCE, TEXTS

from kara_hf import CompressedCache, KaraCache, KVCompressCache, PoDCache, PoolExhausted, register_score
from kara_hf.cache import saved_file
from kara_hf.methods.press_cache import PressCache
from kara_hf.policy.scores import SCORES

KARA = {"retention": 0.5, "window": 16, "recent": 8, "sinks": 2, "block_size": 4, "score": "bidirectional"}
KV = {"protected": 4, "sinks": 2, "block_size": 4, "observation": 8}


def kara(**settings):
    return lambda model: KaraCache(model, **KARA | settings)


def kv(**settings):
    return lambda model: KVCompressCache(model, **KV | settings)


CACHES = {
    "kara": kara(),
    "kara-queries": kara(queries=4),
    "kara-share": kara(compress_prompt=True, recent=0.5),
    "kara-bits": kara(retention=0.7, compress_prompt=True, bits=4),
    "kara-random": kara(score="random"),
    "kara-pod": kara(sharing=SHARED),
    "kv-compress": kv(max_cache_tokens=32),
    "kv-compress-levels": kv(retention=0.5, levels=None, votes="mean"),
    "kv-compress-bits": kv(retention=0.9, bits=8),
    "kv-compress-pod": kv(retention=0.5, sharing=SHARED),
    "kv-compress-capped": kv(max_cache_tokens=32, max_bytes=10**6, observation=None),
    "pod": lambda model: PoDCache(model, SHARED, block_size=4),
    "pod-bits": lambda model: PoDCache(model, SHARED, block_size=4, key_bits=8, value_bits=2),
}
WHEN = {"prompt": 0, "first": 1, "in-window": 13, "later": 30}


@pytest.fixture(scope="module")
def model():
    return deep()


@torch.no_grad()
def go_on(model, cache, ids, mask, steps):
    """Logits of the next steps of a cache, then the likeliest token and the mask behind them."""
    found = []
    for _ in range(steps):
        mask = torch.cat([mask, mask.new_ones(ids.shape)], 1)
        places = (mask.cumsum(1) - 1)[:, -ids.shape[1] :]
        logits = model(ids, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True).logits
        ids = logits[:, -1:].argmax(-1)
        found.append(logits)
    return torch.cat(found, 1), ids, mask


@torch.no_grad()
def begun(model, cache, lengths=(70,), steps=0):
    """Has `cache` read prompts of these lengths and decode some steps: what comes next, and the mask so far."""
    given = left_padded([ids(length, seed) for seed, length in enumerate(lengths)])
    following = model(**given, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    mask = given["attention_mask"]
    return go_on(model, cache, following, mask, steps)[1:] if steps else (following, mask)


def assert_goes_on(model, cache, loaded, following, mask, steps=20):
    """Decodes, forks, takes a turn and decodes: the two are the same to the bit."""
    assert type(loaded) is type(cache)
    one, other = cache.report().to_dict(), loaded.report().to_dict()
    assert one | {"peak_bytes": 0} == other | {"peak_bytes": 0}
    (a, following, after), (b, *_) = (go_on(model, each, following, mask, steps) for each in (cache, loaded))
    assert torch.equal(a, b)
    for each in (cache, loaded):
        each.batch_repeat_interleave(2)
    turn = ids(7, 9).repeat(2 * len(following), 1)
    after = after.repeat_interleave(2, 0)
    (a, following, mask), (b, *_) = (go_on(model, each, turn, after, 1) for each in (cache, loaded))
    assert torch.equal(a, b)
    assert torch.equal(*(go_on(model, each, following, mask, 5)[0] for each in (cache, loaded)))
    assert state(loaded) == state(cache)


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("lengths", [(70,), (75, 40, 71)], ids=["one", "ragged"])
@pytest.mark.parametrize(
    "kind", few(list(CACHES), "kara-pod", "kara-bits", "kv-compress-levels", "kv-compress-pod", "pod-bits")
)
def test_a_loaded_cache_goes_on_as_the_saved_one(kind, lengths, when, model, tmp_path):
    cache = CACHES[kind](model)
    following, mask = begun(model, cache, lengths, WHEN[when])
    cache.save(tmp_path / "notes.safetensors")
    loaded = CompressedCache.load(tmp_path / "notes.safetensors", model)
    assert os.listdir(tmp_path) == ["notes.safetensors"]
    assert_goes_on(model, cache, loaded, following, mask)


OTHERS = [
    "gemma3",
    "gpt-oss",
    "deepseek-v3",
    "qwen3-next",
    "gemma3n",
    "jamba",
    "falcon-h1",
    "lfm2",
    "zamba2",
]


@pytest.mark.parametrize("kind", few(["kara", "kv-compress"], "kara"))
@pytest.mark.parametrize("name", few(OTHERS, "gemma3", "falcon-h1"))
def test_layers_of_other_kinds_go_on_too(name, kind, tmp_path):
    if (name, kind) == ("deepseek-v3", "kv-compress"):
        pytest.skip("KV-Compress does not support latent attention")
    model = build(name)
    cache = CACHES[kind](model)
    following, mask = begun(model, cache, (40,), 13)
    cache.save(tmp_path / "notes.safetensors")
    same = build(name)  # as in another process
    loaded = CompressedCache.load(tmp_path / "notes.safetensors", same)
    first, *_ = go_on(model, cache, following, mask, 20)
    assert torch.equal(go_on(same, loaded, following, mask, 20)[0], first)


def test_new_forked_and_cropped_caches_are_saved_as_they_are(model, tmp_path):
    path = tmp_path / "notes.safetensors"
    cache = CACHES["kara-pod"](model)
    cache.save(str(path))
    loaded = KaraCache.load(str(path), model)
    following, mask = begun(model, cache, (30, 25), 9)
    assert all(map(torch.equal, begun(model, loaded, (30, 25), 9), (following, mask)))
    cache.batch_repeat_interleave(3)
    cache.crop(-1)
    with torch.inference_mode():
        cache.save(path)
        loaded = KaraCache.load(path, model)
    assert memory_of(loaded) == memory_of(cache) == loaded.report().resident_bytes
    assert_goes_on(model, cache, loaded, following.repeat_interleave(3, 0), mask[:, :-1].repeat_interleave(3, 0))


def test_a_score_that_is_not_registered_is_named(model, tmp_path):
    register_score("of this process")(lambda window: window.keys.float().norm(dim=-1))
    kara(score="of this process")(model).save(tmp_path / "other.safetensors")
    del SCORES["of this process"]
    with pytest.raises(ValueError, match="score='of this process' is not possible"):
        KaraCache.load(tmp_path / "other.safetensors", model)


def test_a_cap_holds_on_load(model, tmp_path):
    path = tmp_path / "notes.safetensors"
    cache = kara(max_bytes=10**7)(model)
    begun(model, cache)
    cache.save(path)
    assert KaraCache.load(path, model).meter.max_bytes == 10**7
    cache.meter.max_bytes = cache.report().resident_bytes // 2
    cache.save(path)
    with pytest.raises(PoolExhausted, match="max_bytes"):
        KaraCache.load(path, model)


# ------------------------------------------------------------------------------------------------------------- refused
@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """A small file."""
    path = tmp_path_factory.mktemp("saved") / "notes.safetensors"
    cache = kara()(model)
    begun(model, cache, (9, 6), 3)
    cache.save(path)
    return path


def test_another_model_is_refused_with_the_difference(model, saved):
    with pytest.raises(ValueError, match="num_hidden_layers 6 instead of 3; config .* weights"):
        CompressedCache.load(saved, build("llama"))
    trained = deep()
    with torch.no_grad():
        trained.model.layers[3].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(ValueError, match="than this LlamaForCausalLM: weights [0-9a-f]* instead of [0-9a-f]*; load"):
        CompressedCache.load(saved, trained)
    with pytest.raises(ValueError, match="dtype float32 instead of bfloat16"):
        CompressedCache.load(saved, deep().bfloat16())
    assert KaraCache.load(saved, deep()).columns == 12


def test_another_class_file_or_version_is_refused(model, saved, tmp_path, monkeypatch):
    path = tmp_path / "notes.safetensors"
    with pytest.raises(ValueError, match=r"holds a KaraCache; load it by KaraCache\.load"):
        KVCompressCache.load(saved, model)
    with pytest.raises(FileNotFoundError, match="notes.safetensors"):
        KaraCache.load(path, model)
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="no cache that was saved"):
        KaraCache.load(path, model)
    monkeypatch.setattr(saved_file, "FORMAT", "2")
    with pytest.raises(ValueError, match="has format '1', and this version of kara_hf reads '2'"):
        KaraCache.load(saved, model)


@most_examples(40)
@given(data=st.data())
def test_a_truncated_or_changed_file_is_refused(data, model, saved, tmp_path_factory):
    path, whole = saved, saved.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1) | st.integers(0, 20000), "place") % len(whole)
    other = data.draw(st.none() | st.integers(1, 255), "change")
    changed = whole[:place] if other is None else whole[:place] + bytes([whole[place] ^ other]) + whole[place + 1 :]
    damaged = path.with_name("damaged.safetensors")
    damaged.write_bytes(changed)
    with pytest.raises(ValueError, match="truncated|damaged|format|no cache"):
        CompressedCache.load(damaged, model)


@most_examples(40)
@given(data=st.data())
def test_a_forged_header_makes_no_other_kind_of_error(data, model, saved):
    """Where somebody made the digest fit."""
    held = node = saved_file.read_saved(saved)
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = data.draw(st.sampled_from(list(keys)), "key")
        if not isinstance(node[key], dict | list) or not node[key]:
            break
        node = node[key]
    node[key] = data.draw(st.sampled_from([None, -1, 10**6, "x", [], {}, torch.full((2, 2, 9), 99, dtype=torch.int32)]))
    forged = saved.with_name("forged.safetensors")
    saved_file.write_saved(forged, held)
    with contextlib.suppress(ValueError):
        CompressedCache.load(forged, model)


def test_a_crash_leaves_the_old_file_whole(model, saved, tmp_path, monkeypatch):
    path = shutil.copy(saved, tmp_path)
    cache = kara()(model)
    begun(model, cache, (12,))
    for name in ("save_file", "_digest"):
        with monkeypatch.context() as patch:
            patch.setattr(saved_file, name, lambda *_: (_ for _ in ()).throw(OSError("no space left")))
            with pytest.raises(OSError, match="no space left"):
                cache.save(path)
        assert os.listdir(tmp_path) == ["notes.safetensors"]
        assert open(path, "rb").read() == saved.read_bytes()


def test_the_header_is_json_and_nothing_is_pickled(saved):
    whole = saved.read_bytes()
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    assert set(header.pop("__metadata__")) == {"format", "cache", "sha256"}
    assert {part["dtype"] for part in header.values()} <= {"F32", "I32", "I64", "BOOL"}


def test_what_is_more_than_settings_is_refused(model):
    class Press:
        compression_ratio = 0.0

        def score(self, *_):
            raise NotImplementedError

    cache = PressCache(model, Press(), retention=0.5)
    with pytest.raises(TypeError, match="PressPolicy cannot be saved"):
        cache.save("never.safetensors")


def test_the_snippet_that_asks_a_loaded_cache(tmp_path):
    """Of docs/save.md: its ids are those of padding here, and the text counts all the same."""
    model = build("llama")
    model.generation_config.pad_token_id = 0
    code = next(code for _, code in FENCE.findall(TEXTS["docs/save.md"]) if "model.generate" in code)
    if Version(transformers.__version__) < Version("5.24"):
        code = code.replace("cache=cache", "past_key_values=cache")
    book, question = ids(40)[None], ids(5, seed=1)[None]
    cache = KVCompressCache(model, max_cache_tokens=32, **KV)
    with torch.no_grad():
        model(book, past_key_values=cache, use_cache=True)
    cache.compress()
    cache.save(tmp_path / "book.safetensors")
    loaded = CompressedCache.load(tmp_path / "book.safetensors", model)
    found = {"cache": loaded, "model": model, "torch": torch, "question": question}
    exec(compile(code, "docs/save.md", "exec"), found)
    whole = torch.cat([book, question], 1)
    settings = {"attention_mask": torch.ones_like(whole), "max_new_tokens": 100}
    expected = model.generate(whole, past_key_values=cache, **settings)
    assert found["out"][0, 45:].tolist() == expected[0, 45:].tolist()
