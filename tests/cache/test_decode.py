"""What a decode step asks of the device: nothing that it has to wait for, and nothing that a CUDA graph cannot replay.

A GPU is played by a CPU here. Its path is taken where `syncs_are_free` says no. A mode counts calls that would wait for
a device, and a recording of all operations on tensors, replayed on the same memory with the same numbers, stands for a
CUDA graph. What runs inside a kernel on a GPU is done by the plain-torch ops, unseen by either; the `check_` function
does the same with the Triton kernels themselves, for fewer steps: `tests/kernels/test_triton.py` runs it, and others,
under Triton's interpreter.
"""

import contextlib
import copy
import dataclasses
import os

import pytest
import torch
from support.architectures import build
from support.marks import few, slow
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import kara_hf.storage.paged
from kara_hf import KaraCache, KVCompressCache, PoDCache, PoDSharing, attach, detach
from kara_hf.cache import compressed, cuda_graph, shared_layer
from kara_hf.cache import layer as layer_module
from kara_hf.cache import steps as steps_module
from kara_hf.integration import attach as attach_module

KARA = dict(window=16, recent=4, block_size=4)
SHARED = PoDSharing(lead=((0, 0), (0, 1), (0, 1)), sinks=1, recent=5)  # layer 1 follows in one head, layer 2 in both
OWN = dataclasses.replace(SHARED, distant_query="own")
CACHES = {
    "kara": lambda model, **more: KaraCache(model, retention=0.25, **KARA, **more),
    "kara-sampled": lambda model, **more: KaraCache(model, retention=0.25, queries=3, **KARA, **more),
    "kara-share": lambda model, **more: KaraCache(model, retention=0.25, queries=5, **KARA | {"recent": 0.3}, **more),
    "kara-random": lambda model, **more: KaraCache(model, retention=0.5, score="random", **KARA, **more),
    "kara-all": lambda model, **more: KaraCache(model, retention=1.0, **KARA, **more),
    "kv-compress": lambda model, **more: KVCompressCache(model, max_cache_tokens=32, protected=8, block_size=8, **more),
    "kv-compress-all": lambda model, **more: KVCompressCache(model, retention=1.0, block_size=8, **more),
    "pod": lambda model, **more: PoDCache(model, SHARED, block_size=4, **more),
    "pod-own": lambda model, **more: PoDCache(model, OWN, block_size=4, **more),
    "kara-pod": lambda model, **more: KaraCache(model, retention=0.25, sharing=SHARED, **KARA, **more),
    "kv-compress-pod": lambda model, **more: KVCompressCache(
        model, max_cache_tokens=32, protected=8, block_size=8, sharing=SHARED, **more
    ),
}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
EVERY = pytest.mark.parametrize("name", CACHES)


def some(*names):
    """These kinds of caches in `make test`; each is in one test at least."""
    return pytest.mark.parametrize("name", few(list(CACHES), *names))


def test_a_graph_needs_a_gpu_and_a_model_that_is_compressed_whole():
    with pytest.raises(ValueError, match="cuda_graph=True needs the model on a CUDA device, not on cpu; move it"):
        KaraCache(build("llama"), cuda_graph=True)
    model = build("gemma3").to("meta")
    model.to = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Parameter, "device", torch.device("cuda"), raising=False)
        with pytest.raises(ValueError, match="of its . layers are not compressed"):
            cuda_graph.check_graph(model, 1, 3)


def test_detaching_takes_the_route_away():
    model = build("llama")
    own = model.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compressed, "check_graph", lambda *_: None)
        KaraCache(model, cuda_graph=True)
        KaraCache(model, cuda_graph=True)
    twin = copy.deepcopy(model)
    assert twin.forward.model is twin, "a copy of a model runs itself"
    assert model.forward.__signature__.parameters.keys() >= {"input_ids", "attention_mask"}
    detach(model)
    assert model.forward == own and "forward" not in vars(model)
    detach(model)
    model.forward = own
    attach(model)
    attach_module.route(model)
    detach(model)
    assert vars(model)["forward"] == own


