"""Predictions of the base model in a folder: computed once, by whichever run comes first."""

import copy
import dataclasses
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from support.marks import few
from support.pod_training import LENGTH, QUICK, SHARED, build_model, numbers

from kara_hf.pod.adapt import AdaptConfig, adapt
from kara_hf.pod.loss import Predictions
from kara_hf.pod.samples import collate
from kara_hf.pod.teacher import PredictionFolder
from kara_hf.pod.training import Training


class Killed(BaseException):
    pass


def settings(folder, **changes):
    return AdaptConfig(**QUICK | {"distill": 0.5, "top_k": 8, "teacher": str(folder)} | changes)


def process(index=0, processes=1):
    """What a folder is told of the process that fills it."""
    return SimpleNamespace(
        num_processes=processes,
        process_index=index,
        device=torch.device("cpu"),
        autocast=nullcontext,
        wait_for_everyone=lambda: None,
    )


@pytest.fixture
def computed(monkeypatch):
    """How many samples were computed, of each batch."""
    sizes, add = [], PredictionFolder._add

    def watched(self, samples, accelerator):
        sizes.append(len(samples))
        add(self, samples, accelerator)

    monkeypatch.setattr(PredictionFolder, "_add", watched)
    return sizes


def no_teacher(*_):
    raise AssertionError("the base model was asked during training")


@pytest.mark.parametrize("precision", few(["no", "bf16"], "bf16"))
def test_a_run_with_a_folder_is_the_run_without_it(tmp_path, monkeypatch, computed, precision):
    for rank in (4, 0):  # one folder teaches both
        config = settings(tmp_path / "kept", rank=rank, batch=2, precision=precision, held_out=0, steps=3)
        plain = dataclasses.replace(config, teacher=None)
        expected = adapt(build_model(), SHARED, numbers(6), plain, tmp_path / f"plain{rank}")
        with monkeypatch.context() as patch:
            patch.setattr(Training, "teach", no_teacher)
            patch.setattr("kara_hf.pod.adapt.copy", SimpleNamespace(deepcopy=no_teacher))
            got = adapt(build_model(), SHARED, numbers(6), config, tmp_path / f"{rank}")
        assert got.losses == expected.losses
    assert computed == [2, 2, 2]


def test_only_what_is_missing_is_computed(tmp_path, computed):
    data, other, kept = numbers(8), numbers(8, length=LENGTH - 1), tmp_path / "kept"
    half = build_model().bfloat16()
    adapt(copy.deepcopy(half).float(), SHARED, data, settings(kept), tmp_path / "first")
    assert computed == [1] * 4
    adapt(copy.deepcopy(half).float(), SHARED, data, settings(kept, steps=9, seed=5), tmp_path / "longer")  # goes round
    assert computed == [1] * 6
    next(kept.glob("*.safetensors")).unlink()
    adapt(
        copy.deepcopy(half), SHARED, data, settings(kept, steps=3, batch=2), tmp_path / "again"
    )  # weights in bfloat16
    assert computed == [1] * 7
    adapt(half, SHARED, other, settings(kept), tmp_path / "others")
    assert computed == [1] * 11 and len(list(kept.glob("*.safetensors"))) == 10


def test_a_kill_loses_nothing_that_was_computed(tmp_path, monkeypatch, computed):
    config, fill = settings(tmp_path / "kept", steps=6), PredictionFolder.fill

    def killed(self, samples, *rest):
        def until_the_fifth():
            for number, sample in enumerate(samples):
                if number == 4:
                    raise Killed
                yield sample

        fill(self, until_the_fifth(), *rest)

    model = build_model()
    monkeypatch.setattr(PredictionFolder, "fill", killed)
    with pytest.raises(Killed):
        adapt(model, SHARED, numbers(), config, tmp_path / "out")
    assert not hasattr(model, "peft_config") and all(weight.requires_grad for weight in model.parameters())
    monkeypatch.setattr(PredictionFolder, "fill", fill)
    adapt(model, SHARED, numbers(), config, tmp_path / "out")
    assert computed == [1] * 6
    assert not list((tmp_path / "kept").glob("*.fresh"))


def test_predictions_are_those_of_each_sample_alone(tmp_path):
    model = build_model()
    samples = [numbers(1)[0], numbers(2)[1][:9], numbers(3)[2][:17]]
    folder = PredictionFolder(tmp_path, model, 8)
    folder.fill(samples, 3, process())
    found = folder.read(samples, "cpu")
    assert found.ids.shape == (3, LENGTH, 8) and found.log_probs.shape == (3, LENGTH, 9)
    assert (found.ids.dtype, found.log_probs.dtype) == (torch.int32, torch.float16)
    for row, sample in enumerate(samples):
        with torch.no_grad():
            alone = Predictions.of(model(sample[None], use_cache=False).logits, 8)
        assert torch.equal(found.ids[row, : len(sample)], alone.ids[0])
        assert torch.allclose(found.log_probs[row, : len(sample)], alone.log_probs[0], atol=1e-2)
    with_labels = [(sample, torch.full_like(sample, -100)) for sample in samples]
    assert torch.equal(folder.read(with_labels, "cpu").ids, found.ids)  # what is learned changes no prediction
    assert len(collate(samples, "cpu")[0]) == len(list(tmp_path.glob("*.safetensors")))


def test_processes_share_the_work(tmp_path, computed):
    folder = PredictionFolder(tmp_path, build_model(), 4)
    for index in range(2):
        folder.fill(numbers(7), 2, process(index, 2))
    assert computed == [2, 2, 2, 1] and folder.read(numbers(7), "cpu").ids.shape == (7, LENGTH, 4)


def test_predictions_of_another_model_are_refused(tmp_path):
    adapt(build_model(), SHARED, numbers(), settings(tmp_path), tmp_path / "out")
    other = build_model()
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    refused = r"teacher='.*' has predictions that are not those asked for: {}.*; give another folder"
    for model, changes, what in (
        (other, {}, "weights was"),
        (build_model(rms_norm_eps=0.1), {}, "config was"),
        (build_model(), {"top_k": 9}, "top_k was 8 and is 9"),
    ):
        with pytest.raises(ValueError, match=refused.format(what)):
            adapt(model, SHARED, numbers(), settings(tmp_path, **changes), tmp_path / "out")
        assert not hasattr(model, "peft_config")
