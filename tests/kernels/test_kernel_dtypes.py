"""Queries, keys and values of dtypes of their own, and attention under autocast: every op does what
`scaled_dot_product_attention` does in the same context.
"""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.kernel_cases import (
    INTERPRETED,
    AttendCase,
    assert_error_bounded,
    attend_inputs,
    attend_plain,
    clone,
    draw_visible,
    make_rows,
    with_followers,
)

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
    lead_scores,
    shared_attention,
    shared_attention_reference,
    window_scores,
    window_scores_reference,
)

SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16


def named(*dtypes):
    return pytest.param(dtypes, id="-".join(str(dtype).removeprefix("torch.") for dtype in dtypes))


# Of query, keys and values: a rotary embedding in float32, norms in float32, and others.
MIXTURES = [named(SINGLE, SINGLE, BRAIN), named(SINGLE, SINGLE, HALF), named(BRAIN, SINGLE, BRAIN)]
MIXTURES += [named(HALF, SINGLE, HALF), named(HALF, BRAIN, SINGLE), named(SINGLE, HALF, HALF)]
AUTOCASTS = [pytest.param(BRAIN, id="to-bfloat16"), pytest.param(HALF, id="to-float16")]
if INTERPRETED:  # which does not know bfloat16
    MIXTURES, AUTOCASTS = [mixture for mixture in MIXTURES if BRAIN not in mixture.values[0]], AUTOCASTS[1:]


# Every op as a function of what makes a tensor of the dtype that a query, keys and values have: `q`, `k` and `v`. All
# draw the same numbers each time, and return all that they compute.
def rows_of(k, v, lengths, layout="shuffled", followed=False):
    """Rows with a metric, of which head 1 follows another layer's where they are `followed`."""
    rows = make_rows(lengths, block_size=4, layout=layout, unused=6.0, metric=True)
    if followed:
        rows = with_followers(rows, [1], Proximal(1, 3), [row[1] for row in lengths], 3, True)
        rows = replace(rows, proximal=replace(rows.proximal, keys=k(rows.proximal.keys)))
    return replace(rows, keys=k(rows.keys), values=v(rows.values))


def attending(op, metric_power=None, visible=False, layout="shuffled", **settings):
    def run(q, k, v):
        lengths, new = ([[9, 4], [1, 17]], 3) if layout == "shuffled" else ([[9, 9], [9, 9]], 1)
        rows = rows_of(k, v, lengths, layout=layout)
        query = q(2 * torch.randn(2, 4, new, 8))
        seen = draw_visible(rows, new, 2) if visible else None
        out = op(query, rows, scaling=0.4, metric_power=metric_power, visible=seen, **settings)
        return out, rows.metric.nan_to_num()

    return run


def masked(q, k, v):
    query, keys, values = q(torch.randn(2, 6, 3, 8)), k(torch.randn(2, 2, 5, 8)), v(torch.randn(2, 2, 5, 4))
    mask = torch.rand(2, 1, 3, 5) < 0.6
    return attend_masked(query, keys, values, mask, 0.4), attend_masked(query, keys, values, mask, 0.4, 2.0)


def following(op, skip=None):
    def run(q, k, v):
        rows = rows_of(k, v, [[9, 9], [12, 12]], followed=True)
        query, scores = q(torch.randn(2, 4, 1, 8)), torch.randn(2, 2, 2, 1, 12)
        positions = torch.tensor([[8], [11]], dtype=torch.int32)
        settings = {"positions": positions, "leading": (), "scaling": 0.4, "skip": skip, "metric_power": 2}
        return op(query, rows, scores, **settings)[0], rows.metric.nan_to_num()

    return run


def scored(q, k, v):
    leads = [rows_of(k, v, [[9, 9]]), rows_of(k, v, [[5, 5]], layout="contiguous")]
    scores = lead_scores(q(torch.randn(1, 4, 1, 8)), leads, [0, 1], scaling=0.4)
    return scores[:, 0, :, :, :9], scores[:, 1, :, :, :5]


def sharing(op):
    def run(q, k, v):
        query, keys, values = q(torch.randn(1, 4, 3, 8)), k(torch.randn(1, 2, 7, 8)), v(torch.randn(1, 2, 7, 4))
        lead = q(torch.randn(1, 2, 3, 8)), k(torch.randn(1, 1, 7, 8))
        places = torch.arange(7, dtype=torch.int32)
        settings = {"followers": [1], "proximal": Proximal(1, 2), "scaling": 0.4}
        at = {"query_positions": places[None, -3:], "key_positions": places[None, None]}
        return (op(query, keys, values, *lead, **settings, **at),)

    return run


