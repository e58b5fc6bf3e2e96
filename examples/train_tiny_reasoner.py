r"""Train the bundled tiny reasoner from random initialisation on the synthetic problems of `kara_hf.evaluation`.

    python examples/train_tiny_reasoner.py --output tiny_reasoner

The bundled weights took about an hour and a half on 2 busy CPU cores, in two legs (see the model card);
``--tokens-per-step`` takes what a larger machine has room for. ``--resume`` goes on exactly where the last checkpoint
of a killed run left it: every batch is a function of (seed, step), and weights, both optimisers, both schedules, the
curriculum and the random state are in the checkpoint. A second leg on longer problems starts from a finished folder:

    python examples/train_tiny_reasoner.py --init tiny_reasoner --output longer --first 1024 --longest 1700 \
        --focus 0.65 --seed 1 --muon-lr 0.012 --adam-lr 0.001 --cooldown 1600
"""

from __future__ import annotations

import copy
import math
import shutil
import time
from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from kara_hf.tasks.reasoner import TASKS, VOCABULARY, make_problem

SPECIALS = ("<pad>", "<eos>", "<unk>")
PAD, EOS = 0, 1
WORD_IDS = {word: index for index, word in enumerate((*SPECIALS, *VOCABULARY))}
SHORTEST = 96
ADVANCE_AT = 0.90


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, split on white space, padded on the left for batched generation."""
    tokenizer = Tokenizer(models.WordLevel(WORD_IDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def build_model(hidden: int, layers: int) -> LlamaForCausalLM:
    """A Llama with 8 query heads on 2 key/value heads of 32 dimensions."""
    config = LlamaConfig(
        vocab_size=-(-len(WORD_IDS) // 32) * 32,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=hidden**-0.5)
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=2048, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=None
    )
    return model


def deepen(model: LlamaForCausalLM, layers: int) -> LlamaForCausalLM:
    """A model of `layers` layers in which every layer of `model` is done by several copies, each with its share.

    A residual layer is one step of a walk; n copies whose outputs are divided by n walk about the same way in smaller
    steps. Training goes on from there much sooner than from random weights, and neighbouring layers start out looking
    at the same tokens, as those of large models do.
    """
    before = model.config.num_hidden_layers
    if layers % before:
        raise ValueError(f"deepen={layers} is not possible: choose a multiple of the {before} layers of the model")
    copies = layers // before
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers
    config.layer_types = None
    deeper = LlamaForCausalLM(config)
    state = {name: weight for name, weight in model.state_dict().items() if ".layers." not in name}
    for index in range(layers):
        prefix = f"model.layers.{index // copies}."
        for name, weight in model.state_dict().items():
            if name.startswith(prefix):
                share = copies if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
                state[f"model.layers.{index}." + name.removeprefix(prefix)] = weight / share
    deeper.load_state_dict(state)
    deeper.generation_config = model.generation_config
    return deeper


def running_mean(mean: float, value: float) -> float:
    """Move `mean` towards `value`; a mean that is not a number yet starts there."""
    return value if math.isnan(mean) else mean + 0.05 * (value - mean)


class Curriculum:
    """The longest length asked for: it doubles from `first` to `longest` whenever token accuracy has reached
    `ADVANCE_AT`."""

    def __init__(self, first: int, longest: int) -> None:
        self.longest, self.cap, self.accuracy, self.step = longest, min(first, longest), 0.0, 0

    def update(self, accuracy: float) -> None:
        self.step += 1
        self.accuracy += 0.05 * (accuracy - self.accuracy)
        if self.accuracy >= ADVANCE_AT and self.cap < self.longest:
            self.cap, self.accuracy = min(2 * self.cap, self.longest), 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"cap": self.cap, "accuracy": self.accuracy, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.cap, self.accuracy, self.step = state["cap"], state["accuracy"], state["step"]


def parse_mix(mix: str) -> dict[str, float]:
    """Read "task=weight,task=weight"."""
    pairs = [part.partition("=") for part in mix.split(",")]
    unknown = [name for name, _, _ in pairs if name not in TASKS]
    if unknown:
        raise ValueError(f"mix {mix!r} names unknown tasks {unknown}; choose from {sorted(TASKS)}")
    return {name: float(weight) for name, _, weight in pairs}


def make_batch(
    seed: int, index: int, *, cap: int, tokens: int, mix: dict[str, float], focus: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `input_ids` [rows, width] and `weights` [rows, width - 1] of batch `index`, purely from the arguments.

    One batch holds about one length, so that little is padding, but lengths vary within it: equal ones would teach
    where the end falls. Six batches of ten lie between `focus * cap` and `cap`; short lengths stay in the mix for good.
    Weights are zero on prompt and padding, and n ** -0.5 on each of n completion tokens, which lets short answers count
    beside long traces.
    """
    rng = Random(f"batch/{seed}/{index}")
    low = round(focus * cap) if rng.random() < 0.6 else SHORTEST
    longest = round(low * (cap / low) ** rng.random()) if cap > low else cap
    longest = max(longest, SHORTEST + 16)
    rows = []
    for row in range(max(1, tokens // longest)):
        task = rng.choices(list(mix), list(mix.values()))[0]
        length = max(TASKS[task].min_length, round(longest * rng.uniform(0.8, 1.0)))
        problem = make_problem(task, length=length, seed=(seed << 40) + (index << 12) + row, split="train")
        prompt, completion = (
            [WORD_IDS[word] for word in text.split()] for text in (problem.prompt, problem.completion)
        )
        rows.append((prompt, [*completion, EOS]))
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    input_ids = torch.full((len(rows), width), PAD)
    weights = torch.zeros(len(rows), width - 1)
    for row, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        input_ids[row, :end] = torch.tensor(prompt + completion)
        weights[row, len(prompt) - 1 : end - 1] = len(completion) ** -0.5
    return input_ids, weights


def build_optimizers(
    model: PreTrainedModel, muon_lr: float, adam_lr: float
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon on the hidden matrices, AdamW on embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return (
        torch.optim.Muon(matrices, lr=muon_lr, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
    )


def save_checkpoint(accelerator: Accelerator, folder: Path) -> None:
    """Write the state beside `folder` and swap it in, so that a kill at any moment leaves a whole checkpoint."""
    fresh, old = folder.with_name(f"{folder.name}.fresh"), folder.with_name(f"{folder.name}.old")
    shutil.rmtree(fresh, ignore_errors=True)
    accelerator.save_state(str(fresh))
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)


def load_checkpoint(accelerator: Accelerator, folder: Path) -> None:
    """Load the state of `folder`, or of its predecessor where a kill fell between the two renames of the swap."""
    old = folder.with_name(f"{folder.name}.old")
    source = folder if folder.exists() else old
    if not source.exists():
        raise ValueError(f"no checkpoint in {folder}; start without --resume, or name its folder with --work")
    accelerator.load_state(str(source))


def export(accelerator: Accelerator, model: torch.nn.Module, folder: Path) -> None:
    accelerator.unwrap_model(model).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


def train(
    output: Annotated[Path, typer.Option(help="Model folder to write, in Hugging Face format.")],
    init: Annotated[Path | None, typer.Option(help="Model folder to start from instead of random weights.")] = None,
    work: Annotated[Path | None, typer.Option(help="Checkpoint folder; default OUTPUT.checkpoint.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint in WORK.")] = False,
    steps: Annotated[int, typer.Option(help="Optimiser steps in all.")] = 2400,
    cooldown: Annotated[int, typer.Option(help="Last steps, over which the learning rates fall to zero.")] = 800,
    stop_after: Annotated[int | None, typer.Option(help="Stop at this step with a checkpoint, as if killed.")] = None,
    tokens_per_step: Annotated[int, typer.Option(help="Tokens a step and process, padding included.")] = 8192,
    first: Annotated[int, typer.Option(help="Longest length the curriculum starts with.")] = 128,
    longest: Annotated[int, typer.Option(help="Longest length the curriculum reaches, prompt included.")] = 640,
    focus: Annotated[float, typer.Option(help="Six batches of ten are longer than this share of the longest.")] = 0.75,
    mix: Annotated[str, typer.Option(help="Shares of the tasks.")] = "trace=0.5,fact=0.14,recall=0.2,copy=0.16",
    muon_lr: Annotated[float, typer.Option(help="Learning rate of the hidden matrices.")] = 0.02,
    adam_lr: Annotated[float, typer.Option(help="Learning rate of embeddings and norms.")] = 0.002,
    hidden: Annotated[int, typer.Option(help="Hidden size.")] = 128,
    layers: Annotated[int, typer.Option(help="Number of layers.")] = 4,
    deepen_to: Annotated[int | None, typer.Option(help="Copy layers of INIT until there are so many.")] = None,
    precision: Annotated[str, typer.Option(help="'bf16' autocast or 'no'; weights stay float32.")] = "bf16",
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the stream of problems.")] = 0,
) -> list[float]:
    """Train, save checkpoints and the model, and return the losses of the steps run."""
    if not 0 <= cooldown <= steps:
        raise ValueError(f"cooldown is {cooldown}; choose 0 to steps ({steps})")
    weights_by_task = parse_mix(mix)
    work = work or output.with_name(output.name + ".checkpoint")
    accelerator = Accelerator(mixed_precision=precision)
    set_seed(seed)
    model = LlamaForCausalLM.from_pretrained(init, dtype=torch.float32) if init else build_model(hidden, layers)
    if deepen_to:
        model = deepen(model, deepen_to)
    optimizers = build_optimizers(model, muon_lr, adam_lr)

    def scale(step: int) -> float:
        """Warm-up over 50 steps, constant, linear cool-down."""
        return min(1.0, (step + 1) / 50, (steps - step) / max(1, cooldown))

    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, scale) for optimizer in optimizers]
    curriculum = Curriculum(first, longest)
    model, *prepared = accelerator.prepare(model, *optimizers, *schedulers)
    optimizers, schedulers = prepared[:2], prepared[2:]
    accelerator.register_for_checkpointing(curriculum)
    if resume:
        load_checkpoint(accelerator, work)

    losses: list[float] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not accelerator.is_main_process) as progress:
        bar = progress.add_task("starting", total=steps, completed=curriculum.step)
        start, seen, mean_loss, mean_accuracy = time.perf_counter(), 0, float("nan"), float("nan")
        for step in range(curriculum.step, steps if stop_after is None else min(stop_after, steps)):
            index = step * accelerator.num_processes + accelerator.process_index
            input_ids, weights = make_batch(
                seed, index, cap=curriculum.cap, tokens=tokens_per_step, mix=weights_by_task, focus=focus
            )
            input_ids, weights = input_ids.to(accelerator.device), weights.to(accelerator.device)
            with accelerator.autocast():
                logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
            scored, targets = weights > 0, input_ids[:, 1:]
            logits, targets, weights = logits[scored].float(), targets[scored], weights[scored]
            loss = (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            for part in (*optimizers, *schedulers):
                part.step()
            for optimizer in optimizers:
                optimizer.zero_grad()

            accuracy = accelerator.reduce((logits.argmax(-1) == targets).float().mean(), "mean").item()
            curriculum.update(accuracy)
            losses.append(loss.item())
            seen += input_ids.numel() * accelerator.num_processes
            mean_loss = running_mean(mean_loss, losses[-1])
            mean_accuracy = running_mean(mean_accuracy, accuracy)
            progress.update(
                bar, advance=1, description=f"loss {mean_loss:.4f} tokens right {mean_accuracy:.4f} to {curriculum.cap}"
            )
            if (step + 1) % 50 == 0 and accelerator.is_main_process:
                speed = seen / (time.perf_counter() - start)
                progress.console.print(
                    f"step {step + 1} loss {mean_loss:.5f} tokens right {mean_accuracy:.5f} lengths to "
                    f"{curriculum.cap} tokens/s {speed:.0f}"
                )
            if (step + 1) % save_every == 0:
                save_checkpoint(accelerator, work)
                export(accelerator, model, output)
    save_checkpoint(accelerator, work)
    export(accelerator, model, output)
    return losses


if __name__ == "__main__":
    typer.run(train)
