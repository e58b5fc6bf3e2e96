"""The command, a model's own traces, and the page of divergences."""

import base64
import gzip
import json
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from support.sharing import deep
from transformers import AutoTokenizer
from typer.testing import CliRunner

from kara_hf.bundled import BUNDLED_MODEL
from kara_hf.cli import app as cli
from kara_hf.evaluation import load_divergence, write_divergence
from kara_hf.evaluation.measure.traces import own_traces
from kara_hf.evaluation.report.divergence_page import SECTIONS, front_of
from kara_hf.evaluation.report.divergence_summary import BINS, Divergences, against, decides

PROVENANCE = {"command": "kara-hf divergence", "device": "A processor", "versions": {"torch": "2.13.0"}, "date": "2026"}
METHODS = {"random": 1.0, "kara": 0.1, "kv-compress": 0.4, "<b>odd</b>": 2.0}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What a run might leave: tokens far behind the prompt diverge more, and fewer bytes do."""
    folder, rng, rows = tmp_path_factory.mktemp("tokens"), np.random.default_rng(0), []
    hard = rng.uniform(0.5, 2, 6)
    for method, far in {"full": 0.0, **METHODS}.items():
        for budget in (1.0,) if method == "full" else (0.5, 0.25):
            for number in range(6):
                kl = far * hard[number] / budget * np.linspace(0, 0.2, 100) * rng.uniform(0.9, 1.1, 100)
                path = folder / f"{len(rows)}.npz"
                np.savez(path, kl=kl.astype(np.float32))
                held = 3000 if method == "kv-compress" and budget == 0.25 else int(10_000 * budget)
                rows.append(
                    {
                        "model": "tiny",
                        "weights": "3f9a5510aa",
                        "task": "divergence:essays",
                        "rule": "none" if method == "full" else "prompt-kept",
                        "method": method,
                        "budget": budget,
                        "equal": "bytes",
                        "seed": 0,
                        "number": number,
                        "document": "d",
                        "prompt": 10,
                        "tokens": 100,
                        "kl_mean": kl.mean(),
                        "kl_median": np.median(kl),
                        "kl_99": np.quantile(kl, 0.99),
                        "kl_max": kl.max(),
                        "same": 1 - kl.mean() / 10,
                        "loss": 2 + kl.mean(),
                        "full_loss": 2.0,
                        "resident_bytes": held,
                        "end_bytes": 0.9 * held,
                        "full_bytes": 10_000,
                        "seconds": 0.5,
                        "settings": {},
                        "provenance": PROVENANCE,
                        "arrays": str(path),
                    }
                )
    return pd.DataFrame(rows)


def test_rows_are_paired_over_documents(measured):
    found = Divergences(measured)
    assert found.reference == "random" and found.methods[:2] == ["full", "random"]
    rows = {(row["method"], row["budget"]): row for row in found.rows}
    mine = measured[(measured.method == "kara") & (measured.budget == 0.5)]
    row = rows["kara", 0.5]
    assert row["kl"] == pytest.approx(mine.kl_mean.mean()) and row["kl_low"] < row["kl"] < row["kl_high"]
    pooled = np.concatenate([np.load(path)["kl"] for path in mine.arrays])
    told = [row[name] for name in ("kl_median", "kl_99", "kl_max")]
    np.testing.assert_allclose(told, [*np.quantile(pooled, [0.5, 0.99]), pooled.max()], rtol=1e-5)
    assert row["loss"] == pytest.approx(row["kl"]) and row["same"] == pytest.approx(1 - row["kl"] / 10)
    assert (row["n"], row["tokens"], row["wins"], row["losses"], row["apart"]) == (6, 600, 6, 0, 0)
    assert row["difference_high"] < 0 and row["tokens_per_second"] == 220
    assert rows["full", 1.0]["kl_high"] == 0 and np.isnan(rows["full", 1.0]["difference"])
    unequal = rows["kv-compress", 0.25]
    assert unequal["apart"] == unequal["bytes_apart"] == pytest.approx(0.2)
    assert "Of 5 comparisons with random at equal bytes, or with fewer" in found.verdict(str)
    assert "3 diverge less, 2 diverge more" in found.verdict(str)
    assert "1 more are at unequal bytes" in found.verdict(str)
    with pytest.raises(ValueError, match="reference='nobody' was not measured; choose one of full, random"):
        Divergences(measured, "nobody")


def test_what_holds_less_and_is_nearer_decides(measured):
    """At unequal bytes, that and nothing else."""
    cell = (measured.method == "kv-compress") & (measured.budget == 0.25)
    for held, told in ((3000, False), (2000, True)):
        frame = measured.assign(resident_bytes=measured.resident_bytes.where(~cell, held))
        found = Divergences(frame)
        row = next(row for row in found.rows if (row["method"], row["budget"]) == ("kv-compress", 0.25))
        assert row["difference_high"] < 0 and ("**" in against(row)) == decides(row) == told
        assert f"{1 - told} more are at unequal bytes" in found.verdict(str)
    worse = row | {"difference_low": 0.1, "difference_high": 0.2}
    assert not decides(worse) and decides(worse | {"bytes_apart": 0.2})


def test_curves_are_means_of_the_tokens_at_a_distance(measured):
    found = Divergences(measured)
    row = next(row for row in found.rows if (row["method"], row["budget"]) == ("kara", 0.25))
    edges = found.edges([row])
    assert (edges[0], edges[-1], len(edges)) == (0, 100, BINS + 1)
    kl = [np.load(path)["kl"] for path in measured[(measured.method == "kara") & (measured.budget == 0.25)].arrays]
    for estimate, low, high in zip(found.by_distance(row, edges), edges[:-1], edges[1:], strict=True):
        assert estimate.value == pytest.approx(np.mean([each[low:high].mean() for each in kl]), rel=1e-6)
        assert estimate.low <= estimate.value <= estimate.high
    assert found.by_distance(row, np.array([0, 100, 200]))[1] is None


def test_the_front_goes_down():
    rows = [
        {"method": name, "resident": held, "kl": kl}
        for name, held, kl in (("a", 0.1, 3.0), ("b", 0.2, 1.0), ("c", 0.3, 2.0), ("oracle", 0.3, 0.1), ("full", 1, 0))
    ]
    assert [row["method"] for row in front_of(rows)] == ["a", "b"]


def test_the_page_has_all_and_escapes_names(measured, tmp_path):
    html, md = write_divergence(measured, tmp_path, title="A <title>")
    text = html.read_text("utf-8")
    page = json.loads(gzip.decompress(base64.b64decode(re.search(r"id='page'>([^<]+)<", text)[1])))
    shown = re.sub(r"<(style|script)[ >].*?</\1>", "", text, flags=re.S)
    assert all(f">{head}</h2>" in shown for head in SECTIONS)
    assert "<b>odd</b>" not in shown and "&lt;b&gt;odd&lt;/b&gt;" in shown and "A &lt;title&gt;" in shown
    assert set(page["styles"]) == {"full", *METHODS}
    assert len(page["figures"]) == 1 + 2 + 2  # the Pareto plot, a curve for each budget, likeliest tokens and loss
    assert re.findall("id='(figure\\d)'", shown) == list(page["figures"])
    pareto = page["figures"]["figure0"]
    assert pareto["layout"]["yaxis"]["type"] == pareto["layout"]["xaxis"]["type"] == "log"
    points = {trace["name"]: (trace["x"], trace["y"]) for trace in pareto["data"]}
    assert points["full"] == ([1.0], [None])
    assert points["kara"][0] == [0.25, 0.5] and points["kara"][1][0] > points["kara"][1][1]
    curve = next(trace for trace in page["figures"]["figure1"]["data"] if trace["name"] == "kara")
    assert curve["x"][0] == 6 and curve["y"] == sorted(curve["y"])
    markdown = md.read_text("utf-8")
    assert "| 25% | kara | 25.0% |" in markdown and "30.0% (+20%)" in markdown and "at +20% bytes" in markdown


def test_the_page_is_drawn(browser, measured, tmp_path):
    html, _ = write_divergence(measured, tmp_path)
    context = browser.new_context(viewport={"width": 390, "height": 844}, offline=True)
    shown, wrong = context.new_page(), []
    shown.on("pageerror", lambda error: wrong.append(str(error)))
    shown.goto(html.as_uri())
    for plot in shown.query_selector_all(".plot"):
        plot.scroll_into_view_if_needed()
    drawn = "() => [...document.querySelectorAll('.plot')].every(plot => plot.querySelector('svg.main-svg'))"
    shown.wait_for_function(drawn, timeout=40_000)
    assert shown.evaluate("document.documentElement.scrollWidth") <= 390 and not wrong
    context.close()


# ---------------------------------------------------------------------------------------------------------- own traces
@pytest.fixture(scope="module")
def model():
    return deep()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED_MODEL)


def test_traces_are_what_the_model_says_and_are_kept(model, tokenizer, tmp_path):
    prompts = [[5, 6, 7, 8], [9, 10]]
    made = own_traces(model, tokenizer, prompts, tokens=12, out=tmp_path)
    for prompt, document in zip(prompts, made, strict=True):
        ids = torch.tensor([prompt])
        own = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert document.ids == own[0].tolist() and document.prompt == len(prompt)
    (path,) = tmp_path.rglob("*.traces")
    before = path.read_bytes()
    assert own_traces(model, tokenizer, prompts, tokens=12, out=tmp_path) == made and path.read_bytes() == before
    longer = own_traces(model, tokenizer, [*prompts, [11, 12]], tokens=12, out=tmp_path)
    assert longer[:2] == made and path.read_bytes().startswith(before)
    with pytest.raises(ValueError, match="holds the answer to another prompt 0"):
        own_traces(model, tokenizer, [[1, 2]], tokens=12, out=tmp_path)
    with pytest.raises(ValueError, match="another setting .*tokens: 12 there, 9 now"):
        own_traces(model, tokenizer, prompts, tokens=9, out=tmp_path)


def test_traces_can_be_drawn(model, tokenizer, tmp_path):
    drawn = [
        own_traces(model, tokenizer, [[5, 6]], tokens=12, out=tmp_path / str(n), temperature=1.5, seed=seed)[0].ids
        for n, seed in enumerate((0, 0, 1))
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "prompts=.* at least one"),
        ({"tokens": 1}, "tokens=1 is not possible"),
        ({"temperature": -1}, "temperature=-1 is not possible"),
        ({"tokens": 10**6}, "tokens=1000000 is not possible behind a prompt of 2"),
    ],
)
def test_traces_that_cannot_be_made(model, tokenizer, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        own_traces(model, tokenizer, **{"prompts": [[5, 6]], "tokens": 4, "out": tmp_path, **change})


# --------------------------------------------------------------------------------------------------------- the command
def invoke(*args):
    return CliRunner().invoke(cli.app, ["divergence", *map(str, args)], env={"COLUMNS": "120", "NO_COLOR": "1"})


@pytest.mark.parametrize("own", [False, True])
def test_the_command_measures_and_shows(own, tmp_path):
    args = ("--documents", 2, "--tokens", 150, "--prompt", 20, "--methods", "full,random", "--budgets", "0.75")
    more = ("--own-traces", "--temperature", 0.7) if own else ("--equal", "tokens")
    done = invoke(*args, *more, "--window", 16, "--recent", 4, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert "random" in done.stdout and "75%" in done.stdout and "divergence.html" in done.stdout
    frame = load_divergence(tmp_path)
    assert set(frame.method) == {"full", "random"} and len(frame) == 4 and set(frame.model) == {"tiny_reasoner"}
    assert (frame.prompt == 20).all() and (frame[frame.method == "full"].kl_max == 0).all()
    assert frame.task.str.contains("own traces").all() == own
    (tmp_path / "divergence.html").unlink()
    again = CliRunner().invoke(cli.app, ["report", str(tmp_path)])
    assert again.exit_code == 0 and (tmp_path / "divergence.html").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--budgets", "half"), "budgets='half' is not possible: budgets must be numbers separated by commas"),
        (("--budgets", "2"), "budgets=2.0 is not possible: budgets must be shares in (0, 1]"),
        (("--methods", "nothing"), "method='nothing' is not possible"),
        (("--methods", ""), "methods=None is not possible"),
        (("--rules", "query-agnostic"), "rules='query-agnostic' is not possible"),
        (("--model", "x/y"), "data=None is not possible: data must be given with --model"),
        (("--dtype", "int8"), "dtype='int8' is not possible"),
        (("--documents", 0), "documents=0 is not possible"),
        (("--tokens", 60, "--prompt", 59), "prompt=59 is not possible: prompt must be from 1 to 58"),
        (("--tokens", 10**6), "tokens=1000000 is not possible: tokens must be at most the 4096 positions"),
        (("--reference", "kara", "--methods", "random"), "reference='kara' is not possible"),
        (("--data", "nowhere.txt"), "data='nowhere.txt' is not there"),
    ],
)
def test_the_command_says_what_is_wrong(args, message, tmp_path):
    done = invoke("--documents", 1, *args, "--out", tmp_path)
    assert done.exit_code in (1, 2) and message in " ".join(done.stderr.split())
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_with_the_extra():
    code = "import sys; sys.modules['pandas'] = None; from kara_hf.cli.app import app; app(['divergence'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "pandas is not installed; run: pip install 'kara_hf[evaluate]'" in done.stderr


def test_short_texts_are_named(tmp_path):
    (tmp_path / "a.txt").write_text("ba : 8 ; xa : 4 ;")
    done = invoke("--data", tmp_path / "a.txt", "--documents", 1, "--tokens", 64, "--prompt", 8, "--out", tmp_path)
    told = " ".join(done.stderr.split())
    assert done.exit_code == 2 and "of its 1 documents 0 have 64 tokens, and 1 are asked for; the longest has" in told
