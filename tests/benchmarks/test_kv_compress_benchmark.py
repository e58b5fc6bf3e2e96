"""The races of KVCompressCache: turns, the numbers made of them, the largest batch, and the aims."""

from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import __main__ as command
from benchmarks.common.case import CASES, Job
from benchmarks.common.race import Entry, Trace, race, timing, twin
from benchmarks.common.table import table
from benchmarks.speed.kv_compress import Watch, byte_aims, largest, speed_aims, whole_aims

ORIGIN = {"command": "python -m benchmarks run kv_compress", "device": "a CPU", "threads": 1, "date": "2026-01-02"}
ORIGIN |= {"versions": {"torch": "2.11"}}


def row(case, label, method, **numbers):
    made = {"case": case, "label": label, "method": method, "dtype": "float32", "status": "measured"}
    return made | {"provenance": ORIGIN} | numbers


def speed_row(label, method, speedup, case="kv_compress.speed", **numbers):
    times = {"tokens_per_s": 150.4, "speedup": speedup, "speedup_low": 1.2, "speedup_high": 1.4, "step_ms": 6.5}
    times |= {"first_step_ms": 25.0, "worst_step_ms": 12.0, "step_time_ratio": 0.77}
    held = {"prompt_bytes": 8_400_000, "last_bytes": 3_000_000, "most_bytes": 2_600_000}
    return row(case, label, method, **times | held | numbers)


def byte_row(rate, within):
    numbers = {"rate": rate, "true_rate": 7.9, "max_cache_tokens": 1072, "floor_tokens": 64, "floor_binds": False}
    numbers |= {"rows_at_floor": 0, "rows": 8, "kept_min": 432, "kept_mean": 1071.6, "kept_max": 2432, "excess": 0.031}
    numbers |= {"nominal_bytes": 4_391_000, "mean_bytes": 4_500_000, "most_bytes": 4_520_000, "excess_blocks": 1.97}
    numbers |= {"decode_peak_bytes": 5_000_000, "peak_bytes": 34_000_000, "within_aim": within}
    return row("kv_compress.bytes", "8192 + 385", f"KVCompressCache, {rate} times", **numbers)


def test_a_race_gives_every_cache_the_same_tokens_in_turns():
    taken = []

    def entry(name):
        ids = torch.arange(6)[None]
        held = iter(range(10, 20))
        return Entry(
            name,
            ids,
            lambda prompt: taken.append((name, prompt[0].tolist())),
            lambda token, position: taken.append((name, int(token), position)),
            lambda: next(held),
        )

    traces = race([entry("a"), entry("b")], 3, "")
    assert taken[:2] == [("a", [0, 1, 2]), ("b", [0, 1, 2])]
    assert [sorted(taken[i : i + 2]) for i in (2, 4, 6)] == [[("a", n, n), ("b", n, n)] for n in (3, 4, 5)]
    assert [(t.batch, t.prompt_bytes, t.held, len(t.steps)) for t in traces] == [(1, 10, [11, 12, 13], 3)] * 2


def test_times_of_several_runs_become_the_numbers_of_a_row():
    def trace(*steps, batch=1):
        return Trace(batch, prefill=0.5, prompt_bytes=100, steps=list(steps), held=[7, 9, 8])

    base = [trace(0.02, 0.02, 0.02)] * 3
    mine = [trace(0.03, 0.01, 0.01), trace(0.03, 0.5, 0.01), trace(0.03, 0.01, 0.02)]
    numbers = timing(mine, base)
    assert numbers["tokens_per_s"] == pytest.approx(3 / 0.05) and numbers["speedup"] == pytest.approx(1.2)
    assert numbers["speedup_low"] == pytest.approx(0.06 / 0.54) and numbers["speedup_high"] == pytest.approx(1.2)
    assert numbers["first_step_ms"] == pytest.approx(30) and numbers["worst_step_ms"] == pytest.approx(10)
    assert numbers["step_time_ratio"] == pytest.approx(0.5) and numbers["prefill_ms"] == pytest.approx(500)
    assert (numbers["prompt_bytes"], numbers["mean_bytes"], numbers["most_bytes"]) == (100, 8, 9)
    batched = timing([trace(0.02, 0.02, 0.02, batch=4)], base[:1])
    assert batched["speedup"] == pytest.approx(4) and batched["tokens_per_s"] == pytest.approx(200)


