"""The numbers of a report against numbers by hand, and what its page and its Markdown show and escape."""

import base64
import gzip
import html
import json
import math
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.marks import most_examples

from kara_hf.evaluation.measure.results import EXAMPLE
from kara_hf.evaluation.report import figures, summary, write
from kara_hf.evaluation.report.page import SECTIONS
from kara_hf.evaluation.report.statistics import compare, gap_closed, interval_of, summarise
from kara_hf.methods.rules import RULES

METHODS = {  # how well they hold on: 0 as random, 1 as the oracle
    "random": 0.0,
    "random chunks": -0.08,
    "recency": -0.3,
    "snapkv": 0.1,
    "r-kv": 0.22,
    "kara": 0.5,
    "kara, causal": 0.42,
    "kara, tokens": 0.35,
    "kv-compress": 0.3,
    "oracle": 1.0,
}
TASKS = {"trace:generated=300": 0.95, "fact:generated=300": 0.9, "niah:length=4096": 0.99}
PROVENANCE = {
    "command": "kara-hf evaluate --task trace:generated=300",
    "device": "A processor",
    "threads": 1,
    "python": "3.11",
    "versions": {"torch": "2.13.0", "transformers": "5.17.0"},
    "dtype": "float32",
    "date": "2026-11-24",
}


def cell(scores, **changes) -> pd.DataFrame:
    """Examples of one cell by hand; columns and numbers of examples can be changed."""
    n = len(scores)
    fields = {
        "model": "tiny_reasoner",
        "weights": "3f9a5510aa",
        "task": "trace",
        "rule": "prompt-kept",
        "method": "random",
        "budget": 0.25,
        "equal": "bytes",
        "seed": 0,
        "number": range(n),
        "score": scores,
        "generated": 100,
        "truncated": False,
        "looped": False,
        "distance": math.nan,
        "prompt": 50,
        "mean_bytes": 200.0,
        "resident_bytes": 250,
        "peak_bytes": 400,
        "allocated_bytes": math.nan,
        "full_bytes": 1000,
        "seconds": 0.5,
    }
    table = pd.DataFrame(fields | changes, index=range(n))
    table["settings"] = [{"shared": {"window": 32, "recent": 16}}] * n
    table["provenance"] = [PROVENANCE] * n
    return table.astype(EXAMPLE)


def measured(n: int = 60, tasks=TASKS, rules=tuple(RULES), budgets=(0.5, 0.25, 0.125, 0.0625)):
    """What a real run might give: harder with fewer bytes, easier with a pinned prompt, facts harder far away."""
    rng = np.random.default_rng(7)
    cells = []
    for task, best in tasks.items():
        hard = rng.random(n)  # the same problems for all methods
        distance = rng.integers(20, 400, n) if task.startswith("fact") else np.full(n, np.nan)
        full = 1000 * rng.integers(380, 460, n)
        whole = {"task": task, "distance": distance, "full_bytes": full}

        def scores(chance, hard=hard):
            return (0.7 * hard + 0.3 * rng.random(n) < chance).astype(float)

        for method, held, chance in (("full", 1.01, best), ("quantized, 4 bits", 0.3, best - 0.04)):
            held_bytes = (full * held).astype(int)
            cells.append(
                cell(
                    scores(np.full(n, chance)),
                    **whole,
                    method=method,
                    rule="none",
                    budget=1.0,
                    mean_bytes=0.7 * held_bytes,
                    resident_bytes=held_bytes,
                    peak_bytes=(1.3 * held_bytes).astype(int),
                    generated=rng.integers(280, 320, n),
                    seconds=rng.uniform(0.2, 0.3, n),
                )
            )
        for rule in rules:
            for budget in budgets:
                low = best * (0.2 + 0.75 * (budget / 0.6) ** 0.5) * (1 if rule == "prompt-kept" else 0.7)
                for method, skill in METHODS.items():
                    chance = low + (best - low) * skill
                    if distance[0] == distance[0] and method != "oracle":
                        chance = chance * np.exp(-distance / 400)
                    held_bytes = (full * (budget * rng.uniform(1.0, 1.03) + 0.01)).astype(int)
                    longer = 1 + 0.5 * (1 - chance) * np.ones(n)
                    cells.append(
                        cell(
                            scores(chance),
                            **whole,
                            method=method,
                            rule=rule,
                            budget=budget,
                            mean_bytes=0.9 * held_bytes,
                            resident_bytes=held_bytes,
                            peak_bytes=(held_bytes + 0.1 * full).astype(int),
                            generated=(300 * longer).astype(int),
                            truncated=rng.random(n) < 0.2 * (longer - 1),
                            looped=rng.random(n) < 0.15 * (longer - 1),
                            seconds=rng.uniform(0.2, 0.3, n) * longer,
                        )
                    )
    return pd.concat(cells, ignore_index=True)


