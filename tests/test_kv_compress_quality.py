"""The benchmark of what KV-Compress keeps: a small run of all of it, its tables, and the rows that are committed."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def quality(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import kv_compress_quality

    return kv_compress_quality


@pytest.fixture
def tables(quality):
    import kv_compress_tables

    return kv_compress_tables


@pytest.fixture
def bundled(quality):
    tokenizer = AutoTokenizer.from_pretrained(quality.ASSETS)
    return AutoModelForCausalLM.from_pretrained(quality.ASSETS, dtype=torch.float32).eval(), tokenizer


def start(quality, out, **options):
    quality.main(**{"n": 2, "batch": 2, "smoke": True, "out": out} | options)
    return json.loads(out.read_text())


def test_a_small_run(quality, tables, tmp_path, monkeypatch):
    out, weights = tmp_path / "rows.json", quality.digest(quality.ASSETS)
    rows = start(quality, out)
    wanted = [(case.name, rule, method, share) for case, rule, method, share in quality.cells(quality.SMOKE)]
    assert [(row["problems"], row["rule"], row["method"], row["nominal"]) for row in rows] == wanted
    control = {(row["problems"], row["rule"]): row for row in rows if row["method"] == tables.CONTROL}
    for row in rows:
        assert row["weights"] == weights and {"command", "device", "versions", "date"} <= set(row)
        scores = [float(value) for value in row["scores"].split()]
        assert len(scores) == 2 and row["score"] == pytest.approx(sum(scores) / 2, abs=1e-3)
        assert 0 <= row["truncated"] <= 1 <= row["mean_generated"]
        if row["method"] == tables.FULL:
            assert row["resident_bytes"] == row["full_bytes"] and row["settings"] is None
            continue
        assert row["max_cache_tokens"] <= row["settings"]["max_cache_tokens"]
        assert 0 < row["resident_bytes"] < row["full_bytes"]
        allowed = (1 + tables.UNEQUAL) * control[row["problems"], row["rule"]]["resident_bytes"]
        at_least = row["max_cache_tokens"] == quality.least_tokens(row["settings"])
        assert row["resident_bytes"] <= allowed or at_least
    text = out.with_suffix(".md").read_text()
    assert tables.markdown(rows, weights) in text and tables.summary(rows, weights) in text

    measured = []
    monkeypatch.setattr(quality, "run", lambda *args: measured.append(args) or dict(rows[1]))
    assert start(quality, out) == rows and not measured, "what is there is not measured again"
    assert len(start(quality, out, only="fact", again=True)) == len(rows)
    assert len(measured) == sum(name == "fact" for name, *_ in wanted)
    start(quality, out, only="fact", first_seed=1)
    assert len(measured) == 2 * sum(name == "fact" for name, *_ in wanted), "other problems are"
    with pytest.raises(ValueError, match="--out of its own"):
        quality.main(smoke=True)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_question_that_comes_later_is_the_same_problem(quality, bundled, index):
    """Nothing evicted, the answers are those to the whole prompt, though questions of other lengths are padded."""
    problems = quality.SMOKE[index].problems(4, 7)
    answers = [
        [text.split("<eos>")[0] for text in quality.solve(*bundled, problems, rule, settings)[0]]
        for rule in ("before", "after")
        for settings in (None, {"retention": 1.0})
    ]
    assert answers[0] == answers[1] == answers[2] == answers[3]


def test_problems_are_of_their_kind(quality):
    for case in quality.CASES[:3]:
        problems = case.problems(6, 0)
        few, most = case.keys
        assert all(few <= len(quality.facts(problem.completion)) <= most for problem in problems)
        assert len({problem.seed for problem in problems}) == 6
    assert [case.name for case in quality.CASES[:3]] == ["recall, 1 key", "recall, 2 to 4 keys", "survey, 5 to 8 keys"]


def test_scores(quality):
    survey = quality.SMOKE[1].problems(1, 0)[0]
    first, *others = survey.completion.removeprefix("ans ").split(" ; ")
    assert quality.score(survey, survey.completion + " <eos> <pad>") == 1
    assert quality.score(survey, f"ans {first} ; {first} ; <eos>") == 1 / (1 + len(others))
    assert quality.score(survey, "ans <eos>") == quality.score(survey, "") == 0
    recall = quality.SMOKE[0].problems(1, 0)[0]
    assert quality.score(recall, recall.completion) == 1 and quality.score(recall, recall.completion + " ;") == 0


def test_a_budget_is_lowered_until_the_bytes_fit(quality, monkeypatch):
    tried = []

    def run(model, tokenizer, problems, rule, settings, batch):
        tried.append(settings["max_cache_tokens"])
        return {"resident_bytes": 10 * tried[-1] + 9}

    monkeypatch.setattr(quality, "run", run)

    def lowered(most, least):
        tried.clear()
        quality.run_within(most, least, None, None, [], "before", {"max_cache_tokens": 48}, 1)
        return tried

    assert lowered(500, 16) == [48]
    assert lowered(480, 16) == [48, 47]
    assert lowered(400, 16) == [48, 39]
    assert lowered(30, 16) == [48, 16]


def test_comparing(tables):
    def row(scores):
        return {"scores": scores, "n": len(scores.split())}

    same = row(" ".join("01" * 50))
    assert tables.compare(same, same) == (0, 0, 0, 0, 0)
    better = row(" ".join("11" * 30 + "01" * 20))
    mean, low, high, wins, losses = tables.compare(better, same)
    assert (mean, wins, losses) == (0.3, 30, 0) and 0.2 < low < 0.3 < high < 0.4
    assert tables.compare(same, better)[1:3] == (-high, -low)
    half = row(" ".join(["0.5"] * 100))
    mean, low, high, wins, losses = tables.compare(half, same)
    assert (mean, wins, losses) == (0, 50, 50) and low == pytest.approx(-high, abs=0.01) and high > 0.05


def test_the_committed_rows(quality, tables):
    rows = quality.load_rows(quality.RESULTS)
    weights = quality.digest(quality.ASSETS)
    wanted = {(case.name, rule, method, share) for case, rule, method, share in quality.cells(quality.CASES)}
    assert {(row["problems"], row["rule"], row["method"], row["nominal"]) for row in rows} == wanted
    assert all(row["weights"] == weights and row["n"] >= 200 == len(row["scores"].split()) for row in rows)
    text = quality.RESULTS.with_suffix(".md").read_text()
    assert tables.summary(rows, weights) in text and tables.markdown(rows, weights) in text
    lines = tables.markdown(rows, weights).splitlines()
    cells = sum(len(shares) for case in quality.CASES for shares in case.budgets.values())
    assert sum(line.startswith("|") for line in lines) == 2 * (cells + 2)
    assert tables.markdown(rows, "other weights") == tables.summary([], weights) == "Not measured on these weights."
    assert len(tables.markdown(rows[:-1], weights).splitlines()) < len(lines), (
        "a cell that is not complete is not shown"
    )
