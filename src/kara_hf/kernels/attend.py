"""attend: attention of new queries over paged rows.

    query         [B, Hq, S, Dk]  queries of the S newest tokens, which are already stored
    rows          Rows            H KV heads; the G = Hq / H query heads of a group follow one another
    num_unseen    [B, S] int32 or None   how many of a sequence's newest tokens a query does not see.
                  None: query s does not see the S - 1 - s tokens behind it (plain causal order, no padding)
    visible       [B, 1 or H, S, T] bool or None   which stored slots a query may see beside that: T = rows.columns,
                  in slot order as in `rows.dense`; past a row's length it says nothing. Plain torch answers, on every
                  device
    scaling       factor on q.k
    softcap       c: logits become c * tanh(logits / c) (Gemma-2); None: left alone
    sink_logits   [Hq] or None: a learned logit per query head that takes probability and gives no value (gpt-oss)
    metric_power  1, 2 or None: each token's metric, in place, gains the sum over the G query heads of its row and the S
                  queries of probability ** metric_power (KV-Compress, arXiv 2410.00161), sinks included in the
                  normaliser

Query, keys and values may each have a dtype of their own. Returns ``[B, Hq, S, Dv]``, in the query's dtype or, under
autocast, in that of autocast; see `precision`. A query that sees no token gets zeros, and adds nothing to any metric.
Nothing is modified but what `metric_power` asks for; rows that are observed own their value blocks. Softmax and
accumulation are float32. Shapes that do not fit, and `metric_power` without a metric or of another value, raise
ValueError.

What a query sees, of whatever cause, is one mask for plain torch: `attend_masked` is attention under it.
"""

from typing import Unpack

import torch

from .attend_rounded import attend_rounded, attend_rounded_reference
from .backend import use_triton
from .dense import (
    LogitSettings,
    attend_masked,
    probabilities,
    row_logits,
    row_weights,
    softcapped,
    weighted,
    weights_of,
)
from .metric import add_to_metric
from .precision import as_sdpa
from .rows import Rows, gather_rows

FEW_ROWS = 32  # rows that are worth a loop of their own each
QUERY_CHUNK = 256  # queries handled at once, so that a long new turn does not build an S x T mask
OBSERVED_CHUNK = 32  # queries observed at once: their probabilities of all tokens lie in memory


