"""The benchmark of serving: the engine alone and with Kara serve the same requests."""

import pytest
import transformers
from packaging.version import Version
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.common.rows import load_rows
from kara_hf.serving.seams import LEAST_TRANSFORMERS

if Version(transformers.__version__) < Version(LEAST_TRANSFORMERS):
    pytest.skip(f"serving needs Transformers {LEAST_TRANSFORMERS}", allow_module_level=True)


def test_the_engine_alone_and_with_kara(tmp_path):
    out = tmp_path / "rows.json"
    done = CliRunner().invoke(app, ["run", "serving", "--smoke", "--out", str(out)])
    assert done.exit_code == 0, done.output
    alone, kara = load_rows(out)
    assert [row["method"] for row in (alone, kara)] == ["engine alone", "key-difference, 25 %, windows of 32"]
    assert alone["tokens"] == kara["tokens"] == 4 * 104 and alone["blocks"] == kara["blocks"]
    assert kara["windows"] > 0 == alone["windows"]
    assert kara["steps"] < alone["steps"] and kara["running"] > alone["running"]
    assert f"| 16 + 104 | engine alone | {alone['steps']} | " in done.output


def test_a_conversation_reads_less_where_its_past_is_remembered(tmp_path):
    out = tmp_path / "rows.json"
    done = CliRunner().invoke(app, ["run", "turns", "--smoke", "--out", str(out)])
    assert done.exit_code == 0, done.output
    alone, forgetful, kara = load_rows(out)
    assert kara["read"] == 2 * (8 + 1) <= forgetful["read"] / 3
    assert alone["read"] < forgetful["read"]


def test_whole_requests_are_answered_and_graded(tmp_path):
    out = tmp_path / "rows.json"
    done = CliRunner().invoke(app, ["run", "workloads", "--smoke", "--out", str(out)])
    assert done.exit_code == 0, done.output
    alone, kara = load_rows(out)
    assert alone["blocks"] == kara["blocks"] and alone["prompt_tokens"] == kara["prompt_tokens"]
    assert alone["right"] == 1 and alone["difference"] == 0 and kara["difference"] == kara["right"] - alone["right"]
    for row in (alone, kara):
        assert 0 < row["between_50"] <= row["first_50"] <= row["first_99"] < row["seconds"]
