"""What answers when a model asks for its attention and its mask: the functions at the seam with Transformers.

An attention module calls ``cache.update(key, value, layer_idx)`` and hands the result, with the query, to the function
that its config names. The key that a kara_hf cache returns carries who answers for it (`CarriedKey`). `answering` makes
of any attention function one that lets it answer; without a carried key the function is what it was, call for call,
unless the module has an `attention_hook`. `masking` does the same for mask functions, which tell a compressed layer by
the length it announces (`StoredLength`). `kara_hf.integration.attach` puts both where models look them up.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


class Answerer(Protocol):
    """Who answers attention on a carried key."""

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
    """The number of keys a compressed layer announces to the mask function: tokens seen, not tokens kept.

    Attributes:
        shared: whether the model gives the mask to layers of another kind too, or slices it, so that it must be one of
            the model's own.
        padded: whether some of the tokens seen were padding, so that a mask of ones says something.
    """

    shared: bool
    padded: bool

    def __new__(cls, length: int, shared: bool = False, padded: bool = False) -> "StoredLength":
        made = super().__new__(cls, length)
        made.shared, made.padded = shared, padded
        return made


class CarriedKey(torch.Tensor):
    """Keys that know who answers attention on them, and whether the model has computed with them since.

    What is computed from them carries that on. `scaled_dot_product_attention` on them is answered too: that is how
    models that call it themselves, without an attention function, reach their store.
    """

    plain: torch.Tensor
    answerer: Answerer
    transformed: bool

    @classmethod
    def of(cls, key: torch.Tensor, answerer: Answerer, transformed: bool = False) -> "CarriedKey":
        if isinstance(key, cls):  # an operation that had nothing to do gave its argument back
            return key
        carried = key.as_subclass(cls)
        carried.plain, carried.answerer, carried.transformed = key, answerer, transformed
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
        return pytree.tree_map_only(torch.Tensor, lambda x: cls.of(x, source.answerer, transformed=True), out)


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
    out, _ = key.answerer.attend(
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


def _once(wrap: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`wrap` that makes one wrapper of each function. `torch.compile` would warn of `functools.cache` in any model."""
    made: dict[Any, Any] = {}

    @functools.wraps(wrap)
    def look_up(own: Any) -> Any:
        if own not in made:
            made[own] = wrap(own)
        return made[own]

    return look_up


@_once
def answering(own: AttentionFunction) -> AttentionFunction:
    """`own`, but a carried key or an attention hook answers where there is one."""
    if hasattr(own, "answers_for"):
        return own

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        hook: AttentionHook | None = vars(module).get("attention_hook")
        if hook is None and not isinstance(key, CarriedKey):
            return own(module, query, key, value, attention_mask, *args, **kwargs)
        if own is sdpa_attention_forward and kwargs.get("softcap") is not None:
            raise ValueError(
                f"{type(module).__name__} caps its attention scores (softcap={kwargs['softcap']}), which sdpa does "
                'not; load the model with attn_implementation="eager"'
            )
        if args:  # positional only in models that call their eager function themselves; its names are its own
            raise ValueError(
                f"{type(module).__name__} passes {len(args)} further arguments to its attention without their names, "
                "which are not understood here"
            )
        if isinstance(key, CarriedKey):
            return key.answerer.attend(
                own, module, query, key.plain, _plain(value), attention_mask, transformed=key.transformed, **kwargs
            )
        assert hook is not None
        return hook.attend(own, module, query, key, value, attention_mask, **kwargs)

    attention.answers_for = own  # type: ignore[attr-defined]
    return attention


@_once
def masking(own: Callable[..., Any]) -> Callable[..., Any]:
    """`own`, but for later steps of a compressed layer what it says of all tokens seen, however it would say it.

    The result is then None or who sees whom, ``[B, 1, S, C]``. For one new token it is a view of the caller's mask, so
    that nobody waits for the device.
    """
    if hasattr(own, "answers_for"):
        return own

    def mask(*args: Any, **kwargs: Any) -> Any:
        kv_length = kwargs.get("kv_length")
        if not isinstance(kv_length, StoredLength):
            return own(*args, **kwargs)
        kwargs["kv_length"] = int(kv_length)
        if kv_length == kwargs["q_length"] or kv_length.shared:
            return own(*args, **kwargs)
        padding = kwargs.get("attention_mask")
        if kwargs.get("mask_function", causal_mask_function) is causal_mask_function:
            if padding is None or padding.shape[-1] != kv_length:
                return padding
            if kwargs["q_length"] == 1:
                return padding[:, None, None]
            if not kv_length.padded and bool(padding.all()):
                return None
        return sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False})

    mask.answers_for = own  # type: ignore[attr-defined]
    return mask


def as_visible(attention_mask: Any, tokens: int) -> torch.Tensor:
    """Who sees whom by a mask over several queries, whatever form it has.

    Args:
        attention_mask: ``[B, 1 or Hq, S, C]`` bool or additive float, or a flex-attention BlockMask of that shape.
        tokens: how many of its columns count, C or fewer.

    Returns:
        ``[B, S, tokens]`` bool.

    Raises:
        ValueError: the mask adds a bias to the scores, as ALiBi does, or differs between heads.
    """
    if not isinstance(attention_mask, torch.Tensor):  # a flex-attention BlockMask
        batch, queries = attention_mask.shape[0], attention_mask.shape[-2]
        device = attention_mask.kv_num_blocks.device
        sequence, query, column = torch.meshgrid(
            *(torch.arange(n, device=device) for n in (batch, queries, tokens)), indexing="ij"
        )
        return attention_mask.mask_mod(sequence, torch.zeros_like(query), query, column)
    visible = attention_mask[..., :tokens]
    if visible.dtype != torch.bool:
        lowest = torch.finfo(visible.dtype).min
        if ((visible != 0) & (visible > lowest / 2)).any():
            raise ValueError(
                "the model adds a bias to its attention scores (ALiBi or relative positions), which a compressed cache "
                "would lose; use a model with rotary or no position encoding"
            )
        visible = visible == 0
    if visible.shape[1] > 1 and (visible != visible[:, :1]).any():
        raise ValueError("the attention mask differs between heads, which a compressed cache does not support")
    return visible[:, 0]


def real_tokens(attention_mask: Any, tokens: int) -> torch.Tensor | None:
    """Which of the `tokens` columns of a first forward hold tokens and not padding.

    A column that neither the last query nor any query but its own may see is padding, whatever form the mask has.

    Args:
        attention_mask: None, ``[B, S]``, or as `as_visible` takes it.
        tokens: S.

    Returns:
        ``[B, S]`` bool, or None where every column is a token.

    Raises:
        ValueError: as `as_visible`.
    """
    if attention_mask is None:
        return None
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        real = attention_mask[:, :tokens].bool()
    else:
        visible = as_visible(attention_mask, tokens)
        real = visible[:, -1]
        if not bool(real.all()):
            by_itself = visible.diagonal(dim1=1, dim2=2).int()
            real = real | (visible.sum(1) > by_itself)
    return None if bool(real.all()) else real
