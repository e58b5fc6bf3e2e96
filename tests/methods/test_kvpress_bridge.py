"""Presses as scorers of the store: what is kept is what their scores say, in real bytes, at true positions. Stand-ins
keep the contract of kvpress's `ScorerPress`; kvpress's own presses are asked where it is installed.
"""

import copy
import gc
import subprocess
import sys
import weakref
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from support.architectures import build
from support.batches import left_padded, prompt
from support.caches import feed, kept, memory_of, rows_of
from support.marks import few
from support.processes import forked
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kara_hf import KVCompressCache, attach, detach
from kara_hf.methods.press_cache import PressCache, import_kvpress
from kara_hf.methods.registry import make_method

CUT = {"max_cache_tokens": 32, "block_size": 4}
LONG = {"max_new_tokens": 40, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.fixture(scope="module")
def kvpress():
    try:
        return import_kvpress()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


def ids_of(tokens: int, seed: int = 1) -> torch.Tensor:
    """A sequence in which no token is there twice within 124, so that no two keys are alike."""
    some = torch.randperm(124, generator=torch.Generator().manual_seed(seed)) + 3
    return torch.cat([some, some])[None, :tokens]


# ------------------------------------------------------------------------------------------------------------ stand-ins
@dataclass
class Sum:
    """Reads keys alone, which differ in what it makes of them even where tokens are equal; notes what it was asked."""

    compression_ratio: float = 0.0
    asked: list[dict[str, Any]] = field(default_factory=list)

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        assert keys.shape[:3] == values.shape[:3] and len(keys) == 1
        self.asked.append({"layer": module.layer_idx, "keys": keys, "n": hidden_states.shape[1], **vars(self)})
        return keys.sum(-1)


class Last(Sum):
    """Attention of the last query, which it makes of its hidden state. Says if keys that were protected, of the newest
    tokens, are not what hidden states and position embeddings make.
    """

    protected = 6

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        super().score(module, hidden_states, keys, values, attentions, kwargs)
        cos, sin = kwargs["position_embeddings"]
        assert cos.shape[:2] == hidden_states.shape[:2] and hidden_states.shape[1] > 0
        query, key = (
            part(hidden_states).unflatten(2, (-1, module.head_dim)).transpose(1, 2)
            for part in (module.q_proj, module.k_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        newest = min(hidden_states.shape[1], self.protected)
        fits = [torch.allclose(a, b, atol=1e-4) for a, b in zip(key[0, :, -newest:], keys[0, :, -newest:], strict=True)]
        stands_in = torch.equal(keys[:, 0], keys[:, 1])
        assert any(fits) if stands_in else all(fits)
        group = query.shape[1] // keys.shape[1]
        weights = query[:, :, -1:].unflatten(1, (-1, group)) @ keys[:, :, None].mT
        return weights.softmax(-1).mean((2, 3))


class Ahead(Sum):
    """Says where the model's rotary embedding puts the next token."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        after = torch.tensor([[hidden_states.shape[1]]])
        self.asked.append({"next": module.rotary_emb(keys, after), "inverse": module.rotary_emb.inv_freq})
        return keys.sum(-1)


class Failing(Sum):
    def score(self, *arguments):
        raise NotImplementedError("not for this module")


class Short(Sum):
    """Scores the tokens of its hidden states only."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        return keys.sum(-1)[:, :, -hidden_states.shape[1] :]


class Wrapper(Sum):
    def compress(self, *arguments):
        """More than a score."""


class ObservedAttentionPress(Sum):
    """Named as kvpress's, and reads what that reads."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        self.asked.append({"attentions": attentions})
        return attentions.sum(2).unflatten(1, (keys.shape[1], -1)).mean(2)


STANDINS = {"sum": (Sum, {"observation": 0}), "last": (Last, {"observation": 8, "protected": 6})}
EVERY = pytest.mark.parametrize("name", STANDINS)


def standin(name: str) -> tuple[Sum, dict[str, Any]]:
    kind, settings = STANDINS[name]
    return kind(), settings


# ------------------------------------------------------------------------------------------------- behind a prompt
@torch.no_grad()
def top_k(model, press, ids: torch.Tensor, tokens: int, seeded: bool = False) -> dict[tuple[int, int], list[int]]:
    """Positions that a press keeps of a prompt alone, by layer and head, as kvpress would use it."""
    found: dict[tuple[int, int], list[int]] = {}

    def ask(module, args, kwargs, output):
        layer = kwargs.get("cache", kwargs.get("past_key_values")).layers[module.layer_idx]
        if seeded:
            torch.manual_seed(module.layer_idx)
        scores = press.score(module, kwargs["hidden_states"], layer.keys, layer.values, output[1], kwargs)
        for head, row in enumerate(scores[0].topk(tokens, dim=-1).indices.sort(-1).values.tolist()):
            found[module.layer_idx, head] = row

    modules = [layer.self_attn for layer in model.model.layers]
    hooks = [module.register_forward_hook(ask, with_kwargs=True) for module in modules]
    before, press.compression_ratio = press.compression_ratio, 1 - (tokens + 0.5) / ids.shape[1]
    for module in modules:
        module.rotary_emb = model.model.rotary_emb
    model(input_ids=ids, past_key_values=DynamicCache(config=model.config))
    for module, hook in zip(modules, hooks, strict=True):
        del module.rotary_emb
        hook.remove()
    press.compression_ratio = before
    return found


@torch.no_grad()
def cut(model, cache: PressCache, ids: torch.Tensor, monkeypatch=None) -> int:
    """Has a prompt read and cut; tokens that every row keeps."""
    model(input_ids=ids, past_key_values=cache)
    if monkeypatch is not None:  # presses that draw numbers draw the same for both
        ask = cache.compression._ask
        monkeypatch.setattr(
            cache.compression, "_ask", lambda layer, *rest: (torch.manual_seed(layer.index), ask(layer, *rest))[1]
        )
    cache.compress()
    (tokens,) = set(cache.report().kept.flatten().tolist())
    return tokens


@EVERY
def test_uniform_heads_keep_the_top_k_of_the_score(model, name):
    press, settings = standin(name)
    ids = ids_of(61)
    cache = PressCache(model, press, **CUT, observation=settings["observation"])
    tokens = cut(model, cache, ids)
    assert tokens == 28  # the budget less the block that the next tokens take
    assert kept(cache) == top_k(model, press, ids, tokens)


def presses(kvpress) -> dict[str, tuple[Any, dict[str, Any]]]:
    whole = {"continual": False}
    return {
        "Knorm": (kvpress.KnormPress(), {}),
        "SnapKV": (kvpress.SnapKVPress(window_size=8), {}),
        "KeyDiff": (kvpress.KeyDiffPress(), {}),
        "ExpectedAttention": (kvpress.ExpectedAttentionPress(), {}),
        "ExpectedAttention, mean": (kvpress.ExpectedAttentionPress(use_covariance=False), {}),
        "Random": (kvpress.RandomPress(seed=3), {}),
        "StreamingLLM": (kvpress.StreamingLLMPress(), {}),
        "TOVA": (kvpress.TOVAPress(), {}),
        "CUR": (kvpress.CURPress(), {}),
        "LagKV": (kvpress.LagKVPress(lag_size=12), {}),
        "Cap": (kvpress.CapPress(), {}),
        "CriticalKV": (kvpress.CriticalKVPress(kvpress.SnapKVPress(window_size=8)), {}),
        "CriticalKV, keys": (kvpress.CriticalKVPress(kvpress.KeyDiffPress()), {}),
        "NonCausalAttn": (kvpress.NonCausalAttnPress(chunk_size=16), whole),
        "LeverageScore": (kvpress.LeverageScorePress(sketch_dimension=8), whole),
        "Compactor": (kvpress.CompactorPress(sketch_dimension=8, chunk_size=16), whole),
        "ObservedAttention": (kvpress.ObservedAttentionPress(), {"attentions": True, **whole}),
    }


PRESSES = [
    *("Knorm", "SnapKV", "KeyDiff", "ExpectedAttention", "ExpectedAttention, mean", "Random", "StreamingLLM", "TOVA"),
    *("CUR", "LagKV", "Cap", "CriticalKV", "CriticalKV, keys"),
    *("NonCausalAttn", "LeverageScore", "Compactor", "ObservedAttention"),
]


@pytest.mark.parametrize("arch", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("name", PRESSES)
def test_presses_of_kvpress_keep_their_own_top_k(kvpress, name, arch, monkeypatch):
    if arch == "phi3" and name.startswith("CriticalKV"):
        pytest.skip("CriticalKVPress reads a head_dim that the config of phi3 does not have")
    press, settings = presses(kvpress)[name]
    model, ids = build(arch), ids_of(61)
    if settings.get("attentions"):  # kvpress takes them from the model, which returns them with eager attention alone
        model.set_attn_implementation("eager")
    cache = PressCache(model, press, **CUT, **settings)
    tokens = cut(model, cache, ids, monkeypatch)
    assert kept(cache) == top_k(model, press, ids, tokens, seeded=True)
    assert cache.report().resident_bytes == memory_of(cache)
    monkeypatch.undo()
    for _ in feed(model, cache, ids_of(100), [1] * 30):  # the ids are not a text, and need not be
        if cache.policy.config.continual:
            assert cache.report().kept.max() <= 32 < cache.report().seen.min()


@pytest.mark.parametrize("name", [name for name in PRESSES if name not in ("LeverageScore", "Compactor")])  # by chance
@pytest.mark.parametrize("levels", [1, None])
def test_presses_of_kvpress_treat_a_sequence_alike_in_any_batch(kvpress, model, name, levels):
    press, settings = presses(kvpress)[name]
    decoding = name not in ("Knorm", "CUR")  # norms of repeated tokens, which are generated, differ by rounding alone
    assert_batch_equals_single(model, lambda: press, (61, 44, 52), {"levels": levels, **CUT, **settings}, decoding)


# ------------------------------------------------------------------------------------------------- in a batch, decoding
@torch.no_grad()
def assert_batch_equals_single(
    model, make, lengths: tuple[int, ...], settings: dict[str, Any], decoding: bool = True
) -> None:
    rows = [ids_of(n, seed=n)[0] for n in lengths]
    batch = left_padded(rows)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    cache = PressCache(model, make(), **settings)
    model(**batch, position_ids=positions, past_key_values=cache)
    cache.compress()
    for b, row in enumerate(rows):
        alone = PressCache(model, make(), **settings)
        model(input_ids=row[None], past_key_values=alone)
        alone.compress()
        assert kept(alone) == kept(cache, b)
    if not decoding:
        return
    cache.reset()
    together = model.generate(**batch, past_key_values=cache, **LONG)[:, batch["input_ids"].shape[1] :]
    for b, row in enumerate(rows):
        alone = PressCache(model, make(), **settings)
        single = model.generate(row[None], attention_mask=torch.ones(1, len(row)), past_key_values=alone, **LONG)
        assert single[0, len(row) :].tolist() == together[b].tolist()
        assert kept(alone) == kept(cache, b)


@EVERY
@pytest.mark.parametrize("levels", few([1, None, 2], 1, None))
def test_a_padded_batch_keeps_what_single_runs_keep(model, name, levels):
    kind, settings = STANDINS[name]
    assert_batch_equals_single(model, kind, (61, 7, 44, 1), {"levels": levels, **CUT, **settings})


@torch.no_grad()
def test_steps_that_do_not_look_hold_the_same(model, monkeypatch):
    """As on a GPU: masked columns are taken for real until the next pass."""
    batch = left_padded([ids_of(61)[0], ids_of(44, seed=2)[0]])
    ids = torch.cat([batch["input_ids"], ids_of(30, seed=3).expand(2, -1)], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 30, dtype=torch.long)], dim=1)
    mask[1, 70:73] = mask[0, 80] = 0
    caches = []
    for free in (True, False):
        monkeypatch.setattr("kara_hf.cache.steps.syncs_are_free", lambda device, free=free: free)
        caches.append(PressCache(model, Last(), **CUT, observation=8, protected=6))
        for _ in feed(model, caches[-1], ids, [61] + [1] * 30, mask):
            pass
    assert [kept(caches[0], b) for b in range(2)] == [kept(caches[1], b) for b in range(2)]
    for looked, other in zip(*(cache.compressed_layers for cache in caches), strict=True):
        for b in range(2):
            torch.testing.assert_close(looked.state.of(b), other.state.of(b))


@EVERY
@pytest.mark.parametrize("levels", [1, None])
@pytest.mark.parametrize("budget", [{"max_cache_tokens": 32}, {"retention": 0.4}], ids=str)
def test_the_budget_holds_in_tokens_and_bytes_at_every_step(model, name, levels, budget):
    press, settings = standin(name)
    ids, blocks = ids_of(140), 0
    cache = PressCache(model, press, block_size=4, levels=levels, **budget, **settings)
    for number, _ in enumerate(feed(model, cache, ids, [70] + [1] * 70)):
        report = cache.report()
        assert report.resident_bytes == memory_of(cache)
        if number:
            blocks = int((-(-report.kept // 4)).sum())
            assert blocks <= cache.policy.budget_blocks(int(report.seen[0]) + 4, 6)
            held = settings["observation"] * 4 * (64 + 2 * 16) * 3
            # Keys and values, position and metric; a free block for each row; tables, lengths, what is valid.
            assert report.resident_bytes <= (blocks + 6) * 4 * (2 * 16 * 4 + 8) + held + 1500
        for layer, b, h in rows_of(cache):
            positions = cache.kept_positions(layer, b, h).tolist()
            assert set(positions) >= set(range(max(0, int(report.seen) - cache.policy.protected), int(report.seen)))
    assert press.asked[0]["keys"].shape[2] == 70 and len(press.asked) >= 3 * 10
    assert {asked["n"] for asked in press.asked} == {70, settings["observation"]}


@torch.no_grad()
def test_a_sequence_that_loses_nothing_is_not_scored(model):
    press = Sum()
    cache = PressCache(model, press, **CUT)
    model(**left_padded([ids_of(61)[0], ids_of(7)[0]]), past_key_values=cache)
    cache.compress()
    assert [asked["keys"].shape[2] for asked in press.asked] == [61] * 3


def test_resident_bytes_fall_when_a_prompt_is_cut(model):
    cache = PressCache(model, Sum(), **CUT, observation=0)
    model(input_ids=ids_of(200), past_key_values=cache)
    before = memory_of(cache)
    assert before == cache.report().resident_bytes > cache.report().full_bytes  # hidden states are held, too
    cache.compress()
    after = memory_of(cache)
    assert after == cache.report().resident_bytes < 0.25 * cache.report().full_bytes


@torch.no_grad()
def test_kept_keys_are_those_of_their_true_positions(model):
    ids = ids_of(61)
    full = DynamicCache(config=model.config)
    model(input_ids=ids, past_key_values=full)
    cache = PressCache(model, Last(), **CUT, observation=8)
    cut(model, cache, ids)
    for layer, b, h in rows_of(cache):
        keys, values, positions = cache.layers[layer].stored().read(b, h)
        torch.testing.assert_close(keys, full.layers[layer].keys[b, h, positions])
        torch.testing.assert_close(values, full.layers[layer].values[b, h, positions])


def test_heads_that_compete_are_scored_each_by_its_own_tokens(model):
    press = Sum()
    cache = PressCache(model, press, **CUT, levels=None, observation=0)
    for _ in feed(model, cache, ids_of(100), [70] + [1] * 12):
        pass
    lengths = cache.report().kept
    assert len(lengths.unique()) > 1 and lengths.float().mean() <= 32
    cache.compression.left = np.array([28])
    for layer in cache.compressed_layers:
        metric, _ = cache.compression._ranked(layer)
        for head, length in enumerate(layer.stored().lengths[0]):
            keys, _, _ = layer.stored().read(0, head)
            torch.testing.assert_close(metric[0, head, :length], keys.sum(-1))


def test_passes_see_what_is_stored_in_order_of_true_positions(model):
    press = Last()  # says itself that its hidden states and position embeddings are those of the newest keys
    cache = PressCache(model, press, **CUT, observation=8, protected=6)
    for _ in feed(model, cache, ids_of(100), [61] + [1] * 24):
        pass
    assert [asked["keys"].shape[2] for asked in press.asked[::3]] == [61] + [32] * 5
    assert 28 <= len(kept(cache)[0, 0]) <= 32


WAYS = {
    "beams": {"num_beams": 3, "do_sample": False},
    "samples": {"do_sample": True, "num_return_sequences": 2},
    "chunks": {"do_sample": False, "prefill_chunk_size": 16},
    "lookup": {"do_sample": False, "prompt_lookup_num_tokens": 4},
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_held_follows_the_sequences(model, way):
    press = Last()  # as above
    cache = PressCache(model, press, **CUT, observation=8, protected=6)
    model.generate(**prompt(61), past_key_values=cache, max_new_tokens=40, **WAYS[way])
    assert cache.report().resident_bytes == memory_of(cache)
    assert max(asked["keys"].shape[2] for asked in press.asked) >= 61


def test_a_turn_is_scored_with_its_own_hidden_states_and_those_before(model):
    press = Last()
    cache = PressCache(model, press, **CUT, observation=8, protected=6)
    for _ in feed(model, cache, ids_of(120), [61, 1, 1, 30, 1]):
        pass
    assert [asked["n"] for asked in press.asked[::3]] == [61, 38]


def test_crop_and_copy(model):
    press = Last()
    cache = PressCache(model, press, **CUT, observation=8, protected=6)
    ids = ids_of(120)
    for _ in feed(model, cache, ids, [61] + [1] * 3):
        pass
    cache.crop(-2)
    other = copy.deepcopy(cache)
    assert other.policy.press is press
    del cache
    gc.collect()  # the copy still hears of the model's inputs
    for _ in feed(model, other, ids, [1] * 20):
        pass
    assert other.report().resident_bytes == memory_of(other)
    assert {asked["n"] for asked in press.asked} == {61, 8}
    other.reset()
    assert other.report().resident_bytes == memory_of(other) == 0


def test_the_ratio_and_the_rotary_embedding_are_lent(model):
    press, ids = Ahead(), ids_of(120)
    cache = PressCache(model, press, **CUT, observation=8)
    for _ in feed(model, cache, ids, [61] + [1] * 8):
        pass
    for number, seen in enumerate((61, 65)):
        asked = press.asked[3 * number]
        expected = model.model.rotary_emb(torch.zeros(1), torch.tensor([[seen]]))
        torch.testing.assert_close(asked["next"], expected)
        assert torch.equal(asked["inverse"], model.model.rotary_emb.inv_freq)
    assert press.compression_ratio == 0
    assert not any(hasattr(layer.self_attn, "rotary_emb") for layer in model.model.layers)

    press = Sum()
    cache = PressCache(model, press, **CUT)
    cut(model, cache, ids)
    ratio = press.asked[0]["compression_ratio"]
    assert int(120 * (1 - ratio)) == 28 and press.compression_ratio == 0


def test_a_ratio_of_the_press_is_a_budget(model):
    cache = PressCache(model, Sum(compression_ratio=0.75), block_size=4, continual=False)
    assert cut(model, cache, ids_of(100)) == 28  # 24 of 96 tokens behind the block that every row keeps, and that
    assert cache.policy.press.compression_ratio == 0.75


@torch.no_grad()
def test_attention_probabilities_are_those_of_eager_attention():
    model, ids = build("llama"), ids_of(61)
    model.set_attn_implementation("eager")
    expected = model(input_ids=ids, output_attentions=True).attentions
    press = ObservedAttentionPress()
    cache = PressCache(model, press, **CUT, continual=False, attentions=True)
    cut(model, cache, ids)
    for asked, attentions in zip(press.asked, expected, strict=True):
        torch.testing.assert_close(asked["attentions"], attentions)
    assert cache.report().resident_bytes == memory_of(cache)


# ------------------------------------------------------------------------------------------- nothing is left behind
def hooks(model) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_hooks_go_with_the_cache():
    model = build("llama")
    cache = PressCache(model, Sum(), **CUT)
    assert hooks(model) == 3
    model.generate(**prompt(61), past_key_values=KVCompressCache(model, retention=0.5), **LONG)
    assert hooks(model) == 3 and cache.compression.arrival is None
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    model(input_ids=ids_of(5))
    assert gone() is None and hooks(model) == 0


def test_hooks_go_with_the_attachment():
    model = build("llama")
    cache = PressCache(model, Sum(), **CUT)
    detach(model)
    model(input_ids=ids_of(5))
    assert hooks(model) == 0
    with attach(model), pytest.raises(RuntimeError, match="hidden states of layer 0 .* new PressCache"):
        model(input_ids=ids_of(5), past_key_values=cache)
    assert cache.get_seq_length() == 0


def test_a_model_does_not_outlive_its_use_because_of_a_cache():
    model = build("llama")
    cache = PressCache(model, Sum(), **CUT)
    model.generate(**prompt(61), past_key_values=cache, **LONG)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and cache.report().kept.max() <= 32


LIKE_KVPRESS = """
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pipelines import PIPELINE_REGISTRY
PIPELINE_REGISTRY.supported_tasks["of-a-press"] = {}
for name, function in ALL_ATTENTION_FUNCTIONS.items():
    ALL_ATTENTION_FUNCTIONS[name] = lambda *args, function=function, **kwargs: function(*args, **kwargs)
"""
SAME = """
import sys; sys.path.insert(0, {path!r}); sys.modules.pop("kvpress", None)
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions
from transformers.pipelines import PIPELINE_REGISTRY
AttentionInterface.register("mine", max)
def now():
    return [{{k: id(v) for k, v in m.items()}} for m in (functions._local_mapping, functions._global_mapping,
            PIPELINE_REGISTRY.supported_tasks, dict(functions.items()))]
before, mapping = now(), functions._local_mapping
from kara_hf.methods.press_cache import import_kvpress
assert "kvpress" not in sys.modules and now() == before
module = import_kvpress()
assert module.__name__ == "kvpress" and module is sys.modules["kvpress"]
assert now() == before and functions._local_mapping is mapping
AttentionInterface.register("mine", min)
assert functions._global_mapping["mine"] is min and "mine" not in functions._local_mapping
"""


@pytest.mark.parametrize("real", [False, True], ids=["standin", "kvpress"])
def test_importing_leaves_transformers_as_it_was(real, tmp_path, request):
    code = SAME.format(path=str(tmp_path))
    if real:
        request.getfixturevalue("kvpress")
        subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    else:
        (tmp_path / "kvpress.py").write_text(LIKE_KVPRESS)
        assert forked([partial(exec, code, {})], {}, seconds=60) == [0]


@pytest.mark.parametrize("missing", ["kvpress", "cachetools"])
def test_what_is_missing_is_named(missing, tmp_path, monkeypatch):
    (tmp_path / "kvpress.py").write_text("import cachetools")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kvpress", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError, match=f"{missing} is not installed.*pip install --no-deps kvpress"):
        import_kvpress()
    with pytest.raises(ImportError, match=f"{missing} is not installed.*pip install --no-deps kvpress"):
        make_method("press:SnapKVPress")


def test_a_press_that_is_not_there(tmp_path, monkeypatch):
    (tmp_path / "kvpress.py").write_text("class Press: ...")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kvpress", raising=False)
    assert make_method("press:Press").name == "press:Press"
    with pytest.raises(ValueError, match="method='press:Pres' .*the name of a scorer press of kvpress"):
        make_method("press:Pres")
    monkeypatch.delitem(sys.modules, "kvpress")


# ------------------------------------------------------------------------------------------------------------ bad input
REFUSED = [
    (object(), {}, TypeError, "object is not an instance of a ScorerPress"),
    (Sum, {}, TypeError, "Sum is not an instance of a ScorerPress"),
    (Wrapper(), {}, ValueError, "Wrapper decides by more than its score .Wrapper.compress"),
    (ObservedAttentionPress(), {"attentions": True}, ValueError, "scores whole prompts only.*continual=False"),
    (ObservedAttentionPress(), {"continual": False}, ValueError, "reads attention probabilities.*attentions=True"),
    (Sum(), {"observation": -1}, ValueError, "observation=-1 .*from 0 on or None"),
    (Sum(), {"protected": -1}, ValueError, "protected=-1"),
    (Sum(), {"attentions": 1}, ValueError, "attentions=1 .*True or False"),
    (Sum(), {"max_cache_tokens": None}, ValueError, "give exactly one of them"),
    (Sum(compression_ratio=0.5), {}, ValueError, "compression_ratio=0.5 of Sum .*max_cache_tokens=32"),
]


@pytest.mark.parametrize(("press", "settings", "kind", "message"), REFUSED, ids=[row[3] for row in REFUSED])
def test_bad_input_is_named(model, press, settings, kind, message):
    before = hooks(model)
    with pytest.raises(kind, match=message):
        PressCache(model, press, **CUT | settings)
    assert hooks(model) == before


def test_wrappers_of_kvpress_are_refused(kvpress):
    snap = kvpress.SnapKVPress()
    for press in (kvpress.AdaKVPress(snap), kvpress.ThinKPress(), kvpress.DMSPress(kvpress.KnormPress())):
        with pytest.raises(TypeError, match=f"{type(press).__name__} is not an instance of a ScorerPress"):
            PressCache(build("llama"), press, **CUT)
    for press in (kvpress.PyramidKVPress(), kvpress.FinchPress()):
        with pytest.raises(ValueError, match="decides by more than its score"):
            PressCache(build("llama"), press, **CUT)
    for press in (kvpress.CompactorPress(), kvpress.CriticalKVPress(kvpress.LeverageScorePress())):
        with pytest.raises(ValueError, match="scores whole prompts only"):
            PressCache(build("llama"), press, **CUT)


def test_latent_attention_is_refused():
    model = build("deepseek-v3")
    with pytest.raises(ValueError, match="multi-head latent attention"):
        model.generate(**prompt(61), past_key_values=PressCache(model, Sum(), **CUT), **LONG)


@pytest.mark.parametrize(
    ("press", "message"),
    [
        (Failing(), "Failing cannot score 61 tokens of layer 0 of LlamaForCausalLM .*newest 61: not for this module"),
        (Short(), r"Short gave scores \(1, 2, 8\) .* 8 hidden states"),
    ],
    ids=["raises", "shape"],
)
def test_a_press_that_fails_leaves_the_cache_as_it_was(model, press, message):
    cache = PressCache(model, press, **CUT, observation=8)
    steps, before = feed(model, cache, ids_of(100), [61] + [1] * 20), {}
    with pytest.raises(ValueError, match=message):
        for _ in steps:
            before = kept(cache)
    assert kept(cache) == before and press.compression_ratio == 0
    assert not any(hasattr(layer.self_attn, "rotary_emb") for layer in model.model.layers)
    assert cache.report().resident_bytes == memory_of(cache)


@pytest.mark.parametrize("arch", ["gemma3", "gpt-oss", "gpt-neox", "qwen3", "falcon-new"])
def test_other_architectures(arch):
    model = build(arch)
    cache = PressCache(model, Sum(), **CUT, observation=8)
    model.generate(**prompt(61), past_key_values=cache, **LONG)
    assert cache.report().kept.max() <= 32 < cache.report().seen.min()