# --------------------------------------------------------------------------------------------------------------- a GPU
@pytest.fixture
def gpu(monkeypatch):
    """Takes the path of a GPU: nothing is read back between compressions."""
    monkeypatch.setattr(steps_module, "syncs_are_free", lambda device: False)
    monkeypatch.setattr(compressed, "check_graph", lambda *_: None)
    monkeypatch.setattr(cuda_graph, "recording_for", lambda cache: Replay())


def _patches():
    """Where work is handed to the device: every kernel launch under Triton's interpreter, else the ops as a whole."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        from triton.runtime.interpreter import GridExecutor

        return [(GridExecutor, "__call__")]
    return [
        (kara_hf.storage.paged, "append"),
        (layer_module, "attend"),
        *((shared_layer, op) for op in ("attend_shared", "lead_scores")),
    ]


@contextlib.contextmanager
def launches(around):
    """Calls ``around(launch)`` in place of every launch, and returns what it returns."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in _patches():
            launch = getattr(owner, name)
            patch.setattr(owner, name, lambda *args, _launch=launch, **kwargs: around(lambda: _launch(*args, **kwargs)))
        yield


class Waits(TorchFunctionMode):
    """Counts what would wait for a device: values read back, shapes that depend on values, lists as indices."""

    READ = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__", "equal"}
    SHAPED = {"nonzero", "masked_select", "unique", "unique_consecutive", "bincount", "repeat_interleave"}

    def __init__(self):
        super().__init__()
        self.found, self.paused = [], False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        masks = [a for a in args[1:2] for a in (a if isinstance(a, tuple) else (a,))]
        masked = name in ("__getitem__", "__setitem__") and any(
            isinstance(mask, list) or (isinstance(mask, torch.Tensor) and mask.dtype == torch.bool) for mask in masks
        )
        if not self.paused and (name in self.READ | self.SHAPED or masked):
            self.found.append(name)
        return func(*args, **(kwargs or {}))

    def launch(self, launch):
        self.paused = True
        out = launch()
        self.paused = False
        return out


class Replay(TorchDispatchMode):
    """A `kara_hf.cache.cuda_graph.Recording`: what was done while capturing is done again, on the same memory."""

    def __init__(self):
        super().__init__()
        self.steps, self.fresh, self.paused = [], True, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not self.paused:
            self.steps.append((func, args, kwargs or {}, out))
        return out

    def launch(self, launch):
        self.paused = True
        out = launch()
        self.paused = False
        self.steps.append((launch, (), {}, out))
        return out

    def capture(self, work):
        with launches(self.launch), self:
            return work()

    def replay(self):
        if self.fresh:  # a CPU did the work while it was recorded
            self.fresh = False
            return
        for func, args, kwargs, out in self.steps:
            new = func(*args, **kwargs)
            for old, value in zip(
                torch.utils._pytree.tree_leaves(out), torch.utils._pytree.tree_leaves(new), strict=True
            ):
                if isinstance(old, torch.Tensor) and old.data_ptr() != value.data_ptr():
                    old.copy_(value)


def inputs(padding=0, length=20):
    ids = torch.randint(3, 100, (2, length))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return ids, mask


@torch.no_grad()
def decode(model, cache, ids, mask, steps, masked=True):
    """Logits of a prompt and `steps` greedy steps, and what each step waited for."""
    logits, waited = [], []
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for step in range(steps + 1):
        new = ids.shape[1] if step == 0 else 1
        calm = step and cache.compression.steps_to_compression() > 0
        with Waits() as waits, launches(waits.launch):
            out = model(
                input_ids=ids[:, -new:],
                attention_mask=mask if masked or step == 0 else None,
                position_ids=positions[:, -new:],
                past_key_values=cache,
                use_cache=True,
            )
        if calm:
            waited.append(waits.found)
        logits.append(out.logits[:, -1])
        ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        positions = torch.cat([positions, positions[:, -1:] + 1], dim=1)
    return torch.stack(logits), waited


