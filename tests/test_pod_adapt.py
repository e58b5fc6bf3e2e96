"""Adaptation: right gradients, runs that resume to the bit, and an output that others load."""

import dataclasses
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from typer.testing import CliRunner

import kara_hf
from kara_hf import PoDCache, PoDSharing
from kara_hf.cli import app as cli
from kara_hf.pod.adapt import AdaptConfig, adapt, perplexity
from kara_hf.pod.checkpoint import StepLog
from kara_hf.pod.forward import SharedForward
from kara_hf.pod.loss import CHUNK, token_losses
from kara_hf.pod.output import card as describe
from kara_hf.pod.samples import IGNORED, SampleStream, collate, learned_after
from kara_hf.pod.training import Training

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = Path(kara_hf.__file__).parent / "assets" / "tiny_reasoner"
SHARED = PoDSharing(lead=((0, 0), (0, 1), (0, 1), (3, 1)), sinks=2, recent=4)
LENGTH, VOCAB = 24, 48
QUICK = {"steps": 4, "held_out": 2, "lr": 1e-2, "rank": 4}


def build_model(**changes):
    """A random Llama of four layers, 4 query heads on 2 KV heads."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        **changes,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = LlamaForCausalLM(config)
        for weight in model.parameters():  # attention of fresh weights is all but uniform
            if weight.ndim == 2:
                torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


def numbers(count=8, length=LENGTH, seed=0):
    """Samples in which every token is the one before it plus a step of the sample's own."""
    generator = torch.Generator().manual_seed(seed)
    start, step = (torch.randint(1, VOCAB, (count, 1), generator=generator) for _ in range(2))
    return list((start + step * torch.arange(length)) % VOCAB)


def trained_and_base(result):
    named = dict(result.model.named_parameters())
    return {name for name in named if "lora_" in name}, {name for name in named if "lora_" not in name}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


