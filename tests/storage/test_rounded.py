"""A store that rounds what has settled: each token once, whatever is then dropped, moved, shared or taken back."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kara_hf.kernels.rounding import Packing
from kara_hf.policy import moves
from kara_hf.storage import MemoryMeter, PagedStore, PoolExhausted, RecordStore, RoundedStore

CPU = torch.device("cpu")
SIZES, FIRST = (6, 3), 2


def rounded(sequences, heads, block_size, *, metric=False, ordered=False, bits=(4, 4), meter=None, dtype=torch.float32):
    meter, shape = meter or MemoryMeter(), (sequences, heads)
    common = {"device": CPU, "block_size": block_size, "meter": meter, "metric": metric}
    whole = PagedStore(shape, SIZES, dtypes=(dtype, dtype), **common)
    packings = tuple(Packing(size, count) for size, count in zip(SIZES, bits, strict=True))
    return RoundedStore(whole, RecordStore(shape, packings, begin=FIRST if ordered else None, **common), FIRST)


def tensors_of(holder, seen):
    if isinstance(holder, torch.Tensor):
        seen[holder.untyped_storage().data_ptr()] = holder.untyped_storage().nbytes()
    elif isinstance(holder, list | tuple):
        for each in holder:
            tensors_of(each, seen)
    elif hasattr(holder, "__dict__") and not isinstance(holder, MemoryMeter | np.ndarray):
        for each in vars(holder).values():
            tensors_of(each, seen)
    return seen


def rows_of(store):
    return {(b, h): store.read(b, h) for b, h in np.ndindex(*store.lengths.shape)}


def same(one, other):
    """Whether two readings are of the same records: products of one row or of many differ in their last bits."""
    return torch.allclose(one, other, rtol=1e-5, atol=1e-5)


def some(store, sequences, counts):
    """Of the whole tokens of the named sequences the oldest behind the first ones, ``[B, H, N]``."""
    slots = torch.arange(int(store.whole.lengths.max(initial=0)))
    chosen = torch.zeros(*store.lengths.shape, len(slots), dtype=torch.bool)
    for b, count in zip(sequences, counts, strict=True):
        chosen[b] = (slots >= FIRST) & (slots < FIRST + count)
    return chosen & (slots < torch.from_numpy(store.whole.lengths)[..., None])


class Machine(RuleBasedStateMachine):
    """What every row holds is known token by token: exact while it is whole, and from when it settled on what it was
    rounded to, to the last bit.
    """

    def __init__(self):
        super().__init__()
        self.drawn = 0

    @initialize(
        sequences=st.integers(1, 3), heads=st.integers(1, 2), block_size=st.sampled_from([1, 4]), data=st.data()
    )
    def make(self, sequences, heads, block_size, data):
        self.metric = data.draw(st.booleans(), "metric")
        self.ordered = not self.metric and data.draw(st.booleans(), "ordered")
        bits = data.draw(st.sampled_from([(4, 4), (8, 8), (8, 2)]), "bits")
        self.store = rounded(sequences, heads, block_size, metric=self.metric, ordered=self.ordered, bits=bits)
        self.known = {(b, h): [] for b, h in np.ndindex(sequences, heads)}  # (position, key, value), rounded ones first

    @property
    def shape(self):
        return self.store.lengths.shape

    def learn(self):
        """Takes over what the rows hold, of tokens known by their positions."""
        for row, (keys, values, positions) in rows_of(self.store).items():
            self.known[row] = list(zip(positions.tolist(), keys.clone(), values.clone(), strict=True))

    @rule(new=st.integers(1, 9))
    def append(self, new):
        if int(self.store.lengths.max(initial=0)) + new > 60:
            return
        batch, heads = self.shape
        generator = torch.Generator().manual_seed(self.drawn)
        self.drawn += 1
        keys, values = (torch.randn(batch, heads, new, size, generator=generator) * 3 + 1 for size in SIZES)
        first = np.array(
            [
                [1 + max((token[0] for h in range(heads) for token in self.known[b, h]), default=-1)]
                for b in range(batch)
            ]
        )
        positions = torch.from_numpy(first).to(torch.int32) + torch.arange(new, dtype=torch.int32)
        self.store.append(keys, values, positions)
        for b, h in np.ndindex(batch, heads):
            self.known[b, h] += list(zip(positions[b].tolist(), keys[b, h], values[b, h], strict=True))

    @rule(data=st.data())
    def settle(self, data):
        batch, _ = self.shape
        counts = [data.draw(st.integers(0, max(0, int(n) - FIRST)), "tokens") for n in self.store.whole.lengths.min(1)]
        before, rounded_before = dict(self.known), self.store.records.lengths.copy()
        self.store.settle(some(self.store, range(batch), counts))
        np.testing.assert_array_equal(
            self.store.records.lengths - rounded_before, np.array(counts)[:, None] + 0 * rounded_before
        )
        self.learn()
        for (b, h), tokens in self.known.items():
            old, now = ({token[0]: token[1:] for token in each} for each in (before[b, h], tokens))
            assert old.keys() == now.keys()
            held = int(rounded_before[b, h])
            newly = {token[0] for token in tokens[held : held + counts[b]]}
            for position, (key, value) in now.items():
                if position not in newly:  # neither what is whole nor what was rounded before has changed
                    assert same(key, old[position][0]) and torch.equal(value, old[position][1])
                else:
                    assert (value - old[position][1]).abs().max() <= 10 / self.store.records.packings[1].top

    @precondition(lambda self: self.metric)
    @rule(seed=st.integers(0, 99), share=st.floats(0, 0.7))
    def evict(self, seed, share):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.from_numpy(self.store.lengths)
        longest = int(lengths.max()) if lengths.numel() else 0
        slots = torch.arange(longest)
        dropped = (torch.rand(*lengths.shape, longest, generator=generator) < share) & (slots < lengths[..., None])
        for part, gone in self.store.parts(dropped):
            after = torch.from_numpy(part.lengths) - gone.sum(2)
            part.evict(*moves(gone, after), after.numpy())
        expected = {}
        for b, h in np.ndindex(*self.shape):
            expected[b, h] = [token for slot, token in enumerate(self.known[b, h]) if not dropped[b, h, slot]]
        before = {row: {token[0]: token[1:] for token in tokens} for row, tokens in expected.items()}
        self.learn()
        for row, tokens in self.known.items():
            assert {token[0] for token in tokens} == before[row].keys()
            for position, key, value in tokens:
                assert same(key, before[row][position][0]) and torch.equal(value, before[row][position][1])

    @precondition(lambda self: not self.metric)
    @rule(data=st.data())
    def crop(self, data):
        counts = np.array([data.draw(st.integers(0, int(n)), "tokens") for n in self.store.lengths.min(1)])
        self.store.crop(counts)
        for (b, h), tokens in self.known.items():
            newest = sorted(token[0] for token in tokens)[len(tokens) - counts[b] :]
            self.known[b, h] = [token for token in tokens if token[0] not in newest]

    @rule(data=st.data())
    def fork(self, data):
        batch, heads = self.shape
        index = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=3), "index")
        shared = self.store.records.values.held_blocks
        self.store.fork(np.array(index))
        if not self.metric:
            assert self.store.records.values.held_blocks <= shared  # by reference
        self.known = {(i, h): list(self.known[b, h]) for i, b in enumerate(index) for h in range(heads)}

    @rule(data=st.data())
    def reset(self, data):
        sequence = data.draw(st.integers(0, self.shape[0] - 1), "sequence")
        self.store.reset(np.array([sequence]))
        for h in range(self.shape[1]):
            self.known[sequence, h] = []

    @invariant()
    def is_as_known(self):
        if not hasattr(self, "store"):
            return
        for row, (keys, values, positions) in rows_of(self.store).items():
            tokens = self.known[row]
            assert positions.tolist() == [token[0] for token in tokens]
            for place, (_, key, value) in enumerate(tokens):
                assert same(keys[place], key) and torch.equal(values[place], value)
        assert self.store.meter.held == sum(tensors_of(self.store, {}).values())
        rows = self.store.rows()
        positions, slots = rows.all_positions(), rows.all_slots()
        for b, h in np.ndindex(*self.shape):
            there = positions[b, h % positions.shape[1]]
            shown = slots[b, h] < rows.columns
            assert there[shown].tolist() == [token[0] for token in self.known[b, h]]
            assert slots[b, h][shown].tolist() == list(range(len(self.known[b, h])))

    def teardown(self):
        if hasattr(self, "store"):
            self.store.close()
            assert self.store.meter.held == 0


Machine.TestCase.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)
TestRounded = Machine.TestCase


def filled(store, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(*store.lengths.shape, tokens, size, generator=generator) for size in SIZES)
    store.append(keys, values, torch.arange(tokens, dtype=torch.int32).expand(store.lengths.shape[0], -1))
    return keys, values


def test_fifty_passes_add_no_error():
    """Every pass drops some tokens of every row and rounds some new ones. What a token was rounded to stays so."""
    store, generator = rounded(2, 2, 4, metric=True), torch.Generator().manual_seed(0)
    seen, moved = {}, 0
    for number in range(50):
        keys, values = (torch.randn(2, 2, 8, size, generator=generator) for size in SIZES)
        store.append(keys, values, torch.arange(8 * number, 8 * number + 8, dtype=torch.int32).expand(2, -1))
        lengths = torch.from_numpy(store.lengths)
        slots = torch.arange(int(lengths.max()))
        dropped = (torch.rand(2, 2, len(slots), generator=generator) < 0.2) & (slots < lengths[..., None] - 8)
        for part, gone in store.parts(dropped):
            after = torch.from_numpy(part.lengths) - gone.sum(2)
            source, target = moves(gone, after)
            moved += int((target >= 0).sum()) * (part is store.records)
            part.evict(source, target, after.numpy())
        store.settle(some(store, range(2), [6, 6]))
        for row in np.ndindex(2, 2):
            for key, value, position in zip(*PagedStore.read(store.records, *row), strict=True):  # bytes, and its frame
                told = seen.setdefault((row, int(position)), (key, value, store.records.frame[row].clone()))
                for one, other in zip(told, (key, value, store.records.frame[row]), strict=True):
                    assert torch.equal(one, other)
    assert moved > 500 and (store.records.lengths > 10).all()


def test_sequences_that_fork_share_records_and_copy_what_they_write():
    store = rounded(1, 2, 4)
    filled(store, 30)
    store.settle(some(store, [0], [22]))
    blocks = store.records.values.held_blocks
    store.fork(np.array([0, 0, 0]))
    assert store.records.values.held_blocks == blocks and store.records.values.refs.max() == 3
    before = rows_of(store)
    store.settle(some(store, [0, 1, 2], [3, 0, 1]))
    assert store.records.lengths.tolist() == [[25, 25], [22, 22], [23, 23]]
    for (b, h), (keys, values, positions) in rows_of(store).items():
        assert positions.sort().values.tolist() == before[b, h][2].sort().values.tolist()
        assert same(keys[:22], before[b, h][0][:22]) and torch.equal(values[:22], before[b, h][1][:22])


def test_without_room_nothing_is_lost():
    meter = MemoryMeter()
    store = rounded(1, 1, 4, meter=meter)
    filled(store, 40)
    before, meter.max_bytes = rows_of(store), meter.held + 8
    with pytest.raises(PoolExhausted):
        store.settle(some(store, [0], [30]))
    for got, expected in zip(store.read(0, 0), before[0, 0], strict=True):
        assert torch.equal(got, expected)
    meter.max_bytes = None
    store.settle(some(store, [0], [30]))
    assert store.records.lengths.tolist() == [[30]] and meter.held == sum(tensors_of(store, {}).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_bytes_are_those_of_records_and_of_what_is_whole(dtype):
    store = rounded(2, 2, 4, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 2, 30, size, generator=generator).to(dtype) for size in SIZES)
    store.append(keys, values, torch.arange(30, dtype=torch.int32).expand(2, -1))
    store.settle(some(store, [0, 1], [20, 20]))
    width = (6 * 4 // 16 + 1) * 2 + 4, 2 + 4
    assert tuple(packing.width for packing in store.records.packings) == width
    assert store.stored_bytes == 4 * (20 * sum(width) + 10 * sum(SIZES) * dtype.itemsize)
    assert store.slot_bytes == tuple(size * dtype.itemsize for size in SIZES)
    assert store.read(0, 0)[0].dtype == dtype


def test_a_prompt_is_rounded_as_it_is_filled_in():
    store, other = (rounded(1, 2, 4, metric=True) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 2, 20, size, generator=generator) for size in SIZES)
    positions, metric = torch.arange(20, dtype=torch.int32)[None], torch.rand(1, 2, 20, generator=generator)
    kept = torch.rand(1, 2, 20, generator=generator) < 0.7
    settled = (positions >= FIRST)[:, None] & (positions < 14)[:, None]
    store.fill(keys, values, positions, metric, torch.ones(1, 20, dtype=torch.bool), kept, 3, settled)
    other.fill(keys, values, positions, metric, torch.ones(1, 20, dtype=torch.bool), kept, 3, settled & False)
    places = other.whole.rows().dense_positions()
    other.settle((places >= FIRST) & (places < 14))
    for row, (mine, theirs) in ((row, (store.read(*row), other.read(*row))) for row in itertools.product([0], [0, 1])):
        order, others = mine[2].argsort(), theirs[2].argsort()
        assert mine[2][order].tolist() == positions[0][kept[row]].tolist()
        for got, expected in zip(mine, theirs, strict=True):
            assert same(got[order].double(), expected[others].double())
    for got, expected in zip(store.ranked(), other.ranked(), strict=True):
        longest = store.lengths[0]
        for h in range(2):
            assert sorted(got[0, h, : longest[h]].tolist()) == sorted(expected[0, h, : longest[h]].tolist())
