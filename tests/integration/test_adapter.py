"""The adapter beside a sharing map: on where keys are shared by that map, and nowhere else."""

import pytest
import torch
from peft import PeftModel
from support.pod_training import QUICK, SHARED, build_model, numbers
from transformers import DynamicCache

from kara_hf import KaraCache, PoDCache
from kara_hf.integration.adapter import load_adapter
from kara_hf.integration.generation import for_forward
from kara_hf.methods.registry import Plan, SharedSettings, make_method
from kara_hf.methods.rules import QUERY_AWARE
from kara_hf.pod.adapt import AdaptConfig, adapt

IDS = numbers(1)[0][None]


def logits(model, cache=None):
    with torch.no_grad():
        return model(IDS, **({} if cache is None else for_forward(model, cache))).logits


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """The folder that adaptation leaves, and the map in it."""
    folder = tmp_path_factory.mktemp("adapted")
    return folder, adapt(build_model(), SHARED, numbers(), AdaptConfig(**QUICK | {"lr": 0.1}), folder).sharing


def test_only_caches_that_share_by_its_map_see_it(adapted):
    folder, sharing = adapted
    base, model = build_model(), build_model()
    peft = PeftModel.from_pretrained(build_model(), folder)
    assert load_adapter(model, str(folder), sharing)
    plan = Plan(SharedSettings(), QUERY_AWARE, 1.0, [IDS.shape[1]], sharing=sharing)
    for _ in range(2):  # the order in which caches come does not matter
        shares = logits(model, PoDCache(model, sharing))
        assert torch.equal(shares, logits(peft, PoDCache(peft, sharing)))
        assert torch.equal(logits(model), logits(base))
        assert torch.equal(logits(model, DynamicCache()), logits(base, DynamicCache()))
        assert torch.equal(logits(model, make_method("full-adapted").make(model, plan)), logits(peft, DynamicCache()))
        assert torch.equal(logits(model, KaraCache(model)), logits(base, KaraCache(base)))
        assert not torch.equal(shares, logits(base, PoDCache(base, sharing)))
        assert torch.equal(logits(model, PoDCache(model, SHARED)), logits(base, PoDCache(base, SHARED)))


def test_a_model_that_has_an_adapter_keeps_it(adapted):
    folder, sharing = adapted
    model = build_model()
    model.load_adapter(str(folder))
    before = logits(model)
    assert not load_adapter(model, str(folder), sharing)
    assert torch.equal(logits(model), before)


def test_a_map_without_an_adapter_changes_nothing(tmp_path):
    SHARED.save_pretrained(tmp_path)
    model = build_model()
    assert not load_adapter(model, str(tmp_path), SHARED)
    assert not model.base_model._forward_pre_hooks


def test_a_map_of_another_model_is_refused_before_anything_is_put_in(adapted):
    folder, sharing = adapted
    model = build_model(num_key_value_heads=4)
    with pytest.raises(ValueError, match="made for another model"):
        load_adapter(model, str(folder), sharing)
    assert not getattr(model, "_hf_peft_config_loaded", False) and not model.base_model._forward_pre_hooks
