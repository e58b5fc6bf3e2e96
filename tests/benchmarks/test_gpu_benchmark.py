"""The aims of the GPU benchmark, its tables, and the numbers that become its rows."""

import pytest

from benchmarks.common.case import CASES
from benchmarks.common.table import markdown, table
from benchmarks.gpu import kernels, models
from benchmarks.gpu.aims import aims

ORIGIN = {"command": "python -m benchmarks run gpu", "device": "a GPU", "threads": 16, "date": "2026-01-02"}
ORIGIN |= {"versions": {"torch": "2.11"}}


def row(name, what, status="measured", **numbers):
    made = {"case": f"gpu.{name}", "what": what, "status": status, "dtype": "bfloat16"}
    return made | {"provenance": ORIGIN} | numbers


def decode_row(what, retention, tokens_per_s, **numbers):
    labels = {"model": "M", "length": 32768, "batch": 16, "retention": retention, "graph": False, "seen": 32775}
    times = {"step_ms": 10.0, "step_ms_p10": 9.5, "step_ms_p90": 11.25, "tokens_per_s": tokens_per_s}
    memory = {"nominal_bytes": 1000, "resident_bytes": 1030, "allocated_bytes": 1040, "peak_bytes": 3 * 2**30}
    return row("decode", what, **labels | times | memory | numbers)


def attend_row(**numbers):
    labels = {"batch": 32, "tokens": 32768, "rows": "even"}
    times = {"ms": 2.0, "ms_p10": 1.9, "ms_p90": 2.1, "gbps": 2000.0, "share_of_copy": 0.9}
    return row("attend", "attend", **labels | times | {"sdpa_ms": 2.5, "flash_ms": 2.4} | numbers)


def serve_row(what, steps):
    rates = {"running": 6.0, "preemptions": 3, "tokens_per_s": 150.0}
    return row("serve", what, model="M", batch=24, new=384, steps=steps, **rates)


ROWS = [
    row("checks", "sinks", "passed", op="attend", error=1e-3, plain_error=2e-3),
    row("checks", "causal", "failed", op="window_scores", error=0.5, plain_error=0.25),
    attend_row(),
    row("attend", "attend", "not reached", batch=64, tokens=131072, rows="even", reason="the time was over before"),
    decode_row("KaraCache 0.2", 0.2, 900.0, compression_share=0.015, window=256),
    decode_row("KaraCache 0.2, CUDA graph", 0.2, 1200.0, compression_share=0.005, window=256),
    decode_row("DynamicCache", None, 300.0),
    decode_row("PoDCache, groups of 4 layers", None, 800.0, followers=0.75, step_ms=9.0, batch=8) | {"case": "gpu.pod"},
    decode_row("PoDCache, nothing shared", None, 700.0, followers=0.0, batch=8) | {"case": "gpu.pod"},
    serve_row("engine alone", 2100),
    serve_row("Kara 0.25", 1000),
    row("limit", "DynamicCache", model="M", length=32768, limit_bytes=24 * 2**30, batch=5, used_bytes=20 * 2**30)
    | {"used_by_one_more_bytes": 25 * 2**30},
]


def shown(name):
    """The table of a case, without its title."""
    return table([each for each in ROWS if each["case"] == f"gpu.{name}"], CASES[f"gpu.{name}"].columns)


def test_tables():
    assert "`python -m benchmarks run gpu`: a GPU, 16 threads, torch 2.11, bfloat16, 2026-01-02." in markdown(
        "", ROWS[2:3], []
    )
    assert "| window_scores | causal | bfloat16 | 0.5 | 0.25 | failed:  |" in shown("checks")
    assert "| attend | 32 | 32,768 | even | 2.000 | 2,000 | 90% | 2.400 |" in shown("attend")
    assert "| attend | 64 | 131,072 | even | – | – | – | not reached: the time was over before |" in shown("attend")
    assert "| 32,775 | 16 | DynamicCache | 10.00 | 300 | – | 104.0% | 3.0 |" in shown("decode")
    assert "| 32,768 | DynamicCache | 24 | 5 | 20.0 | 25.0 |" in shown("limit")
    assert "| 32,775 | 8 | PoDCache, groups of 4 layers | 75% | 9.00 | 800 | 0.00 | 104.0% | 3.0 |" in shown("pod")
    assert "| Kara 0.25 | 24 | 384 | 1,000 | 6.0 | 3 | 150 |" in shown("serve")


