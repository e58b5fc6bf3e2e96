"""`kara-hf pod explore`."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.texts import write_texts
from typer.testing import CliRunner

import kara_hf
from kara_hf import PoDSharing
from kara_hf.bundled import BUNDLED_MODEL
from kara_hf.cli.app import app
from kara_hf.pod.explore import LayerSimilarity

SOURCE = Path(kara_hf.__file__).parents[1]
PROBLEMS = "problems:trace=0.5,fact=0.2,recall=0.3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("text"))


def invoke(*args):
    return CliRunner().invoke(app, ["pod", *map(str, args)], env={"COLUMNS": "120", "NO_COLOR": "1"})


def command(*args):
    result = invoke("explore", *args)
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


def refused(*args, code=2):
    result = invoke("explore", *args)
    assert result.exit_code == code, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    return line


def test_the_command_measures_groups_and_draws_and_groups_again(tmp_path):
    out, page, picture = tmp_path / "out", tmp_path / "it.html", tmp_path / "it.png"
    output = command("--out", out, "--samples", 2, "--length", 300, "--recent", 48, "--threshold", 0, "--plot", page)
    found, sharing = LayerSimilarity.load(out), PoDSharing.from_pretrained(out)
    assert sharing.lead == ((0,) * found.heads,) * found.layers and sharing.proximal == 64
    assert found.origin["data"] == PROBLEMS and found.tokens == (300, 300)
    assert "tiny_reasoner | 2 samples of 300 tokens" in output and f"Written to {out} and {page}" in output
    assert f"0-{found.layers - 1} │ {found.layers - 1} of {found.layers}" in output
    saved = [f"{sharing.saving(64 * times):.1%}" for times in (2, 4, 8, 16)]
    assert " │ ".join(saved) in output
    assert page.stat().st_size > 3_000_000

    again = tmp_path / "again"
    output = command("--from", out, "--out", again, "--saving", 0.1, "--at-tokens", 400, "--plot", picture)
    chosen = PoDSharing.from_pretrained(again)
    assert chosen == found.group_for(0.1, 400) and f"saves {chosen.saving(400):.1%} at 400 tokens; 10.0%" in output
    assert torch.equal(LayerSimilarity.load(again).similarity, found.similarity) and picture.exists()

    output = command("--from", out, "--compare", "prev", "--recent", 20, "--distant-query", "own", "--threshold", 1)
    rewritten = PoDSharing.from_pretrained(out)
    assert rewritten == found.group(1, compare="prev", recent=20, distant_query="own")
    assert "No layer shares. The most similar neighbours reach" in output
    command("--from", out, "--saving", 0.1)
    assert PoDSharing.from_pretrained(out).origin["at_tokens"] == 8 * 64


def test_the_command_takes_a_model_and_data(tmp_path, folder):
    options = ["--model", BUNDLED_MODEL, "--samples", 2, "--length", 90, "--device", "cpu", "--dtype", "bfloat16"]
    near = ["--region", "distant", "--sinks", 2, "--recent", 40, "--queries", 8, "--seed", 3]
    command("--data", folder, "--out", tmp_path, *options, *near)
    found = LayerSimilarity.load(tmp_path)
    assert (found.region, found.sinks, found.recent, found.queries) == ("distant", 2, 40, 8)
    assert found.origin.items() >= {"data": folder.name, "seed": 3, "dtype": "bfloat16"}.items()
    assert str(folder) not in (tmp_path / "similarity.json").read_text()


def test_mistakes_end_in_one_line(tmp_path, folder, monkeypatch):
    model = ["--model", BUNDLED_MODEL]
    assert "out is missing" in refused()
    assert "threshold=1.5" in refused("--out", tmp_path, "--threshold", 1.5)
    assert "saving=0.6" in refused("--out", tmp_path, "--saving", 0.6)
    assert "given without --threshold" in refused("--out", tmp_path, "--saving", 0.2, "--threshold", 0.2)
    assert "given with --saving" in refused("--out", tmp_path, "--at-tokens", 100)
    assert "compare='first'" in refused("--out", tmp_path, "--compare", "first")
    assert "distant_query='its'" in refused("--out", tmp_path, "--distant-query", "its")
    assert "recent=0" in refused("--out", tmp_path, "--recent", 0)
    assert "region='near'" in refused("--out", tmp_path, "--region", "near")
    assert "dtype='half'" in refused("--out", tmp_path, "--dtype", "half")
    assert "samples=0" in refused("--out", tmp_path, "--samples", 0)
    assert "--data TEXT" in refused("--out", tmp_path, *model)
    assert "words of its own problems" in refused("--out", tmp_path, "--data", folder)
    assert "at most the 4096 positions" in refused("--out", tmp_path, "--length", 5000)
    assert "too short" in refused("--out", tmp_path, *model, "--data", folder / "a.txt", "--length", 100)
    assert "is not there" in refused("--out", tmp_path, *model, "--data", "./nowhere", "--length", 99)
    assert "no similarity.safetensors" in refused("--from", tmp_path, code=1)
    assert "samples, length cannot be changed with --from" in refused("--from", tmp_path, "--length", 9, "--samples", 2)
    assert "must be a file name that ends in" in refused("--out", tmp_path, "--plot", tmp_path / "it.pdf")
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    both = refused("--out", tmp_path, *model, "--data", "some/text", "--plot", tmp_path / "it.html")
    assert "pip install 'kara_hf[plot]'" in both and "pip install 'kara_hf[train]'" in both
    assert not list(tmp_path.iterdir())
    short = ["--samples", 1, "--length", 200, "--recent", 180]
    assert "saving=0.4 is not possible" in refused("--out", tmp_path, *short, "--saving", 0.4, "--at-tokens", 250)
    assert (tmp_path / "similarity.json").exists()  # what was measured is not lost


def test_help_needs_no_torch():
    code = (
        "import sys; from kara_hf.cli.app import app; import contextlib\n"
        "with contextlib.suppress(SystemExit): app(['pod', 'explore', '--help'])\n"
        "print('loaded:', {'torch', 'transformers', 'numpy', 'datasets', 'plotly', 'matplotlib'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=SOURCE)
    assert "--from DIR" in result.stdout and "loaded: set()" in result.stdout
