"""What a cache will hold, told from a model's config and the cache's settings, before there are weights."""

import math
from dataclasses import dataclass, fields

import numpy as np
import torch
from transformers import PreTrainedConfig

from ..config import KaraConfig, KVCompressConfig, require
from ..integration.shape import layer_sizes
from ..policy import KaraPolicy, KVCompressPolicy
from ..storage.queries import Sampling
from .rounding import AT_ONCE, OPENING, Rounding
from .sequence import Sequence

POSITION, METRIC, TABLE = 4, 4, 4  # bytes of a slot's position and metric, and of a block's place in a table


@dataclass(frozen=True)
class Planned:
    """What one sequence takes, in the layers that are compressed.

    Attributes:
        tokens: most tokens of a head while the sequence grows; of KV-Compress the mean of all heads.
        nominal_bytes: keys and values of these, rounded ones as records.
        query_bytes: queries that are held for scores.
        resident_bytes: all of it in blocks, with positions, tables and what records need beside.
        full_bytes: what the full cache holds.
    """

    tokens: int
    nominal_bytes: int
    query_bytes: int
    resident_bytes: int
    full_bytes: int


def plan(
    config: PreTrainedConfig,
    settings: KaraConfig | KVCompressConfig,
    tokens: int,
    *,
    prompt: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> Planned:
    """What a cache with these `settings` holds of one sequence that has grown to `tokens` behind a prompt of `prompt`.

    The prompt itself is held while it is read, whatever is kept of it: whole, or one layer of it where each is cut
    alone; with `prefill_chunk` a chunk of it.

    Args:
        config: of the decoder; nothing else is read of the model.

    Raises:
        ValueError: a number is out of range, or the model's layers are of a kind whose sizes a config does not say.
    """
    require(tokens >= 1, "tokens", tokens, "1 or more")
    require(1 <= prompt <= tokens, "prompt", prompt, f"from 1 to tokens={tokens}")
    layers = layer_sizes(config)
    newest = settings.recent if isinstance(settings, KaraConfig) else settings.protected
    rounding = Rounding.of(settings, newest, None, steady=False)
    if isinstance(settings, KaraConfig):
        (states, queried), beside = _of_windows(settings, rounding, tokens, prompt), POSITION
    else:
        rows = sum(layer.heads for layer in layers)
        states, queried, beside = _of_budget(settings, rounding, tokens, prompt, rows), 0, POSITION + METRIC

    def summed(held: int, rounded: int) -> Planned:
        nominal = resident = of_queries = full = 0
        for layer in layers:
            whole = (layer.key_size + layer.value_size) * dtype.itemsize
            record = 0 if rounding is None else sum(rounding.widths((layer.key_size, layer.value_size)))
            nominal += layer.heads * ((held - rounded) * whole + rounded * record)
            for count, size in ((held - rounded, whole), (rounded, record)):
                blocks = math.ceil(count / settings.block_size)
                resident += layer.heads * blocks * (settings.block_size * (size + beside) + 2 * TABLE)
            if rounded:
                resident += layer.heads * 2 * layer.key_size * 4  # the frame
            if queried and isinstance(settings, KaraConfig):
                sampling = Sampling(settings.queries_held, settings.window, layer.query_heads // layer.heads)
                places = sampling.rounded(sampling.places(queried))
                of_queries += layer.query_heads * places * layer.key_size * dtype.itemsize
            full += layer.heads * tokens * whole
        return Planned(held, nominal, of_queries, resident + of_queries, full)

    found = [summed(*state) for state in states]
    names = [field.name for field in fields(Planned)]
    return Planned(**{name: max(getattr(each, name) for each in found) for name in names})


def _of_windows(
    settings: KaraConfig, rounding: Rounding | None, tokens: int, prompt: int
) -> tuple[list[tuple[int, int]], int]:
    """Tokens of a head, and how many of them are rounded, whenever either is about to change; and the most open tokens
    whose queries are held.
    """
    policy, most_open, rounded = KaraPolicy(settings), 0, 0
    sequence, states = Sequence(pins=settings.pin).extended(prompt, whole=not settings.compress_prompt), []
    if not policy.compresses:
        free = 0 if rounding is None else rounding.free(sequence.extended(tokens - prompt, whole=False), None)
        return [(tokens, _begun(free - AT_ONCE + 1)), (min(tokens, tokens - free + OPENING - 1), 0)], 0
    while True:
        due = policy.due(sequence)
        if rounding is not None:
            inside = rounding.rounded_open(sequence, rounded) // settings.window
            rounded -= sum(settings.window - seal.keep for seal in due[:inside])
        sequence = sequence.sealed(policy)
        until = min(tokens - sequence.tokens, policy.open_limit(sequence) - sequence.open)
        if rounding is not None:
            rounded += rounding.due(rounding.free(sequence, settings.window), rounded)
            windows = rounding.near + rounding.open_windows(sequence, settings.window) + settings.window
            for ahead in range(windows - sequence.open, until + 1, settings.window):  # a window of open tokens is free
                states.append((sequence.settled + sequence.open + ahead - 1, rounded))
                free = rounding.free(sequence.extended(ahead, whole=False), settings.window)
                rounded += rounding.due(free, rounded)
        sequence = sequence.extended(until, whole=False)
        states.append((sequence.settled + sequence.open, rounded))
        most_open = max(most_open, sequence.open)
        if sequence.tokens == tokens:
            break
        sequence = sequence.extended(1, whole=False)
    return states, most_open + 1 if policy.needs_queries else 0


def _of_budget(
    settings: KVCompressConfig, rounding: Rounding | None, tokens: int, prompt: int, rows: int
) -> list[tuple[int, int]]:
    """Tokens of a head, the mean over all `rows`, and how many of them are rounded before the next pass; also before
    the first.
    """
    policy, held = KVCompressPolicy(settings), tokens
    if policy.compresses:
        budget = policy.budget_blocks(np.array([tokens]), rows, [settings.pin])
        held = min(tokens, int(budget[0]) * settings.block_size // rows)
    if rounding is None:
        return [(held, 0)]
    waiting = settings.block_size if policy.compresses else AT_ONCE - 1
    whole = rounding.first + rounding.near + waiting
    first = min(held, whole + OPENING) if prompt < whole + OPENING else 0
    return [(held, _begun(held - whole)), (first, 0)]


def _begun(rounded: int) -> int:
    return rounded if rounded >= OPENING else 0
