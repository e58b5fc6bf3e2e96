"""What adaptation minimises: cross-entropy and, of a teacher's predictions, KL divergence; and perplexity."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import repeat

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ..integration.attach import unwrap
from ..policy.sharing import PoDSharing
from .forward import SharedForward
from .samples import IGNORED, Sample, collate

CHUNK = 1024  # tokens whose float32 probabilities lie in memory at once


def token_losses(
    logits: torch.Tensor, targets: torch.Tensor, teacher: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over tokens of cross-entropy and of KL(teacher || student), which is 0 without a teacher: float32 scalars.

    Takes `CHUNK` tokens at a time, and computes their probabilities again for the gradient.

    Args:
        logits: ``[B, S, V]``.
        targets: ``[B, S]`` int64; tokens whose target is `IGNORED` count for nothing.
        teacher: logits ``[B, S, V]``, or None.
    """
    rows, wanted = logits.flatten(0, 1).split(CHUNK), targets.flatten().split(CHUNK)
    given = repeat(None) if teacher is None else teacher.flatten(0, 1).split(CHUNK)
    cross_entropy = divergence = torch.zeros((), device=logits.device)
    for part in zip(rows, wanted, given, strict=False):
        if torch.is_grad_enabled():
            sums = checkpoint(_chunk_losses, *part, use_reentrant=False, preserve_rng_state=False)
        else:
            sums = _chunk_losses(*part)
        cross_entropy, divergence = cross_entropy + sums[0], divergence + sums[1]
    return cross_entropy, divergence


def _chunk_losses(
    logits: torch.Tensor, targets: torch.Tensor, teacher: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    student = logits.float().log_softmax(-1)
    cross_entropy = F.nll_loss(student, targets, ignore_index=IGNORED, reduction="sum")
    if teacher is None:
        return cross_entropy, torch.zeros_like(cross_entropy)
    each = F.kl_div(student, teacher.float().log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return cross_entropy, each.masked_fill(targets == IGNORED, 0.0).sum()


@torch.no_grad()
def summed_loss(
    model: torch.nn.Module, samples: Sequence[Sample], batch: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy summed over all targets, and their number: float64 scalars."""
    total, count = torch.zeros(2, dtype=torch.float64, device=device)
    for start in range(0, len(samples), batch):
        ids, targets = collate(samples[start : start + batch], device)
        total += token_losses(model(input_ids=ids, use_cache=False).logits, targets)[0]
        count += (targets != IGNORED).sum()
    return total, count


def perplexity(
    model: torch.nn.Module, samples: Sequence[Sample], sharing: PoDSharing | None = None, *, batch: int = 1
) -> float:
    """exp of a model's mean cross-entropy on samples that it sees whole, without a cache.

    The model is in eval mode meanwhile.

    Args:
        model: a Transformers causal LM, or one wrapped by PEFT.
        samples: token ids ``[S]`` int64, or pairs of them and of labels (-100: not counted).
        sharing: which layers share keys; None: the model's own attention.
        batch: samples that go through the model at once.

    Raises:
        TypeError, ValueError: as `SharedForward` does; or there is nothing to predict.
    """
    was_training = model.training
    model.eval()
    try:
        with SharedForward(model, sharing) if sharing is not None else nullcontext():
            total, count = summed_loss(model, samples, batch, unwrap(model).device)
    finally:
        model.train(was_training)
    if not count:
        raise ValueError(
            f"{len(samples)} samples with nothing to predict have no perplexity; give more, or longer ones"
        )
    return math.exp(total.item() / count.item())
