"""A stranger's install: what the wheel holds, and that README and docs come true with each extra alone."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from contextlib import suppress
from email import message_from_bytes
from zipfile import ZipFile

import pytest
import transformers
from packaging.version import Version
from support.installed import ROOT, Environment, build_wheel
from support.shown import FENCE, README, shown, words

from kara_hf import __version__
from kara_hf.cli.doctor import NEEDS
from kara_hf.needs import extra as remedy
from kara_hf.tasks.reasoner import make_problem

DEEP = ROOT / "tests" / "data" / "deep_reasoner"
EXTRAS = ("", "demo", "evaluate", "harness", "plot", "serve", "train")

# What the commands that are shown call their models and texts: folders and files of these names.
MODELS = ("M", "MODEL", "my-model", "Qwen/Qwen3-4B", "Qwen/Qwen2.5-Coder-0.5B-Instruct")
MODELS += ("models/qwen2.5-coder-0.5b", "models/qwen2.5-coder-1.5b")
TEXTS = ("book.txt", "essays/one.txt", "texts/one.txt", "text.jsonl", "questions.jsonl", "TEXT/text.jsonl")
TEXTS += ("data/five_solved.jsonl",)

# Values that make a command short. They replace what is shown, or are added.
SAMPLES = {"--length": "96", "--recent": "16", "--sinks": "4", "--samples": "2"}
SHORT = {
    "generate": {"--max-new-tokens": "4"},
    "compress": {},
    "plan": {},
    "doctor": {},
    "evaluate": {"--tasks": "trace:generated=60", "--n": "1", "--budgets": "0.5", "--rules": "prompt-kept"},
    "divergence": {"--tokens": "128", "--prompt": "64", "--documents": "1"},
    "report": {},
    "serve": {"--memory": "64MiB"},
    "demo": {},
    "pod explore": SAMPLES,
    "pod effect": SAMPLES,
    "pod adapt": {"--length": "96", "--steps": "2", "--held-out": "2"},
}
NAMES = {f"kara-hf {name}" for name in set(SHORT) - {"demo", "doctor"}}  # alone they are no line to run
OWNERS = {"doctor": ""} | {name: needed for names, needed in NEEDS.items() for name in names.split(", ")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("setuptools", minversion="77", reason="a wheel is built with setuptools 77 or newer")
    return build_wheel(tmp_path_factory.mktemp("wheel"))


# ------------------------------------------------------------------------------------------------------ what it holds
def test_a_wheel_holds_the_package_and_nothing_else(wheel):
    names = {name for name in ZipFile(wheel).namelist() if not name.startswith(f"kara_hf-{__version__}.dist-info/")}
    package = (path for path in (ROOT / "src").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert names == {str(path.relative_to(ROOT / "src")) for path in package if "egg-info" not in str(path)}
    assert {"kara_hf/py.typed", "kara_hf/demo/player.js", "kara_hf/assets/tiny_reasoner/model.safetensors"} <= names
    assert f"kara_hf-{__version__}.dist-info/licenses/LICENSE" in ZipFile(wheel).namelist()


def test_one_version_is_told_everywhere(wheel):
    about = message_from_bytes(ZipFile(wheel).read(f"kara_hf-{__version__}.dist-info/METADATA"))
    newest = re.search(r"^## \[?([\w.]+)\]? - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    citation = dict(re.findall(r"^([\w-]+): (\S.*)$", (ROOT / "CITATION.cff").read_text(), flags=re.M))
    assert about["Version"] == newest[1] == citation["version"] == __version__
    assert citation["date-released"].strip('"') == newest[2]
    assert about["License-Expression"] == citation["license"]


def test_every_extra_is_tried():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(EXTRAS) == {"", *extras} - {"docs", "test"}
    assert set(SHORT) | {"--plot of pod explore", "the harness of lm_eval"} == set(OWNERS)


# ----------------------------------------------------------------------------------------------- with each extra alone
def command_of(line):
    """What of a line is the command's name."""
    return " ".join(words(line)[1 : 3 if words(line)[1] == "pod" else 2])


def shortened(line):
    """The words of a line, with values that make it short."""
    found = words(line)
    for option, value in SHORT[command_of(line)].items():
        if option in found:
            found[found.index(option) + 1] = value
        else:
            found += [option, value]
    return found


def lines(extra):
    """Those of all lines in README and docs that such an extra is for, each once and in order."""
    found = dict.fromkeys(line.partition(" #")[0].strip() for _, line in shown("kara-hf"))
    whole = [line for line in found if "..." not in line.replace('"..."', "").split() and line not in NAMES]
    return [line for line in whole if owner(line) == extra]


def owner(line):
    """The extra that a line needs."""
    if "--plot" in words(line):
        return "plot"
    return "train" if "adapted" in words(line) else OWNERS[command_of(line)]


