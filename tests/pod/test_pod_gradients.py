"""Gradients and losses where layers share keys."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.marks import most_examples
from support.pod_training import LENGTH, SHARED, build_model, numbers, reference_logits

from kara_hf.pod.adapt import perplexity
from kara_hf.pod.forward import SharedForward
from kara_hf.pod.loss import ROWS, Predictions, divergence, token_losses
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


def of_tokens(logits, targets, teacher):
    """Sums of cross-entropy and of KL divergence, in plain torch and over the whole vocabulary."""
    kept = targets != IGNORED
    student, taught = logits[kept].double().log_softmax(-1), teacher[kept].double().log_softmax(-1)
    return F.nll_loss(student, targets[kept], reduction="sum"), (taught.exp() * (taught - student)).sum()


def drawn_logits(vocabulary, seed, tokens=8, spread=4.0):
    generator = torch.Generator().manual_seed(seed)
    logits, teacher = (spread * torch.randn(2, tokens, vocabulary, generator=generator) for _ in range(2))
    targets = torch.randint(vocabulary, (2, tokens), generator=generator)
    targets[0, : tokens // 2] = IGNORED
    return logits.requires_grad_(), targets, teacher


@pytest.mark.parametrize("top_k", [5, 9], ids=["all", "more"])
def test_losses_of_tokens_whose_teacher_says_everything(top_k):
    logits, targets, teacher = drawn_logits(5, seed=0, tokens=ROWS, spread=1.0)
    sums = token_losses(logits, targets, Predictions.of(teacher, top_k, torch.float32))
    for got, wanted in zip(sums, of_tokens(logits, targets, teacher), strict=True):
        assert torch.allclose(got, wanted.float(), rtol=1e-5)
        (got_gradient,), (gradient,) = (torch.autograd.grad(x, logits, retain_graph=True) for x in (got, wanted))
        assert torch.allclose(got_gradient, gradient, atol=1e-6)
    alone = token_losses(logits, targets)
    assert not alone[1] and torch.allclose(alone[0], sums[0])
    assert token_losses(teacher, targets, Predictions.of(teacher, top_k))[1].abs() < 1e-3


@most_examples(40)
@given(st.integers(2, 40), st.integers(1, 40), st.integers(0, 2**31), st.floats(0.1, 20))
def test_a_divergence_of_few_classes_is_a_lower_bound(vocabulary, top_k, seed, spread):
    logits, targets, teacher = drawn_logits(vocabulary, seed, spread=spread)
    few = token_losses(logits, targets, Predictions.of(teacher, top_k, torch.float32))
    cross_entropy, whole = of_tokens(logits, targets, teacher)
    assert few[0].item() == pytest.approx(cross_entropy.item(), rel=1e-4)
    assert -1e-4 <= few[1].item() <= whole.item() * (1 + 1e-4) + 1e-4
    if top_k >= vocabulary - 1:  # the rest is nothing, or one token
        assert few[1].item() == pytest.approx(whole.item(), rel=1e-4, abs=1e-4)
    more = token_losses(logits, targets, Predictions.of(teacher, top_k + 1, torch.float32))[1]
    assert few[1].item() <= more.item() * (1 + 1e-4) + 1e-4
    (gradient,) = torch.autograd.grad(few[1], logits)
    assert gradient.isfinite().all() and (gradient.sum(-1).abs() < 1e-4).all()


def test_the_gradient_of_few_classes_is_that_of_their_sums():
    logits, targets, teacher = drawn_logits(7, seed=1)
    predictions = Predictions.of(teacher, 3, torch.float32)
    kept = targets != IGNORED
    student = logits[kept].double().softmax(-1).gather(-1, predictions.ids[kept].long())
    student = torch.cat([student, 1 - student.sum(-1, keepdim=True)], -1)
    taught = predictions.log_probs[kept].double()
    wanted = (taught.exp() * (taught - student.log())).sum()
    got = token_losses(logits, targets, predictions)[1]
    assert torch.allclose(got, wanted.float(), rtol=1e-5)
    (got_gradient,), (gradient,) = (torch.autograd.grad(x, logits) for x in (got, wanted))
    assert torch.allclose(got_gradient, gradient, atol=1e-6)


def test_predictions_are_rounded_little():
    logits, targets, teacher = drawn_logits(40, seed=2)
    exact, rounded = (
        token_losses(logits, targets, Predictions.of(teacher, 16, d))[1] for d in (torch.float32, torch.half)
    )
    assert rounded.item() == pytest.approx(exact.item(), rel=1e-3)
    assert Predictions.of(teacher, 16).ids.dtype == torch.int32


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
    assert 0 <= divergence(student, teacher) + 1e-6 < 1e-4
    assert abs(token_losses(student, targets, Predictions.of(teacher, 8, torch.float32))[1]) < 1e-4


def test_a_model_shares_keys_once():
    model = build_model()
    with SharedForward(model, SHARED):
        with pytest.raises(ValueError, match="share keys already"):
            perplexity(model, numbers(), SHARED)
        assert all("attention_hook" in vars(layer.self_attn) for layer in model.model.layers)
