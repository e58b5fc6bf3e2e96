"""How fast the demo draws, and what drawing costs: a browser watches runs of the bundled model, or looks away.

    python benchmarks/demo.py

Runs with the text being drawn, runs that nobody looks at and plain `generate` without a recording take turns. Then one
run of 4,000 tokens is watched, and the timeline is moved through it. The browser runs on the same machine. Needs
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
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from playwright.sync_api import sync_playwright
from provenance import provenance
from transformers import AutoModelForCausalLM, AutoTokenizer

from kara_hf import KaraCache
from kara_hf.bundled import BUNDLED_MODEL
from kara_hf.cli.generate import BUNDLED_SETTINGS

PORT = 7899
TEXT = "ba : 8 ; xa : 4 ; qo : ba + xa ; ? qo xa >"
FRAMES = """() => {
  window.frames_ = [];
  let before = performance.now();
  const tick = () => { window.ticking = requestAnimationFrame(frame); };
  const frame = now => { window.frames_.push(now - before); before = now; tick(); };
  tick();
}"""
WIDE = {"width": 1280, "height": 800}


def endless(folder: Path) -> Path:
    """The bundled model without a token that ends its text."""
    shutil.copytree(BUNDLED_MODEL, folder)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**settings, "eos_token_id": None}))
    return folder


def choose(page: Any, new: int, beside: bool) -> None:
    page.get_by_label("Own text").click()
    page.locator("#text textarea").fill(TEXT)
    page.get_by_role("button", name="Sampling, limits, speed").click()
    page.get_by_label("full speed").click()
    page.locator("#new input").fill(str(new))
    if not beside:
        page.get_by_label("Full cache beside it").uncheck()
    page.wait_for_timeout(1000)


def watched(page: Any, looks: bool) -> dict[str, Any]:
    """One run: tokens per second by the clock, how often the page was updated, and times between frames."""
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
    return page.evaluate(
        """() => ({rates: player.runs.map(run => run.tokens.length / run.head.end.seconds), times: player.times,
        tokens: player.runs.map(run => run.tokens.length), frames: window.frames_})"""
    )


def plain(model: Any, tokenizer: Any, new: int) -> float:
    """Tokens per second of `generate` with the same cache."""
    inputs = tokenizer(TEXT, return_tensors="pt")
    cache, begun = KaraCache(model, **BUNDLED_SETTINGS), time.perf_counter()
    out = model.generate(**inputs, past_key_values=cache, max_new_tokens=new, do_sample=False)
    return (out.shape[1] - inputs["input_ids"].shape[1]) / (time.perf_counter() - begun)


def spread(values: list[float]) -> str:
    cuts = statistics.quantiles(values, n=100)
    middle = f"median {statistics.median(values):.1f}"
    return f"{middle}, 95 % below {cuts[94]:.1f}, 99 % below {cuts[98]:.1f}, most {max(values):.1f}"


def main(
    repeats: Annotated[int, typer.Option(help="Rounds of runs that are watched, not watched, and plain.")] = 6,
    tokens: Annotated[int, typer.Option(help="Tokens of each of these.")] = 1000,
    long: Annotated[int, typer.Option(help="Tokens of the long run.")] = 4000,
    beside: Annotated[bool, typer.Option(help="With the full cache beside it.")] = True,
) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        place = endless(Path(folder) / "endless")
        command = [sys.executable, "-m", "kara_hf", "demo", "--model", str(place), "--port", str(PORT)]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            for _ in range(120):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{PORT}/", timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.5)
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport=WIDE)
            page.goto(f"http://127.0.0.1:{PORT}/")
            page.wait_for_function("() => window.player")
            page.evaluate("() => { window.Player_follow = Object.getPrototypeOf(player).follow; }")
            choose(page, tokens, beside)
            model, tokenizer = AutoModelForCausalLM.from_pretrained(place).eval(), AutoTokenizer.from_pretrained(place)
            plain(model, tokenizer, tokens)
            watched(page, True)
            rates: dict[str, list[float]] = {"drawn": [], "not looked at": [], "plain generate": []}
            updates, frames = [], []
            for _ in range(repeats):
                run = watched(page, True)
                rates["drawn"].append(run["rates"][-1])
                updates.append((len(run["times"]) - 1) * 1000 / (run["times"][-1] - run["times"][0]))
                frames += run["frames"]
                rates["not looked at"].append(watched(page, False)["rates"][-1])
                rates["plain generate"].append(plain(model, tokenizer, tokens))
            print({name: value for name, value in provenance("cpu").items() if name != "python"})
            print(f"{repeats} runs of {tokens} tokens, {'two runs taking turns' if beside else 'one run'}")
            for name, values in rates.items():
                print(f"  {name}: {statistics.median(values):.0f} tokens/s ({min(values):.0f} to {max(values):.0f})")
            slower = [1 - a / b for a, b in zip(rates["drawn"], rates["not looked at"], strict=True)]
            pairs = f"pairs: {min(slower):.1%} to {max(slower):.1%}"
            print(f"  drawing slows generation by {statistics.median(slower):.1%} ({pairs})")
            print(f"  updates per second: {statistics.median(updates):.1f} (least {min(updates):.1f})")
            print(f"  ms between frames: {spread(frames)}")
            page.locator("#new input").fill(str(long))
            page.wait_for_timeout(500)
            run = watched(page, True)
            times = run["times"]
            gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
            pace = f"{run['rates'][-1]:.0f} tokens/s, {len(gaps) * 1000 / (times[-1] - times[0]):.1f} updates/s"
            print(f"{len(run['tokens'])} runs of {run['tokens'][-1]} tokens: {pace}")
            print(f"  ms between frames: {spread(run['frames'])}")
            print(f"  ms between updates: {spread(gaps)}")
            moves = page.evaluate(
                """async () => { const found = [], most = player.generated;
                for (let i = 0; i < 60; i++) {
                  const begun = performance.now();
                  player.seek(Math.floor(most * ((i * 37) % 60) / 60));
                  await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
                  found.push(performance.now() - begun);
                } return found; }"""
            )
            print(f"  ms from a move of the timeline to its picture: {spread(moves)}")
            browser.close()
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command(help=__doc__)(main)
    app()
