"""What the Triton kernels share: addresses of paged slots, tiles of attention logits, checks."""

from functools import lru_cache, wraps

import torch
import triton
import triton.language as tl

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
def count_seen(lengths, hidden, row, heads, token, valid, new):
    """How many of the first slots of `row` each new `token` sees; at most 0 where it sees none."""
    if hidden is None:
        unseen = new - 1 - token
    else:
        unseen = tl.load(hidden + row // heads * new + token, mask=valid, other=0)
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
    return tl.dot(query, key, logits, input_precision="ieee")


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


def check_paged(rows: Rows, **new: torch.Tensor) -> None:
    """Raises ValueError unless the pools can be read and written in place and `new` tensors have their dtype."""
    for name in ("keys", "values", "positions", "metric", "key_table", "value_table", "lengths"):
        part = getattr(rows, name)
        if part is not None and not part.is_contiguous():
            raise ValueError(f"rows.{name} must be contiguous, not of strides {part.stride()}")
    for name, tensor in new.items():
        pool = {"values": rows.values, "positions": rows.positions}.get(name, rows.keys)
        if tensor.dtype != pool.dtype:
            raise ValueError(f"{name} of dtype {tensor.dtype} do not fit a pool of {pool.dtype}")


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
