"""The paged store does what the dense oracle does, shares and frees blocks as promised, and counts every byte."""

import contextlib
import gc
import itertools
import math
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.dense_store import DenseStore
from support.marks import most_examples, slow

from kara_hf.kernels import Proximal
from kara_hf.storage import MemoryMeter, PagedStore, PoolExhausted, Prompt, QueryBuffer, paged_store
from kara_hf.storage.paged import HEADROOM
from kara_hf.storage.queries import GROWTH

CPU = torch.device("cpu")
KEY_DIM, VALUE_DIM = 3, 2
SINGLE = (torch.float32, torch.float32)
DTYPES = [SINGLE, (torch.float32, torch.bfloat16), (torch.float16, torch.float32)]  # of keys and of values


# ------------------------------------------------------------------------------------------------------------- building
def paged(sequences, heads, block_size, meter=None, dtypes=SINGLE):
    meter = meter or MemoryMeter()
    sizes = (KEY_DIM, VALUE_DIM)
    return PagedStore((sequences, heads), sizes, dtypes=dtypes, device=CPU, block_size=block_size, meter=meter)


def dense(sequences, heads, dtypes=SINGLE):
    return DenseStore(sequences, heads, KEY_DIM, VALUE_DIM, dtypes)


class Tokens:
    """New tokens, no two alike, so that no mix-up goes unseen."""

    def __init__(self):
        self.drawn = 0

    def __call__(self, sequences, heads, new):
        def numbers(*shape):
            first, self.drawn = self.drawn + 1, self.drawn + math.prod(shape)
            return torch.arange(first, self.drawn + 1).view(shape)

        keys, values = numbers(sequences, heads, new, KEY_DIM), numbers(sequences, heads, new, VALUE_DIM)
        return keys.float(), values.float(), numbers(sequences, new).to(torch.int32)


def pair(sequences, heads, block_size, tokens, meter=None):
    """A paged store and its oracle, both holding the same `tokens` tokens in every row."""
    stores = paged(sequences, heads, block_size, meter), dense(sequences, heads)
    new = Tokens()(sequences, heads, tokens)
    for store in stores:
        store.append(*new)
    return stores


def assert_same_content(store, oracle):
    assert store.lengths.dtype == np.int32
    np.testing.assert_array_equal(store.lengths, oracle.lengths)
    for b, h in np.ndindex(*oracle.lengths.shape):
        for got, expected in zip(store.read(b, h), oracle.read(b, h), strict=True):
            assert torch.equal(got, expected), f"sequence {b}, head {h}"


def tensors_of(holder, seen=None):
    """Every tensor reachable from an object's attributes; of several that share memory the largest."""
    seen = {} if seen is None else seen
    if isinstance(holder, torch.Tensor):
        place = holder.untyped_storage().data_ptr()
        seen[place] = max(seen.get(place, holder), holder, key=lambda tensor: tensor.nbytes)
    elif isinstance(holder, list | tuple):
        for each in holder:
            tensors_of(each, seen)
    elif type(holder).__module__.startswith("kara_hf.") and not isinstance(holder, MemoryMeter):
        for each in vars(holder).values():
            tensors_of(each, seen)
    return seen


def live_bytes(*holders):
    return sum(tensor.nbytes for holder in holders for tensor in tensors_of(holder).values())


def used_ids(blocks):
    return blocks.table[blocks.table >= 0].numpy()