@pytest.mark.parametrize("limit", [10, 11, 99, 1000])
def test_the_largest_batch_is_the_last_that_fits(limit):
    asked = []

    def held(batch):
        asked.append(batch)
        return 9 * batch + 1

    assert largest(held, limit) == (limit - 1) // 9
    assert len(asked) == len(set(asked))


def test_a_limit_below_one_sequence_is_refused():
    with pytest.raises(ValueError, match="one sequence takes 10 bytes, more than the limit of 9"):
        largest(lambda batch: 10 * batch, 9)


def test_the_kept_share_of_the_metric_counts_stored_tokens_alone():
    metric = torch.tensor([[[1.0, 2.0, 3.0, 100.0], [4.0, 5.0, 100.0, 100.0]]])
    dropped = torch.tensor([[[True, False, False, False], [True, False, False, False]]])
    decided = SimpleNamespace(dropped=dropped)
    watch = Watch(lambda *arguments: decided)
    assert watch(metric, None, torch.tensor([[3, 2]]), None, None) is decided
    assert watch.shares() == [pytest.approx(10 / 15)]


def test_a_twin_shares_weights_and_nothing_else():
    model = torch.nn.Linear(2, 2)
    other = twin(model)
    other.register_forward_hook(lambda *arguments: None)
    assert other.weight is model.weight and other is not model and not model._forward_hooks


# ------------------------------------------------------------------------------------------------------------- the aims
def found(rows):
    return [*byte_aims(rows), *whole_aims(rows), *speed_aims(rows)]


def test_aims_are_met_or_missed_by_rows_that_are_there():
    whole = {"case": "kv_compress.whole", "step_time_ratio": 1.15}
    rows = [
        byte_row(8, True),
        byte_row(2, False),
        speed_row("2048 + 512", "KVCompressCache, 512 tokens", 1.26)
        | whole
        | {"method": "KVCompressCache, nothing evicted"},
        speed_row("2048 + 512", "KVCompressCache, 512 tokens", 1.26),
    ]
    assert [aim.verdict for aim in found(rows)] == ["met", "missed", "met", "met", "met"]
    assert found([]) == []
    theirs = speed_row("2048 + 512", "SnapKV 0.8, then Decoding(Knorm, 128/512)", 1.3, "kvpress.speed")
    assert speed_aims([*rows, theirs])[-1][:2] == (
        "2048 + 512, 512 tokens: 1.30x, as SnapKV 0.8, then Decoding(Knorm, 128/512) here",
        "missed",
    )


def test_tables():
    text = table([byte_row(8, True)], CASES["kv_compress.bytes"].columns)
    assert "| 8x | 7.90x | 4.391 | 4.520 | yes |" in text
    text = table([speed_row("2048 + 512", "SnapKV 0.8", 1.27, "kvpress.speed")], CASES["kvpress.speed"].columns)
    assert "| 2048 + 512 | SnapKV 0.8 | 150 | 1.27x | 3.00 |" in text


@pytest.mark.parametrize(("within", "code"), [(True, 0), (False, 1)])
def test_missing_the_byte_aim_at_8_times_fails_the_run(within, code, tmp_path, monkeypatch):
    case = CASES["kv_compress.bytes"]
    jobs = [Job({"label": "x", "rate": 8}, lambda: byte_row(8, within))]
    monkeypatch.setitem(CASES, case.name, SimpleNamespace(**vars(case) | {"jobs": lambda run, **_: jobs, "group": ""}))
    path = tmp_path / "rows.json"
    done = CliRunner().invoke(command.app, ["run", "kv_compress.bytes", "--out", str(path)])
    assert done.exit_code == code, done.output
