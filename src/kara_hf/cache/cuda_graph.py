"""The decode step as a CUDA graph, captured between compressions and replayed for as long as memory lies still.

A replay runs no Python: it reads and writes the same addresses as the step that was captured. What differs from step to
step is on the device (the inputs are copied there, the store counts its tokens there), and what the host counts is
counted afterwards. Where something is due, the step runs as without a graph; a step that finds its memory elsewhere is
captured anew.
"""

import copy
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.utils._pytree as pytree

from ..storage import Blocks, MemoryMeter, PagedStore
from .steps import Steps

WORTHWHILE = 4  # steps that a graph must serve to be captured at all


class Recording(Protocol):
    """A captured piece of work that can be done again."""

    def capture(self, work: Callable[[], Any]) -> Any:
        """Records the device work of `work` without doing it; returns what `work` returns."""

    def replay(self) -> None:
        """Does the work."""


class CudaRecording:
    """A `Recording` as a CUDA graph."""

    def __init__(self) -> None:
        self.graph = torch.cuda.CUDAGraph()

    def capture(self, work: Callable[[], Any]) -> Any:
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            return work()

    def replay(self) -> None:
        self.graph.replay()


def check_graph(model: torch.nn.Module, compressed: int, layers: int) -> None:
    """Raises ValueError if decode steps of `model` cannot be captured; `compressed` of its `layers` are ours."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise ValueError(f"cuda_graph=True needs the model on a CUDA device, not on {device}; move it, or leave it off")
    if compressed < layers:
        raise ValueError(
            f"cuda_graph=True is not possible with {type(model).__name__}: {layers - compressed} of its {layers} "
            "layers are not compressed, and Transformers' own caches for them move at every step; leave it off"
        )


class DecodeGraph:
    """Captures and replays the decode steps of one cache."""

    def __init__(self, steps: Steps):
        self.steps = steps
        self._recording: Recording | None = None
        self._inputs: dict[str, torch.Tensor] = {}
        self._output: Any = None
        self._key: Any = None  # what the recording was made for
        self._seen: Any = None  # what the last step that ran without it was made for
        self.replays = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "DecodeGraph":
        return DecodeGraph(copy.deepcopy(self.steps, memo))  # a recording belongs to its memory

    def step(self, forward: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """As ``forward(**kwargs)`` of the model, replayed where that is possible."""
        inputs = self._replayable(kwargs)
        if inputs is None:
            return forward(**kwargs)
        constants = {name: value for name, value in kwargs.items() if not isinstance(value, torch.Tensor)}
        shapes = {name: (value.shape, value.dtype) for name, value in inputs.items()}
        key = (shapes, constants, self.steps.addresses())
        if key != self._key:
            if key != self._seen or self.steps.compression.capturable_steps() < WORTHWHILE:
                output = forward(**kwargs)  # also compiles kernels, which a capture cannot
                self._seen = (shapes, constants, self.steps.addresses())
                return output
            self._capture(forward, kwargs, inputs)
            self._key = key
        else:
            for name, value in inputs.items():
                self._inputs[name].copy_(value)
            self.steps.count_step(inputs.get("real"))
        assert self._recording is not None
        self._recording.replay()
        self.replays += 1
        return pytree.tree_map_only(torch.Tensor, torch.clone, self._output)

    def _replayable(self, kwargs: dict[str, Any]) -> dict[str, torch.Tensor] | None:
        """What a step reads that the next one will not, or None if the step has to run as it is."""
        steps, state = self.steps, self.steps.state
        tokens, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        tensors = {name for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
        if tokens is None or tokens.shape[1] != 1 or tensors - {"input_ids", "attention_mask", "position_ids"}:
            return None
        if torch.is_grad_enabled() or not state.columns or len(tokens) != len(state.sequences):
            return None
        if steps.hiding or steps.compression.capturable_steps() < 1:
            return None
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.full_like(tokens, state.columns)
        inputs = {"input_ids": tokens, "position_ids": positions}
        if mask is not None:
            if mask.ndim != 2 or mask.shape[1] != state.columns + 1:
                return None
            inputs["real"] = mask[:, -1:].bool()
            steps.unread = mask.bool()
        return inputs

    def _capture(self, forward: Callable[..., Any], kwargs: dict[str, Any], inputs: dict[str, torch.Tensor]) -> None:
        """Records the step on inputs of its own. What the host counts is counted by it, as by any step."""
        steps = self.steps
        self._recording = self._key = self._output = None  # gives the memory of the old one back
        self._inputs = {name: value.clone() for name, value in inputs.items()}
        static = {name: value for name, value in self._inputs.items() if name != "real"}
        before = [(each, copy.copy(vars(each))) for each in _host_side(steps)]
        recording = recording_for(steps)
        steps.given_real = self._inputs.get("real")
        try:
            self._output = recording.capture(lambda: forward(**kwargs | static | {"attention_mask": None}))
        except Exception as error:
            for each, state in before:  # the device has done nothing
                vars(each).clear()
                vars(each).update(state)
            raise RuntimeError(
                f"the decode step of {steps.state.binding.name} cannot be captured in a CUDA graph ({error}); make the "
                "cache with cuda_graph=False"
            ) from error
        finally:
            steps.given_real = None
        self._recording = recording
        steps.note_padding(inputs.get("real"), steps.state.columns - 1)


def recording_for(steps: Steps) -> Recording:
    return CudaRecording()


def _host_side(steps: Steps) -> list[Any]:
    """Everything of a cache that a step changes on the host."""
    stores = [store for layer in steps.state.compressed_layers if isinstance(store := layer.paged(), PagedStore)]
    blocks: list[Blocks] = [blocks for store in stores for blocks in (store.keys, store.values)]
    near = [store.proximal for store in stores if store.proximal is not None]
    meter: MemoryMeter = steps.state.meter
    found: list[PagedStore | Blocks | Any] = [*stores, *blocks, *near, *steps.state.compressed_layers]
    return [steps, steps.state, meter, steps.compression, *found]
