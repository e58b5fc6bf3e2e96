"""`adapt`: post-training that teaches a model to share keys between its layers (PoD, 2412.02252 §2.2).

    result = adapt(model, PoDSharing.from_pretrained("sharing"), samples, AdaptConfig(rank=16, steps=500), "adapted")

The model is trained on whole sequences, with the attention that it will have where keys are shared (`SharedForward`).
The output folder holds what `PeftModel.from_pretrained`, or `AutoModelForCausalLM.from_pretrained` where all weights
were trained, and `PoDSharing.from_pretrained` load.
"""

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from ..config import require
from ..integration.attention import decoder_config, detach, unwrap
from ..needs import Package, check_needs, extra
from ..policy.sharing import PoDSharing
from .config import AdaptConfig
from .forward import SharedForward
from .loss import perplexity
from .output import LOGS, METRICS, push, write
from .samples import Sample, SampleStream, Start, ids_of, opener

__all__ = ["AdaptConfig", "Adaptation", "adapt", "perplexity"]

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
TRACKERS: dict[str, tuple[Package, ...]] = {
    "none": (),
    "tensorboard": (Package("tensorboard|tensorboardX", "pip install tensorboard"),),
    "trackio": (Package("trackio", "pip install trackio"),),
}


@dataclass(frozen=True)
class Adaptation:
    """What `adapt` returns.

    Attributes:
        model: the adapted model, in eval mode and with its own attention: a `PeftModel`, or the model itself.
        sharing: the map as it was written.
        losses: of every step, those before a resume among them.
        held_out: mean cross-entropy of a held-out token: of the "unshared" and of the "shared" model before training,
            and "adapted", with shared keys, after it. Empty without held-out samples.
    """

    model: Any
    sharing: PoDSharing
    losses: list[float]
    held_out: dict[str, float]


def adapt(
    model: Any,
    sharing: PoDSharing,
    data: str | Sequence[Sample] | Start,
    config: AdaptConfig,
    output: str | Path,
    *,
    tokenizer: Any = None,
    held_out: Sequence[Sample] | None = None,
    resume: bool = False,
    log: Literal["none", "tensorboard", "trackio"] = "none",
    push_to_hub: str | None = None,
) -> Adaptation:
    """Trains `model` in place to attend as `sharing` says, and writes the result into the folder `output`.

    LoRA's layers are put into the model, or its own weights change; if training fails, LoRA's layers are taken out
    again. Until training has ended its last checkpoint lies in ``<output>.checkpoint``. Under `accelerate launch` with
    several processes every sample goes to one of them.

    Args:
        model: a Transformers causal LM without adapters.
        sharing: which layers share keys; what is written says ``prefill="pod"``.
        data: what is trained on, in this order and from the first again when it ends: a sequence of token ids ``[S]``
            int64, or of pairs of ids and labels (-100: not learned); a function that gives such samples from the n-th
            on; or a name that `kara_hf.probing.data.token_samples` knows.
        config: settings.
        output: folder; made if it is not there.
        tokenizer: of the model, for data given by name; written too where all weights are trained.
        held_out: what the loss is measured with before and after; None: the first ``config.held_out`` samples of the
            data, which then are not trained on.
        resume: go on from the last checkpoint of a killed run that had the same arguments. On a CPU the losses are to
            the bit those of a run that was not killed.
        log: a tracker of accelerate that gets the losses too; ``metrics.jsonl`` in `output` has them anyway.
        push_to_hub: model repository that the result is uploaded to; made if it is not there.

    Raises:
        TypeError: `model` is no Transformers model.
        ValueError: what was asked is not possible, and nothing was changed; or the loss became infinite.
        ImportError: a package is missing; the message says how it is installed.
    """
    check_needs({"": needs_of(config, log)})
    check_model(model, sharing, config)
    start = opener(data, tokenizer, config)
    check_length(config.length if isinstance(data, str) else longest_of(data), sharing, model)
    stream = SampleStream(start, 0 if held_out is not None else config.held_out)
    held_out = list(islice(start(0), config.held_out)) if held_out is None else held_out

    from accelerate import Accelerator
    from accelerate.utils import DistributedType, set_seed

    from .checkpoint import Checkpoint
    from .training import Training

    output = Path(output)
    accelerator = Accelerator(
        mixed_precision=config.precision,
        gradient_accumulation_steps=config.accumulate,
        log_with=None if log == "none" else log,
        project_dir=str(output / LOGS),
    )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # keeps trained weights in float32 itself, and asks for the size of a batch where there is no data loader
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = config.batch
    elif not config.rank:
        check_dtype(model)
    if accelerator.gradient_accumulation_steps != config.accumulate:  # taken from the environment
        raise ValueError(
            f"accumulate={config.accumulate} is not possible: accelerate was configured for "
            f"{accelerator.gradient_accumulation_steps} (gradient_accumulation_steps); set the two alike"
        )
    checkpoint = Checkpoint(
        accelerator,
        output.with_name(f"{output.name}.checkpoint"),
        asdict(config) | {"sharing": asdict(sharing), "processes": accelerator.num_processes},
        free=("save_every",),
    )
    checkpoint.check(resume)
    set_seed(config.seed)
    detach(model)  # what a cache may have left in front of its forward would be wrapped by accelerate
    with ExitStack() as stack:
        teacher = None
        if config.distill and not config.rank:
            teacher = copy.deepcopy(model).requires_grad_(False).eval().to(accelerator.device)
        student = stack.enter_context(trainable(model, config))
        if config.checkpointing:
            stack.enter_context(checkpointing(unwrap(student)))
        shared = stack.enter_context(SharedForward(student, sharing))
        training = Training(accelerator, student, shared, config, stream, held_out, teacher)
        stack.callback(accelerator.unwrap_model, training.prepared, keep_fp32_wrapper=False)
        output.mkdir(parents=True, exist_ok=True)
        if log != "none":
            accelerator.init_trackers("kara_hf_pod", {name: str(value) for name, value in asdict(config).items()})
        training.run(checkpoint, resume, output / METRICS)
        weights = accelerator.get_state_dict(training.prepared)
    for tracker in accelerator.trackers:
        tracker.finish()
    how = f"adapted: LoRA of rank {config.rank}" if config.rank else "adapted: all weights"
    written = replace(sharing, prefill="pod", origin=sharing.origin | {"adapted": how})
    if accelerator.is_main_process:
        write(output, student, written, config, training.measured, weights, training.tokens, tokenizer)
        if push_to_hub is not None:
            push(output, push_to_hub)
    checkpoint.remove()
    return Adaptation(student, written, training.losses, training.measured)


