"""What exploration measures of a model: how alike its layers attend."""

import itertools
import math
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.architectures import ARCHITECTURES, build
from support.batches import ids
from support.marks import most_examples

from kara_hf import PoDSharing
from kara_hf.integration.attach import decoder_config, is_attached
from kara_hf.integration.shape import layer_kinds, model_shape
from kara_hf.pod import explore as exploring
from kara_hf.pod.explore import explore, js_divergence
from kara_hf.pod.forward import SharedForward


def js_by_hand(p: list[float], q: list[float]) -> float:
    def kl(a: list[float], b: list[float]) -> float:
        return sum(x * math.log2(x / y) for x, y in zip(a, b, strict=True) if x > 0)

    middle = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    return (kl(p, middle) + kl(q, middle)) / 2


@most_examples(60)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6), st.integers(0, 10**6))
def test_js_divergence_is_that_of_its_definition(layers, count, tokens, seed):
    rng = torch.Generator().manual_seed(seed)
    logits = 8 * torch.randn(layers, count, tokens, generator=rng)
    hidden = torch.rand(layers, count, tokens, generator=rng) < 0.4
    hidden[..., 0] = False
    rows = logits.masked_fill(hidden, -math.inf).softmax(-1)
    found = js_divergence(rows)
    assert found.shape == (layers, layers, count) and found.dtype == torch.float32
    assert (found >= 0).all() and (found <= 1).all()
    assert torch.equal(found, found.transpose(0, 1))
    for a, b, row in itertools.product(range(layers), range(layers), range(count)):
        assert found[a, b, row].item() == pytest.approx(
            js_by_hand(rows[a, row].tolist(), rows[b, row].tolist()), abs=2e-6
        )


def test_js_divergence_at_its_ends():
    flat, left, right = torch.full((4,), 0.25), torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 0.5, 0.5, 0])
    found = js_divergence(torch.stack([flat, left, flat, right])[:, None])[..., 0]
    assert found[0, 2] == 0 and found.diagonal().eq(0).all()
    assert found[1, 3] == 1  # nothing in common


def by_definition(model, samples, queries, near=None):
    """From the attention that Transformers returns: ``[H, L, L]`` float64."""
    model.set_attn_implementation("eager")
    layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    total = torch.zeros(heads, layers, layers, dtype=torch.float64)
    for sample in samples:
        with torch.no_grad():
            attentions = model(sample[None], output_attentions=True, use_cache=False).attentions
        rows = torch.stack([attention[0, :, -queries:] for attention in attentions]).double()  # [L, Hq, Q, N]
        if near is not None:
            sinks, recent = near
            at = torch.arange(len(sample))[-queries:, None]
            place = torch.arange(len(sample))
            rows = rows * ((place >= sinks) & (place <= at - recent))
            rows = rows / rows.sum(-1, keepdim=True)
        else:
            rows = torch.cat([rows, 1 - rows.sum(-1, keepdim=True)], -1).clamp_min(0)  # what a sink takes
        rows = rows.unflatten(1, (heads, -1)).flatten(2, 3)
        for head, a, b in itertools.product(range(heads), range(layers), range(layers)):
            pairs = zip(rows[a, head].tolist(), rows[b, head].tolist(), strict=True)
            total[head, a, b] += 1 - np.mean([js_by_hand(p, q) for p, q in pairs])
    return total / len(samples)


# gemma2 caps its scores, granite scales them in its own way, gpt-oss has attention sinks, gemma3 a window in two layers
@pytest.mark.parametrize("region", ["all", "distant"])
@pytest.mark.parametrize("name", ["llama", "granite", "gemma2", "gemma3", "gpt-oss"])
def test_similarity_is_that_of_the_attention_that_the_model_computes(name, region):
    model = build(name)
    model.set_attn_implementation(ARCHITECTURES[name].implementations[0])
    samples, near = [ids(24), ids(21, 1)], (2, 9) if region == "distant" else None
    found = explore(model, iter(samples), queries=5, region=region, sinks=2, recent=9)
    expected = by_definition(build(name), samples, 5, near)
    types = getattr(model.config, "layer_types", None) or ["full_attention"] * model.config.num_hidden_layers
    full = [layer for layer, kind in enumerate(types) if kind == "full_attention"]
    assert [layer for layer, kind in enumerate(found.kinds) if kind] == full
    measured = torch.zeros(found.layers, found.layers, dtype=torch.bool)
    measured[torch.tensor(full)[:, None], torch.tensor(full)] = True
    assert (found.similarity.isnan() == ~measured).all()
    torch.testing.assert_close(found.similarity[:, measured].double(), expected[:, measured], atol=5e-6, rtol=0)
    assert (found.similarity.diagonal(0, 1, 2)[:, full] == 1).all()
    assert torch.equal(found.similarity.nan_to_num(), found.similarity.mT.nan_to_num())
    assert found.similarity[:, measured].min() < 0.9  # the layers do differ