@pytest.fixture(scope="module", params=EXTRAS, ids=lambda extra: extra or "none")
def installed(request, wheel, tmp_path_factory):
    """A fresh environment, the extra in it, and the models and texts that are spoken of."""
    environment = Environment(tmp_path_factory.mktemp("stranger"), wheel, request.param)
    model = environment.folder / MODELS[0]
    shutil.copytree(DEEP, model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    for name in MODELS[1:]:
        (environment.folder / name).parent.mkdir(exist_ok=True)
        (environment.folder / name).symlink_to(model)
    for name in ("sharing", "first", "second"):
        (environment.folder / name).mkdir()
        shutil.copy(DEEP / "pod_sharing.json", environment.folder / name)
    (environment.folder / "benchmarks" / "results").mkdir(parents=True)
    (environment.folder / "benchmarks" / "results" / "answers").symlink_to(ROOT / "benchmarks" / "results" / "answers")
    problems = [make_problem("trace", length=300, seed=number) for number in range(8)]
    texts = [f"{problem.prompt} {problem.completion}" for problem in problems]
    rows = [json.dumps({"text": text, "question": text}) for text in texts]
    for name in TEXTS:
        file = environment.folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(rows if file.suffix == ".jsonl" else texts))
    return request.param, environment


def served(environment, *command):
    """What a server says of itself, at the port that it is told."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = "v1/models" if command[1] == "serve" else ""
    process = environment.start(*command, "--port", str(port))
    try:
        for _ in range(1200):
            time.sleep(0.5)
            assert process.poll() is None, process.communicate()
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}") as answer:
                return answer.read().decode()
        raise AssertionError(f"{command} does not answer")
    finally:
        process.kill()
        process.communicate()


def asked_in_harness(environment):
    """A task of a file, as lm-evaluation-harness answers it with a cache of ours."""
    task = {
        "task": "solve",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "text.jsonl"}},
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "doc_to_target": "0",
        "output_type": "generate_until",
        "generation_kwargs": {"until": [], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    (environment.folder / "solve.yaml").write_text(json.dumps(task))  # JSON is YAML
    command = ("python", "-m", "kara_hf.evaluation.harness", "run", "--model", "kara_hf", "--tasks", "solve")
    arguments = "pretrained=M,method=kara,budget=0.5,window=16,recent=8,block_size=4"
    return environment.run(*command, "--include_path", ".", "--limit", "1", "--model_args", arguments)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_is_shown_comes_true(installed):
    extra, environment = installed
    assert environment.run("kara-hf", "--version") == f"kara-hf {__version__}\n"
    for line in lines(extra):
        command = shortened(line)
        if extra == "plot":  # without what reads texts
            command[command.index("--data") + 1] = "problems:trace=1"
        if extra in ("serve", "demo"):
            assert served(environment, *command)
        else:
            environment.run(*command)
    if extra == "harness":
        assert "exact_match" in asked_in_harness(environment)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_is_missing_is_said(installed):
    extra, environment = installed
    rows = [line for line in environment.run("kara-hf", "doctor").splitlines() if "│" in line]
    for names, needed in NEEDS.items():
        (row,) = (line for line in rows if line.startswith(f"│ {names} "))
        assert "ready" in row if needed in ("", extra) else "ready" in row or remedy(needed) in row
    if not extra:
        assert [line for line in rows if "ready" in line] == [line for line in rows if "generate" in line]
        for other in set(EXTRAS) - {"", "harness"}:
            line = next(line for line in lines(other))
            assert remedy(other) in environment.run(*shortened(line), code=2)
        assert remedy("harness") in environment.run("python", "-m", "kara_hf.evaluation.harness", code=1)


@pytest.mark.slow
@pytest.mark.parametrize("installed", [""], indirect=True, ids=["none"])
def test_the_snippet_prints_what_is_shown(installed):
    _, environment = installed
    snippet, printed = ([code for kind, code in FENCE.findall(README) if kind == name] for name in ("python", "text"))
    if Version(transformers.__version__) < Version("5.24"):
        snippet = [code.replace("cache=cache", "past_key_values=cache") for code in snippet]
    assert [environment.run("python", "-c", *snippet)] == printed


TYPED = """
from transformers import PreTrainedModel
from kara_hf import BUNDLED_MODEL, CompressedCache, KaraCache, KVCompressConfig

def held(model: PreTrainedModel) -> None:
    cache = KaraCache(model, retention=0.2)
    reveal_type(cache.report().resident_bytes)
    reveal_type(CompressedCache.load("file", model))
    reveal_type(BUNDLED_MODEL)
    KaraCache(model, retention="much")
    KaraCache(model, windows=64)
    KVCompressConfig(metric="l3")
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("installed", [""], indirect=True, ids=["none"])
def test_types_are_seen_from_outside(installed):
    _, environment = installed
    (environment.folder / "typed.py").write_text(TYPED)
    options = ("--python-executable", str(environment.home / "bin" / "python"), "--strict", "--no-pretty")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "typed.py"],
        cwd=environment.folder,
        env=environment.environ,
        capture_output=True,
        text=True,
    )
    wanted = {
        7: 'Revealed type is "int"',
        8: 'Revealed type is "kara_hf.cache.compressed.CompressedCache"',
        9: 'Revealed type is "pathlib.Path"',
        10: 'Argument "retention" to "KaraCache" has incompatible type "str"',
        11: 'Unexpected keyword argument "windows" for "KaraCache"',
        12: 'Argument "metric" to "KVCompressConfig" has incompatible type',
    }
    for number, text in wanted.items():
        assert re.search(rf"^typed.py:{number}: .*{re.escape(text)}", done.stdout, flags=re.M), (
            done.stdout + done.stderr
        )
    assert done.stdout.count(": error: ") == 3, done.stdout
