"""The checks that come before any speed: every op, and decode steps of a small model, on the device itself.

An op that computes may be at most twice as far from float64 as plain torch in the same dtype is; an op that moves
tokens must leave the pools exactly as its reference does.
"""

import copy
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from gpu_run import Case, Row, Run, Skip
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from kara_hf import KaraCache, PoDCache, PoDSharing, attach, detach
from kara_hf.kernels import (
    Proximal,
    ProximalKeys,
    Rows,
    append,
    append_reference,
    attend,
    attend_shared,
    compact,
    compact_reference,
    gather_rows,
    merge,
    merge_reference,
    slot_index,
    window_scores,
)

DTYPES = (torch.bfloat16, torch.float16)
POOLS = ("keys", "values", "positions", "metric")
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


def cases(run: Run) -> list[Case]:
    """Every check, of the ops first."""
    found: list[tuple[str, str, torch.dtype, Any]] = []
    for dtype in DTYPES:
        found += [("attend", what, dtype, partial(check_attend, run, dtype, **case)) for what, case in ATTEND.items()]
        found += [("attend_shared", what, dtype, partial(check_shared, run, dtype, **c)) for what, c in SHARED.items()]
        found += [("window_scores", what, dtype, partial(check_scores, run, dtype, **c)) for what, c in WINDOWS.items()]
        found += [("merge", what, dtype, partial(check_merge, run, dtype, what == "sinks")) for what in MERGES]
        found += [("append", what, dtype, partial(check_append, run, dtype, what)) for what in APPENDS]
        found += [("compact", "survivors", dtype, partial(check_compact, run, dtype))]
    for graph in (False, True):
        name = "graph" if graph else "decode"
        found += [(name, "against the full cache", torch.bfloat16, partial(check_decode, run, graph))]
        found += [(f"{name} waits", "steps between compressions", torch.bfloat16, partial(check_waits, run, graph))]
    found += [("graph", "against eager", torch.float32, partial(check_graph, run))]
    for query in ("lead", "own"):
        found += [("pod", f"distant queries of the {query}", torch.float32, partial(check_pod, run, query))]
    found += [("pod waits", "steps between compressions", torch.bfloat16, partial(check_waits, run, False, shared()))]
    found += [("graph", "PoDCache against eager", torch.float32, partial(check_pod_graph, run))]
    return [
        Case({"op": op, "what": what, "dtype": str(dtype).removeprefix("torch.")}, check)
        for op, what, dtype, check in found
    ]


# ------------------------------------------------------------------------------------------------------------ the rows
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


# ------------------------------------------------------------------------------------------------------------- the ops
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


MERGES = ("plain", "sinks")


def check_merge(run: Run, dtype: torch.dtype, with_sinks: bool) -> Row:
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


def check_scores(
    run: Run, dtype: torch.dtype, window: int = 256, size: int = 128, softcap: float | None = None, causal: bool = False
) -> Row:
    torch.manual_seed(0)
    queries = torch.randn(2, 8, window, size, dtype=dtype, device=run.device)
    keys = torch.randn(2, 2, window, size, dtype=dtype, device=run.device)
    exact, plain = (plain_scores(queries, keys, kind, size**-0.5, softcap, causal) for kind in (torch.float64, dtype))
    return bounded(window_scores(queries, keys, scaling=size**-0.5, softcap=softcap, causal=causal), plain, exact)


APPENDS = ("one token", "several tokens", "padding")


def check_append(run: Run, dtype: torch.dtype, what: str) -> Row:
    torch.manual_seed(0)
    new = 1 if what == "one token" else 21
    rows = make_rows(run, UNEVEN, (128, 128), dtype, room=new)
    batch, heads = rows.lengths.shape
    keys, values = torch.randn(2, batch, new, heads, 128, dtype=dtype, device=run.device).transpose(2, 3)
    positions = torch.randint(0, 9999, (batch, new), dtype=torch.int32, device=run.device)
    real = torch.rand(batch, new, device=run.device) < 0.5 if what == "padding" else None
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


# ----------------------------------------------------------------------------------------------------- a small model
SMALL = {"window": 32, "recent": 8}


def has_graphs() -> bool:
    """Whether a cache can have its decode steps captured in a CUDA graph."""
    return "cuda_graph" in inspect.signature(KaraCache.__init__).parameters


def graph_setting(run: Run, graph: bool) -> dict[str, bool]:
    """The setting that asks for CUDA graphs or against them. Raises `Skip` where there are none."""
    if graph and not has_graphs():
        raise Skip("not available: KaraCache has no cuda_graph option")
    if graph and not run.cuda:
        raise Skip("not available on a CPU")
    return {"cuda_graph": graph} if has_graphs() else {}


