"""The loop of adaptation: steps, teacher, held-out loss, checkpoints and logs, on however many processes."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedModel

from .checkpoint import Checkpoint, StepLog
from .config import AdaptConfig
from .forward import SharedForward
from .loss import Predictions, summed_loss, token_losses
from .samples import IGNORED, Sample, SampleStream, collate, ids_of, without_targets
from .teacher import PredictionFolder

if TYPE_CHECKING:
    from peft import PeftModel

BETAS = (0.9, 0.95)
PRINT_EVERY = 50  # steps, where no terminal shows the bar


class Training:
    """A run of `adapt`.

    Args:
        model: with LoRA by PEFT, or itself.
        shared: switched on for `model`.
        teacher: a folder with predictions for all samples, or a frozen copy of the model before training; None:
            `model` without LoRA is the teacher.
        stream: what is trained on.
        held_out: what the loss is measured with before and after.

    Attributes:
        prepared: the model as accelerate wraps it.
        step: steps done.
        losses: of these steps.
        measured: mean losses of held-out tokens by the state that the model was in.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: "PreTrainedModel | PeftModel",
        shared: SharedForward,
        config: AdaptConfig,
        stream: SampleStream,
        held_out: Sequence[Sample],
        teacher: PredictionFolder | PreTrainedModel | None = None,
    ):
        self.accelerator, self.model, self.shared, self.config = accelerator, model, shared, config
        self.stream, self.held_out, self.teacher = stream, held_out, teacher
        self.prepared, self.optimizer = accelerator.prepare(model, make_optimizer(model, config))
        accelerator.register_for_checkpointing(self)
        self.step, self.tokens = 0, 0
        self.losses: list[float] = []
        self.measured: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "tokens": self.tokens,
            "losses": self.losses,
            "measured": self.measured,
            "position": self.stream.position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.tokens, self.losses = state["step"], state["tokens"], state["losses"]
        self.measured, self.stream.position = state["measured"], state["position"]

    def run(self, checkpoint: Checkpoint, resume: bool, metrics: Path) -> None:
        """Trains to the last step, from the checkpoint if `resume`; every step is a line in the file `metrics`."""
        if resume:
            checkpoint.load()
        else:
            with self.shared.paused():
                self.measure("unshared")
            self.measure("shared")
        main = self.accelerator.is_main_process
        log = StepLog(metrics, self.step) if main else None
        with progress_bar(main) as progress:
            bar = progress.add_task("adapting", total=self.config.steps, completed=self.step)
            begin, before = time.perf_counter(), self.tokens
            while self.step < self.config.steps:
                row = self.take_step()
                row["tokens_per_second"] = (self.tokens - before) / (time.perf_counter() - begin)
                self.accelerator.log(row, step=self.step)
                if log is not None:
                    log.write(row)
                    text = f"loss {row['loss']:.4f} lr {row['lr']:.2e} {row['tokens_per_second']:,.0f} tokens/s"
                    progress.update(bar, completed=self.step, description=text)
                    if progress.disable and (self.step % PRINT_EVERY == 0 or self.step == self.config.steps):
                        progress.console.print(f"step {self.step:,} of {self.config.steps:,} {text}")
                if self.step % self.config.save_every == 0:
                    checkpoint.save()
        self.measure("adapted")

    def take_step(self) -> dict[str, Any]:
        """One step of the optimiser, over the next samples; returns what is logged of it.

        Every target of the step weighs the same, in whatever batch and on whatever process it is.

        Raises:
            ValueError: the loss is not a number.
        """
        accelerator, config = self.accelerator, self.config
        self.prepared.train()
        processes, batch = accelerator.num_processes, config.batch
        samples = self.stream.take(config.accumulate * processes * batch)
        firsts = range(accelerator.process_index * batch, len(samples), processes * batch)
        parts = [samples[first : first + batch] for first in firsts]
        batches = [collate(part, accelerator.device) for part in parts]
        count = accelerator.reduce(sum((targets != IGNORED).sum() for _, targets in batches), "sum").clamp(min=1)
        lr = config.lr_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        sums = torch.zeros(2, device=accelerator.device)
        for part, (ids, targets) in zip(parts, batches, strict=True):
            with accelerator.accumulate(self.prepared):
                taught = self.predictions(part, ids) if config.distill else None
                logits = self.prepared(input_ids=ids, use_cache=False).logits
                cross_entropy, divergence = token_losses(logits, targets, taught)
                del logits, taught
                loss = config.distill * divergence + (1 - config.distill) * cross_entropy
                # accelerate divides by `accumulate`, and data parallelism by the number of processes
                accelerator.backward(loss * (config.accumulate * processes / count))
                sums += torch.stack([cross_entropy.detach(), divergence.detach()])
                norm = None
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.prepared.parameters(), config.clip or float("inf"))
                self.optimizer.step()
                self.optimizer.zero_grad()
        cross_entropy, divergence = (accelerator.reduce(sums, "sum") / count).tolist()
        self.step += 1
        self.tokens += sum(len(ids_of(sample)) for sample in samples)
        loss = config.distill * divergence + (1 - config.distill) * cross_entropy
        if not math.isfinite(loss):
            raise ValueError(
                f"lr={config.peak} is not possible here: the loss of step {self.step} is not a number; lower it, or "
                "set clip and a longer warmup"
            )
        self.losses.append(loss)
        row = {"step": self.step, "loss": loss, "cross_entropy": cross_entropy}
        if config.distill:
            row["kl"] = divergence
        return row | {"lr": lr, "grad_norm": None if norm is None else float(norm), "tokens": self.tokens}

    def predictions(self, samples: Sequence[Sample], ids: torch.Tensor) -> Predictions:
        """What the unshared base model predicts of samples, and of their `ids` ``[B, S]``."""
        if isinstance(self.teacher, PredictionFolder):
            return self.teacher.read(samples, ids.device)
        return Predictions.of(self.teach(ids), self.config.top_k)

    @torch.no_grad()
    def teach(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, S, V]`` of the unshared base model."""
        self.prepared.eval()
        try:
            if isinstance(self.teacher, PreTrainedModel):
                with self.accelerator.autocast():
                    return self.teacher(input_ids=ids, use_cache=False).logits
            with self.shared.paused(), self.model.disable_adapter():
                return self.prepared(input_ids=ids, use_cache=False).logits
        finally:
            self.prepared.train()

    def measure(self, name: str) -> None:
        """Keeps the mean loss of a held-out token under `name`."""
        if not self.held_out:
            return
        processes = self.accelerator.num_processes
        mine = list(self.held_out[self.accelerator.process_index :: processes])
        if len(mine) < -(-len(self.held_out) // processes):  # all processes call the model equally often
            mine.append(without_targets(self.held_out[0]))
        self.prepared.eval()
        sums = summed_loss(self.prepared, mine, self.config.batch, self.accelerator.device)
        total, count = (self.accelerator.reduce(part, "sum").item() for part in sums)
        if not count:
            raise ValueError("the held-out samples have nothing to predict; give others, or held_out=0")
        self.measured[name] = total / count


def progress_bar(shown: bool) -> Progress:
    """A bar on stderr; disabled where it is not shown or there is no terminal."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    hidden = not shown or not console.is_terminal
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=hidden)


def make_optimizer(model: torch.nn.Module, config: AdaptConfig) -> torch.optim.Optimizer:
    """AdamW of the weights that require a gradient; only matrices decay."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in trained if weight.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [weight for weight in trained if weight.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.peak, betas=BETAS)
