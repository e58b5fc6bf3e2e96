"""The checks that come before any speed: every op, and decode steps of a small model, on the device itself.

An op that computes may be at most twice as far from float64 as plain torch in the same dtype is; an op that moves
tokens must leave the pools exactly as its reference does.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from kara_hf.kernels import (
    Proximal,
    append,
    append_reference,
    attend,
    attend_shared,
    compact,
    compact_reference,
    merge,
    merge_reference,
    window_scores,
)

from ..common.case import Job, register
from ..common.rows import Row
from ..common.run import Run
from . import small_model
from .reference import (
    bounded,
    bounded_votes,
    cloned,
    made_whole,
    make_rows,
    plain_attention,
    plain_scores,
    same_pools,
    with_followers,
    with_records,
)

DTYPES = (torch.bfloat16, torch.float16)
UNEVEN = [[0, 1, 15, 16], [17, 64, 65, 1025]]
ATTEND: dict[str, Row] = {
    "one query": {"lengths": [[1024] * 4] * 2},
    "uneven rows": {"lengths": UNEVEN},
    "many ranges of few rows": {"lengths": [[9000, 8999]]},
    "several queries": {"lengths": UNEVEN, "new": 5},
    "a chunk of queries": {"lengths": [[300, 777], [512, 301]], "new": 300},
    "padding": {
        "lengths": [[0] * 2, [90] * 2, [40] * 2],
        "new": 3,
        "num_unseen": [[0, 0, 0], [2, 1, 0], [2**31 - 1, 1, 0]],
    },
    "soft cap": {"lengths": UNEVEN, "softcap": 0.7},
    "sinks": {"lengths": UNEVEN, "sink_logits": True},
    "soft cap, sinks, several queries": {"lengths": UNEVEN, "new": 4, "softcap": 0.7, "sink_logits": True},
    "squared votes": {"lengths": UNEVEN, "metric_power": 2},
    "votes, sinks, several queries": {"lengths": UNEVEN, "new": 4, "sink_logits": True, "metric_power": 1},
    "heads of 64": {"lengths": UNEVEN, "sizes": (64, 64)},
    "heads of 80": {"lengths": UNEVEN, "sizes": (80, 80)},
    "heads of 256": {"lengths": UNEVEN, "sizes": (256, 256)},
    "keys of 192, values of 128": {"lengths": UNEVEN, "sizes": (192, 128)},
    "blocks of 128": {"lengths": UNEVEN, "block_size": 128},
    "seven query heads to a KV head": {"lengths": UNEVEN, "group": 7},
}
ROUNDED: dict[str, Row] = {
    "4 bits": {},
    "8 bits": {"bits": (8, 8)},
    "8 and 2 bits": {"bits": (8, 2)},
    "several queries": {"new": 5},
    "soft cap and sinks": {"softcap": 0.7, "sink_logits": True},
    "heads of 64": {"sizes": (64, 64)},
    "heads of 80": {"sizes": (80, 80)},
    "heads of 256": {"sizes": (256, 256)},
}
SHARED: dict[str, Row] = {
    "rows in order": {},
    "rows out of order": {"ordered": False},
    "soft cap and sinks": {"softcap": 0.7, "sink_logits": True},
    "squared votes": {"metric_power": 2, "ordered": False},
    "heads of 64": {"sizes": (64, 64)},
    "heads of 256": {"sizes": (256, 256)},
    "20 query heads to a KV head": {"group": 20},
}
WINDOWS: dict[str, Row] = {
    "both ways": {},
    "causal": {"causal": True},
    "soft cap": {"softcap": 0.7},
    "heads of 80": {"size": 80},
    "a window of 100": {"window": 100},
}
MERGES: dict[str, Row] = {"plain": {}, "sinks": {"with_sinks": True}}
APPENDS: dict[str, Row] = {"one token": {"new": 1}, "several tokens": {}, "padding": {"padding": True}}


@register(
    "gpu.checks",
    "every op under Triton against float64 references, and decode steps of a small model",
    [
        ("op", "{op}"),
        ("what", "{what}"),
        ("dtype", "{dtype}"),
        ("error", "{error:.3g}"),
        ("plain torch", "{plain_error:.3g}"),
        ("", "{status}"),
    ],
    device="cuda",
    first=True,
    until=0.40,  # every kernel is compiled in them
)
def check_jobs(run: Run) -> list[Job]:
    """Every check, of the ops first; a smoke run has one dtype."""
    found = [check for dtype in DTYPES[: 1 if run.smoke else None] for check in op_checks(run, dtype)]
    return [
        Job({"op": op, "what": what, "dtype": str(dtype).removeprefix("torch.")}, check)
        for op, what, dtype, check in [*found, *model_checks(run)]
    ]


Check = tuple[str, str, torch.dtype, Callable[[], Row]]


def op_checks(run: Run, dtype: torch.dtype) -> Iterator[Check]:
    """Every op in one dtype."""
    for op, check, table in (
        ("attend", check_attend, ATTEND),
        ("attend_rounded", check_rounded, ROUNDED),
        ("attend_shared", check_shared, SHARED),
        ("window_scores", check_scores, WINDOWS),
        ("merge", check_merge, MERGES),
        ("append", check_append, APPENDS),
        ("compact", check_compact, {"survivors": {}}),
    ):
        for what, case in table.items():
            yield op, what, dtype, partial(check, run, dtype, **case)


def model_checks(run: Run) -> Iterator[Check]:
    """Decode steps of a small model, with graphs last."""
    half, single, between = torch.bfloat16, torch.float32, "steps between compressions"
    yield "decode", "against the full cache", half, partial(small_model.check_decode, run, False)
    yield "decode waits", between, half, partial(small_model.check_waits, run, False)
    for query in ("lead", "own"):
        yield "pod", f"distant queries of the {query}", single, partial(small_model.check_pod, run, query)
    yield "pod waits", between, half, partial(small_model.check_waits, run, False, small_model.shared())
    yield "graph", "against the full cache", half, partial(small_model.check_decode, run, True)
    yield "graph waits", between, half, partial(small_model.check_waits, run, True)
    yield "graph", "against eager", single, partial(small_model.check_graph, run)
    yield "graph", "PoDCache against eager", single, partial(small_model.check_pod_graph, run)


# ------------------------------------------------------------------------------------------------------------- the ops
def check_attend(
    run: Run,
    dtype: torch.dtype,
    lengths: list[list[int]],
    new: int = 1,
    group: int = 4,
    sizes: tuple[int, int] = (128, 128),
    block_size: int = 16,
    num_unseen: list[list[int]] | None = None,
    softcap: float | None = None,
    sink_logits: bool = False,
    metric_power: int | None = None,
) -> Row:
    torch.manual_seed(0)
    rows = make_rows(run, lengths, sizes, dtype, block_size=block_size)
    rows.metric.zero_()
    batch, heads = rows.lengths.shape
    # As a model has it: the head and token dimensions of a view are swapped.
    query = torch.randn(batch, new, heads * group, sizes[0], dtype=dtype, device=run.device).transpose(1, 2)
    settings = {
        "scaling": sizes[0] ** -0.5,
        "num_unseen": None if num_unseen is None else torch.tensor(num_unseen, dtype=torch.int32, device=run.device),
        "softcap": softcap,
        "sink_logits": torch.randn(heads * group, device=run.device) if sink_logits else None,
    }
    (exact, exact_weights), (plain, plain_weights) = (
        plain_attention(query, rows, kind, **settings) for kind in (torch.float64, dtype)
    )
    found = bounded(attend(query, rows, **settings, metric_power=metric_power), plain, exact)
    if metric_power is None or not found["passed"]:
        return found
    return bounded_votes(rows, plain_weights, exact_weights, metric_power)


def check_rounded(
    run: Run,
    dtype: torch.dtype,
    bits: tuple[int, int] = (4, 4),
    new: int = 1,
    sizes: tuple[int, int] = (128, 128),
    softcap: float | None = None,
    sink_logits: bool = False,
) -> Row:
    """Over records and whole tokens behind them, against attention over what both stand for."""
    torch.manual_seed(0)
    rows = with_records(run, make_rows(run, [[70] * 4] * 2, sizes, dtype), 1000, bits)
    query = torch.randn(2, new, 16, sizes[0], dtype=dtype, device=run.device).transpose(1, 2)
    settings = {
        "scaling": sizes[0] ** -0.5,
        "num_unseen": None,
        "softcap": softcap,
        "sink_logits": torch.randn(16, device=run.device) if sink_logits else None,
    }
    whole = made_whole(rows)
    (exact, _), (plain, _) = (plain_attention(query, whole, kind, **settings) for kind in (torch.float64, dtype))
    return bounded(attend(query, rows, **settings), plain, exact)


def check_shared(
    run: Run,
    dtype: torch.dtype,
    group: int = 4,
    sizes: tuple[int, int] = (128, 128),
    ordered: bool = True,
    softcap: float | None = None,
    sink_logits: bool = False,
    metric_power: int | None = None,
) -> Row:
    """Two heads follow, one leads and one does neither; what is left for the layers above is checked too."""
    torch.manual_seed(0)
    rows = make_rows(run, [[1025] * 4, [64] * 4, [777] * 4], sizes, dtype)
    rows = with_followers(rows, (1, 3), Proximal(2, 50), ordered)
    rows.metric.zero_()
    query = torch.randn(3, 1, 4 * group, sizes[0], dtype=dtype, device=run.device).transpose(1, 2)
    scores = torch.randn(3, 4, group, 1, rows.max_length, device=run.device)
    settings = {
        "scaling": sizes[0] ** -0.5,
        "softcap": softcap,
        "sink_logits": torch.randn(4 * group, device=run.device) if sink_logits else None,
        "positions": rows.lengths[:, :1] - 1,
    }
    (exact, exact_weights), (plain, plain_weights) = (
        plain_attention(query, rows, kind, num_unseen=None, scores=scores, **settings)
        for kind in (torch.float64, dtype)
    )
    got, left = attend_shared(query, rows, scores.clone(), leading=(0,), metric_power=metric_power, **settings)
    found = bounded(got, plain, exact)
    if not torch.equal(left[:, 1:, ..., : rows.max_length], scores[:, 1:]):
        return {"passed": False, "reason": "logits of heads that do not lead have changed"}
    if metric_power is None or not found["passed"]:
        return found
    return bounded_votes(rows, plain_weights, exact_weights, metric_power)


def check_merge(run: Run, dtype: torch.dtype, with_sinks: bool = False) -> Row:
    """Parts with nothing to see hold NaN."""
    torch.manual_seed(0)
    lse = 3 * torch.randn(5, 2, 8, 3, device=run.device)
    lse = lse.masked_fill(torch.rand_like(lse) < 0.4, float("-inf"))
    parts = torch.randn(*lse.shape, 128, device=run.device).masked_fill((lse == float("-inf"))[..., None], float("nan"))
    sink_logits = torch.randn(8, device=run.device) if with_sinks else None
    exact = merge_reference(parts.double(), lse.double(), sink_logits)
    return bounded(
        merge(parts, lse, sink_logits, dtype=dtype), merge_reference(parts, lse, sink_logits, dtype=dtype), exact
    )


def check_scores(
    run: Run, dtype: torch.dtype, window: int = 256, size: int = 128, softcap: float | None = None, causal: bool = False
) -> Row:
    torch.manual_seed(0)
    queries = torch.randn(2, 8, window, size, dtype=dtype, device=run.device)
    keys = torch.randn(2, 2, window, size, dtype=dtype, device=run.device)
    exact, plain = (plain_scores(queries, keys, kind, size**-0.5, softcap, causal) for kind in (torch.float64, dtype))
    return bounded(window_scores(queries, keys, scaling=size**-0.5, softcap=softcap, causal=causal), plain, exact)


def check_append(run: Run, dtype: torch.dtype, new: int = 21, padding: bool = False) -> Row:
    torch.manual_seed(0)
    rows = make_rows(run, UNEVEN, (128, 128), dtype, room=new)
    batch, heads = rows.lengths.shape
    keys, values = torch.randn(2, batch, new, heads, 128, dtype=dtype, device=run.device).transpose(2, 3)
    positions = torch.randint(0, 9999, (batch, new), dtype=torch.int32, device=run.device)
    real = torch.rand(batch, new, device=run.device) < 0.5 if padding else None
    expected = cloned(rows)
    append_reference(expected, keys, values, positions, real)
    append(rows, keys, values, positions, real)
    return same_pools(rows, expected)


def check_compact(run: Run, dtype: torch.dtype) -> Row:
    """What a sealed window does, of two sequences in another order, once inside a block; some moves are left out."""
    torch.manual_seed(0)
    rows = make_rows(run, [[288] * 4, [99] * 4, [301] * 4], (128, 128), dtype)
    start = torch.tensor([13, 0], dtype=torch.int32, device=run.device)
    order = torch.rand(2, 4, 288, device=run.device).argsort(-1)[..., :83].sort(-1).values
    source = start[:, None, None] + order.to(torch.int32)
    target = start[:, None, None] + torch.arange(83, dtype=torch.int32, device=run.device).expand_as(order)
    target = target.masked_fill(torch.rand(2, 4, 83, device=run.device) < 0.1, -1)
    sequences = torch.tensor([2, 0], device=run.device)
    expected = cloned(rows)
    compact_reference(expected, sequences, source, target)
    compact(rows, sequences, source, target)
    return same_pools(rows, expected)
