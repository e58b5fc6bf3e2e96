"""Rows of blocks drawn for the kernels, what plain torch makes of them, and how far a kernel may be from it."""

import itertools
import os
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from kara_hf.kernels import (
    Proximal,
    ProximalKeys,
    Rows,
)

INTERPRETED = os.environ.get("KARA_BACKEND") == "triton"  # slowly: fewer cases, of what differs for a kernel
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)  # which the interpreter does not know
LAYOUTS = ["shuffled"] if INTERPRETED else ["contiguous", "shuffled", "one-by-one"]


NAN = float("nan")


HIDES_ALL = torch.iinfo(torch.int32).max  # how many tokens are hidden from padding


BITS = {2: torch.int16, 4: torch.int32}


def few_interpreted(cases, *names):
    """Cases of `parametrize`, each under its name; the interpreter gets those with the given `names` by default."""
    assert set(names) <= {case.name for case in cases}
    left_out = [[pytest.mark.slow] * (INTERPRETED and case.name not in names) for case in cases]
    return [pytest.param(case, id=case.name, marks=marks) for case, marks in zip(cases, left_out, strict=True)]


def slow_interpreted(test):
    """A test of what is no kernel's own; the interpreter gets it in `make test-all`."""
    return pytest.mark.slow(test) if INTERPRETED else test


