"""Compressed prompts: KVCompressCache's answers, and plain torch's; others' blocks stay; bad ones fail alone."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from packaging.version import Version
from support.marks import most_examples
from support.serving import CACHE, KARA, batch, budgeted, ended, generation, make, pool, prompts, single
from transformers import DynamicCache, Gemma2Config

from kara_hf import detach
from kara_hf.policy import KVCompressPolicy
from kara_hf.serving import ServingConfig, kara_continuous_batching
from kara_hf.serving.engine import Engine
from kara_hf.serving.seams import LEAST_TRANSFORMERS
from kara_hf.serving.server import count_blocks

if Version(transformers.__version__) < Version(LEAST_TRANSFORMERS):
    pytest.skip(f"serving needs Transformers {LEAST_TRANSFORMERS}", allow_module_level=True)

WHOLE = {"retention": 1.0, "min_cache_tokens": 0}  # of traces; prompts are short
LONG = {"shortest": 40, "longest": 70}
TOKENS = 16


@pytest.fixture(scope="module")
def model():
    return make()


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
    expected = [
        budgeted(model, *pair) if pair[1] < len(pair[0]) else single(model, pair[0], TOKENS, **WHOLE) for pair in pairs
    ]
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


def test_a_share_of_a_short_prompt_leaves_the_floor():
    config = ServingConfig.of(window=64, prompt_retention=0.25)
    kept = {tokens: config.of_prompt(tokens) for tokens in (60, 64, 65, 100, 1000)}
    assert {tokens: each and each.max_cache_tokens for tokens, each in kept.items()} == {
        60: None,
        64: None,
        65: 64,
        100: 64,
        1000: 250,
    }


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
    assert held == [15 + 8, 4, 5, 5]  # 60 tokens and 32 queries, then 15 tokens and the first one, ...
    assert serving.metrics.freed_blocks == 11


@pytest.mark.parametrize(("common", "compressed"), [(20, True), (48, False)])
def test_shared_blocks_are_copied_or_kept(model, common, compressed, audited):
    """Copied where that gives blocks back; where it does not, the request keeps its prompt whole."""
    shared, *own = prompts(4, shortest=60, longest=60)
    inputs = [shared[:common] + rest[common:] for rest in own]
    with kara_continuous_batching(model, **WHOLE, max_prompt_tokens=20) as serving:
        found = batch(model, inputs, TOKENS)
    expected = [budgeted(model, each, 20) if compressed else single(model, each, TOKENS, **WHOLE) for each in inputs]
    assert found == expected
    assert (serving.metrics.prompts, serving.metrics.whole_prompts) == ((3, 0) if compressed else (0, 3))
    ended(audited[-1])


def test_a_compressed_prompt_is_found_by_the_next(model, audited):
    """Its blocks stay in the engine's cache as they were, and the last queries of the next prompt vote again."""
    first = prompts(1, shortest=60, longest=60)[0]
    inputs = [first, first, first[:50] + [7, 8, 9], first[:30]]
    steps = []
    with kara_continuous_batching(model, **WHOLE, max_prompt_tokens=12, observation=9) as serving:
        manager = model.init_continuous_batching(generation(TOKENS), pool(batch=10))
        manager.start()
        for prompt in inputs:
            manager.add_request(prompt)
            assert manager.get_result(timeout=20).generated_tokens == budgeted_beside(prompt)
            steps.append(serving.metrics.steps - sum(steps))
        manager.stop()
    assert steps == [6 + 15, 2 + 15, 1 + 15, 1 + 15]  # of 10 tokens each
    assert serving.metrics.prompts == 4
    ended(audited[-1])


def budgeted_beside(prompt):
    """Of a model of its own, as that of the engine is in use."""
    return budgeted(make(), prompt, 12, observation=9)


