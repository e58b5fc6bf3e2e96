"""The `kara-hf` command: what it shows, what it refuses and how, and that it starts quickly."""

import inspect
import io
import re
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import kara_hf
from kara_hf import CacheReport, KaraConfig, KVCompressCache, KVCompressConfig
from kara_hf.bundled import BUNDLED_MODEL
from kara_hf.cli import app as cli
from kara_hf.cli import generate as generating
from kara_hf.cli.display import CacheRun, kept_table, show_runs, survival
from kara_hf.tasks.reasoner import make_problem

ROOT = Path(__file__).resolve().parents[2]
PROBLEM = {"task": "trace", "split": "test", "generated": 100, "seed": 1}
PUBLISHED = {"protected": 32, "votes": "sum", "levels": None}
SETTINGS = {"retention": 0.5, "window": 32, "recent": 16, **PUBLISHED}


@pytest.fixture(autouse=True)
def short_problem(monkeypatch):
    monkeypatch.setattr(generating, "BUNDLED_PROBLEM", PROBLEM)
    monkeypatch.setattr(generating, "BUNDLED_SETTINGS", SETTINGS)


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
    for label in ("prompt", "survived", "open", "recent", "evicted"):
        assert f" {label} " in output.split("What KaraCache kept")[1]


TITLES = {"full": "full cache", "kara": "KaraCache", "kv-compress": "KVCompressCache"}


@pytest.mark.parametrize("cache", TITLES)
def test_one_cache_prints_its_text_and_its_figures(cache):
    output = generate("--cache", cache, "--max-new-tokens", 30)
    words = make_problem(**PROBLEM).completion.split()
    assert words[0] in output.split("tiny_reasoner")[0].split()
    if cache != "kv-compress":  # which drops some of the prompt
        assert " ".join(words[:5]) in output
    (heading,) = (line for line in output.splitlines() if line.startswith("┃"))
    assert heading.split("┃")[2].strip() == TITLES[cache]
    assert [title for title in TITLES.values() if f"What {title} kept" in output] == [TITLES[cache]] * (cache != "full")
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
    for file in BUNDLED_MODEL.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    output = generate(
        "ba : 3 ; ? ba ba >", "--model", folder, "--dtype", "bfloat16", "--device", "cpu", "--max-new-tokens", 4
    )
    assert "mine | prompt of 8 tokens\nKaraCache: window 128, retention 0.25, recent 0.5, blend" in output
    output = generate("--model", folder, "--max-new-tokens", 4)  # what is asked where nothing is said
    assert len(row(output, "text")) == 2 and re.search(r"mine \| prompt of [1-4]\d tokens", output)


def test_settings_reach_the_cache():
    options = {"window": 16, "recent": 0, "retention": 0.25, "score": "random", "anchor-share": 1, "block-size": 8}
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    output = generate(*arguments, "--seed", 3, "--compress-prompt", "--max-new-tokens", 15, "--cache", "kara")
    assert "window 16, retention 0.25, recent 0, random" in output
    seen, kept = (int(row(output, label)[0].split()[0]) for label in ("tokens seen", "tokens kept"))
    assert kept == seen // 16 * 4 + seen % 16


def test_a_prompt_in_chunks_holds_less():
    arguments = ("--cache", "kv-compress", "--max-cache-tokens", 24, "--block-size", 4, "--max-new-tokens", 4)
    arguments += ("--protected", 8, "--observation", 4)
    whole, chunks = generate(*arguments), generate(*arguments, "--prefill-chunk", 16)
    assert "read in chunks of 16" in " ".join(chunks.split()) and "read in" not in whole
    peaks = [float(row(output, "peak KV")[0].split()[0]) for output in (whole, chunks)]
    assert peaks[1] < 0.8 * peaks[0]


