"""Groups by what sharing does to predictions: what is measured, in what order layers join, and what is refused."""

import math
from dataclasses import replace

import pytest
import torch
from support.batches import ids
from support.pod_training import build_model
from typer.testing import CliRunner

from kara_hf import PoDSharing
from kara_hf.cli.app import app
from kara_hf.integration.attach import is_attached
from kara_hf.pod.effect import Effect, Join, SharingPath, joined, search
from kara_hf.pod.forward import SharedForward

NEAR = {"sinks": 2, "recent": 10}


def by_definition(model, samples, sharing):
    total, count = 0.0, 0
    with torch.no_grad():
        for sample in samples:
            expected = model(input_ids=sample[None], use_cache=False).logits[0].double().log_softmax(-1)
            with SharedForward(model, sharing):
                found = model(input_ids=sample[None], use_cache=False).logits[0].double().log_softmax(-1)
            kl = (expected.exp() * (expected - found)).sum(-1)
            assert kl[: sharing.proximal].abs().max() < 1e-5  # tokens without distant ones are predicted as before
            total, count = total + float(kl[sharing.proximal :].sum()), count + len(sample) - sharing.proximal
    return total / count


@pytest.fixture(scope="module")
def measured():
    model, samples = build_model(), [ids(40, seed=1) % 48, ids(30, seed=2) % 48]
    return model, samples, search(model, samples, saving=0.2, tokens=400, **NEAR)


def test_every_divergence_is_that_of_its_definition(measured):
    model, samples, path = measured
    for count in range(1, len(path.joins) + 1):
        sharing = path.sharing(count)
        assert sharing.origin["divergence"] == pytest.approx(by_definition(model, samples, sharing), rel=1e-3, abs=1e-7)
    assert path.sharing(0).followers_share == 0


def test_the_first_join_is_the_best_of_all_and_each_later_one_no_worse_than_what_it_was_weighed_against(measured):
    model, samples, path = measured
    effect, layers, heads = Effect(model, samples, path.nothing), path.nothing.layers, path.nothing.heads
    alone = {
        (layer, head): effect(joined(path.nothing, [(layer, (head,))]))
        for layer in range(1, layers)
        for head in range(heads)
    }
    first = path.joins[0]
    assert (first.layer, first.heads[0]) == min(alone, key=alone.__getitem__)
    assert first.divergence == min(alone.values())
    assert len({(join.layer, join.heads) for join in path.joins}) == len(path.joins)


def test_it_stops_as_soon_as_enough_is_saved_and_smaller_savings_lie_on_the_way(measured):
    path = measured[2]
    assert path.group_for(0.2, 400) == replace(
        path.sharing(len(path.joins)),
        origin=path.sharing(len(path.joins)).origin | {"saving": 0.2, "at_tokens": 400},
    )
    assert path.sharing(len(path.joins)).saving(400) >= 0.2 > path.sharing(len(path.joins) - 1).saving(400)
    less = path.group_for(0.05, 400)
    assert 0.05 <= less.saving(400) < 0.2
    with pytest.raises(ValueError, match=r"saving=0\.45 is not possible at 400 tokens, where at most 0\.2"):
        path.group_for(0.45, 400)


def test_of_all_that_save_enough_the_least_harmful_is_taken(measured):
    """A later join may mend what an earlier one did."""
    path = measured[2]
    layers = [(1, 0.1), (2, 0.3), (3, 0.2)]
    path = replace(path, joins=tuple(Join(layer, (0, 1), divergence) for layer, divergence in layers))
    two = path.sharing(2).saving(400)
    assert path.group_for(two, 400).lead == path.sharing(3).lead
    assert path.group_for(path.sharing(1).saving(400), 400).lead == path.sharing(1).lead


def test_whole_layers_join(measured):
    model, samples, _ = measured
    path = search(model, samples, saving=0.1, tokens=400, per="layer", **NEAR)
    assert all(join.heads == tuple(range(path.nothing.heads)) for join in path.joins)


def test_it_is_saved_and_the_model_is_as_before(measured, tmp_path):
    model, samples, path = measured
    path.save(tmp_path)
    assert SharingPath.load(tmp_path) == path
    assert not is_attached(model) and not model.base_model._forward_pre_hooks
    (tmp_path / "pod_effect.json").write_text('{"format": 9}')
    with pytest.raises(ValueError, match="format 9"):
        SharingPath.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="pod effect"):
        SharingPath.load(tmp_path / "nowhere")
    model.train()
    Effect(model, samples, path.nothing)
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"saving": 0.5}, "saving=0.5 is not possible"),
        ({"saving": 0.45}, r"saving=0.45 is not possible at 400 tokens, where at most 0\.\d+ can be saved"),
        ({"per": "model"}, "per='model' is not possible"),
        ({"recent": 60}, "sample 0 has 40 tokens and needs 63"),
        ({"samples": []}, "there is no sample"),
        ({"samples": [torch.zeros(40)]}, "sample 0 must be token ids"),
    ],
    ids=str,
)
def test_what_it_refuses(measured, settings, message):
    model, samples, _ = measured
    given = {"saving": 0.1, "tokens": 400, "samples": samples, **NEAR} | settings
    with pytest.raises(ValueError, match=message):
        search(model, given.pop("samples"), **given)


def test_logits_that_are_not_finite_are_refused(measured):
    model, samples, path = measured
    weight = model.lm_head.weight
    kept = weight.detach().clone()
    try:
        weight.data[0] = math.nan
        with pytest.raises(ValueError, match="logits are not finite"):
            Effect(model, samples, path.nothing)
    finally:
        weight.data.copy_(kept)


def test_the_command(tmp_path):
    options = ["--saving", "0.1", "--per", "layer", "--samples", "1", "--length", "160", "--recent", "60"]
    result = CliRunner().invoke(app, ["pod", "effect", "--out", str(tmp_path), *options], env={"COLUMNS": "100"})
    assert result.exit_code == 0, result.output
    assert "groups of layers" in result.stdout and f"Written to {tmp_path}" in result.stdout
    sharing = PoDSharing.from_pretrained(tmp_path)
    assert sharing.saving(8 * 76) >= 0.1 and sharing == SharingPath.load(tmp_path).group_for(0.1, 8 * 76)
    result = CliRunner().invoke(app, ["pod", "effect", "--out", str(tmp_path), "--saving", "0.6"])
    assert result.exit_code == 2 and "saving=0.6 is not possible" in result.stderr
