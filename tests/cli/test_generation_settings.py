"""What comes with a model and would change an answer: the kit and the command set what they depend on."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from support.marks import slow
from transformers import DynamicCache, GenerationConfig, Phi3Config, Phi3ForCausalLM
from typer.testing import CliRunner

from kara_hf import detach
from kara_hf.bundled import BUNDLED_MODEL
from kara_hf.cli import app as cli
from kara_hf.cli.runs import compare
from kara_hf.evaluation.measure.evaluator import Evaluator
from kara_hf.evaluation.measure.request import Request
from kara_hf.evaluation.measure.results import load
from kara_hf.integration.generation import check_used, end_tokens, for_forward, generate, greedy, ignored, only
from kara_hf.integration.loading import LoadedModel
from kara_hf.methods.caches import configured_caches
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
NO_SETTING = {"_commit_hash", "_from_model_config", "transformers_version"}


KNOWN = HOSTILE.keys() & vars(GenerationConfig()).keys()
# One of each kind: what switches caches, what searches, what changes likelihoods, what stops, what returns otherwise.
FEW = {"cache_implementation", "num_beams", "do_sample", "repetition_penalty", "max_time", "min_new_tokens"}
FEW |= {"stop_strings", "prompt_lookup_num_tokens", "return_dict_in_generate"}
# A few that the command and the kit are given in a folder, as they come.
IN_A_FOLDER = ["use_cache", *map(slow, ("cache_implementation", "repetition_penalty", "return_dict_in_generate"))]


def settings_with(folder, **fields):
    """Writes the bundled model's generation settings with these fields, as they come with a model."""
    folder.mkdir(exist_ok=True)
    (folder / FILE).write_text(json.dumps(json.loads((BUNDLED_MODEL / FILE).read_text()) | fields))
    return folder


def model_with(folder, **fields):
    shutil.copytree(BUNDLED_MODEL, folder, dirs_exist_ok=True)
    return settings_with(folder, **fields)


def loaded_from(folder):
    loaded = LoadedModel(str(folder), device="cpu", dtype="float32")
    loaded.tokenizer.padding_side = "left"
    return loaded


@pytest.fixture(scope="module")
def loaded():
    return loaded_from(BUNDLED_MODEL)


@pytest.fixture(autouse=True)
def settings_forgotten(loaded):
    own = GenerationConfig.from_pretrained(BUNDLED_MODEL)
    yield
    loaded.model.generation_config = own


def evaluator_of(loaded):
    return Evaluator(loaded.model, loaded.tokenizer, name="tiny", weights="w", limit=4096)


def request(**changes):
    settings = {"budgets": (0.5,), "n": 1, "batch": 2, "equal": "tokens", "shared": SHARED}
    return Request([make_method("kara-top-k")], **settings | changes)


def measured(loaded, out, **changes):
    """What does not depend on the clock."""
    evaluator = evaluator_of(loaded)
    evaluator.measure(make_task(TASK, loaded.tokenizer), request(**changes), out)
    return load(out)[["number", "score", "generated", "truncated", "resident_bytes", "peak_bytes", "text"]]


def shown(loaded):
    """What the command shows of a run, but for the speed."""
    methods = configured_caches(["kara"], {"window": 8, "recent": 4, "block_size": 4}, {})
    ids = loaded.encode(PROMPT, chat=False)
    (run,) = compare(loaded, list(methods.values()), ids, max_new_tokens=12, stream=False, problem=None)
    return replace(run, decode_rate=None, report=None)


def invoke(*args):
    return CliRunner().invoke(cli.app, [str(arg) for arg in args], env={"COLUMNS": "200", "NO_COLOR": "1"})


def generated(folder):
    options = ["--cache", "kara", "--window", 8, "--recent", 4, "--block-size", 4, "--max-new-tokens", 12]
    return invoke("generate", PROMPT, "--model", folder, "--device", "cpu", *options)


def without_speed(output):
    return [line for line in output.splitlines() if "tokens/s" not in line]


@pytest.fixture(scope="module")
def clean(loaded, tmp_path_factory):
    return measured(loaded, tmp_path_factory.mktemp("clean")), shown(loaded)


