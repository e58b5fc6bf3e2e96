"""One compressed layer: what happens between a model's `update` and the answer of its attention."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.cache_utils import CacheLayerMixin

from .attention import AttentionFunction, CarriedKey, StoredLength
from .kernels import attend, attend_masked
from .policy import Window
from .sequence import Sequence
from .storage import PagedStore, QueryBuffer

if TYPE_CHECKING:
    from .cache import CompressedCache

# Arguments of attention functions that are tensors and are honoured, or do not matter to attention over a store.
_KNOWN_TENSORS = {"s_aux", "position_ids", "cache_position", "position_embeddings", "cu_seq_lens_q", "cu_seq_lens_k"}


@dataclass
class Step:
    """One forward in progress."""

    new: int
    first: bool
    last_layer: int = -1
    waiting: bool = False
    complete: bool = False
    prepared: bool = False
    real: torch.Tensor | None = None
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    pinned: bool = False
    positions: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    open: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    after: list[Sequence] = field(default_factory=list)
    due: int = 0
    appended: list["StoreLayer"] = field(default_factory=list)
    before: dict[int, dict[str, Any]] = field(default_factory=dict)

    def close(self) -> None:
        """Marks the step as committed and lets go of its tensors."""
        self.complete, self.real, self.positions = True, None, torch.zeros(0)

    def hidden_on(self, device: torch.device) -> torch.Tensor | None:
        """How many newer real tokens each new token must not see, ``[B, S]`` int32; None where no token is padding."""
        if self.real is None:
            return None
        real = self.real.to(device)
        return (real.sum(1, keepdim=True) - real.cumsum(1)).to(torch.int32)


class StoreLayer(CacheLayerMixin):
    """One full-attention layer of a `CompressedCache`: its store, the queries of its open tokens, and its attention."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: "CompressedCache", index: int):
        super().__init__()
        self.cache, self.index = cache, index
        self.store: PagedStore | None = None
        self.queries: QueryBuffer | None = None
        self.scaling: float = 1.0
        self.softcap: float | None = None
        self.latent = False
        self.expanded: torch.Tensor | None = None
        self.fresh: torch.Tensor | None = None
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
            past_keys, past_values = self.store.rows().dense()
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
        """Stores the pending tokens and attends over everything stored; see `kara_hf.attention.Layer`."""
        cache = self.cache
        try:
            step = cache._prepare(self, module, query, attention_mask, transformed)
            self.scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
            self.softcap = kwargs.get("softcap")
            if step.first:
                result = own(module, query, key, value, attention_mask, **kwargs)
                self._append(step, query, key)
            else:
                _refuse(kwargs, cache.binding.name)
                settings: dict[str, Any] = {
                    "scaling": self.scaling,
                    "softcap": self.softcap,
                    "sinks": kwargs.get("s_aux"),
                }
                if self.latent:
                    out = attend_masked(query, key, value, self._latent_mask(step, key), **settings)
                    self._append(step, query, key)
                else:
                    self._append(step, query, key)
                    out = attend(query, self.stored().rows(), hidden=step.hidden_on(query.device), **settings)
                result = out.transpose(1, 2).contiguous(), None
            cache._finish(self, step)
        except BaseException:
            cache._take_back()
            raise
        return result

    def _latent_seen(self, step: Step, keys: int, device: torch.device) -> torch.Tensor:
        """Which of the expanded keys, stored ones first and new ones behind, hold a token: ``[B, M + S]`` bool."""
        rows = None if self.store is None else self.store.rows()
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

    def _latent_mask(self, step: Step, key: torch.Tensor) -> torch.Tensor:
        """Which of the expanded keys ``[B, Hq, M + S, D]`` each new query sees: ``[B, 1, S, M + S]`` bool."""
        seen = self._latent_seen(step, key.shape[2], key.device)[:, None, None]
        causal = torch.ones(step.new, key.shape[2], dtype=torch.bool, device=key.device).tril(key.shape[2] - step.new)
        return seen & causal

    def _append(self, step: Step, query: torch.Tensor, key: torch.Tensor) -> None:
        """Stores the pending tokens, and holds what windows are scored with: queries, and keys that were expanded."""
        assert self.pending is not None
        cache = self.cache
        keys, values = self.pending
        device = keys.device
        real = None if step.real is None else step.real.to(device)
        if step.new > 1 or device.type == "cpu":  # on a GPU a decode step must not wait for the answer
            self._check_finite(keys, values, real)
        scored = cache.policy.needs_queries and not step.pinned
        due = step.due * cache.policy.config.window
        if self.latent and due:
            order = _in_order(self._latent_seen(step, key.shape[2], device))
            settled = torch.tensor([sequence.settled for sequence in step.after], device=device)[:, None]
            places = (settled + torch.arange(due, device=device)).clamp(max=key.shape[2] - 1)
            columns = order.gather(1, places)[:, None, :, None]
            self.expanded = key.gather(2, columns.expand(-1, key.shape[1], -1, key.shape[3]))
        if self.store is None:
            self.store = PagedStore(
                keys.shape[:2],
                (keys.shape[-1], values.shape[-1]),
                dtype=keys.dtype,
                device=device,
                block_size=cache.policy.config.block_size,
                meter=cache.meter,
            )
        self.store.append(keys, values, step.positions.to(device), real)
        step.appended.append(self)
        if scored and self.queries is None:
            self.queries = QueryBuffer(query.shape[0], query.shape[1], query.shape[3], query.dtype, device, cache.meter)
        if scored and step.first:  # a whole prompt's queries are at hand; only those of its open end are held
            self.fresh = query.detach()
        elif scored:
            assert self.queries is not None
            self.queries.append(query.detach(), step.open, real)
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

    def hold_open(self, step: Step) -> None:
        """After the windows of a first forward are sealed: holds the queries of what is left open."""
        query, self.fresh = self.fresh, None
        if query is None or self.queries is None:
            return
        policy = self.cache.policy
        sealed = [policy.windows_due(sequence.open) * policy.config.window for sequence in step.after]
        filled = np.zeros(len(sealed), np.int64)
        if step.real is None:
            self.queries.append(query[:, :, sealed[0] :], filled)
        else:
            real = step.real.to(query.device)
            rest = real & (real.cumsum(1) > torch.tensor(sealed, device=query.device)[:, None])
            self.queries.append(query, filled, rest)

    # ----------------------------------------------------------------------------------------------------- its storage
    def stored(self) -> PagedStore:
        assert self.store is not None, "nothing is stored yet"
        return self.store

    def select(
        self,
        step: Step,
        sequences: np.ndarray,
        settled: np.ndarray,
        windows: int,
        open_tokens: int,
        ordinals: list[int],
    ) -> torch.Tensor:
        """Slots that survive when the next `windows` windows of the named sequences seal: ``[b, H, n]`` int32."""
        policy, config, store = self.cache.policy, self.cache.policy.config, self.stored()
        width = config.window
        index = torch.from_numpy(sequences).to(store.device)
        survivors = []
        for number in range(windows):
            start = settled + number * width
            first, last = number * width, (number + 1) * width
            window = Window(
                rows=store.lengths.shape[1],
                keys=store.window(sequences, start, width)
                if self.expanded is None
                else self.expanded[index, :, first:last],
                queries=self._queries(step, index, first, last),
                scaling=self.scaling,
                softcap=self.softcap,
                layer=self.index,
                ordinals=[ordinal + number for ordinal in ordinals],
                keep=config.kept_per_window,
                anchors=config.anchors,
                seed=config.seed,
            )
            survivors.append(policy.select(window).to(torch.int32) + store.slots(start, 1))
        survivors.append(store.slots(settled + windows * width, open_tokens - windows * width))
        return torch.cat(survivors, dim=2)

    def _queries(self, step: Step, sequences: torch.Tensor, first: int, last: int) -> torch.Tensor | None:
        """Queries of the open tokens `first` to `last` of the named sequences, ``[b, Hq, last - first, D]``."""
        if self.fresh is None:
            return None if self.queries is None else self.queries.window(sequences, first, last)
        if step.real is None:
            return self.fresh[sequences, :, first:last]
        columns = _in_order(step.real.to(self.fresh.device))[sequences, first:last]
        return self.fresh[sequences[:, None], :, columns].transpose(1, 2)

    def seal(self, sequences: np.ndarray, settled: np.ndarray, windows: int, slots: torch.Tensor) -> None:
        """Keeps `slots` of the named sequences from `settled` on, and forgets the queries of their sealed windows."""
        store = self.stored()
        store.keep(sequences, settled, slots)
        if self.queries is not None and self.fresh is None:
            index = torch.from_numpy(sequences).to(store.device)
            self.queries.drop(index, windows * self.cache.policy.config.window)

    def fork_bytes(self, index: np.ndarray) -> int:
        """Bytes that `fork` takes."""
        stored = 0 if self.store is None else self.store.fork_bytes(index)
        return stored + (0 if self.queries is None else self.queries.fork_bytes(len(index)))

    def fork(self, index: np.ndarray) -> None:
        if self.store is not None:
            self.store.fork(index)
        if self.queries is not None:
            self.queries.fork(torch.from_numpy(index))

    def clear(self) -> None:
        for held in (self.store, self.queries):
            if held is not None:
                held.release()
        self.store = self.queries = None
        self.let_go()
        self.is_initialized = False

    def let_go(self) -> None:
        """Forgets what belongs to a step alone."""
        self.pending = self.expanded = self.fresh = None

    def reset(self) -> None:
        self.clear()


def _in_order(valid: torch.Tensor) -> torch.Tensor:
    """Column of the first, second, ... True of each row of `valid` ``[B, n]``; the others behind: ``[B, n]`` int64."""
    return (~valid).to(torch.int8).argsort(dim=1, stable=True)


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
