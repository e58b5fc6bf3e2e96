"""The kit's methods in lm-evaluation-harness: a local task answered by the bundled model, and what is refused."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kara_hf.bundled import BUNDLED_MODEL
from kara_hf.tasks.reasoner import make_problem

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an extra: pip install 'kara_hf[harness]'")
from lm_eval.tasks import TaskManager  # noqa: E402

from kara_hf.evaluation.harness import KaraLM  # noqa: E402
from kara_hf.methods.registry import METHODS  # noqa: E402

MODEL = str(BUNDLED_MODEL)
ROOM = 130
SKELETON = {"window": 16, "recent": 8, "block_size": 4, "observation": 8}
PROBLEMS = [make_problem("trace", seed=40_000 + number, generated=90) for number in range(3)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a task to generate for and one to score, where nothing asks the hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    lines = [json.dumps({"prompt": problem.prompt, "answer": problem.answer}) for problem in PROBLEMS]
    (tmp_path / "problems.jsonl").write_text("\n".join(lines))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "problems.jsonl")}, "cache_dir": str(tmp_path)},
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
    }
    found = [{"function": "regex", "regex_pattern": "ans (.*)$"}, {"function": "take_first"}]
    solve = common | {
        "task": "solve",
        "output_type": "generate_until",
        "generation_kwargs": {"until": [], "max_gen_toks": ROOM, "do_sample": False},
        "filter_list": [{"name": "last", "filter": found}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    score = common | {"task": "score", "output_type": "loglikelihood", "metric_list": [{"metric": "perplexity"}]}
    for task in (solve, score):
        (tmp_path / f"{task['task']}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return tmp_path


def evaluate(folder, task="solve", **arguments):
    return lm_eval.simple_evaluate(
        model="kara_hf",
        model_args={"pretrained": MODEL, **arguments},
        tasks=[task],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=2,
        device="cpu",
        bootstrap_iters=0,
    )


def answers(results):
    samples = sorted(results["samples"]["solve"], key=lambda sample: sample["doc_id"])
    return [sample["resps"][0][0] for sample in samples]


def plain_answers():
    """What `generate` alone answers, one prompt at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)
    texts = []
    for problem in PROBLEMS:
        inputs = tokenizer(problem.prompt, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=ROOM, do_sample=False)
        texts.append(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


@pytest.fixture
def caches(monkeypatch):
    """The caches that method kara makes, with the lengths of the prompts that each was made for."""
    made = []
    kara = METHODS["kara"]

    def make(model, plan):
        made.append((kara.make(model, plan), plan.prompts))
        return made[-1][0]

    monkeypatch.setitem(METHODS, "kara", replace(kara, make=make))
    return made


# ---------------------------------------------------------------------------------------------------------- generating
def test_the_full_cache_answers_as_generate_does(folder):
    results = evaluate(folder, method="full")
    assert answers(results) == (texts := plain_answers())
    right = sum(problem.grade(text) for problem, text in zip(PROBLEMS, texts, strict=True))
    assert results["results"]["solve"]["exact_match,last"] == right / len(PROBLEMS) > 0


def test_every_batch_is_compressed_in_a_cache_of_its_own(folder, caches):
    full = evaluate(folder, method="full")
    results = evaluate(folder, method="kara", budget=0.25, rule="query-aware", **SKELETON)
    lengths = [len(problem.prompt.split()) for problem in PROBLEMS]
    assert sorted(length for _, prompts in caches for length in prompts) == sorted(lengths)
    assert [len(prompts) for _, prompts in caches] == [2, 1]
    for cache, prompts in caches:
        report = cache.report()
        assert report.full_bytes > 0 and (report.kept.amax(dim=(0, 2)) < report.seen / 2).all(), prompts
    assert 0 < results["config"]["cache_bytes"] < full["config"]["cache_bytes"]
    assert answers(results) != answers(full)


def test_a_pinned_prompt_is_kept_whole(folder, caches):
    evaluate(folder, budget=0.25, **SKELETON)
    for cache, prompts in caches:
        report = cache.report()
        kept = report.kept.amin(dim=(0, 2))
        assert (kept >= torch.tensor(prompts)).all() and (kept < report.seen).all()


def test_the_task_says_how_long_an_answer_may_be(folder):
    model = KaraLM(AutoModelForCausalLM.from_pretrained(MODEL), method="full", tokenizer=MODEL)
    assert model.model.generation_config.max_new_tokens > ROOM
    ids = torch.tensor([[7, 8, 9, 10]])
    new = model._model_generate(
        ids, 12, stop=[], attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=8
    )
    assert new.shape == (1, 12)


def test_settings_that_come_with_a_model_change_nothing(folder):
    own = AutoModelForCausalLM.from_pretrained(MODEL)
    model = KaraLM(own, method="kara", budget=0.25, tokenizer=MODEL, **SKELETON)
    ids = torch.tensor([[7, 8, 9, 10]])
    wanted = {"stop": [], "attention_mask": torch.ones_like(ids), "do_sample": False}
    clean = model._model_generate(ids, 40, **wanted)
    hostile = {"use_cache": False, "repetition_penalty": 9.0, "num_return_sequences": 2, "min_new_tokens": 30}
    for field, value in hostile.items():
        setattr(own.generation_config, field, value)
        assert torch.equal(model._model_generate(ids, 40, **wanted), clean), field
        assert getattr(own.generation_config, field) == value


@pytest.mark.slow
def test_the_command_is_the_harness_with_the_model_in_it(folder):
    command = [sys.executable, "-m", "kara_hf.evaluation.harness", "run", "--model", "kara_hf", "--tasks", "solve"]
    command += ["--include_path", str(folder), "--device", "cpu", "--limit", "1", "--output_path", str(folder / "out")]
    command += ["--model_args", f"pretrained={MODEL},method=streaming-llm,budget=0.5,rule=before,block_size=4"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "|solve" in done.stdout
    (file,) = (folder / "out").rglob("results_*.json")
    assert json.loads(file.read_text())["config"]["cache_bytes"] > 0


# -------------------------------------------------------------------------------------------------------------- refused
def test_loglikelihood_needs_the_full_cache(folder):
    with pytest.raises(ValueError, match="one forward pass, which reads no cache"):
        evaluate(folder, "score", method="kara", budget=0.5)
    assert evaluate(folder, "score", method="full")["results"]["score"]["perplexity,none"] > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "snap"}, "method='snap' is not possible"),
        ({"method": "oracle", "budget": 0.5}, "must be one that does not have to know the answer"),
        ({"method": "kara"}, "budget=None is not possible: budget must be a share"),
        ({"budget": 1.5}, "budget=1.5 is not possible"),
        ({"budget": "half"}, "budget='half' is not possible"),
        (
            {"budget": 0.5, "rule": "query-agnostic"},
            "rule='query-agnostic' .* must be one of prompt-kept, query-aware",
        ),
        ({"method": "full", "budget": 0.5}, "budget must be left out with method 'full'"),
        ({"method": "float8", "rule": "prompt-kept"}, "rule must be left out with method 'float8'"),
        ({"method": "pod"}, "sharing must be the folder of a sharing map with method 'pod'"),
        ({"budget": 0.5, "sharing": "map"}, "sharing must be left out with method 'kara'"),
    ],
)
def test_what_a_method_cannot_be_asked_for(arguments, message):
    with pytest.raises(ValueError, match=message):
        KaraLM(MODEL, device="cpu", **arguments)


def test_an_argument_that_nobody_knows_is_refused():
    with pytest.raises(TypeError, match="retention"):
        KaraLM(MODEL, device="cpu", budget=0.5, retention=0.5)
