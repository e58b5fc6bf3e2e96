"""The next turn of a conversation begins with its compressed past: KaraCache's answers, and far less to read."""

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from packaging.version import Version
from support.marks import most_examples, slow
from support.serving import CACHE, KARA, audit, batch, ended, generation, make, pool, prompts, single
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


def talks(count, turns, seed=3, longest=12):
    """What users say, turn by turn."""
    said = iter(prompts(count * turns, seed=seed, longest=longest))
    return [[next(said) for _ in range(turns)] for _ in range(count)]


def served(model, said, tokens=40, config=None):
    """Answers by conversation and turn; each turn's prompt is all that was said before."""
    detach(model)
    past, answers = [[] for _ in said], [[] for _ in said]
    for turn in zip(*said, strict=True):
        inputs = [before + new for before, new in zip(past, turn, strict=True)]
        out = model.generate_batch(
            inputs,
            generation_config=generation(tokens),
            continuous_batching_config=config or pool(),
            persistent_manager=True,
        )
        for number, (prompt, result) in enumerate(zip(inputs, out.values(), strict=True)):
            assert result.error is None, result.error
            answers[number].append(result.generated_tokens)
            past[number] = prompt + result.generated_tokens
    return answers


def kept(model, said, tokens=40, **kara):
    """The answers of one conversation over a `KaraCache` that is kept between turns."""
    cache, past, answers = KaraCache(model, **{"block_size": 4} | kara), [], []
    for new in said:
        prompt = past + new
        past = model.generate(torch.tensor([prompt]), **{CACHE: cache}, generation_config=generation(tokens))[0].tolist()
        answers.append(past[len(prompt) :])
    detach(model)
    return answers


# ------------------------------------------------------------------------------------------------- KaraCache's answers
@pytest.mark.parametrize(
    "changes",
    [{}, {"score": "random-chunks", "queries": None}, *map(slow, ({"score": "recency"}, {"recent": 0.3}, {"sinks": 0}))],
    ids=str,
)
def test_equals_kara_cache_kept_between_turns(model, changes, audited):
    kara, said = KARA | changes, talks(2, 3)
    expected = [kept(model, turns, **kara) for turns in said]
    with kara_continuous_batching(model, **kara, **FIND) as serving:
        assert served(model, said) == expected
        metrics = serving.metrics
        assert metrics.found_pasts == 4 and metrics.pasts == 2
        model.destroy_cached_continuous_batching_manager()
