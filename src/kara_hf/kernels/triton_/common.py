"""What the Triton kernels share: addresses of paged slots, tiles of attention logits, checks."""

from functools import lru_cache, wraps

import torch
import triton
import triton.language as tl

from ..precision import common_dtype
from ..rows import Rows

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NOTHING = tl.constexpr(-1e38)  # a running maximum over nothing; finite, so that no difference with it is NaN


@triton.jit
def pool_slots(table, slot, valid, block_size):
    """Flat pool slot of each logical `slot` of the row whose block ids begin at `table`; int64."""
    block = tl.load(table + slot // block_size, mask=valid, other=0).to(tl.int64)
    return block * block_size + slot % block_size


@triton.jit
def count_seen(lengths, num_unseen, row, heads, token, valid, new):
    """How many of the first slots of `row` each new `token` sees; at most 0 where it sees none."""
    if num_unseen is None:
        unseen = new - 1 - token
    else:
        unseen = tl.load(num_unseen + row // heads * new + token, mask=valid, other=0)
    return tl.where(valid, tl.load(lengths + row) - unseen, 0)


@triton.jit
def tanh(x):
    """tanh to float32's precision; the exponential form alone loses digits near 0, a polynomial serves there."""
    x2 = x * x
    near = x + x * x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835))))
    far = 1 - 2 / (1 + tl.exp(2 * tl.abs(x)))
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def add_products(logits, query_rows, query_valid, key_columns, key_valid, size, begin, CHUNK: tl.constexpr):
    """`logits` and what elements `begin` to `begin` + `CHUNK` of the heads add to them."""
    at = begin + tl.arange(0, CHUNK)
    query = tl.load(query_rows + at[None, :], mask=query_valid[:, None] & (at < size)[None, :], other=0.0)
    key = tl.load(key_columns + at[:, None], mask=(at < size)[:, None] & key_valid[None, :], other=0.0)
    return tl.dot(query, key.to(query.dtype), logits, input_precision="ieee")


@triton.jit
def attention_logits(
    query_rows,
    query_valid,
    key_columns,
    key_valid,
    scaling,
    softcap,
    size,
    PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE_QUERIES: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Logits to base 2 of a tile of queries `[Q, 1]` and keys `[1, K]`, pointers to their first elements: `[Q, K]`.

    A large head `size` is taken in chunks: a float32 product keeps all it works on in registers.
    """
    logits = tl.zeros([TILE_QUERIES, TILE_KEYS], tl.float32)
    if PAD <= CHUNK:
        logits = add_products(logits, query_rows, query_valid, key_columns, key_valid, size, 0, PAD)
    else:
        for begin in range(0, size, CHUNK):
            logits = add_products(logits, query_rows, query_valid, key_columns, key_valid, size, begin, CHUNK)
    if SOFTCAP:
        return softcap * LOG2E * tanh(logits * (scaling / softcap))
    return logits * (scaling * LOG2E)


@triton.jit
def add_values(acc, peak, total, logits, query, values, value_slots, stored, size, PAD: tl.constexpr):
    """Attention so far (sums weighted by, maximum of, and sum of exponentials) with a tile of tokens more.

    `logits` ``[Q, K]`` to base 2, -inf where a query does not see a token; `value_slots` ``[K]`` of the pool `values`,
    which are rounded to what `query` points to.
    """
    higher = tl.maximum(peak, tl.max(logits, 1))
    weights = tl.exp2(logits - higher[:, None])
    shrink = tl.exp2(peak - higher)
    total = total * shrink + tl.sum(weights, 1)
    at = tl.arange(0, PAD)
    # A slot that nobody wrote may hold NaN, and 0 * NaN is NaN: it must not be read at all.
    fits = stored[:, None] & (at < size)[None, :]
    value = tl.load(values + (value_slots * size)[:, None] + at, mask=fits, other=0.0)
    value = value.to(query.dtype.element_ty)
    acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
    return acc, higher, total


@triton.jit
def leave_attention(
    acc,
    peak,
    total,
    inside,
    head,
    result,
    place,
    queries,
    sink_logits,
    out,
    parts,
    lse,
    totals,
    size,
    PAD: tl.constexpr,
):
    """Ends the attention of a tile of queries: of all their tokens in `out`, of a range of them in `parts` and `lse`.

    `result` ``[Q]`` is a query's place in ``[B, Hq, S]``, `place` in `out`; `queries` is how many there are in all.
    """
    at = tl.arange(0, PAD)
    fits = inside[:, None] & (at < size)[None, :]
    if tl.num_programs(1) == 1:
        if sink_logits is not None:
            sink = tl.load(sink_logits + head, mask=inside, other=0.0).to(tl.float32) * LOG2E
            higher = tl.maximum(peak, sink)
            shrink = tl.exp2(peak - higher)
            total = total * shrink + tl.exp2(sink - higher)
            acc = acc * shrink[:, None]
            peak = higher
        total = tl.where(total > 0, total, 1.0)
        if totals is not None:
            tl.store(totals + result, peak + tl.log2(total), mask=inside)
        acc = acc / total[:, None]
        tl.store(out + place[:, None] * size + at, acc.to(out.dtype.element_ty), mask=fits)
    else:
        something = total > 0
        total = tl.where(something, total, 1.0)
        result += tl.program_id(1) * queries
        tl.store(parts + result[:, None] * size + at, acc / total[:, None], mask=fits & something[:, None])
        tl.store(lse + result, tl.where(something, (peak + tl.log2(total)) * LN2, float("-inf")), mask=inside)


def read_dtypes(query: torch.Tensor, rows: Rows) -> tuple[torch.dtype, int]:
    """What a kernel computes products in, and the bytes of the widest element that it loads.

    Its `query` is cast to that before, keys and values are where they are loaded.
    """
    parts = [query, rows.keys, rows.values, *([] if rows.proximal is None else [rows.proximal.keys])]
    return rows.read_as or common_dtype(*parts), max(part.itemsize for part in parts)


def check_paged(rows: Rows) -> None:
    """Raises ValueError unless the pools can be read and written in place."""
    for name in ("keys", "values", "positions", "metric", "key_table", "value_table", "lengths"):
        part = getattr(rows, name)
        if part is not None and not part.is_contiguous():
            raise ValueError(f"rows.{name} must be contiguous, not of strides {part.stride()}")


@lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; under Triton's interpreter a small number."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def on_its_device(launcher):
    """`launcher` with the GPU of its first argument as the current one: kernels start on that, wherever tensors lie."""

    @wraps(launcher)
    def launch(first, *arguments, **settings):
        device = (first.keys if isinstance(first, Rows) else first).device
        if device.type != "cuda":
            return launcher(first, *arguments, **settings)
        with torch.cuda.device(device):
            return launcher(first, *arguments, **settings)

    return launch
