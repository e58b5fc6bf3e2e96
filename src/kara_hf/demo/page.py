"""A recording as one HTML page, which plays without Python and without a network."""

import json
from html import escape
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SCRIPT = """
const dark = matchMedia("(prefers-color-scheme: dark)");
const follow = () => document.body.classList.toggle("dark", dark.matches);
dark.addEventListener("change", follow); follow();
window.player = new Player(document.getElementById("player"));
player.load(JSON.parse(document.getElementById("run").textContent));
"""


def read(name: str) -> str:
    """The text of one of the player's files."""
    return (HERE / name).read_text(encoding="utf-8")


def make_page(session: dict[str, Any]) -> str:
    """The page that plays a session; `session` is what `Session.to_dict` gives."""
    title = escape(f"{session['title']}, {session['model']}")
    # "<" is escaped, so that no text of a run can end the script that holds it.
    data = json.dumps(session, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    about = ", ".join(f"{name} {value}" for name, value in session["origin"].items() if isinstance(value, str))
    return (
        "<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{title}</title><style>{read('player.css')}</style></head><body class='kh-page'>"
        f"<div id='player'></div><p class='kh-origin'>{title} · {escape(session['task'])} · {escape(about)}</p>"
        f"<script type='application/json' id='run'>{data}</script>"
        f"<script>{read('player.js')}{SCRIPT}</script></body></html>\n"
    )