@as_sdpa(2)
def attend_reference(
    query: torch.Tensor,
    rows: Rows,
    *,
    scaling: float,
    num_unseen: torch.Tensor | None = None,
    visible: torch.Tensor | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    metric_power: int | None = None,
) -> torch.Tensor:
    """One query at a time, float32; the specification of `attend`."""
    if rows.rounded is not None:
        return attend_rounded_reference(
            query,
            rows,
            num_unseen=num_unseen,
            visible=visible,
            metric_power=metric_power,
            scaling=scaling,
            softcap=softcap,
            sink_logits=sink_logits,
        )
    batch, query_heads, new, _ = query.shape
    group = query_heads // rows.lengths.shape[1]
    out = query.new_zeros(batch, query_heads, new, rows.values.shape[-1])
    for b in range(batch):
        for hq in range(query_heads):
            h = hq // group
            length = int(rows.lengths[b, h])
            keys = rows.read(gather_rows(rows.keys, rows.key_table[b : b + 1, h : h + 1], length)[0, 0])
            values = rows.read(gather_rows(rows.values, rows.value_table[b : b + 1, h : h + 1], length)[0, 0]).float()
            for s in range(new):
                causal = max(0, length - (new - 1 - s if num_unseen is None else int(num_unseen[b, s])))
                seen = torch.arange(causal)
                if visible is not None:
                    seen = seen[visible[b, h % visible.shape[1], s, :causal]]
                if not len(seen):
                    continue
                logits = row_logits(query[b, hq, s], keys[seen], scaling, softcap)
                probability = row_weights(logits, None if sink_logits is None else sink_logits[hq])
                out[b, hq, s] = (probability @ values[seen]).to(out.dtype)
                if metric_power is not None and rows.metric is not None:
                    blocks = rows.value_table[b, h, seen // rows.block_size]
                    rows.metric[blocks, seen % rows.block_size] += probability**metric_power
    return out


@as_sdpa(2)
def attend(
    query: torch.Tensor,
    rows: Rows,
    *,
    scaling: float,
    num_unseen: torch.Tensor | None = None,
    visible: torch.Tensor | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    metric_power: int | None = None,
) -> torch.Tensor:
    """Attention of the newest tokens over everything their rows store; see the module's contract."""
    check_fits(query, rows, metric_power, visible)
    batch, query_heads, new, key_dim = query.shape
    heads = rows.lengths.shape[1]
    if new == 0 or rows.max_length == 0:
        return query.new_zeros(batch, query_heads, new, rows.values.shape[-1])
    settings: LogitSettings = {"scaling": scaling, "softcap": softcap, "sink_logits": sink_logits}
    if (
        rows.rounded is None
        and visible is None
        and use_triton(query, key_dim, rows.values.shape[-1], dtypes=rows.dtypes)
    ):
        return _attend_triton(query, rows, num_unseen, metric_power, **settings)
    if rows.rounded is not None:
        return attend_rounded(
            query, rows, num_unseen=num_unseen, visible=visible, metric_power=metric_power, **settings
        )
    if new == 1 and num_unseen is None and visible is None:
        if rows.starts is not None and batch * heads <= FEW_ROWS and not rows.contiguous:
            return _attend_each(query, rows, metric_power, **settings)
        everything = rows.uniform
    else:
        everything = False
    keys, values = rows.dense() if visible is None else _finite(rows)
    chunk = QUERY_CHUNK if metric_power is None else OBSERVED_CHUNK
    parts = []
    for first in range(0, new, chunk):
        queries = slice(first, first + chunk)
        seen = None if everything else _seen(rows, new, queries, num_unseen, visible)
        part = query[:, :, queries]
        if metric_power is None:
            parts.append(attend_masked(part, keys, values, seen, **settings))
            continue
        weights = probabilities(part, keys, seen, **settings)
        add_to_metric(rows, (weights.detach() ** metric_power).sum((2, 3)))
        parts.append(weighted(weights, values, query.dtype))
    return torch.cat(parts, 2) if len(parts) > 1 else parts[0]


def _attend_triton(
    query: torch.Tensor,
    rows: Rows,
    num_unseen: torch.Tensor | None,
    metric_power: int | None,
    **settings: Unpack[LogitSettings],
) -> torch.Tensor:
    """The kernel; many queries are observed in turns, because their logits lie in memory."""
    from .triton_.attend import attend as attend_triton

    new = query.shape[2]
    if metric_power is None or new <= OBSERVED_CHUNK:
        return attend_triton(query, rows, num_unseen=num_unseen, metric_power=metric_power, **settings)
    num_unseen = _behind(query.device, new, slice(0, new)).expand(len(query), -1) if num_unseen is None else num_unseen
    chunks = zip(query.split(OBSERVED_CHUNK, 2), num_unseen.split(OBSERVED_CHUNK, 1), strict=True)
    return torch.cat(
        [attend_triton(q, rows, num_unseen=h, metric_power=metric_power, **settings) for q, h in chunks], 2
    )


def check_fits(query: torch.Tensor, rows: Rows, metric_power: int | None, visible: torch.Tensor | None = None) -> None:
    """Raises ValueError unless `query` can attend over `rows` under `visible`, and be observed as asked."""
    batch, query_heads, new, key_dim = query.shape
    heads = rows.lengths.shape[1]
    if query_heads % heads or key_dim != rows.keys.shape[-1] or batch != rows.lengths.shape[0]:
        raise ValueError(
            f"query of shape {tuple(query.shape)} does not fit rows of {rows.lengths.shape[0]} sequences, {heads} KV "
            f"heads and key size {rows.keys.shape[-1]}; expected [B, G * H, S, Dk]"
        )
    if metric_power is not None and (metric_power not in (1, 2) or rows.metric is None):
        raise ValueError(
            f"metric_power={metric_power!r} of rows {'without' if rows.metric is None else 'with'} a metric is not "
            "possible; expected 1 or 2 and rows with a metric, or None"
        )
    if visible is not None:
        shapes = [(batch, some, new, rows.columns) for some in (1, heads)]
        if visible.dtype != torch.bool or tuple(visible.shape) not in shapes:
            raise ValueError(
                f"visible of shape {tuple(visible.shape)} and {visible.dtype} does not fit; expected "
                f"{shapes[0]} or {shapes[1]}, [B, 1 or H, S, rows.columns], of torch.bool"
            )


def _attend_each(
    query: torch.Tensor,
    rows: Rows,
    metric_power: int | None,
    scaling: float,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
) -> torch.Tensor:
    """A decode step row by row, each read in place: nothing is gathered, and no row is as long as the longest."""
    assert rows.starts is not None
    batch, heads = rows.lengths.shape
    grouped = (query.float() * scaling).view(batch * heads, -1, query.shape[-1])
    keys, values = rows.keys.flatten(0, 1), rows.values.flatten(0, 1)
    metric = None if metric_power is None or rows.metric is None else rows.metric.flatten()
    places = zip(rows.starts.ravel().tolist(), rows.lengths.flatten().tolist(), strict=True)
    out = []
    for row, (start, length) in enumerate(places):
        logits = softcapped(torch.mm(grouped[row], rows.read(keys.narrow(0, start, length)).float().t()), softcap)
        weights = weights_of(logits, None if sink_logits is None else sink_logits.view(heads, -1, 1)[row % heads])
        if metric is not None:
            votes = weights.detach()
            metric.narrow(0, start, length).add_((votes.square() if metric_power == 2 else votes).sum(0))
        out.append(torch.mm(weights, rows.read(values.narrow(0, start, length)).float()))
    return torch.stack(out).to(query.dtype).view(batch, query.shape[1], 1, -1)


def _behind(device: torch.device, new: int, queries: slice) -> torch.Tensor:
    """`num_unseen` of plain causal order, ``[1, n]`` for the n `queries` of `new`."""
    return torch.arange(new - 1, -1, -1, device=device, dtype=torch.int32)[None, queries]


def _seen(
    rows: Rows, new: int, queries: slice, num_unseen: torch.Tensor | None, visible: torch.Tensor | None
) -> torch.Tensor:
    """Which slots each of the n `queries` of `new` sees, ``[B, H, n, max_length]`` bool."""
    device = rows.lengths.device
    unseen = _behind(device, new, queries) if num_unseen is None else num_unseen[:, queries]
    slots = torch.arange(rows.max_length, device=device, dtype=torch.int32)
    seen = slots < (rows.lengths[:, :, None] - unseen[:, None])[..., None]
    return seen if visible is None else seen & visible[:, :, queries]


def _finite(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """`rows.dense` with zeros where no token is."""
    empty = torch.arange(rows.max_length, device=rows.lengths.device) >= rows.lengths[..., None]
    keys, values = rows.dense()
    return keys.masked_fill(rows.of_keys(empty)[..., None], 0.0), values.masked_fill(empty[..., None], 0.0)
