"""Adaptation: what is trained, runs that resume to the bit, and an output that others load."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from support.pod_training import LENGTH, QUICK, SHARED, build_model, numbers, read
from transformers import AutoModelForCausalLM, AutoTokenizer

from kara_hf import PoDCache, PoDSharing
from kara_hf.bundled import BUNDLED_MODEL
from kara_hf.integration.generation import for_generate
from kara_hf.kernels import shared_attention
from kara_hf.pod.adapt import AdaptConfig, adapt, perplexity
from kara_hf.pod.checkpoint import StepLog
from kara_hf.pod.forward import SharedForward
from kara_hf.pod.output import card as describe
from kara_hf.pod.samples import IGNORED
from kara_hf.pod.training import Training


def trained_and_base(result):
    named = dict(result.model.named_parameters())
    return {name for name in named if "lora_" in name}, {name for name in named if "lora_" not in name}


@pytest.mark.parametrize("rank", [0, 4], ids=["all-weights", "lora"])
def test_checkpointed_layers_train_the_same(tmp_path, rank):
    config = AdaptConfig(**QUICK | {"rank": rank})
    losses = []
    for checkpointing in (False, True):
        model = build_model()
        config = dataclasses.replace(config, checkpointing=checkpointing)
        losses.append(adapt(model, SHARED, numbers(), config, tmp_path / str(checkpointing)).losses)
        assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        assert not model.get_input_embeddings()._forward_hooks
    assert losses[0] == losses[1]


def test_the_loss_falls_and_the_model_is_usable_afterwards(tmp_path):
    model = build_model()
    config = AdaptConfig(rank=0, steps=60, batch=4, lr=1e-2, held_out=4)
    result = adapt(model, SHARED, numbers(40), config, tmp_path / "out")
    assert sum(result.losses[-5:]) < 0.6 * sum(result.losses[:5])
    assert result.held_out["adapted"] < result.held_out["shared"]
    assert result.model is model and not model.training
    assert not any("attention_hook" in vars(module) for module in model.modules())
    assert not model.config._attn_implementation.startswith("kara_hf")
    ids = numbers(1)[0][None, :8]
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 11)
    cache = PoDCache(model, result.sharing)
    assert model.generate(ids, max_new_tokens=3, do_sample=False, **for_generate(cache)).shape == (1, 11)


def test_lora_trains_adapter_weights_alone(tmp_path):
    model = build_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    result = adapt(model, SHARED, numbers(), AdaptConfig(**QUICK), tmp_path / "out")
    adapters, base = trained_and_base(result)
    assert len(adapters) == 2 * 4 * 4
    weights = dict(result.model.named_parameters())
    for name in base:
        assert torch.equal(weights[name], before[name.removeprefix("base_model.model.").replace(".base_layer", "")])
    assert all(weights[name].abs().sum() > 0 for name in adapters if "lora_B" in name)
    with result.model.disable_adapter():
        assert perplexity(result.model, numbers()) == pytest.approx(math.exp(result.held_out["unshared"]), rel=1.0)


@pytest.mark.parametrize("rank", [0, 4], ids=["all-weights", "lora"])
def test_two_batches_of_one_are_one_of_two(tmp_path, rank):
    labelled = []
    for index, ids in enumerate(numbers(8)):
        labels = ids.clone()
        labels[: 2 * index] = IGNORED  # every sample has another number of targets
        labelled.append((ids[: LENGTH - index % 3], labels[: LENGTH - index % 3]))
    losses = []
    for batch, accumulate in ((2, 1), (1, 2)):
        config = AdaptConfig(**QUICK | {"rank": rank, "batch": batch, "accumulate": accumulate, "distill": 0.3})
        losses.append(adapt(build_model(), SHARED, labelled, config, tmp_path / f"{batch}").losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


class Killed(BaseException):
    pass


class Data(list):
    """Samples, until one is asked for whose number is `fatal`."""

    fatal = None

    def __getitem__(self, index):
        if index == self.fatal:
            raise Killed
        return super().__getitem__(index)


@pytest.mark.parametrize("rank", [0, 4], ids=["all-weights", "lora"])
def test_a_killed_run_resumes_to_the_bit(tmp_path, rank):
    config = AdaptConfig(**QUICK | {"rank": rank, "steps": 9, "distill": 0.4, "dropout": 0.1, "save_every": 2})
    data = Data(numbers(8))  # six are trained on, so that the run goes round
    whole = adapt(build_model(), SHARED, data, config, tmp_path / "whole")
    model = build_model()
    before = perplexity(model, data)
    data.fatal = 7  # the sixth step's
    with pytest.raises(Killed):
        adapt(model, SHARED, data, config, tmp_path / "parts")
    if rank:
        assert perplexity(model, data) == before and not hasattr(model, "peft_config")
    assert not model.training and not any("attention_hook" in vars(module) for module in model.modules())
    metrics, checkpoint = tmp_path / "parts" / "metrics.jsonl", tmp_path / "parts.checkpoint"
    assert [row["step"] for row in read(metrics)] == [1, 2, 3, 4, 5]
    with metrics.open("a") as file:
        file.write('{"step": 6, "lo')  # as a kill leaves it
    # A kill between the two renames leaves the checkpoint under the name of the one before.
    checkpoint.rename(tmp_path / "parts.checkpoint.old")

    with pytest.raises(ValueError, match="has the checkpoint of a run that was killed; resume it"):
        adapt(build_model(), SHARED, data, config, tmp_path / "parts")
    with pytest.raises(ValueError, match=r"cannot go on with other settings: lr was 0.01 and is 0.02"):
        adapt(build_model(), SHARED, data, dataclasses.replace(config, lr=0.02), tmp_path / "parts", resume=True)

    data.fatal = None
    torch.manual_seed(99)
    saved_rarely = dataclasses.replace(config, save_every=50)
    parts = adapt(build_model(), SHARED, data, saved_rarely, tmp_path / "parts", resume=True)
    assert parts.losses == whole.losses and parts.held_out == whole.held_out
    rows, expected = read(metrics), read(tmp_path / "whole" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 10))
    for row, other in zip(rows, expected, strict=True):
        assert {**row, "tokens_per_second": 0} == {**other, "tokens_per_second": 0}
    weights = [dict(result.model.named_parameters()) for result in (whole, parts)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]  # checkpoints are gone
    with pytest.raises(ValueError, match="there is no checkpoint in .*parts.checkpoint to resume from"):
        adapt(build_model(), SHARED, data, config, tmp_path / "parts", resume=True)


def test_the_log_of_steps_has_no_step_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = StepLog(path, 0)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 0.5})
    StepLog(path, 2).write({"step": 3, "loss": 0.25})
    assert StepLog(path, 3).read() == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 0.25}]
    assert StepLog(path, 0).read() == []


@pytest.mark.parametrize("rank", [0, 4], ids=["all-weights", "lora"])
def test_the_teacher_is_the_model_as_it_was_without_sharing(tmp_path, monkeypatch, rank):
    base, taught = build_model(), []
    teach = Training.teach

    def watched(self, ids):
        logits = teach(self, ids)
        taught.append((ids, logits))
        return logits

    monkeypatch.setattr(Training, "teach", watched)
    config = AdaptConfig(**QUICK | {"rank": rank, "distill": 1.0, "dropout": 0.5})
    result = adapt(build_model(), SHARED, numbers(), config, tmp_path / "out")
    with torch.no_grad():
        assert len(taught) == 4
        assert all(torch.equal(logits, base(ids, use_cache=False).logits) for ids, logits in taught)
    rows = read(tmp_path / "out" / "metrics.jsonl")
    assert [row["loss"] for row in rows] == [row["kl"] for row in rows] == result.losses
    assert all(row["kl"] > 0 for row in rows)


def test_the_saved_adapter_is_the_trained_model(tmp_path):
    from peft import PeftModel

    result = adapt(build_model(), SHARED, numbers(), AdaptConfig(**QUICK), tmp_path / "out")
    loaded = PeftModel.from_pretrained(build_model(), str(tmp_path / "out"))
    sharing = PoDSharing.from_pretrained(tmp_path / "out")
    assert sharing == result.sharing and sharing.prefill == "pod" and sharing.lead == SHARED.lead
    ids = torch.stack(numbers(2))
    logits = []
    for model in (result.model, loaded.eval()):
        with torch.no_grad(), SharedForward(model, sharing):
            logits.append(model(input_ids=ids, use_cache=False).logits)
    assert torch.equal(*logits)
    assert perplexity(loaded, numbers(8)[:2], sharing) == pytest.approx(math.exp(result.held_out["adapted"]), rel=1e-6)
    settings = json.loads((tmp_path / "out" / "pod_adapt.json").read_text())
    assert AdaptConfig(**settings["config"]) == AdaptConfig(**QUICK)
    assert settings["held_out_loss"] == result.held_out and settings["tokens"] == 4 * LENGTH
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(f"{loss:.4f}" in card for loss in result.held_out.values())
    assert "library_name: peft" in card and "base_model" not in card
    of_hub = describe("owner/name", sharing, AdaptConfig(rank=0), {}, 5)
    assert "base_model: owner/name\n" in of_hub and "# name, adapted" in of_hub and "library_name: transf" in of_hub
    assert "perplexity" not in of_hub and "all weights" in of_hub


def test_a_model_whose_weights_were_all_trained_is_saved_whole(tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL), AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    sharing = PoDSharing(lead=((0, 0), (0, 0), (2, 2), (2, 2)), sinks=4, recent=28)
    config = AdaptConfig(rank=0, steps=2, length=128, learn_after=">", learn_first=True, held_out=1)
    result = adapt(model, sharing, "problems:trace=0.5,recall=0.5", config, tmp_path / "out", tokenizer=tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = tokenizer("ans", return_tensors="pt")["input_ids"]
    assert torch.equal(loaded(ids).logits, result.model(ids).logits)
    assert not torch.equal(loaded(ids).logits, AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL)(ids).logits)
    assert PoDSharing.from_pretrained(tmp_path / "out").prefill == "pod"
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer.get_vocab()
    assert result.held_out["unshared"] < 0.5  # prompts, which cannot be predicted, are not counted


def test_uploads_go_to_the_named_repository(tmp_path, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, repo_id, **options):
            calls.append(("create", repo_id, options))

        def upload_folder(self, **options):
            files = sorted(path.name for path in Path(options["folder_path"]).iterdir())
            calls.append(("upload", options["repo_id"], files, options["ignore_patterns"]))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setenv("HF_TOKEN", "secret")
    adapt(build_model(), SHARED, numbers(), AdaptConfig(**QUICK), tmp_path / "out", push_to_hub="me/adapted")
    assert calls[0] == ("create", "me/adapted", {"exist_ok": True})
    kind, repo, files, ignored = calls[1]
    assert (kind, repo, ignored) == ("upload", "me/adapted", ["metrics.jsonl", "logs/**"])
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "pod_sharing.json"} <= set(files)


@pytest.mark.parametrize("rank", [0, 4], ids=["all-weights", "lora"])
def test_bfloat16(tmp_path, monkeypatch, rank):
    attended = set()

    def watched(*args, **kwargs):
        out = shared_attention(*args, **kwargs)
        attended.add(out.dtype)
        return out

    monkeypatch.setattr("kara_hf.pod.forward.shared_attention", watched)
    model = build_model() if not rank else build_model().bfloat16()
    config = AdaptConfig(**QUICK | {"rank": rank, "precision": "bf16", "distill": 0.5})
    result = adapt(model, SHARED, numbers(), config, tmp_path / "out")
    assert all(math.isfinite(loss) for loss in result.losses)
    assert attended == {torch.bfloat16}
    assert "_original_forward" not in vars(result.model)
    assert {weight.dtype for weight in result.model.parameters() if weight.requires_grad} == {torch.float32}
    with torch.no_grad():  # without accelerate's autocast
        logits = model(torch.stack(numbers(1)), use_cache=False).logits
    assert logits.dtype == (torch.bfloat16 if rank else torch.float32)


def test_losses_go_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = adapt(build_model(), SHARED, numbers(), AdaptConfig(**QUICK), tmp_path / "out", log="tensorboard")
    events = EventAccumulator(str(tmp_path / "out" / "logs" / "kara_hf_pod")).Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(result.losses)
