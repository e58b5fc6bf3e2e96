"""Sealing windows (Kara): queries are held while their tokens are open; a window that is due keeps its share."""

import sys

import numpy as np
import torch

from ..policy import KaraPolicy, Window
from ..storage import MemoryMeter, QueryBuffer, RoundedStore, Sampling, Saved, Stored, paged_store, upload
from .compression import Compression
from .layer import CompressedLayer
from .rounding import Rounding, round_in_order
from .sequence import Kind, Sequence
from .state import CacheState
from .step import Step

# What sequences whose windows are sealed together have in common: open tokens, how many of these are rounded, and for
# each window that is due how many of its tokens stay and how many behind it are recent.
Alike = tuple[int, int, tuple[tuple[int, int], ...]]


class WindowState:
    """What windows of one layer are scored with: queries of open tokens, and keys that were expanded in this step."""

    def __init__(self) -> None:
        self.queries: QueryBuffer | None = None
        self.fresh: torch.Tensor | None = None
        self.expanded: torch.Tensor | None = None

    @property
    def query_bytes(self) -> int:
        return 0 if self.queries is None else self.queries.nbytes

    def crop(self, tokens: np.ndarray) -> None:
        pass  # places in the buffer are counted by the open tokens of a sequence

    def fork(self, index: np.ndarray) -> None:
        if self.queries is not None:
            self.queries.fork(torch.from_numpy(index))

    def fork_bytes(self, index: np.ndarray) -> int:
        return 0 if self.queries is None else self.queries.fork_bytes(len(index))

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return () if self.queries is None else (self.queries.buffer,)

    def saved(self) -> Saved:
        return {"queries": None if self.queries is None else self.queries.saved()}

    def restore(self, saved: Saved, device: torch.device, meter: MemoryMeter) -> None:
        if saved["queries"] is not None:
            self.queries = QueryBuffer.restored(saved["queries"], device, meter)

    def discard_step(self) -> None:
        self.fresh = self.expanded = None

    def close(self) -> None:
        if self.queries is not None:
            self.queries.close()


