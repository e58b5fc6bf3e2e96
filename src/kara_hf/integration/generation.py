"""How this package runs `generate`: by settings of its own, and with the cache that was handed in.

A model comes with a `generation_config` that may turn its cache off, sample, penalise or stop. `generate` fills every
setting that a caller leaves out from there, also of a `GenerationConfig` that the caller passes. What is measured must
not depend on that, so `greedy` is all there is while `only` holds.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache

from ..config import is_int, require
from .attach import StepCache, unwrap
from .prefill import last_logits, read_ahead

GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "use_cache": True}
# Fields of a model's settings that say which tokens are special. They are its own; of them only the ends are used.
_TOKENS = {"bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id"}
_NO_SETTINGS = {"_commit_hash", "_from_model_config", "transformers_version"}
_LENGTHS = {"max_length", "max_new_tokens"}  # which every call gives
# Values that change nothing in greedy generation, beside those that are false.
_NEUTRAL: dict[str, Any] = {
    "encoder_repetition_penalty": 1,
    "length_penalty": 1,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1,
    "temperature": 1,
    "top_k": 50,
    "top_p": 1,
    "typical_p": 1,
    "use_cache": True,
}


def end_tokens(model: Any) -> list[int]:
    """Ids that end an answer, ascending: the model's own; without any, every answer has its full length.

    Raises:
        ValueError: the model's `generation_config` names something else than token ids.
    """
    found = model.generation_config.eos_token_id
    ends = [] if found is None else found if isinstance(found, list) else [found]
    possible = all(is_int(end) and end >= 0 for end in ends)
    require(possible, "generation_config.eos_token_id", found, "a token id, a list of them, or left out")
    return sorted(set(ends))


def pad_token(model: Any, tokenizer: Any) -> int:
    """The id that fills batches: the tokenizer's, otherwise the model's, otherwise an end."""
    own = (tokenizer.pad_token_id, model.generation_config.pad_token_id, *end_tokens(model))
    return next((token for token in own if is_int(token) and token >= 0), 0)


def greedy(model: Any, tokenizer: Any, **limits: Any) -> GenerationConfig:
    """Settings that measurements run by: greedy, with a cache, up to the model's end tokens.

    Args:
        limits: `max_new_tokens` and, if wanted, `min_new_tokens`.
    """
    pad, ends = pad_token(model, tokenizer), end_tokens(model)
    return GenerationConfig(
        **GREEDY, **limits, pad_token_id=pad, eos_token_id=ends or None, return_dict_in_generate=True
    )


def ignored(model: Any) -> dict[str, Any]:
    """What a model's `generation_config` asks for and `greedy` leaves out, by field."""
    fields = sorted(model.generation_config.to_diff_dict().items())
    left_out = {name: value for name, value in fields if name not in _TOKENS | _NO_SETTINGS | _LENGTHS}
    return {name: value for name, value in left_out.items() if (value != _NEUTRAL[name] if name in _NEUTRAL else value)}


@contextmanager
def only(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Within the block `model.generate` finds `config` where the model's own settings are."""
    owners = {id(owner): owner for owner in (model, unwrap(model))}.values()
    before = [vars(owner).get("generation_config") for owner in owners]
    for owner in owners:
        owner.generation_config = config
    try:
        yield
    finally:
        for owner, own in zip(owners, before, strict=True):
            if own is None:
                del owner.generation_config
            else:
                owner.generation_config = own


def generate(model: Any, cache: Cache, config: GenerationConfig, **inputs: Any) -> torch.Tensor:
    """`model.generate` with `cache` by `config` and nothing else.

    Args:
        model: a Transformers causal LM.
        cache: what it reads from and adds to.
        config: from `greedy`.
        inputs: `input_ids` and `attention_mask` ``[B, S]`` int64, and what else `generate` takes.

    Returns:
        ``[B, S + new]`` int64.

    Raises:
        ValueError: the model went on with another cache.
    """
    with only(model, config):
        out = model.generate(**inputs, generation_config=config, **for_generate(cache))
    return check_used(model, cache, out)


def read_prompt(
    model: Any, cache: Cache, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Has `model` read a prompt or turn into `cache`, in chunks if the cache asks for them.

    Args:
        input_ids: ``[B, S]`` int64, the new tokens.
        attention_mask: ``[B, seen + S]`` int64; None: nothing is padding.

    Returns:
        Logits behind the last token, ``[B, V]``.
    """
    inputs = {"input_ids": input_ids, **last_logits(unwrap(model)), **for_forward(model, cache)}
    if attention_mask is not None:
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        inputs |= {"attention_mask": attention_mask, "position_ids": positions}
    inputs = read_ahead(model, cache.prefill_chunk if isinstance(cache, StepCache) else None, inputs)
    logits: torch.Tensor = model(**inputs).logits[:, -1]
    return logits


def check_used(model: Any, cache: Cache, out: Any) -> torch.Tensor:
    """The tokens that `generate` returned with ``return_dict_in_generate``, if `cache` is what it used to the end.

    Raises:
        ValueError: it is not, so that nothing can be said of what it would have held.
    """
    used = out[_NAME]
    if used is not cache:
        at = getattr(unwrap(model).config.get_text_config(), "original_max_position_embeddings", None)
        remedy = f"stay below {at:,} tokens (original_max_position_embeddings), or " if is_int(at) else ""
        raise ValueError(
            f"{type(unwrap(model)).__name__} left the {type(cache).__name__} that it was given and went on with "
            f"{'none' if used is None else type(used).__name__}; {remedy}use another model"
        )
    sequences: torch.Tensor = out.sequences
    return sequences


def _takes_cache(function: Callable[..., Any]) -> bool:
    return "cache" in inspect.signature(function).parameters


# The argument and the output were called `past_key_values` before.
_NAME = "cache" if _takes_cache(GenerationMixin.prepare_inputs_for_generation) else "past_key_values"


def for_generate(cache: Cache) -> dict[str, Cache]:
    """`cache` as the argument of `generate`, by the name that the installed Transformers prefers."""
    return {_NAME: cache}


def for_forward(model: Any, cache: Cache) -> dict[str, Any]:
    """`cache` as arguments of a model's forward, by the name that it prefers, and used whatever its config says."""
    name = "cache" if _takes_cache(unwrap(model).forward) else "past_key_values"
    return {name: cache, "use_cache": True}
