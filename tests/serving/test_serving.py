"""Serving: the engine's answers when off, KaraCache's when on; all blocks and requests are accounted for."""

import asyncio
import contextlib
import inspect
import json
import os
import re
import runpy
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from packaging.version import Version
from support.marks import few, most_examples, slow
from support.scores import VALUE_NORM
from support.serving import (
    CACHE,
    KARA,
    Server,
    batch,
    budgeted,
    ended,
    free_port,
    generation,
    kept,
    make,
    pool,
    prompts,
    single,
)
from transformers import (
    AttentionInterface,
    Gemma2Config,
    MistralConfig,
    Qwen3Config,
)
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, ContinuousMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from typer.testing import CliRunner

from kara_hf import KaraCache, detach
from kara_hf.bundled import BUNDLED_MODEL
from kara_hf.cli.app import app
from kara_hf.cli.serve import parse_bytes
from kara_hf.integration.attach import decoder_config
from kara_hf.integration.loading import LoadedModel
from kara_hf.policy import register_score
from kara_hf.policy.scores import SCORES, key_difference
from kara_hf.serving import ServingConfig, kara_continuous_batching, query_recorder
from kara_hf.serving.compressor import Compressor
from kara_hf.serving.engine import Engine
from kara_hf.serving.plans import ServedRequest
from kara_hf.serving.queries import QueryPool
from kara_hf.serving.query_recorder import Logits
from kara_hf.serving.seams import LEAST_TRANSFORMERS, REQUIRED_INTERNALS, check_internals, check_version
from kara_hf.tasks.reasoner import make_problem

if Version(transformers.__version__) < Version(LEAST_TRANSFORMERS):
    pytest.skip(f"serving needs Transformers {LEAST_TRANSFORMERS}", allow_module_level=True)

ROOT = Path(__file__).parents[2]
KEYS = KARA | {"score": "key-difference"}  # holds no queries


@pytest.fixture(scope="module")
def model():
    return make()


# ---------------------------------------------------------------------------------------------------- exact when off
ENGINES = {
    "ample": {},
    "admission": {"max_requests_per_batch": 3},
    "preemption": {"blocks": 40},
    "chunked prefill": {"batch": 8},
    "chunks and preemption": {"batch": 8, "blocks": 40},
    "no sharing": {"allow_block_sharing": False},
    "prefill first, preemption": {"scheduler_type": "prefill_first", "blocks": 60},
}


@pytest.mark.parametrize("name", few(list(ENGINES), "ample", "chunks and preemption"))
def test_off_is_the_engine_alone(model, name):
    inputs = prompts(5) + [prompts(1, longest=12)[0] + [5, 6, 7]] * 2
    alone = batch(model, inputs, config=pool(**ENGINES[name]))
    with kara_continuous_batching(model, **KARA | {"retention": 1.0}, period=1) as serving:
        ours = batch(model, inputs, config=pool(**ENGINES[name]))
    assert ours == alone
    assert serving.metrics.windows == serving.metrics.evicted_tokens == 0
    assert (serving.metrics.preemptions > 0) == ("preemption" in name)


def test_prefixes_and_children_are_shared_when_off(model):
    shared = prompts(1, shortest=20, longest=20)[0]
    inputs = [shared + extra for extra in prompts(5, longest=6)]
    alone = batch(model, inputs, children=1)
    with kara_continuous_batching(model, retention=1.0):
        assert batch(model, inputs, children=1) == alone


