"""The GPU benchmark: all of it runs on a CPU with tiny shapes, and its rows, tables and verdicts are what they say."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
ORIGIN = {"command": "python benchmarks/gpu.py", "device": "a GPU", "versions": {"torch": "2.11"}, "date": "2026-01-02"}


def results():
    return {path: path.read_bytes() for path in (BENCHMARKS / "results").iterdir() if path.is_file()}


def start(*arguments):
    command = [sys.executable, "benchmarks/gpu.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture
def modules(monkeypatch):
    """The modules of the benchmark, which import each other from their own folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu
    import gpu_report
    import gpu_run

    return gpu, gpu_report, gpu_run


@pytest.fixture
def run(modules):
    return modules[2].Run(torch.device("cpu"), True, 9.0, "reference", Console(quiet=True))


def row(section, what, status="measured", **numbers):
    made = {"section": section, "what": what, "status": status, "dtype": "bfloat16", "device": "cuda"}
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
    decode_row("PoDCache, groups of 4 layers", None, 800.0, followers=0.75, step_ms=9.0, batch=8) | {"section": "pod"},
    decode_row("PoDCache, nothing shared", None, 700.0, followers=0.0, batch=8) | {"section": "pod"},
    serve_row("engine alone", 2100),
    serve_row("Kara 0.25", 1000),
    row("limit", "DynamicCache", model="M", length=32768, limit_bytes=24 * 2**30, batch=5, used_bytes=20 * 2**30)
    | {"used_by_one_more_bytes": 25 * 2**30},
]


# ---------------------------------------------------------------------------------------------------------- running it
def test_a_smoke_run_goes_through_every_section(tmp_path):
    before = results()
    done = start("--smoke", "--out", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert list(dict.fromkeys(row["section"] for row in rows)) == [
        "checks",
        "attend",
        "windows",
        "decode",
        "limit",
        "pod",
        "serve",
        "more",
    ]
    for each in rows:
        assert {"command", "device", "versions", "date"} <= each["provenance"].keys() and each["dtype"]
        assert each["status"] in ("passed", "measured", "skipped"), each
        assert each["status"] != "skipped" or "not available" in each["reason"]
    measured = {each["what"] for each in rows if each["status"] == "measured"}
    assert {"attend", "compact", "KaraCache 0.2", "DynamicCache", "StaticCache, compiled"} <= measured
    assert {"attend_shared, follows", "attend_shared, leads"} <= measured
    pod = {each["what"]: each for each in rows if each["section"] == "pod"}
    alone, halved = pod["PoDCache, nothing shared"], pod["PoDCache, groups of 2 layers"]
    assert (alone["followers"], halved["followers"]) == (0.0, 0.5)
    assert halved["seen"] == alone["seen"] and halved["nominal_bytes"] < alone["nominal_bytes"]
    ops = {each["op"] for each in rows if each["status"] == "passed"}
    assert ops == {"append", "attend", "attend_shared", "merge", "window_scores", "compact", "decode", "pod"}
    assert results() == before


def test_no_number_of_a_smoke_run_gets_into_the_results():
    done = start("--smoke", "--out", "benchmarks/results/some-gpu.json")
    assert done.returncode == 2 and "smoke run measures nothing" in done.stderr
    assert not (BENCHMARKS / "results" / "some-gpu.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = start()
    assert done.returncode == 2 and "torch sees no GPU" in done.stdout and "--smoke" in done.stdout


def test_sections_are_checked_and_the_checks_always_run(modules):
    assert modules[0].chosen_sections("limit, attend") == ["checks", "attend", "limit"]
    done = start("--sections", "attend,speed")
    assert done.returncode == 2 and "speed is no section" in done.stderr


# --------------------------------------------------------------------------------------------------- what becomes a row
def test_a_failed_check_takes_the_speed_of_its_op_away(modules, run):
    Case = modules[2].Case
    checks = [("attend", lambda: {"passed": False, "error": 1.0}), ("compact", lambda: {"passed": True})]
    run.take("checks", [Case({"op": op, "what": ""}, check) for op, check in checks], 1.0)
    for op in ("attend", "compact"):
        run.take("windows", [Case({"what": op}, lambda: {"ms": 1.0}, needs=(op,))], 1.0)
    assert [(each["section"], each["status"]) for each in run.rows] == [
        ("checks", "failed"),
        ("checks", "passed"),
        ("windows", "measured"),
    ]


def test_what_goes_wrong_is_a_row_with_the_reason(modules, run):
    Case, Skip = modules[2].Case, modules[2].Skip

    def fail(error):
        raise error

    cases = [
        Case({"what": "skip"}, lambda: fail(Skip("no such thing"))),
        Case({"what": "error"}, lambda: fail(ValueError("odd"))),
        Case({"what": "slow"}, lambda: time.sleep(30), seconds=0.05),
    ]
    run.take("decode", cases, 1.0)
    run.take("more", [Case({"what": "late"}, dict)], 0.0)
    assert [(each["status"], each["reason"]) for each in run.rows] == [
        ("skipped", "no such thing"),
        ("failed", "ValueError: odd"),
        ("not reached", "stopped after 0 s"),
        ("not reached", "the time was over before"),
    ]


def test_saving_replaces_the_sections_of_this_run_alone(modules, run, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row("attend", "old"), row("limit", "old")]))
    run.rows = [row("attend", "new")]
    modules[0].save(path, run, ["checks", "attend"])
    assert [(each["section"], each["what"]) for each in json.loads(path.read_text())] == [
        ("limit", "old"),
        ("attend", "new"),
    ]


