"""`CompressedCache`: a Transformers `Cache` whose full-attention layers live in paged stores under a policy's rule.

A forward is one step. Its new tokens are appended layer by layer; when the last compressed layer is done, the step is
committed. What is compressed, and when, is the policy's `Compression`. A step that fails is taken back.
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicLayer

from ..config import KaraConfig, KVCompressConfig
from ..integration.attention import attach, real_tokens, route, unwrap
from ..policy import KaraPolicy, KVCompressPolicy
from ..policy.sharing import PoDSharing
from ..storage import MemoryMeter, PagedStore, Prompt, upload
from .bound_model import Binding, check_max_bytes
from .budget_compression import Evicting
from .compression import Compression
from .cuda_graph import DecodeGraph, check_graph
from .layer import Step, StoreLayer
from .report import CacheReport
from .sequence import Kind, Sequence
from .window_compression import Sealing

COMPRESSIONS: dict[type, Callable[..., Compression]] = {KaraPolicy: Sealing, KVCompressPolicy: Evicting}


def looks_are_free(device: torch.device) -> bool:
    """Whether reading a value back from the device waits for nothing."""
    return device.type == "cpu"


class CompressedCache(Cache):
    """A cache whose full-attention layers keep what `policy` decides; the other layers are Transformers' own.

    `get_seq_length()` is the number of tokens seen, so positions and masks are those of the full cache; `report()` says
    how many are kept. What is stored is detached: no gradient flows into the past. Attaches itself to `model` (see
    `kara_hf.attach`); needs no other call.

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
        self.binding = Binding(inner)
        if sharing is not None:
            self.binding.check_sharing(sharing)
        self.sharing = sharing
        check_max_bytes(max_bytes, inner, policy.config.block_size)
        self.policy = policy
        self.compression = COMPRESSIONS[type(policy)](self, policy)
        self.meter = MemoryMeter(max_bytes)
        self.steady = cuda_graph
        super().__init__(layers=self._make_layers())
        if cuda_graph:
            check_graph(inner, len(self.store_layers), len(self.layers))
        self.sequences: list[Sequence] = []
        self.columns = 0  # tokens seen, padding included
        self._solid_columns = 0  # how many of the newest columns are padding in no sequence
        self._drafting = False
        self._assumed = False  # whether the host counts tokens that may turn out to be padding
        self._offset: torch.Tensor | None = None  # position less slot of the next token in head 0, [B, 1] int32
        self._step: Step | None = None
        self.given_real: torch.Tensor | None = None  # what stands in for the mask while a step is captured, [B, 1]
        self.graph = DecodeGraph(self) if cuda_graph else None
        attach(inner)
        if cuda_graph:
            route(inner)

    # ------------------------------------------------------------------------------------------------------- observing
    @property
    def batch_size(self) -> int:
        """Sequences in the cache, or -1 while it is empty."""
        return len(self.sequences) or -1

    @property
    def is_croppable(self) -> bool:
        """True: `crop` takes off the newest tokens, as assisted decoding asks, but none of what was compressed."""
        return True

    def report(self) -> CacheReport:
        """Tokens and bytes held now; see `CacheReport`."""
        self.look()
        layers = [layer for layer in self.store_layers if layer.store is not None]
        seen = [sequence.tokens for sequence in self.sequences]
        full = nominal = 0
        kept = []
        for layer in layers:
            store = layer.stored()
            full += sum(seen) * store.lengths.shape[1] * sum(store.slot_bytes)
            nominal += store.stored_bytes
            kept.append(torch.from_numpy(store.lengths.astype(np.int64)))
        heads = max((lengths.shape[1] for lengths in kept), default=0)
        padded = [torch.nn.functional.pad(lengths, (0, heads - lengths.shape[1])) for lengths in kept]
        others = [layer for layer in self.layers if not isinstance(layer, StoreLayer)]
        return CacheReport(
            seen=torch.tensor(seen, dtype=torch.long),
            kept=torch.stack(padded) if padded else torch.zeros(0, 0, 0, dtype=torch.long),
            layers=[layer.index for layer in layers],
            full_bytes=full,
            nominal_bytes=nominal,
            resident_bytes=self.meter.held,
            peak_bytes=self.meter.peak,
            other_bytes=sum(tensor.nbytes for layer in others for tensor in _tensors(vars(layer))),
        )

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

        Kinds: "prompt" (pinned), "sealed" (a chunk that survived its window), "open" (waiting to be sealed) and
        "recent" (the newest tokens, always whole). Raises as `kept_positions`.
        """
        positions = self.kept_positions(layer_idx, sequence, head).numpy()
        runs: list[tuple[int, int, Kind]] = []
        begin = 0
        for stop, kind in self.compression.limits(self.sequences[sequence]):
            end = int(np.searchsorted(positions, stop))
            part = positions[begin:end]
            for run in np.split(part, np.flatnonzero(np.diff(part) != 1) + 1) if len(part) else ():
                runs.append((int(run[0]), int(run[-1]) + 1, kind))
            begin = end
        return runs

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, padding columns included: what positions and masks of the next step count from."""
        return self.columns

    # -------------------------------------------------------------------------------------------------- rearranging it
    def compress(self) -> None:
        """Compresses now what would be compressed when the next token is decoded.

        For a prompt that is followed by a question rather than by its answer, with `KVCompressCache`. Where nothing
        waits for that, as always with `KaraCache`, nothing happens.
        """
        self.look()
        if self.columns and self.compression.calm_steps() < 1:
            self.compression.compress()

    def reset(self) -> None:
        """Empties the cache and gives its memory back; it can then start over with any batch."""
        for layer in self.store_layers:
            layer.clear()
        self.meter = MemoryMeter(self.meter.max_bytes)
        self.compression = COMPRESSIONS[type(self.policy)](self, self.policy)
        self.layers = self._make_layers()
        self.sequences = []
        self.columns = self._solid_columns = 0
        self._drafting = self._assumed = False
        self._offset = self._step = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Makes sequence i the same as sequence ``beam_idx[i]`` was, by reference to its blocks."""
        index = self._fork_index(beam_idx)
        super().reorder_cache(beam_idx)
        self.sequences = [self.sequences[b] for b in index]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence `repeats` times, by reference to its blocks."""
        index = self._fork_index(torch.arange(len(self.sequences)).repeat_interleave(repeats))
        super().batch_repeat_interleave(repeats)
        self.sequences = [self.sequences[b] for b in index]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the sequences at `indices` ``[n]`` int64, in that order; the memory of the others is given back."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        index = self._fork_index(indices)
        super().batch_select_indices(indices)
        self.sequences = [self.sequences[b] for b in index]

    def _fork_index(self, index: torch.Tensor) -> list[int]:
        """`index` as a list, once it is known that all layers can be rearranged so. Raises `PoolExhausted`."""
        self.look()
        self._offset = None
        array = index.cpu().numpy()
        self.meter.require(sum(layer.fork_bytes(array) for layer in self.store_layers))
        return [int(b) for b in array]

    def activate_past_recording(self) -> None:
        """Called by assisted decoding: short steps are drafts from now on, which `crop` may take back, not turns."""
        super().activate_past_recording()
        self._drafting = True

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest ``-tokens_to_remove`` tokens of every sequence (a count below or equal to 0, as in
        Transformers).

        Raises:
            ValueError: some of them are sealed already: what was evicted around them cannot be brought back. Nothing is
                removed then.
        """
        self.look()
        count = -int(tokens_to_remove)
        if count < 0:
            raise ValueError(
                f"crop({-count}) is not possible: pass the number of tokens to remove as a negative number"
            )
        if count > self._solid_columns:
            raise ValueError(
                f"crop({-count}) would reach back past the last {self._solid_columns} columns, where sequences of "
                "this batch have padding; crop fewer tokens or reset() the cache"
            )
        after = []
        for number, sequence in enumerate(self.sequences):
            cropped = sequence.cropped(count)
            if cropped is None:
                raise ValueError(self.compression.uncroppable(number, sequence, count))
            after.append(cropped)
        if count < self.columns:
            self._check_near(count)
        for layer in self.layers:
            if not isinstance(layer, StoreLayer):
                layer.crop(-count)
        if count == 0:
            return
        if count == self.columns:
            self.reset()
            return
        for layer in self.store_layers:
            layer.crop(np.full(len(after), count))
        self._offset = None
        self.sequences = after
        self.columns -= count
        self._solid_columns -= count

    def _check_near(self, count: int) -> None:
        """Raises ValueError if the keys of followers do not reach back behind the newest `count` tokens."""
        for layer in self.store_layers:
            near = layer.store.proximal if isinstance(layer.store, PagedStore) else None
            if near is not None and not near.can_crop(np.full(len(self.sequences), count)).all():
                raise ValueError(
                    f"crop({-count}) would reach behind the newest keys that layer {layer.index} has of its own: those "
                    "of tokens that became distant are gone. Crop fewer tokens, or reset() the cache"
                )

    # --------------------------------------------------------------------------------------------------- one step of it
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by attention modules. Keys ``[B, H, S, Dk]``, values ``[B, H, S, Dv]``.

        Raises:
            RuntimeError: the model's attention function is not ours, so what is stored would be lost on it.
            ValueError: the batch has another size than the cache, or there is no token.
        """
        layer = self.layers[layer_idx]
        step = self._step
        if step is None or layer_idx <= step.last_layer:
            unanswered = step is not None and step.waiting
            self._take_back()
            self._check(key_states, unanswered)
            step = self._step = Step(new=key_states.shape[2], first=self.columns == 0)
        elif step.waiting:
            self._take_back()
            self._check(key_states, unanswered=True)
        step.last_layer = layer_idx
        step.waiting = isinstance(layer, StoreLayer)
        if not step.waiting and not step.first:
            step.before[layer_idx] = copy.copy(vars(layer))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _check(self, keys: torch.Tensor, unanswered: bool) -> None:
        """Raises if this cache cannot take `keys`; nothing has changed then."""
        if unanswered or not self.binding.answers:
            raise self.binding.unanswered()
        if self.sequences and keys.shape[0] != len(self.sequences):
            raise ValueError(
                f"the batch has {keys.shape[0]} sequences and the cache holds {len(self.sequences)}; use a new cache "
                "or reset() for a new batch, batch_repeat_interleave() or batch_select_indices() to change this one"
            )
        if keys.shape[2] == 0:
            raise ValueError("the prompt is empty (0 new tokens); pass at least one token")

    def _prepare(
        self,
        layer: StoreLayer,
        module: torch.nn.Module | None,
        query: torch.Tensor,
        attention_mask: Any,
        transformed: bool,
    ) -> Step:
        """Checks a layer's turn; at the first compressed layer of a step also finds out what the step brings."""
        step = self._step
        if step is None or not step.waiting:
            raise ValueError(
                f"layer {layer.index} of {self.binding.name} has its keys read twice in a step (layers that share "
                "keys), which a compressed cache does not support"
            )
        if module is None and not self.binding.direct:
            raise self.binding.unanswered()
        if module not in self.binding:
            raise ValueError(
                f"this cache was made for another model than the {type(module).__name__} that uses it; make one with "
                "KaraCache(model) for each model"
            )
        if transformed and not hasattr(module, "kv_lora_rank"):
            raise ValueError(
                f"{type(module).__name__} computes with its keys after the cache returned them, in a way that is not "
                "known to be safe when tokens are missing; this model is not supported"
            )
        layer.latent = transformed
        if not step.prepared:
            self._begin(step, query, attention_mask)
        return step

    def _begin(self, step: Step, query: torch.Tensor, attention_mask: Any) -> None:
        """Finds out what a step brings, and makes room for it in every layer before anything is stored."""
        batch, device = query.shape[0], query.device
        if step.first:
            self.sequences = [Sequence()] * batch
        step.drafts = self._drafting
        step.looks = step.first or step.new > 1 or looks_are_free(device) or self.compression.calm_steps() < 1
        if step.looks:
            self._make_exact()
        step.real = self._real(attention_mask, step)
        if step.real is None or not step.looks:
            step.counts = np.full(batch, step.new)
        else:
            step.counts = step.real.sum(1).cpu().numpy()
        if step.first and not step.counts.all():
            row = int(np.flatnonzero(step.counts == 0)[0])
            raise ValueError(f"sequence {row} of the batch is nothing but padding; leave it out or give it a token")
        if step.drafts and not step.first:
            for layer in self.store_layers:
                if isinstance(layer.store, PagedStore) and layer.store.proximal is not None:
                    layer.store.widen(step.new)
        self.compression.begin(step)
        step.positions = self._positions(step, device)
        step.prepared = True

    def _positions(self, step: Step, device: torch.device) -> torch.Tensor:
        """True positions of a step's columns, ``[B, S]`` int32; those of padding are anything."""
        if step.looks:
            first = upload(np.array([[sequence.tokens] for sequence in self.sequences], np.int32), device)
        else:  # the device knows what is stored, and how far that is behind what was seen has not changed
            lengths = self.store_layers[0].paged().rows().lengths[:, :1]
            if self._offset is None:
                tokens = np.array([[sequence.tokens] for sequence in self.sequences], np.int32)
                self._offset = upload(tokens - self.store_layers[0].paged().lengths[:, :1], device)
            first = lengths + self._offset
        if step.real is not None:
            return first + (step.real.to(device).cumsum(1, dtype=torch.int32) - 1).clamp(min=0)
        return first + torch.arange(step.new, dtype=torch.int32, device=device) if step.new > 1 else first

    @property
    def room(self) -> int:
        """Tokens that every row can take before memory has to be arranged."""
        return min(layer.paged().room for layer in self.store_layers)

    def reserve(self, tokens: int) -> None:
        """Makes room for `tokens` more in every row. Raises `PoolExhausted`; what is stored has not changed then."""
        for layer in self.store_layers:
            layer.paged().reserve(tokens)

    def _real(self, attention_mask: Any, step: Step) -> torch.Tensor | None:
        """Which new tokens are real, ``[B, S]`` bool, or None for all; refuses masks whose meaning would be lost."""
        if self.given_real is not None:
            return self.given_real
        if step.first:
            return real_tokens(attention_mask, step.new)
        if attention_mask is None:
            return None
        seen = self.columns + step.new
        columns = attention_mask.shape[-1] if isinstance(attention_mask, torch.Tensor) else -1
        if columns == seen and attention_mask.ndim == 4:  # of a model that asks its own mask function
            return real_tokens(attention_mask[..., -step.new :], step.new)
        if columns != step.new or attention_mask.ndim != 2 or attention_mask.dtype != torch.bool:
            raise ValueError(
                f"the attention mask that reaches the attention of {self.binding.name} is not made of 0 and 1 for "
                f"each of the {seen} tokens seen (ALiBi, a bias or a hand-made mask?), which a compressed cache "
                "would lose; pass a 2-D mask over all tokens to a model with rotary or no position encoding"
            )
        return None if step.looks and bool(attention_mask.all()) else attention_mask

    def _finish(self, layer: StoreLayer, step: Step) -> None:
        """After a layer's attention; commits the step when all layers are done."""
        self.compression.layer_done(layer, step)
        if layer is not self.store_layers[-1]:
            return
        self.sequences = self.compression.done(step)
        for each in self.store_layers:
            each.discard_step()
            each.commit()
        self.columns += step.new
        padded = step.looks and step.real is not None
        self._solid_columns = 0 if padded else self._solid_columns + step.new
        if step.looks:
            self._offset = None
        elif step.real is not None:
            self._assumed = True
        step.close()

    def _take_back(self) -> None:
        """Undoes a step that was not completed: a first one by emptying the cache, a later one layer by layer."""
        step = self._step
        self._step = None
        for layer in self.store_layers:
            layer.discard_step()
        if step is None or step.complete:
            return
        if step.first:
            self.reset()
            return
        counts = step.real_counts() if step.appended else step.counts
        for layer in step.appended:
            layer.paged().rollback(counts)
        for index, before in step.before.items():
            vars(self.layers[index]).clear()
            vars(self.layers[index]).update(before)

    def count_step(self, masked: bool) -> None:
        """The host's part of a decode step that was replayed: one token more everywhere, real unless `masked`."""
        for layer in self.store_layers:
            layer.paged().count(1)
        self.sequences = [sequence.extended(1, pinned=False) for sequence in self.sequences]
        self.columns += 1
        self._solid_columns += 1
        self._assumed |= masked

    def addresses(self) -> tuple[Any, ...]:
        """Where the memory of a decode step lies, and what of it was decided on the host."""
        found = [tensor for tensor in (self._offset, *self.compression.constants()) if tensor is not None]
        for layer in self.store_layers:
            found += [*layer.paged().tensors(), *layer.state.tensors()]
        return tuple((tensor.data_ptr(), tensor.shape) for tensor in found)

    def look(self) -> None:
        """Waits for the device where the host does not know how much is stored. Reading and rearranging do it."""
        self._take_back()
        self._make_exact()

    def _make_exact(self) -> None:
        """Finds out which tokens that were taken for real turned out to be padding."""
        if not self._assumed:
            return
        padding, *_ = (layer.stored().sync_lengths() for layer in self.store_layers)
        if padding.any():
            self.sequences = [s.without(int(count)) for s, count in zip(self.sequences, padding, strict=True)]
            self._solid_columns = 0
        self._assumed, self._offset = False, None

    # ------------------------------------------------------------------------------------------------------ setting up
    def _make_layers(self) -> list[Any]:
        """Transformers' own layers for this model, with ours in place of every full-attention one."""
        own = self.binding.layers()
        layers = [
            StoreLayer(self, index, self.sharing) if type(layer) is DynamicLayer else layer
            for index, layer in enumerate(own)
        ]
        self.store_layers = [layer for layer in layers if isinstance(layer, StoreLayer)]
        return layers

    def layer(self, index: int) -> StoreLayer:
        """The compressed layer that is layer `index` of the model."""
        layer = self.layers[index]
        assert isinstance(layer, StoreLayer), f"layer {index} is not compressed"
        return layer

    def _row(self, layer_idx: int, sequence: int, head: int) -> PagedStore | Prompt:
        self.look()
        layers = {layer.index: layer for layer in self.store_layers}
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


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested containers."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