def test_layers_that_compute_the_same_are_alike():
    model = build("llama")
    below, above = model.model.layers[:2]
    for projection in (below.self_attn.o_proj, below.mlp.down_proj):  # so that layer 1 sees what layer 0 saw
        torch.nn.init.zeros_(projection.weight)
    above.self_attn.load_state_dict(below.self_attn.state_dict())
    above.input_layernorm.load_state_dict(below.input_layernorm.state_dict())
    found = explore(model, [ids(20)], queries=4)
    assert (found.similarity[:, 0, 1] == 1).all() and (found.similarity[:, 0, 2] < 0.99).all()
    assert found.group(1.0).lead == ((0, 0), (0, 0), (2, 2))


def test_memory_is_bounded_and_the_result_does_not_depend_on_the_bound(monkeypatch):
    model, tokens = build("llama"), 40
    whole = explore(model, [ids(tokens)], queries=8).similarity
    shapes = []

    def watched(rows):
        shapes.append(rows.shape)
        return js_divergence(rows)

    monkeypatch.setattr(exploring, "js_divergence", watched)
    row = 16 * model.config.num_hidden_layers * (tokens + 1)  # bytes: rows, their entropies, means, and theirs
    for budget, most in ((1, 1), (3 * row, 3), (5 * row + 1, 5)):
        monkeypatch.setattr(exploring, "ROW_BYTES", budget)
        shapes.clear()
        found = explore(model, [ids(tokens)], queries=8).similarity
        torch.testing.assert_close(found, whole, atol=1e-6, rtol=0)
        assert max(count for _, count, _ in shapes) == most
        assert sum(count for _, count, _ in shapes) == model.config.num_attention_heads * 8


def test_the_keys_of_a_sample_are_gone_when_the_next_is_run(monkeypatch):
    run, seen = exploring.Recorder.run, []

    def watched(self, *args):
        assert all(layer() is None for layer in seen)
        layers = run(self, *args)
        seen.extend(map(weakref.ref, layers))
        return layers

    monkeypatch.setattr(exploring.Recorder, "run", watched)
    explore(build("llama"), [ids(20), ids(20, 1), ids(20, 2)], queries=2)
    assert len(seen) == 9


def test_what_is_measured_is_written_down():
    done = []
    found = explore(build("llama"), [ids(20), ids(30)], queries=3, sinks=1, recent=5, progress=done.append)
    assert done == [1, 2]
    assert (found.tokens, found.queries, found.region, found.sinks, found.recent) == ((20, 30), 3, "all", 1, 5)
    assert found.devices == ("cpu",) * 3 and found.kinds == ("full_attention, 2 KV heads of 16",) * 3
    assert found.model["num_hidden_layers"] == 3 and found.origin["dtype"] == "float32"
    sharing = found.group(0.0)
    assert sharing.model == found.model and (sharing.sinks, sharing.recent) == (1, 5)
    wanted = {"samples": 2, "tokens": 50, "queries": 3, "region": "all", "threshold": 0.0, "compare": "lead"}
    assert sharing.origin.items() >= wanted.items()
    config = decoder_config(build("llama"))
    sharing.check(model_shape(config), layer_kinds(config))
    with SharedForward(build("llama"), sharing) as shared:
        shared.model(ids(20)[None], use_cache=False)


def test_the_model_is_left_as_it_was():
    model = build("llama").train()
    model.model.layers[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    explore(model, [ids(20)], queries=2)
    with pytest.raises(ValueError, match="sample 1 has 2 tokens"):
        explore(model, [ids(20), ids(2)], queries=2)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert not is_attached(model)
    assert not any("attention_hook" in vars(module) for module in model.modules())


def test_what_cannot_be_measured_is_refused():
    model = build("llama")
    with pytest.raises(ValueError, match="sample 0 has 4 tokens and needs 5: queries=4 and one more"):
        explore(model, [ids(4)], queries=4)
    with pytest.raises(ValueError, match="sample 0 has 30 tokens and needs 31: queries=4, sinks=7 and recent=20"):
        explore(model, [ids(30)], queries=4, region="distant", sinks=7, recent=20)
    assert explore(model, [ids(31)], queries=4, region="distant", sinks=7, recent=20).similarity.isfinite().all()
    with pytest.raises(ValueError, match="no sample"):
        explore(model, [])
    with pytest.raises(ValueError, match=r"token ids \[N\] int64, got \[1, 40\]"):
        explore(model, [ids(40)[None]])
    with pytest.raises(ValueError, match="token ids"):
        explore(model, [ids(40).float()])
    for name, value in (("queries", 0), ("region", "proximal"), ("sinks", -1), ("recent", 0)):
        with pytest.raises(ValueError, match=f"{name}={value!r} is not possible"):
            explore(model, [ids(40)], **{name: value})
    with pytest.raises(ValueError, match="no full-attention layer"):
        explore(build("mistral-sliding"), [ids(40)])
    with pytest.raises(ValueError, match="computes its attention itself"):
        explore(build("falcon-new"), [ids(40)])
    with pytest.raises(TypeError, match="expected a Transformers model"):
        explore(torch.nn.Linear(2, 2), [ids(40)])
    with SharedForward(model, PoDSharing.none(3, 2)), pytest.raises(ValueError, match="share keys already"):
        explore(model, [ids(40)])
    torch.nn.init.constant_(model.model.layers[0].self_attn.q_proj.weight, math.inf)
    with pytest.raises(ValueError, match="NaN"):
        explore(model, [ids(40)])
