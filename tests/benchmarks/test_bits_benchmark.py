"""The race of caches in few bits: that it runs, and what its aims say of rows."""

import pytest
from support.marks import slow
from test_benchmarks import invoke

from benchmarks.common.case import CASES
from benchmarks.common.rows import load_rows
from benchmarks.speed import bits
from benchmarks.speed.bits import BITS, WHOLE, speed_aims


def row(method, step_ms, speedup, batch=1):
    made = {"case": "bits.speed", "label": "4096 + 64", "batch_size": batch, "dtype": "float32", "method": method}
    return made | {"step_ms": step_ms, "speedup": speedup}


@pytest.mark.parametrize("packages", [{}, slow(bits.PACKAGES)], ids=["ours", "all"])
def test_every_cache_takes_the_same_steps(tmp_path, packages, monkeypatch):
    """Those of other packages compile code of their own the first time, which takes a minute."""
    monkeypatch.setattr(bits, "PACKAGES", packages)
    done = invoke("run", "bits", "--smoke", "--out", tmp_path / "rows.json")
    assert done.exit_code == 0, done.output[-4000:]
    rows = {row["method"]: row for row in load_rows(tmp_path / "rows.json")}
    assert {"DynamicCache", WHOLE, BITS.format(bits=8), BITS.format(bits=4)} <= rows.keys()
    assert len({row["steps"] for row in rows.values()}) == 1
    assert rows[BITS.format(bits=4)]["last_bytes"] < rows[BITS.format(bits=8)]["last_bytes"] < rows[WHOLE]["last_bytes"]


def test_aims_are_judged_by_the_worst_shape():
    rows = [row(WHOLE, 10.0, 1.1), row(BITS.format(bits=4), 12.0, 0.9), row(BITS.format(bits=8), 11.0, 1.2)]
    rows += [row(WHOLE, 10.0, 2.0, 8), row(BITS.format(bits=4), 14.0, 1.5, 8), row(BITS.format(bits=8), 10.0, 1.6, 8)]
    found = {aim.text: aim.verdict for aim in speed_aims(rows)}
    assert list(found.values()) == ["met", "met", "missed", "missed"]
    assert {aim.verdict for aim in CASES["bits.speed"].aims([])} == {"not measured"}
