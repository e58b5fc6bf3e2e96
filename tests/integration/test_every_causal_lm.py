"""Every causal LM of Transformers: exact at retention 1 or refused with its reason, and attaching is invisible.

Twenty classes, each there for a mechanism of its own, are checked here against the committed result of the sweep over
all of them; ``pytest -m slow tests/integration/test_every_causal_lm.py`` runs the whole sweep.
"""

import json
import subprocess
import sys

import pytest
import transformers
from support import sweep
from support.architectures_page import page, wrong
from support.causal_lms import check, classes

RESULT = sweep.read()
CHOSEN = {
    "LlamaForCausalLM": "sdpa",  # grouped queries
    "GPT2LMHeadModel": "sdpa",  # learned positions, looks at the name of its implementation
    "Gemma2ForCausalLM": "eager",  # capped scores, sliding layers
    "GptOssForCausalLM": "eager",  # attention sinks
    "FalconForCausalLM": "sdpa",  # calls sdpa itself
    "DeepseekV3ForCausalLM": "sdpa",  # latent attention
    "Llama4ForCausalLM": "sdpa",  # chunked layers
    "Qwen3NextForCausalLM": "sdpa",  # delta-rule layers between full ones
    "FalconH1ForCausalLM": "sdpa",  # attention and a recurrent state in one layer
    "Zamba2ForCausalLM": "sdpa",  # the same, in modules that several layers share
    "Gemma3nForCausalLM": "sdpa",  # layers that read keys of other layers
    "Gemma4ForCausalLM": "sdpa",  # the same, with fewer queries in those layers
    "MiniMaxM3VLForCausalLM": "sdpa",  # layers that select blocks of keys, by the name of the implementation
    "GlmMoeDsaForCausalLM": "sdpa",  # layers that select keys
    "MllamaForCausalLM": "sdpa",  # layers of cross-attention
    "HrmTextForCausalLM": "sdpa",  # modules that run several times in a forward
    "DoryForCausalLM": "sdpa",  # the same, with layers it adds to the cache
    "MiniMaxForCausalLM": "sdpa",  # a cache class of its own
    "MambaForCausalLM": "eager",  # no attention
    "BloomForCausalLM": "eager",  # attention of its own
}

newest = pytest.mark.skipif(
    transformers.__version__ != RESULT["transformers"],
    reason=f"the result is of Transformers {RESULT['transformers']}",
)


@pytest.mark.parametrize("name", CHOSEN)
def test_chosen_class(name):
    if not hasattr(transformers, name):
        pytest.skip(f"this version of Transformers has no {name}")
    implementation = CHOSEN[name]
    row = check(name, (implementation,))
    assert wrong(row) == []
    if transformers.__version__ == RESULT["transformers"]:
        known = RESULT["classes"][name]
        assert row["layers"] == known["layers"]
        assert row[implementation].items() <= known[implementation].items()


@newest
def test_result_says_which_classes_are_left():
    assert set(CHOSEN) <= set(RESULT["classes"]) <= set(classes())
    assert len(classes()) - len(RESULT["classes"]) == RESULT["left"]


def test_nothing_in_the_result_is_wrong():
    found = {name: wrong(row) for name, row in RESULT["classes"].items()}
    assert {name: what for name, what in found.items() if what} == {}


def test_page_is_made_of_the_result():
    assert sweep.PAGE.read_text() == page(RESULT)


@newest
@pytest.mark.slow
@pytest.mark.timeout(0)
def test_sweep():
    """In a process that no other test has touched."""
    assert shown() == RESULT["classes"]


@newest
@pytest.mark.slow
def test_a_part_of_the_sweep_shows_its_rows():
    assert shown("LlamaForCausalLM").keys() == {"LlamaForCausalLM"}


def shown(*names):
    command = [sys.executable, sweep.__file__, "show", *names]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    rows = (line.split(" ", 1) for line in told.splitlines())
    return {name: json.loads(row) for name, row in rows if name in classes()}