@pytest.mark.parametrize("sharing", [True, False])
def test_children(model, sharing, audited):
    """Those that share all of a prompt keep it; those with blocks of their own begin with their parent's votes."""
    inputs = prompts(2, **LONG)
    config = pool(batch=30, allow_block_sharing=sharing)
    with kara_continuous_batching(model, **WHOLE, max_prompt_tokens=20) as serving:
        found = batch(model, inputs, TOKENS, config, children=2)
    expected = [single(model, each, TOKENS, **WHOLE) if sharing else budgeted(model, each, 20) for each in inputs]
    assert found == [tokens for tokens in expected for _ in range(3)]
    assert (serving.metrics.prompts, serving.metrics.whole_prompts) == ((0, 6) if sharing else (6, 0))
    ended(audited[-1])


# ------------------------------------------------------------------------------------------------ whatever may happen
def test_swapped_requests_come_back_as_they_were(model, audited, unpinned):
    inputs = prompts(5, **LONG)
    with kara_continuous_batching(model, **WHOLE, max_prompt_tokens=20, observation=4) as serving:
        found = batch(model, inputs, 40, pool(blocks=40, batch=16, cpu_offload_space=0.01))
    assert serving.metrics.preemptions > 0 and serving.metrics.prompts == 5
    assert found == [budgeted(model, prompt, 20, 40, observation=4) for prompt in inputs]
    ended(audited[-1])


def test_preempted_requests_are_compressed_again(model, audited):
    inputs = prompts(5, **LONG)
    with kara_continuous_batching(model, **WHOLE, max_prompt_tokens=20, observation=4) as serving:
        found = batch(model, inputs, 60, pool(blocks=36))
    assert serving.metrics.preemptions > 0 and serving.metrics.prompts > 5
    assert all(len(tokens) == 60 for tokens in found)
    ended(audited[-1])


def test_others_do_not_notice_a_cancellation(model, audited, monkeypatch):
    inputs, compress = dict(zip("abc", prompts(3, **LONG), strict=True)), Engine._compress_prompts
    expected = {key: budgeted(model, prompt, 20) for key, prompt in inputs.items() if key != "b"}
    with kara_continuous_batching(model, **WHOLE, max_prompt_tokens=20):
        manager, found = model.init_continuous_batching(generation(TOKENS), pool(batch=50)), {}

        def cancel(engine):
            if engine.queries.used:
                manager.cancel_request("b")
            compress(engine)

        monkeypatch.setattr(Engine, "_compress_prompts", cancel)
        for key, prompt in inputs.items():
            manager.add_request(prompt, request_id=key)
        manager.start()
        while len(found) < 2:
            result = manager.get_result(timeout=20)
            found[result.request_id] = result.generated_tokens
        manager.stop()
    assert found == expected
    ended(audited[-1])


@pytest.mark.parametrize("error", ["a vote that raises", "NaN"])
def test_a_prompt_that_cannot_be_compressed_fails_alone(model, error, audited, monkeypatch):
    observe = KVCompressPolicy.observe
    inputs = [prompts(1, length, length, length)[0] for length in (50, 60, 70)]

    def failing(policy, queries, keys, **settings):
        votes = observe(policy, queries, keys, **settings)
        if keys.shape[1] == 60 and error != "NaN":
            raise ZeroDivisionError(error)
        return votes * float("nan") if keys.shape[1] == 60 else votes

    expected = [budgeted(model, prompt, 20) for prompt in inputs]
    monkeypatch.setattr(KVCompressPolicy, "observe", failing)
    detach(model)
    with kara_continuous_batching(model, **WHOLE, max_prompt_tokens=20) as serving:
        out = model.generate_batch(inputs, generation_config=generation(TOKENS), continuous_batching_config=pool())
    results = list(out.values())
    assert ("votes on a prompt in layer 0 are NaN" if error == "NaN" else error) in results[1].error
    assert [results[0].generated_tokens, results[2].generated_tokens] == [expected[0], expected[2]]
    assert serving.metrics.failed == 1 and serving.metrics.prompts == 2
    ended(audited[-1])


