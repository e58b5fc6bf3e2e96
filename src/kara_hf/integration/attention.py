"""The seam with Transformers: one attention function and one mask function for every model.

An attention module calls ``past_key_values.update(key, value, layer_idx)`` and hands the result, with the query, to the
function that its config names. The key that a kara_hf layer returns carries that layer (`CarriedKey`), so the function
registered here finds it there; without one it is the model's own implementation, call for call, unless the module has
an `attention_hook` (an `AttentionHook`), which then answers. The mask function tells a compressed layer by the length
it announces, which is a `StoredLength`.
"""

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PREFIX = "kara_hf|"

AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


class Layer(Protocol):
    """A cache layer that answers attention itself."""

    def attend(
        self,
        own: AttentionFunction,
        module: torch.nn.Module | None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        *,
        transformed: bool,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As an attention function of Transformers.

        Args:
            own: the model's own attention function.
            module: the attention module, or None where it is not known.
            query, key, value, attention_mask, kwargs: as Transformers passes them, the key without its carrier.
            transformed: whether the model computed with the keys after `update` returned them.
        """


class AttentionHook(Protocol):
    """What the attribute `attention_hook` of an attention module may be: it answers while no kara_hf cache is used."""

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
        """As an attention function of Transformers; `own` is the model's."""


class StoredLength(int):
    """The number of keys a compressed layer announces to the mask function: tokens seen, not tokens kept."""


class CarriedKey(torch.Tensor):
    """Keys that know the layer which stores them, and whether the model has computed with them since.

    What is computed from them carries the layer on. `scaled_dot_product_attention` on them is answered by the layer:
    that is how models that call it themselves, without an attention function, reach their store.
    """

    plain: torch.Tensor
    layer: Layer
    transformed: bool

    @classmethod
    def of(cls, key: torch.Tensor, layer: Layer, transformed: bool = False) -> "CarriedKey":
        if isinstance(key, cls):  # an operation that had nothing to do gave its argument back
            return key
        carried = key.as_subclass(cls)
        carried.plain, carried.layer, carried.transformed = key, layer, transformed
        return carried

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _direct_attention(*args, **kwargs)
        source = next(arg for arg in pytree.tree_leaves((args, kwargs)) if isinstance(arg, CarriedKey))
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
        if not isinstance(out, torch.Tensor | tuple | list):
            return out
        return pytree.tree_map_only(torch.Tensor, lambda x: cls.of(x, source.layer, transformed=True), out)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.plain if isinstance(tensor, CarriedKey) else tensor


def _direct_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """`scaled_dot_product_attention` for a model that calls it on carried keys; shapes as there."""

    def own(module: None, query: Any, key: Any, value: Any, mask: Any, **_: Any) -> tuple[torch.Tensor, None]:
        out = F.scaled_dot_product_attention(query, key, value, mask, dropout_p, is_causal, scale=scale, **kwargs)
        return out.transpose(1, 2), None

    if not isinstance(key, CarriedKey):
        return F.scaled_dot_product_attention(
            _plain(query), key, _plain(value), attn_mask, dropout_p, is_causal, scale=scale, **kwargs
        )
    out, _ = key.layer.attend(
        own,
        None,
        query,
        key.plain,
        _plain(value),
        attn_mask,
        transformed=key.transformed,
        scaling=scale,
        dropout=dropout_p,
    )
    return out.transpose(1, 2).contiguous()


def unwrap(model: Any) -> PreTrainedModel:
    """The Transformers model inside `model`, which may be wrapped by PEFT.

    Raises:
        TypeError: there is none.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(
            f"expected a Transformers model (PreTrainedModel) or one wrapped by PEFT, got {type(model).__name__}; "
            "load it with AutoModelForCausalLM.from_pretrained"
        )
    return inner


def decoder_config(model: PreTrainedModel) -> PreTrainedConfig:
    return model.config.get_text_config(decoder=True)


def is_attached(config: PreTrainedConfig) -> bool:
    return (config._attn_implementation or "").startswith(PREFIX)


def check_supported(model: PreTrainedModel) -> None:
    """Raises ValueError, with the reason, if a compressed cache could not reach the attention of `model`."""
    name, own = type(model).__name__, decoder_config(model)._attn_implementation
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{name} is an encoder-decoder, whose cross-attention cache is not supported; use a decoder-only model"
        )
    if own is None or not (model._can_set_attn_implementation() or calls_sdpa(model)):
        raise ValueError(
            f"{name} neither takes its attention function from its config (Transformers' AttentionInterface) nor "
            f"calls scaled_dot_product_attention (attn_implementation={own!r}), so a compressed cache cannot reach "
            'it; load it with attn_implementation="sdpa" if it has that, or use another model class'
        )


def calls_sdpa(model: PreTrainedModel) -> bool:
    """Whether the model bypasses the AttentionInterface and calls `scaled_dot_product_attention` itself (Falcon)."""
    if model._can_set_attn_implementation() or decoder_config(model)._attn_implementation != "sdpa":
        return False
    return "scaled_dot_product_attention(" in inspect.getsource(sys.modules[type(model).__module__])


class Attachment:
    """What `attach` returns: leaving it as a context manager puts the model back, unless it was attached before."""

    def __init__(self, model: PreTrainedModel, was_attached: bool):
        self._model, self._was_attached = model, was_attached

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._was_attached:
            detach(self._model)


class Route:
    """Stands for a model's `forward`: decode steps of a cache with a graph go there, all others to the model."""

    def __init__(self, model: torch.nn.Module):
        self.model, self.own = model, vars(model).get("forward")
        self.__signature__ = inspect.signature(model.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        graph = getattr(kwargs.get("cache", kwargs.get("past_key_values")), "graph", None)
        if graph is None or args:
            return self.forward(*args, **kwargs)
        return graph.step(self.forward, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own."""
        return self.own(*args, **kwargs) if self.own else type(self.model).forward(self.model, *args, **kwargs)


def route(model: Any) -> None:
    """Puts a `Route` in front of the model's forward, once; `detach` takes it away."""
    if not isinstance(vars(model).get("forward"), Route):
        model.forward = Route(model)


def attach(model: Any) -> Attachment:
    """Switches the model's attention to ours, which equals its own whenever no kara_hf cache is in use.

    Only the setting of the decoder changes: no forward, no weight, no other model. Usable as ``with attach(model):``.
    `KaraCache(model)` calls it.

    Raises:
        TypeError: `model` is no Transformers model.
        ValueError: it is an encoder-decoder, or its code does not take its attention function from its config.
    """
    model = unwrap(model)
    check_supported(model)
    config = decoder_config(model)
    was_attached = is_attached(config)
    if not was_attached and not calls_sdpa(model):
        own = config._attn_implementation
        AttentionInterface.register(PREFIX + own, _attention(own))
        AttentionMaskInterface.register(PREFIX + own, _mask(own))
        config._attn_implementation = PREFIX + own
    return Attachment(model, was_attached)


def detach(model: Any) -> None:
    """Gives the model its own attention setting and forward back. Does nothing to a model that is not attached."""
    model = unwrap(model)
    config, installed = decoder_config(model), vars(model).get("forward")
    if is_attached(config):
        config._attn_implementation = config._attn_implementation.removeprefix(PREFIX)
    if isinstance(installed, Route):
        if installed.own:
            model.forward = installed.own
        else:
            del model.forward


@contextlib.contextmanager
def hooked(model: Any, hook: AttentionHook) -> Iterator[None]:
    """Within it `hook` answers for the attention of every layer of `model`, which is as it was afterwards.

    Raises:
        ValueError: another hook answers already. Otherwise as `attach`.
    """
    model = unwrap(model)
    modules = [module for module in model.modules() if hasattr(module, "layer_idx")]
    if any("attention_hook" in vars(module) for module in modules):
        raise ValueError("the layers of this model share keys already (SharedForward); close that first")
    with attach(model):
        try:
            for module in modules:
                module.attention_hook = hook
            yield
        finally:
            for module in modules:
                vars(module).pop("attention_hook", None)


@functools.cache
def _own_attention(module_type: Any, name: str) -> AttentionFunction:
    """What a module of this type calls when its config says `name`; "eager" is written beside the module."""
    namespaces = [vars(sys.modules[cls.__module__]) for cls in module_type.__mro__ if cls.__module__ in sys.modules]
    eager = next((space["eager_attention_forward"] for space in namespaces if "eager_attention_forward" in space), None)
    interface = next(
        (space["ALL_ATTENTION_FUNCTIONS"] for space in namespaces if "ALL_ATTENTION_FUNCTIONS" in space),
        ALL_ATTENTION_FUNCTIONS,
    )
    function = interface.get_interface(name, eager)
    if function is None:
        raise ValueError(
            f"{module_type.__name__} has no eager attention of its own that kara_hf could find; load the model with "
            'attn_implementation="sdpa"'
        )
    return function


def _attention(own: str) -> AttentionFunction:
    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        def function(module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
            kind: Any = type(module)
            call = _own_attention(kind, own)
            if "flash" not in own:
                return call(module, *args, **kwargs)
            with _named(module, own):
                return call(module, *args, **kwargs)

        hook: AttentionHook | None = vars(module).get("attention_hook")
        if hook is None and not isinstance(key, CarriedKey):
            return function(module, query, key, value, attention_mask, **kwargs)
        if own == "sdpa" and kwargs.get("softcap") is not None:
            raise ValueError(
                f"{type(module).__name__} caps its attention scores (softcap={kwargs['softcap']}), which sdpa does "
                'not; load the model with attn_implementation="eager"'
            )
        if isinstance(key, CarriedKey):
            value, transformed = _plain(value), key.transformed
            return key.layer.attend(
                function, module, query, key.plain, value, attention_mask, transformed=transformed, **kwargs
            )
        assert hook is not None
        return hook.attend(function, module, query, key, value, attention_mask, **kwargs)

    return attention


@contextlib.contextmanager
def _named(module: torch.nn.Module, own: str) -> Iterator[None]:
    """Lets the module's config say `own` for a while: flash attention looks its kernel up by that name."""
    config: Any = module.config
    name = config._attn_implementation
    config._attn_implementation = own
    try:
        yield
    finally:
        config._attn_implementation = name


def _mask(own: str) -> Callable[..., Any]:
    def mask(
        *, q_length: int, kv_length: int, q_offset: int, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        """The model's own mask; for later steps of a compressed layer which of the new tokens are real, ``[B, S]``,
        or None.
        """
        if isinstance(kv_length, StoredLength) and kv_length > q_length:
            return None if attention_mask is None else attention_mask[:, kv_length - q_length : kv_length]
        return ALL_MASK_ATTENTION_FUNCTIONS[own](
            q_length=q_length,
            kv_length=int(kv_length),
            q_offset=q_offset,
            attention_mask=attention_mask,
            **kwargs,
        )

    return mask


def real_tokens(attention_mask: Any, tokens: int) -> torch.Tensor | None:
    """Which of the `tokens` columns of a first forward hold tokens and not padding.

    What the last query of the prompt may see is what every later token may see, whatever form the mask has.

    Args:
        attention_mask: None, ``[B, S]``, ``[B, 1, S, S]`` bool or additive float, or a flex-attention BlockMask.
        tokens: S.

    Returns:
        ``[B, S]`` bool, or None where every column is a token.

    Raises:
        ValueError: the mask adds a bias to the scores, as ALiBi does, or differs between heads.
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, torch.Tensor):  # a flex-attention BlockMask
        sequences = torch.arange(attention_mask.shape[0])[:, None]
        columns = torch.arange(tokens)[None]
        real = attention_mask.mask_mod(
            sequences, torch.zeros_like(columns), torch.full_like(columns, tokens - 1), columns
        )
    elif attention_mask.ndim == 2:
        real = attention_mask[:, :tokens].bool()
    else:
        last = attention_mask[:, :, -1, :tokens]
        if last.dtype != torch.bool:
            lowest = torch.finfo(last.dtype).min
            if ((last != 0) & (last > lowest / 2)).any():
                raise ValueError(
                    "the model adds a bias to its attention scores (ALiBi or relative positions), which a "
                    "compressed cache would lose; use a model with rotary or no position encoding"
                )
            last = last == 0
        if last.shape[1] > 1 and (last != last[:, :1]).any():
            raise ValueError("the attention mask differs between heads, which a compressed cache does not support")
        real = last[:, 0]
    return None if bool(real.all()) else real