def small_llama(run: Run, dtype: torch.dtype) -> Any:
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
    )
    torch.manual_seed(0)
    with run.device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def decode(
    run: Run, model: Any, cache: Any, steps: int, guarded: frozenset[int] = frozenset()
) -> Iterator[torch.Tensor]:
    """Logits of a prompt of 45 tokens and of `steps` steps of one token; in `guarded` steps nothing may wait."""
    ids = torch.arange(2 * (45 + steps), device=run.device).view(2, -1) * 37 % model.config.vocab_size
    arguments = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    yield model(input_ids=ids[:, :45], **arguments).logits
    for step in range(steps):
        token = ids[:, 45 + step : 46 + step].contiguous()
        position = torch.full_like(token, 45 + step)
        with no_waiting(run, step in guarded):
            logits = model(input_ids=token, position_ids=position, **arguments).logits
        yield logits.clone()


@contextmanager
def no_waiting(run: Run, asked: bool) -> Iterator[None]:
    """Makes torch raise where the host waits for the device; does nothing where there is none."""
    if asked and run.cuda:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if asked and run.cuda:
            torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def check_decode(run: Run, graph: bool) -> Row:
    """Logits of a cache that keeps everything, against the full cache in the same dtype and in float32."""
    option = graph_setting(run, graph)
    model = small_llama(run, torch.bfloat16)
    exact_model = copy.deepcopy(model).float()
    outs = [torch.cat(list(decode(run, each, DynamicCache(config=each.config), 80))) for each in (exact_model, model)]
    with attach(model):
        got = torch.cat(list(decode(run, model, KaraCache(model, retention=1.0, **SMALL, **option), 80)))
    return bounded(got, outs[1], outs[0].double())


@torch.no_grad()
def check_graph(run: Run) -> Row:
    """Captured steps against eager ones in float32, through several compressions: the same tokens kept."""
    graph_setting(run, True)
    model = small_llama(run, torch.float32)
    caches = [KaraCache(model, retention=0.25, **SMALL, cuda_graph=graph) for graph in (False, True)]
    eager, captured = (torch.cat(list(decode(run, model, cache, 80))) for cache in caches)
    detach(model)
    kept = [
        [cache.kept_positions(layer, sequence, head) for layer in range(3) for sequence in (0, 1) for head in (0, 1)]
        for cache in caches
    ]
    same = all(torch.equal(one, other) for one, other in zip(*kept, strict=True))
    error = (captured - eager).abs().max().item()
    return {
        "passed": same and error <= 1e-4 * eager.abs().max().item(),
        "same_tokens_kept": same,
        "bit_for_bit": torch.equal(captured, eager),
        "error": error,
    }


def shared(distant_query: Any = "lead") -> PoDSharing:
    """One layer follows in one head, one in both."""
    return PoDSharing(lead=((0, 0), (0, 1), (0, 1)), sinks=2, recent=14, distant_query=distant_query)


@contextmanager
def plain_torch() -> Iterator[None]:
    """In it no kernel runs."""
    backend = os.environ["KARA_BACKEND"]
    os.environ["KARA_BACKEND"] = "reference"
    try:
        yield
    finally:
        os.environ["KARA_BACKEND"] = backend


@torch.no_grad()
def check_pod(run: Run, distant_query: str) -> Row:
    """Decode steps with shared keys in float32, by kernels against plain torch."""
    model = small_llama(run, torch.float32)
    with attach(model):
        got = torch.cat(list(decode(run, model, PoDCache(model, shared(distant_query)), 80)))
        with plain_torch():
            plain = torch.cat(list(decode(run, model, PoDCache(model, shared(distant_query)), 80)))
    error = (got - plain).abs().max().item()
    return {"passed": error <= 1e-4 * plain.abs().max().item(), "error": error}


@torch.no_grad()
def check_pod_graph(run: Run) -> Row:
    """Captured steps with shared keys against eager ones in float32."""
    graph_setting(run, True)
    model = small_llama(run, torch.float32)
    caches = [PoDCache(model, shared(), cuda_graph=graph) for graph in (False, True)]
    eager, captured = (torch.cat(list(decode(run, model, cache, 80))) for cache in caches)
    detach(model)
    error = (captured - eager).abs().max().item()
    return {"passed": error <= 1e-4 * eager.abs().max().item(), "error": error}


@torch.no_grad()
def check_waits(run: Run, graph: bool, sharing: PoDSharing | None = None) -> Row:
    """Steps that neither seal a window nor change the memory held must not wait for the device.

    A first cache shows which steps those are; a second one takes the same steps with torch's check switched on.
    """
    option = graph_setting(run, graph)
    model = small_llama(run, torch.bfloat16)
    option |= {"retention": 0.25, "sharing": sharing} | SMALL
    with attach(model):
        cache = KaraCache(model, **option)
        held, kept = [], []
        for _ in decode(run, model, cache, 80):
            report = cache.report()
            held.append(report.resident_bytes)
            kept.append(int(report.kept.max()))
        quiet = frozenset(n for n in range(80) if held[n + 1] == held[n] and kept[n + 1] == kept[n] + 1)
        if not run.cuda:
            raise Skip("not available on a CPU")
        for _ in decode(run, model, KaraCache(model, **option), 80, guarded=quiet):
            pass
    return {"passed": len(quiet) > 40, "steps": 80, "steps_that_must_not_wait": len(quiet)}
