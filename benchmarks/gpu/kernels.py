"""Speed of the ops alone, at the head shape of Llama-3.1-8B: 32 query heads, 8 KV heads of size 128."""

import random
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kara_hf.kernels import Proximal, ProximalKeys, Rows, attend, attend_shared, compact, window_scores

from ..common.case import Job, register
from ..common.rows import Row
from ..common.run import Run, spread
from ..common.table import GIB
from .aims import LONG, SHORT, aims
from .reference import with_records

QUERY_HEADS, HEADS, SIZE, BLOCK = 32, 8, 128, 16
SCALING = SIZE**-0.5


@register(
    "gpu.attend",
    "attention of one decode step, one layer, 32 query and 8 KV heads of size 128, against copying and torch",
    [
        ("what", "{what}"),
        ("batch", "{batch}"),
        ("tokens", "{tokens:,}"),
        ("rows", "{rows}"),
        ("ms", "{ms:.3f}"),
        ("GB/s", "{gbps:,.0f}"),
        ("share of copy", "{share_of_copy:.0%}"),
        ("flash ms", "{flash_ms:.3f}"),
    ],
    device="cuda",
    until=0.50,
    aims=aims,
)
def attend_jobs(run: Run) -> list[Job]:
    """The card's own bandwidth first, then attention from batch 1 to 64 and 4k to 128k tokens, the aims first."""
    shapes = [(32, LONG), (1, LONG), (16, LONG), (64, LONG)]
    shapes += [(b, tokens) for tokens in (SHORT, 4 * LONG) for b in (32, 1, 16, 64)] + [(4, LONG)]
    if run.smoke:
        shapes = [(2, 64), (1, 96)]
    roles = [(b, tokens, role) for role in ("follows", "leads") for b, tokens in shapes[:2]]
    found = [Job({"what": "copy of device memory"}, partial(copy_bandwidth, run), seconds=20)]
    for uneven in (False, True):
        for batch, tokens in shapes:
            labels = {"what": "attend", "batch": batch, "tokens": tokens, "rows": "uneven" if uneven else "even"}
            measure = partial(attend_speed, run, batch, tokens, uneven)
            found.append(Job(labels, measure, needs=("attend", "merge"), seconds=20))
    for bits in (8, 4):
        for batch, tokens in shapes[:2]:
            labels = {"what": f"attend, {bits} bits", "batch": batch, "tokens": tokens, "rows": "even"}
            measure = partial(rounded_speed, run, batch, tokens, bits)
            found.append(Job(labels, measure, needs=("attend", "attend_rounded", "merge"), seconds=20))
    for batch, tokens, role in roles:
        labels = {"what": f"attend_shared, {role}", "batch": batch, "tokens": tokens, "rows": "even"}
        measure = partial(shared_speed, run, batch, tokens, role == "follows")
        found.append(Job(labels, measure, needs=("attend_shared", "merge"), seconds=20))
    return found


@register(
    "gpu.windows",
    "what scoring a window and moving its survivors takes, one layer, all sequences of a batch",
    [("op", "{what}"), ("window", "{window}"), ("batch", "{batch}"), ("ms", "{ms:.3f}"), ("p90", "{ms_p90:.3f}")],
    device="cuda",
    until=0.53,
    aims=aims,
)
def window_jobs(run: Run) -> list[Job]:
    """What a window costs in one layer, of every sequence of a batch at once."""
    batches, window, kept, recent = ((2,), 32, 8, 8) if run.smoke else ((16, 1, 64), 256, 51, 32)
    found = []
    for batch in batches:
        labels = {"batch": batch, "window": window}
        scores = partial(scores_speed, run, batch, window)
        moves = partial(compact_speed, run, batch, window, kept, recent)
        found += [
            Job({"what": "window_scores"} | labels, scores, needs=("window_scores",), seconds=20),
            Job({"what": "compact", "kept": kept, "recent": recent} | labels, moves, needs=("compact",), seconds=20),
        ]
    return found