def dtype_id(dtype):
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------------------------------- building
def make_rows(
    lengths, *, block_size, dims=(8, 8), dtype=torch.float32, layout="shuffled", room=0, unused=NAN, metric=False
):
    """Rows of the given `lengths` [B][H] with random tokens, and room for `room` more; other slots hold `unused`, and
    where there is a `metric` NaN in it.

    A contiguous layout has row after row in both pools, as many blocks each. One by one, each row has just the blocks
    that it needs. A shuffled layout has blocks anywhere, different for keys and values, blocks that nobody uses, and -1
    behind the last block of each row.
    """
    lengths = torch.tensor(lengths, dtype=torch.int32)
    counts = -(-(lengths + room) // block_size)
    width = max(int(counts.max()), 1)
    total = lengths.numel() * width
    first = (counts.flatten().cumsum(0).to(torch.int32) - counts.flatten()).view_as(counts)

    def pool_and_table(*shape):
        if layout == "contiguous":
            return unused_pool(total, *shape), torch.arange(total, dtype=torch.int32).view(*lengths.shape, width)
        if layout == "one-by-one":
            table = first[..., None] + torch.arange(width, dtype=torch.int32)
            return unused_pool(int(counts.sum()), *shape), table.masked_fill(
                torch.arange(width) >= counts[..., None], -1
            )
        table = torch.randperm(total + 3)[:total].to(torch.int32).view(*lengths.shape, width)
        return unused_pool(total + 3, *shape), table.masked_fill(torch.arange(width) >= counts[..., None], -1)

    def unused_pool(blocks, *shape):
        pool = torch.full((blocks, block_size, *shape), unused, dtype=dtype)
        return pool * torch.randn_like(pool).sign()

    keys, key_table = pool_and_table(dims[0])
    values, value_table = pool_and_table(dims[1])
    positions = torch.full(values.shape[:2], -7, dtype=torch.int32)
    importance = torch.full(values.shape[:2], NAN)
    for b, row_lengths in enumerate(lengths.tolist()):
        for h, length in enumerate(row_lengths):
            for slot in range(length):
                at = slot % block_size
                keys[key_table[b, h, slot // block_size], at] = torch.randn(dims[0]).to(dtype)
                block = value_table[b, h, slot // block_size]
                values[block, at] = torch.randn(dims[1]).to(dtype)
                positions[block, at] = 3 * slot + 1
                importance[block, at] = torch.rand(())
    longest = int(lengths.max())
    uniform = bool((lengths == longest).all())
    return Rows(
        keys,
        values,
        positions,
        key_table,
        value_table,
        lengths,
        longest,
        uniform,
        layout == "contiguous",
        importance if metric else None,
        first.numpy().astype(np.int64) * block_size if layout == "one-by-one" else None,
    )


def pools(rows):
    return [rows.keys, rows.values, rows.positions, *([] if rows.metric is None else [rows.metric])]


def clone(rows):
    metric = None if rows.metric is None else rows.metric.clone()
    return replace(
        rows, keys=rows.keys.clone(), values=rows.values.clone(), positions=rows.positions.clone(), metric=metric
    )


def read_row(rows, b, h, length=None):
    """Keys [T, Dk], values [T, Dv], positions [T] and, where there is one, metric [T] of one row, slot by slot."""
    size = rows.block_size
    slots = range(int(rows.lengths[b, h]) if length is None else length)
    parts = []
    for pool in pools(rows):
        table = (rows.key_table if pool is rows.keys else rows.value_table)[b, h]
        part = [pool[table[s // size], s % size] for s in slots]
        parts.append(torch.stack(part) if part else pool.new_zeros(0, *pool.shape[2:]))
    return parts


def bounded_loosely(rows):
    """The same rows, of which the host knows no more than that they fit in their tables."""
    return replace(rows, max_length=rows.key_table.shape[2] * rows.block_size, uniform=False)


def assert_same_pools(got, expected):
    """To the last bit, NaN included."""
    for got_pool, expected_pool in zip(pools(got), pools(expected), strict=True):
        assert same_bits(got_pool, expected_pool)


def same_bits(one, other):
    return torch.equal(one.view(BITS[one.itemsize]), other.view(BITS[other.itemsize]))


def assert_error_bounded(got, plain, exact, floor=4):
    """`got` is at most twice as far from `exact` as `plain` torch in the same dtype.

    Where `plain` happens to be nearly exact, what float32 accumulation, `floor` of its steps, and rounding to the dtype
    cost is allowed.
    """
    assert got.isfinite().all()
    if not exact.numel():
        return
    error, allowed = ((out.double() - exact).abs().max().item() for out in (got, plain))
    unavoidable = max(floor * torch.finfo(torch.float32).eps, torch.finfo(got.dtype).eps / 2) * exact.abs().max().item()
    assert error <= max(2 * allowed, unavoidable), f"error {error:.3g}, plain torch {allowed:.3g}"


# --------------------------------------------------------------------------------------------------------------- attend
@dataclass(frozen=True)
class AttendCase:
    """num_unseen: per sequence and new token, how many of the newest stored tokens it does not see; None is causal."""

    name: str
    lengths: list
    group: int = 1
    new: int = 1
    dims: tuple = (8, 8)
    num_unseen: list | None = None
    softcap: float | None = None
    sink_logits: bool = False
    block_sizes: tuple = (4, 16)


ATTEND_CASES = [
    AttendCase("one-token", [[1]]),
    AttendCase("block-minus-1", [[3, 3], [3, 3]], group=4),
    AttendCase("block-exact", [[4, 4], [4, 4]], group=4),
    AttendCase("block-plus-1", [[5, 5], [5, 5]], group=4),
    AttendCase("uniform-33", [[33, 33]], group=2),
    AttendCase("uneven-rows", [[1, 15], [16, 17], [70, 2]], group=4),
    AttendCase("empty-row", [[0, 5], [9, 1]], group=2),
    AttendCase("nothing-stored", [[0, 0]], group=2),
    AttendCase("value-size-differs", [[5, 9], [31, 2]], group=2, dims=(24, 16)),
    AttendCase("value-wider-than-key", [[17, 17]], dims=(16, 24)),
    AttendCase("several-queries", [[19, 19], [19, 19]], group=4, new=5),
    AttendCase("several-queries-uneven", [[5, 6], [40, 17]], group=4, new=5),
    AttendCase("only-the-new", [[6, 6]], group=2, new=6),
    AttendCase(
        "padding-left-and-none",
        [[8, 8], [11, 11]],
        group=2,
        new=4,
        num_unseen=[[2, 2, 1, 0], [3, 2, 1, 0]],
        dims=(24, 16),
    ),
    AttendCase("all-padding", [[0, 0], [7, 7]], group=2, new=2, num_unseen=[[0, 0], [0, 0]]),
    AttendCase("sees-none-sees-all", [[3, 3]], group=2, new=2, num_unseen=[[3, 0]]),
    AttendCase("one-query-num_unseen", [[6, 6], [6, 6]], new=1, num_unseen=[[2], [0]]),
    AttendCase("softcap", [[5, 33], [16, 1]], group=4, softcap=0.7),
    AttendCase("softcap-uniform", [[17, 17]], group=2, softcap=2.0),
    AttendCase("softcap-several", [[9, 9], [21, 21]], group=2, new=4, softcap=0.7),
    AttendCase("softcap-padding", [[0, 0], [8, 8]], new=2, num_unseen=[[0, 0], [1, 0]], softcap=0.7),
    AttendCase("softcap-nothing-stored", [[0, 0]], softcap=0.7),
    AttendCase("sinks", [[5, 33], [16, 1]], group=4, sink_logits=True),
    AttendCase("sinks-several", [[9, 9], [21, 21]], group=2, new=4, sink_logits=True),
    AttendCase("sinks-padding", [[0, 0], [8, 8]], group=2, new=2, num_unseen=[[0, 0], [1, 0]], sink_logits=True),
    AttendCase("sinks-softcap", [[5, 7]], group=4, new=3, softcap=0.7, sink_logits=True, dims=(24, 16)),
]
if not INTERPRETED:  # in which queries are not taken in chunks
    ATTEND_CASES.append(AttendCase("more-than-a-chunk", [[263, 270]], group=2, new=261, block_sizes=(16,)))
ATTEND_PARAMS = few_interpreted(
    ATTEND_CASES,
    "block-plus-1",
    "empty-row",
    "value-size-differs",
    "padding-left-and-none",
    "one-query-num_unseen",
    "sinks-softcap",
)


def attend_inputs(case, dtype, block_size, layout, unused=6.0, metric=False):
    rows = make_rows(
        case.lengths,
        block_size=block_size,
        dims=case.dims,
        dtype=dtype,
        layout=layout,
        unused=unused,
        room=2,
        metric=metric,
    )
    batch, heads = rows.lengths.shape
    query = 2 * torch.randn(batch, heads * case.group, case.new, case.dims[0])
    return (
        query.to(dtype),
        rows,
        {
            "scaling": 0.8 * case.dims[0] ** -0.5,
            "num_unseen": None if case.num_unseen is None else torch.tensor(case.num_unseen, dtype=torch.int32),
            "softcap": case.softcap,
            "sink_logits": torch.randn(heads * case.group) if case.sink_logits else None,
        },
    )


def plain_weights(query, rows, dtype, *, scaling, num_unseen, softcap, sink_logits, visible=None):
    """(b, hq, which queries see something, what they give each token) in plain torch, every step in `dtype`."""
    batch, query_heads, new, _ = query.shape
    group = query_heads // rows.lengths.shape[1]
    for b in range(batch):
        for hq in range(query_heads):
            keys, *_ = read_row(rows, b, hq // group)
            order = torch.arange(len(keys))
            unseen = torch.arange(new - 1, -1, -1) if num_unseen is None else num_unseen[b]
            mask = order < (len(keys) - unseen)[:, None]
            if visible is not None:
                mask = mask & visible[b, hq // group % visible.shape[1], :, : len(keys)]
            logits = query[b, hq].to(dtype) @ keys.to(dtype).T * scaling
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            logits = logits.masked_fill(~mask, float("-inf"))
            if sink_logits is not None:
                logits = torch.cat([logits, sink_logits[hq].to(dtype).expand(new, 1)], dim=1)
            seeing = mask.any(1)
            yield b, hq, seeing, logits[seeing].softmax(1)[:, : len(keys)]


def attend_plain(query, rows, dtype, **settings):
    """Attention row by row in plain torch, every step in `dtype`."""
    group = query.shape[1] // rows.lengths.shape[1]
    out = torch.zeros(*query.shape[:3], rows.values.shape[-1], dtype=dtype)
    for b, hq, seeing, weights in plain_weights(query, rows, dtype, **settings):
        out[b, hq, seeing] = weights @ read_row(rows, b, hq // group)[1].to(dtype)
    return out


def observe_plain(query, rows, dtype, metric_power, **settings):
    """The metric of every row's tokens, row after row, ``[tokens]``, once these queries are observed, in `dtype`."""
    batch, heads = rows.lengths.shape
    group = query.shape[1] // heads
    metric = [[read_row(rows, b, h)[3].to(dtype) for h in range(heads)] for b in range(batch)]
    for b, hq, _, weights in plain_weights(query, rows, dtype, **settings):
        metric[b][hq // group] += (weights**metric_power).sum(0)
    return torch.cat([row for sequence in metric for row in sequence])


def assert_observed(rows, before, plain, exact):
    """The metric of `rows` is as `observe_plain` says, and no other slot and no other pool has changed."""
    got = torch.cat([read_row(rows, b, h)[3] for b, h in itertools.product(*map(range, rows.lengths.shape))])
    assert_error_bounded(got, plain, exact)
    stored = torch.zeros_like(rows.metric, dtype=torch.bool)
    for (b, h), length in zip(itertools.product(*map(range, rows.lengths.shape)), rows.lengths.flatten(), strict=True):
        for slot in range(length):
            stored[rows.value_table[b, h, slot // rows.block_size], slot % rows.block_size] = True
    assert same_bits(rows.metric.masked_fill(stored, 0.0), before.metric.masked_fill(stored, 0.0))
    assert_same_pools(replace(rows, metric=None), replace(before, metric=None))


def draw_visible(rows, new, heads):
    """``[B, heads, S, max_length]`` bool: about half of all slots; of several queries all of the first's and, in one
    sequence, none of the last's.
    """
    visible = torch.rand(len(rows.lengths), heads, new, rows.max_length) < 0.5
    if new > 1:
        visible[:, :, 0] = True
        visible[0, :, -1] = False
    return visible


# ---------------------------------------------------------------------------------------------------------------- drawn
@st.composite
def drawn_rows(draw, room=0):
    """Rows of any lengths in blocks anywhere. What nobody stored is NaN for kernels, which do not read it."""
    heads = draw(st.integers(1, 3))
    length = st.one_of(st.integers(0, 5), st.integers(0, 80))
    lengths = draw(st.lists(st.lists(length, min_size=heads, max_size=heads), min_size=1, max_size=3))
    torch.manual_seed(draw(st.integers(0, 9999)))
    dtype = draw(st.sampled_from([torch.float32, torch.float16]))
    sizes = draw(st.sampled_from([(8, 8), (24, 16), (80, 80)]))
    block_size = draw(st.sampled_from([1, 4, 16, 32]))
    unused = NAN if INTERPRETED else 6.0
    return make_rows(
        lengths,
        block_size=block_size,
        dims=sizes,
        dtype=dtype,
        layout=draw(st.sampled_from(LAYOUTS)),
        room=room,
        unused=unused,
        metric=draw(st.booleans()),
    )


# --------------------------------------------------------------------------------------------------------- shared keys
UNUSED = NAN if INTERPRETED else 6.0  # kernels do not read what nobody stored


def with_followers(rows, followers, proximal, now, ring, ordered):
    """`rows` of which the `followers` keep keys of proximal tokens alone, with true positions below `now` [B]."""
    batch, heads = rows.lengths.shape
    index = torch.tensor(followers)
    rest = torch.tensor([head for head in range(heads) if head not in followers], dtype=torch.int64)
    keys = torch.full((batch, len(followers), min(proximal.first + ring, max(now)), rows.keys.shape[-1]), UNUSED)
    proximal_keys = ProximalKeys(tuple(followers), keys.to(rows.keys.dtype), proximal, ring, index, rest)
    for b, h in itertools.product(range(batch), range(heads)):
        length = int(rows.lengths[b, h])
        older = torch.randperm(now[b] - 1)[: length - 1]  # the newest token is stored in every row, anywhere
        place = torch.cat([older, torch.tensor([now[b] - 1])])[torch.randperm(length)]
        if ordered:
            place = torch.arange(length)
        slots = torch.arange(length)
        block = rows.value_table[b, h, slots // rows.block_size]
        rows.positions[block, slots % rows.block_size] = place.to(torch.int32)
        if h in followers:
            held = torch.tensor(
                [p for p in range(now[b]) if p < proximal.first or p >= now[b] - ring], dtype=torch.int64
            )
            fresh = torch.randn(len(held), keys.shape[-1]).to(rows.keys.dtype)
            proximal_keys.keys[b, followers.index(h), proximal_keys.places(held)] = fresh
    table = rows.key_table.clone()
    table[:, index] = -1
    return replace(rows, key_table=table, proximal=proximal_keys, in_order=ordered, contiguous=False, starts=None)


@st.composite
def rows_with_followers(draw, room=0):
    """Rows in order, with all tokens of a sequence, or any of them in any order, where some heads follow."""
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    followers = sorted(draw(st.sets(st.integers(0, heads - 1), min_size=1)))
    now = draw(st.lists(st.integers(1, 80), min_size=batch, max_size=batch))
    ordered = draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 9999)))
    lengths = [[n if ordered else int(torch.randint(1, n + 1, ())) for _ in range(heads)] for n in now]
    rows = make_rows(
        lengths,
        block_size=draw(st.sampled_from([1, 4, 16])),
        dims=draw(st.sampled_from([(8, 8), (24, 16)])),
        dtype=draw(st.sampled_from([torch.float32, torch.float16])),
        room=room,
        unused=UNUSED,
        metric=draw(st.booleans()),
    )
    proximal = Proximal(draw(st.integers(0, 4)), draw(st.integers(1, 9)))
    ring = proximal.recent + draw(st.integers(0, 3))
    positions = torch.tensor(now, dtype=torch.int32)[:, None] - 1
    return with_followers(rows, followers, proximal, now, ring, ordered), positions
