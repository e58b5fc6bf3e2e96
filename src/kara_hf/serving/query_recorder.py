"""Lets an engine see the queries of its model's layers, by standing for the attention functions they look up."""

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple, Self
from weakref import WeakKeyDictionary, WeakMethod

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..integration.attach import decoder_config
from .seams import PAGED, check_internals


class Logits(NamedTuple):
    """How a layer makes logits: what scales them, what caps them softly, and its sinks' own ``[Hq]``."""

    scaling: float
    softcap: float | None = None
    sink_logits: torch.Tensor | None = None


Record = Callable[[int, torch.Tensor, Logits], None]  # called with the layer and its queries ``[1, Hq, T, D]``

_listeners: WeakKeyDictionary[torch.nn.Module, WeakMethod[Record]] = WeakKeyDictionary()


class QueryRecorder:
    """What one session listens to; leaving it as a context manager leaves no trace.

    Listeners are held weakly. An attention function is replaced in the registries in which the model's layers look it
    up, for as long as some session listens to a model that uses it; it answers as before for everybody.
    """

    def __init__(self) -> None:
        self._heard: list[WeakMethod[Record]] = []
        self._observed: list[_Observed] = []

    def listen(self, model: PreTrainedModel, layers: list[int], record: Record) -> None:
        """Has `record`, a method, called with the queries of `layers` in every step of an engine.

        Raises:
            ImportError: the registry of attention functions is not as we know it.
        """
        heard = WeakMethod(record)
        modules = [module for module in model.modules() if getattr(module, "layer_idx", None) in layers]
        for interface in _interfaces(modules):
            observed = _Observed.of(interface, decoder_config(model)._attn_implementation)
            if observed in self._observed:
                observed.release()
            else:
                self._observed.append(observed)
        self._heard.append(heard)
        for module in modules:
            _listeners[module] = heard

    def close(self) -> None:
        """Puts back all that was replaced."""
        for module, heard in list(_listeners.items()):
            if any(heard is ours for ours in self._heard):
                del _listeners[module]
        while self._observed:
            self._observed.pop().release()
        self._heard.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Observed:
    """Stands for an attention function of Transformers and tells the listener of a module what the module asks."""

    installed: list["_Observed"] = []

    def __init__(self, interface: AttentionInterface, name: str):
        self.interface, self.users = interface, 0
        known = {**interface._global_mapping, **interface._local_mapping}
        self.name = name if name in known else name.removeprefix(PAGED)
        self.own: Callable[..., Any] | None = known.get(self.name)  # None for "eager", which stands beside each model
        self.was_local = self.name in interface._local_mapping

    @classmethod
    def of(cls, interface: AttentionInterface, name: str) -> "_Observed":
        """The one that stands for `name`, with one more user."""
        names = {name, name.removeprefix(PAGED)}
        found = next((each for each in cls.installed if each.interface is interface and each.name in names), None)
        if found is None:
            check_internals({"attention": interface})
            found = cls(interface, name)
            cls.installed.append(found)
            interface[found.name] = found
        found.users += 1
        return found

    def release(self) -> None:
        """One user less; without any the registry is as it was."""
        self.users -= 1
        if self.users:
            return
        self.installed.remove(self)
        if self.was_local:
            self.interface[self.name] = self.own
        else:
            del self.interface[self.name]

    def __call__(self, module: torch.nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        _tell(module, query, kwargs)
        own = self.own or _beside(module, "eager_attention_forward")
        return own(module, query, *args, **kwargs)


@torch.compiler.disable
def _tell(module: torch.nn.Module, query: torch.Tensor, kwargs: dict[str, Any]) -> None:
    if "write_index" not in kwargs:  # no step of an engine but a forward beside it
        return
    heard = _listeners.get(module)
    record = None if heard is None else heard()
    if record is not None:
        layer: Any = module.layer_idx
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        record(layer, query, Logits(scaling, kwargs.get("softcap"), kwargs.get("s_aux")))


def _beside(module: torch.nn.Module, name: str) -> Any:
    """What stands under a name in the file of a module's class, or of a class it is made from; None without it."""
    files = (sys.modules[cls.__module__] for cls in type(module).__mro__ if cls.__module__ in sys.modules)
    return next((vars(file)[name] for file in files if name in vars(file)), None)


def _interfaces(modules: list[torch.nn.Module]) -> list[AttentionInterface]:
    """The registries in which modules look attention functions up, each once."""
    found = [_beside(module, "ALL_ATTENTION_FUNCTIONS") or ALL_ATTENTION_FUNCTIONS for module in modules]
    return list({id(interface): interface for interface in found}.values())
