"""Sizes of a model, read from its config: what sharing maps are made for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer

_FULL = (DynamicLayer, LinearAttentionAndFullAttentionLayer)  # by exact type


@dataclass(frozen=True)
class LayerSizes:
    """Of one layer: KV heads, query heads, and the sizes of a head's keys and values."""

    heads: int
    query_heads: int
    key_size: int
    value_size: int


def model_name(model: PreTrainedModel) -> str:
    """Hub id that a model was loaded from, or the name of its folder without the path; empty if it was made."""
    name = str(getattr(model.config, "name_or_path", "") or "")
    return Path(name).name if Path(name).exists() else name


def head_dim(config: PreTrainedConfig) -> int:
    """Size of one head's keys, which many configs leave to be derived.

    Raises:
        ValueError: it differs between layers, and `config` is that of them all.
    """
    try:
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    except Exception as error:  # of a kind of its own, in versions of Transformers that have it
        raise ValueError(f"heads of {config.model_type} have different sizes in different layers") from error


def model_shape(config: PreTrainedConfig) -> dict[str, str | int]:
    """What a model must have in common with the one that a sharing was made for.

    Args:
        config: of the decoder.
    """
    heads = config.num_attention_heads
    return {
        "model_type": config.model_type,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": head_dim(config),
    }


def layer_kinds(config: PreTrainedConfig) -> list[str]:
    """What layers of a model must have in common to share keys: type of attention, rotation and shape, for each.

    Args:
        config: of the decoder.
    """
    layers = config.num_hidden_layers
    types = getattr(config, "layer_types", None) or ["full_attention"] * layers
    rotated = getattr(config, "no_rope_layers", None) or [1] * layers  # 1 marks a layer that has RoPE
    each = getattr(config, "per_layer_config", None) or [config] * layers
    kinds = []
    for layer in range(layers):
        shape, position = model_shape(each[layer]), "" if rotated[layer] else " without RoPE"
        kinds.append(f"{types[layer]}{position}, {shape['num_key_value_heads']} KV heads of {shape['head_dim']}")
    return kinds


def full_layers(config: PreTrainedConfig, layers: list[Any] | None = None) -> list[int]:
    """Indices of the layers of full attention, the ones that can be compressed.

    Args:
        config: of the decoder.
        layers: Transformers' own cache layers for it, if they are there already.
    """
    layers = DynamicCache(config=config).layers if layers is None else layers
    # Cross-attention to an image reads the keys of its layer as Transformers holds them.
    crossing = set(getattr(config, "cross_attention_layers", None) or ())
    return [i for i, layer in enumerate(layers) if type(layer) in _FULL and i not in crossing]


def layer_sizes(config: PreTrainedConfig) -> list[LayerSizes]:
    """Sizes of every layer of full attention.

    Args:
        config: of the decoder.

    Raises:
        ValueError: its layers hold latent rows, whose sizes are the model's own affair.
    """
    if getattr(config, "kv_lora_rank", None):
        raise ValueError(
            f"sizes of {config.model_type}, which holds one latent row for all heads of a layer, are not told by its "
            "config; make the cache, use it and ask its report()"
        )
    each = getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers
    shapes = [model_shape(each[layer]) for layer in full_layers(config)]
    return [
        LayerSizes(
            *(int(shape[name]) for name in ("num_key_value_heads", "num_attention_heads", "head_dim", "head_dim"))
        )
        for shape in shapes
    ]