def unused_blocks(store, blocks):
    """Blocks that hold no token: free ones, and those kept at the end of rows."""
    needed = -(-store.lengths // store.block_size)
    return blocks.num_free + int((blocks.counts - needed).sum())


def assert_sound(store):
    """What holds between any two calls."""
    np.testing.assert_array_equal(store.keys.counts, store.values.counts)
    for blocks in (store.keys, store.values):
        held = blocks.held_blocks
        assert all(len(pool) == held for pool in blocks.pools)
        ids = used_ids(blocks)
        np.testing.assert_array_equal(blocks.refs, np.bincount(ids, minlength=held))
        np.testing.assert_array_equal(np.sort(blocks._free), np.setdiff1d(np.arange(held), ids))
        np.testing.assert_array_equal((blocks.table >= 0).sum(-1).numpy(), blocks.counts)
        assert (blocks.counts * store.block_size >= store.lengths).all()
        # Whatever sequences share, no sequence holds the same block twice, and none of another head.
        owners = [ids.tolist() for ids in blocks.table.transpose(0, 1).flatten(1).numpy()]
        assert sum(len(set(ids) - {-1}) for ids in owners) == len(np.unique(used_ids(blocks)))
        for row in blocks.table.flatten(0, 1):
            assert len(row[row >= 0].unique()) == (row >= 0).sum()
        if blocks.contiguous:
            assert torch.equal(blocks.table.flatten(), torch.arange(blocks.table.numel(), dtype=torch.int32))
    rows = store.rows()
    assert torch.equal(rows.lengths, torch.from_numpy(store.lengths))
    assert rows.max_length == store.lengths.max(initial=0)
    assert store.stored_bytes == int(store.lengths.sum()) * sum(store.slot_bytes)
    assert store.slot_bytes == (KEY_DIM * rows.keys.itemsize, VALUE_DIM * rows.values.itemsize)
    assert rows.uniform == bool((store.lengths == rows.max_length).all())
    assert store.meter.held == live_bytes(store)
    assert store.meter.peak >= store.meter.held


# ------------------------------------------------------------------------------------------ any operations in any order
class StoreMachine(RuleBasedStateMachine):
    """The same operations on the paged store and on the oracle; every row is compared after every operation."""

    @initialize(
        block_size=st.sampled_from([1, 4, 16]),
        sequences=st.integers(1, 4),
        heads=st.integers(1, 3),
        first=st.integers(0, 40),
        dtypes=st.sampled_from(DTYPES),
    )
    def start(self, block_size, sequences, heads, first, dtypes):
        self.dtypes = dtypes
        self.store = paged(sequences, heads, block_size, dtypes=dtypes)
        self.oracle = dense(sequences, heads, dtypes)
        self.tokens = Tokens()
        self.append(None, first)

    @property
    def sequences(self):
        return len(self.oracle.content)

    @property
    def room(self):
        """New tokens that keep the example small."""
        return 90 - int(self.oracle.lengths.max(initial=0))

    def append(self, real, new):
        keys, values, positions = self.tokens(self.sequences, self.oracle.heads, new)
        arrivals = keys.to(self.dtypes[0]), values.to(self.dtypes[1]), positions
        for store in (self.store, self.oracle):
            store.append(*arrivals, real)

    def assert_slack(self):
        for blocks in (self.store.keys, self.store.values):
            assert unused_blocks(self.store, blocks) <= 0.125 * blocks.held_blocks

    @precondition(lambda self: self.room > 0)
    @rule(data=st.data())
    def append_tokens(self, data):
        new = data.draw(st.integers(0, min(self.room, 2 * self.store.block_size + 3)), "new")
        unused = [unused_blocks(self.store, blocks) for blocks in (self.store.keys, self.store.values)]
        self.append(None, new)
        for blocks, before in zip((self.store.keys, self.store.values), unused, strict=True):
            allowed = blocks.counts.size + HEADROOM * blocks.held_blocks
            assert unused_blocks(self.store, blocks) <= max(before, allowed)

    @precondition(lambda self: self.room > 0)
    @rule(data=st.data())
    def append_padded(self, data):
        new = data.draw(st.integers(1, min(self.room, 2 * self.store.block_size + 3)), "new")
        marks = st.lists(st.booleans(), min_size=new, max_size=new)
        self.append(torch.tensor([data.draw(marks) for _ in range(self.sequences)]), new)

    @rule(tokens=st.integers(0, 40))
    def reserve(self, tokens):
        self.store.reserve(tokens)
        # Memory that was reserved is there: this many tokens more take no further block.
        for blocks in (self.store.keys, self.store.values):
            assert (blocks.counts * self.store.block_size >= self.store.lengths + tokens).all()

    @rule(data=st.data())
    def keep(self, data):
        chosen = data.draw(st.lists(st.integers(0, self.sequences - 1), unique=True, min_size=1), "sequences")
        lengths = self.oracle.lengths[chosen]
        start = np.array([data.draw(st.integers(0, int(row.min())), "start") for row in lengths])
        count = data.draw(st.integers(0, int((lengths - start[:, None]).min())), "survivors")
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999), "seed"))
        slots = torch.zeros(len(chosen), self.oracle.heads, count, dtype=torch.int32)
        for i, h in np.ndindex(*slots.shape[:2]):
            behind = torch.randperm(int(lengths[i, h] - start[i]), generator=generator)
            slots[i, h] = start[i] + behind[:count].sort().values
        for store in (self.store, self.oracle):
            store.keep(np.array(chosen), start, slots)
        self.assert_slack()

    @rule(data=st.data())
    def crop(self, data):
        tokens = [data.draw(st.integers(0, int(row.min())), "tokens") for row in self.oracle.lengths]
        for store in (self.store, self.oracle):
            store.crop(np.array(tokens))
        self.assert_slack()

    @rule(data=st.data())
    def fork(self, data):
        index = data.draw(st.lists(st.integers(0, self.sequences - 1), min_size=1, max_size=5), "index")
        for store in (self.store, self.oracle):
            store.fork(np.array(index))
        for blocks in (self.store.keys, self.store.values):
            assert blocks.num_free <= max(blocks.counts.size, 0.125 * blocks.held_blocks)

    @rule(data=st.data())
    def reset(self, data):
        chosen = data.draw(st.lists(st.integers(0, self.sequences - 1), unique=True, min_size=1), "sequences")
        for store in (self.store, self.oracle):
            store.reset(np.array(chosen))
        self.assert_slack()

    @invariant()
    def same(self):
        assert_same_content(self.store, self.oracle)
        assert_sound(self.store)

    def teardown(self):
        if hasattr(self, "store"):
            self.store.close()
            assert self.store.meter.held == 0