def series(*scores: float) -> pd.Series:
    return pd.Series(scores, dtype=float)


def page(frame, folder, **options):
    """What the page shows without its scripts, and what its figures are drawn from."""
    path, _ = write.write(frame, folder, **options)
    text = path.read_text("utf-8")
    data = re.search(r"id='page'>([^<]+)<", text)[1]
    shown = re.sub(r"<(style|script)[ >].*?</\1>", "", text, flags=re.S)
    return shown, json.loads(gzip.decompress(base64.b64decode(data)))


def test_interval_of_shares_is_wilsons():
    found = interval_of(series(*[1] * 8, *[0] * 2))
    assert (found.value, found.low, found.high) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert interval_of(series(1, 1, 1)).low == pytest.approx(0.4385, abs=1e-4)


def test_interval_of_other_scores_is_a_bootstrap():
    rng = np.random.default_rng(0)
    scores = pd.Series(rng.random(400))
    found = interval_of(scores)
    half = 1.96 * scores.std() / 20
    assert (found.value, found.low, found.high) == pytest.approx(
        (scores.mean(), scores.mean() - half, scores.mean() + half), abs=0.004
    )
    assert interval_of(scores) == found  # the same resamples every time


def test_pairing_makes_intervals_narrow():
    hard = np.random.default_rng(0).random(300)
    mine, other = series(*(hard < 0.55)), series(*(hard < 0.5))
    found = compare(mine, other)
    assert (found.n, found.losses) == (300, 0)
    assert found.wins == (mine != other).sum() and found.ties == 300 - found.wins
    assert found.sign == 1 and found.high - found.low < 0.06
    apart = interval_of(mine), interval_of(other)
    assert apart[1].high > apart[0].low  # unpaired, they overlap


def test_without_variance_there_is_no_nan():
    same = series(1, 0, 1, 0.5)
    found = compare(same, same)
    assert (found.value, found.low, found.high, found.ties, found.sign) == (0, 0, 0, 4, 0)
    ahead = compare(series(1, 1, 1), series(0, 0, 0))
    assert (ahead.value, ahead.low, ahead.high, ahead.sign) == (1, 1, 1, 1)
    flat = interval_of(series(0.5, 0.5))
    assert (flat.low, flat.high) == (0.5, 0.5)
    alone = compare(series(1), series(0))
    assert alone.value == 1 and math.isnan(alone.low) and alone.sign == 0


def test_only_numbers_of_both_are_compared():
    mine = pd.Series([1.0, 1.0, 0.0], index=[0, 1, 7])
    other = pd.Series([0.0, 1.0, 1.0], index=[1, 7, 9])
    found = compare(mine, other)
    assert (found.n, found.wins, found.losses, found.ties, found.value) == (2, 1, 1, 0, 0)
    assert compare(mine, other.loc[[9]]) is None


def test_gap_closed():
    floor, ceiling = series(*[0] * 8, 1, 1), series(*[1] * 10)
    assert gap_closed(ceiling, floor, ceiling).value == 1
    assert gap_closed(floor, floor, ceiling).value == 0
    half = gap_closed(series(*[0] * 4, *[1] * 6), floor, ceiling)
    assert half.value == pytest.approx(0.5) and 0 < half.low < 0.5 < half.high <= 1
    assert gap_closed(ceiling, ceiling, floor) is None
    assert gap_closed(ceiling, floor, floor) is None
    assert gap_closed(ceiling, series(0, 1, 0, 1), series(1, 0, 1, 1)) is None  # not above it for sure


@most_examples(60)
@given(
    st.lists(st.tuples(*[st.sampled_from([0, 0.25, 0.5, 1]) | st.floats(0, 1)] * 3), min_size=2, max_size=12),
)
def test_intervals_hold_together(table):
    mine, floor, ceiling = (pd.Series(column, dtype=float) for column in zip(*table, strict=True))
    for found in (interval_of(mine), compare(mine, floor)):
        assert found.low - 1e-9 <= found.value <= found.high + 1e-9
    closed = gap_closed(mine, floor, ceiling)
    assert closed is None or math.isfinite(closed.low + closed.value + closed.high)
    forth, back = compare(mine, floor), compare(floor, mine)
    assert forth.value == pytest.approx(-back.value) and (forth.wins, forth.losses) == (back.losses, back.wins)
    assert forth.wins + forth.losses + forth.ties == forth.n == len(table)


def small() -> pd.DataFrame:
    return pd.concat(
        [
            cell([1] * 20, method="full", rule="none", budget=1.0, resident_bytes=1000),
            cell([1] * 8 + [0] * 12),
            cell([1] * 8 + [0] * 12, seed=1),
            cell([1] * 14 + [0] * 6, method="kara", resident_bytes=300, looped=[True] + [False] * 19),
            cell([0] * 20, method="recency"),
            cell([1] * 18 + [0] * 2, method="oracle"),
            cell([1] * 10, method="kara", rule="query-aware"),
        ],
        ignore_index=True,
    )


