"""The benchmark of serving runs, and its numbers are those in the documentation."""

import re
from pathlib import Path

import pytest
import transformers
from packaging.version import Version
from typer.testing import CliRunner

from kara_hf.serving.seams import LEAST_TRANSFORMERS

if Version(transformers.__version__) < Version(LEAST_TRANSFORMERS):
    pytest.skip(f"serving needs Transformers {LEAST_TRANSFORMERS}", allow_module_level=True)

ROOT = Path(__file__).parents[1]


@pytest.fixture
def serving(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import serving

    return serving


@pytest.mark.parametrize("arguments", [[], ["--short"]])
def test_the_engine_alone_and_with_kara(serving, tmp_path, arguments):
    out = tmp_path / "rows.json"
    sizes = ["--n", "4", "--sequences", "2", "--generated", "120", "--out", str(out)]
    for only in ("engine alone", "key-norm, 25 %, windows of 32"):
        result = CliRunner().invoke(serving.app, ["measure", *arguments, *sizes, "--only", only])
        assert result.exit_code == 0, result.output + repr(result.exception)
    rows = {row["method"]: row for row in serving.load_rows(out)}
    alone, kara = rows["engine alone"], rows["key-norm, 25 %, windows of 32"]
    assert alone["errors"] == kara["errors"] == 0 and kara["windows"] > 0 == alone["windows"]
    assert kara["steps"] < alone["steps"] and kara["mean_running"] > alone["mean_running"]
    assert alone["blocks"] == kara["blocks"] and alone["tokens"] > 4 * 100
    table = serving.markdown(serving.load_rows(out), "short prompts" if arguments else "traces")
    assert table.count("\n| ") == 4 and f"| engine alone | {alone['steps']} (1.00) |" in table


@pytest.mark.parametrize("requests", ["traces", "short prompts"])
def test_the_tables_are_the_measured_ones(serving, requests):
    text = (ROOT / "docs" / "serving.md").read_text()
    (shown,) = re.findall(rf"<!-- {requests} -->\n(.*?)\n<!-- end -->", text, flags=re.S)
    assert shown == serving.markdown(serving.load_rows(serving.RESULTS), requests)