def direct_run(**settings):
    """What a KVCompressCache holds after the problem that the command solves."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL).eval()
    cache, problem = KVCompressCache(model, **PUBLISHED | settings), make_problem(**PROBLEM)
    inputs = tokenizer(problem.prompt, return_tensors="pt")
    tokens = int(generating.SOLUTION_ALLOWANCE * len(problem.completion.split()))
    ids = model.generate(**inputs, past_key_values=cache, max_new_tokens=tokens, do_sample=False)
    text = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return cache.report(), problem.grade(text)


def map_rows(output):
    """The numbers of the heat map: for each layer those of its heads."""
    lines = [line.split() for line in output.split(" kept:\n")[1].splitlines()]
    return [[int(cell.replace(",", "")) for cell in cells[1:-1]] for cells in lines if cells[0].isdigit()]


def numbers(output, label):
    """The first number of each cell of a row of the table."""
    return [int(cell.split()[0].replace(",", "")) for cell in row(output, label)]


def test_kv_compress_shows_what_each_head_keeps_and_whether_its_answer_is_right():
    output = generate("--cache", "full", "--cache", "kv-compress")
    report, right = direct_run(retention=SETTINGS["retention"])
    assert "KVCompressCache: retention 0.5, observation 32, protected 32, sinks 4, l2" in output
    assert map_rows(output) == report.kept[:, 0].tolist()
    kept = report.kept[:, 0].double()
    assert (
        numbers(output, "tokens seen")[1] == report.seen[0] > numbers(output, "tokens kept")[1] == kept.mean().round()
    )
    assert row(output, "least to most")[1] == f"{int(kept.min())} to {int(kept.max())}"
    assert row(output, "resident KV")[1].endswith(f"({report.resident_bytes / report.full_bytes:.0%})")
    assert row(output, "answer")[1].endswith("right") == right
    strip = output.split("What KVCompressCache kept")[1]
    assert " survived " in strip and " recent " in strip and " evicted " in strip and " prompt " not in strip


def test_caches_are_named_one_by_one_or_with_commas():
    both = [
        generate(*given, "--max-new-tokens", 20)
        for given in (["--cache", "kara", "--cache", "kv-compress"], ["--cache", "kara, kv-compress"])
    ]
    first, second = ([line for line in output.splitlines() if "tokens/s" not in line] for output in both)
    assert first == second
    assert "KaraCache: window" in both[0] and "KVCompressCache: retention" in both[0]


def test_settings_reach_kv_compress():
    options = {"max_cache_tokens": 64, "observation": None, "protected": 8, "sinks": 0, "metric": "l1", "block_size": 8}
    arguments = ("--max-cache-tokens", 64, "--observation", "all", "--protected", 8, "--sinks", 0, "--metric", "l1")
    output = generate("--cache", "kv-compress", *arguments, "--block-size", 8, "--no-continual")
    described = "64 tokens per head on average, observation all, protected 8, sinks 0, l1, prompt only"
    assert f"KVCompressCache: {described}" in " ".join(output.split())
    assert map_rows(output) == direct_run(**options, continual=False)[0].kept[:, 0].tolist()


def test_a_budget_that_is_given_replaces_the_default_one():
    output = generate("--cache", "kv-compress,kara", "--max-cache-tokens", 96)
    assert "KVCompressCache: 96 tokens per head" in output and "retention 0.5, recent 16" in output
    assert numbers(output, "tokens kept")[0] <= 96


def test_kv_compress_keeps_a_quarter_where_nothing_is_said(tmp_path):
    output = generate("ba : 3 ; ? ba ba >", "--model", BUNDLED_MODEL, "--cache", "kv-compress", "--max-new-tokens", 2)
    assert "KVCompressCache: retention 0.25," in output


def test_kv_compress_evicts_more_under_a_cap_on_bytes():
    free, capped = (generate("--cache", "kv-compress", *cap) for cap in ((), ("--max-bytes", 200_000)))
    assert numbers(capped, "tokens kept")[0] < numbers(free, "tokens kept")[0]


def test_kv_compress_streams_its_text():
    output = generate("--cache", "kv-compress", "--stream", "--max-new-tokens", 12)
    streamed = output.split("--- KVCompressCache\n")[1].split("tiny_reasoner")[0]
    assert len(streamed.split()) == 12


def test_the_chat_template_is_applied_unless_refused(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    tokenizer.chat_template = "{{ messages[0]['content'] }} ; >"
    for file in BUNDLED_MODEL.iterdir():
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
    (["--cache", "half"], 2, ["'half'", "full or kara or kv-compress or pod"]),
    (["--cache", ""], 2, ["''", "full or kara or kv-compress or pod"]),
    (["--cache", "kara,kara"], 2, ["'kara,kara'", "once"]),
    (["--cache", "full", "--retention", "0.5"], 2, ["retention=0.5 does not apply to full", "kara or kv-compress"]),
    (["--cache", "full", "--max-bytes", "9"], 2, ["max_bytes=9 does not apply to full"]),
    (["--cache", "pod"], 2, ["sharing=None", "kara-hf pod explore"]),
    (["--cache", "pod", "--sharing", "/nowhere"], 1, ["/nowhere", "kara-hf pod explore"]),
    (["--cache", "kv-compress", "--window", "64"], 2, ["window=64 does not apply to kv-compress", "choose kara"]),
    (["--cache", "kv-compress", "--compress-prompt"], 2, ["compress_prompt=True does not apply", "choose kara"]),
    (["--max-cache-tokens", "99"], 2, ["max_cache_tokens=99 does not apply to full and kara", "choose kv-compress"]),
    (["--no-continual"], 2, ["continual=False does not apply to full and kara"]),
    (["--cache", "kv-compress", "--max-cache-tokens", "9"], 2, ["max_cache_tokens=9", "whole number from"]),
    (
        ["--cache", "kv-compress", "--max-cache-tokens", "99", "--retention", "0.5"],
        2,
        ["max_cache_tokens=99 and retention=0.5", "exactly one"],
    ),
    (["--cache", "kv-compress", "--observation", "some"], 2, ["observation='some'", "or all"]),
    (["--cache", "kv-compress", "--observation", "0"], 2, ["observation='0'", "from 1 on"]),
    (["--cache", "kv-compress", "--protected", "0"], 2, ["protected=0", "from 1 on"]),
    (["--cache", "kv-compress", "--sinks", "-1"], 2, ["sinks=-1", "from 0 on"]),
    (["--cache", "kv-compress", "--metric", "l3"], 2, ["metric='l3'", "'l1'"]),
    (["--cache", "kv-compress", "--max-bytes", "7"], 2, ["max_bytes=7", "at least one block"]),
    (["--cache", "kv-compress", "--max-bytes", "50000"], 1, ["max_bytes=50000"]),
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
    return CacheRun("KaraCache", "text", 1, None, seen, [2, 4], 400, 100, 300, 300, rows=rows)


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


def some_report(kept, layers=None, seen=5000):
    """Of one sequence; `kept` ``[layer][head]``."""
    counts = torch.tensor(kept)[:, None]
    return CacheReport(torch.tensor([seen]), counts, layers or list(range(len(kept))), 9, 9, 9, 9, 0)


def printed(table, **options):
    file = io.StringIO()
    Console(file=file, width=100, **options).print(table)
    return file.getvalue()


def test_the_map_has_a_row_for_each_layer_and_a_cell_for_each_head_that_is_there():
    output = printed(kept_table(some_report([[100, 2000], [36, 0], [512, 64]], layers=[2, 5, 8])))
    assert [line.split() for line in output.splitlines()] == [
        ["layer", "head", "0", "head", "1", "mean"],
        ["2", "100", "2,000", "1,050"],
        ["5", "36", "36"],
        ["8", "512", "64", "288"],
        ["of", "5,000", "seen"],
    ]
    assert output.isascii()


def test_the_map_is_brighter_where_more_is_kept():
    lines = printed(
        kept_table(some_report([[10, 20, 30]])), force_terminal=True, color_system="truecolor", no_color=False
    ).splitlines()
    backgrounds = [part.split("m")[0] for part in lines[1].split("48;2;")[1:]]
    assert backgrounds == ["68;1;84", "33;145;140", "253;231;37"]


def test_the_map_of_one_sequence_of_a_batch():
    report = CacheReport(torch.tensor([7, 9]), torch.tensor([[[1, 2], [3, 4]]]), [0], 9, 9, 9, 9, 0)
    assert "3       4" in printed(kept_table(report, 1)) and "of 9 seen" in printed(kept_table(report, 1))
    for sequence in (2, -1):
        with pytest.raises(IndexError, match=f"sequence {sequence} is not there; the report has 2"):
            kept_table(report, sequence)


@pytest.mark.parametrize("width", [30, 80, 100])
def test_the_map_of_a_large_model_shows_means_of_neighbours(width):
    kept = [[100 * layer + head + 1 for head in range(32)] for layer in range(80)]
    lines = printed(kept_table(some_report(kept), width=width, height=20)).splitlines()
    rows = [line.split() for line in lines if line.split()[0].startswith(tuple("0123456789"))]
    assert max(len(line.rstrip()) for line in lines[: len(rows)]) <= width
    assert len(rows) == 20 and rows[0][0] == "0-3" and rows[-1][0] == "76-79"
    heads = -(-32 // (len(rows[0]) - 2))
    assert rows[0][1] == f"{150 + (heads + 1) / 2:,.0f}"
    assert f"mean of up to 4 x {heads} (layers x heads)" in " ".join(" ".join(lines[len(rows) :]).split())


# --------------------------------------------------------------------------------------------------- help and packaging
def test_help_explains_every_option():
    text = " ".join(invoke("generate", "--help").stdout.split())
    for name in inspect.signature(cli.generate).parameters:
        assert name == "prompt" or f"--{name.removesuffix('_').replace('_', '-')} " in text
    for config in (KaraConfig(), KVCompressConfig(retention=KaraConfig.retention)):
        for field in fields(config):
            option = f"--{field.name.replace('_', '-')} "
            default = getattr(config, field.name)
            if option in text and default not in (None, ()) and not isinstance(default, bool):
                assert f"[default: {default}" in text.split(option)[1].split(" --")[0]


@pytest.mark.parametrize("cache", ["pod", "kara", "kv-compress"])
def test_generates_with_shared_keys(tmp_path, cache):
    sharing = kara_hf.PoDSharing(lead=((0, 0), (0, 1), (0, 1), (3, 1)), sinks=4, recent=20)
    sharing.save_pretrained(tmp_path)
    shared = generate("--cache", cache, "--sharing", tmp_path, "--max-new-tokens", 30)
    if cache == "pod":
        assert "PoDCache" in shared and "50 % followers, sinks 4, recent 20" in shared
    else:
        plain = generate("--cache", cache, "--max-new-tokens", 30)
        held = [float(row(output, "resident KV")[0].split()[0]) for output in (shared, plain)]
        assert held[0] < held[1]


def test_help_names_the_caches_and_says_which_options_are_theirs():
    from kara_hf.methods.caches import CACHES

    text = " ".join(invoke("generate", "--help").stdout.split())
    *names, last = CACHES
    assert f"{', '.join(names)} or {last};" in text
    for name in inspect.signature(cli.generate).parameters:
        owners = [method for method, kind in CACHES.items() if name.removeprefix("no_") in kind.options]
        if owners:
            assert f"{', '.join(owners)}: " in text.split(f"--{name.replace('_', '-')} ")[1].split(" --")[0]


def test_version():
    result = invoke("--version")
    assert result.exit_code == 0 and result.stdout.startswith("kara-hf")


def python(code):
    """What a fresh interpreter prints."""
    path = str(Path(kara_hf.__file__).parents[1])
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r})\n{code}"]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.strip()


def test_the_command_itself_starts_without_torch_and_quickly():
    start = time.perf_counter()
    assert python("import kara_hf.cli.app; print({'torch', 'transformers'} & set(sys.modules))") == "set()"
    assert time.perf_counter() - start < 5


def test_python_m_is_the_command():
    code = "import runpy; sys.argv[1:] = ['--help']; runpy.run_module('kara_hf.__main__', run_name='__main__')"
    assert "Usage: kara-hf" in python(code)


def test_the_kit_has_short_names_that_bring_nothing_before_they_are_used():
    code = (
        "import kara_hf.evaluation as kit; print({'torch', 'transformers', 'pandas'} & set(sys.modules), len(dir(kit)))"
    )
    assert python(code).startswith("set()")
    import kara_hf.evaluation as kit

    for name in kit.__all__:
        assert getattr(kit, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'loads'"):
        kit.loads  # noqa: B018
