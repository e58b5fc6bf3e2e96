"""What is kept: settings, Token2Chunk against its text, the scores against their formulas, and when windows are due."""

import itertools
import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.marks import most_examples

from kara_hf.config import KaraConfig, KVCompressConfig
from kara_hf.policy import SCORES, KaraPolicy, Window, register_score, token2chunk, top_tokens
from kara_hf.policy.scores import shuffle_runs

BUILT_IN = [
    "bidirectional",
    "blend",
    "causal",
    "key-difference",
    "random",
    "random-chunks",
    "recency",
]


# ------------------------------------------------------------------------------------------------------------- settings
BAD_SETTINGS = [
    ("bits", 3, "one of 8, 4, or None"),
    ("key_bits", 2, "one of 8, 4, or None"),
    ("value_bits", 16, "one of 8, 4, 2, or None"),
    ("retention", 0, "a number in (0, 1]"),
    ("retention", 1.01, "a number in (0, 1]"),
    ("retention", -0.5, "a number in (0, 1]"),
    ("retention", math.nan, "a number in (0, 1]"),
    ("retention", True, "a number in (0, 1]"),
    ("retention", "0.25", "a number in (0, 1]"),
    ("retention", None, "a number in (0, 1]"),
    ("window", 0, "a whole number of tokens from 2 on"),
    ("window", 1, "a whole number of tokens from 2 on"),
    ("window", 256.0, "a whole number of tokens from 2 on"),
    ("window", 250, "a multiple of block_size=16, so that sealing it frees whole blocks; round it or lower block_size"),
    ("min_cache_tokens", -1, "a whole number of tokens from 0 on"),
    ("min_cache_tokens", 0.5, "a whole number of tokens from 0 on"),
    ("recent", -1, "a whole number of tokens from 0 on, or a share of the tokens held in (0, 1)"),
    ("recent", 1.5, "a whole number of tokens from 0 on, or a share of the tokens held in (0, 1)"),
    ("recent", 1.0, "a whole number of tokens from 0 on, or a share of the tokens held in (0, 1)"),
    ("recent", 0.0, "a whole number of tokens from 0 on, or a share of the tokens held in (0, 1)"),
    ("recent", math.nan, "a whole number of tokens from 0 on, or a share of the tokens held in (0, 1)"),
    ("recent", False, "a whole number of tokens from 0 on, or a share of the tokens held in (0, 1)"),
    ("sinks", -1, "a whole number of tokens from 0 on"),
    ("pin", 3, "a list of (start, end), true positions"),
    ("prefill_chunk", 1, "a whole number of tokens from 2 on, or None"),
    ("sinks", 0.5, "a whole number of tokens from 0 on"),
    ("score", "bidirectonal", "one of bidirectional, blend, causal, "),
    ("score", None, "one of bidirectional, blend, causal, "),
    ("queries", 0, "a whole number from 1 on, or None for all"),
    ("queries", 8.0, "a whole number from 1 on, or None for all"),
    ("anchor_share", 0.0, "a number in (0, 1]"),
    ("anchor_share", 2, "a number in (0, 1]"),
    ("anchor_share", "half", "a number in (0, 1]"),
    ("compress_prompt", 1, "True or False"),
    ("compress_prompt", "yes", "True or False"),
    ("block_size", 0, "a whole number from 1 on"),
    ("block_size", 16.0, "a whole number from 1 on"),
    ("seed", 0.5, "a whole number"),
    ("seed", None, "a whole number"),
]


@pytest.mark.parametrize(("name", "value", "expected"), BAD_SETTINGS, ids=lambda part: str(part)[:24])
def test_a_bad_setting_is_named_with_its_value_and_the_remedy(name, value, expected):
    with pytest.raises(ValueError) as error:
        KaraPolicy(KaraConfig(**{name: value}))
    assert str(error.value).startswith(f"{name}={value!r} is not possible: {name} must be {expected}")


def test_every_setting_is_checked():
    assert {name for name, _, _ in BAD_SETTINGS} == {field.name for field in fields(KaraConfig)}


@pytest.mark.parametrize(
    "chosen",
    [{}, {"retention": 1}, {"window": 2, "block_size": 1, "recent": 0}, {"seed": -3, "pin": [(4, 9), (0, 2)]}],
    ids=lambda chosen: ",".join(chosen) or "defaults",
)
def test_settings_survive_json(chosen):
    config = KaraConfig(**chosen)
    assert KaraConfig.from_json(config.to_json()) == config
    assert json.loads(config.to_json()) == asdict(config) | {"pin": [list(each) for each in config.pin]}