# ------------------------------------------------------------------------------------------------- gradients
def reference_logits(model, sharing, ids):
    """A Llama in plain torch whose followers take the logits of distant tokens from their leads."""
    config, decoder = model.config, model.model
    batch, length = ids.shape
    at, place = torch.arange(length)[:, None], torch.arange(length)[None]
    distant = (place >= sharing.sinks) & (place <= at - sharing.recent)
    hidden = decoder.embed_tokens(ids)
    cos, sin = decoder.rotary_emb(hidden, torch.arange(length)[None])
    logits = []
    for layer, heads in zip(decoder.layers, sharing.lead, strict=True):
        normed, attention = layer.input_layernorm(hidden), layer.self_attn
        query, key, value = (
            project(normed).view(batch, length, -1, config.head_dim).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        own = query @ key.repeat_interleave(2, 1).transpose(-1, -2) * config.head_dim**-0.5
        logits.append(own)
        leads = torch.stack([logits[heads[head // 2]][:, head] for head in range(4)], 1)
        mixed = torch.where(distant, leads, own).masked_fill(place > at, -torch.inf)
        out = mixed.softmax(-1) @ value.repeat_interleave(2, 1)
        hidden = hidden + attention.o_proj(out.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(decoder.norm(hidden))


def gradients(model, logits, ids):
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def test_gradients_flow_into_leads_as_in_plain_torch():
    model, ids = build_model(), torch.stack(numbers(2))
    expected_logits = reference_logits(model, SHARED, ids)
    expected = gradients(model, expected_logits, ids)
    with SharedForward(model, SHARED):
        logits = model(input_ids=ids, use_cache=False).logits
        got = gradients(model, logits, ids)
    assert torch.allclose(logits, expected_logits, atol=1e-4)
    for name in expected:
        assert (got[name] - expected[name]).norm() <= 1e-4 * expected[name].norm(), name
    unshared = gradients(model, model(input_ids=ids, use_cache=False).logits, ids)
    name = "model.layers.0.self_attn.k_proj.weight"
    assert (unshared[name] - expected[name]).norm() > 0.1 * expected[name].norm()


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


def test_reentrant_checkpointing_is_refused_also_inside_peft():
    from peft import LoraConfig, get_peft_model

    model = build_model()
    student = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    ids = torch.stack(numbers(1))
    with SharedForward(student, SHARED):
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": True})
        with pytest.raises(ValueError, match="use_reentrant=True is not possible"):
            student(input_ids=ids, use_cache=False)


# ------------------------------------------------------------------------------------------------- losses
def test_losses_of_tokens_in_chunks():
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(2, CHUNK, 5, generator=generator) for _ in range(2))
    logits.requires_grad_()
    targets = torch.randint(5, (2, CHUNK), generator=generator)
    targets[0, :9] = IGNORED
    sums = token_losses(logits, targets, teacher)
    kept = targets != IGNORED
    student, taught = logits[kept].log_softmax(-1), teacher[kept].log_softmax(-1)
    expected = F.cross_entropy(logits[kept], targets[kept], reduction="sum"), (taught.exp() * (taught - student)).sum()
    for got, wanted in zip(sums, expected, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-5)
        (got_gradient,), (gradient,) = (torch.autograd.grad(x, logits, retain_graph=True) for x in (got, wanted))
        assert torch.allclose(got_gradient, gradient, atol=1e-6)
    assert not token_losses(logits, targets)[1]
    assert token_losses(teacher, targets, teacher)[1].abs() < 1e-3


def test_perplexity_counts_what_has_a_label():
    model, samples = build_model(), numbers(3)
    with torch.no_grad():
        each = [-model(ids[None], use_cache=False).logits[0, :-1].log_softmax(-1) for ids in samples]
    each = [rows.gather(1, ids[1:, None]).flatten() for rows, ids in zip(each, samples, strict=True)]
    assert perplexity(model, samples) == pytest.approx(math.exp(torch.cat(each).mean()), rel=1e-5)
    labels = samples[0].clone()
    labels[:10] = IGNORED
    mixed = [(samples[0], labels), samples[1][:20]]  # of different lengths, in one batch
    expected = torch.cat([each[0][9:], each[1][:19]]).mean()
    assert perplexity(model, mixed, batch=2) == pytest.approx(math.exp(expected), rel=1e-5)
    shared, ids = perplexity(model, samples, SHARED), torch.stack(samples)
    assert shared != pytest.approx(perplexity(model, samples), rel=1e-3)
    logits = reference_logits(model, SHARED, ids).detach()
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert shared == pytest.approx(math.exp(expected), rel=1e-4)
    assert not model.training
    with pytest.raises(ValueError, match="2 samples with nothing to predict"):
        perplexity(model, [samples[0][:1]] * 2)


# ------------------------------------------------------------------------------------------------- training
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
    assert model.generate(ids, max_new_tokens=3, do_sample=False, past_key_values=cache).shape == (1, 11)


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


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


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


def test_a_teacher_and_a_student_that_shares_nothing_agree():
    model = build_model()
    ids, targets = collate(numbers(2), "cpu")
    near = dataclasses.replace(SHARED, recent=LENGTH)  # nothing is distant
    with torch.no_grad(), SharedForward(model, near) as shared:
        student = model(input_ids=ids, use_cache=False).logits
        with shared.paused():
            teacher = model(input_ids=ids, use_cache=False).logits
    assert 0 <= token_losses(student, targets, teacher)[1] + 1e-6 < 1e-4


# ------------------------------------------------------------------------------------------------- output
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
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BUNDLED), AutoTokenizer.from_pretrained(BUNDLED)
    sharing = PoDSharing(lead=((0, 0), (0, 0), (2, 2), (2, 2)), sinks=4, recent=28)
    config = AdaptConfig(rank=0, steps=2, length=128, learn_after=">", learn_first=True, held_out=1)
    result = adapt(model, sharing, "problems:trace=0.5,recall=0.5", config, tmp_path / "out", tokenizer=tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = tokenizer("ans", return_tensors="pt")["input_ids"]
    assert torch.equal(loaded(ids).logits, result.model(ids).logits)
    assert not torch.equal(loaded(ids).logits, AutoModelForCausalLM.from_pretrained(BUNDLED)(ids).logits)
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
    adapt(build_model(), SHARED, numbers(), AdaptConfig(**QUICK), tmp_path / "out", push_to_hub="me/adapted")
    assert calls[0] == ("create", "me/adapted", {"exist_ok": True})
    kind, repo, files, ignored = calls[1]
    assert (kind, repo, ignored) == ("upload", "me/adapted", ["metrics.jsonl", "logs/**"])
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "pod_sharing.json"} <= set(files)


@pytest.mark.parametrize("rank", [0, 4], ids=["all-weights", "lora"])
def test_bfloat16(tmp_path, rank):
    model = build_model() if not rank else build_model().bfloat16()
    config = AdaptConfig(**QUICK | {"rank": rank, "precision": "bf16", "distill": 0.5})
    result = adapt(model, SHARED, numbers(), config, tmp_path / "out")
    assert all(math.isfinite(loss) for loss in result.losses)
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


# ------------------------------------------------------------------------------------------------- samples
def test_samples_go_round_without_the_held_out_ones():
    stream = SampleStream(lambda skip: iter(range(skip, 5)), 2)
    assert stream.take(4) == [2, 3, 4, 2] and stream.position == 1
    other = SampleStream(lambda skip: iter(range(skip, 5)), 2)
    other.position = stream.position
    assert other.take(3) == stream.take(3) == [3, 4, 2]
    with pytest.raises(ValueError, match="no samples to train on behind the first 5"):
        SampleStream(lambda skip: iter(range(skip, 5)), 5).take(1)


def test_only_what_follows_a_token_is_learned():
    ids = torch.tensor([5, 7, 9, 6, 5, 9, 6, 7, 7, 1, 7, 2])
    ((same, labels),) = learned_after([ids], begin=9, end=7)
    assert same is ids
    no = IGNORED
    assert labels.tolist() == [no, no, no, 6, 5, 9, 6, 7, no, no, no, no]
    ((_, labels),) = learned_after([ids.repeat(2)], begin=9, end=7, only_first=True)
    assert (labels != no).nonzero().flatten().tolist() == [3, 4, 5, 6, 7]
    ((_, labels),) = learned_after([ids[:7]], begin=9, end=7)
    assert labels.tolist() == [no, no, no, 6, 5, 9, 6]


# ------------------------------------------------------------------------------------------------- settings
def test_the_learning_rate_rises_and_falls():
    config = AdaptConfig(steps=100, lr=1.0, warmup=0.1, floor=0.2)
    rates = [config.lr_at(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[10] == 1.0 and rates[-1] == pytest.approx(0.2) and rates[10:] == sorted(rates[10:], reverse=True)
    assert AdaptConfig().peak == 1e-4 and AdaptConfig(rank=0).peak == 1e-5
    assert AdaptConfig.from_json(AdaptConfig(targets=("q_proj",)).to_json()) == AdaptConfig(targets=["q_proj"])


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("steps", 0),
        ("batch", 1.5),
        ("rank", -1),
        ("alpha", 0),
        ("dropout", 1.0),
        ("distill", 1.1),
        ("lr", 0),
        ("warmup", -0.1),
        ("clip", -1),
        ("weight_decay", -1),
        ("precision", "int8"),
        ("checkpointing", 1),
        ("targets", ()),
        ("targets", "some-linear"),
        ("learn_first", True),
    ],
)
def test_settings_out_of_range_are_named(setting, value):
    with pytest.raises(
        ValueError, match=f"{setting}={value!r} is not possible".replace("(", r"\(").replace(")", r"\)")
    ):
        AdaptConfig(**{setting: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sharing": dataclasses.replace(SHARED, recent=21)},
            "samples of 24 tokens are not possible: with sinks=2 and",
        ),
        ({"sharing": PoDSharing.none(4, 2)}, "this sharing has no followers"),
        ({"sharing": PoDSharing.none(3, 2)}, "this sharing was made for another model"),
        ({"data": numbers(2, length=65)}, "samples of 65 tokens are not possible: the model has 64 positions"),
        ({"data": []}, "samples of 0 tokens"),
        ({"data": numbers(2)}, "no samples to train on behind the first 2, which are held out"),
        ({"data": [torch.rand(LENGTH)] * 3}, "a sample of shape"),
        ({"data": "problems:trace=1"}, "the tokenizer of the model is needed"),
        ({"log": "wandb"}, "log='wandb' is not possible"),
        ({"config": AdaptConfig(targets=("q_proj", "qkv"))}, r"linear layers are named down_proj, .*, v_proj; choose"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_possible_is_refused_and_changes_nothing(tmp_path, changes, message):
    model = build_model()
    before = model.state_dict()
    given = {"sharing": SHARED, "data": numbers(), "config": AdaptConfig(**QUICK)} | changes
    with pytest.raises(ValueError, match=message):
        adapt(model, given.pop("sharing"), given.pop("data"), given.pop("config"), tmp_path / "out", **given)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert not any("attention_hook" in vars(module) for module in model.modules())
    assert all(weight.requires_grad for weight in model.parameters())


def test_models_that_cannot_be_trained_are_refused(tmp_path):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(build_model(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="has adapters of PEFT already"):
        adapt(adapted, SHARED, numbers(), AdaptConfig(**QUICK), tmp_path)
    with pytest.raises(ValueError, match=r"attention_dropout=0.1 is not possible"):
        adapt(build_model(attention_dropout=0.1), SHARED, numbers(), AdaptConfig(**QUICK), tmp_path)
    with pytest.raises(ValueError, match=r"training all weights in torch.bfloat16 is not possible"):
        adapt(build_model().bfloat16(), SHARED, numbers(), AdaptConfig(**QUICK | {"rank": 0}), tmp_path)
    with pytest.raises(TypeError, match="expected a Transformers model"):
        adapt(torch.nn.Linear(2, 2), SHARED, numbers(), AdaptConfig(**QUICK), tmp_path)
    reentrant = build_model()
    enable = getattr(reentrant, "activation_checkpointing_enable", None) or reentrant.gradient_checkpointing_enable
    enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=True is not possible"):
        adapt(reentrant, SHARED, numbers(), AdaptConfig(**QUICK), tmp_path / "out")
    assert not hasattr(reentrant, "peft_config")


def test_accumulation_that_accelerate_overrides_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ValueError, match="accumulate=2 is not possible: accelerate was configured for 4"):
        adapt(build_model(), SHARED, numbers(), AdaptConfig(**QUICK | {"accumulate": 2}), tmp_path / "out")


def test_a_model_shares_keys_once():
    model = build_model()
    with SharedForward(model, SHARED):
        with pytest.raises(ValueError, match="share keys already"):
            perplexity(model, numbers(), SHARED)
        assert all("attention_hook" in vars(layer.self_attn) for layer in model.model.layers)


def test_missing_packages_are_named(tmp_path, monkeypatch):
    for missing, log, message in (
        ("peft", "none", r"peft is not installed; run: pip install 'kara_hf\[train\]'"),
        ("accelerate", "none", r"accelerate is not installed; run: pip install 'kara_hf\[train\]'. peft is"),
        ("tensorboard", "tensorboard", "tensorboard is not installed; run: pip install tensorboard"),
        ("trackio", "trackio", "trackio is not installed; run: pip install trackio"),
    ):
        for name in (missing, "tensorboardX"):
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=message):
            adapt(build_model(), SHARED, numbers(), AdaptConfig(**QUICK), tmp_path, log=log)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    model = build_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="lr=0.01 is not possible here: the loss of step 1 is not a number"):
        adapt(model, SHARED, numbers(), AdaptConfig(**QUICK | {"held_out": 0}), tmp_path / "out")


# ------------------------------------------------------------------------------------------------- commands
def invoke(*args):
    return CliRunner().invoke(cli.app, ["pod", "adapt", *map(str, args)], env={"COLUMNS": "100", "NO_COLOR": "1"})


def test_the_command_adapts_the_bundled_model_and_resumes(tmp_path, monkeypatch):
    from peft import PeftModel

    sharing = PoDSharing(lead=((0, 0), (0, 0), (2, 2), (2, 2)), sinks=4, recent=28)
    sharing.save_pretrained(tmp_path / "sharing")
    options = ["--sharing", tmp_path / "sharing", "--out", tmp_path / "out", "--length", 128, "--steps", 3]
    options += ["--lr", 1e-3, "--rank", 4, "--targets", "q_proj, k_proj", "--distill", 0.5, "--batch", 2]
    options += ["--held-out", 2, "--held-out-split", "test", "--save-every", 1, "--clip", 0]
    steps = Training.take_step

    def killed(self):
        if self.step == 2:
            raise Killed
        return steps(self)

    monkeypatch.setattr(Training, "take_step", killed)
    with pytest.raises(Killed):
        CliRunner().invoke(cli.app, ["pod", "adapt", *map(str, options)], catch_exceptions=False)
    monkeypatch.setattr(Training, "take_step", steps)
    result = invoke(*options)
    assert result.exit_code == 2 and "has the checkpoint of a run that was killed" in result.stderr
    result = invoke(*options, "--resume")
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if line.startswith("Loss of a held-out token")]
    assert [line.split(", ")[1].split(":")[0] for line in lines] == ["unshared", "shared", "adapted"]
    assert [row["step"] for row in read(tmp_path / "out" / "metrics.jsonl")] == [1, 2, 3]
    settings = json.loads((tmp_path / "out" / "pod_adapt.json").read_text())["config"]
    assert settings["targets"] == ["q_proj", "k_proj"] and settings["clip"] is None and settings["learn_after"] == ">"
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BUNDLED), str(tmp_path / "out"))
    assert PoDCache(loaded, PoDSharing.from_pretrained(tmp_path / "out")) is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--length", 32], "Error: samples of 32 tokens are not possible: with sinks=4 and recent=28"),
        (["--model", "somewhere"], "--model somewhere --data TEXT"),
        (["--steps", 0], "Error: steps=0 is not possible"),
        (["--learn-after", "no such token"], "Error: learn_after='no such token' is not possible"),
        (["--resume"], "Error: there is no checkpoint in"),
        (["--log", "paper"], "Error: log='paper' is not possible"),
        (["--dtype", "int8"], "Error: dtype='int8' is not possible"),
        (["--full", "--dtype", "bfloat16"], "Error: training all weights in torch.bfloat16 is not possible"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else "",
)
def test_the_command_refuses_in_one_line(tmp_path, options, message):
    PoDSharing(lead=((0, 0), (0, 0), (2, 2), (2, 2)), sinks=4, recent=28).save_pretrained(tmp_path)
    result = invoke("--sharing", tmp_path, "--out", tmp_path / "out", "--length", 128, *options)
    assert result.exit_code == 2
    assert message in result.stderr.splitlines()[-1] and not (tmp_path / "out").exists()


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("script_adapt_pod", ROOT / "examples" / "adapt_pod.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    PoDSharing(lead=((0, 0), (0, 0), (2, 2), (2, 2)), sinks=4, recent=28).save_pretrained(tmp_path)
    module.main(BUNDLED.as_posix(), "problems:recall=1", tmp_path / "out", str(tmp_path), length=96, steps=2)
    assert "loss of a held-out token, adapted model: " in capsys.readouterr().out
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


# ------------------------------------------------------------------------------------------------- several processes
def test_two_processes_train_as_one_with_twice_the_batch(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "import torch; torch.set_num_threads(1)\n"
        "from test_pod_adapt import *\n"
        f"config = AdaptConfig(**QUICK | {{'distill': 0.5, 'held_out': 3, 'accumulate': 2, 'save_every': 2}})\n"
        f"adapt(build_model(), SHARED, numbers(9), config, {str(tmp_path / 'two')!r})\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(script)]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config = AdaptConfig(**QUICK | {"distill": 0.5, "held_out": 3, "accumulate": 2, "batch": 2})
    one = adapt(build_model(), SHARED, numbers(9), config, tmp_path / "one")
    rows = read(tmp_path / "two" / "metrics.jsonl")
    assert [row["loss"] for row in rows] == pytest.approx(one.losses, rel=1e-4)
    assert [row["tokens"] for row in rows] == [4 * LENGTH * step for step in range(1, 5)]
    two = json.loads((tmp_path / "two" / "pod_adapt.json").read_text())
    assert two["held_out_loss"] == pytest.approx(one.held_out, rel=1e-4)
