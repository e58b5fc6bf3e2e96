"""One forward is one step: begun by its first keys, committed when the model's forward is done, or taken back.

For every layer `Turn.attend` prepares, attends and stores; all of what a forward does to a cache is on this page.
"""

import copy
from typing import Any

import numpy as np
import torch

from ..integration.attention import AttentionFunction, real_tokens
from ..kernels.precision import without_autocast
from ..storage import MemoryMeter, Saved, upload
from .compression import Compression, make_compression
from .layer import CompressedLayer
from .masks import StepMask, flattened, read_mask
from .sequence import Sequence
from .state import CacheState
from .step import Step


def syncs_are_free(device: torch.device) -> bool:
    """Whether reading a value back from the device waits for nothing."""
    return device.type == "cpu"


class Turn:
    """One layer's turn in a step: what a carried key leads attention to."""

    def __init__(self, steps: "Steps", layer: CompressedLayer, values: torch.Tensor):
        self.steps, self.layer, self.values = steps, layer, values

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
        """As `kara_hf.integration.attention.Answerer`."""
        steps, layer = self.steps, self.layer
        try:
            if not transformed and value is not self.values:
                raise ValueError(
                    f"{type(module).__name__} computes with its values after the cache returned them, in a way that is "
                    "not known to be safe when tokens are missing; this model is not supported"
                )
            step = steps.prepare(layer, module, query, attention_mask, transformed)
            if layer.index in step.stored:
                return layer.attend_again(step, own, module, query, key, value, attention_mask, **kwargs)
            result = layer.attend(step, own, module, query, key, value, attention_mask, **kwargs)
            with without_autocast(query.device):  # what is kept is chosen as exactly as it can be
                steps.compression.stored(layer, step, query.detach(), key.detach(), layer.present)
                steps.compression.layer_done(layer, step)
            return result
        except BaseException:
            steps.rollback()
            raise


