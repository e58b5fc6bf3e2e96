"""The benchmark of KVCompressCache and its peer: a smoke run of every section, and what rows, tables and aims say."""

import json
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from typer.testing import CliRunner

from kara_hf.cli import app as cli
from kara_hf.evaluation.measure.results import load

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
ORIGIN = {
    "command": "python benchmarks/kv_compress.py",
    "device": "a CPU",
    "threads": 1,
    "versions": {"torch": "2.11"},
    "date": "2026-01-02",
}


def start(script, *arguments):
    command = [sys.executable, f"benchmarks/{script}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture
def ours(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import kv_compress

    return kv_compress


@pytest.fixture
def peer(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import peer_kvpress

    return peer_kvpress


def row(section, case, method, package="kara_hf", **numbers):
    made = {"section": section, "case": case, "method": method, "package": package, "dtype": "float32"}
    return made | {"provenance": ORIGIN} | numbers


def speed_row(case, method, speedup, package="kara_hf", **numbers):
    times = {"tokens_per_s": 150.4, "speedup": speedup, "speedup_low": 1.2, "speedup_high": 1.4, "step_ms": 6.5}
    times |= {"first_step_ms": 25.0, "worst_step_ms": 12.0, "step_time_ratio": 0.77}
    held = {"prompt_bytes": 8_400_000, "last_bytes": 3_000_000, "most_bytes": 2_600_000}
    return row("speed", case, method, package, **times | held | numbers)


def byte_row(rate, within):
    numbers = {"rate": rate, "true_rate": 7.9, "max_cache_tokens": 1072, "floor_tokens": 64, "floor_binds": False}
    numbers |= {"rows_at_floor": 0, "rows": 8, "kept_min": 432, "kept_mean": 1071.6, "kept_max": 2432, "excess": 0.031}
    numbers |= {"nominal_bytes": 4_391_000, "mean_bytes": 4_500_000, "most_bytes": 4_520_000, "excess_blocks": 1.97}
    numbers |= {"decode_peak_bytes": 5_000_000, "peak_bytes": 34_000_000, "within_aim": within}
    return row("bytes", "8192 + 385", f"KVCompressCache, {rate} times", **numbers)


# ---------------------------------------------------------------------------------------------------------- running it
def test_a_smoke_run_goes_through_every_section(tmp_path):
    results = BENCHMARKS / "results" / "kv_compress.json"
    before = results.read_bytes() if results.exists() else None
    done = start("kv_compress.py", "--smoke", "--out", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert list(dict.fromkeys(row["section"] for row in rows)) == ["bytes", "speed", "whole", "levels", "limit"]
    assert all({"command", "versions", "date"} <= each["provenance"].keys() for each in rows)
    bytes_rows = [each for each in rows if each["section"] == "bytes"]
    assert [each["rate"] for each in bytes_rows] == [2, 4, 8, 16, 32, 64]
    for each in bytes_rows:
        assert each["nominal_bytes"] == each["seen"] // each["rate"] * 8 * 512
        assert each["floor_binds"] == (each["seen"] // each["rate"] < 64)
        assert each["kept_mean"] <= each["max_cache_tokens"]
        assert each["most_bytes"] <= each["decode_peak_bytes"] <= each["peak_bytes"]
    full = [each for each in rows if each["method"] == "DynamicCache" and each["section"] != "limit"]
    assert full and all(each["speedup"] == 1 and each["last_bytes"] == each["most_bytes"] for each in full)
    for each in (each for each in rows if each["section"] == "limit"):
        assert each["batch"] >= 1 and each["most_bytes"] <= each["limit_bytes"]
    assert all(0 < each["kept_metric"] <= 1 for each in rows if each["section"] == "levels")
    assert "none of these numbers means anything" in done.stdout
    assert (results.read_bytes() if results.exists() else None) == before


@pytest.mark.parametrize("script", ["kv_compress.py", "peer_kvpress.py"])
def test_no_number_of_a_smoke_run_gets_into_the_results(script):
    done = start(script, "--smoke", "--out", "benchmarks/results/smoke.json")
    assert done.returncode == 2 and "smoke run measures nothing" in done.stderr
    assert not (BENCHMARKS / "results" / "smoke.json").exists()


def test_sections_and_parts_are_checked(ours, peer):
    assert ours.chosen_sections("limit, bytes") == ["bytes", "limit"] and ours.chosen_sections("") == list(
        ours.SECTIONS
    )
    assert peer.chosen_parts("tasks") == ["tasks"] and peer.chosen_parts("") == ["speed", "tasks"]
    with pytest.raises(typer.BadParameter, match="pace is no section; choose from bytes"):
        ours.chosen_sections("bytes,pace")
    with pytest.raises(typer.BadParameter, match="pace is no part; choose from speed, tasks"):
        peer.chosen_parts("pace")


def test_an_environment_does_not_take_a_folder_that_is_something_else(peer, tmp_path, monkeypatch):
    monkeypatch.setattr(peer.subprocess, "run", lambda *args, **kwargs: pytest.fail("nothing may be installed here"))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(typer.BadParameter, match="not empty and no environment"):
        peer.environment(tmp_path, peer.TORCH)
    (tmp_path / "installed.json").write_text(json.dumps([peer.TORCH, *peer.REQUIRED]))
    assert peer.environment(tmp_path, peer.TORCH) == tmp_path / "bin" / "python"


def test_an_environment_is_finished_only_when_everything_is_installed(peer, tmp_path, monkeypatch):
    calls = []

    def run(command, check):
        calls.append(command)
        if len(calls) == 3:
            raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(peer.subprocess, "run", run)
    with pytest.raises(subprocess.CalledProcessError):
        peer.environment(tmp_path / "env", "torch==1")
    assert calls[1][-1] == "torch==1" and calls[2][-len(peer.REQUIRED) - 1 :] == ["torch==1", *peer.REQUIRED]
    assert not (tmp_path / "env" / "installed.json").exists()


# --------------------------------------------------------------------------------------------------- what is measured
def test_a_race_gives_every_cache_the_same_tokens_in_turns(peer):
    taken = []

    def entry(name):
        ids = torch.arange(6)[None]
        held = iter(range(10, 20))
        return peer.Entry(
            name,
            ids,
            lambda prompt: taken.append((name, prompt[0].tolist())),
            lambda token, position: taken.append((name, int(token), position)),
            lambda: next(held),
        )

    traces = peer.race([entry("a"), entry("b")], 3, "")
    assert taken[:2] == [("a", [0, 1, 2]), ("b", [0, 1, 2])]
    assert [sorted(taken[i : i + 2]) for i in (2, 4, 6)] == [[("a", n, n), ("b", n, n)] for n in (3, 4, 5)]
    assert [(t.batch, t.prompt_bytes, t.held, len(t.steps)) for t in traces] == [(1, 10, [11, 12, 13], 3)] * 2


def test_times_of_several_runs_become_the_numbers_of_a_row(peer):
    def trace(*steps, batch=1):
        return peer.Trace(batch, prefill=0.5, prompt_bytes=100, steps=list(steps), held=[7, 9, 8])

    base = [trace(0.02, 0.02, 0.02)] * 3
    mine = [trace(0.03, 0.01, 0.01), trace(0.03, 0.5, 0.01), trace(0.03, 0.01, 0.02)]
    numbers = peer.timing(mine, base)
    assert numbers["tokens_per_s"] == pytest.approx(3 / 0.05) and numbers["speedup"] == pytest.approx(1.2)
    assert numbers["speedup_low"] == pytest.approx(0.06 / 0.54) and numbers["speedup_high"] == pytest.approx(1.2)
    assert numbers["first_step_ms"] == pytest.approx(30) and numbers["worst_step_ms"] == pytest.approx(10)
    assert numbers["step_time_ratio"] == pytest.approx(0.5) and numbers["prefill_ms"] == pytest.approx(500)
    assert (numbers["prompt_bytes"], numbers["mean_bytes"], numbers["most_bytes"]) == (100, 8, 9)
    batched = peer.timing([trace(0.02, 0.02, 0.02, batch=4)], base[:1])
    assert batched["speedup"] == pytest.approx(4) and batched["tokens_per_s"] == pytest.approx(200)


@pytest.mark.parametrize("limit", [10, 11, 99, 1000])
def test_the_largest_batch_is_the_last_that_fits(ours, limit):
    asked = []

    def held(batch):
        asked.append(batch)
        return 9 * batch + 1

    assert ours.largest(held, limit) == (limit - 1) // 9
    assert len(asked) == len(set(asked))


def test_a_limit_below_one_sequence_is_refused(ours):
    with pytest.raises(ValueError, match="one sequence takes 10 bytes, more than the limit of 9"):
        ours.largest(lambda batch: 10 * batch, 9)


def test_the_kept_share_of_the_metric_counts_stored_tokens_alone(ours):
    metric = torch.tensor([[[1.0, 2.0, 3.0, 100.0], [4.0, 5.0, 100.0, 100.0]]])
    dropped = torch.tensor([[[True, False, False, False], [True, False, False, False]]])
    decided = SimpleNamespace(dropped=dropped)
    watch = ours.Watch(lambda *arguments: decided)
    assert watch(metric, None, torch.tensor([[3, 2]]), None, None) is decided
    assert watch.shares() == [pytest.approx(10 / 15)]


def test_a_twin_shares_weights_and_nothing_else(peer):
    model = torch.nn.Linear(2, 2)
    other = peer.twin(model)
    other.register_forward_hook(lambda *arguments: None)
    assert other.weight is model.weight and other is not model and not model._forward_hooks


# --------------------------------------------------------------------------------------------- what becomes of answers
def test_cells_are_what_kvpress_can_do(peer):
    cells = peer.cells_of("full,SnapKV,Decoding(Knorm)", "0.5,0.25", "before,after")
    assert [(cell["method"], cell["rule"], cell["budget"]) for cell in cells] == [
        ("full", "none", 1.0),
        ("SnapKV", "before", 0.5),
        ("Decoding(Knorm)", "before", 0.5),
        ("SnapKV", "before", 0.25),
        ("Decoding(Knorm)", "before", 0.25),
        ("SnapKV", "after", 0.5),
        ("SnapKV", "after", 0.25),
    ]
    with pytest.raises(typer.BadParameter, match="rules must be of before, after"):
        peer.cells_of("full", "0.5", "pinned")
    for budgets in ("1.5", "half"):
        with pytest.raises(typer.BadParameter, match="budgets must be shares"):
            peer.cells_of("full", budgets, "before")


@dataclass
class SnapKVPress:
    window_size: int = 64
    compression_ratio: float = 0.0


@dataclass
class AdaKVPress:
    press: SnapKVPress
    compression_ratio: float = 0.0


@dataclass
class DecodingPress:
    base_press: SnapKVPress
    compression_interval: int = 512
    target_size: int = 2048


@dataclass
class ComposedPress:
    pass


@pytest.fixture
def kvpress(peer, monkeypatch):
    """What the worker imports in its environment."""
    kinds = (SnapKVPress, AdaKVPress, DecodingPress, ComposedPress)
    monkeypatch.setitem(sys.modules, "kvpress", SimpleNamespace(**{kind.__name__: kind for kind in kinds}))
    monkeypatch.setattr(peer, "version", lambda name: "0.5.5")


def test_a_press_is_made_by_its_name_for_a_share(peer, kvpress):
    settings = {"window": 8, "interval": 32}
    assert peer.press_of("full", 1.0, 100, settings) is None
    assert peer.press_of("SnapKV", 0.25, 100, settings) == SnapKVPress(8, 0.75)
    assert peer.press_of("AdaKV(SnapKV)", 0.25, 100, settings) == AdaKVPress(SnapKVPress(8), 0.75)
    assert peer.press_of("Decoding(SnapKV)", 0.25, 100, settings) == DecodingPress(SnapKVPress(8), 32, 25)
    with pytest.raises(ValueError, match="kvpress 0.5.5 has no SnapPress"):
        peer.press_of("AdaKV(Snap)", 0.5, 100, settings)
    with pytest.raises(ValueError, match="'Composed' is not possible: it has no compression_ratio"):
        peer.press_of("Composed", 0.5, 100, settings)


@dataclass
class Newest:
    """A press that keeps a prompt's newest tokens."""

    compression_ratio: float

    @contextmanager
    def __call__(self, model):
        def cut(module, arguments, settings, output):
            cache = settings.get("cache", settings.get("past_key_values"))  # its name depends on the version
            layer = cache.layers[module.layer_idx]
            kept = round(layer.keys.shape[2] * (1 - self.compression_ratio))
            layer.keys, layer.values = layer.keys[:, :, -kept:].clone(), layer.values[:, :, -kept:].clone()

        hooks = [layer.self_attn.register_forward_hook(cut, with_kwargs=True) for layer in model.model.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@pytest.fixture
def without_worker(peer, monkeypatch):
    """The worker's part done here, by a press of this file; gives the jobs."""
    jobs = []

    def run_worker(python, folder, job):
        jobs.append(job)
        yield ORIGIN
        yield from peer.answers(job) if "cells" in job else ()

    monkeypatch.setattr(peer, "run_worker", run_worker)
    monkeypatch.setattr(peer, "press_of", lambda method, share, *_: None if method == "full" else Newest(1 - share))
    return jobs


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_answers_of_the_worker_are_results_of_the_kit(peer, without_worker, tmp_path):
    task, cells = "recall:length=160", peer.cells_of("full,SnapKV", "0.5", "before,after")
    peer.measure_tasks(Path("python"), task, cells, None, 2, tmp_path)
    frame = load(tmp_path)
    assert list(zip(frame["rule"], frame["method"], frame["number"], strict=True)) == [
        (rule, f"kvpress {method}", number)
        for rule, method in (("none", "full"), ("query-agnostic", "SnapKV"), ("query-aware", "SnapKV"))
        for number in (0, 1)
    ]
    assert set(frame["equal"]) == {"tokens"} and frame["provenance"].iloc[0]["date"] == ORIGIN["date"]
    evaluate(tmp_path, task)
    frame = load(tmp_path)
    columns = ["number", "score", "generated", "prompt", "resident_bytes", "peak_bytes", "full_bytes", "text"]
    theirs, mine = (frame.loc[frame["method"] == name, columns].to_dict("list") for name in ("kvpress full", "full"))
    assert theirs == mine
    full, cut = (frame[frame["method"] == name] for name in ("kvpress full", "kvpress SnapKV"))
    assert cut["resident_bytes"].max() < 0.7 * full["resident_bytes"].min()
    assert (cut["peak_bytes"] > cut["resident_bytes"]).all()


def evaluate(folder, task):
    """The kit's own answers of the full cache."""
    options = ["--tasks", task, "--methods", "full", "--n", "2", "--batch", "1", "--out", str(folder)]
    found = CliRunner().invoke(cli.app, ["evaluate", *options, "--device", "cpu"])
    assert found.exit_code == 0, found.output


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_answers_that_are_there_are_not_asked_for_again(peer, without_worker, tmp_path):
    cells = peer.cells_of("full", "0.5", "before")
    for n in (1, 2, 2):
        peer.measure_tasks(Path("python"), "recall:length=160", cells, None, n, tmp_path)
    assert [job["cells"][0]["missing"] for job in without_worker if "cells" in job] == [[0], [1]]
    assert list(load(tmp_path)["number"]) == [0, 1]


def test_a_worker_that_fails_is_an_error_behind_what_it_found(peer, tmp_path, monkeypatch):
    script = tmp_path / "worker.py"
    script.write_text(
        "import json; print(json.dumps({'date': 1})); print(json.dumps({'cell': 0})); raise SystemExit(3)"
    )
    monkeypatch.setattr(peer, "__file__", str(script))
    rows = peer.run_worker(Path(sys.executable), tmp_path, {})
    assert next(rows).keys() == {"date", "command"}
    assert next(rows) == {"cell": 0}
    with pytest.raises(subprocess.CalledProcessError):
        next(rows)


def test_merging_replaces_a_package_in_a_section_alone(peer):
    old = [row("speed", "x", "old"), row("speed", "x", "theirs", "kvpress"), row("bytes", "x", "old")]
    merged = peer.merge(old, [row("speed", "x", "new")])
    assert [(each["section"], each["method"]) for each in merged] == [
        ("speed", "theirs"),
        ("bytes", "old"),
        ("speed", "new"),
    ]


# ------------------------------------------------------------------------------------------------------ what is printed
def test_markdown(ours):
    rows = [
        byte_row(8, True),
        speed_row("2048 + 512", "KVCompressCache, 512 tokens", 1.3, kept_min=100, kept_mean=511.6, kept_max=800),
        speed_row("8192 + 256", "DynamicCache", 1.0),
        speed_row("2048 + 512", "SnapKV 0.8", 1.27, "kvpress", buffer_bytes=1_040_000),
    ]
    text = ours.markdown(rows)
    assert "**bytes**: `python benchmarks/kv_compress.py`: a CPU, 1 thread, torch 2.11, float32, 2026-01-02." in text
    assert (
        "| 8x | 7.90x | 1072 | 432, 1072, 2432 | 4.391 | 4.500, 4.520 | 3.1% | 1.97 | yes | "
        "64 tokens, binds: no, rows at it: 0 of 8 | 5.000 | 34.000 |" in text
    )
    shown = [line for line in text.splitlines() if line.startswith(("| 2048", "| 8192"))]
    times, sizes = "150 | 1.30x (1.20 to 1.40) | 6.50 | 25.0 | 12.0", "8.40 | 3.00 | 2.60 | – | –"
    assert shown[0] == f"| 2048 + 512 | KVCompressCache, 512 tokens | {times} | {sizes} | 100, 512, 800 |"
    assert "SnapKV" in shown[1] and shown[1].endswith("| – | 1.04 | – |") and "DynamicCache" in shown[2]
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert all(len({line.count("|") for line in table.splitlines()}) == 1 for table in tables) and len(tables) == 2


def test_aims_are_met_or_missed_by_rows_that_are_there(ours):
    whole = {"section": "whole", "step_time_ratio": 1.15}
    rows = [
        byte_row(8, True),
        byte_row(2, False),
        speed_row("2048 + 512", "KVCompressCache, 512 tokens", 1.26)
        | whole
        | {"method": "KVCompressCache, nothing evicted"},
        speed_row("2048 + 512", "KVCompressCache, 512 tokens", 1.26),
    ]
    assert [verdict for _, verdict, _ in ours.aims(rows)] == ["met", "missed", "met", "met", "met"]
    assert ours.aims([]) == []
    theirs = speed_row("2048 + 512", "SnapKV 0.8, then Decoding(Knorm, 128/512)", 1.3, "kvpress")
    assert ours.aims([*rows, theirs])[-1][:2] == (
        "2048 + 512, 512 tokens: at least 1.30x, as SnapKV 0.8, then Decoding(Knorm, 128/512) here",
        "missed",
    )


def test_missing_the_byte_aim_at_8_times_fails_the_run(ours, tmp_path, monkeypatch):
    for within, code in ((True, 0), (False, 1)):
        monkeypatch.setitem(ours.SECTIONS, "bytes", lambda bench, within=within: [byte_row(8, within)])
        with pytest.raises(typer.Exit) as stopped:
            ours.main(sections="bytes", repeats=1, out=tmp_path / "rows.json", smoke=False)
        assert stopped.value.exit_code == code
