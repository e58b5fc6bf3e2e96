"""A cache in 8-bit floating point that keeps every token: what a saving of memory costs that drops nothing."""

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

SCALE_BYTES = torch.float32.itemsize


class Float8Layer(DynamicLayer):
    """Keys and values as float8_e4m3fn, with a float32 scale for each token and head behind its D bytes.

    `keys` and `values` are ``[B, H, T, D + 4]`` uint8, so that whatever rearranges a cache rearranges scales with them.
    """

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = (
            torch.empty(*x.shape[:2], 0, x.shape[3] + SCALE_BYTES, dtype=torch.uint8, device=x.device)
            for x in (key_states, value_states)
        )

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores keys and values ``[B, H, S, D]``; returns all of them, in their dtype."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat([self.keys, pack(key_states)], dim=-2)
        self.values = torch.cat([self.values, pack(value_states)], dim=-2)
        return unpack(self.keys, key_states.dtype), unpack(self.values, value_states.dtype)


class Float8Cache(Cache):
    """A `Cache` whose layers are `Float8Layer`. Only for models whose layers all attend to everything.

    Raises:
        ValueError: the model has other layers.
    """

    def __init__(self, config: Any):
        text = config.get_text_config(decoder=True)
        kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise ValueError(
                f"a cache in 8-bit floating point is for full attention, and {text.model_type} has layers of the kinds "
                f"{', '.join(sorted(kinds))}; leave this method out"
            )
        super().__init__(layers=[Float8Layer() for _ in range(text.num_hidden_layers)])


def pack(states: torch.Tensor) -> torch.Tensor:
    """``[..., D]`` as ``[..., D + 4]`` uint8: divided by a scale that makes the largest value the largest float8."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    scale = (states.detach().float().abs().amax(-1, keepdim=True) / largest).clamp(min=torch.finfo(torch.float32).tiny)
    numbers = (states.float() / scale).to(torch.float8_e4m3fn)
    return torch.cat([numbers.view(torch.uint8), scale.view(torch.uint8)], dim=-1)


def unpack(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `pack` was given, to the precision of float8: ``[..., D]``."""
    numbers = packed[..., :-SCALE_BYTES].contiguous().view(torch.float8_e4m3fn)
    scale = packed[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    return (numbers.float() * scale).to(dtype)
