"""`adapt`: post-training that teaches a model to share keys between its layers (PoD, 2412.02252 §2.2).

    result = adapt(model, PoDSharing.from_pretrained("sharing"), samples, AdaptConfig(rank=16, steps=500), "adapted")

The model is trained on whole sequences, with the attention that it will have where keys are shared (`SharedForward`).
The output folder holds what `PeftModel.from_pretrained`, or `AutoModelForCausalLM.from_pretrained` where all weights
were trained, and `PoDSharing.from_pretrained` load.
"""

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..integration.attach import detach, unwrap
from ..needs import check_needs
from ..policy.sharing import PoDSharing
from .config import AdaptConfig
from .forward import SharedForward
from .loss import perplexity
from .output import LOGS, METRICS, push, write
from .refusals import check_dtype, check_length, check_model, longest_of, needs_of_adaptation
from .samples import Sample, SampleStream, Start, opener
from .student import checkpointing, trainable

if TYPE_CHECKING:
    from accelerate import Accelerator
    from peft import PeftModel

__all__ = ["AdaptConfig", "Adaptation", "adapt", "perplexity"]


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

    model: "PreTrainedModel | PeftModel"
    sharing: PoDSharing
    losses: list[float]
    held_out: dict[str, float]


def adapt(
    model: PreTrainedModel,
    sharing: PoDSharing,
    data: str | Sequence[Sample] | Start,
    config: AdaptConfig,
    output: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
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
        ImportError: packages are missing; the message names all of them and says how they are installed.
    """
    output = Path(output)
    check_needs({"adaptation": needs_of_adaptation(config, data, output, log, push_to_hub)})
    check_model(model, sharing, config)
    start = opener(data, tokenizer, config)
    check_length(config.length if isinstance(data, str) else longest_of(data), sharing, model)
    stream = SampleStream(start, 0 if held_out is not None else config.held_out)
    held_out = list(islice(start(0), config.held_out)) if held_out is None else held_out

    from .checkpoint import Checkpoint
    from .teacher import PredictionFolder
    from .training import Training, progress_bar

    accelerator = make_accelerator(model, config, output, log)
    checkpoint = Checkpoint(
        accelerator,
        output.with_name(f"{output.name}.checkpoint"),
        asdict(config) | {"sharing": asdict(sharing), "processes": accelerator.num_processes},
        free=("save_every", "teacher"),
    )
    checkpoint.check(resume)
    detach(model)  # what a cache may have left in front of its forward would be wrapped by accelerate
    teacher: PredictionFolder | PreTrainedModel | None = None
    if config.teacher is not None:
        teacher = PredictionFolder(Path(config.teacher), model, config.top_k)
        total = config.steps * config.accumulate * accelerator.num_processes * config.batch
        others = SampleStream(start, stream.first)
        with progress_bar(accelerator.is_main_process) as progress:
            samples = progress.track((others.take(1)[0] for _ in range(total)), total, description="base model")
            teacher.fill(samples, config.batch, accelerator)
    with ExitStack() as stack:
        if config.distill and not config.rank and teacher is None:
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


def make_accelerator(model: PreTrainedModel, config: AdaptConfig, output: Path, log: str) -> "Accelerator":
    """What trains, as `config` and `accelerate launch` say; it has set the seed.

    Raises:
        ValueError: the two say different things, or the model's weights are too coarse to be trained.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedType, set_seed

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
    set_seed(config.seed)
    return accelerator