StoreMachine.TestCase.settings = most_examples(30, stateful_step_count=12)
TestStore = StoreMachine.TestCase


# ----------------------------------------------------------------------------------------------------------- the oracle
def test_oracle():
    """The oracle itself, on an example small enough to read."""
    store = dense(2, 1)
    keys = torch.arange(6.0).view(2, 1, 3, 1).expand(-1, -1, -1, KEY_DIM)
    real = torch.tensor([[True, True, True], [False, True, True]])
    store.append(keys, keys[..., :VALUE_DIM], torch.tensor([[0, 1, 2], [0, 0, 1]]), real)
    assert [store.read(b, 0)[0][:, 0].tolist() for b in range(2)] == [[0, 1, 2], [4, 5]]
    store.keep(np.array([0]), np.array([1]), torch.tensor([[[2]]]))
    assert store.read(0, 0)[2].tolist() == [0, 2]
    store.fork(np.array([1, 0, 1]))
    store.crop(np.array([2, 0, 1]))
    assert [store.read(b, 0)[0][:, 0].tolist() for b in range(3)] == [[], [0, 2], [4]]
    store.reset(np.array([1]))
    assert store.lengths.tolist() == [[0], [0], [1]]


# --------------------------------------------------------------------------------------------------------------- dtypes
@pytest.mark.parametrize("padded", [False, True], ids=["all-real", "padded"])
@pytest.mark.parametrize("new", [1, 3])
def test_what_a_wider_dtype_holds_too_is_stored_in_that(new, padded):
    store, oracle = paged(1, 2, 4), dense(1, 2)
    real = torch.tensor([[True] * new]) if padded else None
    keys, values, positions = Tokens()(1, 2, new)
    for each in (store, oracle):
        for _ in range(2):
            each.append(keys, values, positions, real)
    store.append(keys.half(), values.bfloat16(), positions, real)
    oracle.append(keys.half().float(), values.bfloat16().float(), positions, real)
    assert_same_content(store, oracle)
    assert_sound(store)


@pytest.mark.parametrize("name, place", [("keys", 0), ("values", 1)])
@pytest.mark.parametrize("tokens", [0, 5])
def test_what_would_be_rounded_is_refused_and_nothing_is_stored(name, place, tokens):
    half = (torch.bfloat16, torch.bfloat16)
    store, oracle = paged(2, 2, 4, dtypes=half), dense(2, 2, half)
    keys, values, positions = Tokens()(2, 2, tokens)
    for each in (store, oracle):
        each.append(keys.bfloat16(), values.bfloat16(), positions)
    keys, values, positions = Tokens()(2, 2, 3)
    given = [keys.bfloat16(), values.bfloat16()]
    given[place] = given[place].float()
    stored = rf"{name} of torch.float32 are to join {name} stored in torch.bfloat16, .*one torch.autocast around all"
    with pytest.raises(ValueError, match=stored):
        store.append(*given, positions)
    assert_same_content(store, oracle)
    assert_sound(store)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_a_prompt_holds_keys_and_values_as_they_come(dtypes):
    meter = MemoryMeter()
    prompt = Prompt(meter)
    keys, values, positions = Tokens()(2, 3, 5)
    keys, values = keys.to(dtypes[0]), values.to(dtypes[1])
    prompt.append(keys, values, positions)
    assert meter.held == live_bytes(prompt)
    assert prompt.slot_bytes == (KEY_DIM * keys.itemsize, VALUE_DIM * values.itemsize)
    store = paged(2, 3, 4, meter, dtypes)
    kept = torch.rand(2, 3, 5) < 0.6
    store.fill(keys, values, positions, prompt.metric, prompt.real, kept, 1)
    for b, h in itertools.product(range(2), range(3)):
        chosen = kept[b, h]
        for got, expected in zip(store.read(b, h)[:2], (keys, values), strict=True):
            assert got.dtype == expected.dtype and torch.equal(got, expected[b, h, chosen])