def copy_bandwidth(run: Run) -> Row:
    """Bytes read and written by a copy from device memory to device memory, in a second."""
    size = 2**20 if run.smoke else 4 * GIB
    source, target = (torch.zeros(size, dtype=torch.int8, device=run.device) for _ in range(2))
    numbers = spread(run.kernel_ms(lambda: target.copy_(source)))
    run.shared["copy_gbps"] = 2 * size / numbers["ms"] / 1e6
    return numbers | {"gbps": run.shared["copy_gbps"]}


def stored_rows(run: Run, lengths: torch.Tensor, shuffled: bool) -> Rows:
    """Rows of `lengths` ``[B, H]`` as a cache lays them out: row after row, or in blocks anywhere."""
    counts = -(-lengths // BLOCK)
    blocks, width = int(counts.sum()), int(counts.max())
    table = torch.full((*lengths.shape, width), -1, dtype=torch.int32)
    order = torch.randperm(blocks) if shuffled else torch.arange(blocks)
    table[torch.arange(width) < counts[..., None]] = order.to(torch.int32)
    table = table.to(run.device)
    keys, values = (torch.randn(blocks, BLOCK, SIZE, dtype=run.dtype, device=run.device) for _ in range(2))
    longest = int(lengths.max())
    return Rows(
        keys=keys,
        values=values,
        positions=torch.zeros(blocks, BLOCK, dtype=torch.int32, device=run.device),
        key_table=table,
        value_table=table,
        lengths=lengths.to(run.device),
        max_length=longest,
        uniform=bool((lengths == longest).all()),
        contiguous=not shuffled,
    )


def row_lengths(batch: int, tokens: int, uneven: bool) -> torch.Tensor:
    """``[B, H]`` int32, all `tokens`; or between a quarter and seven quarters of them, with the same sum."""
    lengths = torch.full((batch * HEADS,), tokens, dtype=torch.int32)
    if uneven:
        drawn = random.Random(batch * tokens)
        more = torch.tensor([drawn.randrange(3 * tokens // 4) for _ in range(len(lengths) // 2)], dtype=torch.int32)
        lengths += torch.cat([more, -more])[torch.tensor(drawn.sample(range(len(lengths)), len(lengths)))]
    return lengths.view(batch, HEADS)


def attend_speed(run: Run, batch: int, tokens: int, uneven: bool) -> Row:
    """One decode step's attention: time, bytes of keys and values read in a second, and torch on the same memory."""
    rows = stored_rows(run, row_lengths(batch, tokens, uneven), shuffled=uneven)
    query = torch.randn(batch, QUERY_HEADS, 1, SIZE, dtype=run.dtype, device=run.device)
    numbers = spread(run.kernel_ms(lambda: attend(query, rows, scaling=SCALING)))
    read = int(rows.lengths.sum()) * 2 * SIZE * run.dtype.itemsize
    numbers["gbps"] = read / numbers["ms"] / 1e6
    if "copy_gbps" in run.shared:
        numbers["share_of_copy"] = numbers["gbps"] / run.shared["copy_gbps"]
    if uneven:  # a dense cache has no uneven rows
        return numbers
    keys, values = rows.dense()

    def sdpa() -> torch.Tensor:
        return F.scaled_dot_product_attention(query, keys, values, scale=SCALING, enable_gqa=True)

    for name, context in (("sdpa", nullcontext()), ("flash", sdpa_kernel(SDPBackend.FLASH_ATTENTION))):
        try:
            with context:
                numbers |= spread(run.kernel_ms(sdpa), f"{name}_ms")
        except RuntimeError as error:  # a baseline that cannot run takes no number of ours away
            numbers[f"{name}_reason"] = str(error)[:200]
    return numbers


def rounded_speed(run: Run, batch: int, tokens: int, bits: int) -> Row:
    """The same where all but the newest 64 tokens are records."""
    rows = stored_rows(run, row_lengths(batch, min(64, tokens // 2), False), shuffled=False)
    rows = with_records(run, rows, tokens - rows.max_length, (bits, bits))
    query = torch.randn(batch, QUERY_HEADS, 1, SIZE, dtype=run.dtype, device=run.device)
    numbers = spread(run.kernel_ms(lambda: attend(query, rows, scaling=SCALING)))
    assert rows.rounded is not None
    width = rows.rounded.keys.shape[-1] + rows.rounded.values.shape[-1]
    records, whole = int(rows.rounded.lengths.sum()), int(rows.lengths.sum())
    numbers["gbps"] = (records * width + whole * 2 * SIZE * run.dtype.itemsize) / numbers["ms"] / 1e6
    if "copy_gbps" in run.shared:
        numbers["share_of_copy"] = numbers["gbps"] / run.shared["copy_gbps"]
    return numbers


def shared_speed(run: Run, batch: int, tokens: int, follows: bool) -> Row:
    """The same of a layer that leads in every head, or follows in every head with an eighth of its tokens proximal.

    Bytes are those of values, of keys that are read, and of logits that are left or taken.
    """
    rows = stored_rows(run, row_lengths(batch, tokens, False), shuffled=False)
    proximal, group = Proximal(1, tokens // 8 - 1), QUERY_HEADS // HEADS
    keys, logits = (
        (proximal.first + proximal.recent, tokens - proximal.first - proximal.recent) if follows else (tokens, tokens)
    )
    if follows:
        places = torch.randn(batch, HEADS, keys, SIZE, dtype=run.dtype, device=run.device)
        index, rest = torch.arange(HEADS, device=run.device), torch.arange(0, device=run.device)
        rows.proximal = ProximalKeys(tuple(range(HEADS)), places, proximal, proximal.recent, index, rest)
        rows.keys, rows.key_table = rows.keys[:0].clone(), torch.full_like(rows.key_table, -1)
    rows.in_order = True
    query = torch.randn(batch, QUERY_HEADS, 1, SIZE, dtype=run.dtype, device=run.device)
    settings = {
        "positions": torch.full((batch, 1), tokens - 1, dtype=torch.int32, device=run.device),
        "leading": () if follows else tuple(range(HEADS)),
        "scaling": SCALING,
    }
    scores = torch.randn(batch, HEADS, group, 1, tokens, device=run.device)
    numbers = spread(run.kernel_ms(lambda: attend_shared(query, rows, scores, **settings)))
    read = batch * HEADS * ((tokens + keys) * SIZE * run.dtype.itemsize + group * logits * scores.itemsize)
    numbers["gbps"] = read / numbers["ms"] / 1e6
    if "copy_gbps" in run.shared:
        numbers["share_of_copy"] = numbers["gbps"] / run.shared["copy_gbps"]
    return numbers


def scores_speed(run: Run, batch: int, window: int) -> Row:
    queries = torch.randn(batch, QUERY_HEADS, window, SIZE, dtype=run.dtype, device=run.device)
    keys = torch.randn(batch, HEADS, window, SIZE, dtype=run.dtype, device=run.device)
    return spread(run.kernel_ms(lambda: window_scores(queries, keys, scaling=SCALING)))


def compact_speed(run: Run, batch: int, window: int, kept: int, recent: int) -> Row:
    """Survivors of a window, and the newest tokens behind it, move together; what was settled before stays."""
    settled = 64 if run.smoke else 6400
    rows = stored_rows(run, row_lengths(batch, settled + window + recent, False), shuffled=False)
    chosen = torch.rand(batch, HEADS, window, device=run.device).argsort(-1)[..., :kept].sort(-1).values
    newest = torch.arange(window, window + recent, device=run.device).expand(batch, HEADS, recent)
    source = settled + torch.cat([chosen, newest], dim=2).to(torch.int32)
    target = settled + torch.arange(kept + recent, dtype=torch.int32, device=run.device).expand_as(source).contiguous()
    sequences = torch.arange(batch, device=run.device)
    return spread(run.kernel_ms(lambda: compact(rows, sequences, source, target)))