def voting(op):
    return lambda q, k, v: (op(q(torch.randn(2, 4, 9, 8)), k(torch.randn(2, 2, 9, 8)), scaling=0.4, softcap=2.0),)


OPS = {
    "attend": attending(attend),
    "attend-observed": attending(attend, metric_power=2),
    "attend-visible": attending(attend, metric_power=1, visible=True),
    "attend-softcap": attending(attend, softcap=2.0, sink_logits=torch.zeros(4)),
    "attend-in-place": attending(attend, layout="contiguous"),
    "attend-each-row": attending(attend, metric_power=1, layout="one-by-one"),
    "attend-reference": attending(attend_reference, metric_power=2),
    "masked": masked,
    "attend-shared": following(attend_shared),
    "attend-shared-skips": following(attend_shared, skip=0.4),
    "attend-shared-reference": following(attend_shared_reference),
    "lead-scores": scored,
    "shared-attention": sharing(shared_attention),
    "shared-attention-reference": sharing(shared_attention_reference),
    "window-scores": voting(window_scores),
    "window-scores-reference": voting(window_scores_reference),
}


def computed(name, q, k, v, cast_to=None):
    """What an op computes of the same numbers in these dtypes, under autocast to `cast_to`."""
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=cast_to, enabled=cast_to is not None):
        return OPS[name](*(lambda tensor, dtype=dtype: rounded(tensor, dtype) for dtype in (q, k, v)))


def rounded(tensor, dtypes):
    """`tensor` through one dtype after the other, the last of which it has."""
    for dtype in dtypes:
        tensor = tensor.to(dtype)
    return tensor


def assert_same(got, expected):
    """To the last bit in plain torch; kernels take other tiles for elements of another size."""
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        tolerance = 8 * torch.finfo(one.dtype).eps if INTERPRETED else 0
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("name", OPS)
def test_a_mixture_is_rounded_once_to_the_dtype_of_the_query(name, mixture):
    """The same as of what is stored, made float32 before, and then rounded as the query's dtype wants it."""
    expected = computed(name, *((dtype, SINGLE) for dtype in mixture))
    got = computed(name, *((dtype,) for dtype in mixture))
    kind = got[0].dtype
    assert kind == (SINGLE if name.startswith(("lead", "window")) else mixture[0])
    assert_same(
        got, (expected[0].to(kind), *(part.to(one.dtype) for part, one in zip(expected[1:], got[1:], strict=True)))
    )


@pytest.mark.parametrize("cast_to", AUTOCASTS)
@pytest.mark.parametrize("mixture", [*MIXTURES, named(SINGLE, SINGLE, SINGLE)])
@pytest.mark.parametrize("name", OPS)
def test_autocast_rounds_what_goes_in(name, mixture, cast_to):
    """The same as of query, keys and values that have its dtype."""
    expected = computed(name, *((dtype, cast_to) for dtype in mixture))
    got = computed(name, *((dtype,) for dtype in mixture), cast_to=cast_to)
    assert got[0].dtype == (SINGLE if name.startswith(("lead", "window")) else cast_to)
    assert_same(got, expected)


