"""The adapter beside a sharing map: on where keys are shared by that map, and nowhere else."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.pod_training import QUICK, SHARED, build_model, numbers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kara_hf import KaraCache, PoDCache, PoDSharing
from kara_hf.bundled import place_of
from kara_hf.demo.models import MAPS
from kara_hf.evaluation.measure.identity import method_identity
from kara_hf.integration.adapter import load_adapter
from kara_hf.integration.generation import for_forward
from kara_hf.methods.registry import Plan, SharedSettings, make_method
from kara_hf.methods.rules import QUERY_AWARE
from kara_hf.pod.adapt import AdaptConfig, adapt

IDS = numbers(1)[0][None]
SMOLLM2 = {
    "vocab_size": 512,  # the adapter leaves embeddings alone
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
}


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


def test_results_of_two_adapters_of_one_map_are_told_apart(adapted, tmp_path):
    folder, sharing = adapted
    other = adapt(build_model(), SHARED, numbers(), AdaptConfig(**QUICK | {"lr": 0.05}), tmp_path)
    assert other.sharing == sharing
    pod, full = make_method("pod"), make_method("full")

    def of(place, method):
        model = build_model()
        assert place is None or load_adapter(model, str(place), sharing)
        return method_identity(method, Plan(SharedSettings(), QUERY_AWARE, 1.0, [], sharing=sharing), model)

    assert of(folder, pod) == of(folder, pod) != of(tmp_path, pod)
    assert of(folder, pod).keys() == of(tmp_path, pod).keys() == {"sharing", "adapter"}
    assert of(None, pod).keys() == {"sharing"}
    assert of(folder, full) == {}


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


def test_a_map_that_is_named_as_a_file_brings_what_lies_beside_it(adapted):
    folder, sharing = adapted
    assert load_adapter(build_model(), str(folder / "pod_sharing.json"), sharing)


def test_a_map_of_another_model_is_refused_before_anything_is_put_in(adapted):
    folder, sharing = adapted
    model = build_model(num_key_value_heads=4)
    with pytest.raises(ValueError, match="made for another model"):
        load_adapter(model, str(folder), sharing)
    assert not getattr(model, "peft_config", None) and not model.base_model._forward_pre_hooks


def test_the_bundled_adapter_fits_the_model_that_it_names(tmp_path):
    """Every weight of it finds its layer in a model of those sizes."""
    folder = Path(place_of("smollm2-135m-pod"))
    named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert MAPS == {named: folder.name}
    sharing = PoDSharing.from_pretrained(folder.name)
    assert sharing.saving(2048) >= 0.25 and sharing.prefill == "pod"
    model = LlamaForCausalLM(LlamaConfig(**SMOLLM2)).eval()
    assert load_adapter(model, folder.name, sharing)
    found = {name: weight for name, weight in model.named_parameters() if "lora_" in name}
    saved = load_file(folder / "adapter_model.safetensors")
    assert len(found) == len(saved) == 2 * 7 * SMOLLM2["num_hidden_layers"]
    assert all(weight.abs().sum() > 0 for weight in found.values())
    ids = torch.arange(1, 300)[None]
    cache = PoDCache(model, sharing)
    with torch.no_grad():
        assert model(ids, **for_forward(model, cache)).logits.isfinite().all()
    assert cache.report().nominal_bytes < cache.report().full_bytes
