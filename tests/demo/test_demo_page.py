"""The page, its handlers and the command, without a browser."""

import asyncio
import json
import re
import socket
import sys
import time
from pathlib import Path

import pytest
from support.demo import finished, make
from support.marks import slow
from typer.testing import CliRunner

from kara_hf.cli.app import app as command
from kara_hf.demo.app import build, launch
from kara_hf.demo.page import make_page
from kara_hf.demo.presets import KARA
from kara_hf.demo.request import Limits
from kara_hf.demo.sessions import Sessions


def test_the_saved_page_needs_nothing_else(models):
    session = finished(make(models, beside=True))
    page = make_page({**session.to_dict(), "task": "</script><script>alert(1)</script>"})
    assert not re.search(r"(src|href)\s*=\s*['\"]|@import|url\(|https?://|import\(", page)
    assert page.count("<script") == 2 and "alert(1)</script>" not in page
    (data,) = re.findall(r"<script type='application/json' id='run'>(.*?)</script>", page, flags=re.S)
    assert json.loads(data)["runs"][1] == json.loads(json.dumps(session.runs[1].recording.to_dict()))
    assert str(Path.home()) not in page


@pytest.mark.parametrize("choice", [slow(KARA), "KV-Compress"])
def test_a_run_is_small_as_data(models, choice):
    session = finished(make(models, choice=choice, length=160))
    assert len(json.dumps(session.to_dict())) < 200 * session.runs[0].recording.seen  # bytes a token, of 8 rows


def test_the_app_is_safe_by_default(models, monkeypatch):
    import gradio

    given = {}
    monkeypatch.setattr(gradio.Blocks, "launch", lambda self, **options: given.update(options, app=self))
    result = CliRunner().invoke(command, ["demo"])
    assert result.exit_code == 0, result.output
    assert given["server_name"] == "127.0.0.1" and given["share"] is False and given["inbrowser"] is False
    assert not {"allowed_paths", "auth"} & set(given) and given["enable_monitoring"] is False
    assert given["app"].analytics_enabled is False
    (begin,) = (fn for fn in given["app"].fns.values() if getattr(fn.fn, "__name__", "") == "begin")
    assert begin.concurrency_limit == 4 and begin.queue
    launch(models, Limits(), server_name="0.0.0.0", server_port=7999)
    assert (given["server_name"], given["server_port"]) == ("0.0.0.0", 7999)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--runs", "0"], "runs=0 is not possible"),
        (["--port", "70000"], "port=70000 is not possible"),
        (["--dtype", "int4"], "dtype='int4' is not possible"),
        (["--sharing", "x"], "sharing='x' is not possible: sharing must be given with the --model"),
        (["--max-new-tokens", "-1"], "max_new_tokens=-1 is not possible"),
        (["--device", "abacus"], "device='abacus' is not there"),
        (["--model", "/nowhere"], "model='/nowhere' is no folder"),
    ],
)
def test_the_command_refuses(arguments, message):
    result = CliRunner().invoke(command, ["demo", *arguments])
    assert result.exit_code == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_port_that_is_taken_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = CliRunner().invoke(command, ["demo", "--port", str(port)])
    assert result.exit_code == 1 and f"port={port} of host='127.0.0.1' cannot be had" in result.stderr


def test_a_missing_gradio_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = CliRunner().invoke(command, ["demo"])
    assert result.exit_code == 2
    assert result.stderr == "Error: gradio is not installed; run: pip install 'kara_hf[demo]'\n"


def call(function, *arguments):
    return asyncio.run(function(*arguments))


def test_each_visitor_drives_their_own_run(models):
    sessions = Sessions()
    app = build(models, Limits(runs=2), sessions)
    handlers = {getattr(fn.fn, "__name__", ""): fn.fn for fn in app.fns.values()}
    (player,) = (block for block in app.blocks.values() if getattr(block, "elem_id", None) == "player")

    class Visitor:
        def __init__(self, name):
            self.session_hash = name

    mine, other = Visitor("mine"), Visitor("other")
    sessions.put("mine", make(models, paused=True))
    assert call(handlers["start"], other)[1] == ""
    sessions.put("other", make(models, paused=True))
    keys = sessions.of("mine").key, sessions.of("other").key
    call(handlers["step"], mine)
    for _ in range(500):
        if sessions.of("mine").generated == 1:
            break
        time.sleep(0.01)
    assert (sessions.of("mine").generated, sessions.of("other").generated) == (1, 0)
    part = call(player.poll, [keys[0], []])
    assert len(part["runs"][0]["tokens"]) == 1 and part["paused"]
    assert call(player.poll, ["guess", []]) is None and call(player.standalone, "guess") == ""
    message = "All 2 places are taken; your run starts when one is free."
    assert call(handlers["start"], Visitor("third"))[1] == call(handlers["step"], Visitor("third"))[1] == message
    call(handlers["stop"], mine)
    sessions.of("mine").runs[0].join(10)
    assert sessions.of("mine").done and not sessions.of("other").done
    assert "not yet" not in call(player.standalone, keys[0])[:100]
    handlers["close"](other)
    handlers["close"](mine)
    assert sessions.of("other") is None and call(player.poll, [keys[1], []]) is None
    for _ in range(500):
        if not sessions.live:
            break
        time.sleep(0.01)
    assert sessions.live == 0