def test_json_with_unknown_or_bad_settings_is_refused():
    with pytest.raises(TypeError, match="windw"):
        KaraConfig.from_json('{"windw": 64}')
    with pytest.raises(ValueError, match="retention=3 is not possible"):
        KaraConfig.from_json('{"retention": 3}')


@pytest.mark.parametrize(
    ("retention", "window", "anchor_share", "keep", "anchors"),
    [
        (0.25, 256, 0.5, 64, 32),
        (1.0, 16, 1.0, 16, 16),
        (0.001, 16, 0.5, 1, 1),
        (0.2, 64, 0.3, 13, 4),
        (0.9, 16, 0.01, 14, 1),
    ],
)
def test_kept_per_window_and_anchors(retention, window, anchor_share, keep, anchors):
    config = KaraConfig(retention=retention, window=window, anchor_share=anchor_share, recent=32)
    assert (config.kept_per_window, config.anchors) == (keep, anchors)


# ---------------------------------------------------------------------------------------------------------- token2chunk
def select_as_written(scores, keep, anchors):
    """Token2Chunk for one row of Python floats, sentence after sentence of its description, with exact means."""
    ranking = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    taken = set(ranking[:anchors])
    ends = sorted(taken)
    gaps = [range(left + 1, right) for left, right in itertools.pairwise(ends) if right - left > 1]
    gaps.sort(key=lambda gap: (-sum(Fraction(scores[token]) for token in gap) / len(gap), gap[0]))
    for gap in gaps:
        if len(gap) <= keep - len(taken):
            taken.update(gap)
    for token in ranking:
        if len(taken) < keep:
            taken.add(token)
    return sorted(taken)


def test_token2chunk_as_written_on_an_example():
    """Anchors 1, 4, 6 and 9: the gap 7-8 has the better mean but does not fit behind 5, so a single token is added."""
    scores = [0.0, 9.0, 1.0, 1.0, 8.0, 4.0, 7.0, 3.0, 3.0, 6.0, 2.0]
    assert select_as_written(scores, 6, 4) == [1, 4, 5, 6, 7, 9]
    assert select_as_written(scores, 7, 4) == [1, 4, 5, 6, 7, 8, 9]
    assert select_as_written(scores, 4, 4) == [1, 4, 6, 9]
    assert token2chunk(torch.tensor(scores), 6, 4).tolist() == [1, 4, 5, 6, 7, 9]
    assert token2chunk(torch.tensor(scores), 7, 4).tolist() == [1, 4, 5, 6, 7, 8, 9]


def test_a_gap_that_does_not_fit_is_passed_over():
    """Gap 1-3 is the best one and too long for the two tokens left; gap 5 is filled, then the best single token."""
    scores = [9.0, 5.0, 5.0, 5.0, 8.0, 1.0, 7.0]
    assert select_as_written(scores, 5, 3) == [0, 1, 4, 5, 6]
    assert token2chunk(torch.tensor(scores), 5, 3).tolist() == [0, 1, 4, 5, 6]


@st.composite
def selections(draw):
    """Rows of scores, k and m. Few distinct values make ties; fine ones are as a softmax gives them."""
    width, rows = draw(st.integers(1, 24)), draw(st.integers(1, 4))
    keep = draw(st.integers(1, width))
    anchors = draw(st.integers(1, keep))
    coarse = st.integers(-2, 3).map(lambda number: number / 4)
    fine = st.integers(0, 2**20).map(lambda number: number / 2**20)
    number = draw(st.sampled_from([coarse, fine]))
    return draw(st.lists(st.lists(number, min_size=width, max_size=width), min_size=rows, max_size=rows)), keep, anchors


@most_examples(120)
@given(selections())
def test_token2chunk(selection):
    """What the text says, for each row of a batch; k tokens, ascending, with every anchor among them."""
    rows, keep, anchors = selection
    scores = torch.tensor(rows)
    before = scores.clone()
    got = token2chunk(scores, keep, anchors)
    assert got.dtype == torch.int64 and got.shape == (len(rows), keep)
    assert got.tolist() == [select_as_written(row, keep, anchors) for row in rows]
    assert (got.diff() > 0).all()
    for row, kept in zip(rows, got.tolist(), strict=True):
        assert set(select_as_written(row, anchors, anchors)) <= set(kept)
    assert torch.equal(scores, before)