@most_examples(15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    blocks=st.integers(16, 80),
    page=st.sampled_from([4, 8]),
    chunk=st.sampled_from([4, 16, 256]),
    period=st.integers(1, 12),
    setting=st.sampled_from([{"max_prompt_tokens": 7}, {"prompt_retention": 0.3}]),
    observation=st.sampled_from([1, 5, 32]),
    score=st.sampled_from(["bidirectional", "key-difference"]),
    sharing=st.booleans(),
    children=st.integers(0, 2),
    seed=st.integers(0, 5),
)
def test_nothing_is_lost(
    model, audited, blocks, page, chunk, period, setting, observation, score, sharing, children, seed
):
    """Whatever the pool and the policy: every request ends, with all its tokens, and every block is accounted for."""
    shared, *inputs = prompts(6, seed=seed, shortest=2, longest=40)
    inputs = [shared[: 3 * (place % 3)] + prompt for place, prompt in enumerate(inputs)]
    config = pool(blocks=blocks, page=page, batch=chunk, allow_block_sharing=sharing)
    kara = {"retention": 0.25, "window": 6, "recent": 2, "score": score, "period": period, "observation": observation}
    audited.clear()
    with kara_continuous_batching(model, **kara, **setting):
        out = model.generate_batch(
            inputs, generation_config=generation(20, children), continuous_batching_config=config
        )
    assert len(out) == len(inputs) * (1 + children)
    for result in out.values():
        if result.error is None:
            assert len(result.generated_tokens) == 20
        else:
            assert blocks * page < 50 + 21 and "give the engine more memory" in result.error
    ended(audited[-1])


def test_a_prompt_in_parts_is_not_judged_early(model, audited):
    """Other requests decode meanwhile, and windows behind other prompts are sealed."""
    inputs = [*prompts(2, shortest=3, longest=6), *prompts(2, shortest=70, longest=70)]
    kara = KARA | {"period": 1}
    with kara_continuous_batching(model, **kara, max_prompt_tokens=30) as serving:
        found = batch(model, inputs, 40, pool(batch=6))
    assert serving.metrics.prompts == 2 and serving.metrics.windows >= 8
    assert found[:2] == [single(model, prompt, 40, **KARA) for prompt in inputs[:2]]
    ended(audited[-1])


# ------------------------------------------------------------------------------------------------------------- memory
def tensors(owner, seen):
    """Storages of all tensors that can be reached from what `owner` holds, by address."""
    if id(owner) in seen:
        return
    seen[id(owner)] = owner
    if isinstance(owner, torch.Tensor):
        yield owner.untyped_storage()
        return
    if isinstance(owner, dict):
        parts = list(owner.values())
    elif isinstance(owner, list | tuple | set):
        parts = list(owner)
    else:
        parts = list(vars(owner).values()) if hasattr(owner, "__dict__") and not isinstance(owner, type) else []
    for part in parts:
        yield from tensors(part, seen)


def test_an_engine_holds_no_more_than_its_memory(model, tmp_path, monkeypatch):
    """Queries of prompts and of open windows, all of them here, lie in the pool too."""
    model.save_pretrained(tmp_path)
    memory, held, own = 200_000, [], Engine._count

    def counted(engine, running):
        own(engine, running)
        cache, seen = engine.cache, {}
        parts = [cache, engine.queries, engine.compressor, engine.requests.known]
        held.append(sum({s.data_ptr(): s.nbytes() for part in parts for s in tensors(part, seen)}.values()))

    monkeypatch.setattr(Engine, "_count", counted)
    config = pool(blocks=count_blocks(str(tmp_path), memory, 4, "float32", False))
    with kara_continuous_batching(model, **KARA, queries=None, max_prompt_tokens=20, period=4) as serving:
        batch(model, prompts(4, **LONG), 30, config)
    assert serving.metrics.prompts == 4 and serving.metrics.windows > 0 and serving.metrics.peak_query_bytes > 10_000
    assert 0.97 * memory < max(held) <= memory