class WindowCompression(Compression):
    """`kara_hf.cache.compression.Compression` by windows: those that are due are sealed when a step is done.

    Everything is chosen before anything is changed. A first forward is sealed layer by layer, so that at most one layer
    ever holds a whole prompt that is to be compressed.
    """

    def __init__(self, state: CacheState, policy: KaraPolicy):
        self.state, self.policy, self.config = state, policy, policy.config
        self.block_size = policy.config.block_size
        self.rounding = Rounding.of(self.config, self.config.recent, state.sharing, state.steady)
        self._width = self.config.window if policy.compresses else None
        self.open = np.zeros(0, np.int64)  # open tokens of each sequence before the step
        self.due = 0  # windows due in this step, in the sequence that has most
        self.whole = False
        self.unsure = 0  # newest tokens of this step that are drafts, and may be taken back
        self._chosen: dict[tuple[int, Alike], torch.Tensor] = {}  # by layer and group: what leads chose in this step
        self._settled: torch.Tensor | None = None  # slots in front of the open ones, [B, 1] int64, on the device
        self._tokens: torch.Tensor | None = None  # open tokens before the new one, [B, 1] int64, on the device

    def layer_state(self) -> WindowState:
        return WindowState()

    # ------------------------------------------------------------------------------------------------------ in a step
    def begin(self, step: Step) -> None:
        state, config = self.state, self.config
        drafts = step.drafts and step.new <= min(self.policy.certain(sequence) for sequence in state.sequences) + 1
        self.unsure = step.new - 1 if drafts else 0
        turn = step.new > 1 and not drafts and not step.replayed
        self.whole = (step.first or turn) and not config.compress_prompt
        self.open = np.array([sequence.open for sequence in state.sequences])
        step.after = [
            sequence.extended(int(n), self.whole) for sequence, n in zip(state.sequences, step.counts, strict=True)
        ]
        self.due = max(len(self.policy.due(sequence, self.unsure)) for sequence in step.after)
        if step.first:
            return
        ahead = step.new
        if state.steady and self.policy.compresses:
            ahead = max(ahead, self.steps_to_compression() + 1)
        elif state.steady and state.room < ahead:
            ahead = max(ahead, config.window)
        state.reserve(ahead)
        if step.syncs:
            self._settled = self._tokens = None
        elif self.policy.needs_queries:
            lengths = state.compressed_layers[0].paged().rows().lengths[:, :1]
            if self._settled is None:
                settled = np.array([[sequence.settled] for sequence in state.sequences]) - self._rounded()[:, None]
                self._settled = upload(settled, lengths.device)
            self._tokens = lengths - self._settled

    def empty_store(self, layer: CompressedLayer, keys: torch.Tensor, values: torch.Tensor) -> Stored:
        sizes, meter = (keys.shape[-1], values.shape[-1]), self.state.meter
        whole = paged_store(
            keys.shape[:2],
            sizes,
            dtypes=(keys.dtype, values.dtype),
            device=keys.device,
            block_size=self.block_size,
            meter=meter,
            steady=self.state.steady,
            **layer.proximal(keys.shape[1]),
        )
        if self.rounding is None:
            return whole
        return self.rounding.store(whole, layer, sizes, meter, ordered=not self.policy.compresses)

    def metric_power(self, step: Step) -> None:
        return None

    def stored(
        self, layer: CompressedLayer, step: Step, query: torch.Tensor, key: torch.Tensor, present: torch.Tensor | None
    ) -> None:
        state: WindowState = layer.state
        due = self.due * self.config.window
        if present is not None and due:
            order = _in_order(present)
            settled = torch.tensor([sequence.settled for sequence in step.after], device=key.device)[:, None]
            places = (settled + torch.arange(due, device=key.device)).clamp(max=key.shape[2] - 1)
            columns = order.gather(1, places)[:, None, :, None]
            state.expanded = key.gather(2, columns.expand(-1, key.shape[1], -1, key.shape[3]))
        if self.whole or not self.policy.needs_queries:
            return
        if layer.followers:  # what those keep is chosen elsewhere
            query = layer.paged().rows().of_keys(query.unflatten(1, (key.shape[1], -1))).flatten(1, 2)
        if not query.shape[1]:
            return
        real = None if step.real is None else step.real.to(query.device)
        if state.queries is None:
            batch, heads, _, size = query.shape
            group = heads // (key.shape[1] - len(layer.followers))
            sampling = Sampling(self.config.queries_held, self.config.window, group)
            state.queries = QueryBuffer(batch, heads, size, query.dtype, query.device, self.state.meter, sampling)
            if self.state.steady:
                state.queries.reserve(self._limit(step.after) + 1)
        if step.first:  # a whole prompt's queries are at hand; only those of its open end are held
            state.fresh = query
        elif self._tokens is not None:
            state.queries.reserve(int(self.open.max()) + 1)
            state.queries.put(query, self._tokens.to(query.device))
        else:
            state.queries.append(query, self.open, real)

    def layer_done(self, layer: CompressedLayer, step: Step) -> None:
        if step.first:
            self._seal([layer], step)
            self._hold_open(layer.state, step)
            self._round([layer], self._after(step))

    def done(self, step: Step) -> list[Sequence]:
        if not step.first:
            self._seal(self.state.compressed_layers, step)
        self._chosen.clear()
        after = self._after(step)
        if not step.first:
            self._round(self.state.compressed_layers, after)
        if self.due:
            self._settled = None
        return after

    def _after(self, step: Step) -> list[Sequence]:
        """The sequences once the windows that are due are sealed."""
        return [sequence.sealed(self.policy, self.unsure) for sequence in step.after] if self.due else step.after

    # -------------------------------------------------------------------------------------------------------- sealing
    def _seal(self, layers: list[CompressedLayer], step: Step) -> None:
        """Seals the windows that are due. Everything is chosen before anything is changed."""
        if not self.due or not self.policy.compresses:
            return
        groups: dict[Alike, list[int]] = {}
        rounded = self._rounded(layers[0]).tolist()
        for number, sequence in enumerate(step.after):
            due = self.policy.due(sequence, self.unsure)
            if due:
                behind = self.policy.needs_queries  # whether it matters how many are recent
                seals = tuple((seal.keep, seal.recent if behind else 0) for seal in due)
                alike = sequence.open, self._rounded_open(sequence, rounded[number]), seals
                groups.setdefault(alike, []).append(number)
        plan = []
        for alike, members in groups.items():
            index = np.array(members)
            settled = np.array([step.after[b].settled for b in members], np.int32)
            ordinals = [step.after[b].windows for b in members]
            for layer in layers:
                slots = self._select(layer, step, index, settled, alike, ordinals)
                slots = self._with_leads(layer, slots, alike)
                plan.append((layer, index, settled, len(alike[2]), slots))
        for layer, index, settled, _, slots in plan:
            layer.paged().unshare(index, settled, slots.shape[2])
        for layer, index, settled, windows, slots in plan:
            layer.paged().keep(index, settled, slots)
            state: WindowState = layer.state
            if state.queries is not None and state.fresh is None:
                state.queries.forget(torch.from_numpy(index).to(slots.device), windows * self.config.window)
        if not step.first:
            after = self._after(step)
            filled = np.array([sequence.open for sequence in after])
            for layer in layers:
                if layer.state.queries is not None:
                    layer.state.queries.shrink(filled, self._limit(after) + 1)
                    if self.state.steady:  # a share of what is held has grown
                        layer.state.queries.reserve(self._limit(after) + 1)

    # ------------------------------------------------------------------------------------------------------- rounding
    def _round(self, layers: list[CompressedLayer], sequences: list[Sequence]) -> None:
        """Rounds what has settled, and of open tokens whole windows, where there may be some."""
        if self.rounding is None:
            return
        rounded = self._rounded(layers[0]).tolist()
        if self.policy.compresses and not (self.due or self.whole):
            free = [self.rounding.open_windows(sequence, self.config.window, self.unsure) for sequence in sequences]
            if all(n <= self._rounded_open(*known) for n, *known in zip(free, sequences, rounded, strict=True)):
                return
        free = [self.rounding.free(sequence, self._width, self.unsure) for sequence in sequences]
        counts = [self.rounding.due(*known) for known in zip(free, rounded, strict=True)]
        if any(counts):
            round_in_order(layers, counts)
            self._settled = None

    def _rounded_open(self, sequence: Sequence, rounded: int) -> int:
        """How many open tokens are rounded of a sequence of which `rounded` are, where anything is compressed."""
        return 0 if self.rounding is None else self.rounding.rounded_open(sequence, rounded)

    def _rounded(self, layer: CompressedLayer | None = None) -> np.ndarray:
        """How many tokens of each sequence are rounded, ``[B]``; the same in all layers and heads."""
        store = (layer or self.state.compressed_layers[0]).paged()
        return store.records.lengths[:, 0] if isinstance(store, RoundedStore) else np.zeros(len(store.lengths), int)

    def _select(
        self,
        layer: CompressedLayer,
        step: Step,
        sequences: np.ndarray,
        settled: np.ndarray,
        alike: Alike,
        ordinals: list[int],
    ) -> torch.Tensor:
        """Slots that survive when the windows that are due in the named sequences seal, in the K heads that decide for
        themselves: ``[b, K, n]`` int32.
        """
        open_tokens, _, windows = alike
        config, store, state = self.config, layer.paged(), layer.state
        heads = store.lengths.shape[1] if layer.deciding is None else len(layer.deciding)
        if not heads:
            return torch.zeros(len(sequences), 0, 0, dtype=torch.int32, device=store.device)
        width = config.window
        index = torch.from_numpy(sequences).to(store.device)
        survivors = []
        for number, (keep, recent) in enumerate(windows):
            start = settled + number * width
            first, last = number * width, (number + 1) * width
            window = Window(
                rows=heads,
                keys=store.window(sequences, start, width)
                if state.expanded is None
                else state.expanded[index, :, first:last],
                queries=self._queries(state, step, index, first, last),
                later=self._queries(state, step, index, last, last + recent),
                scaling=layer.scaling,
                softcap=layer.softcap,
                layer=layer.index,
                sequences=sequences.tolist(),
                starts=[step.after[b].tokens - open_tokens + first for b in sequences],
                ordinals=[ordinal + number for ordinal in ordinals],
                keep=keep,
                anchors=config.anchors_of(keep),
                seed=config.seed,
                values=self._values(layer, sequences, start) if self.policy.score.values else None,
                pins=tuple(step.after[b].pins for b in sequences),
            )
            survivors.append(self.policy.select(window).to(torch.int32) + store.slots(start, 1)[:, :heads])
        survivors.append(store.slots(settled + len(windows) * width, open_tokens - len(windows) * width)[:, :heads])
        return torch.cat(survivors, dim=2)

    def _values(self, layer: CompressedLayer, sequences: np.ndarray, start: np.ndarray) -> torch.Tensor:
        """Values of a window in the heads that decide for themselves, ``[b, K, W, Dv]``."""
        values = layer.paged().window_values(sequences, start, self.config.window)
        return values if layer.deciding is None else values[:, list(layer.deciding)]

    def _with_leads(self, layer: CompressedLayer, slots: torch.Tensor, alike: Alike) -> torch.Tensor:
        """`slots` ``[b, K, n]`` of the heads that decide, with what their leads chose for the others: ``[b, H, n]``."""
        if layer.followers:
            deciding = iter(slots.unbind(1))
            leads = self.state.sharing.lead[layer.index] if self.state.sharing is not None else ()
            slots = torch.stack(
                [
                    self._chosen[lead, alike][:, head] if lead != layer.index else next(deciding)
                    for head, lead in enumerate(leads)
                ],
                dim=1,
            )
        if layer.leading:
            self._chosen[layer.index, alike] = slots
        return slots

    def _queries(
        self, state: WindowState, step: Step, sequences: torch.Tensor, first: int, last: int
    ) -> torch.Tensor | None:
        """Queries held of the open tokens `first` to `last` of the named sequences, ``[b, Hq, n, D]``."""
        if state.queries is None or state.fresh is None:
            return None if state.queries is None else state.queries.window(sequences, first, last)
        fresh, sampling = state.fresh, state.queries.sampling
        if step.real is None and sampling.every:
            return fresh[sequences, :, first:last]
        tokens = sampling.tokens_of(sampling.place(first), sampling.place(last))
        columns = torch.from_numpy(np.tile(tokens, (fresh.shape[1] // sampling.group, 1))).to(fresh.device)[None]
        if step.real is not None:
            columns = _in_order(step.real.to(fresh.device))[sequences][:, columns[0]]
        heads = torch.arange(fresh.shape[1], device=fresh.device)[None, :, None]
        return fresh[sequences[:, None, None], heads, columns]

    def _hold_open(self, state: WindowState, step: Step) -> None:
        """After the windows of a first forward are sealed: holds the queries of what is left open."""
        query, state.fresh = state.fresh, None
        if query is None or state.queries is None:
            return
        sealed = [len(self.policy.due(sequence)) * self.config.window for sequence in step.after]
        filled = np.zeros(len(sealed), np.int64)
        if step.real is None:
            state.queries.append(query[:, :, sealed[0] :], filled)
        else:
            real = step.real.to(query.device)
            rest = real & (real.cumsum(1) > torch.tensor(sealed, device=query.device)[:, None])
            state.queries.append(query, filled, rest)

    def compress(self) -> None:
        pass  # a window is sealed by the step that completes it

    # -------------------------------------------------------------------------------------------------- what is known
    def steps_to_compression(self) -> int:
        steps = self._steps_to_rounding()
        if not self.policy.compresses:
            return steps
        return min(steps, *(self.policy.open_limit(sequence) - sequence.open for sequence in self.state.sequences))

    def _steps_to_rounding(self) -> int:
        if self.rounding is None:
            return sys.maxsize
        sequences, width, near = self.state.sequences, self.config.window, self.rounding.near
        if self.policy.compresses:  # a window more is free
            free = [self.rounding.open_windows(sequence, width) for sequence in sequences]
            return min(near + n + width - sequence.open - 1 for n, sequence in zip(free, sequences, strict=True))
        free = [self.rounding.free(sequence, None) for sequence in sequences]
        return min(self.rounding.steps(*known) for known in zip(free, self._rounded().tolist(), strict=True))

    def _limit(self, sequences: list[Sequence]) -> int:
        """Most open tokens that any of the sequences has before its next window is due."""
        return max(self.policy.open_limit(sequence) for sequence in sequences)

    def replayable_steps(self) -> int:
        return max(1, self.steps_to_compression())  # the next one behind them seals before it is stored

    def capturable_steps(self) -> int:
        steps = min(self.steps_to_compression(), self.state.room)
        if self.policy.needs_queries:
            buffers = [layer.state.queries for layer in self.state.compressed_layers if layer.deciding != ()]
            tokens = min(0 if queries is None else queries.sampling.tokens(queries.places) for queries in buffers)
            steps = min(steps, tokens - max(sequence.open for sequence in self.state.sequences))
        return steps

    def decoded(self, sequence: Sequence) -> Sequence:
        return sequence.extended(1, whole=False)

    def constants(self) -> tuple[torch.Tensor | None, ...]:
        return (self._settled,)

    def limits(self, sequence: Sequence) -> list[tuple[int, Kind]]:
        recent = sequence.tokens - self.policy.newest(sequence)
        limits: list[tuple[int, Kind]] = [(segment.stop, segment.kind) for segment in sequence.segments]
        return [*limits, (recent, "open"), (sequence.tokens, "recent")]

    def splits(self, number: int, cropped: Sequence) -> bool:
        rounded = self._rounded_open(cropped, int(self._rounded()[number])) if self.policy.compresses else 0
        return cropped.open < rounded and cropped.open % self.config.window != 0

    def uncroppable(self, number: int, sequence: Sequence, count: int) -> str:
        left = sequence.open - self._rounded_open(sequence, int(self._rounded()[number]))
        return (
            f"crop({-count}) would reach into a sealed window of sequence {number}, or into one that is stored in few "
            f"bits, of which only the last {left} tokens are still open: what was evicted around sealed tokens is "
            f"gone. Crop fewer tokens, draft fewer than recent={self.config.recent} at once, or make the cache "
            "with a larger `recent`"
        )


def _in_order(valid: torch.Tensor) -> torch.Tensor:
    """Column of the first, second, ... True of each row of `valid` ``[B, n]``; the others behind: ``[B, n]`` int64."""
    return (~valid).to(torch.int8).argsort(dim=1, stable=True)