def test_queries_are_rounded_to_the_dtype_of_their_buffer():
    buffer = QueryBuffer(2, 4, 3, torch.bfloat16, CPU, MemoryMeter())
    queries = torch.randn(2, 4, 5, 3)
    buffer.append(queries[:, :, :4], np.array([0, 0]))
    buffer.put(queries[:, :, 4:], torch.tensor([[4], [4]]))
    assert torch.equal(buffer.window(torch.tensor([0, 1]), 0, 5), queries.bfloat16())


# -------------------------------------------------------------------------------------------------------------- sharing
@pytest.mark.parametrize("tokens", [0, 3, 8, 9], ids=lambda tokens: f"{tokens}-tokens")
def test_fork_copies_no_block(tokens):
    store, oracle = pair(2, 2, 4, tokens)
    before = [
        (blocks.table.clone(), [pool.data_ptr() for pool in blocks.pools]) for blocks in (store.keys, store.values)
    ]
    index = np.array([0, 1, 1, 0, 1])
    for each in (store, oracle):
        each.fork(index)
    used = -(-tokens // 4)
    for blocks, (table, addresses) in zip((store.keys, store.values), before, strict=True):
        assert torch.equal(blocks.table, table[index, :, :used])
        assert [pool.data_ptr() for pool in blocks.pools] == addresses
        assert all(blocks.refs[table[0, :, :used].numpy()].ravel() == 2)
        assert all(blocks.refs[table[1, :, :used].numpy()].ravel() == 3)
    assert_same_content(store, oracle)
    assert_sound(store)


@pytest.mark.parametrize("operation", ["append", "append-padded", "keep", "crop-append"])
def test_a_write_to_shared_blocks_changes_no_other_sequence(operation):
    """After a fork only the block that is written is copied; the full blocks in front stay shared."""
    store, oracle = pair(1, 2, 4, 10)
    new = Tokens()(3, 2, 1)
    slots = torch.tensor([[[8, 9], [8, 9]]])
    for each in (store, oracle):
        each.fork(np.array([0, 0, 0]))
        if operation == "append":
            each.append(*new)
        elif operation == "append-padded":
            each.append(*new, torch.tensor([[True], [False], [True]]))
        elif operation == "keep":
            each.keep(np.array([1]), np.array([5]), slots)
        else:
            each.crop(np.array([0, 1, 1]))
            each.append(*new)
    assert_same_content(store, oracle)
    assert_sound(store)
    for blocks in (store.keys, store.values):
        assert (blocks.refs[blocks.table[0, :, :1].numpy()] == 3).all()
        assert len(np.unique(used_ids(blocks))) < blocks.counts.sum() - 2


@pytest.mark.parametrize("index", [[1, 0, 1], [1, 1, 0, 0], [2, 0, 0, 1, 2]], ids=str)
def test_a_copy_is_right_where_blocks_move_to_make_room_for_it(index):
    """Sequences in another order, so that laying the pool out anew gives blocks other ids than the copy began with."""
    store, oracle = pair(3, 2, 4, 10)
    for each in (store, oracle):
        each.fork(np.array(index))
        each.append(*Tokens()(len(index), 2, 1))
    assert_same_content(store, oracle)
    assert_sound(store)


def test_the_last_sharer_writes_in_place():
    """Where all sharers want their own block, one of them keeps it: two sequences need one copy per head, not two."""
    store, oracle = pair(1, 2, 4, 6)
    for each in (store, oracle):
        each.fork(np.array([0, 0]))
    for each in (store, oracle):
        each.append(*Tokens()(2, 2, 1))
    assert_same_content(store, oracle)
    for blocks in (store.keys, store.values):  # per head: one shared block, the last one of either, and none to spare
        assert len(np.unique(used_ids(blocks))) == blocks.held_blocks == 2 * (1 + 2)


@pytest.mark.parametrize("forked", [False, True], ids=["alone", "forked"])
@pytest.mark.parametrize("start", [64, 66], ids=["on-a-block", "inside-a-block"])
def test_keep_does_not_rewrite_blocks_in_front_of_start(start, forked):
    """Sealed blocks are immutable: same ids, same bytes, and still shared if they were."""
    store, oracle = pair(2, 2, 4, 72)
    if forked:
        for each in (store, oracle):
            each.fork(np.array([0, 1, 0]))
    sealed = start // 4
    before = [
        (blocks.table[:, :, :sealed].clone(), [pool.clone() for pool in blocks.pools], blocks.refs.copy())
        for blocks in (store.keys, store.values)
    ]
    slots = torch.arange(start, 72)[1::2].expand(2, 2, -1)
    for each in (store, oracle):
        each.keep(np.array([0, 1]), np.array([start, start]), slots)
    assert_same_content(store, oracle)
    for blocks, (table, pools, refs) in zip((store.keys, store.values), before, strict=True):
        assert torch.equal(blocks.table[:, :, :sealed], table)
        sealed_ids = table.flatten().unique()
        np.testing.assert_array_equal(blocks.refs[sealed_ids], refs[sealed_ids])
        for pool, was in zip(blocks.pools, pools, strict=True):
            assert torch.equal(pool[sealed_ids], was[sealed_ids])


def test_fork_leaves_reserved_blocks_behind():
    """Room for tokens to come is neither shared nor copied; it is free for whoever writes next."""
    store, _ = pair(2, 2, 4, 9)
    store.reserve(5)
    assert (store.keys.counts == 4).all() and store.keys.num_free == 0
    store.fork(np.array([0, 1, 0]))
    for blocks in (store.keys, store.values):
        assert (blocks.counts == 3).all() and blocks.num_free == 4


def test_free_blocks_are_used_before_more_are_asked_for():
    store, oracle = pair(2, 1, 4, 4)
    for each in (store, oracle):
        each.fork(np.array([1]))
    held, address = store.meter.held, store.keys.pools[0].data_ptr()
    assert store.keys.num_free == store.values.num_free == 1
    for each in (store, oracle):
        each.append(*Tokens()(1, 1, 1))
    assert_same_content(store, oracle)
    assert_sound(store)
    assert store.keys.num_free == store.values.num_free == 0
    assert store.keys.pools[0].data_ptr() == address
    assert store.meter.held == held + 2 * 4, "one more column in either table"


def test_keep_of_no_tokens_and_free_of_all_give_memory_back():
    store, _ = pair(3, 2, 4, 50)
    empty = live_bytes(paged(3, 2, 4))
    store.keep(np.arange(3), np.zeros(3, np.int64), torch.zeros(3, 2, 0, dtype=torch.int32))
    assert store.meter.held == live_bytes(store) == empty
    assert store.keys.held_blocks == store.values.held_blocks == 0


def test_freeing_one_sequence_of_many_gives_back_its_blocks():
    store, oracle = pair(2, 2, 4, 40)
    held = store.meter.held
    for each in (store, oracle):
        each.reset(np.array([1]))
    assert_same_content(store, oracle)
    assert store.meter.held < 0.6 * held


# ----------------------------------------------------------------------------------------------------- views of a store
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_window_and_slots(dtype):
    store = paged(3, 2, 4, dtypes=(dtype, dtype))
    oracle = dense(3, 2, (dtype, dtype))
    keys, values, positions = Tokens()(3, 2, 21)
    real = torch.ones(3, 21, dtype=torch.bool)
    real[1, :5] = False
    for each in (store, oracle):
        each.append(keys.to(dtype), values.to(dtype), positions, real)
    sequences, start = np.array([2, 1]), np.array([3, 8])
    got, slots = store.window(sequences, start, 7), store.slots(start, 7)
    assert got.shape == (2, 2, 7, KEY_DIM) and got.dtype == dtype and slots.dtype == torch.int32
    for i, b in enumerate(sequences):
        for h in range(2):
            assert torch.equal(got[i, h], oracle.read(b, h)[0][start[i] : start[i] + 7])
            assert slots[i, h].tolist() == list(range(start[i], start[i] + 7))
    assert sum(store.slot_bytes) == (KEY_DIM + VALUE_DIM) * dtype.itemsize


def test_slots_nobody_wrote_are_zero():
    """Attention masks them, and 0 times anything finite is 0; what `torch.empty` leaves would not be."""
    store, _ = pair(2, 2, 16, 5)
    for pool in (*store.keys.pools, *store.values.pools):
        flat = pool.view(pool.shape[0], 16, -1)
        assert (flat[:, 5:] == 0).all() and (flat[:, :5] != 0).any()


# ------------------------------------------------------------------------------------------------------- a cap on bytes
def exhaust(store, oracle, tokens):
    """Appends one token at a time to both until the cap is reached; returns the error, or None after 200 tokens."""
    for _ in range(200):
        new = tokens(*oracle.lengths.shape, 1)
        try:
            store.append(*new)
        except PoolExhausted as error:
            return error
        oracle.append(*new)
    return None


FULL = 64  # tokens that fill 16 blocks of 4 slots: one more in every row is less than what shrinking bothers about


def caps():
    """Caps a few bytes apart over what two blocks more in every row take, so that each allocation fails once."""
    held = pair(2, 2, 4, FULL)[0].meter.held
    return range(held, held + 2 * 4 * 4 * (KEY_DIM + VALUE_DIM + 1) * 4, 40)


def give_back(operation, *stores):
    """One of the operations that free memory, or that could; the same in every store."""
    for store in stores:
        if operation == "crop-nothing":
            store.crop(np.zeros(len(store.lengths), np.int64))
        elif operation == "crop":
            store.crop(np.arange(len(store.lengths)) * 9)
        elif operation == "free":
            store.reset(np.array([0]))
        elif operation == "free-nothing":
            store.reset(np.array([], np.int64))
        elif operation == "keep":
            store.keep(np.array([1]), np.array([60]), torch.full((1, 2, 1), 62))
        elif operation == "fork-fewer":
            store.fork(np.array([1]))
        elif operation == "fork-same":
            store.fork(np.arange(len(store.lengths)))


OPERATIONS = ["crop-nothing", "crop", "free-nothing", "free", "keep", "fork-fewer", "fork-same"]


@pytest.mark.parametrize("operation", ["none", "crop", "free", "keep", *map(slow, ("crop-nothing", "free-nothing"))])
def test_past_max_bytes_nothing_changes_and_the_store_goes_on(operation):
    """Whichever allocation fails: content as it was, bytes counted, and what frees works, as does all that follows."""
    for cap, asked in itertools.product(caps(), (1, 9)):
        meter, tokens = MemoryMeter(cap), Tokens()
        store, oracle = pair(2, 2, 4, FULL, meter)
        with contextlib.suppress(PoolExhausted):
            store.reserve(asked)
        assert exhaust(store, oracle, tokens) is not None
        assert_same_content(store, oracle)
        assert meter.held == live_bytes(store)
        give_back(operation, store, oracle)
        assert_same_content(store, oracle)
        meter.max_bytes = None
        for _ in range(6):
            new = tokens(*oracle.lengths.shape, 1)
            for each in (store, oracle):
                each.append(*new)
            assert_same_content(store, oracle)
        assert_sound(store)


@pytest.mark.parametrize("operation", ["append", "reserve", "fork-more", "own"])
def test_max_bytes_holds_for_everything_held(operation):
    """The cap is on tables and lengths as well as on blocks: it is never passed, whatever is refused."""
    for cap in caps():
        meter = MemoryMeter(cap)
        store, oracle = pair(2, 2, 4, FULL, meter)
        if operation == "append":
            exhaust(store, oracle, Tokens())
        else:
            with contextlib.suppress(PoolExhausted):
                if operation == "reserve":
                    store.reserve(4)
                else:
                    store.fork(np.array([0, 1, 0, 1]))
                    oracle.fork(np.array([0, 1, 0, 1]))
                if operation == "own":
                    store.reserve(1)
        assert_same_content(store, oracle)
        assert meter.held == live_bytes(store)
        assert meter.held <= cap, f"{meter.held} bytes held under max_bytes={cap}"


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "keep"])  # keep writes, so it may copy
def test_sequences_that_share_give_memory_back_without_asking_for_any(operation):
    """What frees never fails for lack of bytes, not even where forks brought the store to its cap."""
    store, oracle = pair(2, 2, 4, FULL)
    for each in (store, oracle):
        each.fork(np.array([0, 0, 1, 1]))
    store.meter.max_bytes = store.meter.held - 64  # a cap that was lowered, or passed
    give_back(operation, store, oracle)
    assert_same_content(store, oracle)
    assert_sound(store)


