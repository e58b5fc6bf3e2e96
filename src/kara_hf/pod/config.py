"""`AdaptConfig`: how a model is taught to share keys. Plain data, no torch."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ..config import Settings, is_int, is_number, require

LORA_LR, ALL_WEIGHTS_LR = 1e-4, 1e-5  # the second is what readers of the paper report of it


Range = tuple[Callable[[Any], bool], str]  # what values fit, and how that is said


def _count(least: int) -> Range:
    return lambda value: is_int(value) and value >= least, f"a whole number from {least} on"


def _are_targets(value: Any) -> bool:
    named = isinstance(value, tuple) and bool(value) and all(isinstance(name, str) for name in value)
    return named or value in (None, "all-linear")


_SHARE: Range = (lambda value: is_number(value) and 0 <= value <= 1, "a number in [0, 1]")
_POSITIVE: Range = (lambda value: value is None or (is_number(value) and value > 0), "a number above 0 or None")
_SWITCH: Range = (lambda value: isinstance(value, bool), "True or False")

RANGES: dict[str, Range] = {
    "length": _count(2),
    "learn_first": _SWITCH,
    "steps": _count(1),
    "batch": _count(1),
    "accumulate": _count(1),
    "rank": _count(0),
    "alpha": _count(1),
    "dropout": (lambda value: is_number(value) and 0 <= value < 1, "a number in [0, 1)"),
    "targets": (_are_targets, "names of linear layers, 'all-linear' or None"),
    "distill": _SHARE,
    "top_k": _count(1),
    "teacher": (lambda value: value is None or (isinstance(value, str) and bool(value)), "a folder or None"),
    "lr": _POSITIVE,
    "warmup": _SHARE,
    "floor": _SHARE,
    "weight_decay": (lambda value: is_number(value) and value >= 0, "a number from 0 on"),
    "clip": _POSITIVE,
    "precision": (lambda value: value in (None, "no", "bf16", "fp16"), "'no', 'bf16' or 'fp16'"),
    "checkpointing": _SWITCH,
    "seed": _count(0),
    "save_every": _count(1),
    "held_out": _count(0),
}


@dataclass(frozen=True)
class AdaptConfig(Settings):
    """Settings of `kara_hf.pod.adapt.adapt`.

    A step of the optimiser takes ``batch * accumulate`` samples on each process.

    Attributes:
        length: tokens of a sample; this and the next four are for data given by name.
        split: of the data.
        text_column: of the data.
        learn_after: a token behind which text is learned up to the next EOS, as answers are behind a question mark; the
            rest is only read. None: all is learned.
        learn_first: whether only what is behind the first such token of a sample is learned. For problems: the bundled
            model knows no text in which one problem follows another.
        steps: steps of the optimiser.
        batch: samples that go through the model at once, on each process.
        accumulate: batches whose gradients make one step.
        rank: of LoRA; 0 trains every weight that requires a gradient.
        alpha: LoRA's outputs are multiplied by ``alpha / rank``.
        dropout: of LoRA's inputs, in [0, 1).
        targets: names of the linear layers that LoRA adapts, or "all-linear"; None: those of q_proj, k_proj, v_proj and
            o_proj that the model has.
        distill: w in [0, 1] of the loss ``w * KL(unshared base model || this one) + (1 - w) * cross-entropy``.
        top_k: most likely tokens of the base model that the divergence compares one by one; all others are one class
            (`kara_hf.pod.loss.token_losses`). A vocabulary's size or more: the divergence itself.
        teacher: folder that keeps these predictions of the base model, which other runs on the same samples then need
            not compute; what it lacks is computed before training. None: they are computed at every step.
        lr: highest learning rate; None: 1e-4 with LoRA, 1e-5 with all weights.
        warmup: share of the steps over which the learning rate rises to it, in [0, 1].
        floor: share of it that a cosine has fallen to at the last step, in [0, 1].
        weight_decay: of AdamW, on matrices.
        clip: longest gradient (2-norm of all); None: any.
        precision: of autocast; None: what `accelerate` was configured for, otherwise "no". The first one that a process
            uses it keeps.
        checkpointing: whether layers are computed again for their gradients, which takes less memory and more time.
        seed: of LoRA's weights, of dropout, and of the order of data given by name.
        save_every: steps from checkpoint to checkpoint.
        held_out: first samples of the data, which are not trained on but measure the loss before and after.

    Raises:
        ValueError: a setting is out of range; the message names it, its value and the range.
    """

    length: int = 8192
    split: str = "train"
    text_column: str = "text"
    learn_after: str | None = None
    learn_first: bool = False
    steps: int = 1000
    batch: int = 1
    accumulate: int = 1
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: tuple[str, ...] | Literal["all-linear"] | None = None
    distill: float = 0.0
    top_k: int = 64
    teacher: str | None = None
    lr: float | None = None
    warmup: float = 0.03
    floor: float = 0.1
    weight_decay: float = 0.0
    clip: float | None = 1.0
    precision: Literal["no", "bf16", "fp16"] | None = None
    checkpointing: bool = False
    seed: int = 0
    save_every: int = 200
    held_out: int = 16

    def __post_init__(self) -> None:
        if isinstance(self.targets, list):
            object.__setattr__(self, "targets", tuple(self.targets))
        for name, (fits, expected) in RANGES.items():
            value = getattr(self, name)
            require(fits(value), name, value, expected)
        if self.learn_first and self.learn_after is None:
            raise ValueError("learn_first=True is not possible without learn_after, the token that it is about")
        if self.teacher is not None and not self.distill:
            raise ValueError(
                f"teacher={self.teacher!r} is not possible with distill=0, which asks no teacher; set distill"
            )

    @property
    def peak(self) -> float:
        """Highest learning rate."""
        return self.lr if self.lr is not None else (LORA_LR if self.rank else ALL_WEIGHTS_LR)

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0: a linear warm-up, then a cosine down to ``floor * peak``."""
        warm = round(self.warmup * self.steps)
        if step < warm:
            return self.peak * (step + 1) / warm
        done = min(1.0, (step - warm) / max(1, self.steps - 1 - warm))
        return self.peak * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done)))