def verdicts(rows):
    return [aim.verdict for aim in aims(rows)]


def test_aims_are_met_missed_or_not_measured():
    assert verdicts(ROWS) == ["met"] * 7
    assert verdicts([]) == ["not measured"] * 7
    bad = [
        attend_row(share_of_copy=0.84, ms=2.41),
        decode_row("KaraCache 0.2", 0.2, 899.0, compression_share=0.02, allocated_bytes=1051),
        decode_row("DynamicCache", None, 300.0),
        decode_row("PoDCache, groups of 4 layers", None, 800.0, followers=0.75, step_ms=10.1),
        decode_row("PoDCache, nothing shared", None, 800.0, followers=0.0),
        serve_row("engine alone", 1999),
        serve_row("Kara 0.25", 1000),
    ]
    assert verdicts(bad) == ["missed"] * 7


def test_an_aim_is_judged_by_the_worst_case_and_says_which():
    worse = decode_row("KaraCache 0.5", 0.5, 100.0, compression_share=0.03, resident_bytes=1100)
    details = [aim.detail for aim in aims([*ROWS, worse, attend_row(batch=1, flash_ms=1.0)])]
    assert details[1] == "2.00x the time, batch 1, 32,768 tokens (the worst of 2)"
    assert details[2] == "4.00x, M, KaraCache 0.2, CUDA graph"
    assert details[3] == "3.0%, M, KaraCache 0.5, batch 16 (the worst of 3)"
    assert details[4].startswith("10.0%, M, KaraCache 0.5")


def test_an_aim_without_a_number_says_why():
    skipped = decode_row("DynamicCache", None, 0.0) | {"status": "skipped", "reason": "does not fit in 80 GiB"}
    assert aims([ROWS[4], skipped])[2][1:3] == ("not measured", "M, DynamicCache: does not fit in 80 GiB")


def test_short_shapes_are_no_aim():
    """Those of a smoke run, for one."""
    assert verdicts([attend_row(tokens=64, ms=9.0)]) == ["not measured"] * 7


def test_times_of_steps_become_the_numbers_of_a_row():
    steps = [0.1] * 8 + [0.01] * 16 + [0.05, 0.02, 0.01, 0.01] + [0.01] * 21
    numbers = models.step_numbers(steps, batch=4, window=256, lead=24, compresses=True, whole=False)
    assert numbers["step_ms"] == pytest.approx(10) and numbers["compression_ms"] == pytest.approx(50)
    assert numbers["compression_share"] == pytest.approx(0.05 / 2.61)
    assert numbers["tokens_per_s"] == pytest.approx(4 * 256 / 2.61)
    whole = steps + [0.01] * (256 - 24) + [0.03] + [0.01] * 23
    numbers = models.step_numbers(whole, batch=4, window=256, lead=24, compresses=True, whole=True)
    assert numbers["compression_ms"] == pytest.approx(20)
    assert numbers["tokens_per_s"] == pytest.approx(4 * 256 / sum(whole[25 : 25 + 256]))
    numbers = models.step_numbers(steps, batch=4, window=256, lead=24, compresses=False, whole=False)
    assert numbers["tokens_per_s"] == pytest.approx(4 * 41 / sum(steps[8:])) and "compression_ms" not in numbers


def test_uneven_rows_hold_as_much_as_even_ones():
    even, uneven = (kernels.row_lengths(3, 4096, flag) for flag in (False, True))
    assert even.sum() == uneven.sum() and even.shape == uneven.shape == (3, 8)
    assert uneven.min() >= 1024 and uneven.max() <= 7168 and len(set(uneven.flatten().tolist())) > 20
