"""Putting the seam on and taking it off, so that nobody else can tell.

While some model is attached, the places where Transformers looks up attention and mask functions hand out `answering`
and `masking` ones, which equal the model's own call for call wherever no kara_hf cache is in use. No config, weight or
registry changes. With the last cache of a model, or `detach`, all of it is gone.
"""

import contextlib
import functools
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from .attention import AttentionHook, answering, masking
from .prefill import FIRST, at_once, check_first_is_told, read_ahead

_lock = threading.RLock()


class StepCache:
    """A cache that is told by the model what happens to it."""

    @property
    def prefill_chunk(self) -> int | None:
        """Most tokens of a prompt that are to come in one forward of `generate`; None: all."""
        return None

    @property
    def takes_readings(self) -> bool:
        """Whether a first forward is the model's own attention, and its queries, keys and values all that is used."""
        raise NotImplementedError

    def forward_done(self) -> None:
        """The model's forward is done, whichever layers ran."""
        raise NotImplementedError

    def inputs_prepared(self, first: bool, complete: bool) -> None:
        """`generate` is about to run the model: `first` in a call, `complete` if on all that it was given."""
        raise NotImplementedError

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen."""
        raise NotImplementedError


def unwrap(model: Any) -> PreTrainedModel:
    """The Transformers model inside `model`, which may be wrapped by PEFT.

    Raises:
        TypeError: there is none.
    """
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        raise TypeError(_compiled(type(model._orig_mod).__name__))
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(
            f"expected a Transformers model (PreTrainedModel) or one wrapped by PEFT, got {type(model).__name__}; "
            "load it with AutoModelForCausalLM.from_pretrained"
        )
    return inner


def decoder_config(model: PreTrainedModel) -> PreTrainedConfig:
    return model.config.get_text_config(decoder=True)


def check_supported(model: PreTrainedModel) -> None:
    """Raises ValueError, with the reason, if a compressed cache could not reach the attention of `model`."""
    check_first_is_told()
    name, own = type(model).__name__, decoder_config(model)._attn_implementation
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{name} is an encoder-decoder, whose cross-attention cache is not supported; use a decoder-only model"
        )
    if not getattr(model, "_supports_default_dynamic_cache", lambda: True)():
        raise ValueError(f"{name} uses a cache class of its own, so it cannot use a compressed one")
    if own is None or not (_takes_attention(model) or calls_sdpa(model)):
        raise ValueError(
            f"{name} neither takes its attention function from its config (Transformers' AttentionInterface) nor "
            f"calls scaled_dot_product_attention (attn_implementation={own!r}), so a compressed cache cannot reach "
            'it; load it with attn_implementation="sdpa" if it has that, or use another model class'
        )


def _takes_attention(model: PreTrainedModel) -> bool:
    """Whether the model, or the decoder inside it, takes its attention function from its config."""
    kinds = {type(part) for part in (model, _decoder(model)) if isinstance(part, PreTrainedModel)}
    return any(kind._can_set_attn_implementation() for kind in kinds)


def calls_sdpa(model: PreTrainedModel) -> bool:
    """Whether the model bypasses the AttentionInterface and calls `scaled_dot_product_attention` itself (Falcon)."""
    if _takes_attention(model) or decoder_config(model)._attn_implementation != "sdpa":
        return False
    return "scaled_dot_product_attention(" in inspect.getsource(sys.modules[type(model).__module__])


def check_not_compiled(model: PreTrainedModel) -> None:
    """Raises ValueError if `torch.compile` was applied to `model`, its forward or a part of it."""
    for module in model.modules():
        if module._compiled_call_impl is not None or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable"):
            raise ValueError(_compiled(type(model).__name__))


@torch.compiler.disable
def refuse_tracing(name: str) -> None:
    """Raises ValueError; called where `torch.compile` is tracing what cannot be compiled."""
    raise ValueError(_compiled(name))


def _compiled(name: str) -> str:
    return (
        f"{name} is compiled (torch.compile), and what a compressed cache does in a step cannot be compiled; make the "
        "cache for the model as it was before, and on a GPU pass cuda_graph=True for the same gain"
    )


# ------------------------------------------------------------------------------------------------ what is put where
class _Patch:
    """An attribute of a class that is wrapped for as long as somebody needs it.

    Holders may be collected at any allocation, in the middle of these methods too: who counts, counts first.
    """

    def __init__(self, owner: type, name: str, wrap: Callable[[Any], Any]):
        self.owner, self.name, self.wrap = owner, name, wrap
        self.users = 0
        self._own: Any = None  # what stood on the class itself, if anything
        self._ours: Any = None

    def acquire(self) -> None:
        self.users += 1
        if self._ours is None:
            self._own = vars(self.owner).get(self.name)
            self._ours = self.wrap(getattr(self.owner, self.name))
            setattr(self.owner, self.name, self._ours)

    def release(self) -> None:
        self.users -= 1
        if self.users:
            return
        own, ours, self._own, self._ours = self._own, self._ours, None, None
        if vars(self.owner).get(self.name) is not ours:
            return  # somebody else has wrapped it since: what is ours beneath changes nothing
        if own is None:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, own)


def _answers(look_up: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(look_up)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = look_up(self, *args, **kwargs)
        return None if found is None else answering(found)

    return wrapped


def _masks(look_up: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(look_up)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return masking(look_up(self, *args, **kwargs))

    return wrapped


def _keeps_cache(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """`prepare_inputs_for_generation` that hands on the cache it was given, or says why it cannot."""

    @functools.wraps(prepare)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        name = "cache" if kwargs.get("cache") is not None else "past_key_values"
        cache = kwargs.get(name)
        if not isinstance(cache, StepCache):
            return prepare(self, *args, **kwargs)
        if kwargs.get("use_cache") is False:
            raise ValueError(
                f"use_cache=False is not possible with a {type(cache).__name__}: every step would bring all tokens "
                "again, to be counted anew; leave it out or set it to True, in the generation_config too"
            )
        first = bool(kwargs.get(FIRST))
        if first:
            check_not_compiled(self)
        cache.inputs_prepared(first, first and at_once(cache.prefill_chunk, kwargs))
        inputs = prepare(self, *args, **kwargs)
        dropped = inputs.get("cache", inputs.get("past_key_values")) is not cache
        seen = cache.get_seq_length()
        if dropped and seen:
            limit = getattr(decoder_config(self), "original_max_position_embeddings", None)
            raise ValueError(
                f"{type(self).__name__} drops the cache it was given, which has seen {seen} tokens, to compute "
                "everything anew"
                + (
                    f": it changes its rotary embedding at original_max_position_embeddings={limit} tokens"
                    if limit
                    else ""
                )
                + ". What was evicted cannot be computed anew; stay within that length, or begin beyond it with a new "
                "cache"
            )
        inputs |= {name: cache} if dropped else {}  # it is empty, as what it was dropped for
        return read_ahead(self, cache.prefill_chunk, inputs) if first else inputs

    return wrapped


_LOOK_UPS = (
    _Patch(AttentionInterface, "get_interface", _answers),
    _Patch(AttentionInterface, "__getitem__", _answers),
    _Patch(AttentionMaskInterface, "__getitem__", _masks),
)
_preparations: weakref.WeakKeyDictionary[type, _Patch] = weakref.WeakKeyDictionary()


class _ForwardDone:
    """A forward hook that tells the cache which was used. Copied or pickled with its module, it is nothing."""

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        for value in (*kwargs.values(), *args):
            if isinstance(value, StepCache):
                value.forward_done()

    def __reduce__(self) -> Any:
        return getattr, (contextlib.nullcontext(), "__exit__")  # takes anything and does nothing


def _decoder(model: PreTrainedModel) -> torch.nn.Module:
    """The innermost module that is called in a forward and has all attention modules in it."""
    total = sum(hasattr(module, "layer_idx") for module in model.modules())
    module: torch.nn.Module = model
    while total:
        inside = [
            child
            for child in module.children()
            if not isinstance(child, torch.nn.ModuleList | torch.nn.ModuleDict | torch.nn.Sequential)
            and sum(hasattr(part, "layer_idx") for part in child.modules()) == total
        ]
        if not inside or hasattr(inside[0], "layer_idx"):
            break
        module = inside[0]
    return module


class _Attached:
    """One model that is attached: what was put on for it, and who needs it."""

    def __init__(self, model: PreTrainedModel):
        self.caches, self.explicit, self.open = 0, False, True
        patch = _preparations.setdefault(
            type(model), _Patch(type(model), "prepare_inputs_for_generation", _keeps_cache)
        )
        self._patches = [*_LOOK_UPS, *([patch] if hasattr(type(model), patch.name) else [])]
        for each in self._patches:
            each.acquire()
        self._hook = _decoder(model).register_forward_hook(_ForwardDone(), with_kwargs=True)
        self._at_end = weakref.finalize(model, self.close)
        self._at_end.atexit = False

    def close(self) -> None:
        with _lock:
            if not self.open:
                return
            self.open = False
            self._at_end.detach()
            self._hook.remove()
            for each in self._patches:
                each.release()


_attached: weakref.WeakKeyDictionary[PreTrainedModel, _Attached] = weakref.WeakKeyDictionary()


def _attach(model: PreTrainedModel) -> _Attached:
    found = _attached.get(model)
    if found is None or not found.open:
        found = _attached[model] = _Attached(model)
    return found


def _drop_unused(model: PreTrainedModel | None, attached: _Attached) -> None:
    if attached.caches == 0 and not attached.explicit:
        attached.close()
        if model is not None and _attached.get(model) is attached:
            del _attached[model]


class Hold:
    """Keeps `model`, which it does not keep alive, attached for as long as the holder lives, unless it is detached."""

    def __init__(self, model: PreTrainedModel):
        self._model = weakref.ref(model)
        with _lock:
            while True:
                self._attached = attached = _attach(model)
                attached.caches += 1
                if attached.open:
                    break
                attached.caches -= 1  # the last other holder was collected in between, and took it along

    def __del__(self) -> None:
        if _lock is None or not hasattr(self, "_attached"):  # the interpreter is going down, or it was never made
            return
        with _lock:
            self._attached.caches -= 1
            _drop_unused(self._model(), self._attached)

    @property
    def model(self) -> PreTrainedModel | None:
        """The model, or None if it is gone."""
        return self._model()

    @property
    def answers(self) -> bool:
        """Whether the model is attached now, by this or another holder."""
        return self._attached.open or (self.model is not None and is_attached(self.model))


class Attachment:
    """What `attach` returns: leaving it as a context manager takes back what that call did."""

    def __init__(self, model: PreTrainedModel, was_explicit: bool):
        self._model, self._was_explicit = model, was_explicit

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _lock:
            attached = _attached.get(self._model)
            if attached is not None and not self._was_explicit:
                attached.explicit = False
                _drop_unused(self._model, attached)


def is_attached(model: PreTrainedModel) -> bool:
    """Whether kara_hf caches are answered for `model`."""
    attached = _attached.get(model)
    return attached is not None and attached.open


def attach(model: Any) -> Attachment:
    """Lets caches of kara_hf answer the attention of `model`, which is unchanged wherever none is in use.

    Caches do it themselves for as long as they live; after this call it lasts until `detach`. Usable as
    ``with attach(model):``.

    Raises:
        TypeError: `model` is no Transformers model.
        ValueError: it is an encoder-decoder, or its code does not take its attention function from its config.
    """
    model = unwrap(model)
    check_supported(model)
    with _lock:
        attached = _attach(model)
        was_explicit, attached.explicit = attached.explicit, True
        if not attached.open:  # as in `Hold`
            attached = _attach(model)
            attached.explicit = True
    return Attachment(model, was_explicit)


def detach(model: Any) -> None:
    """Takes everything of kara_hf off `model`; its caches answer no more. Does nothing to a model without any."""
    model = unwrap(model)
    with _lock:
        attached = _attached.pop(model, None)
        if attached is not None:
            attached.close()
    installed = vars(model).get("forward")
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
