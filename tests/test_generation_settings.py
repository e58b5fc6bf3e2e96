"""What comes with a model and would change an answer: the kit and the command set what they depend on."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig
from typer.testing import CliRunner

from kara_hf.bundled import BUNDLED_MODEL
from kara_hf.cli import app as cli
from kara_hf.evaluation.measure.evaluator import Evaluator
from kara_hf.evaluation.measure.request import Request
from kara_hf.evaluation.measure.results import load
from kara_hf.integration.generation import check_used, end_tokens, for_forward, greedy, ignored, only
from kara_hf.methods.registry import SharedSettings, make_method
from kara_hf.tasks import make_task

FILE = "generation_config.json"
TASK = "fact:generated=60"
PROMPT = "ba : 3 ; ce : 4 ; di : ba + ce ; ? ba di >"
SHARED = SharedSettings(window=16, recent=4, block_size=4)

# For every field a value that changes what `generate` returns, or ends it, if it counts.
HOSTILE = {
    "assistant_confidence_threshold": 0.9,
    "assistant_early_exit": 2,
    "assistant_ensemble_weight": 0.5,
    "assistant_lookbehind": 3,
    "bad_words_ids": [[number] for number in range(5, 40)],
    "begin_suppress_tokens": list(range(5, 90)),
    "bos_token_id": 7,
    "cache_config": {"nbits": 2},
    "cache_implementation": "static",
    "compile_config": {"fullgraph": True, "backend": "inductor"},
    "constraints": [1],
    "continuous_batching_config": {},
    "decoder_start_token_id": 9,
    "disable_compile": True,
    "diversity_penalty": 0.7,
    "do_sample": True,
    "dola_layers": "low",
    "early_stopping": True,
    "encoder_no_repeat_ngram_size": 1,
    "encoder_repetition_penalty": 3.0,
    "epsilon_cutoff": 0.5,
    "eta_cutoff": 0.5,
    "exponential_decay_length_penalty": [1, 4.0],
    "force_words_ids": [[6], [7]],
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 7,
    "guidance_scale": 3.0,
    "is_assistant": True,
    "length_penalty": 9.0,
    "low_memory": True,
    "max_cache_len": 4,
    "max_length": 3,
    "max_matching_ngram_size": 1,
    "max_new_tokens": 1,
    "max_time": 1e-9,
    "min_length": 900,
    "min_new_tokens": 900,
    "min_p": 0.9,
    "no_repeat_ngram_size": 1,
    "num_assistant_tokens": 1,
    "num_assistant_tokens_schedule": "heuristic",
    "num_beam_groups": 2,
    "num_beams": 3,
    "num_return_sequences": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_logits": True,
    "output_scores": True,
    "pad_token_id": 8,
    "penalty_alpha": 0.6,
    "prefill_chunk_size": 3,
    "prompt_lookup_num_tokens": 3,
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "repetition_penalty": 9.0,
    "return_dict_in_generate": True,
    "sequence_bias": [[[5], -99.0], [[6], 99.0]],
    "speculation_type": "mtp",
    "stop_strings": ["ans", ";"],
    "suppress_tokens": list(range(5, 90)),
    "target_lookbehind": 3,
    "temperature": 40.0,
    "token_healing": True,
    "top_h": 0.4,
    "top_k": 1,
    "top_p": 0.1,
    "typical_p": 0.1,
    "use_cache": False,
    "use_mtp": True,
    "watermarking_config": {"greenlist_ratio": 0.1, "bias": 40.0},
}
# What a model's end tokens are is its own to say; a result carries it.
ITS_OWN = {"eos_token_id"}
NO_SETTING = {"_from_model_config", "transformers_version"}


def model_with(tmp_path, **fields):
    """A folder of the bundled model whose generation settings say that too."""
    folder = tmp_path / "model"
    shutil.copytree(BUNDLED_MODEL, folder, dirs_exist_ok=True)
    path = folder / FILE
    path.write_text(json.dumps(json.loads((BUNDLED_MODEL / FILE).read_text()) | fields))
    return folder


def evaluator_of(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    return Evaluator(model, tokenizer, name="tiny", weights="w", limit=4096)


def request(**changes):
    settings = {"budgets": (0.5,), "n": 2, "batch": 2, "equal": "tokens", "shared": SHARED}
    return Request([make_method("kara-top-k")], **settings | changes)


def measured(folder, out, **changes):
    """What does not depend on the clock."""
    evaluator = evaluator_of(folder)
    evaluator.measure(make_task(TASK, evaluator.tokenizer), request(**changes), out)
    return load(out)[["number", "score", "generated", "truncated", "resident_bytes", "peak_bytes", "text"]]


def invoke(*args):
    return CliRunner().invoke(cli.app, [str(arg) for arg in args], env={"COLUMNS": "200", "NO_COLOR": "1"})


def generated(folder):
    options = ["--cache", "kara", "--window", 8, "--recent", 4, "--block-size", 4, "--max-new-tokens", 12]
    return invoke("generate", PROMPT, "--model", folder, "--device", "cpu", *options)


def without_speed(output):
    return [line for line in output.splitlines() if "tokens/s" not in line]


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    folder = model_with(tmp_path_factory.mktemp("clean"))
    done = generated(folder)
    assert done.exit_code == 0, done.output
    return measured(folder, folder / "out"), without_speed(done.stdout)


def test_the_table_names_every_field():
    assert HOSTILE.keys() | ITS_OWN | NO_SETTING >= vars(GenerationConfig()).keys()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("field", sorted(HOSTILE.keys() & vars(GenerationConfig()).keys()))
def test_no_field_of_a_model_changes_what_is_measured_or_shown(field, clean, tmp_path):
    folder = model_with(tmp_path, **{field: HOSTILE[field]})
    found, output = clean
    done = generated(folder)
    if done.exit_code:  # Transformers itself refuses to load it
        assert done.exit_code in (1, 2) and field in done.stderr, done.output
        with pytest.raises(ValueError, match=field):
            evaluator_of(folder)
        return
    assert without_speed(done.stdout) == output
    assert measured(folder, tmp_path / "out").equals(found)
    given = {"bos_token_id", "decoder_start_token_id", "max_length", "max_new_tokens", "pad_token_id"}
    if field not in given and HOSTILE[field] != {}:
        assert f"Left out of {FILE}" in done.stderr and f"{field}=" in done.stderr


def test_a_clean_model_is_told_nothing(tmp_path):
    assert "Left out" not in generated(model_with(tmp_path, do_sample=False, temperature=1.0, use_cache=True)).stderr


@pytest.mark.parametrize("ends", ["<eos>", -1, [2, None], 1.5])
def test_ends_that_are_no_tokens_are_refused_by_name(ends, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL)
    model.generation_config.eos_token_id = ends
    with pytest.raises(ValueError, match=r"generation_config.eos_token_id=.* must be a token id, a list of them"):
        end_tokens(model)


# ------------------------------------------------------------------------------------------------------------- identity
@pytest.mark.parametrize(
    "change",
    ["eos", "dtype", "config", "tokenizer", "template"],
)
def test_rows_of_other_settings_are_not_added_to(change, tmp_path):
    evaluator = evaluator_of(BUNDLED_MODEL)
    task = make_task(TASK, evaluator.tokenizer)
    evaluator.measure(task, request(n=1), tmp_path)
    other = evaluator_of(BUNDLED_MODEL)
    if change == "eos":
        other.model.generation_config.eos_token_id = [2, 9]
    elif change == "dtype":
        other.model.to(torch.bfloat16)
    elif change == "config":
        other.model.config.rms_norm_eps = 1e-3
    elif change == "tokenizer":
        other.tokenizer.add_tokens(["zyx"])
    else:
        other.tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(ValueError, match="holds results of another setting .*settings model"):
        other.measure(task, request(), tmp_path)
    assert len(load(tmp_path)) == 1


def test_rows_of_another_text_are_not_added_to(tmp_path):
    pytest.importorskip("datasets")
    pytest.importorskip("math_verify")
    rows = [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(3)]
    path = tmp_path / "mine.jsonl"
    evaluator = evaluator_of(BUNDLED_MODEL)
    for last in ("#### 3", "#### 4"):
        rows[2]["answer"] = last
        path.write_text("\n".join(map(json.dumps, rows)))
        task = make_task(f"gsm8k:path={path}:max_new_tokens=2", evaluator.tokenizer)
        if last == "#### 3":
            evaluator.measure(task, request(n=2), tmp_path / "out")
    with pytest.raises(ValueError, match="settings task"):
        evaluator.measure(task, request(n=3), tmp_path / "out")


def test_a_result_says_what_it_was_generated_by(tmp_path):
    evaluator = evaluator_of(BUNDLED_MODEL)
    evaluator.measure(make_task(TASK, evaluator.tokenizer), request(n=1), tmp_path)
    settings = load(tmp_path)["settings"][0]
    ends = end_tokens(evaluator.model)
    generation = {"do_sample": False, "num_beams": 1, "use_cache": True, "eos_token_id": ends}
    assert settings["model"]["generation"] == generation and settings["model"]["dtype"] == "float32"


# ----------------------------------------------------------------------------------------- the cache that is used
class Dropping(DynamicCache):
    """A cache that its model leaves, as models with LongRoPE do at the length that they were trained with."""


def dropping(model, monkeypatch):
    own = model._update_model_kwargs_for_generation

    def update(outputs, kwargs, *args, **more):
        kwargs = own(outputs, kwargs, *args, **more)
        name = next(name for name in ("cache", "past_key_values") if name in kwargs)
        return kwargs | {name: DynamicCache(config=model.config)}

    monkeypatch.setattr(model, "_update_model_kwargs_for_generation", update)


def test_a_cache_that_was_left_has_no_figures(monkeypatch, tmp_path):
    evaluator = evaluator_of(BUNDLED_MODEL)
    dropping(evaluator.model, monkeypatch)
    with pytest.raises(ValueError, match="left the KaraCache that it was given and went on with DynamicCache"):
        evaluator.measure(make_task(TASK, evaluator.tokenizer), request(), tmp_path)
    with pytest.raises(ValueError, match="there are no results"):
        load(tmp_path)


def test_what_is_left_names_the_length():
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL)
    model.config.original_max_position_embeddings = 4096
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    config = greedy(model, tokenizer, max_new_tokens=2)
    ids = torch.tensor([[7, 8, 9]])
    with only(model, config):
        out = model.generate(ids, attention_mask=torch.ones_like(ids))
    with pytest.raises(ValueError, match=r"stay below 4,096 tokens \(original_max_position_embeddings\)"):
        check_used(model, DynamicCache(), out)


def test_a_models_settings_are_its_own_again():
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL)
    own, tokenizer = model.generation_config, AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    with pytest.raises(KeyError), only(model, greedy(model, tokenizer)):
        assert model.generation_config is not own
        raise KeyError
    assert model.generation_config is own


def test_a_forward_uses_the_cache_whatever_the_config_says():
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL)
    model.config.use_cache = False
    cache = DynamicCache()
    out = model(torch.tensor([[7, 8, 9]]), **for_forward(model, cache))
    assert cache.get_seq_length() == 3 and any(value is cache for value in out.values())


def test_what_is_ignored_is_what_would_change_something():
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL)
    model.generation_config.update(temperature=0.6, top_p=1.0, do_sample=True, use_cache=False, num_beams=1)
    found = ignored(model)
    assert found.items() >= {"temperature": 0.6, "do_sample": True, "use_cache": False}.items()
    assert not {"top_p", "num_beams", "eos_token_id"} & found.keys()


def test_no_path_of_the_kit_or_the_command_is_deprecated(tmp_path, recwarn):
    rules = ("prompt-kept", "query-agnostic")
    measured(BUNDLED_MODEL, tmp_path, rules=rules, equal="bytes", reference=make_method("random"))
    assert generated(BUNDLED_MODEL).exit_code == 0
    assert [str(found.message) for found in recwarn if "deprecated" in str(found.message)] == []
