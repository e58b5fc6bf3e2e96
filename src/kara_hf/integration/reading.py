"""A prompt that is read once, for any number of caches: each takes up what the model computed, as if it had read."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

from .attach import StepCache, hooked, unwrap
from .attention import AttentionFunction, AttentionHook, CarriedKey
from .prefill import last_logits


@dataclass(frozen=True)
class _Attention:
    """What one attention was computed from: arguments as an attention function of Transformers gets them."""

    module: torch.nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: Any
    kwargs: dict[str, Any]


class _Recorder(AttentionHook):
    def __init__(self) -> None:
        self.calls: list[_Attention] = []

    def attend(
        self,
        own: AttentionFunction,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        self.calls.append(_Attention(module, query, key, value, attention_mask, kwargs))
        return own(module, query, key, value, attention_mask, **kwargs)


class Reading:
    """Keys, values and queries of a prompt in every layer, and what the model expects behind it.

    A first forward attends over the prompt itself, whatever cache it fills: what it computes is the same for all of
    them, bit for bit. It takes one forward, and memory for queries, keys and values of all layers while it is held.

    Args:
        model: a Transformers causal LM.
        input_ids, attention_mask: ``[B, S]`` int64, padded on the left.

    Attributes:
        logits: behind the last token, ``[B, V]``.
        seconds: that the forward took.
    """

    def __init__(self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor):
        inner = unwrap(model)
        recorder = _Recorder()
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        start = time.perf_counter()
        with hooked(inner, recorder):
            out = model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=positions,
                use_cache=False,
                **last_logits(inner),
            )
        self.seconds = time.perf_counter() - start
        self.logits: torch.Tensor = out.logits[:, -1]
        self._calls: Sequence[_Attention] = recorder.calls
        self._mask = attention_mask

    def fits(self, cache: Cache) -> bool:
        """Whether nothing but attention fills `cache`, in each of its layers once and with what was recorded."""
        layers = [getattr(call.module, "layer_idx", None) for call in self._calls]
        return (
            not (isinstance(cache, StepCache) and not cache.takes_readings)
            and layers == list(range(len(cache.layers)))
            and not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)
            and not any(hasattr(call.module, "kv_lora_rank") for call in self._calls)
        )

    def into(self, cache: Cache, complete: bool = False) -> None:
        """Fills `cache`, which is empty and `fits`, as the model's forward would.

        Args:
            complete: that nothing of the prompt is still to come, as `generate` says.

        Raises:
            ValueError: what the cache raises; it is as it was then.
        """
        if complete and isinstance(cache, StepCache):
            cache.inputs_prepared(True, True)
        for layer, call in enumerate(self._calls):
            key, value = cache.update(call.key, call.value, layer)
            if isinstance(key, CarriedKey):
                key.answerer.attend(
                    _nothing, call.module, call.query, key.plain, value, call.mask, transformed=False, **call.kwargs
                )
        if isinstance(cache, StepCache):
            cache.forward_done()


def _nothing(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """Attention whose result nobody needs."""
    return query, None
