"""How fast the demo draws, and what drawing costs: a browser watches runs of the bundled model, or looks away.

Runs with the text being drawn, runs that nobody looks at and plain `generate` without a recording take turns. Then one
long run is watched, and the timeline is moved through it. The browser runs on the same machine. Needs
`kara_hf[test]` and Chromium.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kara_hf import KaraCache

from ..common.case import Job, register
from ..common.models import TINY
from ..common.rows import Row
from ..common.run import Run, Skip

PORT = 7899
SETTINGS: Row = {"retention": 0.4, "window": 64, "recent": 32, "anchor_share": 1.0}  # as the demo begins
TEXT = "ba : 8 ; xa : 4 ; qo : ba + xa ; ? qo xa >"
WIDE = {"width": 1280, "height": 800}
FRAMES = """() => {
  window.frames_ = [];
  let before = performance.now();
  const tick = () => { window.ticking = requestAnimationFrame(frame); };
  const frame = now => { window.frames_.push(now - before); before = now; tick(); };
  tick();
}"""
MOVES = """async () => { const found = [], most = player.generated;
  for (let i = 0; i < 60; i++) {
    const begun = performance.now();
    player.seek(Math.floor(most * ((i * 37) % 60) / 60));
    await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
    found.push(performance.now() - begun);
  } return found; }"""
FOUND = """() => ({rates: player.runs.map(run => run.tokens.length / run.head.end.seconds), times: player.times,
  tokens: player.runs.map(run => run.tokens.length), frames: window.frames_})"""


@register(
    "demo",
    "how fast the demo draws in a browser, and by how much drawing slows generation",
    [
        ("what", "{what}"),
        ("tokens/s", "{tokens_per_s:.0f}"),
        ("drawing slows by", "{slower:.1%}"),
        ("updates/s", "{updates_per_s:.1f}"),
        ("ms between frames, 95 % below", "{frames_p95:.1f}"),
        ("ms from a move to its picture", "{moves:.1f}"),
    ],
    sizes={"repeats": 6, "tokens": 1000, "long": 4000, "beside": True},
    smoke={"repeats": 2, "tokens": 120, "long": 240},
)
def demo_jobs(run: Run, repeats: int, tokens: int, long: int, beside: bool) -> Iterator[Job]:
    """With the full cache `beside` it, two runs take turns."""
    runs = "two runs taking turns" if beside else "one run"
    yield Job({"what": f"{tokens} tokens, {runs}"}, partial(compared, repeats, tokens, beside))
    yield Job({"what": f"{long} tokens, {runs}"}, partial(moved, long, beside))


def compared(repeats: int, tokens: int, beside: bool) -> Row:
    """Runs that are watched, not watched, and plain, in turns."""
    rates: dict[str, list[float]] = {"drawn": [], "unseen": [], "plain": []}
    updates, frames = [], []
    with opened() as (page, folder):
        choose(page, tokens, beside)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        plain(model, tokenizer, tokens)
        watched(page, True)
        for _ in range(repeats):
            found = watched(page, True)
            rates["drawn"].append(found["rates"][-1])
            updates.append(updates_per_s(found["times"]))
            frames += found["frames"]
            rates["unseen"].append(watched(page, False)["rates"][-1])
            rates["plain"].append(plain(model, tokenizer, tokens))
    slower = [1 - a / b for a, b in zip(rates["drawn"], rates["unseen"], strict=True)]
    return {
        "repeats": repeats,
        "tokens_per_s": statistics.median(rates["drawn"]),
        "unseen_tokens_per_s": statistics.median(rates["unseen"]),
        "plain_tokens_per_s": statistics.median(rates["plain"]),
        "slower": statistics.median(slower),
        "slower_least": min(slower),
        "slower_most": max(slower),
        "updates_per_s": statistics.median(updates),
    } | percentiles("frames", frames)


def moved(tokens: int, beside: bool) -> Row:
    """One run that is watched, and 60 moves of its timeline."""
    with opened() as (page, _):
        choose(page, tokens, beside)
        found = watched(page, True)
        moves = page.evaluate(MOVES)
    times = found["times"]
    return (
        {"tokens_per_s": found["rates"][-1], "updates_per_s": updates_per_s(times)}
        | percentiles("frames", found["frames"])
        | percentiles("gaps", [b - a for a, b in zip(times, times[1:], strict=False)])
        | percentiles("moves", moves)
    )


def updates_per_s(times: Sequence[float]) -> float:
    """From the milliseconds at which the page was updated."""
    return (len(times) - 1) * 1000 / (times[-1] - times[0])


def percentiles(name: str, values: Sequence[float]) -> Row:
    cuts = statistics.quantiles(values, n=100)
    return {
        name: statistics.median(values),
        f"{name}_p95": cuts[94],
        f"{name}_p99": cuts[98],
        f"{name}_most": max(values),
    }


# ---------------------------------------------------------------------------------------------------------- the page
@contextmanager
def opened() -> Iterator[tuple[Any, Path]]:
    """The demo's page in a browser, and the folder of its model, which ends no text by itself."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise Skip("not available: playwright; pip install 'kara_hf[test]'") from error
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        place = endless(Path(folder) / "endless")
        command = [sys.executable, "-m", "kara_hf", "demo", "--model", str(place), "--port", str(PORT)]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            wait_for(server, f"http://127.0.0.1:{PORT}/")
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport=WIDE)
            page.goto(f"http://127.0.0.1:{PORT}/")
            page.wait_for_function("() => window.player")
            page.evaluate("() => { window.Player_follow = Object.getPrototypeOf(player).follow; }")
            yield page, place
            browser.close()
        finally:
            server.terminate()
            server.wait()


