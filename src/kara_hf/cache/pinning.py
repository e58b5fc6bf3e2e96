"""Pinning tokens of a cache that is in use."""

from dataclasses import replace

import numpy as np

from ..config import as_pins, merged
from ..policy import KaraPolicy, KVCompressPolicy
from .sequence import Sequence
from .state import CacheState

NAMED = 8  # stretches of evicted tokens that a message names at most


def pin(state: CacheState, policy: KaraPolicy | KVCompressPolicy, start: int, end: int, sequence: int | None) -> None:
    """As `CompressedCache.pin`, on a cache whose host knows everything."""
    fresh = as_pins([(start, end)])
    if not state.sequences:
        if sequence is not None:
            raise IndexError(
                f"sequence {sequence} is not there, the cache is empty; leave it out to pin in all to come"
            )
        pins = merged((*state.pins, *fresh))
        policy.config.check_budget(pins)
        state.pins = pins
        return
    if sequence is not None and not 0 <= sequence < len(state.sequences):
        raise IndexError(f"sequence {sequence} is not there; the cache has {len(state.sequences)}")
    chosen = range(len(state.sequences)) if sequence is None else [sequence]
    after = list(state.sequences)
    for number in chosen:
        after[number] = replace(after[number], pins=merged((*after[number].pins, *fresh)))
        policy.config.check_budget(after[number].pins)
        _check_kept(state, number, after[number], start, end)
    state.sequences = after


def _check_kept(state: CacheState, number: int, sequence: Sequence, start: int, end: int) -> None:
    """Raises ValueError, naming them, if tokens from `start` to `end` of a sequence are missing in some row."""
    wanted = np.arange(start, min(end, sequence.tokens))
    missing = np.zeros(len(wanted), bool)
    for layer in state.compressed_layers if len(wanted) else ():
        store = layer.stored()
        for head in range(store.lengths.shape[1]):
            missing |= ~np.isin(wanted, store.read(number, head)[2].cpu().numpy())
    if missing.any():
        gone = wanted[missing]
        runs = np.split(gone, np.flatnonzero(np.diff(gone) != 1) + 1)
        named = [f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs[:NAMED]]
        more = f" and {len(gone) - sum(map(len, runs[:NAMED]))} more" if len(runs) > NAMED else ""
        raise ValueError(
            f"pin({start}, {end}) is not possible: of sequence {number} the tokens {', '.join(named)}{more} were "
            "evicted already, in some layer and head at least; pin tokens before they are judged, or pass pin= when "
            "the cache is made"
        )
