"""Rows to check ops on, what ops should give in plain torch, and how far from it they may be."""

from dataclasses import replace
from typing import Any

import torch

from kara_hf.kernels import Proximal, ProximalKeys, Rows, gather_rows, slot_index
from kara_hf.kernels.rounding import Packing
from kara_hf.storage import MemoryMeter, RecordStore

from ..common.rows import Row
from ..common.run import Run

POOLS = ("keys", "values", "positions", "metric")


def make_rows(
    run: Run, lengths: list[list[int]], sizes: tuple[int, int], dtype: torch.dtype, room: int = 0, block_size: int = 16
) -> Rows:
    """Random rows of `lengths` [B][H] in blocks anywhere, with room for `room` more.

    Slots that nobody wrote are NaN, which the kernels must not read; plain torch may read anything finite.
    """
    lengths = torch.tensor(lengths, dtype=torch.int32, device=run.device)
    unused = float("nan") if run.backend == "triton" else 6.0
    counts = -(-(lengths + room) // block_size)
    width, blocks = max(int(counts.max()), 1), int(counts.sum()) + 1
    columns = torch.arange(width, device=lengths.device)
    tables, pools = [], []
    for size in sizes:
        table = torch.full((*lengths.shape, width), -1, dtype=torch.int32, device=lengths.device)
        owned = columns < counts[..., None]
        table[owned] = torch.randperm(blocks, device=lengths.device)[:-1].to(torch.int32)
        slots = columns[:, None] * block_size + torch.arange(block_size, device=lengths.device)
        written = torch.zeros(blocks, block_size, dtype=torch.bool, device=lengths.device)
        written[table[owned]] = (slots < lengths[..., None, None])[owned]
        pool = torch.randn(blocks, block_size, size, dtype=dtype, device=lengths.device)
        tables.append(table)
        pools.append(pool.masked_fill(~written[..., None], unused))
    longest = int(lengths.max())
    return Rows(
        keys=pools[0],
        values=pools[1],
        positions=torch.randint(0, 9999, (blocks, block_size), dtype=torch.int32, device=lengths.device),
        key_table=tables[0],
        value_table=tables[1],
        lengths=lengths,
        max_length=longest,
        uniform=bool((lengths == longest).all()),
        contiguous=False,
        metric=torch.rand(blocks, block_size, device=lengths.device),
    )


def with_records(run: Run, rows: Rows, tokens: int, bits: tuple[int, int]) -> Rows:
    """`rows` behind `tokens` records of random tokens in every row."""
    shape, sizes = tuple(rows.lengths.shape), (rows.keys.shape[-1], rows.values.shape[-1])
    packings = Packing(sizes[0], bits[0]), Packing(sizes[1], bits[1])
    metric = rows.metric is not None
    store = RecordStore(
        shape, packings, device=run.device, block_size=rows.block_size, meter=MemoryMeter(), metric=metric
    )
    keys, values = (torch.randn(*shape, tokens, size, device=run.device) for size in sizes)
    positions = torch.arange(tokens, dtype=torch.int32, device=run.device)[None, None]
    chosen = torch.ones(*shape, tokens, dtype=torch.bool, device=run.device)
    store.add(3 * keys + 1, values, positions, chosen.float() if metric else None, chosen)
    return replace(rows, rounded=store.rows())


def made_whole(rows: Rows) -> Rows:
    """Rows that are rounded in part, all of one length, as float32 ones: a block for each row."""
    keys, values = (part.float() for part in (rows.all_keys(), rows.all_values()))
    batch, heads, tokens = keys.shape[:3]
    table = torch.arange(batch * heads, dtype=torch.int32, device=keys.device).view(batch, heads, 1)
    lengths = torch.full((batch, heads), tokens, dtype=torch.int32, device=keys.device)
    positions = torch.zeros(batch * heads, tokens, dtype=torch.int32, device=keys.device)
    return Rows(keys.flatten(0, 1), values.flatten(0, 1), positions, table, table, lengths, tokens, True, True)


def bounded(got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> Row:
    """Whether `got` is at most twice as far from `exact` as `plain` torch in the same dtype.

    Where `plain` happens to be nearly exact, what float32 accumulation and rounding to the dtype cost is allowed.
    """
    if not got.isfinite().all():
        return {"passed": False, "reason": "the result is not finite"}
    error, plain_error = ((out.double() - exact).abs().max().item() for out in (got, plain))
    rounding = max(4 * torch.finfo(torch.float32).eps, torch.finfo(got.dtype).eps / 2) * exact.abs().max().item()
    return {"passed": error <= max(2 * plain_error, rounding), "error": error, "plain_error": plain_error}


def same_pools(got: Rows, expected: Rows) -> Row:
    """Whether all slots are equal, those that nobody wrote included."""
    parts = {name: [getattr(rows, name).nan_to_num(7.5) for rows in (got, expected)] for name in POOLS}
    differing = [name for name, (one, other) in parts.items() if not torch.equal(one, other)]
    return {"passed": not differing} | ({"reason": f"{' and '.join(differing)} differ"} if differing else {})


def cloned(rows: Rows) -> Rows:
    return replace(rows, **{name: getattr(rows, name).clone() for name in POOLS})


def plain_attention(query: torch.Tensor, rows: Rows, dtype: torch.dtype, **settings: Any) -> tuple[torch.Tensor, ...]:
    """Attention over the rows made dense, every step in `dtype`, with the settings of `attend`: its result, and the
    probabilities ``[B, H, G, S, T]``. With `scores` and `positions` those of `attend_shared`.
    """
    batch, _, new, _ = query.shape
    num_unseen, softcap, sink_logits = settings["num_unseen"], settings["softcap"], settings["sink_logits"]
    if num_unseen is None:
        num_unseen = torch.arange(new - 1, -1, -1, device=query.device).expand(batch, new)
    slots = torch.arange(rows.max_length, device=query.device)
    stored = (slots < rows.lengths[..., None])[..., None]  # [B, H, T, 1]
    seen = (slots < (rows.lengths[..., None] - num_unseen[:, None])[..., None])[:, :, None]  # [B, H, 1, S, T]
    keys, values = (part.masked_fill(~stored, 0.0).to(dtype) for part in (rows.dense_keys(), rows.dense()[1]))
    grouped = query.to(dtype).unflatten(1, (rows.lengths.shape[1], -1))
    logits = torch.einsum("bhgsd,bhtd->bhgst", grouped, keys) * settings["scaling"]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if rows.proximal is not None:
        distant = rows.proximal.bounds.distant(settings["positions"][:, None], rows.dense_positions())[:, :, None, None]
        follows = torch.zeros(rows.lengths.shape[1], dtype=torch.bool, device=query.device)
        follows[rows.proximal.index] = True
        logits = torch.where(distant & follows[:, None, None, None], settings["scores"].to(dtype), logits)
    logits = logits.masked_fill(~seen, float("-inf"))
    if sink_logits is not None:
        sink = sink_logits.to(dtype).view(1, rows.lengths.shape[1], -1, 1, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, sink], dim=-1)
    weights = logits.softmax(-1)[..., : rows.max_length].masked_fill(~seen, 0.0)  # of what sees nothing NaN becomes 0
    return torch.einsum("bhgst,bhtd->bhgsd", weights, values).flatten(1, 2), weights


def plain_scores(
    queries: torch.Tensor, keys: torch.Tensor, dtype: torch.dtype, scaling: float, softcap: float | None, causal: bool
) -> torch.Tensor:
    """As `window_scores`, every step in `dtype`."""
    grouped = queries.to(dtype).unflatten(1, (keys.shape[1], -1))
    logits = torch.einsum("bhgqd,bhkd->bhgqk", grouped, keys.to(dtype)) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if causal:
        logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), float("-inf"))
    return logits.softmax(-1).mean((2, 3))


