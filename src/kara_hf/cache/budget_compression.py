"""Evicting blocks (KV-Compress): a prompt is cut to its budget when decoding begins, and kept within it from then on.

The end of a prompt shows when a single token follows. Until then everything is kept whole, so that a prompt that comes
in chunks is judged by the same queries as one that comes at once; or, with `prefill_chunk`, what has come is cut before
each further chunk, so that no more than the budget and one chunk is ever held. Where `generate` says that a prompt is
complete and no row depends on another, each layer is cut as soon as it has been read, to what a pass over all layers
would leave of it, so that at most one layer ever holds the whole prompt.

What is evicted is chosen over all layers and heads of a sequence, in passes between steps. There is one every
`block_size` tokens, in which every row takes exactly one block more; a clock that all sequences share, and no row's own
state, says when, so that a sequence is treated alike whatever batch it is in and whatever was forked.
"""

import sys
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..config import Pins
from ..policy import Eviction, KVCompressPolicy, moves
from ..storage import PoolExhausted, Prompt, RoundedStore, Saved, Stored, paged_store
from .budget_cap import BudgetCap, rows_of
from .compression import Compression
from .layer import CompressedLayer
from .pending_queries import PendingQueries
from .rounding import Rounding
from .sequence import Kind, Segment, Sequence
from .state import CacheState
from .step import Step

Filling = tuple[CompressedLayer, Stored, tuple[Any, ...]]  # a layer, the store for its prompt, and what `fill` takes


