"""What a run generates, and the one call of `generate`: as the page says, whatever settings a model brings."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import (
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache

from ..integration.generation import check_used, for_generate, greedy
from ..tasks.task import Example


@dataclass(frozen=True)
class Generation:
    """What all runs of a session generate.

    Attributes:
        ids: token ids of the prompt, ``[1, S]`` int64.
        max_new_tokens: tokens generated at most.
        temperature: 0 for greedy.
        seed: of sampling.
        example: what the prompt asks, where its answer is known.
    """

    ids: torch.Tensor
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    example: Example | None = None


class GumbelNoise(LogitsProcessor):
    """Sampling by the Gumbel trick, from numbers of its own: runs with one seed draw alike, whatever else runs.

    Args:
        temperature: above 0.
        seed: of the draws.
    """

    def __init__(self, temperature: float, seed: int):
        self.temperature = temperature
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        uniform = torch.rand(scores.shape, generator=self.generator, dtype=torch.float64)
        gumbel = -(-uniform.clamp(1e-300, 1 - 1e-16).log()).log()
        return scores.float() / self.temperature + gumbel.to(scores.device, torch.float32)  # type: ignore[return-value]


def take_over_settings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Puts greedy settings where those are that came with `model`, of which only its special tokens are kept.

    They may switch the cache off, choose another one, return several texts or change what is likely; and `generate`
    fills in from them whatever a caller leaves out. This is done once, since runs on one model alternate.

    Args:
        name: what the model was chosen by, for messages.

    Raises:
        ValueError: the model brings a `generate` of its own, or none, or end tokens that are none.
    """
    if not isinstance(model, GenerationMixin):
        raise ValueError(f"model={name!r} is not possible: {type(model).__name__} cannot generate; choose a causal LM")
    if "generate" in vars(model):
        raise ValueError(
            f"model={name!r} is not possible: it brings a generate of its own (custom_generate/generate.py), which "
            "need not use the cache that is watched; start the demo without --trust-remote-code, or choose another "
            "model"
        )
    model.generation_config = greedy(model, tokenizer)


def generate(
    model: PreTrainedModel, cache: Cache, generation: Generation, stopping: Sequence[StoppingCriteria]
) -> torch.Tensor:
    """Continues a prompt with `cache`, by a model whose settings were taken over: ids ``[1, S + new]`` int64.

    Raises:
        ValueError: the model went on with another cache.
    """
    noise = [GumbelNoise(generation.temperature, generation.seed)] if generation.temperature else []
    settings = copy.deepcopy(model.generation_config)
    settings.max_new_tokens = generation.max_new_tokens
    out = model.generate(
        input_ids=generation.ids,
        attention_mask=torch.ones_like(generation.ids),
        generation_config=settings,
        logits_processor=LogitsProcessorList(noise),
        stopping_criteria=StoppingCriteriaList(stopping),
        **for_generate(cache),
    )
    return check_used(model, cache, out)


def check_in_use(cache: Cache, tokens: int) -> None:
    """Raises ValueError unless `cache` was given all of the `tokens` that the model has read, and no others."""
    given = cache.get_seq_length()
    if given != tokens:
        raise ValueError(
            f"the model does not use the cache that it was given: it has read {tokens:,} tokens, of which {given:,} "
            "went into the cache, so there is nothing true to show; ask for fewer tokens, or choose another model"
        )
