"""The model that a cache belongs to: what it is called, which of its layers can be compressed, whether it answers."""

import warnings
import weakref
from itertools import islice
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from ..config import is_int, require
from ..integration.attach import Hold, calls_sdpa, check_not_compiled, check_supported, decoder_config
from ..integration.shape import full_layers, head_dim, layer_kinds, model_shape
from ..policy.sharing import PoDSharing


class BoundModel:
    """The model a cache belongs to, held weakly; copies of a cache belong to the same one.

    The model is attached as long as this lives.

    Raises:
        ValueError: its attention cannot be reached.
    """

    def __init__(self, model: PreTrainedModel):
        check_supported(model)
        self.config = decoder_config(model)
        self.name = type(model).__name__
        self.direct = calls_sdpa(model)
        self.tensor_parallel = getattr(model, "tp_size", None) or 1
        self._modules = weakref.WeakSet(module for module in model.modules() if hasattr(module, "layer_idx"))
        self._hold = Hold(model)

    def __contains__(self, module: torch.nn.Module | None) -> bool:
        return module in self._modules or (module is None and self.direct)

    def unanswered(self) -> RuntimeError:
        """What to raise when keys were stored and no attention function of ours took them up."""
        return RuntimeError(
            f"the attention of {self.name} does not answer for this cache (its implementation is "
            f"{self.config._attn_implementation!r}): it was detached, computes its attention itself, or another model "
            "was given the cache; call kara_hf.attach(model) with the model that uses it, or pass it a cache that was "
            "made for it"
        )

    @property
    def answers(self) -> bool:
        """Whether the model's attention reaches a store: nobody has detached it."""
        return self._hold.answers

    @property
    def model(self) -> PreTrainedModel:
        """The model, as long as it lives. Raises RuntimeError afterwards."""
        model = self._hold.model
        if model is None:
            raise RuntimeError(f"the {self.name} that this cache was made for is gone")
        return model

    def check_not_compiled(self) -> None:
        """Raises ValueError if `torch.compile` was applied to the model or a part of it."""
        model = self._hold.model
        if model is not None:
            check_not_compiled(model)

    def layers(self) -> list[Any]:
        """Transformers' own cache layers for this model; `full_layers` says which of them can be compressed.

        Raises:
            ValueError: there is none of them, or some layer is of a kind that a compressed cache does not support.
        """
        layers: list[Any] = DynamicCache(config=self.config).layers
        if not full_layers(self.config, layers):
            kinds = sorted({type(layer).__name__ for layer in layers})
            raise ValueError(
                f"{self.name} has no full-attention layer (its layers are {kinds}), so there is nothing to compress; "
                "use Transformers' own cache"
            )
        return layers

    def shares_masks(self) -> bool:
        """Whether the mask of full-attention layers reaches others too: those of another kind that are neither sliding
        nor linear, or layers that read the keys of these.
        """
        layers, full = self.layers(), self.full_layers()
        apart = [getattr(layer, "is_sliding", False) or hasattr(layer, "conv_states") for layer in layers]
        others = any(not (kind or i in full) for i, kind in enumerate(apart))
        return others or len(layers) < getattr(self.config, "num_hidden_layers", len(layers))

    def full_layers(self) -> list[int]:
        """Indices of the layers that can be compressed. Raises as `layers`."""
        return full_layers(self.config, self.layers())

    def observable_layers(self) -> list[int]:
        """The same, of a model whose queries an attention hook sees.

        Raises:
            ValueError: it sees none, or as `layers`.
        """
        if self.direct:
            raise ValueError(
                f"{self.name} computes its attention itself, without an attention function of Transformers, so its "
                "queries cannot be seen; use another model class"
            )
        return self.full_layers()

    @property
    def devices(self) -> dict[int, torch.device]:
        """Where the layers of the model are, by index."""
        return {module.layer_idx: part.device for module in self._modules for part in islice(module.parameters(), 1)}

    def check_sharing(self, sharing: PoDSharing) -> None:
        """Raises ValueError if `sharing` is not possible with this model; warns if it cannot save anything."""
        sharing.check(model_shape(self.config), layer_kinds(self.config))
        devices = self.devices
        for layer, heads in enumerate(sharing.lead):
            for lead in heads:
                if devices.get(layer) != devices.get(lead):
                    raise ValueError(
                        f"layer {layer} on {devices[layer]} cannot follow layer {lead} on {devices[lead]}: the layers "
                        "of a group must be on one device; change the device_map, or explore the model as it is placed"
                    )
        limit = getattr(self.config, "max_position_embeddings", None)
        if limit is not None and sharing.followers_share and sharing.proximal >= limit:
            warnings.warn(
                f"nothing is saved: sinks + recent = {sharing.proximal} tokens are proximal, and {self.name} has "
                f"positions for {limit}; lower `recent`",
                stacklevel=4,
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "BoundModel":
        return self


def check_max_bytes(max_bytes: int | None, model: PreTrainedModel, block_size: int) -> None:
    """Raises ValueError if `max_bytes` could not hold one block."""
    config: Any = decoder_config(model)
    config = (getattr(config, "per_layer_config", None) or [config])[0]
    block = block_size * 2 * head_dim(config) * model.dtype.itemsize
    require(
        max_bytes is None or (is_int(max_bytes) and max_bytes >= block),
        "max_bytes",
        max_bytes,
        f"None or at least one block of keys and values, {block} bytes",
    )
