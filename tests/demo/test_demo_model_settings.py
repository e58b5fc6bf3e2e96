"""Models with settings of their own: what the demo shows is greedy, and of a cache that was in use, or nothing."""

import json
import shutil

import pytest
import torch
from support.architectures import PAD_TOKEN_ID
from support.demo import TINY, finished, make
from support.marks import few
from support.tokenizing import tokenizer
from transformers import Phi3Config, Phi3ForCausalLM

from kara_hf.demo.models import BUNDLED, Models
from kara_hf.demo.presets import FULL, KARA, OWN

PROMPT = {"task": OWN, "text": "ba : 8 ; xa : 4 ; qo : ba + xa ; wu : qo + ba ; ? wu qo >", "beside": True}
HOSTILE = {
    "no cache": {"use_cache": False},
    "another cache": {"cache_implementation": "static", "cache_config": {"backend": "quanto", "nbits": 4}},
    "sampling": {"do_sample": True, "temperature": 9.0, "top_k": 3, "top_p": 0.2, "min_p": 0.1},
    "several texts": {"num_return_sequences": 3, "num_beams": 3, "early_stopping": True, "length_penalty": 5.0},
    "penalties": {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "encoder_repetition_penalty": 3.0},
    "an early end": {"stop_strings": [";"], "max_length": 3, "max_new_tokens": 1, "max_time": 1e-9},
    "a late end": {"min_length": 400, "min_new_tokens": 300},
    "forced and forbidden tokens": {"forced_eos_token_id": 7, "suppress_tokens": [4, 5, 6], "bad_words_ids": [[9]]},
    "more than ids": {"return_dict_in_generate": True, "output_scores": True, "output_attentions": True},
    "drafts": {"prompt_lookup_num_tokens": 3, "num_assistant_tokens": 5},
    "guidance, chunks, healing": {"guidance_scale": 3.0, "prefill_chunk_size": 4, "token_healing": True},
}


def with_settings(folder, **changes):
    """The small bundled model with other settings of generation: `Models` that has it under the name of the folder."""
    shutil.copytree(BUNDLED[TINY], folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return Models([str(folder)], device="cpu")


@pytest.fixture(scope="module")
def expected(models):
    return [run.recording for run in finished(make(models, **PROMPT)).runs]


@pytest.mark.parametrize("case", few(list(HOSTILE), "no cache", "several texts", "an early end", "a late end"))
def test_settings_that_come_with_a_model_change_nothing(expected, tmp_path, case):
    models = with_settings(tmp_path / "hostile", **HOSTILE[case])
    loaded = models.load("hostile")
    loaded.own_words = True  # as it was trained: without a chat template
    for run, wanted in zip(finished(make(models, model="hostile", **PROMPT)).runs, expected, strict=True):
        recording = run.recording
        assert recording.tokens == wanted.tokens and recording.end["reason"] == "end", recording.end
        assert recording.changes == wanted.changes
        assert [sample[:2] for sample in recording.samples] == [sample[:2] for sample in wanted.samples]


def test_end_tokens_that_are_none_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="generation_config.eos_token_id=-5 is not possible"):
        with_settings(tmp_path / "odd", eos_token_id=-5).load("odd")


def test_a_generate_of_the_models_own_is_refused_by_name(tmp_path):
    folder = tmp_path / "own"
    shutil.copytree(BUNDLED[TINY], folder)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("def generate(model, **kwargs):\n    return None\n")
    Models([str(folder)], device="cpu", trust_remote_code=False).load("own")  # its code is not even read
    with pytest.raises(ValueError, match="model='own' is not possible: it brings a generate of its own"):
        Models([str(folder)], device="cpu", trust_remote_code=True).load("own")


@pytest.mark.parametrize("choice", [FULL, KARA, "KV-Compress"])
def test_nothing_is_shown_of_a_cache_that_the_model_left(tmp_path, choice):
    """LongRoPE: where its factors change, Transformers goes on with a cache of its own."""
    words, switch, half = tokenizer("bytes"), 40, 8
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * half, "long_factor": [3.0] * half}
    config = Phi3Config(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=400,
        original_max_position_embeddings=switch,
        rope_parameters=rope | {"original_max_position_embeddings": switch, "factor": 10.0},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=PAD_TOKEN_ID,
    )
    torch.manual_seed(0)
    Phi3ForCausalLM(config).save_pretrained(tmp_path / "long")
    words.save_pretrained(tmp_path / "long")
    models = Models([str(tmp_path / "long")], device="cpu")
    session = finished(make(models, model="long", task=OWN, text="x" * 20, new=100, choice=choice))
    (recording,) = (run.recording for run in session.runs)
    assert recording.end["reason"] == "error" and "cache" in recording.end["error"]
    assert max((seen for seen, *_ in recording.samples), default=0) <= switch
    assert recording.seen <= switch
