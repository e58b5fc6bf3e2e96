"""Reading a prompt in chunks, for caches that ask for it: one forward after the other, as if they came one by one."""

import inspect
from typing import Any

import torch
import transformers
from transformers import GenerationMixin
from transformers.cache_utils import Cache

FIRST = "is_first_iteration"  # what `generate` calls it that a step reads a prompt
_LENGTH = "next_sequence_length"  # which it says of what it reads at once, and not of chunks of `prefill_chunk_size`

# What of a model's inputs has an entry for each new token in its last dimension.
_BY_TOKEN = {"input_ids", "position_ids", "cache_position", "token_type_ids", "mm_token_type_ids"}


def check_first_is_told() -> None:
    """Raises ImportError if this Transformers does not say which of its steps reads a prompt."""
    if FIRST not in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters:
        raise ImportError(
            f"Transformers {transformers.__version__} does not give prepare_inputs_for_generation {FIRST}, by which a "
            "cache tells prompts from drafts; install a version that does, as 5.17 and 5.24 do"
        )


def at_once(size: int | None, arguments: dict[str, Any]) -> bool:
    """Whether a prompt or turn comes in one forward, by the `arguments` of prepare_inputs_for_generation and by `size`,
    most tokens in a chunk of ours.
    """
    return size is None and _LENGTH in arguments


def read_ahead(model: Any, size: int | None, inputs: dict[str, Any]) -> dict[str, Any]:
    """Runs `model` on a prompt but for its last chunk, and returns the inputs of that one; all, where nothing is cut.

    Chunks are about equally long, so that the last one brings as many queries as any.

    Args:
        size: most tokens in a chunk; None: nothing is cut.
        inputs: of the model's forward, its cache among them.

    Raises:
        ValueError: an input cannot be cut; nothing was read then.
    """
    ids = inputs.get("input_ids")
    tokens = (inputs["inputs_embeds"] if ids is None else ids).shape[1]
    if size is None or tokens <= size:
        return inputs
    count = -(-tokens // size)
    ends = [number * tokens // count for number in range(count + 1)]
    *ahead, last = [_part(inputs, size, tokens, *each) for each in zip(ends, ends[1:], strict=False)]
    for part in ahead:
        model(**part)
    return last


def _part(inputs: dict[str, Any], size: int, tokens: int, start: int, stop: int) -> dict[str, Any]:
    """`inputs` of so many `tokens` for those from `start` to `stop` alone."""

    def cut(name: str, value: Any) -> Any:
        if isinstance(value, Cache) or not isinstance(value, torch.Tensor | dict):
            return value
        if name in _BY_TOKEN:
            return value[..., start:stop]
        if name == "inputs_embeds":
            return value[:, start:stop]
        if name == "attention_mask" and isinstance(value, torch.Tensor) and value.ndim == 2:
            return value[:, : value.shape[1] - tokens + stop]
        raise ValueError(f"prefill_chunk={size} is not possible with {name}, which cannot be cut; leave one of them")

    return {name: cut(name, value) for name, value in inputs.items()}


def last_logits(model: Any) -> dict[str, int]:
    """The argument for logits behind the last token alone, where the model's forward has it."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
