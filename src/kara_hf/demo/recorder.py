"""Watching a cache: what it does at each step of a run goes into a recording."""

import time
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from ..cache.compressed import CompressedCache
from ..cache.sequence import Segment
from ..evaluation.measure.provenance import provenance
from ..methods.caches import ConfiguredCache
from ..policy import KaraPolicy, Window
from .recording import Recording, rounded, runs_of

SAMPLE_EVERY = 8  # tokens between two readings of `report()`, beside one at every change
BYTES = ("nominal_bytes", "resident_bytes", "peak_bytes", "full_bytes")
Scored = tuple[np.ndarray, np.ndarray]  # positions, ascending, and their scores
Ranked = tuple[np.ndarray, np.ndarray, int]  # positions, ranking and length of a row


class CacheRecorder:
    """Writes down what the cache of one run does. The policy of the cache is watched until the recorder is finished.

    Args:
        cache: a `CompressedCache`, or any other cache, which keeps everything.
        recording: what to write to.
        method: of the cache, which says what bytes one without a report holds.
    """

    def __init__(self, cache: Cache, recording: Recording, method: ConfiguredCache):
        self.recording, self.method, self.any_cache = recording, method, cache
        self.cache: CompressedCache | None = cache if isinstance(cache, CompressedCache) else None
        self._rows: list[tuple[int, int]] = []
        self._leads: list[int] = []  # for each row, the row that decides for it
        self._alive: list[np.ndarray] = []  # for each row what it kept at the last change
        self._seen = 0  # tokens seen then
        self._segments: tuple[Segment, ...] = ()
        self._windows: dict[tuple[int, int], list[tuple[int, np.ndarray]]] = {}  # since then: starts and scores, by row
        self._pass: list[Ranked] = []  # the last, row by row
        if self.cache is not None:
            policy = self.cache.policy
            if isinstance(policy, KaraPolicy):
                policy.watch = self._note_window
            else:
                policy.watch = self._note_pass

    # --------------------------------------------------------------------------------------------- what policies tell
    def _note_window(self, window: Window, scores: torch.Tensor) -> None:
        assert self.cache is not None
        deciding = self.cache.layer(window.layer).deciding
        heads = range(scores.shape[1]) if deciding is None else deciding
        for head, values in zip(heads, scores[0].float().cpu().numpy(), strict=True):
            self._windows.setdefault((window.layer, head), []).append((window.starts[0], values))

    def _note_pass(self, first_row: int, ranking: torch.Tensor, positions: torch.Tensor, lengths: torch.Tensor) -> None:
        parts = positions[0].cpu().numpy(), ranking[0].float().cpu().numpy(), lengths[0].cpu().numpy()
        self._pass[first_row:] = zip(*parts, strict=True)

    # ------------------------------------------------------------------------------------------------------- each step
    def step(self, text: str, seconds: float) -> None:
        """A forward is done, and this is the token that came of it."""
        recording, count = self.recording, len(self.recording.tokens)
        seen = recording.prompt + count
        if not count:
            self._find_rows()
        changed = self.cache is not None and self.cache.sequences[0].segments is not self._segments
        if changed:
            self._note_change(seen)
        if changed or count % SAMPLE_EVERY == 0:
            self._sample(seen)
        recording.micros.append(round(seconds * 1e6))
        recording.tokens.append(text)

    def finish(self, end: dict[str, Any]) -> None:
        """The run is over: a last reading, the scores of what survived, and how it ended."""
        recording = self.recording
        if recording.tokens and recording.samples[-1][0] != recording.seen:
            self._sample(recording.seen)
        if self._pass:
            kept = [self._scored(row, alive) for row, alive in enumerate(self._alive)]
            self._write(recording.seen, [], [np.zeros(0, np.int64)] * len(kept), kept)
        if self.cache is not None:
            self.cache.policy.watch = None
        self.cache = self.any_cache = None
        recording.end = end

    def _sample(self, seen: int) -> None:
        """Reads what the cache holds now."""
        held = self.method.held(self.any_cache) if self.cache is None else vars(self.cache.report())
        self.recording.samples.append([seen, *(held[name] + held.get("other_bytes", 0) for name in BYTES)])

    def _find_rows(self) -> None:
        """After the first forward the rows are known."""
        cache, recording = self.cache, self.recording
        if cache is None:
            layers = [(i, layer.keys.shape[1]) for i, layer in enumerate(self.any_cache.layers) if _keeps_all(layer)]
        else:
            layers = [(layer.index, layer.stored().lengths.shape[1]) for layer in cache.compressed_layers]
        self._rows = [(layer, head) for layer, heads in layers for head in range(heads)]
        self._leads = list(range(len(self._rows)))
        self._alive = [np.zeros(0, np.int64)] * len(self._rows)
        if cache is not None and cache.sharing is not None:
            sharing = cache.sharing
            recording.leads = [sharing.lead[layer][head] for layer, head in self._rows]
            recording.near = [sharing.sinks, sharing.recent]
            self._leads = [self._rows.index((sharing.lead[layer][head], head)) for layer, head in self._rows]
        recording.rows = [list(row) for row in self._rows]

    def _note_change(self, seen: int) -> None:
        """What is settled changed in this step: finds out what every row lost since the last change."""
        cache = self.cache
        assert cache is not None
        before, self._segments = self._segments, cache.sequences[0].segments
        stops = [segment.stop for segment in self._segments if segment.kind == "sealed" and segment not in before]
        if not stops:  # a prompt that is kept whole
            return
        dropped, fresh = [], np.arange(self._seen, seen)
        for row, (layer, head) in enumerate(self._rows):
            kept = cache.kept_positions(layer, 0, head).numpy()
            there = np.concatenate([self._alive[row], fresh])
            dropped.append(np.setdiff1d(there, kept, assume_unique=True))
            self._alive[row] = kept
        self._seen = seen
        self._write(seen, stops, dropped, [self._scored(row, gone) for row, gone in enumerate(dropped)])
        self._windows = {}

    def _scored(self, row: int, wanted: np.ndarray) -> Scored:
        """What a row was judged by: of the last pass the `wanted` positions, or all windows since the last change."""
        if self._pass:  # ranks the rows of leads, in order
            positions, ranking, length = self._pass[sorted(set(self._leads)).index(self._leads[row])]
            chosen = np.flatnonzero(np.isin(positions[:length], wanted))
            chosen = chosen[positions[chosen].argsort()]
            return positions[chosen], ranking[chosen]
        windows = self._windows.get(self._rows[self._leads[row]], [])
        if not windows:
            return np.zeros(0, np.int64), np.zeros(0)
        positions = np.concatenate([np.arange(start, start + len(scores)) for start, scores in windows])
        return positions, np.concatenate([scores for _, scores in windows])

    def _write(self, seen: int, stops: list[int], dropped: list[np.ndarray], scored: list[Scored]) -> None:
        self.recording.changes.append(
            {
                "seen": seen,
                "stops": stops,
                "dropped": [runs_of(positions) for positions in dropped],
                "scored": [runs_of(positions) for positions, _ in scored],
                "scores": [rounded(scores) for _, scores in scored],
            }
        )


def _keeps_all(layer: CacheLayerMixin) -> bool:
    """Whether a layer of Transformers' own cache keeps the keys of all tokens."""
    return getattr(layer, "keys", None) is not None and not getattr(layer, "is_sliding", False)


def origin(device: str) -> dict[str, Any]:
    """Where and when a run was made, without the command, which names folders."""
    return {name: value for name, value in provenance(device).items() if name != "command"} | {
        "time": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    }
