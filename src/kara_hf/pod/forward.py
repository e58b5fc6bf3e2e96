"""The whole forward of a model whose layers share keys, without a cache: what adaptation trains (PoD, 2412.02252)."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from ..integration.attention import AttentionFunction, decoder_config, hooked, real_tokens, unwrap
from ..kernels import Proximal, shared_attention
from ..policy.sharing import PoDSharing


class SharedForward:
    """Makes `model` attend as `sharing` says whenever it runs without a cache, until `close`; a context manager too.

        with SharedForward(model, sharing):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss

    Gradients flow through shared queries and keys into the leads. With gradient checkpointing it must be the
    non-reentrant kind: the other one computes a follower again with queries and keys that belong to no graph, and its
    gradients are silently wrong.

    Raises:
        TypeError: `model` is no Transformers model.
        ValueError: the sharing is of another model, the model checkpoints in the reentrant way, or it shares keys
            already.
    """

    def __init__(self, model: Any, sharing: PoDSharing):
        self.model, self.sharing = unwrap(model), sharing
        sharing.check(decoder_config(self.model))
        check_checkpointing(self.model)
        self._open = ExitStack()
        self._open.enter_context(hooked(self.model, self))
        self.shared: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # queries and keys of leads, by layer
        self.followers = [sharing.followers(layer) for layer in range(sharing.layers)]
        self._paused = False
        # On the decoder and not on the whole model, whose forward PEFT may call without its hooks.
        self._hook = self.model.base_model.register_forward_pre_hook(self._start)

    def __enter__(self) -> "SharedForward":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Gives the model its own attention back."""
        self._hook.remove()
        self.shared.clear()
        self._open.close()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within it the model attends on its own; what a forward before it left for its backward stays."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def _start(self, *_: Any) -> None:
        if self._paused:
            return
        check_checkpointing(self.model)
        self.shared.clear()

    def attend(
        self,
        own: AttentionFunction,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As an attention function of Transformers, of a whole sequence: ``[B, Hq, S, D]``, ``[B, H, S, D]``."""
        if self._paused:
            return own(module, query, key, value, attention_mask, **kwargs)
        layer, sharing = module.layer_idx, self.sharing
        followers = self.followers[layer]
        if sharing.leading(layer):
            self.shared[layer] = query, key
        if not followers:
            return own(module, query, key, value, attention_mask, **kwargs)
        if kwargs.get("dropout"):
            raise ValueError(
                f"attention dropout={kwargs['dropout']} is not possible where layers share keys; set "
                "attention_dropout=0 in the model's config"
            )
        real = causal_tokens(attention_mask, query.shape[2])
        positions = torch.arange(query.shape[2], dtype=torch.int32, device=query.device).expand(len(query), -1)
        if real is not None:
            positions = (real.cumsum(1, dtype=torch.int32) - 1).masked_fill(~real, -1)
        lead_query, lead_keys = self.of_leads(layer, query)
        out = shared_attention(
            query,
            key,
            value,
            lead_query,
            lead_keys,
            followers=followers,
            query_positions=positions,
            key_positions=positions[:, None],
            proximal=Proximal(sharing.sinks, sharing.recent),
            scaling=kwargs.get("scaling") or query.shape[-1] ** -0.5,
            softcap=kwargs.get("softcap"),
            sink_logits=kwargs.get("s_aux"),
            skip=sharing.skip,
        )
        return out.transpose(1, 2).contiguous(), None

    def of_leads(self, layer: int, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the followers of a layer use for distant tokens: queries ``[B, F * G, S, D]`` and keys
        ``[B, F, S, D]``.
        """
        group = query.shape[1] // self.sharing.heads
        leads = {self.sharing.lead[layer][head] for head in self.followers[layer]}
        if len(leads) == 1 and len(self.followers[layer]) == self.sharing.heads:  # nothing has to be put together
            lead_query, lead_keys = self.shared[leads.pop()]
            return (lead_query if self.sharing.distant_query == "lead" else query), lead_keys
        queries, keys = [], []
        for head in self.followers[layer]:
            lead_query, lead_keys = self.shared[self.sharing.lead[layer][head]]
            source = lead_query if self.sharing.distant_query == "lead" else query
            queries.append(source[:, head * group : (head + 1) * group])
            keys.append(lead_keys[:, head : head + 1])
        return torch.cat(queries, 1), torch.cat(keys, 1)


def check_checkpointing(model: Any) -> None:
    """Raises ValueError if `model` checkpoints its layers in the reentrant way."""
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if not getattr(module, "gradient_checkpointing", False) or function is None:
            continue
        if getattr(function, "keywords", {}).get("use_reentrant", True):
            raise ValueError(
                "gradient checkpointing with use_reentrant=True is not possible where layers share keys: its gradients "
                'would be wrong; use model.gradient_checkpointing_enable({"use_reentrant": False})'
            )


def causal_tokens(attention_mask: Any, tokens: int) -> torch.Tensor | None:
    """Which columns of a causal mask hold tokens, ``[B, S]`` bool; None: all. Raises ValueError for another mask."""
    real = real_tokens(attention_mask, tokens)
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4:
        mask = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
        there = torch.ones(len(mask), tokens, dtype=torch.bool, device=mask.device) if real is None else real
        expected = (there.cumsum(1) * there).sum()  # each token sees itself and those before it
        if bool(((mask[:, 0] & there[:, :, None]).sum() != expected).item()):
            raise ValueError(
                "the attention mask is not that of one causal sequence in each row (several documents packed with "
                "position ids, or both directions), which shared keys do not support; pack without resetting positions"
            )
    return real
