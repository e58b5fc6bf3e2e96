"""`CompressedCache`: a Transformers `Cache` whose full-attention layers live in paged stores under a policy's rule.

What a forward does to it is in `steps`; here is what callers do: read it, rearrange it, cut it back, empty it.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
import torch
from transformers.cache_utils import Cache

from ..integration.attach import StepCache, check_not_compiled, refuse_tracing, route, unwrap
from ..integration.attention import CarriedKey
from ..integration.generation import read_prompt
from ..policy import KaraPolicy, KVCompressPolicy
from ..policy.sharing import PoDSharing
from ..storage import MemoryMeter, Prompt, Stored
from .bound_model import BoundModel, check_max_bytes
from .budget_compression import BudgetCompression
from .compression import Compression, register_compression
from .cuda_graph import DecodeGraph, check_graph
from .layer import COPIED_WITH_ITS_CACHE, CompressedLayer, HybridLayer
from .pinning import pin
from .report import CacheReport, make_report
from .saving import SavableCache
from .sequence import Kind, Sequence, with_pins
from .shared_layer import SharedLayer
from .state import CacheState
from .steps import Steps, Turn
from .window_compression import WindowCompression

register_compression(KaraPolicy, WindowCompression)
register_compression(KVCompressPolicy, BudgetCompression)


class CompressedCache(SavableCache, Cache, StepCache):
    """A cache whose full-attention layers keep what `policy` decides; the other layers are Transformers' own.

    `get_seq_length()` is the number of tokens seen, so positions and masks are those of the full cache; `report()` says
    how many are kept. What is stored is detached: no gradient flows into the past. The model's attention answers for it
    as long as it lives (see `kara_hf.attach`); needs no other call.

    Args:
        model: a Transformers causal LM, which may be wrapped by PEFT.
        policy: which tokens survive.
        sharing: which layers attend to distant tokens by another layer's keys (PoD); None: none. Which tokens survive
            is then decided once for every group of layers, at its lead.
        max_bytes: cap on `report().resident_bytes`; a step that would pass it raises `PoolExhausted` and is undone.
        cuda_graph: captures the decode step in a CUDA graph and replays it between compressions. Room for all tokens
            until the next compression is then reserved at once. Puts a `Route` in front of the model's forward, which
            `detach` removes. Only for models on a CUDA device whose layers are all compressed.

    Raises:
        TypeError: `model` is no Transformers model.
        ValueError: the model or a setting is not supported; the message says why.
    """

    def __init__(
        self,
        model: Any,
        *,
        policy: KaraPolicy | KVCompressPolicy,
        sharing: PoDSharing | None = None,
        max_bytes: int | None = None,
        cuda_graph: bool = False,
    ):
        inner = unwrap(model)
        check_not_compiled(inner)
        binding = BoundModel(inner)
        binding.layers()  # says if there is nothing to compress
        if sharing is not None:
            binding.check_sharing(sharing)
        check_max_bytes(max_bytes, inner, policy.config.block_size)
        self.policy = policy
        self.state = CacheState(binding, MemoryMeter(max_bytes), sharing, cuda_graph, pins=policy.config.pin)
        self.steps = Steps(self.state, policy)
        super().__init__(layers=self._make_layers())
        self.state.layers = self.layers
        self.state.compressed_layers = self.state.all_compressed_layers
        shared = self.binding.shares_masks()
        for layer in self.compressed_layers:
            layer.mask_is_shared = shared
        self._announced = False  # whether assisted decoding has said that its tokens may be taken back
        if cuda_graph:
            check_graph(inner, len(self.compressed_layers), len(self.layers))
        self.graph = DecodeGraph(self.steps) if cuda_graph else None
        if cuda_graph:
            route(inner)

    @classmethod
    def made(cls, model: Any, **settings: Any) -> Self:
        """One of this class, whatever its own arguments are."""
        cache = cls.__new__(cls)
        CompressedCache.__init__(cache, model, **settings)
        return cache

    # ------------------------------------------------------------------------------------------------------- observing
    @property
    def binding(self) -> BoundModel:
        """The model."""
        return self.state.binding

    @property
    def sharing(self) -> PoDSharing | None:
        """Which layers share keys."""
        return self.state.sharing

    @property
    def compression(self) -> Compression:
        """What the policy does in a step."""
        return self.steps.compression

    @property
    def meter(self) -> MemoryMeter:
        """Counts every byte."""
        return self.state.meter

    @property
    def compressed_layers(self) -> list[CompressedLayer]:
        """The compressed layers, in order."""
        return self.state.compressed_layers

    @property
    def takes_readings(self) -> bool:
        """As `kara_hf.integration.attach.StepCache`; not where layers that share keys compute a prompt with them, nor
        where it comes in chunks.
        """
        return self.prefill_chunk is None and (self.sharing is None or self.sharing.prefill != "pod")

    @property
    def prefill_chunk(self) -> int | None:
        """As `kara_hf.integration.attach.StepCache`, and of `read`."""
        return self.policy.config.prefill_chunk

    def layer(self, index: int) -> CompressedLayer:
        """The compressed layer that is layer `index` of the model. Raises IndexError if that is of another kind."""
        layer = self.layers[index]
        if not isinstance(layer, CompressedLayer):
            raise IndexError(f"layer {index} is not compressed; it is a {type(layer).__name__} of Transformers'")
        return layer

    @property
    def sequences(self) -> list[Sequence]:
        """What is known of each sequence."""
        return self.state.sequences

    @property
    def columns(self) -> int:
        """Tokens seen, padding included."""
        return self.state.columns

    @property
    def batch_size(self) -> int:
        """Sequences in the cache, or -1 while it is empty."""
        return len(self.sequences) or -1

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` takes off the newest tokens, as assisted decoding asks; never any of what was compressed. Only
        recurrent states of Transformers' own layers stand against it.
        """
        return all(getattr(layer, "is_croppable", True) for layer in self.layers)

    def report(self) -> CacheReport:
        """Tokens and bytes held now; see `CacheReport`."""
        self.steps.sync()
        return make_report(self.state)

    def kept_positions(self, layer_idx: int, sequence: int = 0, head: int = 0) -> torch.Tensor:
        """True positions of the tokens that one head of one layer stores, ``[T]`` int64, ascending.

        Positions count the sequence's own tokens from 0, padding left out.

        Raises:
            IndexError: there is no such layer, sequence or head, or the layer is not compressed.
        """
        store = self._row(layer_idx, sequence, head)
        return store.read(sequence, head)[2].sort().values.cpu()

    def chunks(self, layer_idx: int, sequence: int = 0, head: int = 0) -> list[tuple[int, int, Kind]]:
        """The kept positions as runs ``(start, end, kind)``, `end` exclusive, in order.

        Kinds: "pinned" (by `pin`), "prompt" (kept whole), "sealed" (a chunk that survived its window), "open" (waiting
        to be sealed) and "recent" (the newest tokens, always whole). Raises as `kept_positions`.
        """
        positions = self.kept_positions(layer_idx, sequence, head).numpy()
        runs: list[tuple[int, int, Kind]] = []
        begin = 0
        known = self.sequences[sequence]
        for stop, kind in with_pins(self.compression.limits(known), known.pins):
            end = int(np.searchsorted(positions, stop))
            part = positions[begin:end]
            for run in np.split(part, np.flatnonzero(np.diff(part) != 1) + 1) if len(part) else ():
                runs.append((int(run[0]), int(run[-1]) + 1, kind))
            begin = end
        return runs

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, padding columns included: what positions and masks of the next step count from."""
        if self.steps.step is not None and layer_idx <= self.steps.step.last_layer:
            self.steps.settle()  # asked before a forward, when nobody has said that the last one is done
        return self.state.columns

    @torch.no_grad()
    def read(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, complete: bool = False
    ) -> torch.Tensor:
        """Has the model read a prompt or turn without generating, in chunks where `prefill_chunk` says so.

        Args:
            input_ids: ``[B, S]`` int64, the new tokens.
            attention_mask: ``[B, seen + S]`` int64; None: nothing is padding.
            complete: that no more of it comes, as `generate` says of its own: what follows is decoded, and
                `KVCompressCache` cuts each layer when it is read, where it can. Otherwise it waits for what follows.

        Returns:
            Logits behind the last token, ``[B, V]``.
        """
        self.steps.complete = complete and self.prefill_chunk is None
        try:
            return read_prompt(self.binding.model, self, input_ids, attention_mask)
        finally:
            self.steps.complete = False

    # --------------------------------------------------------------------------------------------- replaying into it
    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Within it, tokens behind the prompt that come in one forward are taken for decoded ones, not for a turn.

        As long as a forward brings no more than `replayable` of them, what is kept is what decoding them one by one
        keeps: nothing would be compressed in between.
        """
        before, self.steps.replaying = self.steps.replaying, True
        try:
            yield
        finally:
            self.steps.replaying = before

    @property
    def replayable(self) -> int:
        """Tokens that the next forward within `replaying` may bring, from 1 on. The prompt itself comes before."""
        self.steps.sync()
        return self.compression.replayable_steps() if self.columns else 1

    # -------------------------------------------------------------------------------------------------- rearranging it
    def pin(self, start: int, end: int, sequence: int | None = None) -> None:
        """Keeps the tokens at the true positions from `start` to `end`, `end` exclusive, for good.

        They need not have been seen yet. Forks, turns and files take it along. Made before there is a sequence, it
        holds for all of the next batch, up to `reset`.

        Args:
            sequence: which one of the batch; None: all of them.

        Raises:
            IndexError: there is no such sequence.
            ValueError: these are no positions, some of them were evicted already, or the budget cannot hold them; the
                message names them. Nothing has changed then.
        """
        self.steps.sync()
        pin(self.state, self.policy, start, end, sequence)

    def compress(self) -> None:
        """Compresses now what would be compressed when the next token is decoded.

        For a prompt that is followed by a question rather than by its answer, with `KVCompressCache`. Where nothing
        waits for that, as always with `KaraCache`, nothing happens.
        """
        self.steps.sync()
        if self.columns and self.compression.steps_to_compression() < 1:
            self.compression.compress()

    def reset(self) -> None:
        """Empties the cache and gives its memory back; it can then start over with any batch."""
        self.steps.reset()
        self.state.pins = self.policy.config.pin
        self._announced = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Makes sequence i the same as sequence ``beam_idx[i]`` was, by reference to its blocks."""
        self._arrange(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence `repeats` times, by reference to its blocks."""
        self._arrange(torch.arange(len(self.sequences)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the sequences at `indices` ``[n]`` int64 or ``[B]`` bool, in that order; the memory of the others is
        given back.
        """
        self._arrange(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def _arrange(self, index: torch.Tensor) -> None:
        """Makes sequence i what ``index[i]`` was, once it is known that all layers can. Raises `PoolExhausted`."""
        self.steps.sync()
        array = index.cpu().numpy()
        self.meter.require(sum(layer.fork_bytes(array) for layer in self.compressed_layers))
        for layer in self.layers:
            layer.reorder_cache(index)
        self.state.arrange([int(b) for b in array])
        self.steps.rearranged()

    def activate_past_recording(self) -> None:
        """Called by assisted decoding: until that call of `generate` is over, `crop` may take short steps back."""
        super().activate_past_recording()
        self._announced = True

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest ``-tokens_to_remove`` tokens of every sequence (a count below or equal to 0, as in
        Transformers).

        Raises:
            ValueError: some of them are sealed already: what was evicted around them cannot be brought back. Nothing is
                removed then.
        """
        self.steps.sync()
        count = -int(tokens_to_remove)
        if count < 0:
            raise ValueError(
                f"crop({-count}) is not possible: pass the number of tokens to remove as a negative number"
            )
        self.steps.check_crop(count)
        after = []
        for number, sequence in enumerate(self.sequences):
            cropped = sequence.cropped(count)
            if cropped is None or self.compression.splits(number, cropped):
                raise ValueError(self.compression.uncroppable(number, sequence, count))
            after.append(cropped)
        if count < self.columns:
            self._check_shared_keys(count)
        for layer in self.layers:
            if not isinstance(layer, CompressedLayer):
                layer.crop(-count)
        if count == 0:
            return
        if count == self.columns:
            self.reset()
            return
        for layer in self.compressed_layers:
            layer.crop(-count)
        self.steps.cropped(count, after)

    def _check_shared_keys(self, count: int) -> None:
        """Raises ValueError if the keys of followers do not reach back behind the newest `count` tokens."""
        for layer in self.compressed_layers:
            if isinstance(layer, SharedLayer) and not layer.can_crop(np.full(len(self.sequences), count)):
                raise ValueError(
                    f"crop({-count}) would reach behind the newest keys that layer {layer.index} has of its own: those "
                    "of tokens that became distant are gone. Crop fewer tokens, or reset() the cache"
                )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        self.steps.sync()
        made = memo[id(self)] = type(self).__new__(type(self))
        memo[COPIED_WITH_ITS_CACHE] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    # --------------------------------------------------------------------------------------------------- one step of it
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by attention modules. Keys ``[B, H, S, Dk]``, values ``[B, H, S, Dv]``.

        Raises:
            RuntimeError: the model's attention function is not ours, so what is stored would be lost on it.
            ValueError: the batch has another size than the cache, there is no token, or the model is compiled.
        """
        if torch.compiler.is_compiling():
            refuse_tracing(self.binding.name)
        self.steps.begin(layer_idx, key_states)
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        if not isinstance(layer, CompressedLayer):
            return keys, values
        return CarriedKey.of(keys, Turn(self.steps, layer, values)), values

    def forward_done(self) -> None:
        """Called by the model when its forward is done."""
        self.steps.forward_done()

    def inputs_prepared(self, first: bool, complete: bool) -> None:
        """Called by `generate` before every forward; `first`: of a prompt or turn; `complete`: and of all of it."""
        self.steps.turn, self.steps.complete = first, complete
        if first:
            if not self._announced:  # what an earlier call has switched on ended with it
                for layer in self.layers:
                    if getattr(layer, "record_past", False):
                        layer.record_past = False
            self._announced = False

    # ------------------------------------------------------------------------------------------------------ setting up
    def _make_layers(self) -> list[Any]:
        """Transformers' own layers for this model, with ours in place of every full-attention one."""
        full = set(self.binding.full_layers())
        return [
            self._make_layer(index, own) if index in full else own for index, own in enumerate(self.binding.layers())
        ]

    def _make_layer(self, index: int, own: Any) -> CompressedLayer:
        state = self.compression.layer_state()
        if hasattr(own, "update_conv_state"):
            return HybridLayer(index, self.binding.name, state, own.number_of_states)
        if self.sharing is not None:
            return SharedLayer(index, self.binding.name, state, self.sharing)
        return CompressedLayer(index, self.binding.name, state)

    def _row(self, layer_idx: int, sequence: int, head: int) -> Stored | Prompt:
        self.steps.sync()
        layers = {layer.index: layer for layer in self.compressed_layers}
        if layer_idx not in layers or layers[layer_idx].store is None:
            raise IndexError(
                f"layer {layer_idx} stores nothing here; compressed layers are {sorted(layers)}"
                + ("" if self.sequences else ", and the cache is empty")
            )
        store = layers[layer_idx].stored()
        batch, heads = store.lengths.shape
        if not (0 <= sequence < batch and 0 <= head < heads):
            raise IndexError(
                f"sequence {sequence}, head {head} is not there; layer {layer_idx} has {batch} sequences of {heads} "
                "KV heads"
            )
        return store
