"""The model while it is trained: with LoRA's layers or all its weights, its own layers checkpointed or not."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from .config import AdaptConfig

if TYPE_CHECKING:
    from peft import PeftModel

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


@contextmanager
def trainable(model: PreTrainedModel, config: AdaptConfig) -> Iterator["PreTrainedModel | PeftModel"]:
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


def with_lora(model: PreTrainedModel, config: AdaptConfig) -> "PeftModel":
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
def checkpointing(model: PreTrainedModel) -> Iterator[None]:
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


def lora_targets(model: PreTrainedModel, targets: tuple[str, ...] | str | None) -> tuple[str, ...] | str:
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
