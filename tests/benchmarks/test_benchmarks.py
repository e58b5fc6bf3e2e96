"""The benchmarks' one command: every case runs small; rows, files, tables and errors are what they say."""

import json
import math
import re
import signal
import time

import pytest
import torch
from support.marks import slow
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.common import rows as rows_module
from benchmarks.common.aims import Aim, aims_table, judge
from benchmarks.common.case import CASES, Case, Job, chosen, register, with_settings
from benchmarks.common.rows import RESULTS, RowFile, load_rows
from benchmarks.common.run import Run, Skip, backend, time_limit
from benchmarks.common.table import markdown, table

ORIGIN = {"command": "python -m benchmarks run x", "device": "a CPU", "threads": 1, "date": "2026-01-02"}
ORIGIN |= {"versions": {"torch": "2.11"}, "code": "abc"}


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def contents(folder):
    """What lies in a folder and the folders below it, bytes by path."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def smoke(tmp_path, *names):
    """Rows of a smoke run by case, and what it printed."""
    before = contents(RESULTS)
    done = invoke("run", *names, "--smoke", "--out", tmp_path / "rows.json")
    assert done.exit_code == 0, done.output[-4000:]
    assert "none of these numbers means anything" in done.output
    assert contents(RESULTS) == before
    found = {}
    for row in load_rows(tmp_path / "rows.json"):
        assert {"command", "device", "versions", "code", "date"} <= row["provenance"].keys() and row["dtype"]
        assert row["status"] in ("passed", "measured", "skipped"), row
        assert row["status"] != "skipped" or "not available" in row["reason"]
        found.setdefault(row["case"], []).append(row)
    return found, done.output


# -------------------------------------------------------------------------------------------------- every case, small
KV_COMPRESS = ["bytes", "speed", "whole", "levels", "limit"]


@pytest.mark.parametrize("names", [["bytes", "levels"], slow(KV_COMPRESS)], ids=["few", "every"])
def test_kv_compress(tmp_path, names):
    wanted = [f"kv_compress.{name}" for name in names]
    rows, output = smoke(tmp_path, *(["kv_compress"] if names is KV_COMPRESS else wanted))
    assert list(rows) == wanted
    assert all(f"**{name}: " in output for name in rows)
    for each in rows["kv_compress.bytes"]:
        assert each["nominal_bytes"] == each["seen"] // each["rate"] * 8 * 512
        assert each["floor_binds"] == (each["seen"] // each["rate"] < 64)
        assert each["kept_mean"] <= each["max_cache_tokens"]
        assert each["most_bytes"] <= each["decode_peak_bytes"] <= each["peak_bytes"]
    assert [each["rate"] for each in rows["kv_compress.bytes"]] == [2, 8, 64]
    for name in {"kv_compress.speed", "kv_compress.whole"} & rows.keys():
        full = next(each for each in rows[name] if each["method"] == "DynamicCache")
        assert full["speedup"] == 1 and full["last_bytes"] == full["most_bytes"]
    for each in rows.get("kv_compress.limit", []):
        assert each["batch"] >= 1 and each["most_bytes"] <= each["limit_bytes"]
    assert all(0 < each["kept_metric"] <= 1 for each in rows["kv_compress.levels"])


def test_generation_pod_and_saved_caches(tmp_path):
    rows, _ = smoke(tmp_path, "generation", "pod", "saved")
    assert len({each["how"] for each in rows["saved"]}) == 3 and all(each["file_bytes"] for each in rows["saved"])
    whole, cut = rows["generation"]
    assert whole["kept"] == whole["seen"] == cut["seen"] and whole["windows_sealed"] == 0 < cut["windows_sealed"]
    assert cut["resident_bytes"] < whole["resident_bytes"] and cut["kept"] < whole["kept"]
    pod = {(each["sharing"], each["seen"]): each for each in rows["pod"]}
    assert len(pod) == 10 and pod["none", 64]["ratio"] == 1
    assert pod["layers in fours", 96]["resident_bytes"] < pod["layers in pairs", 96]["resident_bytes"]
    assert pod["layers in pairs", 96]["resident_bytes"] < pod["none", 96]["resident_bytes"]


@pytest.mark.slow
def test_quality_comes_from_the_kit(tmp_path):
    done = invoke("run", "quality.pod", "--smoke", "--set", "n=1", "--out", tmp_path / "rows.json")
    assert done.exit_code == 0, done.output
    shown = [line.split(" | ") for line in done.output.splitlines() if line.startswith("| trace")]
    assert {(line[1], line[2]) for line in shown} == {
        ("none", "full"),
        ("none", "pod"),
        ("prompt-kept", "random"),
        ("prompt-kept", "kara"),
        ("prompt-kept", "kara+pod"),
    }
    assert not (tmp_path / "rows.json").exists(), "answers are kept by the kit alone"
    assert "answers of a smoke run are gone" in done.output


def test_answers_of_the_kit_are_not_asked_for_again(tmp_path):
    sizes = ["tasks=recall:length=96", "n=1", "batch=1", "budgets=0.5", "equal=tokens", f"out={tmp_path / 'results'}"]
    command = ["run", "quality.eviction", *(part for size in sizes for part in ("--set", size))]
    first = invoke(*command)
    assert first.exit_code == 0 and first.output.count("| snapkv |") == 2, first.output
    files = contents(tmp_path / "results")
    assert len(files) == 11
    assert invoke(*command).exit_code == 0
    assert contents(tmp_path / "results") == files


@pytest.mark.parametrize("name", ["windows", "bits"])
def test_requests_can_be_made(name, tmp_path):
    run = Run(torch.device("cpu"), RowFile(None), smoke=True)
    case = CASES[f"quality.{name}"]
    jobs = list(case.jobs(run, **with_settings(case, True, [])))
    assert [job.labels for job in jobs] == [{"model": "tiny_reasoner", "task": "trace:generated=48"}]


@pytest.mark.slow
def test_gpu(tmp_path):
    rows, output = smoke(tmp_path, "gpu")
    names = ("checks", "attend", "windows", "decode", "limit", "pod", "serve", "more")
    assert list(rows) == [f"gpu.{name}" for name in names]
    measured = {each["what"] for case in rows.values() for each in case if each["status"] == "measured"}
    assert {"attend", "compact", "KaraCache 0.2", "DynamicCache", "StaticCache, compiled"} <= measured
    assert {"attend_shared, follows", "attend_shared, leads"} <= measured
    pod = {each["what"]: each for each in rows["gpu.pod"]}
    alone, halved = pod["PoDCache, nothing shared"], pod["PoDCache, groups of 2 layers"]
    assert (alone["followers"], halved["followers"]) == (0.0, 0.5)
    assert halved["seen"] == alone["seen"] and halved["nominal_bytes"] < alone["nominal_bytes"]
    ops = {each["op"] for each in rows["gpu.checks"] if each["status"] == "passed"}
    assert ops == {
        "append",
        "attend",
        "attend_rounded",
        "attend_shared",
        "merge",
        "window_scores",
        "compact",
        "decode",
        "pod",
    }
    assert "skipped: not available on a CPU" in output


# ----------------------------------------------------------------------------------------------------- what is asked
def test_what_there_is_is_listed():
    done = invoke("list")
    assert done.exit_code == 0 and all(f"| {name} | " in done.output for name in CASES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "pace"], "pace is no case; choose from generation, "),
        (["run", "kv_compress.pace"], "kv_compress.pace is no case"),
        (["run", "gpu", "pod"], "cannot run together"),
        (["run", "pod", "--set", "seen"], "set='seen' is not possible: it must be NAME=VALUE, NAME one of batch, seen"),
        (["run", "pod", "--set", "new=3"], "set='new=3' is not possible"),
        (["run", "pod", "--set", "seen=64,many"], "seen='many' is not possible: seen must be like 512"),
        (["run", "pod", "--smoke", "--out", str(RESULTS / "smoke.json")], "a smoke run measures nothing"),
        (["run", "serving", "--smoke", "--set", "methods=engine alone;magic"], "methods=['magic'] are not there"),
        (["table", "pod", "--rows", "nothing.json"], "rows='nothing.json' has no rows of pod"),
    ],
)
def test_what_is_not_possible_is_said(arguments, message):
    done = invoke(*arguments)
    assert done.exit_code == 2 and message in done.output.replace("\n", " "), done.output
    assert not (RESULTS / "smoke.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = invoke("run", "gpu")
    assert done.exit_code == 2 and "torch sees no GPU" in done.output and "--smoke" in done.output


def test_checks_always_run_and_cases_have_their_order():
    assert [case.name for case in chosen(["gpu.serve", "gpu.attend"])] == ["gpu.checks", "gpu.attend", "gpu.serve"]
    assert [case.name for case in chosen(["pod", "generation"])] == ["generation", "pod"]
    ends = [case.until for case in chosen(["gpu"])]
    assert ends == sorted(ends) and ends[-1] == 1


def test_sizes_are_set_by_name():
    case = Case("x", "", lambda run: [], [], sizes={"batch": 1, "seen": (1, 2), "names": ("a", "b"), "deep": False})
    given = ["batch=3", "seen=4,5,6", "names=c, d;e", "deep=true", "another=1"]
    assert with_settings(case, False, given) == {"batch": 3, "seen": (4, 5, 6), "names": ("c, d", "e"), "deep": True}


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="name='pod' is taken"):
        register("pod", "", [])(lambda run: [])


# ------------------------------------------------------------------------------------------------- what becomes a row
def case_of(jobs, **options):
    return Case("x.y", "", lambda run, **sizes: jobs, [("what", "{what}"), ("ms", "{ms:.1f}")], **options)


def new_run(path=None, **options):
    return Run(torch.device("cpu"), RowFile(path), **options)


def test_a_failed_check_takes_the_numbers_of_its_op_away():
    run = new_run()
    checks = [("attend", lambda: {"passed": False, "error": 1.0}), ("compact", lambda: {"passed": True})]
    run.take(case_of([Job({"op": op, "what": ""}, check) for op, check in checks], first=True), {})
    run.take(case_of([Job({"what": op}, lambda: {"ms": 1.0}, needs=(op,)) for op in ("attend", "compact")]), {})
    assert [(each["what"], each["status"]) for each in run.rows] == [
        ("", "failed"),
        ("", "passed"),
        ("compact", "measured"),
    ]


def test_what_goes_wrong_is_a_row_with_the_reason():
    def fail(error):
        raise error

    run = new_run(minutes=1.0)
    jobs = [
        Job({"what": "skip"}, lambda: fail(Skip("no such thing"))),
        Job({"what": "error"}, lambda: fail(ValueError("odd"))),
        Job({"what": "slow"}, lambda: time.sleep(30), seconds=0.05),
    ]
    run.take(case_of(jobs), {})
    run.take(case_of([Job({"what": "late"}, dict)], until=0.0), {})
    assert [(each["status"], each["reason"]) for each in run.rows] == [
        ("skipped", "no such thing"),
        ("failed", "ValueError: odd"),
        ("not reached", "stopped after 0 s"),
        ("not reached", "the time was over before"),
    ]
    assert table(run.rows[1:2], [("what", "{what}"), ("ms", "{ms:.1f}")]).endswith(
        "| error | failed: ValueError: odd |"
    )


def test_a_limit_on_time_leaves_another_timer_alone():
    before = signal.setitimer(signal.ITIMER_REAL, 100)
    try:
        with time_limit(5):
            assert signal.getitimer(signal.ITIMER_REAL)[0] <= 5
        assert 90 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100
        with time_limit(math.inf):
            assert signal.getitimer(signal.ITIMER_REAL)[0] > 90
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)


def test_the_backend_is_set_for_a_while(monkeypatch):
    import os

    for before in ("auto", None):
        monkeypatch.delenv("KARA_BACKEND", raising=False)
        if before:
            monkeypatch.setenv("KARA_BACKEND", before)
        with backend("reference"), backend("triton"):
            assert os.environ["KARA_BACKEND"] == "triton"
        assert os.environ.get("KARA_BACKEND") == before


# ------------------------------------------------------------------------------------------------------- files of rows
@pytest.fixture
def counted(tmp_path, monkeypatch):
    """Runs two jobs, one of several rows, and gives what was measured."""
    measured = []

    def measure(what):
        measured.append(what)
        return [{"method": name, "ms": len(measured)} for name in ("a", "b")] if what == "race" else {"ms": 1.0}

    jobs = [Job({"what": what}, lambda what=what: measure(what)) for what in ("race", "one")]

    def start(sizes=(), **options):
        measured.clear()
        run = new_run(tmp_path / "rows.json", **options)
        run.take(case_of(jobs), dict(sizes))
        return list(measured), run

    return start


def test_a_run_goes_on_where_it_was(counted, tmp_path, monkeypatch):
    assert counted()[0] == ["race", "one"]
    assert len(load_rows(tmp_path / "rows.json")) == 3
    measured, run = counted()
    assert measured == [] and [row["what"] for row in run.rows] == ["race", "race", "one"]
    assert counted(again=True)[0] == ["race", "one"]
    assert counted({"batch": 2})[0] == ["race", "one"], "other sizes are measured"
    monkeypatch.setattr(rows_module, "code_digest", lambda: "other")
    assert counted({"batch": 2})[0] == ["race", "one"], "other code is measured"
    assert len(load_rows(tmp_path / "rows.json")) == 3, "in place of what was there"
    rows = load_rows(tmp_path / "rows.json")
    rows[-1]["status"] = "not reached"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert counted({"batch": 2})[0] == ["one"], "what was not reached is"


def test_rows_of_other_cases_stay(counted, tmp_path):
    old = [{"case": "x.z", "what": "one"}, {"case": "x.y", "what": "two"}]
    (tmp_path / "rows.json").write_text(json.dumps(old))
    counted()
    assert load_rows(tmp_path / "rows.json")[:2] == old


def test_what_the_kit_keeps_is_in_no_file(tmp_path):
    run = new_run(tmp_path / "rows.json")
    run.take(case_of([Job({"what": "x"}, lambda: {"ms": 1.0})], keep=False), {})
    assert len(run.rows) == 1 and not (tmp_path / "rows.json").exists()


def test_two_runs_at_once_lose_no_row(tmp_path):
    one, other = (RowFile(tmp_path / "rows.json") for _ in range(2))
    row = {"case": "some", "status": "measured"}
    one.put("some", {"data": "a"}, [row | {"data": "a"}])
    other.put("some", {"data": "b"}, [row | {"data": "b"}])
    one.put("some", {"data": "a"}, [row | {"data": "a", "number": 2}])
    assert RowFile(tmp_path / "rows.json").rows == [row | {"data": "b"}, row | {"data": "a", "number": 2}]


def test_the_rows_that_are_kept_make_tables():
    for row in [row for path in RESULTS.glob("*.json") for row in load_rows(path)]:
        assert row["case"] in CASES and row["status"] == "measured"
        assert {"command", "device", "versions", "date"} <= row["provenance"].keys()
        shown = table([row], CASES[row["case"]].columns)
        assert "–" not in shown, shown
    done = invoke("table", "pod", "kv_compress", "--rows", RESULTS / "intel-r-xeon-r-processor.json")
    assert done.exit_code == 0 and "| layers in fours |" in done.output and "| aim | | measured |" in done.output


def test_results_that_are_kept_name_no_place_on_the_machine_that_made_them():
    for path in RESULTS.rglob("*.json*"):
        assert not re.search(r"[ =\"](/|~/|[A-Z]:)[\w.]", path.read_text()), path


# ---------------------------------------------------------------------------------------------------- what is printed
def test_tables():
    row = {"status": "measured", "dtype": "float32", "provenance": ORIGIN, "what": "a", "fits": True}
    rows = [row | {"held_bytes": 2**30, "nominal_bytes": 2**29, "full_bytes": 2**31}, row | {"what": "b"}]
    columns = [("what", "{what}"), ("GiB", "{held_gib:.1f}"), ("MB", "{held_mb:.1f}"), ("fits", "{fits}")]
    columns += [("of nominal", "{held_of_nominal:.0%}"), ("of full", "{held_of_full:.0%}")]
    text = markdown("Title.", rows, columns)
    assert text.startswith("**Title.** `python -m benchmarks run x`: a CPU, 1 thread, torch 2.11, float32, 2026-01-02.")
    assert "| a | 1.0 | 1073.7 | yes | 200% | 50% |\n| b | – | – | yes | – | – |" in text


def test_an_aim_is_judged_by_the_worst_case():
    assert judge("x", [(2.0, "two"), (1.0, "one")], least=2.0) == Aim("x", "missed", "one (the worst of 2)")
    assert judge("x", [(2.0, "two"), (1.0, "one")], most=2.0).verdict == "met"
    assert judge("x", [(2.0, "two")], below=2.0) == Aim("x", "missed", "two")
    assert judge("x", [], most=1.0, otherwise="no memory")[1:3] == ("not measured", "no memory")
    assert aims_table([Aim("x", "met", "1")]).endswith("| x | met | 1 |")
