"""The attention of a model that reads a sample: what it is computed from, recorded while the model runs."""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..integration.attach import hooked
from ..integration.attention import AttentionFunction, AttentionHook
from ..integration.masks import AttentionMask, causal_tokens
from ..kernels import Proximal, softcapped


@dataclass(frozen=True)
class Attention:
    """What one layer's attention to a sample is computed from.

    Attributes:
        query: ``[Hq, Q, D]``, of the last Q tokens.
        key: ``[H, N, D]``.
        scaling, softcap: of the logits.
        sink_logits: ``[Hq]``, of each head's attention sink, or None.
    """

    query: torch.Tensor
    key: torch.Tensor
    scaling: float
    softcap: float | None
    sink_logits: torch.Tensor | None

    def rows(self, head: int, part: slice, near: Proximal | None) -> torch.Tensor:
        """Attention of a KV head to every token, for some of its G * Q queries, head by head: ``[R, N + 1]`` float32.

        What an attention sink takes is in the last column. With `near`, attention to distant tokens alone.
        """
        heads, tokens, size = self.key.shape
        group, last = self.query.shape[0] // heads, self.query.shape[1]
        place = torch.arange(tokens, device=self.query.device)
        at = place[-last:].repeat(group)[part, None]
        query = self.query[head * group : (head + 1) * group].reshape(-1, size)[part]
        logits = query.float() * self.scaling @ self.key[head].float().T
        logits = softcapped(logits, self.softcap)
        seen = place <= at if near is None else near.distant(at, place)
        rows = torch.full((len(query), tokens + 1), -math.inf, device=query.device)
        rows[:, :-1] = logits.masked_fill_(~seen, -math.inf)
        if self.sink_logits is not None and near is None:
            rows[:, -1] = self.sink_logits.float().repeat_interleave(last)[head * group * last :][part]
        return rows.softmax(-1)


class Recorder(AttentionHook):
    """Keeps what the attention of some layers is computed from while the model runs.

    Args:
        layers: indices of the layers.
        queries: last queries of a sample that are kept.
    """

    def __init__(self, layers: set[int], queries: int):
        self.layers, self.queries = layers, queries
        self._recorded: dict[int, Attention] = {}

    @contextmanager
    def watching(self, model: PreTrainedModel) -> Iterator[None]:
        """Within it every forward of `model` is recorded, and the model is in eval mode."""
        training = [module for module in model.modules() if module.training]
        with hooked(model, self):
            try:
                model.eval()
                yield
            finally:
                for module in training:
                    module.training = True

    def run(self, model: PreTrainedModel, ids: torch.Tensor) -> list[Attention]:
        """What `model` attends by when it reads ids ``[N]`` int64: one entry for each layer, ascending.

        Raises:
            ValueError: some layer is not computed through the model's attention function, or hides tokens.
        """
        options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        self._recorded = {}
        with torch.inference_mode():
            model(input_ids=ids[None].to(model.device), use_cache=False, **options)
        recorded, self._recorded = self._recorded, {}
        missing = sorted(self.layers - recorded.keys())
        if missing:
            raise ValueError(
                f"{type(model).__name__} does not compute layers {missing} through its attention function, so their "
                "queries cannot be seen; use another model class"
            )
        return [recorded[layer] for layer in sorted(recorded)]

    def attend(
        self,
        own: AttentionFunction,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: AttentionMask,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        layer: Any = module.layer_idx
        if layer in self.layers:
            if causal_tokens(attention_mask, query.shape[2]) is not None:
                raise ValueError("the model hides tokens of a sample from its attention; give samples without padding")
            self._recorded[layer] = Attention(
                # copies, so that nothing larger is kept alive
                query=query[0, :, -self.queries :].clone(),
                key=key[0].clone(memory_format=torch.contiguous_format),
                scaling=kwargs.get("scaling") or query.shape[-1] ** -0.5,
                softcap=kwargs.get("softcap"),
                sink_logits=kwargs.get("s_aux"),
            )
        return own(module, query, key, value, attention_mask, **kwargs)