def test_the_table_names_every_field():
    assert HOSTILE.keys() | ITS_OWN | NO_SETTING >= vars(GenerationConfig()).keys()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("field", [each if each in FEW else slow(each) for each in sorted(KNOWN)])
def test_no_field_of_a_model_changes_what_is_measured_or_shown(field, clean, loaded, tmp_path):
    folder = settings_with(tmp_path / "model", **{field: HOSTILE[field]})
    try:
        loaded.model.generation_config = GenerationConfig.from_pretrained(folder)
    except (ValueError, TypeError) as error:  # Transformers refuses it, and the model with it
        assert field in str(error)
        return
    frame, run = clean
    assert shown(loaded) == run
    assert measured(loaded, tmp_path / "out").equals(frame)
    given = {"bos_token_id", "decoder_start_token_id", "max_length", "max_new_tokens", "pad_token_id"}
    assert (field in ignored(loaded.model)) == (field not in given and HOSTILE[field] != {})


@pytest.fixture(scope="module")
def clean_output(tmp_path_factory):
    done = generated(model_with(tmp_path_factory.mktemp("models") / "model"))
    assert done.exit_code == 0 and "Left out" not in done.stderr, done.output
    return without_speed(done.stdout)


@pytest.mark.parametrize("field", IN_A_FOLDER)
def test_the_command_says_what_of_a_model_does_not_count(field, clean_output, tmp_path):
    done = generated(model_with(tmp_path / "model", **{field: HOSTILE[field]}))
    assert done.exit_code == 0, done.output
    assert without_speed(done.stdout) == clean_output
    assert f"Left out of {FILE} of model: {field}={json.dumps(HOSTILE[field])}" in " ".join(done.stderr.split())


@pytest.mark.parametrize(("field", "value"), [("max_new_tokens", -3), ("num_return_sequences", 2)])
def test_a_model_that_cannot_be_loaded_names_the_field(field, value, tmp_path):
    done = generated(model_with(tmp_path / "model", **{field: value}))
    assert done.exit_code == 1 and field in done.stderr and "cannot be loaded" in done.stderr


@pytest.mark.parametrize("ends", ["<eos>", -1, [2, None], 1.5])
def test_ends_that_are_no_tokens_are_refused_by_name(ends, loaded):
    loaded.model.generation_config.eos_token_id = ends
    with pytest.raises(ValueError, match=r"generation_config.eos_token_id=.* must be a token id, a list of them"):
        end_tokens(loaded.model)


# ------------------------------------------------------------------------------------------------------------- identity
@pytest.mark.parametrize("change", ["eos", "dtype", "config", "tokenizer", "template"])
def test_rows_of_other_settings_are_not_added_to(change, loaded, tmp_path):
    task = make_task(TASK, loaded.tokenizer)
    evaluator_of(loaded).measure(task, request(n=1), tmp_path)
    other = loaded_from(BUNDLED_MODEL)
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
        evaluator_of(other).measure(task, request(), tmp_path)
    assert len(load(tmp_path)) == 1


def test_rows_of_another_text_are_not_added_to(loaded, tmp_path):
    pytest.importorskip("datasets")
    pytest.importorskip("math_verify")
    rows = [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(3)]
    path = tmp_path / "mine.jsonl"
    evaluator = evaluator_of(loaded)
    for last in ("#### 3", "#### 4"):
        rows[2]["answer"] = last
        path.write_text("\n".join(map(json.dumps, rows)))
        task = make_task(f"gsm8k:path={path}:max_new_tokens=2", evaluator.tokenizer)
        if last == "#### 3":
            evaluator.measure(task, request(n=2), tmp_path / "out")
    with pytest.raises(ValueError, match="settings task"):
        evaluator.measure(task, request(n=3), tmp_path / "out")


def test_a_result_says_what_it_was_generated_by(loaded, tmp_path):
    evaluator = evaluator_of(loaded)
    evaluator.measure(make_task(TASK, evaluator.tokenizer), request(n=1), tmp_path)
    settings = load(tmp_path)["settings"][0]
    ends = end_tokens(evaluator.model)
    generation = {"do_sample": False, "num_beams": 1, "use_cache": True, "eos_token_id": ends}
    assert settings["model"]["generation"] == generation and settings["model"]["dtype"] == "float32"


