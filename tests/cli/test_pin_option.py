"""`kara-hf generate --pin`: by position, or the system message of the chat."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from kara_hf.bundled import BUNDLED_MODEL
from kara_hf.cli import app as cli

TEMPLATE = "{% for m in messages %}{{ m['content'] }} ; {% endfor %}? qo >"
SHORT = ("--max-new-tokens", 40, "--device", "cpu", "--window", 16, "--recent", 4, "--compress-prompt")


def generate(*args):
    asked = [str(arg) for arg in ("generate", *args, *SHORT)]
    return CliRunner().invoke(cli.app, asked, env={"COLUMNS": "120", "NO_COLOR": "1"})


@pytest.fixture(scope="module")
def chatting(tmp_path_factory):
    """The folder of the bundled model with a chat template."""
    folder = tmp_path_factory.mktemp("model") / "chatting"
    shutil.copytree(BUNDLED_MODEL, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    return folder


def test_positions():
    shown = generate("--cache", "kara,kv-compress", "--pin", "8:20, 30:34")
    assert shown.exit_code == 0, shown.output
    for name in ("KaraCache", "KVCompressCache"):
        assert f"{name}: " in shown.stdout and "pinned 8:20, pinned 30:34" in shown.stdout
        assert " pinned 16 " in shown.stdout.split(f"What {name} kept")[1]


def test_the_system_message(chatting):
    arguments = ("ba : 8 ; xa : 4 ; qo : ba + xa", "--model", chatting, "--cache", "kara", "--pin", "system")
    shown = generate(*arguments, "--system", "ba : 3")
    assert shown.exit_code == 0, shown.output
    assert "pinned 0:4\n" in shown.stdout and " pinned 4 " in shown.stdout


def test_mistakes_are_named(chatting):
    question = ("ba : 8 ; ? ba >", "--model", chatting, "--cache", "kara")
    assert "pin='4' is not possible" in generate(*question, "--pin", "4").stderr
    assert "puts nothing in front" in generate(*question, "--pin", "system").stderr
    assert "without a chat template" in generate("--pin", "system", "--cache", "kara").stderr
    assert "system='ba' is not possible" in generate(*question, "--system", "ba", "--no-chat").stderr
    assert "does not apply to full" in generate("--cache", "full", "--pin", "0:4").stderr
    assert (
        "61 pinned tokens"
        in generate(
            "--cache",
            "kara,kv-compress",
            "--max-cache-tokens",
            64,
            "--protected",
            4,
            "--pin",
            "4:65",
            "--block-size",
            4,
        ).stderr
    )
