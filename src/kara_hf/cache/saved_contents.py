"""What of a cache is saved, and how a new one takes it back: policy, model, and all that its parts hold."""

from dataclasses import asdict
from typing import Any

import torch
import torch.utils._pytree as pytree
from transformers import PreTrainedModel

from ..config import KaraConfig, KVCompressConfig, as_pins
from ..integration.attach import decoder_config
from ..integration.identity import forward_identity, weights_fingerprint
from ..integration.shape import model_shape
from ..policy import KaraPolicy, KVCompressPolicy
from ..storage import Prompt, Saved
from .layer import CompressedLayer
from .saved_file import DEVICE
from .sequence import Segment, Sequence
from .steps import Steps


# ----------------------------------------------------------------------------------------------------------- the policy
def saved_policy(policy: Any) -> Saved:
    """A policy as plain values. Raises TypeError if it is more than its settings."""
    if type(policy) not in (KaraPolicy, KVCompressPolicy):
        raise TypeError(
            f"a cache under a {type(policy).__name__} cannot be saved: it decides by objects of this process; use "
            "copy.deepcopy(cache) here"
        )
    return {"kind": type(policy).__name__, "config": asdict(policy.config)}


def restored_policy(saved: Saved) -> KaraPolicy | KVCompressPolicy:
    """The policy again. Raises ValueError if it decides by a score that is registered nowhere in this process."""
    if saved["kind"] == KVCompressPolicy.__name__:
        return KVCompressPolicy(KVCompressConfig(**saved["config"]))
    return KaraPolicy(KaraConfig(**saved["config"]))


# ------------------------------------------------------------------------------------------------------------ the model
def saved_model(model: PreTrainedModel) -> Saved:
    """What a model must have in common with the one that a cache was saved with."""
    return {
        "class": type(model).__name__,
        **model_shape(decoder_config(model)),
        **forward_identity(model),
        "weights": weights_fingerprint(model),
    }


def check_model(saved: Saved, model: PreTrainedModel) -> None:
    """Raises ValueError, naming the differences, if a cache was saved with another model."""
    here = saved_model(model)
    wrong = [f"{name} {saved.get(name)} instead of {here[name]}" for name in here if saved.get(name) != here[name]]
    if wrong:
        raise ValueError(
            f"this cache was saved with another model than this {here['class']}: {'; '.join(wrong)}; load it with the "
            "model that made it"
        )


# -------------------------------------------------------------------------------------------------------- what it holds
def saved_contents(steps: Steps) -> Saved:
    """All that a cache holds between steps, on which `sync` was called. Raises TypeError if something is not plain."""
    state = steps.state
    return {
        "columns": state.columns,
        "pins": state.pins,
        "sequences": [asdict(sequence) for sequence in state.sequences],
        "padding": state.padding,
        "steps": steps.saved(),
        "compression": steps.compression.saved(),
        "layers": [_saved_layer(layer) for layer in state.layers],
    }


def restore_contents(steps: Steps, saved: Saved) -> None:
    """Takes back, into a new cache, what `saved_contents` gave. Raises ValueError and `PoolExhausted`."""
    state, devices = steps.state, steps.state.binding.devices
    default = next(iter(devices.values()), torch.device("cpu"))
    state.pins = as_pins(saved.get("pins", ()))  # which files had not at first, and sequences neither
    state.sequences = [_sequence(**held) for held in saved["sequences"]]
    for index, (layer, held) in enumerate(zip(state.layers, saved["layers"], strict=True)):
        _restore_layer(steps, layer, held, devices.get(index, default))
    if state.sequences:
        state.compressed_layers = [layer for layer in state.all_compressed_layers if layer.store is not None]
    held_by = {layer.index: 0 if layer.store is None else len(layer.store.lengths) for layer in state.compressed_layers}
    if set(held_by.values()) != {len(state.sequences)}:
        raise ValueError(f"the cache has {len(state.sequences)} sequences, and its layers hold {held_by}")
    if saved["padding"] is not None:
        state.hold_padding(saved["padding"].to(state.compressed_layers[0].stored().device))
    steps.compression.restore(saved["compression"])
    steps.restore(saved["steps"])
    state.count_columns(int(saved["columns"]))


def _saved_layer(layer: Any) -> Saved:
    if not isinstance(layer, CompressedLayer):
        return {"kind": type(layer).__name__, "values": vars(layer)}
    values = {name: getattr(layer, name) for name in layer.saved_names}
    store: Saved | None = None
    if isinstance(layer.store, Prompt):
        store = {"prompt": layer.store.saved()}
    elif layer.store is not None:
        shape, sizes, dtypes = layer.store.lengths.shape, layer.store.sizes, layer.store.rows().dtypes
        like = [torch.zeros(*shape, 0, size, dtype=dtype) for size, dtype in zip(sizes, dtypes, strict=True)]
        store = {"like": like, "blocks": layer.store.saved()}
    return {"kind": type(layer).__name__, "values": values, "store": store, "state": layer.state.saved()}


def _restore_layer(steps: Steps, layer: Any, saved: Saved, device: torch.device) -> None:
    if saved["kind"] != type(layer).__name__:
        raise ValueError(f"a {type(layer).__name__} cannot take what a {saved['kind']} held")
    values = pytree.tree_map_only(torch.Tensor, lambda part: part.to(device, copy=True), saved["values"])
    values = pytree.tree_map_only(torch.device, lambda part: device if part == DEVICE else part, values)
    ours = isinstance(layer, CompressedLayer)
    wrong = [name for name in values if (name not in layer.saved_names if ours else hasattr(type(layer), name))]
    if wrong:
        raise ValueError(f"a {type(layer).__name__} holds no {wrong}")
    for name, value in values.items():
        setattr(layer, name, value)
    if not ours:
        return
    held, meter = saved["store"], steps.state.meter
    if held is not None and "prompt" in held:
        layer.store = Prompt(meter)
        layer.store.restore(held["prompt"], device)
    elif held is not None:
        layer.store = steps.compression.empty_store(layer, *(part.to(device) for part in held["like"]))
        layer.store.restore(held["blocks"])
    layer.state.restore(saved["state"], device, meter)


def _sequence(tokens: int, open: int, segments: list[Saved], voters: list[list[int]], pins: Any = ()) -> Sequence:
    settled = (Segment(s["kind"], int(s["start"]), int(s["stop"]), int(s["slots"])) for s in segments)
    stretches = tuple((int(start), int(stop)) for start, stop in voters)
    return Sequence(int(tokens), int(open), tuple(settled), stretches, as_pins(pins))
