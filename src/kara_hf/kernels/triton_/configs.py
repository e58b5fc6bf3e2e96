"""The kernel configurations that are shipped: launchers choose from these tables, and tests compile all of them.

Heads are padded to 64, 128 or 256 elements, and what is padded is neither read nor written: every head size is served
by one of the few that are compiled.
"""

import torch

Constants = dict[str, int]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PADS = (64, 128, 256)
PAIRS = ((64, 64), (128, 128), (256, 128), (256, 256))  # padded sizes of a key and of a value

COPY_TILE = 4  # tokens in a program that only moves them; on the grid's long axis, a prompt may have a million
MERGE_TILE = 1  # queries in a program that merges
MAX_REGISTERS = 255  # asked for where the compiler, left alone, spills to let more programs run beside each other
FEW = 16  # query rows that the smaller tile of queries takes


def _attend(tile_queries: int, tile_keys: int, chunk: int, num_warps: int, num_stages: int) -> Constants:
    return {
        "TILE_QUERIES": tile_queries,
        "TILE_KEYS": tile_keys,
        "CHUNK": chunk,  # how much of a head one product takes, at most
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


def _unspilled(constants: Constants) -> Constants:
    return constants | {"maxnreg": MAX_REGISTERS}


# (bytes of an element, the larger padded size, whether there are few query rows)
ATTEND = {
    (2, 64, True): _attend(16, 64, 64, 4, 3),
    (2, 128, True): _attend(16, 64, 128, 4, 3),
    (2, 256, True): _unspilled(_attend(16, 64, 256, 8, 2)),
    (2, 64, False): _attend(64, 64, 64, 4, 3),
    (2, 128, False): _attend(64, 64, 128, 8, 2),
    (2, 256, False): _unspilled(_attend(32, 32, 256, 8, 2)),
    (4, 64, True): _unspilled(_attend(16, 32, 32, 4, 2)),
    (4, 128, True): _unspilled(_attend(16, 32, 32, 4, 2)),
    (4, 256, True): _unspilled(_attend(16, 32, 32, 8, 2)),
    (4, 64, False): _unspilled(_attend(32, 32, 32, 8, 2)),
    (4, 128, False): _unspilled(_attend(32, 32, 32, 8, 2)),
    (4, 256, False): _unspilled(_attend(32, 32, 32, 8, 2)),
}

# Where attention is observed: the addresses that logits are written to take registers too.
ATTEND_OBSERVED = ATTEND | {
    (2, 64, False): _attend(32, 64, 64, 4, 3),
    (2, 128, False): _attend(32, 64, 128, 8, 2),
    (4, 256, False): ATTEND[4, 256, True],
}

# (bytes of an element, the larger padded size). The code for heads that follow takes registers beside that for others:
# of float32 products nothing is loaded ahead.
ATTEND_SHARED = {(2, size): _unspilled(ATTEND[2, size, True]) for size in PADS}
ATTEND_SHARED |= {(4, size): _unspilled(_attend(16, 32, 32, 8, 1)) for size in PADS}

# (the larger padded size, whether there are few query rows), of records: numbers are float32 before they are rounded to
# what products take, and an address stands for every code, so that tiles are small in all dtypes.
ATTEND_ROUNDED = {
    (64, True): _unspilled(_attend(16, 32, 32, 4, 2)),
    (128, True): _unspilled(_attend(16, 32, 32, 8, 1)),
    (256, True): _unspilled(_attend(16, 16, 32, 8, 1)),
    (64, False): _unspilled(_attend(32, 32, 32, 8, 2)),
    (128, False): _unspilled(_attend(32, 32, 32, 8, 2)),
    (256, False): _unspilled(_attend(32, 16, 32, 8, 1)),
}

OBSERVE = {"TILE_QUERIES": 4, "TILE_SLOTS": 128, "num_warps": 4}

# bytes of an element
TOTALS = {
    2: _unspilled({"TILE": 64, "CHUNK": 64, "num_warps": 4, "num_stages": 2}),
    4: _unspilled({"TILE": 32, "CHUNK": 32, "num_warps": 4, "num_stages": 2}),
}
MEANS = TOTALS | {4: {"TILE": 32, "CHUNK": 32, "num_warps": 4, "num_stages": 2}}


def padded(size: int) -> int:
    """The smallest of `PADS` that a head of `size` fits in."""
    return next(pad for pad in PADS if pad >= size)


def padded_pair(key_size: int, value_size: int) -> Constants:
    """What keys and values of these sizes are padded to."""
    pair = padded(key_size), padded(value_size)
    if pair not in PAIRS:
        pair = max(pair), max(pair)
    return {"KEY_PAD": pair[0], "VALUE_PAD": pair[1]}


def attend_config(itemsize: int, key_size: int, value_size: int, query_rows: int, observed: bool = False) -> Constants:
    """Of `attend_kernel`, for elements of at most `itemsize` bytes and heads of these sizes.

    There are `query_rows` = G * S query rows.
    """
    pads = padded_pair(key_size, value_size)
    chosen = (ATTEND_OBSERVED if observed else ATTEND)[itemsize, max(pads.values()), query_rows <= FEW]
    return chosen | pads


def attend_rounded_config(key_size: int, value_size: int, query_rows: int) -> Constants:
    """Of `attend_rounded_kernel`, for heads of these sizes and `query_rows` = G * S query rows."""
    pads = padded_pair(key_size, value_size)
    return ATTEND_ROUNDED[max(pads.values()), query_rows <= FEW] | pads


def attend_shared_config(itemsize: int, key_size: int, value_size: int) -> Constants:
    """Of `attend_shared_kernel`, for heads of these sizes: a decode step has few query rows."""
    pads = padded_pair(key_size, value_size)
    return ATTEND_SHARED[itemsize, max(pads.values())] | pads


def lead_scores_config(itemsize: int, size: int) -> Constants:
    """Of `lead_scores_kernel`."""
    return _unspilled(ATTEND[itemsize, padded(size), True]) | {"PAD": padded(size)}


def totals_config(dtype: torch.dtype, size: int) -> Constants:
    """Of `query_totals_kernel`."""
    return TOTALS[dtype.itemsize] | {"PAD": padded(size)}


def means_config(dtype: torch.dtype, size: int) -> Constants:
    """Of `key_means_kernel`."""
    return MEANS[dtype.itemsize] | {"PAD": padded(size)}


def copy_config(size: int) -> Constants:
    """Of the kernels that only move tokens whose larger part has `size` elements."""
    return {"PAD": padded(size), "TILE": COPY_TILE, "num_warps": 4}


def merge_config(size: int) -> Constants:
    """Of `merge_kernel`, for values of `size` elements."""
    return {"PAD": padded(size), "TILE": MERGE_TILE, "num_warps": 1}