def endless(folder: Path) -> Path:
    """The bundled model without a token that ends its text."""
    shutil.copytree(TINY, folder)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**settings, "eos_token_id": None}))
    return folder


def wait_for(server: Any, address: str) -> None:
    """Returns when the page is there. Raises RuntimeError if the server ends, or a minute passes."""
    for _ in range(120):
        try:
            urllib.request.urlopen(address, timeout=1).close()
            return
        except OSError:
            if server.poll() is not None:
                raise RuntimeError(f"the demo ended with code {server.returncode}") from None
            time.sleep(0.5)
    raise RuntimeError("the demo did not answer within a minute")


def choose(page: Any, new: int, beside: bool) -> None:
    page.get_by_label("Own text").click()
    page.locator("#text textarea").fill(TEXT)
    page.get_by_role("button", name="Sampling, limits, speed").click()
    page.get_by_label("full speed").click()
    page.locator("#new input").fill(str(new))
    if not beside:
        page.get_by_label("Full cache beside it").uncheck()
    page.wait_for_timeout(1000)


def watched(page: Any, looks: bool) -> Row:
    """One run: tokens per second by the clock, when the page was updated, and times between frames."""
    page.evaluate(
        "looks => { player.seen_ = null; player.key = null; player.times = [];"
        "player.follow = looks ? Player_follow : key => { player.seen_ = key; }; }",
        looks,
    )
    page.evaluate(FRAMES)
    page.click("#start")
    if looks:
        page.wait_for_function("() => player.times.length > 2 && !player.done", timeout=60_000)
        page.wait_for_function("() => player.done && player.runs.every(run => run.head.end)", timeout=300_000)
    else:  # only asks whether it is over, once a second
        page.wait_for_function("() => player.seen_", timeout=60_000)
        done = "async () => (await player.source.poll(player.seen_, [])).runs.every(run => run.end)"
        while not page.evaluate(done):
            page.wait_for_timeout(1000)
        page.evaluate("() => Player_follow.call(player, player.seen_)")
        page.wait_for_function("() => player.done && player.runs.every(run => run.head.end)")
    page.evaluate("() => cancelAnimationFrame(window.ticking)")
    return page.evaluate(FOUND)


def plain(model: Any, tokenizer: Any, new: int) -> float:
    """Tokens per second of `generate` with the same cache."""
    inputs = tokenizer(TEXT, return_tensors="pt")
    cache, begun = KaraCache(model, **SETTINGS), time.perf_counter()
    out = model.generate(**inputs, past_key_values=cache, max_new_tokens=new, do_sample=False)
    return (out.shape[1] - inputs["input_ids"].shape[1]) / (time.perf_counter() - begun)
