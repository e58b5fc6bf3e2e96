"""attend over rows of which a part is rounded: as `attend`, with ``rows.rounded``.

Rounded tokens are in front: a query that sees any of the others sees all of them, beside `visible`, whose columns are
those of `Rows.all_positions`. What is attended to is what the records stand for, in float32. A metric is added to in
both parts.

Plain torch multiplies with the codes: what makes numbers of them is taken into the queries, and into the weights.
"""

from typing import Unpack

import torch

from .dense import (
    LogitSettings,
    grouped_logits,
    grouped_sinks,
    row_logits,
    row_weights,
    softcapped,
    weighted,
    weights_of,
)
from .metric import add_to_metric
from .rows import RoundedRows, Rows, gather_rows

QUERY_CHUNK = 64  # queries handled at once: their logits of all tokens lie in memory


def attend_rounded_reference(
    query: torch.Tensor,
    rows: Rows,
    *,
    num_unseen: torch.Tensor | None = None,
    visible: torch.Tensor | None = None,
    metric_power: int | None = None,
    **settings: Unpack[LogitSettings],
) -> torch.Tensor:
    """One query at a time, float32; the specification of `attend` over rows that are rounded in part."""
    rounded, (batch, query_heads, new, _) = parts_of(rows), query.shape
    group = query_heads // rows.lengths.shape[1]
    out = query.new_zeros(batch, query_heads, new, rows.values.shape[-1])
    whole_keys, whole_values = rounded.dense()
    for b in range(batch):
        for hq in range(query_heads):
            h = hq // group
            before, length = int(rounded.lengths[b, h]), int(rows.lengths[b, h])
            keys = rows.read(gather_rows(rows.keys, rows.key_table[b : b + 1, h : h + 1], length)[0, 0])
            values = rows.read(gather_rows(rows.values, rows.value_table[b : b + 1, h : h + 1], length)[0, 0])
            keys = torch.cat([whole_keys[b, h, :before], keys.float()])
            values = torch.cat([whole_values[b, h, :before], values.float()])
            for s in range(new):
                causal = max(0, length - (new - 1 - s if num_unseen is None else int(num_unseen[b, s])))
                seen = torch.arange(before + causal if causal else 0)
                if visible is not None:
                    columns = torch.where(seen < before, seen, seen - before + rounded.max_length)
                    seen = seen[visible[b, h % visible.shape[1], s, columns]]
                if not len(seen):
                    continue
                sink = None if settings["sink_logits"] is None else settings["sink_logits"][hq]
                logits = row_logits(query[b, hq, s], keys[seen], settings["scaling"], settings["softcap"])
                probability = row_weights(logits, sink)
                out[b, hq, s] = (probability @ values[seen]).to(out.dtype)
                if metric_power is None:
                    continue
                for part, slots, votes in (
                    (rounded, seen[seen < before], probability[seen < before]),
                    (rows, seen[seen >= before] - before, probability[seen >= before]),
                ):
                    if part.metric is not None:
                        blocks = part.value_table[b, h, slots // part.block_size]
                        part.metric[blocks, slots % part.block_size] += votes**metric_power
    return out


def attend_rounded(
    query: torch.Tensor,
    rows: Rows,
    *,
    num_unseen: torch.Tensor | None = None,
    visible: torch.Tensor | None = None,
    metric_power: int | None = None,
    **settings: Unpack[LogitSettings],
) -> torch.Tensor:
    """Attention of the newest tokens over both parts of their rows; see the module's contract."""
    parts = [
        _attend_some(
            query[:, :, chosen], rows, sees(rows, query.shape[2], chosen, num_unseen, visible), metric_power, settings
        )
        for chosen in (slice(first, first + QUERY_CHUNK) for first in range(0, query.shape[2], QUERY_CHUNK))
    ]
    return torch.cat(parts, 2) if len(parts) > 1 else parts[0]


def _attend_some(
    query: torch.Tensor, rows: Rows, seen: torch.Tensor | None, metric_power: int | None, settings: LogitSettings
) -> torch.Tensor:
    rounded, (keys, values) = parts_of(rows), rows.dense()
    logits = torch.cat(
        [
            rounded_logits(query, rounded, settings["scaling"], settings["softcap"]),
            grouped_logits(query, keys, settings["scaling"], settings["softcap"]),
        ],
        -1,
    )
    sinks = grouped_sinks(settings["sink_logits"], logits.shape[1])
    if seen is None:
        weights = weights_of(logits, sinks)
    else:
        seen = seen[:, :, None]
        weights = weights_of(logits.masked_fill(~seen, float("-inf")), sinks)
        weights = weights.masked_fill(~seen.any(-1, keepdim=True), 0.0)
    if metric_power is not None:
        add_to_both(rows, (weights.detach() ** metric_power).sum((2, 3)))
    return mixed(weights, rows, values, query.dtype)


def parts_of(rows: Rows) -> RoundedRows:
    """The rounded part of `rows`, which have one."""
    assert rows.rounded is not None
    return rows.rounded


def rounded_logits(
    query: torch.Tensor, rounded: RoundedRows, scaling: float, softcap: float | None = None
) -> torch.Tensor:
    """As `grouped_logits` with the keys of `rounded`: ``[B, K, G, S, T]`` float32 of queries ``[B, K * G, S, D]``."""
    batch, heads = rounded.frame.shape[:2]
    grouped = (query.float() * scaling).reshape(batch, heads, -1, query.shape[-1])
    inside, beside = rounded.framed(grouped)
    logits = rounded.key_packing.products(inside, rounded.records()[0]).add_(beside)
    return softcapped(logits.unflatten(2, (-1, query.shape[2])), softcap)


def add_to_both(rows: Rows, received: torch.Tensor) -> None:
    """As `add_to_metric`, of both parts: `received` ``[B, H, columns]``."""
    rounded = parts_of(rows)
    add_to_metric(rounded, received[..., : rounded.max_length])
    add_to_metric(rows, received[..., rounded.max_length :])


def mixed(weights: torch.Tensor, rows: Rows, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sum of the values of both parts, ``[B, Hq, S, Dv]``; `weights` are of both, `values` those that are whole."""
    rounded = parts_of(rows)
    first, rest = weights.split([rounded.max_length, values.shape[2]], -1)
    packed = rounded.value_packing.mixtures(first.flatten(2, 3), rounded.records()[1])
    out = weighted(rest, values, torch.float32) + packed.reshape(
        *packed.shape[:1], -1, weights.shape[3], packed.shape[-1]
    )
    return out.to(dtype)


def sees(
    rows: Rows, new: int, queries: slice, num_unseen: torch.Tensor | None, visible: torch.Tensor | None
) -> torch.Tensor | None:
    """Which columns of both parts the n `queries` of `new` see, ``[B, H, n, columns]`` bool; None: all."""
    rounded, device = parts_of(rows), rows.lengths.device
    if new == 1 and num_unseen is None and visible is None and rows.uniform and rounded.uniform:
        return None
    if num_unseen is None:
        unseen = torch.arange(new - 1, -1, -1, device=device, dtype=torch.int32)[None, queries]
    else:
        unseen = num_unseen[:, queries]
    causal = rows.lengths[:, :, None] - unseen[:, None]  # [B, H, n]
    before = rounded.lengths[:, :, None].masked_fill(causal <= 0, 0)
    seen = torch.cat(
        [
            torch.arange(part.max_length, device=device, dtype=torch.int32) < limit[..., None]
            for part, limit in ((rounded, before), (rows, causal))
        ],
        -1,
    )
    return seen if visible is None else seen & visible[:, :, queries]