class KaraCache(CompressedCache):
    """Kara (arXiv 2607.01237): keeps the same share of every window of generated tokens and never returns to it.

        out = model.generate(**inputs, past_key_values=KaraCache(model, retention=0.25))

    Args:
        model: a Transformers causal LM, which may be wrapped by PEFT. It is attached by this call.
        retention: share of each window's tokens that every KV head keeps, in (0, 1].
        window: tokens in a window; a multiple of `block_size`. Sealed once `recent` more tokens stand behind it.
        recent: newest tokens that are always kept whole.
        score: "bidirectional" (the paper), which holds the queries of `window` + `recent` tokens; "mean-square", which
            holds their second moments instead, or "key-norm", which holds nothing (both ours); or a control: "causal",
            "random", "random-chunks", "recency"; see `kara_hf.policy.register_score`. Or the folder or hub id of a
            `KeyCalibration`, which holds nothing either (ours; `kara-hf calibrate` makes one). Drafts of assisted
            decoding do not count in moments, so that windows may be judged otherwise than without drafts.
        anchor_share: share of the kept tokens that are picked singly before gaps between them are filled; 1 is top-k.
        compress_prompt: walk the prompt in windows too. Otherwise the prompt and every later turn (a step of several
            tokens that are not drafts of assisted decoding) is kept whole, with what is open before it.
        block_size: slots per block.
        max_bytes: cap on resident bytes; the step that would pass it raises `PoolExhausted` and is taken back.
        sharing: PoD on top: keys of distant tokens stored once for a group of layers; see `PoDCache`.
        cuda_graph: replays the decode step as a CUDA graph between compressions; see `CompressedCache`.
        seed: of the random scores.

    Raises:
        TypeError: `model` is no Transformers model.
        ValueError: the model or a setting is not supported; the message names it, its value and the remedy.
        OSError: `score` is a path or a hub id, and there is no key calibration.
    """

    def __init__(
        self,
        model: Any,
        *,
        retention: float = KaraConfig.retention,
        window: int = KaraConfig.window,
        recent: int = KaraConfig.recent,
        score: str | Path = KaraConfig.score,
        anchor_share: float = KaraConfig.anchor_share,
        compress_prompt: bool = KaraConfig.compress_prompt,
        block_size: int = KaraConfig.block_size,
        max_bytes: int | None = None,
        sharing: PoDSharing | None = None,
        cuda_graph: bool = False,
        seed: int = KaraConfig.seed,
    ):
        config = KaraConfig(
            retention=retention,
            window=window,
            recent=recent,
            score=str(score) if isinstance(score, Path) else score,
            anchor_share=anchor_share,
            compress_prompt=compress_prompt,
            block_size=block_size,
            seed=seed,
        )
        super().__init__(model, policy=KaraPolicy(config), sharing=sharing, max_bytes=max_bytes, cuda_graph=cuda_graph)


