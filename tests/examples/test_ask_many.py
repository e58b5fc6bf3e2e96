"""`examples/ask_many.py`: questions that are asked together are answered as each is alone."""

import runpy
from pathlib import Path

import typer
from typer.testing import CliRunner

from kara_hf.bundled import BUNDLED_MODEL
from kara_hf.integration.loading import LoadedModel

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "ask_many.py"))


def test_questions_are_answered_together_as_alone(tmp_path):
    app = typer.Typer()
    app.command()(EXAMPLE["main"])
    out = tmp_path / "text.safetensors"
    result = CliRunner().invoke(app, ["--out", str(out), "--max-new-tokens", "12"])
    assert result.exit_code == 0, result.output
    loaded = LoadedModel(str(BUNDLED_MODEL), device="cpu")
    alone = [EXAMPLE["ask"](loaded, [question], out, 12) for question in EXAMPLE["QUESTIONS"]]
    assert result.stdout.splitlines()[1::2] == [f"    {answer}" for (answer,) in alone]
    assert len({answer for (answer,) in alone}) == len(alone)
