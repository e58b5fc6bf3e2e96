"""What adaptation takes in what order, its settings, and what it refuses before anything is changed."""

import dataclasses
import sys

import pytest
import torch
from support.pod_training import LENGTH, QUICK, SHARED, build_model, numbers

from kara_hf import PoDSharing
from kara_hf.pod.adapt import AdaptConfig, adapt
from kara_hf.pod.samples import IGNORED, SampleStream, learned_after


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
        ("top_k", 0),
        ("teacher", ""),
        ("teacher", "folder"),
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


@pytest.mark.parametrize(
    ("missing", "log", "commands"),
    [
        (("peft",), "none", {"pip install 'kara_hf[train]'"}),
        (("accelerate",), "none", {"pip install 'kara_hf[train]'"}),
        (("tensorboard", "tensorboardX"), "tensorboard", {"pip install tensorboard"}),
        (
            ("peft", "accelerate", "datasets", "trackio"),
            "trackio",
            {"pip install 'kara_hf[train]'", "pip install trackio"},
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_all_that_is_missing_is_named_at_once(tmp_path, monkeypatch, missing, log, commands):
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError) as raised:
        adapt(build_model(), SHARED, "some/text", AdaptConfig(**QUICK), tmp_path, log=log)
    message = str(raised.value)
    assert all(f"{name} is not installed" in message for name in missing if name != "tensorboardX")
    assert all(command in message for command in commands)


def test_files_a_place_and_a_login_are_looked_up_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("kara_hf.pod.refusals.get_token", lambda: None)
    output = tmp_path / "out"
    output.write_text("")
    with pytest.raises(ValueError) as raised:
        config = AdaptConfig(**QUICK | {"distill": 0.5, "teacher": str(output)})
        adapt(build_model(), SHARED, "./nowhere", config, output, push_to_hub="me/adapted")
    message = str(raised.value)
    assert "data='./nowhere' is not there" in message and "output=" in message and "must be a folder" in message
    assert "teacher must be a folder, or the name of a new one" in message
    assert "push_to_hub='me/adapted' is not possible: nobody is logged in to the hub; run: hf auth login" in message


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    model = build_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="lr=0.01 is not possible here: the loss of step 1 is not a number"):
        adapt(model, SHARED, numbers(), AdaptConfig(**QUICK | {"held_out": 0}), tmp_path / "out")