class KVCompressCache(CompressedCache):
    """KV-Compress (arXiv 2410.00161): every KV head of every layer keeps as much as it is worth, within one budget.

        out = model.generate(**inputs, past_key_values=KVCompressCache(model, max_cache_tokens=512))

    A prompt is cut when decoding begins, and a turn when the answer to it begins; `compress()` does it at once.
    Exactly one of `max_cache_tokens` and `retention` is given.

    Args:
        model: a Transformers causal LM, which may be wrapped by PEFT. It is attached by this call.
        max_cache_tokens: tokens per KV head and layer that a sequence holds at most, on average, while it decodes.
        retention: share of the tokens that is kept, in (0, 1].
        observation: prompt queries that vote on what is kept, the last ones; None for all, without pooling.
        protected: newest tokens that are never evicted.
        sinks: first tokens that are never evicted.
        pool: width of the max-pool over neighbouring tokens, odd.
        metric: "l2" sums squared attention probabilities, "l1" probabilities; controls: "random", "recency".
        floor: further tokens that every head keeps at least.
        accumulate: whether queries vote while decoding too.
        continual: whether eviction goes on while decoding; otherwise the cache grows behind the prompt.
        levels: different lengths, in blocks, that rows may be cut to; None for any, 1 for uniform heads.
        block_size: slots per block.
        max_bytes: cap on resident bytes: more is evicted if it takes that, as long as there is something to evict.
            A prompt that comes at once is held whole outside the cap until decoding begins. Turns and prompts in chunks
            are not: before one that does not fit, what is there is cut.
        sharing: PoD on top: keys of distant tokens stored once for a group of layers; see `PoDCache`.
        cuda_graph: replays the decode step as a CUDA graph between compressions; see `CompressedCache`.
        seed: of the random metric.

    Raises:
        TypeError: `model` is no Transformers model.
        ValueError: the model or a setting is not supported; the message names it, its value and the remedy.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_cache_tokens: int | None = None,
        retention: float | None = None,
        observation: int | None = KVCompressConfig.observation,
        protected: int = KVCompressConfig.protected,
        sinks: int = KVCompressConfig.sinks,
        pool: int = KVCompressConfig.pool,
        metric: Literal["l2", "l1", "random", "recency"] = KVCompressConfig.metric,
        floor: int = KVCompressConfig.floor,
        accumulate: bool = KVCompressConfig.accumulate,
        continual: bool = KVCompressConfig.continual,
        levels: int | None = None,
        block_size: int = KVCompressConfig.block_size,
        max_bytes: int | None = None,
        sharing: PoDSharing | None = None,
        cuda_graph: bool = False,
        seed: int = KVCompressConfig.seed,
    ):
        config = KVCompressConfig(
            max_cache_tokens=max_cache_tokens,
            retention=retention,
            observation=observation,
            protected=protected,
            sinks=sinks,
            pool=pool,
            metric=metric,
            floor=floor,
            accumulate=accumulate,
            continual=continual,
            levels=levels,
            block_size=block_size,
            seed=seed,
        )
        super().__init__(
            model, policy=KVCompressPolicy(config), sharing=sharing, max_bytes=max_bytes, cuda_graph=cuda_graph
        )


class PoDCache(CompressedCache):
    """PoD (arXiv 2412.02252): keys of distant tokens are stored once for a group of layers. Every token is kept.

        out = model.generate(**inputs, past_key_values=PoDCache(model, PoDSharing.from_pretrained("folder")))

    Args:
        model: a Transformers causal LM, which may be wrapped by PEFT. It is attached by this call.
        sharing: who leads whom, and what is proximal; see `kara-hf pod explore` and `kara-hf pod adapt`.
        block_size: slots per block.
        max_bytes: cap on resident bytes; the step that would pass it raises `PoolExhausted` and is taken back.
        cuda_graph: replays the decode step as a CUDA graph while there is room; see `CompressedCache`. Room is then
            made for `KaraConfig.window` tokens at a time.

    Raises:
        TypeError: `model` is no Transformers model.
        ValueError: the model or a setting is not supported, or the sharing is of another model.
    """

    def __init__(
        self,
        model: Any,
        sharing: PoDSharing,
        *,
        block_size: int = KaraConfig.block_size,
        max_bytes: int | None = None,
        cuda_graph: bool = False,
    ):
        window = -(-KaraConfig.window // block_size) * block_size
        keep_all = KaraPolicy(KaraConfig(retention=1.0, window=window, block_size=block_size))
        super().__init__(model, policy=keep_all, sharing=sharing, max_bytes=max_bytes, cuda_graph=cuda_graph)
