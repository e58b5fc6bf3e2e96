"""The evidence that is committed: of the bundled weights, complete, and shown as it was measured."""

from pathlib import Path

import pytest

from kara_hf.bundled import BUNDLED_MODEL
from kara_hf.evaluation.measure.provenance import digest
from kara_hf.evaluation.measure.results import load

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def frame():
    return load(ROOT / "benchmarks" / "results" / "evidence.json.gz")


def test_results_are_of_the_bundled_model_and_whole(frame):
    assert set(frame["weights"]) == {digest(BUNDLED_MODEL)}
    counts = frame.groupby(["task", "rule", "method", "budget"]).size()
    assert (counts >= 200).all(), counts[counts < 200]
    assert {"command", "device", "versions", "date"} <= set(frame["provenance"].iloc[0])


def test_the_page_shows_the_results(frame, monkeypatch):
    """One of its tables is made again; all of them stand where the page has a place for them."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import evidence

    from kara_hf.evaluation.report.statistics import summarise

    page = (ROOT / "docs" / "evidence.md").read_text("utf-8")
    part = frame[(frame["task"] == "copy:length=384") & frame["rule"].isin(["none", "query-agnostic"])]
    tables = evidence.blocks(summarise(part))
    assert evidence.write(page, {f"{task} {rule}": text for (task, rule), text in tables.items()}) == page
    assert evidence.write(page, {"origin": evidence.origin(frame)}) == page
    for task, rule in frame.loc[frame["rule"] != "none", ["task", "rule"]].drop_duplicates().itertuples(index=False):
        assert f"<!-- {task} {rule} -->\n| method |" in page
    with pytest.raises(ValueError, match="no place for 'nothing'"):
        evidence.write(page, {"nothing": ""})


@pytest.mark.parametrize("name", ["kvpress_tasks", "calibration_narrow"])
def test_what_stands_beside_is_whole_and_shown(name, frame, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import evidence

    from kara_hf.evaluation.report.statistics import summarise

    found = load(ROOT / "benchmarks" / "results" / f"{name}.json.gz")
    assert set(found["weights"]) == {digest(BUNDLED_MODEL)}
    assert (found.groupby(["task", "rule", "method", "budget"]).size() >= 200).all()
    page = (ROOT / "docs" / "evidence.md").read_text("utf-8")
    if name == "kvpress_tasks":
        tables = {f"kvpress {task} {rule}": text for (task, rule), text in evidence.blocks(summarise(found)).items()}
        assert len(tables) == 5 and any("kvpress AdaKV(SnapKV)" in text for text in tables.values())
        shown = tables | {"kvpress": evidence.origin(found)}
    else:
        assert "--calibration" in found["provenance"].iloc[0]["command"]
        shown = {"narrow": evidence.narrow(frame, found)}
    assert evidence.write(page, shown) == page