@given(selections())
def test_token2chunk_of_a_batch_is_that_of_each_row(selection):
    rows, keep, anchors = selection
    batched = token2chunk(torch.tensor(rows)[None, :, None], keep, anchors)
    assert batched.shape == (1, len(rows), 1, keep)
    for index, row in enumerate(rows):
        assert torch.equal(batched[0, index, 0], token2chunk(torch.tensor(row), keep, anchors))


@given(selections())
def test_all_anchors_is_top_k(selection):
    rows, keep, _ = selection
    scores = torch.tensor(rows)
    assert torch.equal(token2chunk(scores, keep, keep), top_tokens(scores, keep))
    for row, kept in zip(rows, top_tokens(scores, keep).tolist(), strict=True):
        assert kept == sorted(sorted(range(len(row)), key=lambda token: (-row[token], token))[:keep])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_token2chunk_of_other_dtypes(dtype):
    scores = torch.rand(3, 40).to(dtype)
    expected = [select_as_written(row, 14, 5) for row in scores.float().tolist()]
    assert token2chunk(scores, 14, 5).tolist() == expected


def test_token2chunk_of_attention_over_many_magnitudes():
    """Gaps are ranked by their own mean also behind a token that holds nearly all attention."""
    scores = torch.tensor([1.0, 1e-20, 0.5, 2e-20, 0.25])
    assert token2chunk(scores, 4, 3).tolist() == [0, 2, 3, 4]


# --------------------------------------------------------------------------------------------------------- shuffle_runs
def runs(taken):
    """Lengths of the runs of True, in order."""
    return [len(list(group)) for value, group in itertools.groupby(taken) if value]


@given(st.lists(st.booleans(), min_size=1, max_size=24), st.integers(0, 999))
def test_shuffle_runs_keeps_all_run_lengths(row, seed):
    noise = torch.rand(4, len(row) + 1, generator=torch.Generator().manual_seed(seed))
    taken = torch.tensor([row, row[::-1], [False] * len(row), [True] * len(row)])
    shuffled = shuffle_runs(taken, noise)
    assert shuffled.dtype == torch.bool and shuffled.shape == taken.shape
    for got, was in zip(shuffled.tolist(), taken.tolist(), strict=True):
        assert sorted(runs(got)) == sorted(runs(was))
    alone = torch.cat([shuffle_runs(taken[i], noise[i])[None] for i in range(4)])
    assert torch.equal(shuffled, alone)


@pytest.mark.parametrize(
    "row", [[1, 1, 0, 1, 0, 0, 0], [1, 0, 1, 0, 0, 1], [0, 0, 0, 1], [1, 1, 0, 0, 1, 1]], ids=lambda row: str(row)
)
def test_shuffle_runs_finds_every_arrangement_equally_often(row):
    """Every row with the same run lengths turns up, no other does, and none is favoured."""
    possible = [bits for bits in itertools.product([0, 1], repeat=len(row)) if sorted(runs(bits)) == sorted(runs(row))]
    draws = 400 * len(possible)
    taken = torch.tensor(row, dtype=torch.bool).expand(draws, -1)
    noise = torch.rand(draws, len(row) + 1, generator=torch.Generator().manual_seed(0))
    seen = Counter(tuple(int(bit) for bit in got) for got in shuffle_runs(taken, noise).tolist())
    assert set(seen) == set(possible)
    assert all(abs(count - 400) < 6 * math.sqrt(400) for count in seen.values())


# --------------------------------------------------------------------------------------------------------------- scores
def make_window(batch=2, heads=2, group=2, width=24, dim=8, **changes):
    generator = torch.Generator().manual_seed(5)
    window = Window(
        rows=heads,
        keys=torch.randn(batch, heads, width, dim, generator=generator),
        queries=2 * torch.randn(batch, heads * group, width, dim, generator=generator),
        later=2 * torch.randn(batch, heads * group, 5, dim, generator=generator),
        scaling=0.3,
        softcap=None,
        layer=3,
        sequences=list(range(batch)),
        starts=[width * ordinal for ordinal in range(4, 4 + batch)],
        ordinals=list(range(4, 4 + batch)),
        keep=9,
        anchors=4,
        seed=11,
        values=torch.randn(batch, changes.get("rows", heads), width, dim + 2, generator=generator),
    )
    return replace(window, **changes)


