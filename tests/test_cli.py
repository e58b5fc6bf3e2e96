"""The `kara-hf` command: what it shows, what it refuses and how, and that it is packaged whole and starts quickly."""

import io
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import kara_hf
from kara_hf import KaraConfig, cli
from kara_hf.display import Run, show_runs, survival
from kara_hf.evaluation import make_problem

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = ("triton", "peft", "gradio", "datasets", "accelerate")
PROBLEM = {"task": "trace", "split": "test", "generated": 100, "seed": 1}
SETTINGS = {"retention": 0.5, "window": 32, "recent": 16}


@pytest.fixture(autouse=True)
def short_problem(monkeypatch):
    monkeypatch.setattr(cli, "BUNDLED_PROBLEM", PROBLEM)
    monkeypatch.setattr(cli, "BUNDLED_SETTINGS", SETTINGS)


def invoke(*args, width=100):
    return CliRunner().invoke(cli.app, [str(arg) for arg in args], env={"COLUMNS": str(width), "NO_COLOR": "1"})


def generate(*args, width=100):
    result = invoke("generate", *args, width=width)
    assert result.exit_code == 0, result.output
    return result.stdout


def row(output, label):
    """The cells of one row of the table."""
    line = next(line for line in output.splitlines() if label in line)
    return [cell.strip() for cell in line.split("│")[2:-1]]


# -------------------------------------------------------------------------------------------------------- what it shows
def test_both_caches_are_compared_on_a_problem_with_a_known_answer():
    output = generate()
    problem = make_problem(**PROBLEM)
    assert "full cache" in output and "KaraCache" in output
    for cell in row(output, "answer"):
        assert cell == f"{problem.answer} right" or cell.endswith(f"wrong, it is {problem.answer}")
    full, kara = ([int(cell.split()[0]) for cell in row(output, label)] for label in ("tokens seen", "tokens kept"))
    assert full[0] == kara[0] > len(problem.prompt.split())
    assert kara[1] < full[1]
    assert all("KiB" in cell for label in ("resident KV", "peak KV") for cell in row(output, label))
    assert all(int(cell.replace(",", "")) > 0 for cell in row(output, "decoded tokens/s"))
    for label in ("prompt", "chunks", "open", "recent", "evicted"):
        assert f" {label} " in output.split("What KaraCache kept")[1]


@pytest.mark.parametrize(
    ("cache", "title", "other"), [("full", "full cache", "KaraCache"), ("kara", "KaraCache", "full")]
)
def test_one_cache_prints_its_text_and_its_figures(cache, title, other):
    output = generate("--cache", cache, "--max-new-tokens", 30)
    words = make_problem(**PROBLEM).completion.split()
    assert " ".join(words[:5]) in output
    assert title in output and other not in output
    assert row(output, "tokens generated") == ["30"]


def test_full_retention_changes_nothing():
    output = generate("--retention", 1)
    answers = row(output, "answer")
    assert answers[0] == answers[1]
    assert row(output, "tokens kept") == [row(output, "tokens kept")[0]] * 2
    assert "evicted" not in output


def test_stream_prints_the_text_of_each_run_once():
    output = generate("--stream", "--max-new-tokens", 12)
    start = " ".join(make_problem(**PROBLEM).completion.split()[:5])
    assert output.count(start) == 2
    assert output.index("--- full cache") < output.index(start) < output.index("--- KaraCache")


def test_a_prompt_of_ones_own_has_no_right_answer():
    output = generate("ba : 3 ; ce : 4 ; di : ba + ce ; ? ba di >", "--max-new-tokens", 40)
    assert "right" not in output and "wrong" not in output
    assert len(row(output, "text")) == 2