def test_a_block_without_room_for_a_query_is_refused():
    model = make(num_attention_heads=16, num_key_value_heads=1)
    with kara_continuous_batching(model, max_prompt_tokens=20):
        with pytest.raises(ValueError, match="page_size=4 is too small.*16 query heads.*make it 8 or more"):
            batch(model, prompts(1), config=pool(page=4))


# ----------------------------------------------------------------------------------------------------------- settings
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_retention": 0}, r"prompt_retention=0 is not possible: .* a number in \(0, 1\], or None"),
        ({"prompt_retention": 1.5}, "prompt_retention=1.5 is not possible"),
        ({"prompt_retention": "half"}, "prompt_retention='half' is not possible"),
        ({"max_prompt_tokens": 5}, "max_prompt_tokens=5 is not possible: .* from 6 on, for sinks=4"),
        ({"max_prompt_tokens": 20.0}, "max_prompt_tokens=20.0 is not possible"),
        ({"max_prompt_tokens": 20, "prompt_retention": 0.5}, "not possible together: give the share"),
        ({"max_prompt_tokens": 20, "observation": 0}, "observation=0 is not possible"),
        ({"compress_prompt": True}, "compress_prompt=True is not possible: .*prompt_retention or max_prompt_tokens"),
    ],
)
def test_what_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ServingConfig.of(**settings)


def test_metrics_for_prometheus(model):
    with kara_continuous_batching(model, **WHOLE, max_prompt_tokens=20) as serving:
        batch(model, prompts(2, **LONG), 4)
    lines = serving.metrics.to_prometheus().splitlines()
    assert "kara_prompts 2" in lines and "# TYPE kara_whole_prompts counter" in lines


# ---------------------------------------------------------------------------------------------------------------- pins
PINS = [(6, 9), (50, 54)]  # the second within some prompts, and behind others


@pytest.mark.parametrize("setting", [{"max_prompt_tokens": 24}, {"prompt_retention": 0.4}])
def test_pinned_tokens_of_prompts_stay(model, setting, audited):
    inputs = [*prompts(2, **LONG), *prompts(1, seed=3, shortest=40, longest=44)]
    behind = [3 + max(0, min(54, len(prompt)) - 50) for prompt in inputs]
    most = [
        setting.get("max_prompt_tokens") or max(6 + pinned, -(-2 * len(prompt) // 5))
        for prompt, pinned in zip(inputs, behind, strict=True)
    ]
    expected = [budgeted(model, *pair, pin=PINS) for pair in zip(inputs, most, strict=True)]
    assert expected != [budgeted(model, *pair) for pair in zip(inputs, most, strict=True)]
    with kara_continuous_batching(model, **WHOLE, **setting, pin=PINS) as serving:
        assert batch(model, inputs, TOKENS) == expected
    assert serving.metrics.prompts == 3
    ended(audited[-1])


def test_pinned_tokens_of_windows_stay(model, audited):
    inputs, pin = prompts(3, shortest=5, longest=12), [(20, 27), (33, 36)]
    expected = [single(model, prompt, **KARA, pin=pin) for prompt in inputs]
    with kara_continuous_batching(model, **KARA, pin=pin, period=1) as serving:
        assert batch(model, inputs) == expected
    assert serving.metrics.windows > 3
    ended(audited[-1])


def test_pins_that_cannot_be_kept_are_refused():
    with pytest.raises(ValueError, match="from 13 on, for sinks=4, 7 pinned tokens, the last"):
        ServingConfig.of(pin=[(2, 11)], max_prompt_tokens=12)
    with pytest.raises(ValueError, match="pin=.* left out with unit"):
        ServingConfig.of(pin=[(2, 11)], unit="trace", recent=4, score="random")
    with pytest.raises(ValueError, match="prefill_chunk=64 is not possible.*max_batch_tokens"):
        ServingConfig.of(prefill_chunk=64)