def rank(name, window):
    return SCORES[name].rank(window)


def test_a_watcher_is_told_what_windows_are_judged_by():
    policy, told = KaraPolicy(KaraConfig(window=32, score="causal")), []
    window = make_window()
    unwatched = policy.select(window)
    policy.watch = lambda *seen: told.append(seen)
    assert torch.equal(policy.select(window), unwatched)
    ((given, scores),) = told
    assert given is window and torch.equal(scores, rank("causal", window))


def attention_as_written(window, causal):
    """s[j]: mean over query heads of a row and queries i of softmax_j(q_i . k_j * scaling), in float64."""
    batch, query_heads, count, _ = window.queries.shape
    width = window.keys.shape[2]
    places = [max(j for j in range(width) if j * count // width == i) for i in range(count)]
    keys = window.keys.repeat_interleave(query_heads // window.keys.shape[1], dim=1).double()
    scores = torch.zeros(batch, window.rows, width, dtype=torch.float64)
    for b, hq, i in itertools.product(range(batch), range(query_heads), range(count)):
        group = query_heads // window.keys.shape[1]
        visible = places[i] - hq % group * width // (count * group) + 1 if causal else width
        logits = keys[b, hq, :visible] @ window.queries[b, hq, i].double() * window.scaling
        if window.softcap is not None:
            logits = window.softcap * torch.tanh(logits / window.softcap)
        group = query_heads // window.rows
        scores[b, hq // group, :visible] += logits.softmax(0) / (group * count)
    return scores


@pytest.mark.parametrize("softcap", [None, 0.7], ids=["plain", "softcap"])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("name", ["bidirectional", "causal"])
def test_attention_scores(name, group, softcap):
    window = make_window(group=group, softcap=softcap)
    got = rank(name, window)
    assert got.dtype == torch.float32
    expected = attention_as_written(window, causal=name == "causal")
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["bidirectional", "causal"])
def test_attention_scores_of_a_sample(name):
    window = make_window()
    window = replace(window, queries=window.queries[:, :, [4, 10, 15, 23]])
    expected = attention_as_written(window, causal=name == "causal")
    torch.testing.assert_close(rank(name, window).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["bidirectional", "causal"])
def test_attention_scores_of_a_shared_latent_row(name):
    """Keys of every query head, one row in the store: the score is the mean over all heads."""
    window = make_window(heads=4, group=1, rows=1)
    got = rank(name, window)
    assert got.shape == (2, 1, 24)
    expected = attention_as_written(replace(window, rows=4), causal=name == "causal").mean(1, keepdim=True)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def test_scores_of_keys_as_written():
    window = make_window(heads=4, group=1, rows=2)
    cosine = torch.nn.functional.cosine_similarity
    for b, h in itertools.product(range(2), range(4)):
        keys = window.keys[b, h].double()
        mean = sum(keys) / 24
        for j in range(24):
            of_row = slice(h // 2 * 2, h // 2 * 2 + 2)
            other = [window.keys[b, i].double() for i in range(4)[of_row]]
            difference = [1 - cosine(part[j], part.mean(0), dim=0) for part in other]
            assert torch.allclose(mean, keys.mean(0))
            assert rank("key-difference", window)[b, h // 2, j].item() == pytest.approx(
                float(sum(difference) / 2), abs=1e-5
            )
    both = (24 * window.attention() + 5 * replace(window, queries=window.later).attention()) / 29
    ranked = both, rank("key-difference", window)
    places = [scores.argsort(-1).argsort(-1) for scores in ranked]
    assert torch.equal(rank("blend", window), sum(places).float())


@pytest.mark.parametrize("name", BUILT_IN)
def test_scores_of_a_batch_are_those_of_each_sequence(name):
    """Rows in the store, whoever else is in the batch; also one row for all heads."""
    for window in (make_window(), make_window(heads=4, group=1, rows=1)):
        together = rank(name, window)
        assert together.shape == (2, window.rows, 24)
        for b in range(2):
            alone = replace(
                window,
                keys=window.keys[b : b + 1],
                queries=window.queries[b : b + 1] if SCORES[name].queries else None,
                later=window.later[b : b + 1] if SCORES[name].queries else None,
                ordinals=window.ordinals[b : b + 1],
                values=window.values[b : b + 1] if SCORES[name].values else None,
            )
            torch.testing.assert_close(together[b : b + 1], rank(name, alone), rtol=1e-5, atol=1e-7)


def test_recency_keeps_the_last_tokens():
    policy = KaraPolicy(KaraConfig(score="recency", window=16))
    kept = policy.select(make_window(queries=None))
    assert kept.shape == (2, 2, 9)
    assert (kept == torch.arange(15, 24)).all()


def test_random_depends_on_seed_layer_and_ordinal_alone():
    window = make_window(queries=None)
    scores = rank("random", window)
    assert torch.equal(scores, rank("random", replace(window, keys=window.keys + 1, keep=3, scaling=9.0)))
    assert torch.equal(scores.flip(0), rank("random", replace(window, ordinals=window.ordinals[::-1])))
    for change in ({"seed": 12}, {"layer": 4}, {"ordinals": [9, 10]}):
        other = rank("random", replace(window, **change))
        assert not torch.isclose(scores, other).any(-1).all()
        assert (scores != other).float().mean() > 0.99
    assert not torch.equal(scores[0, 0], scores[0, 1]), "heads draw numbers of their own"
    assert not torch.equal(scores[0], scores[1])


@pytest.mark.parametrize("anchors", [1, 4, 9])
def test_random_chunks_are_as_long_as_those_of_the_bidirectional_score(anchors):
    policy, control = (KaraPolicy(KaraConfig(score=name)) for name in ("bidirectional", "random-chunks"))
    window = make_window(batch=3, width=40, anchors=anchors)
    kept, moved = policy.select(window), control.select(window)
    assert moved.shape == kept.shape == (3, 2, 9)
    for b, h in itertools.product(range(3), range(2)):
        lengths = [runs([slot in set(row[b, h].tolist()) for slot in range(40)]) for row in (kept, moved)]
        assert sorted(lengths[0]) == sorted(lengths[1])
    assert not torch.equal(kept, moved)
    assert not torch.equal(moved, control.select(replace(window, seed=12)))


def test_a_new_score_is_one_function():
    @register_score("largest-key")
    def largest_key(window):
        return window.keys.norm(dim=-1)

    try:
        policy = KaraPolicy(KaraConfig(score="largest-key"))
        window = make_window(queries=None)
        assert torch.equal(policy.select(window), top_tokens(window.keys.norm(dim=-1), 9))
        assert not policy.needs_queries
        with pytest.raises(ValueError, match="'largest-key' is registered already; choose another name"):
            register_score("largest-key")(largest_key)
        assert SCORES["largest-key"].rank is largest_key
    finally:
        del SCORES["largest-key"]
    with pytest.raises(ValueError, match="largest-key"):
        KaraPolicy(KaraConfig(score="largest-key"))


# --------------------------------------------------------------------------------------------------------------- policy
def test_the_policy_selects_by_token2chunk_or_top_k_as_the_score_says():
    window = make_window()
    scores = rank("bidirectional", window)
    chunked = KaraPolicy(KaraConfig(score="bidirectional")).select(window)
    assert torch.equal(chunked, token2chunk(scores, 9, 4))
    assert not torch.equal(chunked, top_tokens(scores, 9))
    assert torch.equal(KaraPolicy(KaraConfig(score="random")).select(window), top_tokens(rank("random", window), 9))


@pytest.mark.parametrize("name", ["bidirectional", "blend", "causal", "random-chunks"])
def test_nan_is_refused(name):
    window = make_window()
    window.queries[1, 2, 7] = float("nan")
    with pytest.raises(ValueError, match=rf"the {name} scores of layer 3 are NaN.*bfloat16 or float32"):
        KaraPolicy(KaraConfig(score=name)).select(window)


@dataclass
class Counted:
    """What the policy asks of a sequence."""

    tokens: int
    open: int
    kept: int = 0
    pins: tuple[tuple[int, int], ...] = ()


@pytest.mark.parametrize(("window", "recent"), [(16, 0), (16, 5), (32, 32), (16, 40)], ids=lambda number: str(number))
def test_windows_due(window, recent):
    """One from W + R open tokens on, a second from 2 W + R on; never one that would reach into the recent tokens."""
    policy = KaraPolicy(KaraConfig(window=window, recent=recent))
    for open_tokens in range(4 * window + recent):
        starts, left = [], open_tokens
        while left >= window + recent:
            starts, left = [*starts, 100 + open_tokens - left], left - window
        sequence = Counted(100 + open_tokens, open_tokens, 70)
        assert [seal.start for seal in policy.due(sequence)] == starts, f"{open_tokens} open tokens"
        assert left <= policy.open_limit(sequence)
        limit = policy.open_limit(sequence)
        assert (
            not policy.due(Counted(100 + limit, limit, 70))
            and len(policy.due(Counted(101 + limit, limit + 1, 70))) == 1
        )


@given(
    share=st.floats(0.01, 0.95),
    retention=st.floats(0.05, 0.9),
    sinks=st.sampled_from([0, 4, 20]),
    prompt=st.integers(0, 100),
    steps=st.lists(st.sampled_from([1, 1, 1, 5, 40]), max_size=150),
)
def test_a_share_of_what_is_held_is_recent(share, retention, sinks, prompt, steps):
    """Exactly then a window seals when what is open behind it is its share of all that is held afterwards."""
    policy = KaraPolicy(KaraConfig(window=16, retention=retention, recent=share, sinks=sinks, min_cache_tokens=0))
    sequence = Counted(prompt, 0)
    for new in steps:
        sequence = Counted(sequence.tokens + new, sequence.open + new, sequence.kept)
        due = policy.due(sequence)
        assert bool(due) == (sequence.open > policy.open_limit(sequence))
        for seal in due:
            assert sequence.open - 16 >= seal.recent >= share * (sequence.kept + seal.keep + seal.recent) - 1e-6
            assert seal.recent - 1 < share * (sequence.kept + seal.keep + seal.recent - 1) + 1e-6
            assert policy.certain(sequence) == seal.recent
            sequence = Counted(sequence.tokens, sequence.open - 16, sequence.kept + seal.keep)
        held = sequence.kept + sequence.open
        if due:
            assert sequence.open >= share * held - 1e-6
            assert share * held - 1e-6 <= policy.newest(sequence) <= sequence.open


@given(share=st.floats(0.05, 0.9), retention=st.floats(0.05, 0.95))
def test_where_recent_tokens_are_a_share_retention_is_of_all_tokens(share, retention):
    policy = KaraPolicy(KaraConfig(window=128, retention=retention, recent=share, sinks=0))
    sequence = Counted(0, 0)
    for tokens in range(16, 12_801, 16):
        sequence = Counted(tokens, sequence.open + 16, sequence.kept)
        for seal in policy.due(sequence):
            sequence = Counted(tokens, sequence.open - 128, sequence.kept + seal.keep)
    held = sequence.kept + sequence.open
    rounding = 0.5 / 128 / (1 - share)  # of a window's tokens, of which recent ones are a share again
    assert abs(held / sequence.tokens - retention) <= rounding + 130 / sequence.tokens


@given(
    recent=st.one_of(st.integers(0, 40), st.floats(0.05, 0.8)),
    retention=st.floats(0.3, 0.9),
    floor=st.integers(0, 200),
    sinks=st.sampled_from([0, 4]),
)
def test_what_a_window_leaves_is_never_below_the_floor(recent, retention, floor, sinks):
    """And a sequence that has outgrown it holds what it holds without one."""
    settings = {"window": 16, "retention": retention, "recent": recent, "sinks": sinks}
    policy, plain = (KaraPolicy(KaraConfig(min_cache_tokens=each, **settings)) for each in (floor, 0))
    sequence, other = Counted(0, 0), Counted(0, 0)
    for tokens in range(1, 1601):
        sequence = Counted(tokens, sequence.open + 1, sequence.kept)
        assert sequence.open <= policy.open_limit(sequence) + 1
        for seal in policy.due(sequence):
            assert policy.certain(sequence) == seal.recent
            sequence = Counted(tokens, sequence.open - 16, sequence.kept + seal.keep)
            assert sequence.kept + sequence.open >= floor
        assert policy.newest(sequence) >= min(sequence.open, floor - sequence.kept)
        other = Counted(tokens, other.open + 1, other.kept)
        for seal in plain.due(other):
            other = Counted(tokens, other.open - 16, other.kept + seal.keep)
    assert sequence == other and sequence.kept + sequence.open > floor


def test_the_floor_is_a_window_where_recent_tokens_are_a_share():
    assert KaraConfig().least_held == KaraConfig().window == 128 and KaraConfig(window=64).least_held == 64
    assert KaraConfig(recent=32).least_held == 0, "as published"
    assert KaraConfig(recent=32, min_cache_tokens=48).least_held == 48
    assert KaraConfig(min_cache_tokens=0).least_held == 0
    begin = Counted(tokens=200, open=200)
    assert KaraPolicy(KaraConfig(min_cache_tokens=0)).due(begin) and not KaraPolicy(KaraConfig()).due(begin)


def test_the_first_window_seals_when_pages_say_so():
    """README and docs/kara.md: by default at the 238th token behind the prompt."""
    policy, config = KaraPolicy(KaraConfig()), KaraConfig()
    first = next(tokens for tokens in range(1, 1000) if policy.due(Counted(tokens, tokens)))
    assert first == 238 == config.window + config.least_held - config.kept_per_window


def test_as_published_there_is_no_least_and_one_number_of_recent_tokens():
    kara, kv = KaraConfig(**KaraConfig.PUBLISHED), KVCompressConfig(retention=0.25, **KVCompressConfig.PUBLISHED)
    assert (kara.window, kara.recent, kara.score, kara.queries_held) == (256, 32, "bidirectional", 256)
    assert (kv.protected, kv.votes, kv.levels) == (32, "sum", None)
    assert kara.least_held == kv.least_held == 0
    for config in (kara, kv):
        fresh = type(config)(retention=0.25)
        assert all(getattr(fresh, name) != value for name, value in config.PUBLISHED.items()), "a default of ours"
        with pytest.raises(TypeError):
            config.PUBLISHED["sinks"] = 0


# ---------------------------------------------------------------------------------------------------------------- sinks
def test_a_window_keeps_its_sinks_among_its_tokens_or_alone():
    policy = KaraPolicy(KaraConfig(window=16, retention=0.25, sinks=6, block_size=1, recent=32))
    assert [policy.kept_of(start) for start in (0, 1, 2, 3, 5, 6, 16)] == [6, 5, 4, 4, 4, 4, 4]
    assert [seal.keep for seal in policy.due(Counted(100, 100))] == [6, 4, 4, 4]
    wide = KaraPolicy(KaraConfig(window=16, retention=0.25, sinks=40, block_size=1, recent=0))
    assert [seal.keep for seal in wide.due(Counted(80, 80))] == [16, 16, 8, 4, 4]


@pytest.mark.parametrize("name", BUILT_IN)
def test_sinks_stay_and_the_rest_is_chosen_as_if_they_were_not_there(name):
    """Sequence by sequence: in one batch are windows with 5, 2 and no sinks."""
    window = make_window(batch=3, starts=[0, 3, 24])
    policy = KaraPolicy(KaraConfig(score=name, sinks=5))
    scores, got = rank(name, window), policy.select(window)
    for b, count in enumerate((5, 2, 0)):
        for h in range(2):
            row = scores[b, h, count:]
            if SCORES[name].chunks:
                rest = token2chunk(row, 9 - count, 4 if not count else round(0.5 * (9 - count)))
            else:
                rest = top_tokens(row, 9 - count)
            assert got[b, h].tolist() == [*range(count), *(rest + count).tolist()]
    without = KaraPolicy(KaraConfig(score=name, sinks=0)).select(window)
    assert torch.equal(got[2], without[2])


def test_a_window_of_sinks_alone():
    window = make_window(starts=[0, 0], keep=9)
    kept = KaraPolicy(KaraConfig(sinks=9)).select(window)
    assert (kept == torch.arange(9)).all()


@pytest.mark.parametrize("name", BUILT_IN)
def test_queries_are_held_only_where_they_are_needed(name):
    needed = name in ("bidirectional", "blend", "causal", "random-chunks")
    assert KaraPolicy(KaraConfig(score=name)).needs_queries == needed
    keeps_all = KaraPolicy(KaraConfig(score=name, retention=1.0))
    assert not keeps_all.compresses and not keeps_all.needs_queries
    assert not KaraPolicy(KaraConfig(score=name, retention=0.999)).needs_queries or needed