def test_a_folder_is_a_model(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for file in cli.BUNDLED_MODEL.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    output = generate(
        "ba : 3 ; ? ba ba >", "--model", folder, "--dtype", "bfloat16", "--device", "cpu", "--max-new-tokens", 4
    )
    assert "mine | prompt of 8 tokens | window 256, retention 0.25, recent 32, bidirectional" in output


def test_settings_reach_the_cache():
    options = {"window": 16, "recent": 0, "retention": 0.25, "score": "random", "anchor-share": 1, "block-size": 8}
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    output = generate(*arguments, "--seed", 3, "--compress-prompt", "--max-new-tokens", 15, "--cache", "kara")
    assert "window 16, retention 0.25, recent 0, random" in output
    seen, kept = (int(row(output, label)[0].split()[0]) for label in ("tokens seen", "tokens kept"))
    assert kept == seen // 16 * 4 + seen % 16


def test_the_chat_template_is_applied_unless_refused(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(cli.BUNDLED_MODEL)
    tokenizer.chat_template = "{{ messages[0]['content'] }} ; >"
    for file in cli.BUNDLED_MODEL.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer.save_pretrained(tmp_path)
    arguments = ["ba : 3", "--model", tmp_path, "--max-new-tokens", 2]
    assert "prompt of 5 tokens" in generate(*arguments)
    assert "prompt of 3 tokens" in generate(*arguments, "--no-chat")


# ------------------------------------------------------------------------------------------------------ what it refuses
CUDA = [] if torch.cuda.is_available() else [(["--device", "cuda"], 2, ["'cuda'", "sees cpu"])]
REFUSED = [
    (["--retention", "1.5"], 2, ["retention=1.5", "(0, 1]"]),
    (["--window", "100"], 2, ["window=100", "multiple of block_size=16"]),
    (["--recent", "-1"], 2, ["recent=-1", "from 0 on"]),
    (["--anchor-share", "0"], 2, ["anchor_share=0", "(0, 1]"]),
    (["--block-size", "0"], 2, ["block_size=0", "from 1 on"]),
    (["--score", "best"], 2, ["'best'", "bidirectional", "recency"]),
    (["--cache", "half"], 2, ["'half'", "full or kara"]),
    (["--dtype", "int3"], 2, ["'int3'", "float32", "bfloat16"]),
    (["--device", "toaster"], 2, ["'toaster'", "sees cpu"]),
    (["--device", "meta"], 2, ["'meta'", "sees cpu"]),
    *CUDA,
    (["--max-new-tokens", "0"], 2, ["max_new_tokens=0", "1 or more"]),
    (["--max-new-tokens", "9999"], 2, ["max_new_tokens=9999", "4096 positions", "shorten"]),
    (["--max-bytes", "7"], 2, ["max_bytes=7", "at least one block"]),
    (["--max-bytes", "100000"], 1, ["max_bytes=100000", "lower retention"]),
    ([""], 2, ["prompt=''", "some text"]),
    ([" \n"], 2, ["prompt=' \\n'", "some text"]),
    (["Why is the sky blue?"], 2, ["bundled model", "--model"]),
    (["--model", "somebody/something"], 2, ["--model somebody/something", "text"]),
    (["ba", "--model", "./nowhere"], 2, ["'./nowhere'", "folder of a saved model"]),
    (["ba", "--model", str(ROOT / "tests")], 2, ["tests'", "config.json"]),
]


@pytest.mark.parametrize(("arguments", "code", "parts"), REFUSED, ids=lambda value: str(value)[:40])
def test_mistakes_end_in_one_line_that_names_value_and_remedy(arguments, code, parts):
    result = invoke("generate", *arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert isinstance(result.exception, SystemExit)
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error: ")
    for part in parts:
        assert part in lines[0]


def test_a_model_that_cannot_be_loaded_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    result = invoke("generate", "ba", "--model", tmp_path)
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert str(tmp_path) in result.stderr and "give a hub id or the folder of a causal LM" in result.stderr


def test_an_unknown_option_or_a_word_for_a_number_prints_the_usage():
    for arguments, part in ((["--retain", "1"], "--retain"), (["--window", "wide"], "--window")):
        result = invoke("generate", *arguments)
        assert result.exit_code == 2 and part in result.stderr and "Traceback" not in result.stderr


# -------------------------------------------------------------------------------------------------------------- display
def some_run(rows, seen):
    return Run("KaraCache", "text", 1, None, seen, [2, 4], 100, 300, 300, rows=rows)


def test_survival_is_the_share_of_rows_that_keep_a_position():
    rows = [[(0, 2, "prompt"), (3, 4, "sealed")], [(0, 2, "prompt"), (2, 4, "sealed"), (4, 5, "recent")]]
    shares = survival(rows, 5)
    assert shares["prompt"] == [1, 1, 0, 0, 0]
    assert shares["sealed"] == [0, 0, 0.5, 1, 0]
    assert shares["recent"] == [0, 0, 0, 0, 0.5]


@pytest.mark.parametrize(("encoding", "strip"), [("utf-8", "██▒▓·░#"), ("ascii", "PP+*.-#")])
def test_the_strip_needs_neither_colour_nor_unicode(encoding, strip):
    spans = [(0, 2, "prompt"), (3, 4, "sealed"), (6, 7, "recent")]
    rows = [[*spans[:1], (2, 4, "sealed"), *spans[2:]], [*spans[:1], (2, 4, "sealed"), *spans[2:]], spans, spans]
    rows[0].insert(2, (5, 6, "sealed"))
    buffer = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    show_runs(Console(file=buffer, width=60, no_color=True), [some_run(rows, 7)], "title")
    buffer.seek(0)
    assert f"\n{strip}\n" in buffer.read()


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_long_strip_takes_few_lines_of_the_terminal(width):
    file = io.StringIO()
    rows = [[(0, 1000, "prompt"), (19_000, 20_000, "recent")]]
    show_runs(Console(file=file, width=width), [some_run(rows, 20_000)], "title")
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert 1 <= sum(set(line) <= set("█·#") for line in lines if line) <= 3


# --------------------------------------------------------------------------------------------------- help and packaging
def test_help_explains_every_option():
    text = " ".join(invoke("generate", "--help").stdout.split())
    for option in (
        *(
            "--model",
            "--cache",
            "--retention",
            "--window",
            "--recent",
            "--score",
            "--anchor-share",
            "--compress-prompt",
        ),
        *("--block-size", "--seed", "--max-bytes", "--max-new-tokens", "--device", "--dtype", "--stream", "--no-chat"),
        *("--trust-remote-code",),
    ):
        assert option in text
    for field in fields(KaraConfig):
        if field.name != "compress_prompt":
            assert f"[default: {field.default}" in text.split(f"--{field.name.replace('_', '-')} ")[1].split(" --")[0]


def test_version():
    result = invoke("--version")
    assert result.exit_code == 0 and result.stdout.startswith("kara-hf")


def python(code):
    """What a fresh interpreter prints."""
    path = str(Path(kara_hf.__file__).parents[1])
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r})\n{code}"]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.strip()


def test_importing_needs_no_optional_package():
    code = (
        f"sys.modules.update(dict.fromkeys({OPTIONAL!r})); import kara_hf, kara_hf.cli, kara_hf.runner; print('done')"
    )
    assert python(code) == "done"


def test_the_command_itself_starts_without_torch_and_quickly():
    start = time.perf_counter()
    assert python("import kara_hf.cli; print({'torch', 'transformers'} & set(sys.modules))") == "set()"
    assert time.perf_counter() - start < 5


def test_python_m_is_the_command():
    code = "import runpy; sys.argv[1:] = ['--help']; runpy.run_module('kara_hf.__main__', run_name='__main__')"
    assert "Usage: kara-hf" in python(code)


def test_a_wheel_holds_the_model_and_the_licence(tmp_path):
    pytest.importorskip("setuptools", minversion="77", reason="a wheel is built with setuptools 77 or newer")
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (copy / name).write_bytes((ROOT / name).read_bytes())
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", *options, str(copy)], check=True, timeout=120)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    for file in cli.BUNDLED_MODEL.iterdir():
        assert f"kara_hf/assets/tiny_reasoner/{file.name}" in names
    assert "kara_hf/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
