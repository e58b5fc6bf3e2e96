"""The next turn of a conversation begins with its compressed past: KaraCache's answers, and far less to read."""

import pytest
import transformers
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from packaging.version import Version
from support.marks import few, most_examples, slow
from support.serving import KARA, batch, budgeted, cached, ended, generation, kept, make, pool, prompts
from transformers import Gemma2Config

from kara_hf import KaraCache, detach
from kara_hf.serving import ServingConfig, kara_continuous_batching
from kara_hf.serving.seams import LEAST_TRANSFORMERS

if Version(transformers.__version__) < Version(LEAST_TRANSFORMERS):
    pytest.skip(f"serving needs Transformers {LEAST_TRANSFORMERS}", allow_module_level=True)

FIND = {"period": 1, "conversations": 8}


@pytest.fixture(scope="module")
def model():
    return make()


def ask(model, inputs, tokens=40, config=None, children=0):
    """Answers of an engine that stays between calls, for as long as a session lasts."""
    detach(model)
    out = model.generate_batch(
        inputs,
        generation_config=generation(tokens, children),
        continuous_batching_config=config or pool(),
        persistent_manager=True,
    )
    return list(out.values())


def talk(model, said, tokens=30, config=None):
    """Answers by conversation and turn to what users say; each turn's prompt is all that was said before."""
    before, found = [[] for _ in said], [[] for _ in said]
    for turn in zip(*said, strict=True):
        inputs = [past + new for past, new in zip(before, turn, strict=True)]
        for number, (prompt, result) in enumerate(zip(inputs, ask(model, inputs, tokens, config), strict=True)):
            assert result.error is None, result.error
            found[number].append(result.generated_tokens)
            before[number] = prompt + result.generated_tokens
    return found


def says(conversations, turns, seed=3, longest=12):
    """What users say, turn by turn."""
    said = iter(prompts(conversations * turns, seed=seed, longest=longest))
    return [[next(said) for _ in range(turns)] for _ in range(conversations)]


# ------------------------------------------------------------------------------------------------- KaraCache's answers
SCORES = [
    {"score": "random-chunks", "queries": None},
    {"score": "bidirectional", "queries": 3, "pin": ((9, 12), (45, 49))},
    *map(slow, ({"score": "recency"}, {"recent": 0.3}, {"sinks": 0}, {"score": "key-difference"})),
]


@pytest.mark.parametrize("changes", SCORES, ids=str)
def test_equals_kara_cache_kept_between_turns(model, changes, audited):
    kara, said = KARA | changes, says(2, 3)
    expected = [kept(model, turns, **kara) for turns in said]
    with kara_continuous_batching(model, **kara, **FIND) as serving:
        assert talk(model, said) == expected
        metrics = serving.metrics
        assert metrics.found_pasts == 4 and serving.metrics.pasts == 2
        # A turn computes what was said in it and the last token of the answer before, and its own answer but the last.
        spoken = sum(len(new) for turns in said for new in turns)
        assert metrics.computed_tokens == spoken + 2 * 2 + 2 * 3 * 29
    ended(audited[-1])


@pytest.mark.parametrize("changes", [{"batch": 5}, slow({"scheduler_type": "prefill_first", "batch": 16})], ids=str)
def test_turns_in_parts(model, changes, audited):
    said = says(2, 2, longest=20)
    expected = [kept(model, turns, **KARA) for turns in said]
    with kara_continuous_batching(model, **KARA, **FIND) as serving:
        assert talk(model, said, config=pool(**changes)) == expected
        assert serving.metrics.found_pasts == 2
    ended(audited[-1])


def test_off_is_the_engine_alone(model):
    """Where all is kept the engine finds blocks by their content, and nothing else is remembered."""
    said = says(2, 3)
    expected = talk(model, said)
    model.destroy_cached_continuous_batching_manager()
    with kara_continuous_batching(model, **KARA | {"retention": 1.0}, **FIND) as serving:
        assert talk(model, said) == expected
        assert serving.metrics.found_pasts == serving.metrics.pasts == 0


@pytest.mark.parametrize("children", [0, 1])
def test_several_go_on_from_one_past(model, children, audited):
    """Each as if it was alone: none writes to blocks that another holds."""
    first, *others = prompts(3, seed=5, longest=12)
    expected = [kept(model, [first, other], **KARA) for other in others]
    past = first + expected[0][0]
    with kara_continuous_batching(model, **KARA, **FIND) as serving:
        assert ask(model, [first], 30, children=children)[0].generated_tokens == expected[0][0]
        for _ in range(2):
            found = ask(model, [past + other for other in others], 30, children=children)
            answers = [answers[1] for answers in expected for _ in range(1 + children)]
            assert [result.generated_tokens for result in found] == answers
        assert serving.metrics.found_pasts == 4
    ended(audited[-1])


