"""The bundled model solves test problems, needs its cache to do so, and its training resumes exactly."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from support.marks import slow
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import kara_hf
from kara_hf import PoDSharing
from kara_hf.evaluation.measure.evaluator import Evaluator
from kara_hf.methods.registry import METHODS, Plan, SharedSettings
from kara_hf.pod.similarity import LayerSimilarity
from kara_hf.tasks import reasoner_tasks as _tasks  # noqa: F401  registers the tasks of the bundled models
from kara_hf.tasks.reasoner import VOCABULARY, make_problem, split_of
from kara_hf.tasks.task import make_task

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(kara_hf.__file__).parent / "assets" / "tiny_reasoner"
DEEP = Path(__file__).parents[1] / "data" / "deep_reasoner"


def load_script(path):
    """Import a script that is not part of the package."""
    name = f"script_{path.parent.name}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def answered(folder, model, tokenizer, task, n):
    """Scores and lengths of the first `n` examples of a task, by the full cache, and how many did not end."""
    evaluator = Evaluator(model, tokenizer, name=folder.name, weights="", limit=model.config.max_position_embeddings)
    prompts = [evaluator.prompt(make_task(task, tokenizer), number) for number in range(n)]
    room = max(prompt.example.max_new_tokens for prompt in prompts)
    plan = Plan(SharedSettings(), "none", 1.0, [len(prompt.ids) for prompt in prompts])
    lines = evaluator.lines(prompts, evaluator.answer(prompts, METHODS["full"], plan, room=room), room, False)
    return sum(line["score"] for line in lines), sum(line["truncated"] for line in lines)


def test_the_folder_is_small_and_whole():
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    needed = {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    }
    assert needed <= set(files)
    assert sum(files.values()) < 16 * 2**20


def test_the_architecture_has_grouped_queries(model):
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (8, 2)
    assert model.config.max_position_embeddings >= 4096
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_the_tokenizer_maps_one_word_to_one_token(tokenizer):
    text = " ".join(VOCABULARY)
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(set(ids)) == len(VOCABULARY)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.padding_side == "left"
    assert tokenizer("no such words")["input_ids"][1:] == [tokenizer.unk_token_id] * 2


@pytest.mark.parametrize(
    "task",
    ["trace:generated=100", slow("trace:generated=300"), "fact:generated=300", "recall:length=256", "copy:length=256"],
)
def test_test_problems_are_solved_and_end_by_themselves(task, model, tokenizer):
    right, unfinished = answered(FOLDER, model, tokenizer, task, 12)
    assert right >= 10 and unfinished <= 1


@torch.inference_mode()
def test_one_evicted_token_ruins_an_answer_and_others_do_not(model, tokenizer):
    """Take the keys and values of a stated-once digit away before the answer is read, or those of other digits."""
    right = {"full": 0, "needed": 0, "other": 0}
    for seed in range(8):
        problem = make_problem("fact", generated=128, seed=20_000 + seed)
        asked, value = problem.answer.split()[:2]
        words = f"{problem.prompt} {problem.completion}".split()
        words = words[: len(words) - 3]
        start = len(problem.prompt.split())
        needed = next(at + 1 for at in range(start, len(words)) if words[at] == asked and words[at + 1].isdigit())
        other = next(at for at in range(needed + 30, len(words)) if words[at].isdigit())
        ids = torch.tensor([tokenizer.convert_tokens_to_ids(words)])
        for kind, evicted in (("full", None), ("needed", needed), ("other", other)):
            cache = DynamicCache(config=model.config)
            model(input_ids=ids[:, :-1], past_key_values=cache)
            mask = torch.ones_like(ids)
            if evicted is not None:
                mask[0, evicted] = 0
            positions = torch.tensor([[ids.shape[1] - 1]])
            logits = model(
                input_ids=ids[:, -1:], past_key_values=cache, attention_mask=mask, position_ids=positions
            ).logits[0, -1]
            right[kind] += tokenizer.decode(logits.argmax()) == value
    assert right["full"] == right["other"] == 8
    assert right["needed"] <= 4


@pytest.fixture
def trainer(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return load_script(ROOT / "examples" / "train_tiny_reasoner.py")


def test_training_resumes_exactly(trainer, tmp_path):
    settings = {"steps": 6, "cooldown": 2, "tokens_per_step": 512, "hidden": 32, "layers": 1, "save_every": 100}
    whole = trainer.train(output=tmp_path / "whole", **settings)
    before = trainer.train(output=tmp_path / "parts", stop_after=3, **settings)
    after = trainer.train(output=tmp_path / "parts", resume=True, **settings)
    assert len(whole) == 6 and before + after == whole
    weights = [AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "parts")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert AutoTokenizer.from_pretrained(tmp_path / "whole").pad_token == "<pad>"


def test_training_batches_come_from_the_train_split_alone(trainer):
    words = {index: word for word, index in trainer.WORD_IDS.items()}
    input_ids, weights = trainer.make_batch(
        seed=0, index=3, cap=256, tokens=2048, mix={"trace": 0.5, "recall": 0.5}, focus=0.5
    )
    assert weights.shape == (input_ids.shape[0], input_ids.shape[1] - 1)
    for row, weight in zip(input_ids.tolist(), weights, strict=True):
        prompt_end = int(weight.nonzero()[0]) + 1
        assert words[row[prompt_end - 1]] == ">"
        assert split_of(" ".join(words[index] for index in row[:prompt_end])) == "train"


def test_the_model_card_says_what_was_measured_and_what_it_is_not():
    card = (FOLDER / "README.md").read_text()
    assert "no evidence about large models" in card
    assert "| trace |" in card


def test_a_deepened_model_does_about_the_same_in_smaller_steps(trainer, model):
    """Every layer's work is divided among its copies: the sum of what they add is close to what the layer added."""
    deeper = trainer.deepen(model, 8)
    assert deeper.config.num_hidden_layers == 8
    assert torch.equal(deeper.lm_head.weight, model.lm_head.weight)
    for index in range(8):
        old, new = model.model.layers[index // 2], deeper.model.layers[index]
        assert torch.equal(new.self_attn.q_proj.weight, old.self_attn.q_proj.weight)
        assert torch.equal(new.self_attn.o_proj.weight, old.self_attn.o_proj.weight / 2)
        assert torch.equal(new.mlp.down_proj.weight, old.mlp.down_proj.weight / 2)
    ids = torch.randint(3, 300, (1, 40))
    with torch.no_grad():
        first, deep = (net(ids, output_hidden_states=True).hidden_states for net in (model, deeper))
    assert (deep[2] - first[1]).norm() < 0.5 * (first[1] - first[0]).norm()
    with pytest.raises(ValueError, match="deepen=6 .*multiple of the 4"):
        trainer.deepen(model, 6)


def test_the_deep_model_is_small_and_solves_test_problems(tokenizer):
    folder = DEEP
    assert sum(path.stat().st_size for path in folder.iterdir()) < 16 * 2**20
    deep = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert deep.config.num_hidden_layers == 12
    right, _ = answered(folder, deep, tokenizer, "recall:length=384", 12)
    assert right >= 9


def test_its_map_follows_from_how_alike_the_layers_attend():
    """The similarity was measured on training problems of 512 tokens."""
    similarity = LayerSimilarity.load(DEEP)
    sharing = similarity.group_for(0.25, 512, sinks=4, recent=60)
    bundled = PoDSharing.from_pretrained(DEEP)
    assert sharing.lead == bundled.lead and (bundled.sinks, bundled.recent) == (4, 60)
    assert 0.25 <= bundled.saving(512) < 0.27
