"""One compressed layer: its store, and its attention over it. It is told everything by the step, and asks nobody."""

import copy
import math
from typing import Any, Protocol

import numpy as np
import torch
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from ..integration.attention import AttentionFunction, StoredLength
from ..kernels import attend, attend_masked
from ..storage import MemoryMeter, Prompt, Saved, Stored
from .step import Step

# Arguments of attention functions that are tensors and are honoured, or do not matter to attention over a store.
_KNOWN_TENSORS = {"s_aux", "position_ids", "cache_position", "position_embeddings", "cu_seq_lens_q", "cu_seq_lens_k"}
COPIED_WITH_ITS_CACHE = id("kara_hf")  # in the memo of a deepcopy: layers are copied by their cache


class LayerState(Protocol):
    """What a compression holds in one layer beside the store."""

    @property
    def query_bytes(self) -> int:
        """Bytes of queries, or of what was made of them."""

    def crop(self, tokens: np.ndarray) -> None:
        """Drops what belongs to the newest `tokens` ``[B]`` of every sequence."""

    def fork(self, index: np.ndarray) -> None:
        """Makes sequence i the same as sequence ``index[i]`` was."""

    def fork_bytes(self, index: np.ndarray) -> int:
        """Bytes that `fork` takes."""

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What a decode step writes to."""

    def discard_step(self) -> None:
        """Forgets what belongs to a step alone."""

    def close(self) -> None:
        """Stops counting what is held here; the object is not used afterwards."""

    def saved(self) -> Saved:
        """What is held here between steps; see `kara_hf.storage.saved`."""

    def restore(self, saved: Saved, device: torch.device, meter: MemoryMeter) -> None:
        """Takes back, when it is new, what `saved` gave. Raises `PoolExhausted`."""


class CompressedLayer(CacheLayerMixin):
    """One full-attention layer of a `CompressedCache`: its store, its attention, and what its compression holds.

    Attributes:
        index: of the layer in the model.
        model: name of the model, for messages.
        seen: tokens the cache has seen, padding included.
        followers, leading: KV heads that share another layer's keys, or lend theirs to one (`SharedLayer`); here none.
        deciding: KV heads in which this layer decides for itself what is kept; None: all.
        store: None while it is empty.
        state: what the compression holds beside it.
        scaling, softcap, sinks: of the model's attention, once it was called.
        latent: whether the model expands what is stored before it attends (multi-head latent attention).
        present: of expanded keys in this step which hold a token, ``[B, M + S]`` bool; otherwise None.
        mask_is_shared, padded: see `kara_hf.integration.attention.StoredLength`.
        record_past: whether tokens of the steps to come may be taken back; see `transformers.Cache`.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False
    followers: tuple[int, ...] = ()
    leading: tuple[int, ...] = ()
    deciding: tuple[int, ...] | None = None
    saved_names: tuple[str, ...] = (
        "is_initialized",
        "scaling",
        "softcap",
        "sink_logits",
        "latent",
        "padded",
        "record_past",
    )  # attributes that are saved as they are, beside `store` and `state`

    def __init__(self, index: int, model: str, state: Any):
        CacheLayerMixin.__init__(self)
        self.index, self.model, self.state = index, model, state
        self.seen = 0
        self.store: Stored | Prompt | None = None
        self.scaling: float = 1.0
        self.softcap: float | None = None
        self.sink_logits: torch.Tensor | None = None
        self.latent = False
        self.present: torch.Tensor | None = None
        self.pending: tuple[torch.Tensor, torch.Tensor] | None = None
        self.mask_is_shared = self.padded = False
        self.record_past = False

    # ------------------------------------------------------------------------------- what Transformers asks of a layer
    @property
    def keys(self) -> torch.Tensor | None:
        """A copy of the keys stored, ``[B, H, T, Dk]`` in slot order, with anything behind a row's length; or None."""
        return self._dense(0)

    @keys.setter
    def keys(self, keys: None) -> None:
        """Transformers' constructor says that there are none."""

    @property
    def values(self) -> torch.Tensor | None:
        """As `keys`, ``[B, H, T, Dv]``."""
        return self._dense(1)

    @values.setter
    def values(self, values: None) -> None:
        """As `keys`."""

    def _dense(self, part: int) -> torch.Tensor | None:
        if self.store is None or isinstance(self.store, Prompt):
            return None if self.store is None else (self.store.keys, self.store.values)[part]
        rows = self.store.rows()
        return rows.all_values() if part else rows.all_keys()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Holds the new keys ``[B, H, S, Dk]`` and values ``[B, H, S, Dv]`` until attention takes them.

        Where the model expands what the cache holds before it attends, returns everything stored with the new tokens
        behind it; otherwise the new tokens.
        """
        self.is_initialized = True
        self.pending = (key_states.detach(), value_states.detach())
        if self.latent and self.store is not None:
            past_keys, past_values = self.paged().rows().dense()
            key_states = torch.cat([past_keys, key_states], dim=2)
            value_states = torch.cat([past_values, value_states], dim=2)
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if torch.compiler.is_compiling():  # ends the attempt, so that the step itself says it in its own words
            raise ValueError(f"{self.model} is compiled, which a compressed cache does not support")
        return StoredLength(self.seen + query_length, self.mask_is_shared, self.padded), 0

    def get_max_length(self) -> int:
        return -1

    def activate_past_recording(self) -> None:
        self.record_past = True

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.fork(beam_idx.cpu().numpy())

    # --------------------------------------------------------------------------------------------------- one attention
    def attend(
        self,
        step: Step,
        own: AttentionFunction,
        module: torch.nn.Module | None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Stores the pending tokens and attends over everything stored; see `kara_hf.integration.attention.Answerer`.

        Raises:
            ValueError: the attention does something that attention over a store would leave out.
        """
        self._note(step, query, kwargs)
        self.present = self._present(step, key.shape[2], key.device) if self.latent else None
        if self.is_dense(step):
            result = own(module, query, key, value, attention_mask, **kwargs)
            self.append(step)
            return result
        if self.present is not None:
            visible = self._visible_expanded(step, self.present)
            out = attend_masked(query, key, value, visible, **self.settings)
            self.append(step)
        else:
            out = self.attend_stored(step, query, key, value)
        return out.transpose(1, 2).contiguous(), None

    def attend_again(
        self,
        step: Step,
        own: AttentionFunction,
        module: torch.nn.Module | None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `attend`, for another layer of the model that reads the keys which this one has stored in this step."""
        if self.latent or self.followers or self.leading:
            raise ValueError(
                f"another layer of {self.model} reads the keys of layer {self.index}, which is not supported where "
                + ("these are latent" if self.latent else "these are shared by a PoDSharing")
            )
        self._note(step, query, kwargs)
        if self.is_dense(step):
            return own(module, query, key, value, attention_mask, **kwargs)
        return self._read(step, query).transpose(1, 2).contiguous(), None

    def is_dense(self, step: Step) -> bool:
        """Whether the model's own attention answers, on the new keys alone."""
        return step.first

    def attend_stored(self, step: Step, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Stores the new tokens and attends over everything stored, them among it: ``[B, Hq, S, Dv]``."""
        self.append(step)
        return self._read(step, query)

    def _read(self, step: Step, query: torch.Tensor) -> torch.Tensor:
        rows = self.paged().rows()
        queries = query.shape[2]  # the newest of the step, where the model computes no others
        if step.visibility is not None:
            visible = step.visibility.of(rows.all_positions())[:, :, -queries:]
            nothing = torch.zeros(len(query), queries, dtype=torch.int32, device=query.device)
            return attend(
                query, rows, num_unseen=nothing, visible=visible, metric_power=step.metric_power, **self.settings
            )
        hidden = None if step.new == 1 and step.metric_power is None else step.hidden_on(query.device)
        if hidden is not None:
            hidden = hidden[:, -queries:]
        return attend(query, rows, num_unseen=hidden, metric_power=step.metric_power, **self.settings)

    @property
    def settings(self) -> dict[str, Any]:
        """Of the model's attention, as kernels take them."""
        return {"scaling": self.scaling, "softcap": self.softcap, "sink_logits": self.sink_logits}

    def _note(self, step: Step, query: torch.Tensor, kwargs: dict[str, Any]) -> None:
        self.scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        self.softcap, self.sink_logits = kwargs.get("softcap"), kwargs.get("s_aux")
        _refuse(kwargs, self.model, step.first)

    def _present(self, step: Step, keys: int, device: torch.device) -> torch.Tensor:
        """Which of the expanded keys, stored ones first and new ones behind, hold a token: ``[B, M + S]`` bool."""
        rows = None if self.store is None else self.paged().rows()
        past = 0 if rows is None else rows.max_length
        if keys != past + step.new:
            raise ValueError(
                f"layer {self.index} attends to {keys} keys where {past + step.new} are stored; this kind of latent "
                "attention is not supported"
            )
        new = torch.ones(len(step.counts), step.new, dtype=torch.bool, device=device)
        if step.real is not None:
            new = step.real.to(device)
        if rows is None:
            return new
        stored = torch.arange(past, device=device) < rows.lengths[:, :1]
        return torch.cat([stored, new], dim=1)

    def _visible_expanded(self, step: Step, present: torch.Tensor) -> torch.Tensor:
        """Which of the expanded keys ``[B, M + S]`` each new query sees, ``[B, 1, S, M + S]`` bool."""
        new, keys = step.new, present.shape[1]
        if step.visibility is None:
            causal = torch.ones(new, keys, dtype=torch.bool, device=present.device).tril(keys - new)
            return present[:, None, None] & causal
        past = step.visibility.of(self.paged().rows().dense_positions())
        among = step.visibility.mask[:, None, :, -new:].to(present.device)
        return present[:, None, None] & torch.cat([past, among], dim=3)

    # ----------------------------------------------------------------------------------------------------- its storage
    def append(self, step: Step) -> None:
        """Stores the pending tokens."""
        assert self.pending is not None
        keys, values = self.pending
        real = None if step.real is None else step.real.to(keys.device)
        if step.syncs:
            self._check_finite(keys, values, real)
        if self.store is None:
            self.store = self.make_store(step, keys, values)
        self.store.append(keys, values, step.positions.to(keys.device), real, sync=step.syncs)
        step.stored.add(self.index)
        self.pending = None
        step.waiting = False

    def make_store(self, step: Step, keys: torch.Tensor, values: torch.Tensor) -> Stored | Prompt:
        """An empty store for the first `keys` ``[B, H, S, Dk]`` and `values` ``[B, H, S, Dv]``."""
        assert step.new_store is not None
        return step.new_store(self, keys, values)

    def _check_finite(self, keys: torch.Tensor, values: torch.Tensor, real: torch.Tensor | None) -> None:
        total = keys.sum(dtype=torch.float32) + values.sum(dtype=torch.float32)
        if math.isfinite(total.item()):  # one cheap look; a sum may overflow where no element does
            return
        finite = keys.isfinite().all(-1).all(1) & values.isfinite().all(-1).all(1)
        if not bool((finite if real is None else finite | ~real).all()):
            raise ValueError(
                f"keys or values of layer {self.index} are NaN or infinite; load the model in bfloat16 or float32"
            )

    def proximal(self, heads: int) -> dict[str, Any]:
        """The arguments of `PagedStore` that say which of its `heads` follow, and what is proximal to them."""
        return {}

    def proximal_places(self, tokens: int, block_size: int) -> int:
        """Keys of `tokens` tokens that followers store at most."""
        return 0

    def stored(self) -> Stored | Prompt:
        assert self.store is not None, "nothing is stored yet"
        return self.store

    def paged(self) -> Stored:
        assert self.store is not None and not isinstance(self.store, Prompt), "the prompt is not in blocks yet"
        return self.store

    def prepare_to_take_back(self, tokens: int) -> None:
        """`tokens` more are about to be stored that `crop` may take back."""

    def crop(self, tokens: np.ndarray | int) -> None:
        """Drops the newest `tokens` ``[B]`` of every sequence; -n, as Transformers asks, for n of each."""
        counts = np.full(self.stored().lengths.shape[0], -tokens) if isinstance(tokens, int) else tokens
        self.stored().crop(counts)
        self.state.crop(counts)

    def commit(self) -> None:
        """The step that appended last will not be taken back."""
        if not isinstance(self.store, Prompt | None):
            self.store.commit()

    def fork_bytes(self, index: np.ndarray) -> int:
        """Bytes that `fork` takes."""
        return self.state.fork_bytes(index) + (0 if self.store is None else self.store.fork_bytes(index))

    def fork(self, index: np.ndarray) -> None:
        """Makes sequence i the same as sequence ``index[i]`` was."""
        if self.store is not None:
            self.store.fork(index)
        self.state.fork(index)

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompressedLayer":
        if COPIED_WITH_ITS_CACHE not in memo:
            raise ValueError(
                f"{self.model} copies layers of its cache, which a compressed cache does not support; use "
                "Transformers' own cache"
            )
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def empty(self, state: Any) -> None:
        """Gives the memory of the store and of the old state back; `state` is the new one."""
        if self.store is not None:
            self.store.close()
        self.state.close()
        self.store, self.state = None, state
        self.discard_step()
        self.seen, self.padded, self.record_past = 0, False, False
        self.is_initialized = False

    def discard_step(self) -> None:
        """Forgets what belongs to a step alone."""
        self.pending = self.present = None
        self.state.discard_step()


def _refuse(kwargs: dict[str, Any], model: str, first: bool) -> None:
    """Raises ValueError for arguments of an attention function that attention over a store would leave out.

    In a first step, which the model's own attention answers, only for those that will come again.
    """
    for name, value in kwargs.items():
        if name == "sliding_window" and value is not None:
            raise ValueError(
                f"{model} limits full attention to a window of {value} tokens by an argument, which a compressed "
                "cache does not support"
            )
        if isinstance(value, torch.Tensor) and name not in _KNOWN_TENSORS:
            raise ValueError(f"{model} passes {name!r} to its attention, which a compressed cache does not support")
    if first:
        return
    if kwargs.get("dropout"):
        raise ValueError(
            f"{model} applies attention dropout={kwargs['dropout']} while it uses a cache; call model.eval()"
        )
    if kwargs.get("output_attentions"):
        raise ValueError(
            "output_attentions=True is not possible with a compressed cache; see kept_positions() and chunks()"
        )
    if kwargs.get("is_causal") is False:
        raise ValueError(
            f"{model} attends in both directions (is_causal=False), which a compressed cache does not support"
        )


class HybridLayer(LinearAttentionLayer, CompressedLayer):
    """A compressed layer of a model that runs linear attention or a state-space model beside full attention in one
    layer (Falcon-H1, Zamba2). Its states are held as Transformers holds them.
    """

    is_compileable = False
    saved_names = (*CompressedLayer.saved_names, *vars(LinearAttentionLayer()))

    def __init__(self, index: int, model: str, state: Any, number_of_states: int = 1):
        CompressedLayer.__init__(self, index, model, state)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Called with keys and values by position, or with states by name."""
        (CompressedLayer if args else LinearAttentionLayer).lazy_initialization(self, *args, **kwargs)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        CompressedLayer.reorder_cache(self, beam_idx)

    def crop(self, tokens: np.ndarray | int) -> None:
        LinearAttentionLayer.crop(self, tokens if isinstance(tokens, int) else -int(tokens.max()))
        CompressedLayer.crop(self, tokens)

    def empty(self, state: Any) -> None:
        CompressedLayer.empty(self, state)
        LinearAttentionLayer.__init__(self, number_of_states=self.number_of_states)