@pytest.mark.parametrize("agreed", few([0, 5, 8, 13, 16, 21, 26, 29], 5, 13, 26))
def test_as_far_as_it_agrees(model, agreed, audited):
    """Up to the difference, or to the last window that was sealed before it."""
    first, other = prompts(2, seed=6, shortest=9, longest=9)
    past = first + kept(model, [first], **KARA)[0]
    begun = agreed if agreed > 24 else agreed // 8 * 8  # three windows were sealed, and five tokens left open
    cache = KaraCache(model, **{"block_size": 4} | KARA)
    if begun > 24:
        cached(model, cache, [], first)
        cache.crop(begun - 29)
    else:
        cached(model, cache, [], first, 1 + begun + KARA["recent"] * (begun > 0))
        cache.crop(-KARA["recent"] * (begun > 0))
    prompt = past[: 9 + agreed] + [past[9 + agreed] % 96 + 1] + other
    assert prompt[9 + agreed] != past[9 + agreed]
    expected = cached(model, cache, prompt[: 9 + begun + 1], prompt[9 + begun + 1 :])
    detach(model)
    with kara_continuous_batching(model, **KARA, **FIND) as serving:
        ask(model, [first], 30)
        found = ask(model, [prompt], 30)
        assert found[0].generated_tokens == expected
        assert serving.metrics.found_tokens == (9 + begun if begun else 0)
    ended(audited[-1])


def test_a_compressed_prompt_is_a_past(model, audited):
    """A turn in which nothing is said goes on as if the answer had not ended."""
    first = prompts(2, shortest=40, longest=70)
    expected = [budgeted(model, prompt, 20, 30) for prompt in first]
    with kara_continuous_batching(model, retention=1.0, max_prompt_tokens=20, **FIND) as serving:
        begun = [result.generated_tokens for result in ask(model, first, 12)]
        after = ask(model, [prompt + tokens for prompt, tokens in zip(first, begun, strict=True)], 18)
        assert [tokens + result.generated_tokens for tokens, result in zip(begun, after, strict=True)] == expected
        assert serving.metrics.found_pasts == serving.metrics.prompts == 2
    ended(audited[-1])


# ------------------------------------------------------------------------------------------------------------ the room
def test_pasts_go_when_their_room_is_needed(model, audited):
    """Other requests run as if there had been none."""
    said, others = says(6, 1, longest=8), prompts(6, seed=9, longest=30)
    kara, config, runs = KARA | {"period": 1}, pool(blocks=80, max_requests_per_batch=8), {}
    for conversations in (0, 12):
        with kara_continuous_batching(model, **kara, conversations=conversations) as serving:
            ask(model, [turns[0] for turns in said], 30, config)
            metrics = serving.metrics
            pasts, steps, preemptions = metrics.pasts, metrics.steps, metrics.preemptions
            found = [result.generated_tokens for result in ask(model, others, 40, config)]
            runs[conversations] = found, metrics.steps - steps, metrics.preemptions - preemptions
    assert runs[12] == runs[0]
    assert pasts == 6 and metrics.pasts < 12
    ended(audited[-1])


def test_the_oldest_past_goes_first(model, audited):
    said = says(3, 3, longest=6)
    with kara_continuous_batching(model, **KARA, period=1, conversations=2) as serving:
        before = {}

        def turn(number, place):
            found = serving.metrics.found_pasts
            prompt = before.get(number, []) + said[number][place]
            before[number] = prompt + ask(model, [prompt], 14)[0].generated_tokens
            return serving.metrics.found_pasts > found

        assert not turn(0, 0) and not turn(1, 0)
        assert turn(0, 1)  # so that that of 1 is the oldest
        assert not turn(2, 0) and serving.metrics.pasts == 2
        assert turn(0, 2) and not turn(1, 1)
    ended(audited[-1])


def test_a_conversation_longer_than_the_pool(model, audited):
    """What its past leaves room for is no longer refused."""
    said, kara = says(1, 4, longest=6), KARA | {"retention": 0.25, "score": "recency"}
    expected = [kept(model, turns, 40, **kara) for turns in said]
    assert sum(map(len, said[0])) + 3 * 40 > 120
    with kara_continuous_batching(model, **kara, **FIND) as serving:
        assert talk(model, said, 40, config=pool(blocks=30)) == expected
        longer = says(1, 1, seed=8)[0][0] * 40
        assert "needs room for" in ask(model, [longer[:120]], 4)[0].error
        assert serving.metrics.refused == 1
    ended(audited[-1])


