"""One compressed layer: what happens between a model's `update` and the answer of its attention."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from transformers.cache_utils import CacheLayerMixin

from ..integration.attention import AttentionFunction, CarriedKey, StoredLength
from ..kernels import Proximal, attend, attend_masked, attend_shared, lead_scores, shared_attention
from ..policy.sharing import PoDSharing
from ..storage import PagedStore, Prompt
from .sequence import Sequence

if TYPE_CHECKING:
    from .compressed import CompressedCache

# Arguments of attention functions that are tensors and are honoured, or do not matter to attention over a store.
_KNOWN_TENSORS = {"s_aux", "position_ids", "cache_position", "position_embeddings", "cu_seq_lens_q", "cu_seq_lens_k"}
FIRST_DRAFTS = 64  # tokens behind a prompt that may be drafts, and must be croppable where layers share keys
_EVERYTHING = torch.iinfo(torch.int32).max


@dataclass
class Step:
    """One forward in progress.

    Attributes:
        new: columns that it brings, padding included.
        first: whether the cache was empty before.
        last_layer: the layer that took its keys last.
        waiting: whether that layer's attention has not answered yet.
        looks: whether values may be read back from the device. A decode step on a GPU does not wait for any.
        real: which columns hold a token, ``[B, S]`` bool; None where all do.
        counts: tokens of each sequence, ``[B]``; upper bounds in a step that does not look.
        positions: true positions, ``[B, S]`` int32.
        drafts: whether its tokens may be drafts, which `crop` may take back.
        after: the sequences once the step is done.
        appended: layers that have stored its tokens.
        before: what Transformers' own layers held before it.
        scores: logits of leads for their followers in a decode step, by device; see `kara_hf.kernels.attend_shared`.
        leads: in other steps queries ``[B, Hq, S, D]``, stored keys ``[B, H, T, D]`` or None and new keys
            ``[B, H, S, D]`` of leads, by layer.
    """

    new: int
    first: bool
    last_layer: int = -1
    waiting: bool = False
    complete: bool = False
    prepared: bool = False
    looks: bool = True
    real: torch.Tensor | None = None
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    positions: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    drafts: bool = False
    after: list[Sequence] = field(default_factory=list)
    appended: list["StoreLayer"] = field(default_factory=list)
    before: dict[int, dict[str, Any]] = field(default_factory=dict)
    scores: dict[torch.device, torch.Tensor] = field(default_factory=dict)
    leads: dict[int, tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]] = field(default_factory=dict)

    def close(self) -> None:
        """Marks the step as committed and lets go of its tensors."""
        self.complete, self.real, self.positions = True, None, torch.zeros(0)
        self.scores, self.leads = {}, {}

    def hidden_on(self, device: torch.device) -> torch.Tensor | None:
        """How many of the newest stored tokens each new one must not see, ``[B, S]`` int32: none of those behind it,
        and nothing at all if it is padding. None where no token is padding.
        """
        if self.real is None:
            return None
        real = self.real.to(device)
        behind = real.sum(1, keepdim=True, dtype=torch.int32) - real.cumsum(1, dtype=torch.int32)
        return behind.masked_fill(~real, _EVERYTHING)

    def real_counts(self) -> np.ndarray:
        """Tokens of each sequence, ``[B]``, exact."""
        return self.counts if self.looks or self.real is None else self.real.sum(1).cpu().numpy()


class LayerState(Protocol):
    """What a compression holds in one layer beside the store."""

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


class StoreLayer(CacheLayerMixin):
    """One full-attention layer of a `CompressedCache`: its store, its attention, and what its compression holds."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: "CompressedCache", index: int, sharing: PoDSharing | None = None):
        super().__init__()
        self.cache, self.index, self.sharing = cache, index, sharing
        self.followers = () if sharing is None else sharing.followers(index)
        self.leading = () if sharing is None else sharing.leading(index)
        # KV heads in which this layer decides for itself what is kept; None: all.
        self.deciding: tuple[int, ...] | None = None
        if sharing is not None:
            self.deciding = tuple(head for head in range(sharing.heads) if head not in self.followers)
        self.store: PagedStore | Prompt | None = None
        self.state: Any = cache.compression.layer_state()
        self.scaling: float = 1.0
        self.softcap: float | None = None
        self.sink_logits: torch.Tensor | None = None
        self.latent = False
        self.pending: tuple[torch.Tensor, torch.Tensor] | None = None

    # ------------------------------------------------------------------------------- what Transformers asks of a layer
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Holds the new keys ``[B, H, S, Dk]`` and values ``[B, H, S, Dv]`` until attention takes them.

        Where the model expands what the cache holds before it attends (multi-head latent attention), returns everything
        stored with the new tokens behind it; otherwise the new tokens.
        """
        self.is_initialized = True
        self.pending = (key_states.detach(), value_states.detach())
        if self.latent and self.store is not None:
            past_keys, past_values = self.paged().rows().dense()
            key_states = torch.cat([past_keys, key_states], dim=2)
            value_states = torch.cat([past_values, value_states], dim=2)
        return CarriedKey.of(key_states, self), value_states

    def get_seq_length(self) -> int:
        return self.cache.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return StoredLength(self.cache.columns + query_length), 0

    def get_max_length(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.fork(beam_idx.cpu().numpy())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.fork(np.arange(len(self.cache.sequences)).repeat(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.fork(indices.cpu().numpy())

    # --------------------------------------------------------------------------------------------------- one attention
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
        """Stores the pending tokens and attends over everything stored; see `kara_hf.integration.attention.Layer`."""
        cache = self.cache
        try:
            step = cache._prepare(self, module, query, attention_mask, transformed)
            self.scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
            self.softcap, self.sink_logits = kwargs.get("softcap"), kwargs.get("s_aux")
            settings: dict[str, Any] = {
                "scaling": self.scaling,
                "softcap": self.softcap,
                "sink_logits": self.sink_logits,
            }
            present = self._present(step, key.shape[2], key.device) if self.latent else None
            if not step.first:
                _refuse(kwargs, cache.binding.name)
            if self.sharing is not None and (self.followers or self.leading) and present is not None:
                raise ValueError(
                    f"layer {self.index} of {cache.binding.name} keeps one latent row for all its heads (multi-head "
                    "latent attention), whose keys cannot be shared by head"
                )
            if step.first and not (self.followers and self.sharing and self.sharing.prefill == "pod"):
                self._hand_on(step, query, None, key)
                result = own(module, query, key, value, attention_mask, **kwargs)
                self._append(step, query, key, present)
            else:
                if present is not None:
                    out = attend_masked(query, key, value, _causal(present, step.new), **settings)
                    self._append(step, query, key, present)
                elif self.sharing is not None and (self.followers or self.leading):
                    out = self._attend_shared(self.sharing, step, query, key, value, settings)
                else:
                    out = self._attend_stored(step, query, key, settings)
                result = out.transpose(1, 2).contiguous(), None
            cache._finish(self, step)
        except BaseException:
            cache._take_back()
            raise
        return result

    def _attend_stored(
        self, step: Step, query: torch.Tensor, key: torch.Tensor, settings: dict[str, Any]
    ) -> torch.Tensor:
        """Attention over everything stored, the new tokens among it."""
        self._append(step, query, key, None)
        observe = self.cache.compression.observes(step)
        hidden = None if step.new == 1 and observe is None else step.hidden_on(query.device)
        return attend(query, self.paged().rows(), num_unseen=hidden, metric_power=observe, **settings)

    def _attend_shared(
        self,
        sharing: PoDSharing,
        step: Step,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        settings: dict[str, Any],
    ) -> torch.Tensor:
        """The same where heads of this layer follow others, or lead them."""
        positions = step.positions.to(query.device)
        if step.real is not None:
            positions = positions.masked_fill(~step.real.to(query.device), -1)
        if step.new == 1 and not step.first:
            own = sharing.distant_query == "own"
            if own and not self.followers:
                return self._attend_stored(step, query, key, settings)
            self._append(step, query, key, None)
            scores = step.scores.get(query.device)
            if own:
                leads = [self.cache.layer(sharing.lead[self.index][head]).paged().rows() for head in self.followers]
                scores = lead_scores(query, leads, self.followers, scaling=self.scaling, softcap=self.softcap)
            out, step.scores[query.device] = attend_shared(
                query,
                self.paged().rows(),
                scores,
                positions=positions,
                leading=() if own else self.leading,
                skip=sharing.skip,
                metric_power=self.cache.compression.observes(step),
                **settings,
            )
            return out

        # Several queries have several sets of proximal tokens, and the oldest keys go when the new ones come: attention
        # is over what was stored and the new tokens behind it.
        keys, values, places, past = key, value, positions[:, None], None
        if self.store is not None:
            rows = self.paged().rows()
            past = rows.dense_keys()
            keys, values = torch.cat([past, key], 2), torch.cat([rows.dense()[1], value], 2)
            before = rows.dense_positions()
            places = torch.cat([before, places.expand(-1, before.shape[1], -1)], 2)
        self._hand_on(step, query, past, key)
        if not self.followers:
            return self._attend_stored(step, query, key, settings)
        group = query.shape[1] // sharing.heads
        queries, lead_keys = [], []
        for head in self.followers:
            lead_query, stored, new = step.leads[sharing.lead[self.index][head]]
            source = lead_query if sharing.distant_query == "lead" else query
            queries.append(source[:, head * group : (head + 1) * group])
            shared = new[:, head : head + 1]
            if stored is not None:  # another head of the lead may hold more or less than any of this layer
                columns = keys.shape[2] - step.new
                stored = stored[:, head : head + 1, :columns]
                shared = torch.cat([F.pad(stored, (0, 0, 0, columns - stored.shape[2])), shared], 2)
            lead_keys.append(shared)
        out = shared_attention(
            query,
            keys,
            values,
            torch.cat(queries, 1),
            torch.cat(lead_keys, 1),
            followers=self.followers,
            query_positions=positions,
            key_positions=places,
            proximal=Proximal(sharing.sinks, sharing.recent),
            skip=sharing.skip,
            **settings,
        )
        for lead in set(sharing.lead[self.index]):
            if sharing.last_follower(lead) == self.index:
                step.leads.pop(lead, None)
        self._append(step, query, key, None)
        return out

    def _hand_on(self, step: Step, query: torch.Tensor, past: torch.Tensor | None, key: torch.Tensor) -> None:
        """Leaves queries and keys of several tokens for the layers that follow this one, where they will be asked."""
        if self.leading and self.sharing is not None and not (step.first and self.sharing.prefill == "dense"):
            step.leads[self.index] = query, past, key

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

    def _append(self, step: Step, query: torch.Tensor, key: torch.Tensor, present: torch.Tensor | None) -> None:
        """Stores the pending tokens, and lets the compression hold what it needs of them."""
        assert self.pending is not None
        keys, values = self.pending
        real = None if step.real is None else step.real.to(keys.device)
        if step.looks:
            self._check_finite(keys, values, real)
        if self.store is None:
            self.store = self.cache.compression.new_store(self, keys, values)
            if step.drafts and isinstance(self.store, PagedStore):
                self.store.widen(FIRST_DRAFTS)
        self.store.append(keys, values, step.positions.to(keys.device), real, sync=step.looks)
        step.appended.append(self)
        self.cache.compression.stored(self, step, query.detach(), key.detach(), present)
        self.pending = None
        step.waiting = False

    def _check_finite(self, keys: torch.Tensor, values: torch.Tensor, real: torch.Tensor | None) -> None:
        total = keys.sum(dtype=torch.float32) + values.sum(dtype=torch.float32)
        if math.isfinite(total.item()):  # one cheap look; a sum may overflow where no element does
            return
        finite = keys.isfinite().all(-1).all(1) & values.isfinite().all(-1).all(1)
        if not bool((finite if real is None else finite | ~real).all()):
            raise ValueError(
                f"keys or values of layer {self.index} are NaN or infinite; load the model in bfloat16 or float32"
            )

    # ----------------------------------------------------------------------------------------------------- its storage
    def proximal(self, heads: int) -> dict[str, Any]:
        """The arguments of `PagedStore` that say which of its `heads` follow, and what is proximal to them."""
        if self.sharing is None:
            return {}
        if heads != self.sharing.heads:
            raise ValueError(
                f"layer {self.index} of {self.cache.binding.name} stores {heads} KV heads and the sharing is for "
                f"{self.sharing.heads}; make one for this model with `kara-hf pod explore`"
            )
        return {"followers": self.followers, "proximal": Proximal(self.sharing.sinks, self.sharing.recent)}

    def proximal_places(self, tokens: int) -> int:
        """Keys of `tokens` tokens that followers store at most."""
        size = self.cache.compression.block_size
        return 0 if self.sharing is None else min(self.sharing.proximal, -(-tokens // size) * size)

    def stored(self) -> PagedStore | Prompt:
        assert self.store is not None, "nothing is stored yet"
        return self.store

    def paged(self) -> PagedStore:
        assert isinstance(self.store, PagedStore), "the prompt is not in blocks yet"
        return self.store

    def crop(self, tokens: np.ndarray) -> None:
        """Drops the newest `tokens` ``[B]`` of every sequence."""
        self.stored().crop(tokens)
        self.state.crop(tokens)

    def commit(self) -> None:
        """The step that appended last will not be taken back."""
        if isinstance(self.store, PagedStore):
            self.store.commit()

    def fork_bytes(self, index: np.ndarray) -> int:
        """Bytes that `fork` takes."""
        return self.state.fork_bytes(index) + (0 if self.store is None else self.store.fork_bytes(index))

    def fork(self, index: np.ndarray) -> None:
        """Makes sequence i the same as sequence ``index[i]`` was."""
        if self.store is not None:
            self.store.fork(index)
        self.state.fork(index)

    def clear(self) -> None:
        if self.store is not None:
            self.store.close()
        self.state.close()
        self.store, self.state = None, self.cache.compression.layer_state()
        self.discard_step()
        self.is_initialized = False

    def discard_step(self) -> None:
        """Forgets what belongs to a step alone."""
        self.pending = None
        self.state.discard_step()

    def reset(self) -> None:
        self.clear()


def _causal(present: torch.Tensor, new: int) -> torch.Tensor:
    """Which keys each of the `new` newest queries sees, ``[B, 1, S, M]`` bool, of those `present` ``[B, M]``."""
    keys = present.shape[1]
    causal = torch.ones(new, keys, dtype=torch.bool, device=present.device).tril(keys - new)
    return present[:, None, None] & causal


def _refuse(kwargs: dict[str, Any], model: str) -> None:
    """Raises ValueError for arguments of an attention function that attention over a store would leave out."""
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
    for name, value in kwargs.items():
        if name == "sliding_window" and value is not None:
            raise ValueError(
                f"{model} limits full attention to a window of {value} tokens by an argument, which a compressed "
                "cache does not support"
            )
        if isinstance(value, torch.Tensor) and name not in _KNOWN_TENSORS:
            raise ValueError(f"{model} passes {name!r} to its attention, which a compressed cache does not support")