def test_pool_exhausted_names_held_asked_and_cap():
    meter = MemoryMeter(1000)
    meter.zeros((100,), torch.float32, CPU)
    with pytest.raises(
        PoolExhausted, match=r"holds 400 bytes and needs 601 more, past max_bytes=1000; raise max_bytes"
    ):
        meter.require(601)
    meter.require(600)
    assert meter.held == 400


def test_forked_sequences_that_cannot_be_told_apart_for_lack_of_bytes():
    """Copy on write that does not fit under the cap leaves both sequences as they were."""
    store, oracle = pair(1, 2, 4, 6)
    for each in (store, oracle):
        each.fork(np.array([0, 0]))
    store.meter.max_bytes = store.meter.held
    with pytest.raises(PoolExhausted):
        store.append(*Tokens()(2, 2, 1))
    assert_same_content(store, oracle)
    with pytest.raises(PoolExhausted):
        store.keep(np.array([0]), np.array([0]), torch.tensor([[[5], [5]]]))
    assert_same_content(store, oracle)


def test_meter_counts_what_is_held_and_the_peak():
    meter = MemoryMeter()
    tensor = meter.zeros((3, 5), torch.int16, CPU)
    assert (meter.held, meter.peak) == (30, 30) and not tensor.any()
    other = meter.count(torch.ones(4))
    meter.uncount(tensor)
    assert (meter.held, meter.peak) == (16, 46)
    meter.uncount(other)
    meter.zeros((1,), torch.int8, CPU)
    assert (meter.held, meter.peak) == (1, 46)