def rows_of(frame, **options) -> dict:
    return {(row["method"], row["rule"]): row for row in summarise(frame, **options).to_dict("records")}


def test_summary_by_hand():
    rows = rows_of(small())
    assert len(rows) == 6  # two seeds are one row
    random, kara, recency = rows["random", "prompt-kept"], rows["kara", "prompt-kept"], rows["recency", "prompt-kept"]
    assert (random["n"], random["seeds"], random["score"]) == (20, "0 1", 0.4)
    assert math.isnan(random["difference"]) and random["gap"] == 0
    assert kara["difference"] == pytest.approx(0.3) and kara["difference_low"] > 0
    assert [kara[name] for name in ("common", "wins", "losses", "ties")] == [20, 6, 0, 14]
    assert kara["gap"] == pytest.approx(0.6) and rows["oracle", "prompt-kept"]["gap"] == 1
    assert kara["bytes_apart"] == pytest.approx(0.2)
    assert (kara["resident"], kara["held"], kara["peak"], kara["looped"]) == pytest.approx((0.3, 0.2, 0.4, 0.05))
    assert kara["evictable"] == pytest.approx(0.96)  # of 99 that are stored three windows of 32
    assert kara["tokens_per_second"] == 200 and kara["solved_per_minute"] == pytest.approx(84)
    assert recency["difference_high"] < 0 and recency["gap"] == pytest.approx(-0.8)
    for alone in (rows["full", "none"], rows["kara", "query-aware"]):
        assert all(math.isnan(alone[name]) for name in ("difference", "gap", "bytes_apart", "wins"))


def test_a_reference_without_a_rule_is_beside_every_cell():
    rows = rows_of(small(), reference="full")
    assert rows["kara", "prompt-kept"]["difference"] == pytest.approx(-0.3)
    assert rows["kara", "query-aware"]["common"] == 10
    assert math.isnan(rows["full", "none"]["difference"])
    assert math.isnan(rows["kara", "prompt-kept"]["bytes_apart"])
    with pytest.raises(ValueError, match="reference='snap' was not measured; choose one of full, kara, oracle"):
        summarise(small(), "snap")


def test_markdown_says_what_lost_and_where_it_comes_from():
    text = write.markdown(small(), title="A title")
    assert text.startswith("# A title\n")
    assert "Of 3 comparisons with random, 2 are above it, 1 below, and 0 are undecided" in text
    assert "In 1 of them the method held over 2 % more bytes." in text
    head = next(line for line in text.splitlines() if line.startswith("| budget"))
    assert "prompt kept: score, holds" in head and "prompt compressed, question known: score, holds" in head
    kara = next(line for line in text.splitlines() if line.startswith("| 25% | kara |"))
    assert "70.0% (48.1 to 85.5), 30.0% (+20.0%)" in kara and "**+30.0**" in kara and "6/0/14" in kara
    full = next(line for line in text.splitlines() if line.startswith("|  | full |"))
    assert full.count("100.0% (83.9 to 100.0), 100.0%") == 2  # beside both rules
    assert "**recency** scores below random in 1 of 1 comparisons" in text
    assert "-40.0 (-60.0 to -20.0) points; 0 won, 8 lost, 12 tied" in text
    assert "kara-hf evaluate --task trace:generated=300" in text and "torch 2.13.0" in text
    widths = {line.count(" | ") for line in text.splitlines() if line.startswith("| ")}
    assert len(widths) == 2  # both tables are whole


def test_what_has_no_rule_is_shown_once():
    """A full cache that was measured twice, in a run at equal bytes and in one at equal tokens."""
    full = {"method": "full", "rule": "none", "budget": 1.0}
    both = [small(), cell([1, 0], **full, equal="tokens"), cell([0, 1], equal="tokens")]
    [(_, panels)] = list(summary.Results(pd.concat(both, ignore_index=True), "random").tasks())
    shown = [
        (panel.rule, panel.equal, [row["score"] for row in panel.rows if row["method"] == "full"]) for panel in panels
    ]
    assert shown == [("prompt-kept", "bytes", [1.0]), ("prompt-kept", "tokens", [0.5]), ("query-aware", "bytes", [1.0])]


def test_nothing_lost_is_said():
    frame = small()
    assert "No method scores below random" in write.markdown(frame[frame["method"] != "recency"])


