"""What the README and the docs show is there, parses and runs."""

import inspect
import re
from itertools import takewhile

import pytest
import transformers
from packaging.version import Version
from support.shown import FENCE, README, ROOT, TEXTS, shown, words
from typer.main import get_command

import kara_hf
from benchmarks import registry  # noqa: F401  it registers the cases
from benchmarks.common.case import chosen
from kara_hf.cli.app import app


def prose(text: str) -> str:
    """Without code, pictures and what links lead to."""
    text = re.sub(r"^    .*$", "", FENCE.sub("", text), flags=re.M)
    return re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]*`", "code", text))


def sentences(text: str) -> list[str]:
    """Of prose, with each cell of a table and each item of a list on its own."""
    parts = re.split(r"\n\s*\n|\n(?=[-#|]|\d+\. )|\|", prose(text))
    return [sentence for part in parts for sentence in re.split(r"(?<=[.:;?!])\**\s+", part.strip())]


# ----------------------------------------------------------------------------------------------------------- the README
def test_the_snippet_prints_what_is_shown(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    (snippet,) = (code for kind, code in FENCE.findall(README) if kind == "python")
    (printed,) = (code for kind, code in FENCE.findall(README) if kind == "text")
    assert len(snippet.splitlines()) == 9
    if Version(transformers.__version__) < Version("5.24"):
        snippet = snippet.replace("cache=cache", "past_key_values=cache")
    exec(compile(snippet, "README.md", "exec"), {})
    assert capsys.readouterr().out == printed


def test_the_call_for_all_versions_stands_in_the_package_docstring_too():
    (line,) = re.findall(r"`(model\.generate\(.*past_key_values=.*\))`", README)
    assert line in kara_hf.__doc__


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150
    assert not [s for s in sentences(README) if len(s.split()) > 40]


def test_the_first_screen_says_which_cache_to_take():
    assert "## Which cache?" in README.splitlines()[:40]


def test_make_knows_its_targets():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^    make (\w+)", README, flags=re.M)
    assert {"generate", "test"} <= set(targets)
    for target in targets:
        assert f"\n{target}:" in makefile
    assert "make test" in (ROOT / ".ci" / "run").read_text()


# -------------------------------------------------------------------------------------------------------- all the texts
@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    text = FENCE.sub("", TEXTS[name])
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in link:
            assert ((ROOT / name).parent / link).exists(), link


@pytest.mark.parametrize("name", [name for name in TEXTS if name != "docs/architectures.md"])
def test_tables_have_five_columns_and_eight_rows_at_most(name):
    for table in re.findall(r"(?:^\|.*\n)+", FENCE.sub("", TEXTS[name]), flags=re.M):
        head, _, *rows = re.sub(r"\\\||`[^`]*`", "code", table).splitlines()
        assert head.count("|") - 1 <= 5, head
        assert len(rows) <= 8, head


def test_every_doc_is_in_the_index():
    index = TEXTS["docs/index.md"]
    for name in TEXTS:
        assert name == "docs/index.md" or f"({name.removeprefix('docs/')})" in index.replace("(../", "("), name


@pytest.mark.parametrize("name, line", shown("kara-hf"))
def test_commands_parse(name, line):
    command, args, context = get_command(app), words(line)[1:], None
    while hasattr(command, "commands") and args and not args[0].startswith("-"):
        assert args[0] in command.commands, f"no such command: {args[0]}"
        context = command.make_context(command.name, [], parent=context, resilient_parsing=True)
        command, args = command.commands[args[0]], args[1:]
    named = {option for parameter in command.params for option in parameter.opts}
    assert {arg for arg in args if arg.startswith("--")} <= named
    if args and "..." not in line.replace('"..."', "").split():  # neither its name alone nor with values left out
        command.make_context(command.name, args, parent=context)


@pytest.mark.parametrize("name, line", shown("python -m benchmarks"))
def test_benchmarks_that_are_shown_exist(name, line):
    command, *args = words(line)[3:]
    assert command in ("list", "run", "table")
    names = list(takewhile(lambda arg: not arg.startswith("--"), args))
    if names and names != ["NAME"]:
        assert chosen(names)


@pytest.mark.parametrize("cache", ["KaraCache", "KVCompressCache", "PoDCache"])
def test_settings_are_the_defaults(cache):
    section = re.search(rf"^## `{cache}`\n(.*?)(?=^## |\Z)", TEXTS["docs/settings.md"], flags=re.S | re.M)[1]
    told = dict(re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", section, flags=re.M))
    settings = inspect.signature(getattr(kara_hf, cache)).parameters
    assert set(told) == set(settings) - {"model"}
    for name, default in told.items():
        if settings[name].default is not inspect.Parameter.empty:
            assert default.strip("`").strip('"') == str(settings[name].default), name


def test_paths_that_contributing_names_exist():
    for path in re.findall(r"`((?:src|tests|benchmarks|docs|examples)/[\w/.]+)`", TEXTS["CONTRIBUTING.md"]):
        assert (ROOT / path).exists(), path