# ------------------------------------------------------------------------------------------------- KaraCache's answers
@pytest.mark.parametrize(
    "score",
    ["bidirectional", "random-chunks", *map(slow, ("causal", "key-difference", "recency", "random", VALUE_NORM))],
)
def test_equals_kara_cache(model, score, audited):
    kara, inputs = KARA | {"score": score}, prompts(4)
    with kara_continuous_batching(model, **kara, period=1) as serving:
        found = batch(model, inputs)
        assert found == [single(model, prompt, **kara) for prompt in inputs]
    assert serving.metrics.windows == sum((40 - 1 - 3) // 8 for _ in inputs)
    ended(audited[-1])


@pytest.mark.parametrize("score", [slow("bidirectional"), "causal"])
def test_a_sample_of_queries(model, score, audited):
    kara, inputs = KARA | {"score": score, "queries": 3}, prompts(3)
    with kara_continuous_batching(model, **kara, period=1) as serving:
        found = batch(model, inputs)
        assert found == [single(model, prompt, **kara) for prompt in inputs]
    assert 0 < serving.metrics.peak_query_bytes
    ended(audited[-1])


@pytest.mark.parametrize("score", [slow("bidirectional"), "recency"])
def test_a_share_is_recent(model, score, audited):
    kara, inputs = KARA | {"score": score, "recent": 0.3}, prompts(4, longest=8)
    with kara_continuous_batching(model, **kara, period=1) as serving:
        found = batch(model, inputs)
        assert found == [single(model, prompt, **kara) for prompt in inputs]
    assert serving.metrics.windows > 0
    ended(audited[-1])
    with pytest.raises(ValueError, match="recent=0.3 is not possible.*unit=.trace"):
        ServingConfig.of(**KARA | {"score": "recency", "recent": 0.3}, unit="trace")


@pytest.mark.parametrize(("score", "sinks"), [slow("bidirectional", 6), ("recency", 4), slow("recency", 0)])
def test_sinks_behind_short_prompts(model, score, sinks, audited):
    kara = KARA | {"score": score, "sinks": sinks}
    inputs = prompts(4, shortest=1, longest=3)
    with kara_continuous_batching(model, **kara, period=1):
        found = batch(model, inputs)
        assert found == [single(model, prompt, **kara) for prompt in inputs]
    ended(audited[-1])


def test_traces_keep_sinks_again_and_again():
    """Kept tokens of a trace are numbered without gaps; its first ones are sinks every time."""
    config = ServingConfig.of(**KARA | {"score": "recency", "sinks": 5}, unit="trace")
    compressor = Compressor(config, QueryPool(SimpleNamespace(page=4), 1))
    request = ServedRequest("a", settled=2, stored=2 + 8 + 3)
    for _ in range(3):
        plan = compressor.plan(request)
        keys = torch.zeros(1, 2, plan.width, 8)
        places = compressor.select(0, [plan], keys, Logits(1.0))
        assert (places == torch.tensor([0, 1, 2, plan.width - 1])).all()
        compressor.done(plan)
        assert request.open == 4 + 3
        request.stored += 8


@pytest.mark.parametrize("name", [slow("admission"), "chunked prefill", slow("no sharing")])
def test_equals_kara_cache_whatever_the_engine_does(model, name, audited):
    inputs = prompts(5)
    with kara_continuous_batching(model, **KARA, period=1) as serving:
        found = batch(model, inputs, config=pool(**ENGINES[name]))
    assert serving.metrics.preemptions == 0
    assert found == [single(model, prompt, **KARA) for prompt in inputs]
    ended(audited[-1])


def test_stored_blocks_shrink(model, monkeypatch):
    """40 tokens behind a prompt of 4: 4 windows of 8 keep 4 each, then 7 or fewer are open, and 2 blocks of queries."""
    prompt = prompts(1, shortest=4, longest=4)
    held, count = [], Engine._count

    def counted(engine, running):
        count(engine, running)
        held.append(engine.metrics.used_blocks)

    monkeypatch.setattr(Engine, "_count", counted)
    for retention, blocks in ((1.0, 11), (0.5, 7 + 2)):
        with kara_continuous_batching(model, **KARA | {"retention": retention}, period=1) as serving:
            batch(model, prompt, config=pool(allow_block_sharing=False))
        assert held[-1] == blocks and serving.metrics.used_blocks == 0


@pytest.mark.parametrize("family", [*map(slow, (Qwen3Config, MistralConfig)), Gemma2Config])
def test_sliding_layers_keep_their_rings(family):
    changes = {
        Qwen3Config: {},
        MistralConfig: {"sliding_window": None},
        Gemma2Config: {"sliding_window": 16, "attn_logit_softcapping": 20.0, "query_pre_attn_scalar": 8},
    }[family]
    model = make(family, num_hidden_layers=2, **changes)
    if family is Gemma2Config:
        model.set_attn_implementation("eager")
    inputs = prompts(3, longest=20)
    with kara_continuous_batching(model, **KARA, period=1) as serving:
        found = batch(model, inputs, tokens=50)
    assert serving.metrics.windows > 0
    assert found == [single(model, prompt, tokens=50, **KARA) for prompt in inputs]


def test_shared_blocks_are_left_alone(model, audited):
    """Prompts with a common start, equal prompts, and children of one request: nobody sees another's compression."""
    shared = prompts(1, shortest=22, longest=22)[0]
    inputs = [shared + extra for extra in prompts(3, longest=6)] + [shared] * 3
    with kara_continuous_batching(model, **KARA, period=1) as serving:
        found = batch(model, inputs, children=1)
    expected = {tuple(prompt): single(model, prompt, **KARA) for prompt in inputs}
    assert found == [expected[tuple(prompt)] for prompt in inputs for _ in range(2)]
    assert serving.metrics.windows == 12 * 4


# ------------------------------------------------------------------------------------------------------------- policy
def test_every_period_the_k_best_are_compressed(model, monkeypatch):
    times = []
    compress = Engine._compress

    def seen(engine):
        done = compress(engine)
        times.append((engine.metrics.steps, done))
        return done

    monkeypatch.setattr(Engine, "_compress", seen)
    with kara_continuous_batching(model, **KARA, period=10, max_requests=2):
        batch(model, prompts(5))
    assert {step % 10 for step, _ in times} == {0}
    assert max(done for _, done in times) == 2


def test_under_pressure_only(model):
    inputs = prompts(6)
    with kara_continuous_batching(model, **KARA, trigger="pressure") as serving:
        batch(model, inputs)
    assert serving.metrics.windows == 0
    with kara_continuous_batching(model, **KARA, trigger="pressure") as serving:
        batch(model, inputs, config=pool(blocks=50))
    assert serving.metrics.windows > 0


def test_late_windows_are_sealed_at_once(model, audited):
    with kara_continuous_batching(model, **KARA, period=37) as serving:
        batch(model, prompts(3, longest=8), tokens=60)
    metrics = serving.metrics
    assert metrics.compressions == 3 and metrics.windows == 12 and metrics.evicted_tokens == 48


@pytest.mark.parametrize("score", ["recency", "key-difference"])
def test_whole_traces(model, score, audited):
    settings = {"unit": "trace", "window": 12, "recent": 3, "retention": 0.5, "score": score, "period": 1}
    with kara_continuous_batching(model, **settings) as serving:
        batch(model, prompts(3), tokens=60)
    assert serving.metrics.evicted_tokens > 0
    # 15 tokens at most behind the prompt, then 6 of 12 and the 3 recent ones
    assert serving.metrics.windows == 3 * (1 + (59 - 15) // 6)


def test_more_run_at_once_in_the_same_blocks(model):
    inputs = prompts(8, longest=6)
    steps = {}
    for retention in (1.0, 0.25):
        with kara_continuous_batching(model, **KEYS | {"retention": retention}, period=4) as serving:
            batch(model, inputs, tokens=100, config=pool(blocks=50))
        steps[retention] = serving.metrics.steps
        assert serving.metrics.failed == 0
    assert steps[0.25] < 0.6 * steps[1.0]


@most_examples(15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    blocks=st.integers(10, 80),
    page=st.sampled_from([4, 8]),
    chunk=st.sampled_from([4, 16, 256]),
    period=st.integers(1, 12),
    max_requests=st.sampled_from([None, 1, 3]),
    trigger=st.sampled_from(["periodic", "pressure"]),
    score=st.sampled_from(["bidirectional", "key-difference"]),
    window=st.sampled_from([4, 6, 8]),
    sharing=st.booleans(),
    seed=st.integers(0, 5),
)
def test_nothing_is_lost(
    model, audited, blocks, page, chunk, period, max_requests, trigger, score, window, sharing, seed
):
    """Whatever the pool and the policy: every request ends, with all its tokens, and every block is accounted for."""
    inputs = [prompt[: 2 * page] for prompt in prompts(6, seed=seed, longest=16)]
    config = pool(blocks=blocks, page=page, batch=chunk, allow_block_sharing=sharing)
    kara = {"retention": 0.25, "window": window, "recent": 2, "score": score}
    audited.clear()
    with kara_continuous_batching(model, **kara, period=period, max_requests=max_requests, trigger=trigger):
        out = model.generate_batch(inputs, generation_config=generation(30), continuous_batching_config=config)
    assert len(out) == len(inputs)
    for prompt, result in zip(inputs, out.values(), strict=True):
        assert result.prompt_ids == prompt
        if result.error is None:
            assert len(result.generated_tokens) == 30
        else:
            assert blocks * page < len(prompt) + 31 and "give the engine more memory" in result.error
    ended(audited[-1])


# ------------------------------------------------------------------------------------------------------------- faults
def test_a_prompt_longer_than_the_pool(model):
    inputs = [*prompts(3), prompts(1, shortest=130, longest=130)[0]]
    with kara_continuous_batching(model, **KARA, period=1) as serving:
        out = model.generate_batch(inputs, generation_config=generation(), continuous_batching_config=pool(blocks=30))
    results = list(out.values())
    assert "needs room for 131 tokens and the pool holds 120" in results[3].error
    assert [r.generated_tokens for r in results[:3]] == [single(model, prompt, **KARA) for prompt in inputs[:3]]
    assert serving.metrics.refused == 1 and serving.metrics.failed == 0


def test_a_trace_longer_than_the_pool(model, engines):
    inputs = prompts(2, shortest=4, longest=4)
    with kara_continuous_batching(model, retention=1.0):
        out = model.generate_batch(inputs, generation_config=generation(90), continuous_batching_config=pool(blocks=20))
    for result in out.values():
        assert "cannot go on" in result.error and "give the engine more memory" in result.error
        assert 0 < len(result.generated_tokens) < 90
    ended(engines[-1])
    with kara_continuous_batching(model, **KEYS | {"retention": 0.25}, period=1):
        found = batch(model, inputs, tokens=90, config=pool(blocks=20))
    assert [len(tokens) for tokens in found] == [90, 90]


def test_a_pool_too_small_for_a_window(model):
    detach(model)
    with kara_continuous_batching(model, retention=0.5, window=64, recent=8):
        with pytest.raises(ValueError, match="a pool of 10 blocks of 4 tokens is too small for a window of 64 tokens"):
            batch(model, prompts(1), config=pool(blocks=10))
    assert decoder_config(model)._attn_implementation == "sdpa"
    assert batch(model, prompts(1), config=pool(blocks=20))


@pytest.fixture
def failing_score():
    """Fails for windows of a request whose 9th token has a certain key; NaN or an error of the user's."""
    seen = {}

    @register_score("failing")
    def failing(window):
        bad = torch.tensor([start in seen["starts"] for start in window.starts])
        if bad.any() and seen["error"]:
            raise ZeroDivisionError("a score of the user's")
        return key_difference(window).masked_fill(bad[:, None, None], float("nan"))

    yield seen
    del SCORES["failing"]


@pytest.mark.parametrize("error", [True, False])
def test_an_exception_in_the_policy_ends_one_request(model, failing_score, error, audited):
    inputs = [[1, 2, 3, 4, 5], [7] * 9, [8] * 13]
    failing_score.update(starts={9}, error=error)
    with kara_continuous_batching(model, **KARA | {"score": "failing"}, period=1):
        out = model.generate_batch(inputs, generation_config=generation(), continuous_batching_config=pool())
    results = list(out.values())
    assert ("a score of the user's" if error else "scores of layer 0 are NaN") in results[1].error
    assert 0 < len(results[1].generated_tokens) < 40
    for place in (0, 2):
        assert results[place].generated_tokens == single(
            model, inputs[place], **KARA | {"score": "key-difference"} | {"anchor_share": 1.0}
        )
    ended(audited[-1])


def test_cancelled_while_compressing(model, monkeypatch, engines):
    compress, cancelled = Engine._compress, []
    inputs = prompts(4)
    with kara_continuous_batching(model, **KARA, period=1):
        manager = model.init_continuous_batching(generation(60), pool())

        def cancel(engine):
            done = compress(engine)
            if done and not cancelled:
                cancelled.append("second")
                manager.cancel_request("second")
            return done

        monkeypatch.setattr(Engine, "_compress", cancel)
        manager.start()
        names = ["first", "second", "third", "fourth"]
        for name, prompt in zip(names, inputs, strict=True):
            manager.add_request(prompt, request_id=name)
        found = {}
        while len(found) < 3:
            result = manager.get_result(timeout=5)
            assert result is not None
            found[result.request_id] = result.generated_tokens
        manager.stop()
    assert cancelled and set(found) == {"first", "third", "fourth"}
    assert found == {
        name: single(model, prompt, tokens=60, **KARA)
        for name, prompt in zip(names, inputs, strict=True)
        if name != "second"
    }
    ended(engines[-1])


def test_all_active_requests_cancelled_under_pressure(model, engines, monkeypatch):
    """The engine admits nobody after a preemption until a request ends; cancelled ones end too."""
    preempted, offload = threading.Event(), Engine._offload

    def noted(engine):
        done = offload(engine)
        if engine.metrics.preemptions:
            preempted.set()
        return done

    monkeypatch.setattr(Engine, "_offload", noted)
    with kara_continuous_batching(model, retention=1.0):
        manager = model.init_continuous_batching(generation(60), pool(blocks=30))
        manager.start()
        for number, prompt in enumerate(prompts(4, shortest=10)):
            manager.add_request(prompt, request_id=str(number))
        assert preempted.wait(20)
        scheduler = engines[-1].scheduler
        running = list(scheduler.active_requests)
        for key in running:
            manager.cancel_request(key)
        result = manager.get_result(timeout=20)
        assert result is not None and result.request_id not in running
        manager.stop()


@pytest.mark.parametrize("persistent", [slow(False), True])
def test_managers_are_used_again(model, persistent, engines):
    inputs = prompts(3)
    expected = [single(model, prompt, **KARA) for prompt in inputs]
    with kara_continuous_batching(model, **KARA, period=1):
        for _ in range(2):
            out = model.generate_batch(
                inputs,
                generation_config=generation(),
                continuous_batching_config=pool(),
                persistent_manager=persistent,
            )
            assert [result.generated_tokens for result in out.values()] == expected
    assert len(engines) == (1 if persistent else 2)
    assert not hasattr(model, "_cached_continuous_batching_manager")


@pytest.mark.parametrize("count", [300, slow(2000)])
def test_soak(model, engines, count):
    """Hundreds, or thousands, of short requests leave an empty pool."""
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randint(1, 97, (2,), generator=generator).tolist() for _ in range(count)]
    kara = {"retention": 0.5, "window": 2, "recent": 1, "anchor_share": 1.0}
    with kara_continuous_batching(model, **kara, period=1) as serving:
        out = model.generate_batch(
            inputs, generation_config=generation(6), continuous_batching_config=pool(blocks=800, batch=512)
        )
    assert len(out) == count and all(len(r.generated_tokens) == 6 and r.error is None for r in out.values())
    # One that is preempted begins again, with what it has said as a part of its prompt.
    assert serving.metrics.windows >= count - serving.metrics.preemptions
    ended(engines[-1])


def test_streams(model):
    prompt, found = prompts(1)[0], []

    async def stream():
        with kara_continuous_batching(model, **KARA, period=1):
            manager = model.init_continuous_batching(generation(), pool())
            manager.start()
            over = asyncio.Event()

            def got(result):
                found.append(result.generated_tokens)
                if result.is_finished():
                    over.set()

            manager.register_result_handler("one", got)
            manager.add_request(prompt, request_id="one", streaming=True)
            await asyncio.wait_for(over.wait(), 30)
            manager.stop()

    asyncio.run(stream())
    assert [len(tokens) for tokens in found] == list(range(1, 41))
    assert found[-1] == single(model, prompt, **KARA)


# ------------------------------------------------------------------------------------------------- what is left behind
def everything(model):
    """All that a session could leave something in: registries, classes, the config, and every module's attributes."""
    kinds = [
        AttentionInterface,
        AttentionMaskInterface,
        ContinuousMixin,
        ContinuousBatchingManager,
        *type(model).__mro__,
    ]
    found = {kind: dict(vars(kind)) for kind in kinds}
    found["registered"] = [
        dict(mapping)
        for interface in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
        for mapping in (interface._global_mapping, interface._local_mapping)
    ]
    found["config"] = dict(vars(model.config))
    found["modules"] = [dict(vars(module)) for module in model.modules()]
    found["listening"] = len(query_recorder._listeners), len(query_recorder._Observed.installed)
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_before(attention, fails):
    model = make()
    model.set_attn_implementation(attention)
    before = everything(model)
    with contextlib.suppress(RuntimeError):
        with kara_continuous_batching(model, **KARA, period=1) as serving:
            batch(model, prompts(1))
            assert everything(model)["registered"] != before["registered"]
            assert serving.metrics.windows
            if fails:
                raise RuntimeError("somebody's")
    assert everything(model) == before


def test_a_local_attention_function_stays(model):
    """Somebody's own, in the registry of this process, is heard and put back."""
    calls, name = [], decoder_config(model)._attn_implementation

    def theirs(*args, **kwargs):
        calls.append(args)
        return AttentionInterface._global_mapping[name](*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS[name] = theirs
    try:
        with kara_continuous_batching(model, **KARA):
            batch(model, prompts(1))
        assert calls and ALL_ATTENTION_FUNCTIONS._local_mapping[name] is theirs
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]


def test_a_session_leaves_a_living_cache_alone(model):
    name, prompt = decoder_config(model)._attn_implementation, prompts(1)[0]
    expected = single(model, prompt, **KARA)
    cache = KaraCache(model, block_size=4, **KARA)
    assert decoder_config(model)._attn_implementation == name
    ids = torch.tensor([prompt])
    first = model.generate(ids, **{CACHE: cache}, generation_config=generation(20))
    with kara_continuous_batching(model, **KARA, period=1):
        assert model.generate_batch([prompt], generation_config=generation(), continuous_batching_config=pool())
    out = model.generate(first, **{CACHE: cache}, generation_config=generation(20))
    assert out[0, len(prompt) :].tolist() == expected


def test_sessions_may_end_in_any_order(model):
    before, inputs = everything(model), prompts(2)
    outer, inner = contextlib.ExitStack(), contextlib.ExitStack()
    other = make(seed=5)
    outer.enter_context(kara_continuous_batching(model, **KARA, period=1))
    inner.enter_context(kara_continuous_batching(other, **KARA, period=1))
    expected = batch(model, inputs), batch(other, inputs)
    outer.close()
    assert batch(other, inputs) == expected[1]
    inner.close()
    assert everything(model) == before


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_without_the_paged_name(attention, monkeypatch):
    """An engine that asks for a model's attention by its own name, as Transformers means to."""
    from transformers.generation.continuous_batching import input_outputs
    from transformers.integrations import eager_paged

    if attention == "eager" and "cache" in inspect.getsource(eager_paged):
        pytest.skip("the paged function of this version stores keys itself, so that a model's own cannot stand for it")
    model, inputs = make(), prompts(3)
    expected = [single(model, prompt, **KARA) for prompt in inputs]
    model.set_attn_implementation(attention)
    monkeypatch.delitem(AttentionInterface._global_mapping, "paged|eager")
    monkeypatch.setattr(ContinuousBatchingManager, "switch_to_cb_friendly_attn", lambda *args: None)
    monkeypatch.setattr(input_outputs, "attn_mask_is_needed", lambda config: True)
    before = everything(model)
    with kara_continuous_batching(model, **KARA, period=1):
        assert batch(model, inputs) == expected
    assert everything(model) == before


def test_two_models_at_once(model):
    other, inputs = make(seed=5), prompts(2)
    with kara_continuous_batching(model, **KARA, period=1), kara_continuous_batching(other, **KARA, period=1):
        found = batch(model, inputs), batch(other, inputs)
    for network, tokens in zip((model, other), found, strict=True):
        assert tokens == [single(network, prompt, **KARA) for prompt in inputs]


def test_what_is_refused(model):
    with kara_continuous_batching(model, **KARA):
        for changes in ({"use_async_batching": True}, {"use_cuda_graph": True}):
            with pytest.raises(ValueError, match="with Kara, which acts between steps"):
                batch(model, prompts(1), config=pool(**changes))
    detach(model)
    assert model.generate_batch(
        prompts(1), generation_config=generation(2), continuous_batching_config=pool(), persistent_manager=True
    )
    with kara_continuous_batching(model, **KARA), pytest.raises(ValueError, match="started without Kara"):
        batch(model, prompts(1))
    model.destroy_cached_continuous_batching_manager()
    for setting, value in {
        "period": 0,
        "max_requests": 0,
        "trigger": "never",
        "unit": "all",
        "retention": 1.5,
        "compress_prompt": True,
    }.items():
        with pytest.raises(ValueError, match=f"{setting}={value!r}"):
            ServingConfig.of(**{setting: value})
    with pytest.raises(ValueError, match="score='blend'"):
        ServingConfig.of(unit="trace", recent=32)
    with pytest.raises(ValueError, match='recent=0.5 .* a number of tokens with unit="trace"'):
        ServingConfig.of(unit="trace", score="key-difference")
    with pytest.raises(TypeError, match="windows"):
        ServingConfig.of(windows=3)


def test_old_versions_are_refused():
    with pytest.raises(ImportError, match=f"needs Transformers {LEAST_TRANSFORMERS} or newer and found 5.17.0"):
        check_version("5.17.0")
    check_version("5.24.0.dev0")


def test_the_required_internals_are_where_they_were(model, engines):
    """What this package uses of the engine. A test that fails here says what a new Transformers moved."""
    with kara_continuous_batching(model, retention=1.0):
        batch(model, prompts(1), tokens=2)  # an engine checks them itself
        manager = model.init_continuous_batching(generation(2), pool())
    engine = engines[-1]
    parts = {
        "manager": manager,
        "attention": ALL_ATTENTION_FUNCTIONS,
        "processor": engine.processor,
        "scheduler": engine.scheduler,
        "batch": engine.batch,
        "offloading": engine.processor.offloading_manager,
        "cache": engine.cache,
        "pool": engine.cache.pool,
        "allocator": engine.pool.allocator,
        "ledger": engine.pool.allocator.ledger,
    }
    assert set(parts) == set(REQUIRED_INTERNALS)

    class Moved:
        def release(self, block):
            pass

    with pytest.raises(
        ImportError, match=r"Moved.release\(block\) was \(block_id, no_cache\); Moved.block_to_hash is gone"
    ):
        check_internals(parts | {"ledger": Moved()})


# ---------------------------------------------------------------------------------------- several processes, the server
TENSOR_PARALLEL = """
import json, os, sys
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from kara_hf.serving import kara_continuous_batching

folder, out, inputs, kara = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
with kara_continuous_batching(model, **kara) as serving:
    for turn in range(1 + ("conversations" in kara)):
        results = model.generate_batch(
            inputs,
            generation_config=GenerationConfig(max_new_tokens=40, do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(page_size=4, num_blocks=200, max_batch_tokens=64),
            persistent_manager=True,
        )
        tokens = [result.generated_tokens for result in results.values()]
        inputs = [prompt + answer + [5, 6, 7] for prompt, answer in zip(inputs, tokens)]
    heads = serving.engine.pool.allocator.num_key_value_heads
report = {"tokens": tokens, "heads": heads} | vars(serving.metrics)
open(f"{out}-{os.environ['RANK']}.json", "w").write(json.dumps(report))
"""


@pytest.mark.slow
@pytest.mark.parametrize("compressed", ["windows", "prompts", "found_pasts"])
def test_tensor_parallel_equals_one_process(model, tmp_path, compressed):
    inputs, kara = prompts(4), KARA | {"period": 1}
    expected = [single(model, prompt, **KARA) for prompt in inputs]
    if compressed == "prompts":
        inputs, kara = prompts(4, shortest=40, longest=70), {"retention": 1.0, "max_prompt_tokens": 20}
        expected = [budgeted(model, prompt, 20, 40) for prompt in inputs]
    if compressed == "found_pasts":
        kara |= {"conversations": 4}
        expected = [kept(model, [prompt, [5, 6, 7]], 40, **KARA)[1] for prompt in inputs]
    model.save_pretrained(tmp_path / "model")
    script = tmp_path / "serve.py"
    script.write_text(TENSOR_PARALLEL)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(script)]
    arguments = [str(tmp_path / "model"), str(tmp_path / "out"), json.dumps(inputs), json.dumps(kara)]
    done = subprocess.run(
        [*launch, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"out-{rank}.json").read_text()) for rank in (0, 1))
    assert first["heads"] == second["heads"] == 1 and first[compressed] == second[compressed] > 0
    assert first["tokens"] == expected