def test_page_is_whole(tmp_path):
    from plotly import graph_objects as go

    frame, folder = measured(40, rules=("prompt-kept", "query-agnostic"), budgets=(0.5, 0.125)), tmp_path / "new"
    shown, data = page(frame, folder, title="All")
    assert (folder / "report.md").read_text().startswith("# All")
    assert (folder / "report.html").stat().st_size < 4e6
    assert "http" not in shown and "src=" not in shown and "<link" not in shown
    assert re.findall(r"<h2 id='part\d'>([^<]+)", shown) == list(SECTIONS)
    assert sorted(re.findall(r"<div class='plot' id='(\w+)'", shown)) == sorted(data["figures"])
    # 3 tasks of 2 rules: accuracy, 3 panels of length and 3 of speed; one task has distances, at 2 budgets
    assert len(data["figures"]) == 3 * 2 * (1 + 3 + 3) + 2 * 2
    assert len({(colour, symbol) for colour, symbol, _ in data["styles"].values()}) == len(METHODS) + 2
    for drawn in data["figures"].values():
        layout = {name: value for name, value in drawn["layout"].items() if name != "front"}
        go.Figure(drawn["data"], layout)  # which refuses what plotly does not know
        assert {trace["name"] for trace in drawn["data"]} <= data["styles"].keys()
    accuracy = data["figures"]["figure0"]
    assert len(accuracy["data"]) == len(METHODS) + 2 + 1  # the line of the full cache
    assert accuracy["layout"]["front"][0]["x"] == sorted(accuracy["layout"]["front"][0]["x"])
    assert "gap closed" in accuracy["data"][-1]["hovertext"][0]


def test_front():
    rows = [
        {"method": method, "resident": resident, "score": score}
        for method, resident, score in [
            ("a", 0.5, 0.7),
            ("b", 0.25, 0.6),
            ("c", 0.25, 0.5),
            ("d", 0.4, 0.6),
            ("oracle", 0.1, 1.0),
            ("e", 0.1, 0.2),
        ]
    ]
    assert [row["method"] for row in figures._front(rows, "oracle")] == ["e", "b", "a"]


def test_curves_by_distance():
    far = [20] * 8 + [300] * 8
    frame = pd.concat(
        [
            cell([1] * 8 + [0] * 8, distance=far),
            cell([1] * 12 + [0] * 4, distance=far, method="kara"),
        ],
        ignore_index=True,
    )
    results = summary.Results(frame, "random")
    [(_, [panel])] = list(results.tasks())
    found, place, names = figures.bin_distances(panel, results)
    assert names == ["20", "300"]
    [(caption, drawn)] = list(figures.draw_curves(panel, results, found, place, names))
    assert caption == "budget 25%"
    assert {trace["name"]: trace["y"] for trace in drawn["data"]} == {"random": [1, 0], "kara": [1, 0.5]}
    assert figures.bin_distances(panel, summary.Results(frame.assign(distance=math.nan), "random")) is None


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>|`*{}'\""


@pytest.mark.parametrize("column", ["model", "weights", "task", "rule", "method", "equal"])
def test_what_comes_from_files_is_escaped(tmp_path, column):
    frame = small()
    frame.loc[frame["rule"] != "none", column] = HOSTILE
    hostile = PROVENANCE | {"command": HOSTILE, HOSTILE: HOSTILE}
    frame["provenance"] = [hostile] * len(frame)
    options = {"reference": HOSTILE if column == "method" else "random", "title": HOSTILE}
    shown, data = page(frame, tmp_path, **options)
    text = (tmp_path / "report.html").read_text()
    assert "<img" not in text and "alert(1)</script>" not in text and text.count("<script") == 3
    assert html.escape(HOSTILE) in shown
    assert "<img" not in json.dumps([trace["hovertext"] for d in data["figures"].values() for trace in d["data"][:1]])
    assert "<img" not in (tmp_path / "report.md").read_text()


def test_odd_results_are_shown(tmp_path):
    """One problem, nothing but the full cache, no time measured, two models, both kinds of equality."""
    page(cell([1.0]), tmp_path)
    page(cell([1.0], method="full", rule="none", budget=1.0), tmp_path, reference="full")
    shown, _ = page(
        pd.concat(
            [
                cell([0.0, 0.5], seconds=0.0),
                cell([0.0, 0.5], equal="tokens"),
                cell([0.0, 0.5], model="other", weights="77" * 8),
                cell([0.5, 0.5], model="other", weights="77" * 8, method="kara"),
            ],
            ignore_index=True,
        ),
        tmp_path,
    )
    assert "other (77777777), trace" in shown and "prompt kept, equal tokens" in shown
    assert "nan" not in shown.lower()


def test_without_plotly(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ImportError, match=r"pip install 'kara_hf\[evaluate\]'"):
        write.write(small(), tmp_path)


def test_import_stays_cheap():
    code = (
        "import sys, kara_hf, kara_hf.evaluation; assert not {'pandas', 'scipy', 'plotly'} & set(sys.modules); "
        "import kara_hf.evaluation.report.write; assert not {'plotly', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