# ----------------------------------------------------------------------------------------------- queries of open tokens
@given(data=st.data())
def test_query_buffer(data):
    """Against a list of queries per sequence, under random operations."""
    heads, dim, meter = 2, 3, MemoryMeter()
    lists = [[] for _ in range(data.draw(st.integers(1, 3), "sequences"))]
    buffer = QueryBuffer(len(lists), heads, dim, torch.float32, CPU, meter)
    numbers = iter(range(10**6))
    for _ in range(data.draw(st.integers(1, 10), "steps")):
        filled = np.array([len(held) for held in lists])
        operation = data.draw(st.sampled_from(["append", "padded", "drop", "trim", "fork"]), "operation")
        if operation in ("append", "padded"):
            new = data.draw(st.sampled_from([0, 1, 2, 5, GROWTH, GROWTH + 1]), "new")
            flat = torch.tensor([next(numbers) for _ in range(len(lists) * heads * new * dim)])
            queries = flat.view(len(lists), heads, new, dim).float()
            marks = st.lists(st.booleans() if operation == "padded" else st.just(True), min_size=new, max_size=new)
            real = torch.tensor([data.draw(marks) for _ in lists]).view(len(lists), new).bool()
            buffer.append(queries, filled, real if operation == "padded" else None)
            for b, held in enumerate(lists):
                held.extend(queries[b, :, s] for s in range(new) if real[b, s])
        elif operation == "drop":
            chosen = data.draw(st.lists(st.integers(0, len(lists) - 1), unique=True, min_size=1), "dropped")
            first = data.draw(st.integers(0, int(filled[chosen].min())), "first")
            buffer.forget(torch.tensor(chosen), first)
            for b in chosen:
                del lists[b][:first]
        elif operation == "trim":
            room = data.draw(st.sampled_from([0, 1, GROWTH, GROWTH + 1]), "room")
            had = buffer.buffer.shape[2]
            buffer.shrink(filled, room)
            needed = -(-max(room, int(filled.max())) // GROWTH) * GROWTH
            assert buffer.buffer.shape[2] == min(had, needed)
        else:
            index = data.draw(st.lists(st.integers(0, len(lists) - 1), min_size=1, max_size=4), "index")
            buffer.fork(torch.tensor(index))
            lists = [list(lists[i]) for i in index]
        assert meter.held == buffer.buffer.nbytes
        assert buffer.buffer.shape[2] % GROWTH == 0
        for b, held in enumerate(lists):
            start = data.draw(st.integers(0, len(held)), "start")
            expected = torch.stack(held[start:], 1) if held[start:] else torch.zeros(heads, 0, dim)
            assert torch.equal(buffer.window(torch.tensor([b]), start, len(held))[0], expected)
    buffer.close()
    assert meter.held == 0


def full_query_buffer(sequences):
    """A buffer with every place in use under a cap that leaves no room, and the queries in it."""
    queries = torch.randn(sequences, 2, GROWTH, 3)
    meter = MemoryMeter(queries.nbytes)
    buffer = QueryBuffer(sequences, 2, 3, torch.float32, CPU, meter)
    buffer.append(queries, np.zeros(sequences, np.int64))
    return buffer, queries, meter


def test_query_buffer_past_max_bytes_stays_as_it_was():
    buffer, queries, meter = full_query_buffer(2)
    held = queries.nbytes
    with pytest.raises(PoolExhausted, match=f"holds {held} bytes and needs {held} more, past max_bytes={held}"):
        buffer.append(torch.randn(2, 2, 1, 3), np.array([GROWTH, GROWTH]))
    assert torch.equal(buffer.window(torch.tensor([0, 1]), 0, GROWTH), queries)
    assert meter.held == held


def test_query_buffer_forks_within_max_bytes():
    buffer, queries, meter = full_query_buffer(2)
    held = queries.nbytes
    with pytest.raises(PoolExhausted, match=f"holds {held} bytes and needs {held // 2} more, past max_bytes={held}"):
        buffer.fork(torch.tensor([0, 1, 1]))
    assert torch.equal(buffer.window(torch.tensor([0, 1]), 0, GROWTH), queries)
    buffer.fork(torch.tensor([1, 0]))
    assert torch.equal(buffer.window(torch.tensor([1, 0]), 0, GROWTH), queries)
    assert meter.held == held


def filled(kind):
    """A store, prompt or buffer that has been through what they go through, in a meter of its own."""
    meter = MemoryMeter()
    if kind == "queries":
        holder = QueryBuffer(2, 4, 3, torch.float32, CPU, meter)
        holder.append(torch.randn(2, 4, 5, 3), np.array([0, 0]))
        holder.fork(torch.tensor([1, 0, 1]))
        return holder
    tokens = Tokens()
    if kind == "prompt":
        holder = Prompt(meter)
        holder.append(*tokens(2, 3, 9))
    else:
        proximal = {"followers": (0, 2), "proximal": Proximal(1, 2)} if kind == "followers" else {}
        holder = paged_store(
            (2, 3), (KEY_DIM, VALUE_DIM), dtypes=SINGLE, device=CPU, block_size=4, meter=meter, **proximal
        )
        holder.widen(2)
        for new in (9, 1, 5):
            holder.append(*tokens(2, 3, new))
        with pytest.raises(PoolExhausted):
            meter.max_bytes = 1
            holder.reserve(99)
        meter.max_bytes = None
    holder.fork(np.array([1, 0, 1]))
    holder.crop(np.array([1, 0, 1]))
    return holder


@pytest.mark.parametrize("kind", ["paged", "followers", "prompt", "queries"])
def test_the_last_reference_frees_the_tensors_at_once(kind):
    """Nothing holds itself in a circle, which memory would wait in for the collector."""
    gc.collect()
    gc.disable()
    try:
        holder = filled(kind)
        tensors = [weakref.ref(tensor) for tensor in tensors_of(holder).values()]
        assert len(tensors) > 0 and all(tensor() is not None for tensor in tensors)
        del holder
        assert all(tensor() is None for tensor in tensors)
    finally:
        gc.enable()


def test_after_a_failed_copy_of_shared_blocks_writes_go_where_reads_look():
    """Whichever allocation of `keep` fails, pools that moved before it are the ones that the next token goes to."""
    failures = 0
    for spare in range(0, 4000, 40):
        meter = MemoryMeter()
        sizes = {"dtypes": SINGLE, "device": torch.device("cpu"), "block_size": 4, "meter": meter}
        store = PagedStore((1, 2), (8, 4), **sizes)
        prompt, rest, last = torch.randn(1, 2, 6, 8), torch.randn(3, 2, 5, 8), torch.randn(3, 2, 1, 8)
        store.append(prompt, prompt[..., :4], torch.arange(6, dtype=torch.int32)[None])
        store.fork(np.array([0, 0, 0]))
        # Block 0 stays shared, the others are each row's own, and the last one has room for one token more.
        store.append(rest, rest[..., :4], torch.arange(6, 11, dtype=torch.int32).expand(3, 5))
        meter.max_bytes = meter.held + spare
        try:
            store.keep(np.arange(3), np.zeros(3, np.int32), torch.tensor([1, 3, 9], dtype=torch.int32).expand(3, 2, 3))
            expected = [1, 3, 9]
        except PoolExhausted:
            failures += 1
            expected = list(range(11))
        meter.max_bytes = None
        store.append(last, last[..., :4], torch.full((3, 1), 11, dtype=torch.int32))
        for b, h in itertools.product(range(3), range(2)):
            keys, values, positions = store.read(b, h)
            assert positions.tolist() == [*expected, 11]
            assert torch.equal(keys[-1], last[b, h, 0]) and torch.equal(values[-1], last[b, h, 0, :4])
    assert failures > 2