class BudgetCompression(Compression):
    """`kara_hf.cache.compression.Compression` by blocks of all layers and heads, as `KVCompressPolicy` says."""

    def __init__(self, state: CacheState, policy: KVCompressPolicy):
        self.state, self.policy, self.config = state, policy, policy.config
        self.block_size = policy.config.block_size
        self.until = 0  # columns of the cache at which the next pass is due
        self.decoding = False
        self.voting = False
        self.layerwise = False  # whether each layer is cut when this step is done with it
        self.rounding = Rounding.of(self.config, self.config.protected, state.sharing, state.steady)
        self.cap = BudgetCap(state, self.rounding, self.block_size)

    def layer_state(self) -> PendingQueries:
        return PendingQueries(self.state.meter)

    @property
    def undecided(self) -> bool:
        """Whether the newest tokens are a prompt or turn that was not cut yet."""
        return self.state.compressed_layers[0].state.undecided > 0

    @property
    def _pins(self) -> list[Pins]:
        return [sequence.pins for sequence in self.state.sequences]

    @property
    def decoded_vote(self) -> bool:
        """Whether the queries of decoded tokens vote."""
        return self.config.accumulate and self.policy.votes

    # ------------------------------------------------------------------------------------------------------ in a step
    def begin(self, step: Step) -> None:
        state = self.state
        newest = (self.policy.newest(s.tokens, s.pins) for s in state.sequences)
        drafts = step.drafts and 1 < step.new <= 1 + min(newest)
        self.decoding = not step.first and (step.new == 1 or drafts or step.replayed)
        # Drafts do not vote: those that are refused could not take their votes back.
        self.voting = self.decoding and not drafts and self.decoded_vote
        self.layerwise = step.first and step.complete and self._rows_are_apart
        if self.decoding and self.steps_to_compression() < step.new:
            self.compress(step.new)
        elif not step.first and not self.decoding and self.config.prefill_chunk is not None:
            self._pass(step.new, 0)
        elif not step.first:
            self._make_room(step.new)
        step.after = [s.extended(int(n), whole=False) for s, n in zip(state.sequences, step.counts, strict=True)]
        every = not self.decoding and self.policy.votes and self.config.observation is None
        if self.voting or every:
            step.after = [s.voted(int(n)) for s, n in zip(step.after, step.counts, strict=True)]

    def new_store(self, layer: CompressedLayer, keys: torch.Tensor, values: torch.Tensor) -> Prompt:
        layer.proximal(keys.shape[1])  # says at once if the sharing does not fit
        return Prompt(self.state.meter)

    def metric_power(self, step: Step) -> int | None:
        return self.policy.power if self.voting else None

    def stored(
        self, layer: CompressedLayer, step: Step, query: torch.Tensor, key: torch.Tensor, present: torch.Tensor | None
    ) -> None:
        if present is not None:
            raise ValueError(
                f"layer {layer.index} of {self.state.binding.name} keeps one latent row for all its heads (multi-head "
                "latent attention), so there is nothing to evict by head; use KaraCache for this model"
            )
        if self.decoding or not self.policy.votes:
            return
        real = None if step.real is None else step.real.to(query.device)
        if self.config.observation is not None:
            layer.state.add(query, real, self.config.observation)
            return
        for sequence in range(len(query)):
            chosen = query[sequence] if real is None else query[sequence, :, real[sequence]]
            if chosen.shape[1]:
                self._vote(layer, sequence, chosen)

    def layer_done(self, layer: CompressedLayer, step: Step) -> None:
        if self.layerwise:
            layer.state.commit(step.new)
            step.after = self._count_votes([layer], step.after)
            dropped = self._dropped(layer, step) if self.policy.compresses else None
            self._fill(*self._in_blocks(layer, dropped, self.block_size, True, step.after))
            layer.state.undecided = 0

    def done(self, step: Step) -> list[Sequence]:
        if self.layerwise:
            self.until = self.state.columns + step.new + self.block_size
        elif not self.decoding:
            for layer in self.state.compressed_layers:
                layer.state.commit(step.new)
        return step.after

    @property
    def _rows_are_apart(self) -> bool:
        """Whether what a row keeps of a prompt depends on no other row, and not on the memory that others take."""
        alike = self.config.levels == 1 or not self.policy.compresses
        return alike and self.state.sharing is None and self.state.meter.max_bytes is None

    def _dropped(self, layer: CompressedLayer, step: Step) -> torch.Tensor | None:
        """Which slots of its prompt a layer gives up, ``[B, H, S]`` bool, if all others are like it; None: no slot."""
        lengths, stored = layer.stored().lengths, [other for other in step.stored if other < layer.index]
        heads, rows = lengths.shape[1], lengths.shape[1] * len(self.state.compressed_layers)
        tokens, pins = np.array([s.tokens for s in step.after]), [s.pins for s in step.after]
        more = rows if self.config.continual else 0
        quota = self.policy.quota(tokens, rows, -(-tokens // self.block_size) * rows, more, pins)
        if not quota.any():
            return None
        metric, positions = self._ranked(layer)
        chosen = self.policy.evict(
            metric,
            positions,
            torch.from_numpy(lengths).to(metric.device),
            tokens,
            -(-quota // rows) * heads,
            voters=[s.voters for s in step.after],
            pins=pins,
            first_row=sum(self.state.layers[other].stored().lengths.shape[1] for other in stored),
        )
        step.after = _settled_where(step.after, chosen.freed.sum(1).tolist())
        return chosen.dropped

    # ------------------------------------------------------------------------------------------------------- a pass
    def compress(self, ahead: int = 1) -> None:
        """Cuts every sequence to its budget less what `ahead` tokens, at least a block, take, and makes room for them.

        Without continual eviction the whole budget is the prompt's, and the cache grows behind it.
        """
        ahead = max(ahead, self.block_size)
        self._pass(ahead, ahead if self.config.continual else 0)
        if self.rounding is not None:  # goes on with the clock, whatever is evicted
            self.until = self.state.columns + ahead

    def _make_room(self, tokens: int) -> None:
        """Makes room for more of a prompt, or for tokens before the next pass; under a cap by evicting, if need be."""
        try:
            if self.undecided:
                self._carry_out(0)
            if self.state.room < tokens:  # arranged at once for all tokens until the next pass, at most a block of them
                self.state.reserve(max(tokens, min(self.block_size, self.steps_to_compression())))
        except PoolExhausted:
            if not self.policy.compresses:
                raise
            self._pass(tokens, 0)

    def _pass(self, ahead: int, counted: int) -> None:
        """Cuts every sequence to its budget less what `counted` tokens take of it, and makes room for `ahead`."""
        state, layers = self.state, self.state.compressed_layers
        self._carry_out(ahead, self._choose(ahead, counted) if self.policy.compresses else None, settles=True)
        for layer in layers:
            layer.state.undecided = 0
        if self.rounding is not None:
            self.rounding.round_settled(layers, state.sequences)
        self.until = state.columns + counted
        try:
            state.reserve(ahead)
        except PoolExhausted:  # layers that lost much may hold free blocks that others need
            for layer in layers:
                layer.paged().free_blocks()
            state.reserve(ahead)

    def _count_votes(self, layers: list[CompressedLayer], sequences: list[Sequence]) -> list[Sequence]:
        """Adds to the metric what the newest queries of a prompt or turn say; they are not needed afterwards. Returns
        the sequences with them among their voters.
        """
        counts = [0] * len(sequences)
        for layer in layers:
            for sequence in range(len(counts)):
                queries = layer.state.of(sequence)
                if queries is not None:
                    self._vote(layer, sequence, queries)
                    counts[sequence] = queries.shape[1]
            layer.state.close()
        return [s.voted(count) for s, count in zip(sequences, counts, strict=True)]

    def _vote(self, layer: CompressedLayer, sequence: int, queries: torch.Tensor) -> None:
        """Adds to the metric of a sequence what its newest `queries` ``[Hq, n, D]`` say about all its tokens."""
        store, group = layer.stored(), len(queries) // layer.stored().lengths.shape[1]
        observe = partial(self.policy.observe, scaling=layer.scaling, softcap=layer.softcap)
        if isinstance(store, Prompt):
            store.add_metric(sequence, observe(queries, store.keys_of(sequence), sink_logits=layer.sink_logits))
            return
        for head in range(store.lengths.shape[1]) if layer.deciding is None else layer.deciding:
            members = slice(head * group, (head + 1) * group)
            keys, _, positions = store.read(sequence, head)
            order = positions.argsort()
            sink_logits = None if layer.sink_logits is None else layer.sink_logits[members]
            seen = observe(queries[members], keys[order][None], sink_logits=sink_logits)[0]
            store.add_metric(sequence, head, torch.empty_like(seen).scatter_(0, order, seen))

    def _choose(self, ahead: int, counted: int) -> Eviction | None:
        """What the budget and the cap ask for, or None if that is nothing."""
        if self.undecided:
            self.state.sequences = self._count_votes(self.state.compressed_layers, self.state.sequences)
        lengths = np.concatenate([layer.stored().lengths for layer in self.state.compressed_layers], axis=1)
        tokens = np.array([sequence.tokens for sequence in self.state.sequences])
        blocks, rows = -(-lengths // self.block_size), lengths.shape[1]
        quota = np.zeros(len(tokens), np.int64)
        if self.undecided or self.config.continual:
            quota = self.policy.quota(tokens, rows, blocks.sum(1), rows * -(-counted // self.block_size), self._pins)
        eviction = self._rank(lengths, tokens, quota) if quota.any() else None
        excess = self.cap.blocks_past(lengths if eviction is None else eviction.lengths.cpu().numpy(), ahead)
        if excess > 0:  # what the cap asks for comes from all sequences, in proportion to what they can spare
            least = self.policy.least_blocks(tokens, self._pins)[:, None]
            spare = np.maximum(0, np.maximum(0, blocks - least).sum(1) - quota)
            more = np.minimum(spare, -(-excess * spare // max(1, spare.sum())))
            if more.any():
                eviction = self._rank(lengths, tokens, quota + more)
        return eviction

    def _rank(self, lengths: np.ndarray, tokens: np.ndarray, quota: np.ndarray) -> Eviction:
        """What each sequence gives up: rows of all layers side by side, filled up to the longest."""
        device = self.state.compressed_layers[0].stored().device
        ranked = [self._ranked(layer) for layer in self.state.compressed_layers]
        longest = max(metric.shape[2] for metric, _ in ranked)
        metric, positions = (
            torch.cat([F.pad(part, (0, longest - part.shape[2])).to(device) for part in parts], dim=1)
            for parts in zip(*ranked, strict=True)
        )
        lead, voters = self._leads(), [sequence.voters for sequence in self.state.sequences]
        if lead is None:
            counts = torch.from_numpy(lengths).to(device)
            return self.policy.evict(metric, positions, counts, tokens, quota, voters=voters, pins=self._pins)
        rows, back, weights = (
            torch.from_numpy(part) for part in np.unique(lead, return_inverse=True, return_counts=True)
        )
        rows, back, weights = rows.to(device), back.to(device), weights.to(device)
        chosen = self.policy.evict(
            metric.index_select(1, rows),
            positions.index_select(1, rows),
            torch.from_numpy(lengths).to(device).index_select(1, rows),
            tokens,
            quota,
            weights,
            voters,
            self._pins,
        )
        return Eviction(*(part.index_select(1, back) for part in (chosen.freed, chosen.lengths, chosen.dropped)))

    def _ranked(self, layer: CompressedLayer) -> tuple[torch.Tensor, torch.Tensor]:
        """What a layer's tokens are worth and their true positions, each ``[B, H, N]``; behind a row's length anything.

        Asked for once in every choice, of all layers.
        """
        return layer.stored().ranked()

    def _leads(self) -> np.ndarray | None:
        """For each row of a sequence, over all layers, the row that decides for it, ``[R]``; None: itself."""
        sharing = self.state.sharing
        if sharing is None:
            return None
        first = {layer.index: rows.start for layer, rows in rows_of(self.state)}
        leads = [
            first[sharing.lead[layer.index][head]] + head
            for layer in self.state.compressed_layers
            for head in range(sharing.heads)
        ]
        return np.array(leads)

    def _carry_out(self, ahead: int, eviction: Eviction | None = None, settles: bool = False) -> None:
        """Evicts what was chosen, and puts a prompt into blocks without it, with room for `ahead` tokens in every row.
        What is left of it may be rounded if that `settles` it.

        Raises `PoolExhausted` before anything changes.
        """
        plan: list[Filling] = []
        try:
            for layer, rows in rows_of(self.state):
                if isinstance(layer.store, Prompt):
                    dropped = None if eviction is None else eviction.dropped[:, rows]
                    plan.append(self._in_blocks(layer, dropped, ahead, settles, self.state.sequences))
            self.state.meter.require(sum(store.fill_bytes(*what) for _, store, what in plan))
            if eviction is not None:
                # Under a cap what one layer frees may be what another needs.
                self._evict(eviction, ahead if self.state.meter.max_bytes is None else 0)
            while plan:
                self._fill(*plan[0])
                del plan[0]
        except BaseException:
            for _, store, _ in plan:
                store.close()
            raise

    def _in_blocks(
        self, layer: CompressedLayer, dropped: torch.Tensor | None, ahead: int, settles: bool, sequences: list[Sequence]
    ) -> Filling:
        """The empty store that a layer's prompt goes to without the slots that are `dropped`, and what fills it."""
        prompt = layer.stored()
        assert isinstance(prompt, Prompt)
        kept = prompt.kept(None if dropped is None else dropped.to(prompt.device))
        beside: tuple[torch.Tensor, ...] = ()
        if self.rounding is not None:
            beside = (self.rounding.settled(sequences, prompt.positions[:, None], kept & settles, 0),)
        return layer, self.empty_store(layer, prompt.keys, prompt.values), (prompt.real, kept, ahead, *beside)

    def _fill(self, layer: CompressedLayer, store: Stored, what: tuple[Any, ...]) -> None:
        """Puts a layer's prompt into `store`."""
        prompt = layer.stored()
        assert isinstance(prompt, Prompt)
        store.fill(prompt.keys, prompt.values, prompt.positions, prompt.metric, *what)
        layer.store = store
        prompt.close()

    def _evict(self, eviction: Eviction, ahead: int) -> None:
        """Moves what stays in the layers that are in blocks, and frees what `ahead` tokens more do not need."""
        freed, lengths = (part.cpu().numpy() for part in (eviction.freed, eviction.lengths))
        # First, so that nobody takes a sequence for whole should something fail on the way.
        self.state.sequences = _settled_where(self.state.sequences, freed.sum(1).tolist())
        for layer, rows in rows_of(self.state):
            store = layer.stored()
            if not isinstance(store, Prompt) and freed[:, rows].any():
                for part, gone in store.parts(eviction.dropped[:, rows].to(store.device)):
                    after = torch.from_numpy(part.lengths).to(part.device) - gone.sum(2)
                    grows = part is (store.whole if isinstance(store, RoundedStore) else store)
                    part.evict(*moves(gone, after), after.cpu().numpy(), ahead if grows else 0)

    def empty_store(self, layer: CompressedLayer, keys: torch.Tensor, values: torch.Tensor) -> Stored:
        sizes = keys.shape[-1], values.shape[-1]
        whole = paged_store(
            keys.shape[:2],
            sizes,
            dtypes=(keys.dtype, values.dtype),
            device=keys.device,
            block_size=self.block_size,
            meter=self.state.meter,
            metric=self.policy.compresses,
            tight=self.policy.compresses and self.config.continual,
            steady=self.state.steady,
            **layer.proximal(keys.shape[1]),
        )
        if self.rounding is None:
            return whole
        return self.rounding.store(whole, layer, sizes, self.state.meter, ordered=not self.policy.compresses)

    # -------------------------------------------------------------------------------------------------- what is known
    def steps_to_compression(self) -> int:
        if self.undecided:
            return 0
        if self.rounding is None and not self.policy.compresses:
            return sys.maxsize
        passes = self.rounding is not None or self.config.continual
        steps = self.until - self.state.columns if passes else sys.maxsize
        # Under a cap, making room may take a pass.
        return steps if self.state.meter.max_bytes is None else min(steps, self.state.room)

    def replayable_steps(self) -> int:
        steps = self.steps_to_compression()
        return steps if steps > 0 else self.block_size  # a pass comes before its tokens, and is for so many

    def capturable_steps(self) -> int:
        return 0 if self.undecided else min(self.steps_to_compression(), self.state.room)

    def decoded(self, sequence: Sequence) -> Sequence:
        longer = sequence.extended(1, whole=False)
        return longer.voted(1) if self.decoded_vote else longer

    def constants(self) -> tuple[torch.Tensor | None, ...]:
        return ()

    def limits(self, sequence: Sequence) -> list[tuple[int, Kind]]:
        recent = max(0, sequence.tokens - self.policy.newest(sequence.tokens, sequence.pins))
        sealed = sequence.segments[-1].stop if sequence.segments else 0
        return [(min(sealed, recent), "sealed"), (recent, "open"), (sequence.tokens, "recent")]

    def saved(self) -> Saved:
        return {"until": self.until}

    def restore(self, saved: Saved) -> None:
        self.until = int(saved["until"])

    def splits(self, number: int, cropped: Sequence) -> bool:
        return False

    def uncroppable(self, number: int, sequence: Sequence, count: int) -> str:
        return (
            f"crop({-count}) would reach behind the last eviction, {sequence.open} tokens ago in sequence {number}: "
            "what was evicted then is gone. Crop fewer tokens, or reset() the cache"
        )


def _settled_where(sequences: list[Sequence], freed: list[int]) -> list[Sequence]:
    """The sequences, settled as a whole where they gave up blocks."""
    return [
        replace(s, open=0, segments=(Segment("sealed", 0, s.tokens, 0),)) if count else s
        for s, count in zip(sequences, freed, strict=True)
    ]