@pytest.mark.parametrize("cast_to", AUTOCASTS)
@pytest.mark.parametrize("mixture", [*MIXTURES, named(SINGLE, SINGLE, SINGLE), named(*[torch.float64] * 3)])
@pytest.mark.parametrize("layout", ["contiguous", "shuffled", "one-by-one"])
def test_attend_is_torchs_attention_under_autocast(mixture, cast_to, layout):
    if INTERPRETED and torch.float64 in mixture:
        pytest.skip("no kernel is made for float64")
    rows = make_rows([[9, 9], [9, 9]], block_size=4, dims=(24, 16), unused=6.0, layout=layout)
    rows = replace(rows, keys=rows.keys.to(mixture[1]), values=rows.values.to(mixture[2]))
    query = torch.randn(2, 6, 1, 24, dtype=mixture[0])
    keys, values = (part.repeat_interleave(3, 1) for part in rows.dense())
    with torch.autocast("cpu", dtype=cast_to):
        got = attend(query, rows, scaling=0.3)
        plain = F.scaled_dot_product_attention(query, keys, values, scale=0.3)
    assert got.dtype == plain.dtype
    read = (part if part.dtype == torch.float64 else part.to(cast_to) for part in (query, keys, values))
    exact = F.scaled_dot_product_attention(*(part.double() for part in read), scale=0.3)
    assert_error_bounded(got, plain, exact)


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("layout", ["contiguous", "shuffled", "one-by-one"])
def test_attend_of_a_mixture_is_exact(mixture, layout):
    case = AttendCase("", [[9, 9], [9, 9]], group=2, new=2, dims=(24, 16), sink_logits=True)
    query, rows, settings = attend_inputs(case, SINGLE, 4, layout)
    query, rows = query.to(mixture[0]), replace(rows, keys=rows.keys.to(mixture[1]), values=rows.values.to(mixture[2]))
    exact, plain = (attend_plain(query, rows, kind, **settings) for kind in (torch.float64, mixture[0]))
    assert_error_bounded(attend(query, rows, **settings), plain, exact)


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("padded", [False, True], ids=["all-real", "padded"])
@pytest.mark.parametrize("layout", ["contiguous", "shuffled", "one-by-one"])
def test_append_and_compact_keep_both_dtypes(mixture, padded, layout):
    rows = make_rows([[5, 5], [5, 5]], block_size=4, layout=layout, room=3, metric=True)
    rows = replace(rows, keys=rows.keys.to(mixture[1]), values=rows.values.to(mixture[2]))
    keys, values = torch.randn(2, 2, 3, 8).to(mixture[1]), torch.randn(2, 2, 3, 8).to(mixture[2])
    real = torch.tensor([[True, False, True], [True, True, True]]) if padded else None
    arrivals = keys, values, torch.arange(3, dtype=torch.int32).expand(2, 3), real
    expected = clone(rows)
    append_reference(expected, *arrivals)
    append(rows, *arrivals)
    for got, wanted in zip((rows.keys, *rows.value_parts), (expected.keys, *expected.value_parts), strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
    before = clone(rows)
    compact(rows, torch.arange(2), torch.full((2, 2, 1), 4), torch.full((2, 2, 1), 1))
    for (b, h), pool in itertools.product(itertools.product(range(2), range(2)), ("keys", "values")):
        table = getattr(rows, "key_table" if pool == "keys" else "value_table")
        assert torch.equal(getattr(rows, pool)[table[b, h, 0], 1], getattr(before, pool)[table[b, h, 1], 0])


@pytest.mark.parametrize("pool, mixture", [("keys", (SINGLE, HALF)), ("values", (HALF, BRAIN))], ids=["keys", "values"])
def test_append_refuses_what_its_pool_would_round(pool, mixture):
    rows = make_rows([[5, 5]], block_size=4, room=1, unused=1.0)
    rows = replace(rows, keys=rows.keys.half(), values=rows.values.half())
    before = clone(rows)
    keys, values = torch.randn(1, 2, 1, 8).to(mixture[0]), torch.randn(1, 2, 1, 8).to(mixture[1])
    wrong = {"keys": keys, "values": values}[pool].dtype
    with pytest.raises(ValueError, match=f"{pool} of {wrong} are to join {pool} stored in torch.float16"):
        append(rows, keys, values, torch.zeros(1, 1, dtype=torch.int32))
    assert torch.equal(rows.keys, before.keys) and torch.equal(rows.values, before.values)


def test_gradients_flow_through_shared_attention_under_autocast():
    query, keys, values = (torch.randn(1, 2, 3, 8, requires_grad=True) for _ in range(3))
    places = torch.arange(3, dtype=torch.int32)[None]
    at = {"query_positions": places, "key_positions": places[None], "followers": [0], "proximal": Proximal(0, 1)}
    with torch.autocast("cpu", dtype=BRAIN):
        shared_attention(query, keys, values, query[:, :1], keys[:, :1], **at, scaling=0.3).float().sum().backward()
    assert all(part.grad.dtype == SINGLE and part.grad.abs().sum() > 0 for part in (query, keys, values))


def test_attention_outside_autocast_enters_no_context(monkeypatch):
    """A decode step pays for one question, whether autocast is on."""
    entered = Counter()
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: entered.update(["autocast"]))
    rows = make_rows([[5, 5]], block_size=4, unused=1.0)
    attend(torch.randn(1, 2, 1, 8), rows, scaling=1.0)
    assert not entered
