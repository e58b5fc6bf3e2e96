"""What is held while a prompt is read: that it is measured, and what the aim says of it."""

import pytest
from test_benchmarks import invoke

from benchmarks.common.case import CASES
from benchmarks.common.race import FULL
from benchmarks.common.rows import load_rows
from benchmarks.speed.prompt import CHUNKS, KV, MostResident, measured, memory_aims


def test_chunks_hold_less():
    names = f"{FULL}, {CHUNKS}", f"{KV}, at once", f"{KV}, {CHUNKS}"
    full, whole, chunks = (measured(name, "", True, 400, 64, 32) for name in names)
    assert full["of_full"] == pytest.approx(1) and chunks["rss_mb"] >= 0
    assert chunks["of_full"] < whole["of_full"] < 0.8  # one of three layers, and the budget of all


@pytest.mark.slow
def test_every_way_runs_in_a_process_of_its_own(tmp_path):
    done = invoke("run", "prompt", "--smoke", "--out", tmp_path / "rows.json")
    assert done.exit_code == 0, done.output[-4000:]
    assert len(load_rows(tmp_path / "rows.json")) == 4


def test_memory_that_a_process_takes_is_seen():
    with MostResident() as resident:
        held = bytearray(b"x" * 50_000_000)
    assert resident.grown > 40_000_000 and len(held)


def test_the_aim():
    row = {"case": "prompt.memory", "method": f"{KV}, {CHUNKS}", "beside_chunk": 1.2}
    assert memory_aims([row])[0].verdict == "missed" and memory_aims([row | {"beside_chunk": 1.1}])[0].verdict == "met"
    assert CASES["prompt.memory"].aims([])[0].verdict == "not measured"