# ------------------------------------------------------------------------------------------------------ what is printed
def test_markdown(modules):
    text = modules[1].markdown(ROWS)
    assert "Checks: 1 of 2 passed.\n- window_scores, causal, bfloat16: failed, error 0.5, plain torch 0.25" in text
    assert "`python benchmarks/gpu.py`: a GPU, torch 2.11, bfloat16, 2026-01-02." in text
    assert "| attend | 32 | 32,768 | even | 2.000 | 1.900 to 2.100 | 2,000 | 90% | 2.500 | 2.400 |" in text
    assert "| attend | 64 | 131,072 | even | – | – | – | – | – | not reached: the time was over before |" in text
    assert "| 32,775 | 16 | DynamicCache | 10.00 | 9.50 to 11.25 | 300 | – | 103.0% | 104.0% | 3.0 |" in text
    assert "| M | 32,768 | DynamicCache | 24 | 5 | 20.0 | 25.0 |" in text
    assert "| 32,775 | 8 | PoDCache, groups of 4 layers | 75% | 9.00 | 9.50 to 11.25 | 800 | 0.00 | 103.0% |" in text
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert all(len({line.count("|") for line in table.splitlines()}) == 1 for table in tables) and len(tables) == 6
    assert "| Kara 0.25 | 24 | 384 | 1,000 | 6.0 | 3 | 150 |" in text


def verdicts(report, rows):
    return [verdict for _, verdict, _ in report.aims(rows)]


def test_aims_are_met_missed_or_not_measured(modules):
    report = modules[1]
    assert verdicts(report, ROWS) == ["met"] * 7
    assert verdicts(report, []) == ["not measured"] * 7
    bad = [
        attend_row(share_of_copy=0.84, ms=2.41),
        decode_row("KaraCache 0.2", 0.2, 899.0, compression_share=0.02, allocated_bytes=1051),
        decode_row("DynamicCache", None, 300.0),
        decode_row("PoDCache, groups of 4 layers", None, 800.0, followers=0.75, step_ms=10.1),
        decode_row("PoDCache, nothing shared", None, 800.0, followers=0.0),
        serve_row("engine alone", 1999),
        serve_row("Kara 0.25", 1000),
    ]
    assert verdicts(report, bad) == ["missed"] * 7


def test_an_aim_is_judged_by_the_worst_case_and_says_which(modules):
    report = modules[1]
    worse = decode_row("KaraCache 0.5", 0.5, 100.0, compression_share=0.03, resident_bytes=1100)
    details = [detail for _, _, detail in report.aims([*ROWS, worse, attend_row(batch=1, flash_ms=1.0)])]
    assert details[1] == "2.00x the time, batch 1, 32,768 tokens (the worst of 2)"
    assert details[2] == "4.00x, M, KaraCache 0.2, CUDA graph"
    assert details[3] == "3.0%, M, KaraCache 0.5, batch 16 (the worst of 3)"
    assert details[4].startswith("10.0%, M, KaraCache 0.5")


def test_an_aim_without_a_number_says_why(modules):
    skipped = decode_row("DynamicCache", None, 0.0) | {"status": "skipped", "reason": "does not fit in 80 GiB"}
    _, verdict, detail = modules[1].aims([ROWS[4], skipped])[2]
    assert (verdict, detail) == ("not measured", "M, DynamicCache: does not fit in 80 GiB")


def test_short_shapes_are_no_aim(modules):
    """Those of a smoke run, for one."""
    assert verdicts(modules[1], [attend_row(tokens=64, ms=9.0)]) == ["not measured"] * 7


def test_times_of_steps_become_the_numbers_of_a_row(modules):
    import gpu_models

    steps = [0.1] * 8 + [0.01] * 16 + [0.05, 0.02, 0.01, 0.01] + [0.01] * 21
    numbers = gpu_models.step_numbers(steps, batch=4, window=256, lead=24, compresses=True, whole=False)
    assert numbers["step_ms"] == pytest.approx(10) and numbers["compression_ms"] == pytest.approx(50)
    assert numbers["compression_share"] == pytest.approx(0.05 / 2.61)
    assert numbers["tokens_per_s"] == pytest.approx(4 * 256 / 2.61)
    whole = steps + [0.01] * (256 - 24) + [0.03] + [0.01] * 23
    numbers = gpu_models.step_numbers(whole, batch=4, window=256, lead=24, compresses=True, whole=True)
    assert numbers["compression_ms"] == pytest.approx(20)
    assert numbers["tokens_per_s"] == pytest.approx(4 * 256 / sum(whole[25 : 25 + 256]))
    numbers = gpu_models.step_numbers(steps, batch=4, window=256, lead=24, compresses=False, whole=False)
    assert numbers["tokens_per_s"] == pytest.approx(4 * 41 / sum(steps[8:])) and "compression_ms" not in numbers


def test_uneven_rows_hold_as_much_as_even_ones(modules):
    import gpu_kernels

    even, uneven = (gpu_kernels.row_lengths(3, 4096, flag) for flag in (False, True))
    assert even.sum() == uneven.sum() and even.shape == uneven.shape == (3, 8)
    assert uneven.min() >= 1024 and uneven.max() <= 7168 and len(set(uneven.flatten().tolist())) > 20