# ----------------------------------------------------------------------------------------- the cache that is used
def dropping(model, monkeypatch):
    """Has the model leave its cache after the prompt, as models with LongRoPE do at the length of their training."""
    own = model._update_model_kwargs_for_generation

    def update(outputs, kwargs, *args, **more):
        kwargs = own(outputs, kwargs, *args, **more)
        name = next(name for name in ("cache", "past_key_values") if name in kwargs)
        return kwargs | {name: DynamicCache(config=model.config)}

    monkeypatch.setattr(model, "_update_model_kwargs_for_generation", update)


def test_a_cache_that_was_left_has_no_figures(loaded, monkeypatch, tmp_path):
    evaluator = evaluator_of(loaded)
    dropping(evaluator.model, monkeypatch)
    with pytest.raises(ValueError, match="left the KaraCache that it was given and went on with DynamicCache"):
        evaluator.measure(make_task(TASK, evaluator.tokenizer), request(), tmp_path)
    with pytest.raises(ValueError, match="there are no results"):
        load(tmp_path)
    with pytest.raises(ValueError, match="left the KaraCache"):
        shown(loaded)


def test_the_length_at_which_a_model_leaves_its_cache_is_named(loaded, monkeypatch):
    monkeypatch.setattr(loaded.model.config, "original_max_position_embeddings", 4096, raising=False)
    ids = torch.tensor([[7, 8, 9]])
    config = greedy(loaded.model, loaded.tokenizer, max_new_tokens=2)
    with only(loaded.model, config):
        out = loaded.model.generate(ids, attention_mask=torch.ones_like(ids))
    with pytest.raises(ValueError, match=r"stay below 4,096 tokens \(original_max_position_embeddings\)"):
        check_used(loaded.model, DynamicCache(), out)


def test_a_models_settings_are_its_own_again(loaded):
    own = loaded.model.generation_config
    with pytest.raises(KeyError), only(loaded.model, greedy(loaded.model, loaded.tokenizer)):
        assert loaded.model.generation_config is not own
        raise KeyError
    assert loaded.model.generation_config is own


def test_a_forward_uses_the_cache_whatever_the_config_says(loaded, monkeypatch):
    monkeypatch.setattr(loaded.model.config, "use_cache", False)
    detach(loaded.model)
    cache = DynamicCache()
    out = loaded.model(torch.tensor([[7, 8, 9]]), **for_forward(loaded.model, cache))
    assert cache.get_seq_length() == 3 and any(value is cache for value in out.values())


def test_what_is_ignored_is_what_would_change_something(loaded):
    settings = {"temperature": 0.6, "top_p": 1.0, "do_sample": True, "use_cache": False, "num_beams": 1}
    loaded.model.generation_config.update(**settings)
    assert ignored(loaded.model) == {"temperature": 0.6, "do_sample": True, "use_cache": False}


def test_no_path_of_the_kit_or_the_command_is_deprecated(loaded, tmp_path, recwarn):
    measured(loaded, tmp_path, rules=("query-agnostic",), equal="bytes", reference=make_method("random"))
    shown(loaded)
    assert [str(found.message) for found in recwarn if "deprecated" in str(found.message)] == []


def test_a_model_with_longrope_is_refused_where_it_leaves_its_cache(loaded):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [3.0] * 8}
    rope |= {"original_max_position_embeddings": 24, "factor": 10.0}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "vocab_size": 97, "max_position_embeddings": 512}
    tokens = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    config = Phi3Config(**sizes, **tokens, original_max_position_embeddings=24, rope_parameters=rope)
    model = Phi3ForCausalLM(config).eval()
    inputs = {"input_ids": torch.full((1, 16), 7), "attention_mask": torch.ones(1, 16, dtype=torch.long)}
    short, long = (greedy(model, loaded.tokenizer, max_new_tokens=new) for new in (6, 16))
    assert generate(model, DynamicCache(config=config), short, **inputs).shape == (1, 22)
    with pytest.raises(ValueError, match="left the DynamicCache .* stay below 24 tokens"):
        generate(model, DynamicCache(config=config), long, **inputs)