@EVERY
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(name):
    """The real thing: calm steps under a mode in which waiting is an error, and a real graph."""
    model = build("llama").cuda()
    ids, mask = (part.cuda() for part in inputs(5))
    results = []
    for more in ({}, {"cuda_graph": True}):
        cache = CACHES[name](model, **more)
        logits, positions, seen = [], (mask.cumsum(1) - 1).clamp(min=0), mask
        tokens = ids
        with torch.no_grad():
            for step in range(45):
                calm = step > 2 and cache.compression.capturable_steps() > 0 and not more
                torch.cuda.set_sync_debug_mode("error" if calm else "default")
                try:
                    out = model(
                        input_ids=tokens,
                        attention_mask=seen,
                        position_ids=positions,
                        past_key_values=cache,
                        use_cache=True,
                    )
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                logits.append(out.logits[:, -1])
                tokens, positions = logits[-1].argmax(-1, keepdim=True), positions[:, -1:] + 1
                seen = torch.cat([seen, torch.ones_like(seen[:, :1])], dim=1)
        assert not more or cache.graph.replays > 20
        results.append(torch.stack(logits))
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-3)


@some("kara-sampled", "kara-random", "kv-compress-pod", "pod-own")
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no-mask"])
def test_decode_steps_wait_for_nothing(gpu, name, masked):
    model = build("llama")
    cache = CACHES[name](model)
    ids, mask = inputs(5 if masked else 0)
    logits, waited = decode(model, cache, ids, mask, 28, masked)
    assert len(waited) > 18 and not any(waited), waited
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps_module, "syncs_are_free", lambda device: True)
        expected, _ = decode(model, CACHES[name](model), ids, mask, 28, masked)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
    assert cache.report().seen.tolist() == [48 - (5 if masked else 0), 48]


@pytest.mark.parametrize("more", [{}, {"distant_query": "own"}, {"skip": 0.6}], ids=str)
def test_shared_keys_in_plain_torch_wait_for_nothing(gpu, more, monkeypatch):
    """As on a GPU without Triton, and with `skip`, which has no kernel."""
    monkeypatch.setattr(f"{__name__}._patches", lambda: [(kara_hf.storage.paged, "append"), (layer_module, "attend")])
    model = build("llama")
    cache = PoDCache(model, dataclasses.replace(SHARED, **more), block_size=4)
    _, waited = decode(model, cache, *inputs(5), 12)
    assert len(waited) == 12 and not any(waited), waited


@some("kara", "kara-share", "kv-compress", "kara-pod")
def test_a_graph_is_exact(gpu, name):
    """With sequences of different length, through several compressions; and what was replayed is most of it."""
    model = build("llama")
    ids, mask = inputs(7)
    cache = CACHES[name](model, cuda_graph=True)
    logits, _ = decode(model, cache, ids, mask, 42)
    assert cache.graph.replays > 21
    eager = CACHES[name](model)
    expected, _ = decode(model, eager, ids, mask, 42)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(cache.report().kept, eager.report().kept)
    for layer in range(3):
        for b, h in ((0, 0), (1, 1)):
            assert torch.equal(cache.kept_positions(layer, b, h), eager.kept_positions(layer, b, h))


def test_a_graph_in_generate(gpu):
    """Other caches on the same model, several turns, a copy, and cropping, in between replays."""
    model = build("llama")
    ids, mask = inputs(3)
    settings = dict(attention_mask=mask, max_new_tokens=30, min_new_tokens=30, do_sample=False)
    expected = model.generate(ids, past_key_values=DynamicCache(config=model.config), **settings)
    cache = KaraCache(model, retention=1.0, **KARA, cuda_graph=True)
    assert torch.equal(model.generate(ids, past_key_values=cache, **settings), expected)
    assert cache.graph.replays > 15
    assert torch.equal(model.generate(ids, past_key_values=DynamicCache(config=model.config), **settings), expected)

    twin = copy.deepcopy(cache)
    for each in (cache, twin, cache):
        before = each.graph.replays
        each.crop(-9)
        part = expected[:, : ids.shape[1] + 29 - 8]
        longer = torch.cat([mask, torch.ones(2, part.shape[1] - mask.shape[1], dtype=mask.dtype)], dim=1)
        again = model.generate(
            part, past_key_values=each, **settings | dict(attention_mask=longer, max_new_tokens=9, min_new_tokens=9)
        )
        assert torch.equal(again, expected) and each.graph.replays > before