@contextmanager
def trainable(model: Any, config: AdaptConfig) -> Iterator[Any]:
    """The model with LoRA, or itself; in eval mode afterwards, and if something failed without LoRA."""
    required = [(weight, weight.requires_grad) for weight in model.parameters()]
    student = with_lora(model, config) if config.rank else model
    try:
        yield student
    except BaseException:
        if config.rank:
            student.unload()
            vars(model).pop("peft_config", None)  # older PEFT leaves it
            for weight, needed in required:
                weight.requires_grad_(needed)
        raise
    finally:
        student.eval()


def with_lora(model: Any, config: AdaptConfig) -> Any:
    """`model` with LoRA's layers in it, and all its own weights frozen."""
    from peft import LoraConfig, TaskType, get_peft_model

    targets = lora_targets(model, config.targets)
    lora = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )
    with warnings.catch_warnings():
        # PEFT reads a property of the model that the newest Transformers has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(model, lora)


@contextmanager
def checkpointing(model: Any) -> Iterator[None]:
    """Layers are computed again for their gradients, in the non-reentrant way."""
    # Transformers 5.24 renamed the two
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    enable({"use_reentrant": False})
    try:
        yield
    finally:
        disable()
        model.disable_input_require_grads()


# ------------------------------------------------------------------------------------------------------------- refusals
def needs_of(config: AdaptConfig, log: str) -> list[Package]:
    """The packages that an adaptation needs. Raises ValueError for an unknown tracker."""
    require(log in TRACKERS, "log", log, f"one of {', '.join(TRACKERS)}")
    own = ("accelerate", "peft") if config.rank else ("accelerate",)
    return [*(Package(name, extra("train")) for name in own), *TRACKERS[log]]


def check_model(model: Any, sharing: PoDSharing, config: AdaptConfig) -> None:
    """Raises ValueError if `model` cannot be taught this sharing, or there is nothing to teach."""
    if hasattr(model, "get_base_model") or any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError(
            "the model has adapters of PEFT already; merge them first (model = model.merge_and_unload()) or take them "
            "out (model = model.unload())"
        )
    decoder = decoder_config(unwrap(model))
    sharing.check(decoder)
    if not sharing.followers_share:
        raise ValueError(
            "this sharing has no followers: every layer uses its own keys, and there is nothing to learn; make one "
            "with `kara-hf pod explore`, with a lower threshold"
        )
    dropout = getattr(decoder, "attention_dropout", None)
    if dropout:
        raise ValueError(
            f"attention_dropout={dropout} is not possible where layers share keys; set model.config.attention_dropout=0"
        )
    if config.rank:
        lora_targets(model, config.targets)


def lora_targets(model: Any, targets: tuple[str, ...] | str | None) -> tuple[str, ...] | str:
    """Names of the linear layers that LoRA adapts. Raises ValueError if the model does not have them."""
    if isinstance(targets, str):
        return targets
    named = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "weight")}
    found = tuple(name for name in targets or LORA_TARGETS if name in named)
    if not found or (targets and len(found) < len(targets)):
        linear = (name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
        raise ValueError(
            f"targets={targets or LORA_TARGETS} is not possible: the model's linear layers are named "
            f"{', '.join(sorted({name.rpartition('.')[2] for name in linear}))}; choose among them, or 'all-linear'"
        )
    return found


def check_dtype(model: Any) -> None:
    """Raises ValueError if weights that are trained are in half precision."""
    half = {weight.dtype for weight in model.parameters() if weight.requires_grad} - {torch.float32, torch.float64}
    if half:
        raise ValueError(
            f"training all weights in {', '.join(map(str, half))} is not possible: small steps would be rounded away; "
            "load the model with dtype=torch.float32, and set precision='bf16' to compute in bfloat16"
        )


def longest_of(data: Sequence[Sample] | Start) -> int:
    """Tokens of the longest sample; of the first where a function gives them. 0 if there are none."""
    known = islice(data(0), 1) if callable(data) else data
    return max((len(ids_of(sample)) for sample in known), default=0)


def check_length(longest: int, sharing: PoDSharing, model: Any) -> None:
    """Raises ValueError if no sample has a token that is distant to a query, or one has more tokens than positions."""
    if longest < sharing.proximal + 2:  # the first query with a distant token, and the token that it predicts
        raise ValueError(
            f"samples of {longest:,} tokens are not possible: with sinks={sharing.sinks:,} and recent="
            f"{sharing.recent:,} only samples of {sharing.proximal + 2:,} tokens or more have any for which keys are "
            "shared; take longer samples, several times as long, or a sharing with a lower recent"
        )
    limit = getattr(decoder_config(unwrap(model)), "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise ValueError(
            f"samples of {longest:,} tokens are not possible: the model has {limit:,} positions; take shorter ones"
        )
