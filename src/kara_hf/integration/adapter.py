"""The adapter that a model learned for a sharing map (PoD): on in forwards whose cache shares by it, off in others."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import find_adapter_config_file

from ..bundled import place_of
from ..needs import Package, check_needs, extra
from .attach import decoder_config
from .identity import fingerprint
from .shape import layer_kinds, model_shape

ADAPTER = "pod"  # as the model calls it


def has_adapter(place: str) -> bool:
    """Whether an adapter lies beside a sharing map, in a folder or a repository of a hub."""
    return find_adapter_config_file(_folder(place)) is not None


def load_adapter(model: PreTrainedModel, place: str, sharing: Any) -> bool:
    """Puts the adapter at `place` into `model`, if there is one; a model that has an adapter already is left as it is.

    From then on the model is what it was, but in a forward with a cache whose `sharing` equals this one.

    Args:
        model: a Transformers causal LM, whose weights the adapter was trained on.
        place: folder or a map in it, hub id, or the name of what comes with this package.
        sharing: the map there.

    Returns:
        Whether it was put in.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: the map is of another model.
    """
    if getattr(model, "peft_config", None) or not has_adapter(place):
        return False
    config = decoder_config(model)
    sharing.check(model_shape(config), layer_kinds(config))
    check_needs({"": [Package("peft", extra("train"))]})
    model.load_adapter(_folder(place), adapter_name=ADAPTER)
    model.base_model.register_forward_pre_hook(_Switch(model, sharing), with_kwargs=True)
    return True


def adapter_identity(model: Any) -> str | None:
    """What tells the adapter that `load_adapter` put in from others; None: there is none."""
    if ADAPTER not in (getattr(model, "peft_config", None) or {}):
        return None
    from peft import get_peft_model_state_dict

    return fingerprint(sorted(get_peft_model_state_dict(model, adapter_name=ADAPTER).items()))[:16]


def _folder(place: str) -> str:
    """Where an adapter is looked for: beside a map that is named itself."""
    path = Path(place)
    return str(path.parent) if path.is_file() else place_of(place)


class _Switch:
    """A forward hook that switches the adapter of a model."""

    def __init__(self, model: PreTrainedModel, sharing: Any):
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.sharing = sharing
        self.layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        self.on = True
        self.turn(False)

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caches = (value for value in (*kwargs.values(), *args) if isinstance(value, Cache))
        self.turn(any(getattr(cache, "sharing", None) == self.sharing for cache in caches))

    def turn(self, on: bool) -> None:
        if on == self.on:
            return
        for layer in self.layers:
            layer.enable_adapters(enabled=on)
        self.on = on
