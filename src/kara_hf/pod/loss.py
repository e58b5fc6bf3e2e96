"""What adaptation minimises: cross-entropy and, of a teacher's predictions, KL divergence; and perplexity."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..integration.attach import unwrap
from ..policy.sharing import PoDSharing
from .forward import SharedForward
from .samples import IGNORED, Sample, collate

ROWS = 64  # tokens whose float32 logits are copied at once
LOWEST = torch.finfo(torch.float32).min / 2  # stands for -inf where a gradient of that would be no number


@dataclass(frozen=True)
class Predictions:
    """What a teacher says of next tokens: its k most likely ones, and all others together.

    Attributes:
        ids: ``[..., k]`` int32.
        log_probs: ``[..., k + 1]`` of any float dtype; the last is that of all other tokens, -inf if there are none.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, logits: torch.Tensor, top_k: int, dtype: torch.dtype = torch.float16) -> "Predictions":
        """The `top_k` most likely tokens, or all of a smaller vocabulary, by logits ``[..., V]``."""
        rows = logits.flatten(0, -2)
        ids = torch.cat([part.topk(min(top_k, logits.shape[-1])).indices for part in rows.split(ROWS)])
        log_probs = torch.cat(split_logits(rows, ids), -1).log_softmax(-1)
        log_probs = log_probs.masked_fill(log_probs < LOWEST / 2, float("-inf"))
        shape = logits.shape[:-1]
        return cls(ids.int().view(*shape, -1), log_probs.to(dtype).view(*shape, -1))


def token_losses(
    logits: torch.Tensor, targets: torch.Tensor, teacher: Predictions | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over tokens of cross-entropy and of KL(teacher || student), which is 0 without a teacher: float32 scalars.

    The divergence is that of k + 1 classes, the k tokens T of the teacher's predictions p and one class for the rest::

        sum over t in T of p(t) log(p(t) / q(t)) + p(rest) log(p(rest) / q(rest)),  q(rest) = 1 - sum over T of q(t)

    where q is the student. It is never more than the divergence over the whole vocabulary, and equals that where T is
    the vocabulary or where, among the other tokens, teacher and student agree.

    Args:
        logits: ``[B, S, V]``.
        targets: ``[B, S]`` int64; tokens whose target is `IGNORED` count for nothing.
        teacher: predictions ``[B, S, ...]``, or None.
    """
    learned = targets.flatten() != IGNORED
    wanted = targets.flatten().clamp(min=0)[:, None]
    ids = wanted if teacher is None else torch.cat([teacher.ids.flatten(0, 1), wanted], -1)
    chosen, others = split_logits(logits.flatten(0, 1), ids)
    top, target = chosen[:, :-1], chosen[:, -1:]
    named = (ids[:, :-1] == wanted).any(-1, keepdim=True)  # the target among the teacher's tokens
    student = torch.cat([top, torch.logaddexp(others, target.masked_fill(named, LOWEST))], -1)
    total = student.logsumexp(-1, keepdim=True)
    cross_entropy = (total - target).masked_fill(~learned[:, None], 0.0).sum()
    if teacher is None:
        return cross_entropy, torch.zeros_like(cross_entropy)
    taught = teacher.log_probs.flatten(0, 1).float().softmax(-1)  # sums to 1 again, whatever was rounded
    each = F.kl_div(student - total, taught, reduction="none").sum(-1)
    return cross_entropy, each.masked_fill(~learned, 0.0).sum()


def split_logits(logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of some tokens, and the logsumexp of those of all others: ``[N, k]`` and ``[N, 1]`` float32.

    No float32 copy of all logits is made, neither here nor for the gradient.

    Args:
        logits: ``[N, V]``.
        ids: ``[N, k]`` int64; a token may be named twice.
    """
    return _SplitLogits.apply(logits, ids)


class _SplitLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        others = [
            part.to(torch.float32, copy=True).scatter_(-1, at, LOWEST).logsumexp(-1, keepdim=True)
            for part, at in zip(logits.split(ROWS), ids.split(ROWS), strict=True)
        ]
        ctx.save_for_backward(logits, ids, rest := torch.cat(others))
        return logits.gather(-1, ids).float(), rest

    @staticmethod
    def backward(ctx: Any, of_chosen: torch.Tensor, of_others: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, ids, others = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for begin in range(0, len(logits), ROWS):
            rows = slice(begin, begin + ROWS)
            part = (logits[rows].float() - others[rows]).exp_().mul_(of_others[rows])
            part.scatter_(-1, ids[rows], 0.0).scatter_add_(-1, ids[rows], of_chosen[rows])
            gradient[rows] = part
        return gradient, None


@torch.no_grad()
def divergence(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) over the whole vocabulary, of logits ``[..., V]``: summed over tokens, float32."""
    total = torch.zeros((), device=logits.device)
    for student, taught in zip(logits.flatten(0, -2).split(ROWS), teacher.flatten(0, -2).split(ROWS), strict=True):
        expected = taught.float().log_softmax(-1)
        total += F.kl_div(student.float().log_softmax(-1), expected, reduction="sum", log_target=True)
    return total


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
