"""A model that holds what another holds and computes next to nothing, for finding out what shares of tokens weigh."""

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from ...integration.attach import unwrap
from ...integration.shape import full_layers, layer_kinds, layer_sizes
from ...methods.registry import Method, Plan

WIDTH = 2  # numbers of a hidden state for each query head, of which a Llama's are a multiple


def stand_in(model: Any) -> Any | None:
    """A Llama with a model's layers, heads, head size, vocabulary, end tokens, dtype and device, and hidden states
    of few numbers. Bytes of a cache depend on how many tokens come, and hardly on which.

    Args:
        model: a Transformers causal LM, or a wrapper around one.

    Returns:
        None where the layers are not all of full attention, with heads of one shape, kept as keys and values.
    """
    whole = unwrap(model).config
    config = whole.get_text_config()
    layers = getattr(config, "num_hidden_layers", 0)
    try:
        alike = layers > 0 and len(full_layers(config)) == layers and len(set(layer_kinds(config))) == 1
        sizes = layer_sizes(config)[0] if alike else None
    except (ValueError, AttributeError):  # latent rows; a config that names its sizes in its own way
        return None
    if sizes is None or sizes.key_size % 2:  # an odd head cannot be rotated
        return None
    small = LlamaConfig(
        hidden_size=WIDTH * sizes.query_heads,
        intermediate_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=sizes.query_heads,
        num_key_value_heads=sizes.heads,
        head_dim=sizes.key_size,
        vocab_size=model.get_input_embeddings().num_embeddings,
        max_position_embeddings=getattr(config, "max_position_embeddings", 2**20),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(small, dtype=model.dtype).to(model.device).eval()
    made.generation_config = copy.deepcopy(model.generation_config)
    return made


def will_do(method: Method, plan: Plan) -> bool:
    """Whether a method holds of a stand-in what it holds of the model: others ask for more than its shapes."""
    return not method.needs and not method.shares and plan.sharing is None