class Steps:
    """The steps of one cache."""

    def __init__(self, state: CacheState, policy: Any):
        self.state, self.policy = state, policy
        self.compression: Compression = make_compression(policy, state)
        self.given_real: torch.Tensor | None = None  # what stands in for the mask while a step is captured, [B, 1]
        self.replaying = False  # whether tokens that come together are taken for decoded ones
        self.turn = False  # whether the tokens of the next step are a prompt or turn, whatever is recorded
        self.complete = False  # whether they are known to be all of it
        self._forget()

    def _forget(self) -> None:
        """As for a new cache."""
        self.step: Step | None = None
        self._solid_columns = 0  # how many of the newest columns are padding in no sequence
        self._lengths_are_bounds = False  # whether the host counts tokens that may turn out to be padding
        self._offset: torch.Tensor | None = None  # position less slot of the next token in head 0, [B, 1] int32
        self.hiding = False  # whether the newest mask hid tokens seen before
        self.unread: torch.Tensor | None = None  # the newest mask of a step that did not look, [B, C]

    # --------------------------------------------------------------------------------------------------------- a step
    def begin(self, layer_idx: int, keys: torch.Tensor) -> Step:
        """A layer of any kind is about to take `keys`; its forward is begun, or goes on.

        Raises:
            RuntimeError: the model's attention function is not ours, so what is stored would be lost on it.
            ValueError: the batch has another size than the cache, or there is no token.
        """
        if layer_idx >= len(self.state.layers):
            raise ValueError(
                f"{self.state.binding.name} runs a layer {layer_idx}, and its config promises "
                f"{len(self.state.layers)}; mend the config's num_hidden_layers, or use Transformers' own cache"
            )
        step, layer = self.step, self.state.layers[layer_idx]
        unanswered = step is not None and step.waiting
        if step is None or unanswered or layer_idx <= step.last_layer:
            self.settle()
            self._check(keys, unanswered)
            step = self.step = Step(new=keys.shape[2], first=self.state.columns == 0)
        step.last_layer, step.waiting = layer_idx, isinstance(layer, CompressedLayer)
        if not step.waiting and not step.first:
            step.before[layer_idx] = copy.copy(vars(layer))
        return step

    def prepare(
        self,
        layer: CompressedLayer,
        module: torch.nn.Module | None,
        query: torch.Tensor,
        attention_mask: Any,
        transformed: bool,
    ) -> Step:
        """Checks a layer's turn; in the first of a step also finds out what the step brings, and makes room for it in
        every layer before anything is stored.
        """
        step = self.step
        if step is None:
            raise ValueError(
                f"layer {layer.index} of {self.state.binding.name} attends with keys of an earlier forward"
            )
        self._check_module(layer, module, transformed)
        if not step.first and layer not in self.state.compressed_layers:
            raise ValueError(
                f"layer {layer.index} of {self.state.binding.name} runs for the first time, and knows nothing of the "
                f"{self.state.columns} tokens before; run the same layers in every step, or reset() the cache"
            )
        layer.latent = transformed
        if not step.prepared:
            self._prepare(step, query, attention_mask)
        return step

    def _prepare(self, step: Step, query: torch.Tensor, attention_mask: Any) -> None:
        state, batch, device = self.state, query.shape[0], query.device
        if step.first:
            state.sequences = [Sequence(pins=state.pins)] * batch
        step.recording = any(layer.record_past for layer in state.compressed_layers)
        step.replayed = self.replaying and not step.first
        step.drafts = step.recording and not self.turn and not step.replayed
        step.complete, self.complete = self.complete and not step.recording, False
        step.syncs = (
            step.first
            or step.new > 1
            or self.hiding
            or syncs_are_free(device)
            or self.compression.steps_to_compression() < 1
        )
        if step.syncs:
            self.make_exact()
        mask = self._read(attention_mask, step, batch)
        step.real, step.visibility = mask.real, mask.visibility
        step.counts = np.full(batch, step.new)
        if step.real is not None and step.syncs:
            step.counts = step.real.sum(1).cpu().numpy()
        if step.first and not step.counts.all():
            row = int(np.flatnonzero(step.counts == 0)[0])
            raise ValueError(f"sequence {row} of the batch is nothing but padding; leave it out or give it a token")
        if step.recording and not step.first:
            for layer in state.compressed_layers:
                layer.prepare_to_take_back(step.new)
        self.compression.begin(step)
        step.metric_power, step.new_store = self.compression.metric_power(step), self.compression.new_store
        step.rows_of = lambda index: state.layers[index].paged().rows()
        step.positions = self._positions(step, device)
        step.prepared = True

    def forward_done(self) -> None:
        """The model's forward is done: commits its step, whichever layers ran.

        Raises:
            RuntimeError: keys were handed out and no attention of ours took them up.
            ValueError: a layer that holds earlier tokens did not run. What the step stored is taken back.
        """
        step = self.step
        if step is None:
            return
        try:
            if step.waiting:
                raise self.state.binding.unanswered()
            missing = [layer.index for layer in self.state.compressed_layers if layer.index not in step.stored]
            if missing and not step.first:
                raise ValueError(
                    f"layers {missing} of {self.state.binding.name} did not run in this step but hold earlier tokens; "
                    "run the same layers in every step, or reset() the cache"
                )
            self._commit(step)
        except BaseException:
            self.rollback()
            raise

    def _commit(self, step: Step) -> None:
        state = self.state
        if step.first:
            state.compressed_layers = [layer for layer in state.compressed_layers if layer.index in step.stored]
        if step.prepared:
            with without_autocast(step.positions.device):
                state.sequences = self.compression.done(step)
            for layer in state.compressed_layers:
                layer.discard_step()
                layer.commit()
        if self.given_real is None:
            self.note_padding(step.real, state.columns)
        state.count_columns(state.columns + step.new)
        padded = step.syncs and step.real is not None
        self._solid_columns = 0 if padded else self._solid_columns + step.new
        if step.syncs:
            self._offset = None
            self.hiding = step.visibility is not None
        elif step.real is not None:
            self._lengths_are_bounds = True
        self.step = None

    def settle(self) -> None:
        """Ends a step that nobody has said the end of: it is committed if every layer is done, and else taken back."""
        step = self.step
        if step is None:
            return
        if (
            step.stored
            and not step.waiting
            and all(layer.index in step.stored for layer in self.state.compressed_layers)
        ):
            self.forward_done()
        else:
            self.rollback()

    def rollback(self) -> None:
        """Undoes a step that was not completed: a first one by emptying the cache, a later one layer by layer."""
        step, self.step = self.step, None
        for layer in self.state.all_compressed_layers:
            layer.discard_step()
        if step is None:
            return
        if step.first:
            self.reset()
            return
        counts = step.real_counts() if step.stored else step.counts
        for layer in self.state.compressed_layers:
            if layer.index in step.stored:
                layer.paged().rollback(counts)
        for index, before in step.before.items():
            vars(self.state.layers[index]).clear()
            vars(self.state.layers[index]).update(before)

    def reset(self) -> None:
        """Empties the cache and gives its memory back."""
        state = self.state
        state.meter = MemoryMeter(state.meter.max_bytes)
        self.compression = make_compression(self.policy, state)
        for index, own in enumerate(state.binding.layers()):
            layer = state.layers[index]
            if isinstance(layer, CompressedLayer):
                layer.empty(self.compression.layer_state())
            else:
                state.layers[index] = own
        state.compressed_layers, state.sequences, state.padding = state.all_compressed_layers, [], None
        state.count_columns(0)
        self._forget()

    def saved(self) -> Saved:
        """What is known between steps beside `CacheState`, once `sync` was called; see `kara_hf.storage.saved`."""
        return {"solid_columns": self._solid_columns, "hiding": self.hiding, "turn": self.turn}

    def restore(self, saved: Saved) -> None:
        """Takes back, when it is new, what `saved` gave."""
        self._solid_columns, self.hiding, self.turn = int(saved["solid_columns"]), saved["hiding"], saved["turn"]

    # --------------------------------------------------------------------------------------------- what is to be known
    def _check(self, keys: torch.Tensor, unanswered: bool) -> None:
        """Raises if this cache cannot take `keys`; nothing has changed then."""
        state = self.state
        if unanswered or not state.binding.answers:
            raise state.binding.unanswered()
        if state.sequences and keys.shape[0] != len(state.sequences):
            raise ValueError(
                f"the batch has {keys.shape[0]} sequences and the cache holds {len(state.sequences)}; use a new cache "
                "or reset() for a new batch, batch_repeat_interleave() or batch_select_indices() to change this one"
            )
        if keys.shape[2] == 0:
            raise ValueError("the prompt is empty (0 new tokens); pass at least one token")
        if keys.shape[2] > 1:
            state.binding.check_not_compiled()

    def _check_module(self, layer: CompressedLayer, module: torch.nn.Module | None, transformed: bool) -> None:
        binding = self.state.binding
        if module is None and not binding.direct:
            raise binding.unanswered()
        if module not in binding:
            raise ValueError(
                f"this cache was made for another model than the {type(module).__name__} that uses it; make one with "
                "KaraCache(model) for each model"
            )
        if transformed and not hasattr(module, "kv_lora_rank"):
            raise ValueError(
                f"{type(module).__name__} computes with its keys after the cache returned them, in a way that is not "
                "known to be safe when tokens are missing; this model is not supported"
            )

    def _read(self, attention_mask: Any, step: Step, batch: int) -> StepMask:
        """What the mask says. In a step that does not sync, it is kept until the next that does."""
        if self.given_real is not None:
            return StepMask(self.given_real)
        if step.first:
            return StepMask(real_tokens(attention_mask, step.new))
        state = self.state
        attention_mask = flattened(attention_mask)
        if not step.syncs and getattr(attention_mask, "ndim", 2) == 2:
            self.unread = attention_mask
            return StepMask(None if attention_mask is None else attention_mask[:, state.columns :])
        return read_mask(attention_mask, batch, state.columns, step.new, state.padding, state.binding.name)

    def _positions(self, step: Step, device: torch.device) -> torch.Tensor:
        """True positions of a step's columns, ``[B, S]`` int32; those of padding are anything."""
        sequences = self.state.sequences
        if step.syncs:
            first = upload(np.array([[sequence.tokens] for sequence in sequences], np.int32), device)
        else:  # the device knows what is stored, and how far that is behind what was seen has not changed
            store = self.state.compressed_layers[0].paged()
            if self._offset is None:
                tokens = np.array([[sequence.tokens] for sequence in sequences], np.int32)
                self._offset = upload(tokens - store.newest_lengths[:, :1], device)
            first = store.rows().lengths[:, :1] + self._offset
        if step.real is not None:
            return first + (step.real.to(device).cumsum(1, dtype=torch.int32) - 1).clamp(min=0)
        return first + torch.arange(step.new, dtype=torch.int32, device=device) if step.new > 1 else first

    def note_padding(self, real: torch.Tensor | None, seen: int) -> None:
        """Remembers which columns behind the first `seen` hold tokens, ``[B, n]`` bool; None: all."""
        if real is None:
            return
        before = real[:, :0] if self.state.padding is None else self.state.padding
        between = real.new_ones(len(real), seen - before.shape[1])
        self.state.hold_padding(torch.cat([before.to(real.device), between, real], 1))
        for layer in self.state.compressed_layers:
            layer.padded = True

    # ------------------------------------------------------------------------------------------ between steps, outside
    def sync(self) -> None:
        """Waits for the device where the host does not know how much is stored. Reading and rearranging do it."""
        self.settle()
        self.make_exact()

    def make_exact(self) -> None:
        """Finds out which tokens that were taken for real turned out to be padding, and what masks said since."""
        state, mask, self.unread = self.state, self.unread, None
        if self._lengths_are_bounds:
            padding, *_ = (layer.stored().sync_lengths() for layer in state.compressed_layers)
            if padding.any():
                state.sequences = [s.without(int(n)) for s, n in zip(state.sequences, padding, strict=True)]
                self._solid_columns = 0
            self._lengths_are_bounds, self._offset = False, None
        if mask is not None:
            seen = mask.shape[1] - 1
            before = None if state.padding is None else state.padding[:, :seen]
            if read_mask(mask, len(mask), seen, 1, before, state.binding.name).visibility is not None:
                raise ValueError(
                    "the attention mask of decode steps on this device hides tokens seen before, which was not looked "
                    "at when they ran; begin a turn of several tokens with such a mask, or reset() the cache"
                )

    def rearranged(self) -> None:
        """The sequences are others now."""
        self._offset = None

    def check_crop(self, count: int) -> None:
        """Raises ValueError if the newest `count` columns are not a token of every sequence."""
        if count > self._solid_columns:
            raise ValueError(
                f"crop({-count}) would reach back past the last {self._solid_columns} columns, where sequences of "
                "this batch have padding; crop fewer tokens or reset() the cache"
            )

    def cropped(self, count: int, sequences: list[Sequence]) -> None:
        """The newest `count` columns are gone, and `sequences` are left."""
        state = self.state
        self._offset, state.sequences = None, sequences
        state.count_columns(state.columns - count)
        self._solid_columns -= count
        if state.padding is not None:
            state.hold_padding(state.padding[:, : state.columns].clone())

    # ------------------------------------------------------------------------------------------------- replayed steps
    def count_step(self, real: torch.Tensor | None) -> None:
        """The host's part of a decode step that was replayed: one token more everywhere, or as `real` says."""
        state = self.state
        for layer in state.compressed_layers:
            layer.paged().count(1)
        state.sequences = [self.compression.decoded(sequence) for sequence in state.sequences]
        self.note_padding(real, state.columns)
        state.count_columns(state.columns + 1)
        self._solid_columns += 1
        self._lengths_are_bounds |= real is not None

    def addresses(self) -> tuple[Any, ...]:
        """Where the memory of a decode step lies, and what of it was decided on the host."""
        found = [tensor for tensor in (self._offset, *self.compression.constants()) if tensor is not None]
        for layer in self.state.compressed_layers:
            found += [*layer.paged().tensors(), *layer.state.tensors()]
        return tuple((tensor.data_ptr(), tensor.shape) for tensor in found)
