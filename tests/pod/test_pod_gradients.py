"""Gradients and losses where layers share keys."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from support.pod_training import LENGTH, SHARED, build_model, numbers, reference_logits

from kara_hf.pod.adapt import perplexity
from kara_hf.pod.forward import SharedForward
from kara_hf.pod.loss import CHUNK, token_losses
from kara_hf.pod.samples import IGNORED, collate


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


def test_a_teacher_and_a_student_that_shares_nothing_agree():
    model = build_model()
    ids, targets = collate(numbers(2), "cpu")
    near = dataclasses.replace(SHARED, recent=LENGTH)  # nothing is distant
    with torch.no_grad(), SharedForward(model, near) as shared:
        student = model(input_ids=ids, use_cache=False).logits
        with shared.paused():
            teacher = model(input_ids=ids, use_cache=False).logits
    assert 0 <= token_losses(student, targets, teacher)[1] + 1e-6 < 1e-4


def test_a_model_shares_keys_once():
    model = build_model()
    with SharedForward(model, SHARED):
        with pytest.raises(ValueError, match="share keys already"):
            perplexity(model, numbers(), SHARED)
        assert all("attention_hook" in vars(layer.self_attn) for layer in model.model.layers)