@pytest.mark.parametrize("name", [slow("kara"), "kv-compress", slow("pod")])
def check_the_kernels_themselves(gpu, name):
    layers = 2 if name == "pod" else 1
    model = build("llama")
    del model.model.layers[layers:]
    model.config.num_hidden_layers, model.config.layer_types = layers, None
    ids, mask = inputs(3, 6)
    make = CACHES[name]
    if name == "pod":
        sharing = PoDSharing(lead=((0, 0), (0, 1)), sinks=1, recent=4)

        def make(model, **more):
            return PoDCache(model, sharing, block_size=4, **more)

    cache, eager = make(model, cuda_graph=True), make(model)
    logits, _ = decode(model, cache, ids, mask, 7)
    assert cache.graph.replays > 2
    expected, waited = decode(model, eager, ids, mask, 7)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
    assert len(waited) > 4 and not any(waited), waited


def test_padding_in_a_decode_step(gpu):
    """A column that is padding in one sequence is found out later, and nothing of it was stored."""
    model = build("llama")
    ids, mask = inputs(4, length=24)
    mask[1, 20] = mask[0, 22] = 0
    results = []
    for free in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(steps_module, "syncs_are_free", lambda device, free=free: free)
            cache = KaraCache(model, retention=0.5, **KARA)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            logits = []
            with torch.no_grad():
                for start, stop in [(0, 18), *((t, t + 1) for t in range(18, 24))]:
                    part = slice(start, stop)
                    out = model(
                        input_ids=ids[:, part],
                        attention_mask=mask[:, :stop],
                        position_ids=positions[:, part],
                        past_key_values=cache,
                        use_cache=True,
                    )
                    logits.append(out.logits[mask[:, part].bool()])
            results.append((torch.cat(logits), cache.report().kept, cache.kept_positions(1, 1, 0), cache.sequences))
    torch.testing.assert_close(results[0][0], results[1][0], atol=2e-5, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(results[0][1:3], results[1][1:3], strict=True))
    assert results[0][3] == results[1][3]


@pytest.mark.parametrize("name", ["kara-random", "pod"])
def test_a_capture_that_fails_changes_nothing(gpu, name, monkeypatch):
    class Failing(Replay):
        def capture(self, work):
            tensors = [t for layer in cache.compressed_layers for t in (*layer.store.tensors(), *layer.state.tensors())]
            before = [tensor.clone() for tensor in tensors]
            work()
            for tensor, old in zip(tensors, before, strict=True):  # on a GPU nothing is done while capturing
                tensor.copy_(old)
            raise RuntimeError("operation not permitted when stream is capturing")

    model = build("llama")
    ids, mask = inputs()
    cache = CACHES[name](model, cuda_graph=True)
    decode(model, cache, ids, mask, 2)
    seen = cache.get_seq_length()
    monkeypatch.setattr(cuda_graph, "recording_for", lambda cache: Failing())
    token = torch.tensor([[5], [6]])
    with pytest.raises(
        RuntimeError, match="cannot be captured in a CUDA graph .*; make the cache with cuda_graph=False"
    ):
        with torch.no_grad():
            for _ in range(3):
                model(input_ids=token, past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() in (seen, seen + 1)
    assert cache.report().seen.tolist() == [cache.get_seq_length()] * 2
    for layer in cache.layers:
        assert layer.store.proximal is None or layer.store.proximal.tokens.tolist() == [cache.get_seq_length()] * 2


@some("kara-share", "kara-all", "kv-compress-all", "pod")
def test_a_cache_that_was_reset_is_like_a_new_one(gpu, name):
    """Nothing that decode steps noted of the sequences before is taken for the new ones'."""
    model = build("llama")
    used, new = CACHES[name](model), CACHES[name](model)
    decode(model, used, *inputs(length=30), 8)
    used.reset()
    prompt = inputs(length=12)
    logits, expected = (decode(model, cache, *prompt, 26)[0] for cache in (used, new))
    torch.testing.assert_close(logits, expected)
    for layer in range(3):
        assert torch.equal(used.kept_positions(layer, 0, 0), new.kept_positions(layer, 0, 0))
