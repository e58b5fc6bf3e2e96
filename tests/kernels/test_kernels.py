"""The ops on paged rows: each against its reference, and against attention written out in float64."""

import importlib
import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.kernel_cases import (
    ATTEND_PARAMS,
    DTYPES,
    HIDES_ALL,
    INTERPRETED,
    LAYOUTS,
    NAN,
    UNUSED,
    AttendCase,
    assert_error_bounded,
    assert_observed,
    assert_same_pools,
    attend_inputs,
    attend_plain,
    bounded_loosely,
    clone,
    draw_visible,
    drawn_rows,
    dtype_id,
    few_interpreted,
    make_rows,
    observe_plain,
    read_row,
    rows_with_followers,
    slow_interpreted,
    with_followers,
)
from support.marks import most_examples

from kara_hf.kernels import (
    Proximal,
    append,
    append_reference,
    attend,
    attend_masked,
    attend_reference,
    attend_shared,
    attend_shared_reference,
    compact,
    compact_reference,
    gather_rows,
    lead_scores,
    sampled_places,
    slot_index,
    window_scores,
    window_scores_reference,
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", ATTEND_PARAMS)
def test_attend(case, dtype, layout):
    for block_size in case.block_sizes:
        query, rows, settings = attend_inputs(case, dtype, block_size, layout)
        exact = attend_plain(query, rows, torch.float64, **settings)
        plain = attend_plain(query, rows, dtype, **settings)
        before = clone(rows)
        got = attend(query, rows, **settings)
        assert got.shape == exact.shape and got.dtype == dtype
        assert_error_bounded(got, plain, exact)
        assert_same_pools(rows, before)
        assert_error_bounded(attend(query, bounded_loosely(rows), **settings), plain, exact)
        if case.new < 50:
            assert_error_bounded(attend_reference(query, rows, **settings), plain, exact)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", ATTEND_PARAMS)
def test_attend_observes(case, dtype, layout):
    """Probabilities are float32 whatever the dtype of the model."""
    for block_size, (metric_power, loosely) in itertools.product(case.block_sizes, ((1, True), (2, False))):
        query, rows, settings = attend_inputs(case, dtype, block_size, layout, metric=True)
        plain, exact = (
            observe_plain(query, rows, kind, metric_power, **settings) for kind in (torch.float32, torch.float64)
        )
        observed = clone(bounded_loosely(rows) if loosely else rows)
        got = attend(query, observed, **settings, metric_power=metric_power)
        assert_observed(observed, rows, plain, exact)
        outs = [attend_plain(query, rows, kind, **settings) for kind in (dtype, torch.float64)]
        assert_error_bounded(got, *outs)
        if case.new < 50:
            observed = clone(rows)
            attend_reference(query, observed, **settings, metric_power=metric_power)
            assert_observed(observed, rows, plain, exact)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", ATTEND_PARAMS)
def test_attend_visible(case, dtype, layout):
    """Only visible slots take part, beside the causal order; what lies where no token is does not matter."""
    for metric_power, each_head, loosely in ((None, True, True), (2, False, False), (1, True, True)):
        block_size = case.block_sizes[0]
        query, rows, settings = attend_inputs(
            case, dtype, block_size, layout, unused=NAN, metric=metric_power is not None
        )
        rows = bounded_loosely(rows) if loosely else rows
        visible = draw_visible(rows, case.new, rows.lengths.shape[1] if each_head else 1)
        exact, plain = (attend_plain(query, rows, kind, **settings, visible=visible) for kind in (torch.float64, dtype))
        for op in (attend, attend_reference) if case.new < 50 else (attend,):
            observed = clone(rows)
            got = op(query, observed, **settings, visible=visible, metric_power=metric_power)
            assert got.shape == exact.shape and got.dtype == dtype
            assert_error_bounded(got, plain, exact)
            assert case.new == 1 or (got[0, :, -1] == 0).all()
            if metric_power is None:
                assert_same_pools(observed, rows)
                continue
            metrics = (
                observe_plain(query, rows, kind, metric_power, **settings, visible=visible)
                for kind in (torch.float32, torch.float64)
            )
            assert_observed(observed, rows, *metrics)


@pytest.mark.parametrize("case", ATTEND_PARAMS)
def test_attend_where_all_is_visible_is_attend(case):
    query, rows, settings = attend_inputs(case, torch.float32, case.block_sizes[0], "shuffled", metric=True)
    visible = torch.ones(len(rows.lengths), 1, case.new, rows.max_length, dtype=torch.bool)
    masked = clone(rows)
    expected = attend(query, rows, **settings, metric_power=2)
    got = attend(query, masked, **settings, visible=visible, metric_power=2)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(masked.metric, rows.metric, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(
    "shape, dtype",
    [((2, 1, 2, 4), torch.bool), ((2, 4, 2, 3), torch.bool), ((2, 2, 1, 3), torch.bool), ((2, 2, 2, 3), torch.int32)],
    ids=["slots", "heads", "queries", "dtype"],
)
def test_attend_refuses_a_mask_that_does_not_fit(shape, dtype):
    rows = make_rows([[3, 3], [3, 3]], block_size=4)
    with pytest.raises(
        ValueError, match=rf"visible of shape \({', '.join(map(str, shape))}\) and {dtype} does not fit"
    ):
        attend(torch.zeros(2, 4, 2, 8), rows, scaling=1.0, visible=torch.ones(shape, dtype=dtype))


def test_attend_observes_every_step():
    """Over steps that each store a token, a token's metric is the sum of what all queries since gave it."""
    rows = make_rows([[0, 0]], block_size=4, room=9, metric=True)
    queries, keys, values = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    for step in range(9):
        new = slice(step, step + 1)
        append(rows, keys[:, :, new], values[:, :, new], torch.tensor([[step]], dtype=torch.int32))
        rows = replace(rows, lengths=rows.lengths + 1, max_length=step + 1)
        attend(queries[:, :, new], rows, scaling=0.5, metric_power=2)
    logits = queries.double() @ keys.double().repeat_interleave(2, 1).transpose(2, 3) * 0.5
    weights = logits.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)
    expected = weights.square().sum(2).view(1, 2, 2, 9).sum(2).float()
    for h in range(2):
        torch.testing.assert_close(read_row(rows, 0, h)[3], expected[0, h], rtol=1e-5, atol=1e-6)


@slow_interpreted
def test_attend_observes_many_queries_in_turns(monkeypatch):
    case = AttendCase("", [[20, 9], [8, 40]], group=2, new=8, softcap=3.0, sink_logits=True)
    query, rows, settings = attend_inputs(case, torch.float32, 4, "shuffled", metric=True)
    some = torch.tensor([[3, 3, 2, 2, 1, 1, 0, 0], [9] * 8], dtype=torch.int32)
    for num_unseen, visible in itertools.product((None, some), (None, draw_visible(rows, 8, 2))):
        settings |= {"num_unseen": num_unseen, "visible": visible, "metric_power": 1}
        whole, turns = clone(rows), clone(rows)
        expected = attend(query, whole, **settings)
        with monkeypatch.context() as patch:
            patch.setattr(importlib.import_module("kara_hf.kernels.attend"), "OBSERVED_CHUNK", 3)
            torch.testing.assert_close(attend(query, turns, **settings), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(turns.metric, whole.metric, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_attend_in_float32_takes_half_precision_in_parts(dtype, monkeypatch):
    """Whatever the number of tokens that are made float32 at once."""
    case = AttendCase("", [[20, 9], [8, 40]], group=2, new=2, softcap=3.0, sink_logits=True)
    query, rows, settings = attend_inputs(case, dtype, 4, "shuffled", metric=True)
    exact = attend_plain(query, rows, torch.float64, **settings)
    metric = observe_plain(query, rows, torch.float64, 2, **settings)
    monkeypatch.setattr(importlib.import_module("kara_hf.kernels.dense"), "KEY_CHUNK", 7)
    before = clone(rows)
    plain = attend_plain(query, rows, dtype, **settings)
    assert_error_bounded(attend(query, rows, **settings, metric_power=2), plain, exact)
    assert_observed(rows, before, metric.float(), metric)


def test_attend_observes_contiguous_rows_in_place(monkeypatch):
    """A decode step over uniform rows gathers nothing, and the metric joins no graph of gradients."""
    case = AttendCase("", [[9, 9], [9, 9]], group=2)
    query, rows, settings = attend_inputs(case, torch.float32, 4, "contiguous", metric=True)
    monkeypatch.setattr(importlib.import_module("kara_hf.kernels.rows"), "gather_rows", None)
    before = clone(rows)
    attend(query.requires_grad_(), rows, **settings, metric_power=2)
    assert not rows.metric.requires_grad and not torch.equal(rows.in_place[3][:, :, :9], before.in_place[3][:, :, :9])


@pytest.mark.parametrize("metric_power, metric", [(2, False), (0, True), (3, True)])
def test_attend_refuses_what_it_cannot_observe(metric_power, metric):
    rows = make_rows([[3, 3]], block_size=4, metric=metric)
    with pytest.raises(
        ValueError, match=f"metric_power={metric_power} of rows with.* a metric is not possible; expected 1 or 2"
    ):
        attend(torch.zeros(1, 2, 1, 8), rows, scaling=1.0, metric_power=metric_power)


@pytest.mark.parametrize("case", ATTEND_PARAMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
def test_attend_never_lets_unused_slots_matter(case, dtype):
    """Any finite number may lie in slots past a row's length and in blocks that no row uses."""
    results = []
    for unused in (0.0, 1.0, 6e4):
        torch.manual_seed(1)
        query, rows, settings = attend_inputs(case, dtype, case.block_sizes[0], "shuffled", unused=unused)
        results.append(attend(query, rows, **settings))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("case", ATTEND_PARAMS)
def test_attend_reads_contiguous_rows_as_it_reads_others(case):
    query, rows, settings = attend_inputs(case, torch.float32, case.block_sizes[0], "contiguous")
    got, expected = (attend(query, replace(rows, contiguous=flag), **settings) for flag in (True, False))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("new", [1, 3])
def test_attend_against_torch(group, new):
    """The same as `scaled_dot_product_attention` on the dense rows with an explicit mask."""
    rows = make_rows([[9, 17], [3, 6]], block_size=4, dims=(24, 16), unused=1.0)
    query = torch.randn(2, 2 * group, new, 24)
    longest = rows.max_length
    keys, values = torch.zeros(2, 2, longest, 24), torch.zeros(2, 2, longest, 16)
    mask = torch.zeros(2, 2, new, longest, dtype=torch.bool)
    for b in range(2):
        for h in range(2):
            length = int(rows.lengths[b, h])
            keys[b, h, :length], values[b, h, :length], *_ = read_row(rows, b, h)
            for s in range(new):
                mask[b, h, s, : length - (new - 1 - s)] = True
    spread = [part.repeat_interleave(group, dim=1) for part in (keys, values, mask)]
    expected = F.scaled_dot_product_attention(query, spread[0], spread[1], attn_mask=spread[2], scale=0.3)
    torch.testing.assert_close(attend(query, rows, scaling=0.3), expected, rtol=1e-5, atol=1e-6)


def test_attend_in_chunks_of_queries_gives_what_one_chunk_gives(monkeypatch):
    query, rows, settings = attend_inputs(
        AttendCase("", [[20, 9]], group=2, new=8, softcap=3.0), torch.float32, 4, "shuffled"
    )
    whole = attend(query, rows, **settings)
    monkeypatch.setattr(importlib.import_module("kara_hf.kernels.attend"), "QUERY_CHUNK", 3)
    torch.testing.assert_close(attend(query, rows, **settings), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 0.7], ids=["plain", "softcap"])
@pytest.mark.parametrize("mask_heads", [1, 2])
def test_attend_masked(mask_heads, softcap):
    """The dense form under any mask; a query that sees nothing gets zeros."""
    query, keys, values = torch.randn(2, 6, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 4)
    mask = torch.rand(2, mask_heads, 3, 5) < 0.5
    mask[0, 0, 1] = False
    got = attend_masked(query, keys, values, mask, 0.4, softcap)
    logits = query.double() @ keys.double().repeat_interleave(3, 1).transpose(2, 3) * 0.4
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    wide = mask.expand(2, 2, 3, 5).repeat_interleave(3, 1)
    weights = logits.masked_fill(~wide, float("-inf")).softmax(3).nan_to_num(0.0)
    expected = (weights @ values.double().repeat_interleave(3, 1)).float()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert (got[0, :3, 1] == 0).all()


@pytest.mark.parametrize(
    "shape", [(2, 3, 1, 8), (2, 4, 1, 7), (3, 4, 1, 8)], ids=["heads-no-multiple", "key-size", "batch"]
)
def test_attend_refuses_shapes_that_do_not_fit(shape):
    rows = make_rows([[3, 3], [3, 3]], block_size=4)
    with pytest.raises(ValueError, match=r"expected \[B, G \* H, S, Dk\]"):
        attend(torch.zeros(shape), rows, scaling=1.0)


# --------------------------------------------------------------------------------------------------------------- append
@dataclass(frozen=True)
class AppendCase:
    """real: per sequence a string, one character per new token, "." for padding."""

    name: str
    lengths: list
    new: int
    real: list | None = None
    dims: tuple = (8, 8)


APPEND_CASES = [
    AppendCase("no-tokens", [[3, 3]], 0),
    AppendCase("first-token", [[0, 0], [0, 0]], 1),
    AppendCase("fills-a-block", [[3, 3], [3, 3]], 1),
    AppendCase("opens-a-block", [[4, 4], [4, 4]], 1),
    AppendCase("crosses-blocks", [[3, 3], [3, 3]], 14, dims=(24, 16)),
    AppendCase("uneven-one", [[0, 15], [16, 17]], 1),
    AppendCase("uneven-many", [[0, 15], [16, 70]], 9, dims=(24, 16)),
    AppendCase("padded-left", [[0, 0], [0, 0]], 6, real=["..RRRR", "RRRRRR"]),
    AppendCase("padded-right-and-middle", [[5, 2], [4, 4]], 6, real=["RRR...", "R.R..R"]),
    AppendCase("padding-only", [[5, 4], [7, 0]], 3, real=["...", "R.R"]),
    AppendCase("padding-nowhere", [[5, 4], [7, 0]], 3, real=["RRR", "RRR"]),
]
APPEND_PARAMS = few_interpreted(APPEND_CASES, "no-tokens", "uneven-one", "padded-right-and-middle", "padding-only")


def append_inputs(case, dtype, block_size, layout, metric=False):
    rows = make_rows(
        case.lengths,
        block_size=block_size,
        dims=case.dims,
        dtype=dtype,
        layout=layout,
        room=max(case.new, 1),
        metric=metric,
    )
    batch, heads = rows.lengths.shape
    keys = torch.randn(batch, heads, case.new, case.dims[0]).to(dtype)
    values = torch.randn(batch, heads, case.new, case.dims[1]).to(dtype)
    positions = torch.randint(0, 999, (batch, case.new), dtype=torch.int32)
    real = None
    if case.real is not None:
        real = torch.tensor([[mark == "R" for mark in marks] for marks in case.real])
    return rows, keys, values, positions, real


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", APPEND_PARAMS)
def test_append(case, dtype, layout):
    """Every slot of the pools is as the reference leaves it, those nobody writes included."""
    for block_size, metric in itertools.product((1, 4, 16), (False, True)):
        rows, *new = append_inputs(case, dtype, block_size, layout, metric)
        expected = clone(rows)
        append_reference(expected, *new)
        append(bounded_loosely(rows) if block_size == 4 else rows, *new)
        assert_same_pools(rows, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", APPEND_PARAMS)
def test_append_reads_back(case, layout):
    """Old tokens in front, real new ones behind, in order; those are of no importance yet."""
    rows, keys, values, positions, real = append_inputs(case, torch.float32, 4, layout, metric=True)
    old = clone(rows)
    append(rows, keys, values, positions, real)
    for b in range(rows.lengths.shape[0]):
        chosen = slice(None) if real is None else real[b]
        for h in range(rows.lengths.shape[1]):
            added = (keys[b, h, chosen], values[b, h, chosen], positions[b, chosen])
            added += (torch.zeros(len(added[2])),)
            length = int(rows.lengths[b, h]) + len(added[2])
            for got, before, extra in zip(read_row(rows, b, h, length), read_row(old, b, h), added, strict=True):
                assert torch.equal(got, torch.cat([before, extra]))


def test_append_needs_no_block_for_padding():
    """A full row that gets no real token needs no further block."""
    rows = make_rows([[4], [2]], block_size=4)
    new = torch.randn(2, 1, 1, 8), torch.randn(2, 1, 1, 8), torch.tensor([[9], [9]], dtype=torch.int32)
    real = torch.tensor([[False], [True]])
    expected = clone(rows)
    append_reference(expected, *new, real)
    append(rows, *new, real)
    assert_same_pools(rows, expected)


# -------------------------------------------------------------------------------------------------------------- compact
@dataclass(frozen=True)
class CompactCase:
    """keep: how many tokens at or behind each sequence's start move to `start` and the slots behind it.

    idle: how many entries that move nothing stand between the moves, which are then in no order.
    """

    name: str
    lengths: list
    sequences: list
    start: list
    keep: int
    dims: tuple = (8, 8)
    idle: int = 0


COMPACT_CASES = [
    CompactCase("none-survive", [[9, 9]], [0], [3], 0),
    CompactCase("all-survive", [[9, 9]], [0], [0], 9),
    CompactCase("one-of-many", [[33, 33], [20, 20]], [0], [16], 1),
    CompactCase("starts-on-a-block", [[40, 40], [40, 40]], [0, 1], [16, 16], 7),
    CompactCase("starts-inside-a-block", [[41, 41], [41, 41]], [0, 1], [17, 5], 13),
    CompactCase("out-of-order-sequences", [[30, 30], [9, 9], [50, 50]], [2, 0], [20, 3], 10, (24, 16)),
    CompactCase("ragged-heads", [[30, 21], [9, 9]], [0], [4], 17, (24, 16)),
    CompactCase("no-sequence", [[5, 5]], [], [], 2),
    CompactCase("some-idle", [[30, 21], [12, 60]], [1, 0], [2, 0], 9, (24, 16), idle=5),
    CompactCase("all-idle", [[0, 5], [1, 0]], [0, 1], [0, 0], 0, idle=3),
]
COMPACT_PARAMS = few_interpreted(COMPACT_CASES, "none-survive", "no-sequence", "some-idle", "all-idle")


def compact_inputs(case, dtype, block_size, layout, metric=False):
    rows = make_rows(case.lengths, block_size=block_size, dims=case.dims, dtype=dtype, layout=layout, metric=metric)
    shape = len(case.sequences), rows.lengths.shape[1], case.keep + case.idle
    source, target = torch.full(shape, -9, dtype=torch.int32), torch.full(shape, -1, dtype=torch.int32)
    for i, (b, start) in enumerate(zip(case.sequences, case.start, strict=True)):
        for h in range(shape[1]):
            chosen = torch.randperm(int(rows.lengths[b, h]) - start)[: case.keep].sort().values
            entries = torch.randperm(shape[2])[: case.keep] if case.idle else slice(None)
            source[i, h, entries] = (start + chosen).to(torch.int32)
            target[i, h, entries] = start + torch.arange(case.keep, dtype=torch.int32)
    return rows, torch.tensor(case.sequences, dtype=torch.int64), source, target


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", COMPACT_PARAMS)
def test_compact(case, dtype, layout):
    for block_size, metric in itertools.product((1, 4, 16), (False, True)):
        rows, *moves = compact_inputs(case, dtype, block_size, layout, metric)
        expected = clone(rows)
        compact_reference(expected, *moves)
        compact(rows, *moves)
        assert_same_pools(rows, expected)


@pytest.mark.parametrize("case", COMPACT_PARAMS)
def test_compact_reads_back(case):
    """All there is of a token moves together; slots that nothing moves to and other rows do not change."""
    rows, sequences, source, target = compact_inputs(case, torch.float32, 4, "shuffled", metric=True)
    old = clone(rows)
    compact(rows, sequences, source, target)
    for b in range(rows.lengths.shape[0]):
        for h in range(rows.lengths.shape[1]):
            before = read_row(old, b, h)
            order = torch.arange(len(before[0]))
            if b in case.sequences:
                i = case.sequences.index(b)
                moved = target[i, h] >= 0
                order[target[i, h][moved].long()] = source[i, h][moved].long()
            for got, was in zip(read_row(rows, b, h), before, strict=True):
                assert torch.equal(got, was[order])


def test_compact_reads_all_before_it_writes():
    """Tokens that move over each other, in an order of the caller's."""
    rows = make_rows([[8]], block_size=4, metric=True)
    old = read_row(rows, 0, 0)
    order = [7, 0, 6, 1, 5, 2, 4, 3]
    source, target = torch.tensor([[order]], dtype=torch.int32), torch.arange(8, dtype=torch.int32)[None, None]
    compact(rows, torch.tensor([0]), source, target)
    for got, was in zip(read_row(rows, 0, 0), old, strict=True):
        assert torch.equal(got, was[order])


# -------------------------------------------------------------------------------------------------------- window_scores
@dataclass(frozen=True)
class ScoreCase:
    name: str
    shape: tuple  # B, H, W, D
    group: int = 1
    softcap: float | None = None
    causal: bool = False
    count: int | None = None  # queries, if not all


SCORE_CASES = [
    ScoreCase("one-token", (1, 1, 1, 8)),
    ScoreCase("two-tokens", (1, 2, 2, 8), group=4),
    ScoreCase("odd-window", (2, 2, 13, 24), group=4),
    ScoreCase("block-of-16", (2, 1, 16, 16)),
    ScoreCase("causal", (2, 2, 13, 24), group=4, causal=True),
    ScoreCase("softcap", (2, 2, 17, 8), group=2, softcap=0.7),
    ScoreCase("softcap-causal", (1, 2, 17, 8), group=2, softcap=0.7, causal=True),
    ScoreCase("window-65", (1, 1, 65, 8), group=2),
    ScoreCase("sample", (2, 2, 13, 24), group=4, count=3),
    ScoreCase("sample-causal", (1, 2, 17, 8), group=2, causal=True, count=5),
    ScoreCase("sample-of-one", (1, 1, 7, 8), softcap=0.7, causal=True, count=1),
]
SCORE_PARAMS = few_interpreted(SCORE_CASES, "one-token", "odd-window", "softcap-causal", "sample-causal")


def written_out(queries, keys, scaling, softcap, causal):
    """kara.md's formula, one attention weight after another in Python's float64."""
    batch, query_heads, count, _ = queries.shape
    heads, window = keys.shape[1:3]
    group = query_heads // heads
    places = [max(j for j in range(window) if j * count // window == i) for i in range(count)]
    scores = torch.zeros(batch, heads, window, dtype=torch.float64)
    for b in range(batch):
        for hq in range(query_heads):
            logits = (queries[b, hq].double() @ keys[b, hq // group].double().T * scaling).tolist()
            for i, row in enumerate(logits):
                row = row[: places[i] - hq % group * window // (count * group) + 1] if causal else row
                row = row if softcap is None else [softcap * math.tanh(logit / softcap) for logit in row]
                weights = [math.exp(logit - max(row)) for logit in row]
                for j, weight in enumerate(weights):
                    scores[b, hq // group, j] += weight / math.fsum(weights) / (group * count)
    return scores


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", SCORE_PARAMS)
def test_window_scores(case, dtype):
    batch, heads, window, dim = case.shape
    queries = 2 * torch.randn(batch, heads * case.group, case.count or window, dim).to(dtype)
    keys = torch.randn(batch, heads, window, dim).to(dtype)
    settings = {"scaling": dim**-0.5, "softcap": case.softcap, "causal": case.causal}
    exact = written_out(queries, keys, **settings)
    got = window_scores(queries, keys, **settings)
    reference = window_scores_reference(queries, keys, **settings)
    assert got.shape == exact.shape and got.dtype == reference.dtype == torch.float32
    torch.testing.assert_close(got.sum(-1), torch.ones(batch, heads), rtol=1e-5, atol=1e-5)
    assert (got >= 0).all()
    # Half-precision inputs are scored in float32 as well, so the bound is float32's own error for all of them.
    ulp = 4 * torch.finfo(torch.float32).eps * exact.max()
    assert (got - exact).abs().max() <= max(2 * (reference - exact).abs().max(), ulp)
    assert (reference - exact).abs().max() <= 16 * ulp


def test_window_scores_count_votes_in_both_directions():
    """With equal keys every token gets the same share; under a causal mask the early ones get more."""
    queries, keys = torch.randn(1, 2, 8, 4), torch.ones(1, 1, 8, 4)
    torch.testing.assert_close(window_scores(queries, keys, scaling=1.0), torch.full((1, 1, 8), 1 / 8))
    assert (window_scores(queries, keys, scaling=1.0, causal=True).diff() < 0).all()


def test_a_sample_is_spread_evenly_and_ends_with_the_window():
    assert sampled_places(4, 16).tolist() == [[3, 7, 11, 15]]
    assert sampled_places(3, 16).tolist() == [[5, 10, 15]]
    assert sampled_places(2, 16, 3).tolist() == [[7, 15], [5, 13], [2, 10]]
    for window, count, group in itertools.product(range(1, 16), range(1, 16), (1, 2, 3, 7)):
        if count <= window:
            places = sampled_places(count, window, group)
            ends = [max(j for j in range(window) if j * count // window == i) for i in range(count)]
            assert places[0].tolist() == ends
            assert (places >= 0).all() and (places.diff(dim=1) > 0).all() and (places.diff(dim=0) <= 0).all()
    assert sampled_places(9, 9, 3).tolist() == [list(range(9))] * 3


@pytest.mark.parametrize("keys", [(1, 2, 5, 4), (1, 3, 6, 4)], ids=["window", "heads-no-multiple"])
def test_window_scores_refuse_shapes_that_do_not_fit(keys):
    with pytest.raises(ValueError, match="do not fit"):
        window_scores(torch.zeros(1, 4, 6, 4), torch.zeros(keys), scaling=1.0)


# ----------------------------------------------------------------------------------------------------------------- rows
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_gather_rows_and_slot_index(block_size, layout):
    """Both find the slots that reading one by one finds; `dense` reads only a contiguous layout in place."""
    rows = make_rows([[0, 5], [17, 16]], block_size=block_size, layout=layout, unused=1.0)
    gathered = rows.dense()[0]
    assert torch.equal(gather_rows(rows.keys, rows.key_table, 17), gathered)
    assert (gathered.untyped_storage().data_ptr() == rows.keys.untyped_storage().data_ptr()) == rows.contiguous
    for b in range(2):
        for h in range(2):
            length = int(rows.lengths[b, h])
            keys, _, positions = read_row(rows, b, h)
            assert torch.equal(gathered[b, h, :length], keys)
            slots = torch.arange(length, dtype=torch.int32).view(1, 1, -1)
            flat = slot_index(rows.value_table[b : b + 1, h : h + 1], slots, block_size)
            assert flat.dtype == torch.int64
            assert torch.equal(rows.positions.flatten()[flat[0, 0]], positions)


@most_examples(6 if INTERPRETED else 15)
@given(rows=drawn_rows(room=6), new=st.integers(1, 6), group=st.integers(1, 5), padded=st.booleans(), data=st.data())
def test_drawn_append_and_attend(rows, new, group, padded, data):
    """A step as a cache takes it: new tokens are stored, then seen by their own queries."""
    (batch, heads), dtype = rows.lengths.shape, rows.keys.dtype
    keys = torch.randn(batch, new, heads, rows.keys.shape[-1]).to(dtype).transpose(1, 2)
    values = torch.randn(batch, new, heads, rows.values.shape[-1]).to(dtype).transpose(1, 2)
    positions = torch.randint(0, 999, (batch, new), dtype=torch.int32)
    marks = st.lists(st.booleans(), min_size=new, max_size=new)
    real = torch.tensor(data.draw(st.lists(marks, min_size=batch, max_size=batch))) if padded else None
    expected = clone(rows)
    append_reference(expected, keys, values, positions, real)
    append(rows, keys, values, positions, real)
    assert_same_pools(rows, expected)

    count = torch.full((batch, 1), new) if real is None else real.sum(1, keepdim=True)
    lengths = (rows.lengths + count).to(torch.int32)
    room = rows.key_table.shape[2] * rows.block_size
    rows = replace(rows, lengths=lengths, max_length=data.draw(st.integers(int(lengths.max()), room)), uniform=False)
    query = torch.randn(batch, heads * group, new, rows.keys.shape[-1]).to(dtype)
    num_unseen = None
    if real is not None:
        num_unseen = (count - real.cumsum(1)).to(torch.int32).masked_fill(~real, HIDES_ALL)
    asked = {"scaling": query.shape[-1] ** -0.5, "num_unseen": num_unseen, "softcap": None, "sink_logits": None}
    exact = attend_plain(query, rows, torch.float64, **asked)
    before, tolerance = clone(rows), 1e-5 if dtype == torch.float32 else 4e-3
    metric_power = None if rows.metric is None else data.draw(st.sampled_from([None, 1, 2]))
    got = attend(query, rows, **asked, metric_power=metric_power)
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance)
    if metric_power is None:
        assert_same_pools(rows, before)
    else:
        metrics = [observe_plain(query, before, kind, metric_power, **asked) for kind in (torch.float32, torch.float64)]
        assert_observed(rows, before, *metrics)


@most_examples(6 if INTERPRETED else 15)
@given(rows=drawn_rows(), entries=st.integers(0, 40), data=st.data())
def test_drawn_compact(rows, entries, data):
    """Any moves in any order, over each other too, in any sequences, between entries that move nothing."""
    sequences = data.draw(st.lists(st.sampled_from(range(len(rows.lengths))), unique=True))
    shape = len(sequences), rows.lengths.shape[1], entries
    source, target = (torch.randint(-5, 0, shape, dtype=torch.int32) for _ in range(2))
    for i, b in enumerate(sequences):
        for h in range(shape[1]):
            length = int(rows.lengths[b, h])
            order = torch.randperm(entries)[: int(torch.randint(0, min(length, entries) + 1, ()))]
            for slots in (source, target):
                slots[i, h, order] = torch.randperm(length, dtype=torch.int32)[: len(order)]
    moves = torch.tensor(sequences, dtype=torch.int64), source, target
    expected = clone(rows)
    compact_reference(expected, *moves)
    compact(rows, *moves)
    assert_same_pools(rows, expected)


@most_examples(6 if INTERPRETED else 30)
@given(drawn=rows_with_followers(), group=st.integers(1, 5), loosely=st.booleans(), data=st.data())
def test_drawn_attend_shared(drawn, group, loosely, data):
    """Against the specification: what is seen, what is handed on and to whom, and what is observed."""
    rows, positions = drawn
    (batch, heads), dtype, followers = rows.lengths.shape, rows.keys.dtype, rows.proximal.heads
    if data.draw(st.booleans()):
        positions = positions.masked_fill(torch.rand(batch, 1) < 0.3, -1)
    if data.draw(st.booleans()):  # a layer in which nobody follows
        followers = ()
        keyed = make_rows(rows.lengths.tolist(), block_size=rows.block_size, dims=rows.keys.shape[-1:] * 2, dtype=dtype)
        rows = replace(rows, proximal=None, keys=keyed.keys, key_table=keyed.key_table)
    query = torch.randn(batch, 1, heads * group, rows.keys.shape[-1]).to(dtype).transpose(1, 2)
    rest = [head for head in range(heads) if head not in followers]
    settings = {
        "positions": positions,
        "leading": sorted(data.draw(st.sets(st.sampled_from(rest)))) if rest else (),
        "scaling": query.shape[-1] ** -0.5,
        "softcap": data.draw(st.sampled_from([None, 2.0])),
        "sink_logits": torch.randn(heads * group) if data.draw(st.booleans()) else None,
        "skip": None if UNUSED != UNUSED else data.draw(st.sampled_from([None, 0.4])),
        "metric_power": None if rows.metric is None else data.draw(st.sampled_from([None, 1, 2])),
    }
    scores = None
    if followers or data.draw(st.booleans()):
        width = max(1, rows.max_length + data.draw(st.sampled_from([-2, 0, 3])))
        if followers:  # leads hold what followers hold
            width = max(width, int(rows.lengths[:, list(followers)].max()))
        scores = torch.randn(batch, heads, group, 1, width)
        held = torch.arange(width) < rows.lengths[..., None]
        scores = scores.masked_fill(~held[:, :, None, None], UNUSED)
    given = clone(bounded_loosely(rows) if loosely else rows)
    expected_rows = clone(rows)
    expected, expected_scores = attend_shared_reference(
        query, expected_rows, None if scores is None else scores.clone(), **settings
    )
    before = None if scores is None else scores.clone()
    got, got_scores = attend_shared(query, given, scores, **settings)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    assert got.dtype == dtype and got_scores.dtype == torch.float32
    for b, h in itertools.product(range(batch), range(heads)):
        length = int(rows.lengths[b, h])
        if h in settings["leading"] and positions[b, 0] >= 0:
            handed_on = got_scores[b, h, :, 0, :length]
            torch.testing.assert_close(handed_on, expected_scores[b, h, :, 0, :length], rtol=1e-4, atol=1e-5)
        elif before is not None and h not in settings["leading"]:
            kept = before.shape[-1]
            torch.testing.assert_close(got_scores[b, h, ..., :kept], before[b, h], rtol=0, atol=0, equal_nan=True)
    assert_same_pools(replace(given, metric=None), replace(rows, metric=None))
    if rows.metric is not None:
        torch.testing.assert_close(given.metric, expected_rows.metric, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_followers_without_scores_are_refused():
    rows = with_followers(make_rows([[3, 3]], block_size=4), [1], Proximal(1, 2), [3], 2, True)
    with pytest.raises(ValueError, match=r"heads \(1,\) follow, and there are no scores of their leads"):
        attend_shared(
            torch.zeros(1, 2, 1, 8),
            rows,
            None,
            positions=torch.tensor([[2]], dtype=torch.int32),
            leading=(),
            scaling=1.0,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "softcap"])
def test_lead_scores(softcap, dtype):
    """Of several leads, one of which follows in another head."""
    lengths = [[5, 33, 17], [40, 2, 16]]
    first, second = (
        make_rows(lengths, block_size=4, dims=(24, 16), dtype=dtype, layout=layout, unused=UNUSED)
        for layout in ("contiguous", "shuffled")
    )
    second = with_followers(second, [0], Proximal(0, 2), [50, 50], 2, False)
    query = torch.randn(2, 1, 6, 24).to(dtype).transpose(1, 2)
    got = lead_scores(query, [first, second], [0, 2], scaling=0.3, softcap=softcap)
    assert got.shape == (2, 3, 2, 1, 40) and got.dtype == torch.float32
    for b, (h, rows) in itertools.product(range(2), ((0, first), (2, second))):
        exact = query[b, 2 * h : 2 * h + 2, 0].double() @ read_row(rows, b, h)[0].double().T * 0.3
        exact = exact if softcap is None else softcap * torch.tanh(exact / softcap)
        length = exact.shape[1]
        torch.testing.assert_close(got[b, h, :, 0, :length].double(), exact, rtol=1e-4, atol=1e-5)


@most_examples(6 if INTERPRETED else 20)
@given(drawn=rows_with_followers(room=6), new=st.integers(1, 6), padded=st.booleans(), data=st.data())
def test_drawn_append_and_compact_leave_keys_of_followers_alone(drawn, new, padded, data):
    rows, _ = drawn
    (batch, heads), dtype = rows.lengths.shape, rows.keys.dtype
    keys, values = (
        torch.randn(batch, heads, new, size).to(dtype) for size in (rows.keys.shape[-1], rows.values.shape[-1])
    )
    positions = torch.randint(0, 999, (batch, new), dtype=torch.int32)
    real = torch.rand(batch, new) < 0.5 if padded else None
    expected = clone(rows)
    append_reference(expected, keys, values, positions, real)
    append(rows, keys, values, positions, real)
    assert_same_pools(rows, expected)

    entries = data.draw(st.integers(1, 20))
    source, target = (torch.full((batch, heads, entries), -1, dtype=torch.int32) for _ in range(2))
    for b, h in itertools.product(range(batch), range(heads)):
        length = int(rows.lengths[b, h])
        moved = torch.randperm(entries)[: min(length, entries)]
        for slots in (source, target):
            slots[b, h, moved] = torch.randperm(length, dtype=torch.int32)[: len(moved)]
    expected = clone(rows)
    compact_reference(expected, torch.arange(batch), source, target)
    compact(rows, torch.arange(batch), source, target)
    assert_same_pools(rows, expected)
