"""`examples/kept_map.py`: what it shows and writes is what the cache holds."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.marks import slow
from typer.testing import CliRunner

import kara_hf
from kara_hf import KVCompressCache
from kara_hf.integration.generation import for_generate
from kara_hf.tasks.reasoner import make_problem

EXAMPLE = Path(__file__).parents[2] / "examples" / "kept_map.py"


def load_example():
    spec = importlib.util.spec_from_file_location("kept_map", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["kept_map"] = module  # where dataclasses look for the names in their annotations
    spec.loader.exec_module(module)
    return module


kept_map = load_example()


@pytest.fixture(scope="module")
def run():
    """The cache after the problem that the example solves, the prompt's length, and the text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(kept_map.BUNDLED_MODEL)
    model = AutoModelForCausalLM.from_pretrained(kept_map.BUNDLED_MODEL).eval()
    cache = KVCompressCache(model, retention=kept_map.RETENTION)
    inputs = tokenizer(make_problem(**kept_map.BUNDLED_PROBLEM).prompt, return_tensors="pt")
    ids = model.generate(**inputs, **for_generate(cache), max_new_tokens=64, do_sample=False)
    length = inputs["input_ids"].shape[1]
    return cache, length, tokenizer.decode(ids[0, length:], skip_special_tokens=True)


def invoke(*args):
    import typer

    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(kept_map.main)
    return CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "100", "NO_COLOR": "1"})


def error(*args):
    result = invoke(*args)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    return line


def in_an_interpreter_of_its_own(page):
    """What it prints; neither library is loaded before it is needed."""
    code = (
        f"import sys, runpy; runpy.run_path({str(EXAMPLE)!r}); print({{'plotly', 'matplotlib'}} & set(sys.modules)); "
        f"sys.argv = ['it', '--out', {str(page)!r}]; runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    )
    env = {"PYTHONPATH": str(Path(kara_hf.__file__).parents[1]), "COLUMNS": "200"}
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=200, env=env
    )
    assert result.stdout.startswith("set()\n")
    return result.stdout


@pytest.mark.parametrize("as_a_program", [False, slow(True)])
def test_it_shows_what_is_kept_and_writes_a_page(run, tmp_path, as_a_program):
    cache, _, text = run
    page = tmp_path / "kept.html"
    output = in_an_interpreter_of_its_own(page) if as_a_program else invoke("--out", page).stdout
    assert text.strip() in output and "(right)" in output
    lines = [line.split() for line in output.split("mean\n")[1].splitlines()]
    shown = [[int(cell) for cell in cells[1:-1]] for cells in lines if cells[0].isdigit()]
    assert shown == cache.report().kept[:, 0].tolist()

    page = page.read_text()
    assert "What KV-Compress keeps of 512 tokens of tiny_reasoner" in page
    assert "Tokens kept by each KV head" in page and "Which positions survive" in page
    assert "Plotly.newPlot" in page and len(page) > 3_000_000  # the library is inside
    assert not re.search(r"<(script|link|img)[^>]*(src|href)=", page)


def test_a_picture_has_the_size_of_a_screen(tmp_path):
    from matplotlib.image import imread

    out = tmp_path / "kept.png"
    result = invoke("--out", out, "--max-cache-tokens", 96)
    assert result.exit_code == 0 and f"Written to {out}" in " ".join(result.stdout.split())
    picture = imread(out)
    assert picture.shape[:2] == (800, 1280)
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 20


def test_the_map_is_what_the_cache_holds(run):
    cache, length, _ = run
    report = cache.report()
    drawn = kept_map.map_of(cache, "it", length)
    assert (drawn.counts == report.kept[:, 0].numpy()).all()
    assert (drawn.seen, drawn.prompt, drawn.stretch, drawn.layers) == (int(report.seen[0]), length, 1, [0, 1, 2, 3])
    for number, name in enumerate(drawn.rows):
        layer, head = map(int, name.split(" / "))
        assert np.flatnonzero(drawn.survival[number]).tolist() == cache.kept_positions(layer, 0, head).tolist()
    assert f"{report.resident_bytes / 1024:,.0f} KiB resident" in drawn.subtitle


def test_a_long_sequence_is_drawn_in_stretches(run, monkeypatch):
    cache, length, _ = run
    monkeypatch.setattr(kept_map, "MOST_COLUMNS", 100)
    drawn = kept_map.map_of(cache, "it", length)
    assert drawn.stretch == 6 and drawn.survival.shape == (8, -(-drawn.seen // 6))
    positions = cache.kept_positions(2, 0, 1)
    assert drawn.survival[5, 10] == ((positions >= 60) & (positions < 66)).sum() / 6
    assert drawn.survival[:, -1].tolist() == [1] * 8  # the newest, a shorter stretch


@pytest.mark.parametrize("suffix", [".html", slow(".png")])
def test_a_large_model_fits(suffix, tmp_path):
    rows = np.linspace(0, 1, 60 * 8 * 50).reshape(60 * 8, 50)
    counts = np.arange(60 * 8, dtype=float).reshape(60, 8)
    counts[3, 4:] = rows[28:32] = np.nan
    drawn = kept_map.Map("title & more", "sub", list(range(60)), counts, rows, 100, 5000, 4000, ((0, 900),))
    assert not drawn.numbered and len(drawn.named[0]) <= kept_map.MOST_NAMES
    out = tmp_path / f"large{suffix}"
    kept_map.find_writer(out)(drawn, out)
    assert out.stat().st_size > 10_000
    assert suffix == ".png" or "<title>title &amp; more</title>" in out.read_text()


def test_what_is_pinned_is_shown(tmp_path):
    page = tmp_path / "kept.html"
    result = invoke("--out", page, "--max-new-tokens", 1, "--max-cache-tokens", 128, "--pin", "20:60, 300:320")
    assert result.exit_code == 0, result.output
    assert "red is pinned" in page.read_text() and page.read_text().count(kept_map.PINNED) == 2
    assert "pin='20-60'" in error("--out", page, "--pin", "20-60")


def test_a_prompt_alone_is_cut_too(tmp_path):
    result = invoke("--out", tmp_path / "kept.png", "--max-new-tokens", 1)
    assert result.exit_code == 0, result.output
    assert "keeps of 491 tokens" in result.stdout
    assert int(re.search(r"\((\d+)%\)", result.stdout)[1]) < 50


@pytest.mark.parametrize(("library", "name"), [("plotly", "kept.html"), ("matplotlib", "kept.png")])
def test_a_missing_library_is_named_with_its_remedy(library, name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    assert error("--out", tmp_path / name).endswith(f"need {library}, which is not there; pip install {library}")


def test_mistakes_end_in_one_line(tmp_path):
    png = tmp_path / "kept.png"
    assert "must end in .html or .png" in error("--out", tmp_path / "kept.pdf")
    assert "no folder" in error("--out", tmp_path / "nowhere" / "kept.png")
    assert "exactly one" in error("--out", png, "--retention", 0.5, "--max-cache-tokens", 128)
    assert "retention=7.0" in error("--out", png, "--retention", 7)
    assert "prompt is missing" in error("--out", png, "--model", kept_map.BUNDLED_MODEL)
    assert "prompt is empty" in error("--out", png, "--prompt", "")
    assert "words of its own problems" in error("--out", png, "--prompt", "Why is the sky blue?")
    assert "nowhere" in error("--out", png, "--model", str(tmp_path / "nowhere"), "--prompt", "hello")
    assert not png.exists()