def test_swapped_requests_come_back_with_their_past(model, audited, unpinned):
    said, kara = says(5, 2, longest=8), KARA | {"score": "key-difference"}
    expected = [kept(model, turns, 40, **kara) for turns in said]
    with kara_continuous_batching(model, **kara, **FIND) as serving:
        assert talk(model, said, 40, pool(blocks=48, cpu_offload_space=0.01)) == expected
        assert serving.metrics.preemptions > 0 and serving.metrics.found_pasts == 5
    ended(audited[-1])


def test_cancelled_requests_leave_no_past(model, audited):
    """Nor does it hurt the past that one began with."""
    said = says(1, 2)[0]
    expected = kept(model, said, **KARA)
    with kara_continuous_batching(model, **KARA, **FIND) as serving:
        assert ask(model, [said[0]], 30)[0].generated_tokens == expected[0]
        manager = model.init_continuous_batching(generation(30), pool())
        manager.start()
        prompt = said[0] + expected[0] + said[1]
        manager.add_request(prompt, request_id="a", max_new_tokens=2000, streaming=True)
        assert manager.get_result(timeout=20).request_id == "a"
        manager.cancel_request("a")
        manager.add_request(prompt, request_id="b", max_new_tokens=30)
        while (result := manager.get_result(timeout=20)).request_id == "a":
            pass
        assert result.generated_tokens == expected[1]
        manager.stop(keep_for_next_session=True)
        assert serving.metrics.found_pasts == 2 and serving.metrics.pasts == 1
    ended(audited[-1])


@most_examples(8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    blocks=st.integers(14, 60),
    page=st.sampled_from([4, 8]),
    chunk=st.sampled_from([5, 256]),
    period=st.sampled_from([1, 7]),
    setting=st.sampled_from([{}, {"max_prompt_tokens": 7}, {"trigger": "pressure"}, {"unit": "trace"}]),
    score=st.sampled_from(["bidirectional", "key-difference"]),
    conversations=st.integers(1, 6),
    children=st.integers(0, 1),
    data=st.data(),
)
def test_nothing_is_lost(model, audited, blocks, page, chunk, period, setting, score, conversations, children, data):
    """Whatever the pool: every turn ends with all its tokens, from a past of its own, another's, or one cut short."""
    config = pool(blocks=blocks, page=page, batch=chunk)
    if "unit" in setting:
        score = "key-difference"
    kara = {"retention": 0.25, "window": 6, "recent": 2, "score": score, "period": period} | setting
    audited.clear()
    with kara_continuous_batching(model, **kara, conversations=conversations):
        texts = prompts(4, seed=data.draw(st.integers(0, 5)), longest=12)
        for _ in range(3):
            results = ask(model, texts, 20, config, children)
            assert len(results) == len(texts) * (1 + children)
            for result in results:
                if result.error is None:
                    assert len(result.generated_tokens) == 20
                else:
                    assert blocks * page < len(result.prompt_ids) + 31
                    assert "give the engine more memory" in result.error
            heard = [
                text + result.generated_tokens for text, result in zip(texts, results[:: 1 + children], strict=True)
            ]
            cuts = data.draw(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40)), min_size=4, max_size=4))
            texts = [heard[number][:length] + [7, 8, 9] for number, length in cuts]
    ended(audited[-1])


# ------------------------------------------------------------------------------------------------------------ settings
def test_what_is_refused(model):
    with pytest.raises(ValueError, match="conversations=-1 is not possible: .* a whole number from 0 on"):
        ServingConfig.of(conversations=-1)
    gemma = make(Gemma2Config, sliding_window=16, query_pre_attn_scalar=8)
    for refused, config in ((gemma, pool()), (model, pool(allow_block_sharing=False))):
        with kara_continuous_batching(refused, **KARA, **FIND):
            with pytest.raises(ValueError, match="conversations=8 is not possible with sliding-window layers"):
                batch(refused, prompts(1), config=config)


def test_settings_survive_json():
    for config in (ServingConfig(), ServingConfig.of(**KARA, **FIND, prompt_retention=0.5)):
        assert ServingConfig.from_json(config.to_json()) == config
    with pytest.raises(TypeError, match="windows"):
        ServingConfig.from_json('{"windows": 3}')
