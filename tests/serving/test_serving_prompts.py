"""Compressed prompts: the answers of KVCompressCache and of plain torch; nobody else's blocks change; bad ones fail alone."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from packaging.version import Version
from support.marks import most_examples, slow
from support.serving import CACHE, KARA, batch, ended, generation, make, pool, prompts, single
from transformers import DynamicCache, Gemma2Config

from kara_hf import KVCompressCache, detach
from kara_hf.policy import KVCompressPolicy
from kara_hf.serving import ServingConfig, kara_continuous_batching
from kara_hf.serving.engine import Engine
from kara_hf.serving.seams import LEAST_TRANSFORMERS

if Version(transformers.__version__) < Version(LEAST_TRANSFORMERS):
    pytest.skip(f"serving needs Transformers {LEAST_TRANSFORMERS}", allow_module_level=True)

WHOLE = {"retention": 1.0}  # of traces
LONG = {"shortest": 40, "longest": 70}
TOKENS = 16


@pytest.fixture(scope="module")
def model():
    return make()


def budgeted(model, prompt, most, tokens=TOKENS, **settings):
    """The answer over `KVCompressCache` that keeps at most so many tokens of the prompt, in blocks of one."""
    settings = {"block_size": 1, "accumulate": False, "continual": False} | settings
    cache = KVCompressCache(model, max_cache_tokens=most, **settings)
    out = model.generate(torch.tensor([prompt]), **{CACHE: cache}, generation_config=generation(tokens))
    detach(model)
    return out[0, len(prompt) :].tolist()


# ------------------------------------------------------------------------------------------------ KVCompressCache's
ENGINES = {
    "ample": {},
    "chunked prefill": {"batch": 8},
    "no sharing": {"allow_block_sharing": False},
    "prefill first": {"scheduler_type": "prefill_first", "batch": 16},
}


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("setting", [{"max_prompt_tokens": 20}, {"prompt_retention": 0.4}])
def test_equals_kv_compress_cache(model, setting, name, audited):
    inputs = [*prompts(2, **LONG), *prompts(1, shortest=9, longest=9)]
    most = [setting.get("max_prompt_tokens") or max(6, -(-2 * len(prompt) // 5)) for prompt in inputs]
    pairs = list(zip(inputs, most, strict=True))
    expected = [budgeted(model, *pair) if pair[1] < len(pair[0]) else single(model, pair[0], TOKENS, **WHOLE) for pair in pairs]
    with kara_continuous_batching(model, **WHOLE, **setting, period=64) as serving:
        found = batch(model, inputs, TOKENS, pool(**ENGINES[name]))
    assert found == expected
    assert serving.metrics.prompts == 2 + ("prompt_retention" in setting)
    assert serving.metrics.whole_prompts == serving.metrics.windows == 0
    assert serving.metrics.evicted_tokens == sum(max(0, len(prompt) - keep) for prompt, keep in pairs)
    ended(audited[-1])


def test_few_queries_vote(model, audited):
    inputs = prompts(3, **LONG)
    with kara_continuous_batching(model, **WHOLE, sinks=0, observation=5, max_prompt_tokens=12):
        found = batch(model, inputs, TOKENS, pool(batch=7))
    assert found == [budgeted(model, prompt, 12, sinks=0, observation=5) for prompt in inputs]
    ended(audited[-1])


def test_sliding_layers_and_soft_caps():
    model = make(Gemma2Config, sliding_window=16, attn_logit_softcapping=20.0, query_pre_attn_scalar=8)
    model.set_attn_implementation("eager")
    inputs = prompts(3, **LONG)
    with kara_continuous_batching(model, **WHOLE, max_prompt_tokens=20) as serving:
        found = batch(model, inputs, tokens=24, config=pool(batch=32))
    assert serving.metrics.prompts == 3
    assert found == [budgeted(model, prompt, 20, tokens=24) for prompt in inputs]


@pytest.mark.parametrize("setting", [{"prompt_retention": 1.0}, {"max_prompt_tokens": 70}])
def test_off_is_the_engine_alone(model, setting):
    inputs = prompts(3, **LONG)
    inputs += [inputs[0] + [5, 6, 7]]
    alone = batch(model, inputs, children=1)
    with kara_continuous_batching(model, **WHOLE, **setting) as serving:
        assert batch(model, inputs, children=1) == alone
    assert serving.metrics.compressions == serving.metrics.peak_query_bytes == 0


# --------------------------------------------------------------------------------------------------------- plain torch
@torch.no_grad()
def reference(model, prompt, most, tokens=TOKENS, sinks=4, observation=32, kara=None):
    """Greedy decoding in plain torch: the prompt cut by squared attention, then windows down to their newest tokens."""
    kara, length = kara or {"window": 10**6, "recent": 0, "retention": 1.0}, len(prompt)
    cache, ids = DynamicCache(), torch.tensor([prompt])
    out = model(ids, **{CACHE: cache}, output_attentions=True)
    newest = round((most - sinks) / 2)
    could_vote = (length - torch.arange(length)).clamp(max=observation)
    for layer, attention in zip(cache.layers, out.attentions, strict=True):
        votes = attention[0, :, -observation:].float().square().sum(1)
        votes = F.max_pool1d(votes[None], 7, 1, 3)[0].unflatten(0, (layer.keys.shape[1], -1)).sum(1) / could_vote
        votes[:, :sinks] = votes[:, length - newest :] = float("inf")
        ranked = votes.sort(dim=1, stable=True).indices  # pooling makes ties, of which the later token stays
        kept = ranked[:, -most:].sort().values[None, :, :, None]
        for name in ("keys", "values"):
            whole = getattr(layer, name)
            setattr(layer, name, whole.gather(2, kept.expand(-1, -1, -1, whole.shape[3])))
    settled, found = most, [int(out.logits[0, -1].argmax())]
    width, keep = kara["window"], round(kara["retention"] * kara["window"])
    while len(found) < tokens:
        position = torch.tensor([[length + len(found) - 1]])
        out = model(torch.tensor([found[-1:]]), **{CACHE: cache}, position_ids=position)
        found.append(int(out.logits[0, -1].argmax()))
        if cache.layers[0].keys.shape[2] - settled >= width + kara["recent"]:
            for layer in cache.layers:
                for name in ("keys", "values"):
                    rows = getattr(layer, name)
                    parts = rows[:, :, :settled], rows[:, :, settled + width - keep :]
                    setattr(layer, name, torch.cat(parts, 2))
            settled += keep
    return found


def test_equals_plain_torch_with_windows_behind(audited):
    """A prompt is cut once, and true positions go on behind it and behind every window."""
    model, inputs = make(), prompts(4, **LONG)
    kara = KARA | {"score": "recency"}
    model.set_attn_implementation("eager")
    expected = [reference(model, prompt, 20, 40, kara=kara) for prompt in inputs]
    model.set_attn_implementation("sdpa")
    with kara_continuous_batching(model, **kara, period=1, max_prompt_tokens=20) as serving:
        assert batch(model, inputs, config=pool(batch=48)) == expected
    assert serving.metrics.prompts == 4 and serving.metrics.windows == 4 * ((40 - 1 - 3) // 8)
    ended(audited[-1])


# --------------------------------------------------------------------------------------------------------- the blocks
def test_blocks_go_back_before_the_first_token_is_computed(model, audited, monkeypatch):
    held, own = [], Engine._count

    def counted(engine, running):
        own(engine, running)
        held.append(engine.metrics.used_blocks)

    monkeypatch.setattr(Engine, "_count", counted)
    prompt = prompts(1, shortest=60, longest=60)
    with kara_continuous_batching(model, **WHOLE, prompt_retention=0.25) as serving:
        batch(model, prompt, tokens=4, config=pool(allow_block_sharing=False))
    assert held == [15, 4, 5, 5]  # 60 tokens, then 15 and the first one, ...
    assert serving.metrics.freed_blocks == 11