def test_the_example_answers_in_fewer_steps(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(f"ka : {i} ; ru : 2 ; ? ka >" for i in range(6)))
    example = runpy.run_path(str(ROOT / "examples" / "serve.py"))
    example["main"](prompts=tmp_path / "prompts.txt", blocks=24, max_new_tokens=100, window=16)
    found = re.findall(r"retention (\S+): 6 answers in \d+ steps.* (\d+) tokens evicted", capsys.readouterr().out)
    assert [retention for retention, _ in found] == ["1.0", "0.25"] and int(found[1][1]) > int(found[0][1]) == 0


@pytest.mark.parametrize(("generated", "window", "killed"), [(80, 16, False), slow(200, 64, True)])
def test_the_server(generated, window, killed):
    """It answers over the OpenAI API as the cache does, streaming too; killed in the middle, it starts again."""
    openai = pytest.importorskip("openai")
    port = free_port()
    problem = make_problem("trace", generated=generated, seed=60_000)
    settings = {"retention": 0.5, "window": window, "recent": 32}
    loaded = LoadedModel(str(BUNDLED_MODEL))
    expected = single(loaded.model, loaded.encode(problem.prompt, chat=False)[0].tolist(), generated + 60, **settings)
    options = settings | {"period": 1, "memory": "4 MiB"}
    options = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    ask = {"model": str(BUNDLED_MODEL), "prompt": problem.prompt, "temperature": 0, "max_tokens": generated + 60}
    with Server(port, *options) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        answer = client.completions.create(**ask)
        assert loaded.tokenizer.decode(expected, skip_special_tokens=True).startswith(answer.choices[0].text)
        pieces = [chunk.choices[0].text for chunk in client.completions.create(**ask, stream=True) if chunk.choices]
        assert len(pieces) > generated // 2 and "".join(pieces) == answer.choices[0].text
        metrics = server.metrics()
        assert metrics["kara_blocks"] == 4 * 2**20 // (16 * 4 * 2 * 2 * 32 * 4) - 2
        settled = answer.usage.completion_tokens - 2 - 32  # before the step that made the last token
        assert metrics["kara_windows"] == 2 * (settled // window) > 0 and metrics["kara_steps"] > 1.8 * generated
        assert metrics["kara_waiting"] == metrics["kara_failed"] == 0
        with pytest.raises(openai.BadRequestError, match=r"needs room for \d+ tokens and the pool holds 2016"):
            client.completions.create(**ask | {"prompt": problem.prompt * 80})
        if not killed:
            return
        assert client.completions.create(**ask).choices[0].text == answer.choices[0].text
        stream = client.completions.create(**ask, stream=True)
        next(iter(stream))
        server.process.kill()
        with pytest.raises(Exception):  # noqa: B017  whatever the client makes of a connection that breaks
            list(stream)
    with Server(port, *options) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
        assert client.completions.create(**ask).choices[0].text == answer.choices[0].text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--memory", "8 apples"], "memory='8 apples' is not possible"),
        (["--memory", "1 KiB"], "memory=1024 is not possible: memory must be at least 98304 bytes"),
        (["--retention", "2"], "retention=2.0 is not possible"),
        (["--prompt-retention", "2"], "prompt_retention=2.0 is not possible"),
        (["--max-prompt-tokens", "3"], "max_prompt_tokens=3 is not possible"),
        (["--score", "nothing"], "score='nothing' is not possible"),
        (["--dtype", "int8"], "dtype='int8' is not possible"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, message):
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 2 and message in " ".join(result.output.split())


@pytest.mark.parametrize("text, nbytes", [("8GiB", 2**33), ("1.5 mb", 1_500_000), (" 77 ", 77)])
def test_bytes(text, nbytes):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("score", ["bidirectional", slow("key-difference")])
def test_offloaded_requests_come_back_compressed(model, score, audited, unpinned):
    """With the engine's swap space a preempted request keeps what it had: its answer is as if nothing had happened."""
    kara, inputs = KARA | {"score": score}, prompts(5)
    with kara_continuous_batching(model, **kara, period=1) as serving:
        found = batch(model, inputs, tokens=60, config=pool(blocks=36, cpu_offload_space=0.01))
    assert serving.metrics.preemptions > 0
    assert found == [single(model, prompt, tokens=60, **kara) for prompt in inputs]
    ended(audited[-1])


@pytest.mark.parametrize("retention", [slow(1.0), 0.5])
def test_others_do_not_notice_a_cancellation(model, retention, engines):
    """Off, they get what the engine alone gives them; on, what KaraCache does."""
    detach(model)
    inputs = dict(zip("abcd", prompts(4), strict=True))

    def answers() -> dict[str, list[int]]:
        manager, found = model.init_continuous_batching(generation(), pool(blocks=60)), {}
        manager.start()
        for name, prompt in inputs.items():
            manager.add_request(prompt, request_id=name)
        manager.cancel_request("b")
        while len(found) < 3:
            result = manager.get_result(timeout=20)
            assert result is not None
            found[result.request_id] = result.generated_tokens
        manager.stop()
        return found

    if retention == 1:
        expected = answers()
    else:
        expected = {name: single(model, prompt, **KARA) for name, prompt in inputs.items() if name != "b"}
    with kara_continuous_batching(model, **KARA | {"retention": retention}, period=1):
        assert answers() == expected
    ended(engines[-1])
