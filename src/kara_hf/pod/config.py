"""`AdaptConfig`: how a model is taught to share keys. Plain data, no torch."""

import math
from dataclasses import dataclass
from typing import Literal

from ..config import Settings, is_int, is_number, require

LORA_LR, ALL_WEIGHTS_LR = 1e-4, 1e-5  # the second is what readers of the paper report of it


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
        def count(name: str, least: int) -> None:
            value = getattr(self, name)
            require(is_int(value) and value >= least, name, value, f"a whole number from {least} on")

        def share(name: str) -> None:
            value = getattr(self, name)
            require(is_number(value) and 0 <= value <= 1, name, value, "a number in [0, 1]")

        def positive(name: str) -> None:
            value = getattr(self, name)
            require(value is None or (is_number(value) and value > 0), name, value, "a number above 0 or None")

        for name, least in (
            ("length", 2),
            ("steps", 1),
            ("batch", 1),
            ("accumulate", 1),
            ("alpha", 1),
            ("save_every", 1),
        ):
            count(name, least)
        for name in ("rank", "held_out", "seed"):
            count(name, 0)
        for name in ("distill", "warmup", "floor"):
            share(name)
        for name in ("lr", "clip"):
            positive(name)
        require(is_number(self.dropout) and 0 <= self.dropout < 1, "dropout", self.dropout, "a number in [0, 1)")
        decay = self.weight_decay
        require(is_number(decay) and decay >= 0, "weight_decay", decay, "a number from 0 on")
        require(self.precision in (None, "no", "bf16", "fp16"), "precision", self.precision, "'no', 'bf16' or 'fp16'")
        for name in ("learn_first", "checkpointing"):
            require(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")
        if self.learn_first and self.learn_after is None:
            raise ValueError("learn_first=True is not possible without learn_after, the token that it is about")
        if isinstance(self.targets, list | tuple):
            object.__setattr__(self, "targets", tuple(self.targets))
        fits = self.targets in (None, "all-linear") or (
            isinstance(self.targets, tuple) and self.targets and all(isinstance(name, str) for name in self.targets)
        )
        require(bool(fits), "targets", self.targets, "names of linear layers, 'all-linear' or None")

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