def bounded_votes(rows: Rows, plain: torch.Tensor, exact: torch.Tensor, metric_power: int) -> Row:
    """The same of the metric of `rows`, which was zero, from the probabilities ``[B, H, G, S, T]``."""
    votes = gather_rows(rows.metric, rows.value_table, rows.max_length)
    stored = torch.arange(rows.max_length, device=votes.device) < rows.lengths[..., None]
    return bounded(votes.masked_fill(~stored, 0.0), *(w.pow(metric_power).sum((2, 3)) for w in (plain, exact)))


def with_followers(rows: Rows, heads: tuple[int, ...], proximal: Proximal, ordered: bool) -> Rows:
    """`rows`, of equal lengths in a sequence, in which `heads` follow: slot s holds position s, or they count down."""
    batch, all_heads = rows.lengths.shape
    slots = torch.arange(rows.max_length, dtype=torch.int32, device=rows.lengths.device).expand(batch, all_heads, -1)
    stored = slots < rows.lengths[..., None]
    where = slot_index(rows.value_table, slots.minimum(rows.lengths[..., None] - 1), rows.block_size)
    places = slots if ordered else rows.lengths[..., None] - 1 - slots
    rows.positions.flatten()[where[stored]] = places[stored]
    index = torch.tensor(heads, device=rows.lengths.device)
    rest = torch.tensor([head for head in range(all_heads) if head not in heads], device=rows.lengths.device)
    keys = torch.randn(
        batch,
        len(heads),
        proximal.first + proximal.recent,
        rows.keys.shape[-1],
        dtype=rows.keys.dtype,
        device=index.device,
    )
    table = rows.key_table.index_fill(1, index, -1)
    proximal_keys = ProximalKeys(heads, keys, proximal, proximal.recent, index, rest)
    return replace(rows, key_table=table, proximal=proximal_keys, in_order=ordered)
