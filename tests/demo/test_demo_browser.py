"""The demo in a real browser: what is drawn agrees with the cache, and whatever visitors do, the page goes on."""

import gc
import itertools
import json
import socket
import time
import urllib.error
import urllib.request
import weakref
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'kara_hf[demo]'")


from kara_hf.demo.app import launch
from kara_hf.demo.models import BUNDLED, Models
from kara_hf.demo.recorder import CacheRecorder
from kara_hf.demo.recording import Recording
from kara_hf.demo.request import Limits
from kara_hf.demo.sessions import Sessions

WIDE, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
TINY, DEEP = BUNDLED
ENDED = "() => player.runs.length && player.done && player.runs.every(run => run.head.end) && player.at === null"
SLOW = 40_000  # milliseconds, on a busy machine


@pytest.fixture(scope="module")
def sessions():
    return Sessions()


@pytest.fixture(scope="module")
def address(sessions):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    limits = Limits(new=800, prompt=1200, runs=2)
    app = launch(
        Models(device="cpu"),
        limits,
        sessions,
        server_name="127.0.0.1",
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
    )
    yield app.local_url
    app.close()


@pytest.fixture(autouse=True)
def last_reports(monkeypatch):
    """What each recording's cache reported and held after its last step."""
    last, step = {}, CacheRecorder.step

    def watch(self, text, seconds):
        step(self, text, seconds)
        if self.cache is not None:
            rows = self.recording.rows
            last[id(self.recording)] = (
                self.cache.report(),
                [self.cache.kept_positions(layer, 0, head).tolist() for layer, head in rows],
            )

    monkeypatch.setattr(CacheRecorder, "step", watch)
    return last


@pytest.fixture
def visit(browser, address):
    """Opens the app in a tab of its own; nothing but the server may be asked for anything, and no script may fail."""
    tabs, faults = [], []

    def opened(viewport=WIDE, **options):
        context = browser.new_context(viewport=viewport, accept_downloads=True, **options)
        page = context.new_page()
        page.set_default_timeout(SLOW)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "request",
            lambda request: (
                request.url.startswith((address, "data:", "blob:")) or faults.append(f"asked for {request.url}")
            ),
        )
        page.goto(address)
        page.wait_for_function("() => window.player")
        page.wait_for_selector("#start")
        tabs.append(context)
        return page

    yield opened
    for context in tabs:
        context.close()
    assert not faults


def fill(page, name, value):
    box = page.locator(f"#{name} input, #{name} textarea").first
    box.fill(str(value))
    box.blur()


def pace(page, name):
    page.get_by_role("button", name="Sampling, limits, speed").click()
    page.get_by_label(name).click()


def run(page, wait=True):
    page.evaluate("() => { player.key = null; player.runs = []; }")
    page.click("#start")
    if wait:
        page.wait_for_function(ENDED)


def gone(sessions, caches=()):
    """Whether all runs let go of their caches soon."""
    for _ in range(150):
        gc.collect()
        if not sessions.live and not any(cache() for cache in caches):
            return True
        time.sleep(0.1)
    return False


def the_session(sessions):
    (session,) = sessions._of.values()
    return session


def test_what_is_drawn_is_what_the_cache_holds(visit, sessions, last_reports, tmp_path):
    page = visit()
    fill(page, "length", 240)
    pace(page, "full speed")
    run(page, wait=False)
    page.wait_for_selector(".kh-pane:last-child .t.sealed")
    page.wait_for_function(ENDED)
    session = the_session(sessions)
    full, kara = (run.recording for run in session.runs)
    report, positions = last_reports[id(kara)]

    # numbers
    state = page.evaluate(
        "() => ({...player.state(), positions: player.main.head.rows.map((_, row) => player.state().positions(row))})"
    )
    assert state["seen"] == int(report.seen[0]) and state["positions"] == positions
    assert state["kept"] == [int(report.kept[layer, 0, head]) for layer, head in kara.rows]
    assert state["sample"] == [
        state["seen"],
        report.nominal_bytes,
        report.resident_bytes,
        report.peak_bytes,
        report.full_bytes,
    ]
    shown = page.locator(".kh-figures").last.inner_text()
    assert f"{round(report.kept.double().mean().item()):,} of {state['seen']:,} tokens per head" in shown
    assert f"{100 * report.resident_bytes / report.full_bytes:.0f} % of full" in shown
    cells = page.locator(".kh-heads").first.locator(".cell").all_inner_texts()
    assert [int(cell.replace(",", "")) for cell in cells] == state["kept"]

    # the answer
    verdicts = page.locator(".kh-verdict").all_inner_texts()
    for recording, verdict in zip((full, kara), verdicts, strict=True):
        assert ("right: " if recording.end["score"] == 1 else "wrong: ") + recording.end["answer"] in verdict
    different = next(
        (i for i, pair in enumerate(zip(full.tokens, kara.tokens, strict=False)) if len(set(pair)) > 1), None
    )
    assert page.locator(".t.diff").count() == (0 if different is None else 2)

    # colours of one head
    page.locator(".kh-choose select").first.select_option("2")
    page.locator(".kh-choose select").last.select_option("1")
    row = kara.rows.index([2, 1])
    drawn = page.evaluate("() => [...document.querySelectorAll('.kh-pane:last-child .t')].map(span => span.className)")
    kinds = [None] * len(drawn)
    for start, end, kind in kara.chunks(row, kara.seen):
        kinds[start:end] = [kind] * (end - start)
        if kind == "sealed":
            assert "cs" in drawn[start].split() and "ce" in drawn[end - 1].split()
            assert not any({"cs"} & set(each.split()) for each in drawn[start + 1 : end])
    kinds = [kind or "evicted" for kind in kinds]
    kinds[kara.seen :] = ["fresh"] * (len(drawn) - kara.seen)
    assert [each.split()[1] for each in drawn] == kinds
    legend = {
        name: int(number.replace(",", ""))
        for name, number in page.evaluate(
            """() => Object.entries(player.entries).filter(([, node]) => !node.parentNode.hidden)
            .map(([name, node]) => [name, node.textContent.trim()])"""
        )
    }
    assert legend == {kind: kinds.count(kind) for kind in legend} and set(legend) == set(kinds)

    # hovering
    evicted = kinds.index("evicted")
    page.evaluate("p => player.panes[1].spans[p].scrollIntoView({block: 'center'})", evicted)
    page.locator(".kh-pane:last-child .t.evicted").first.hover()
    tip = page.locator(".kh-tip").inner_text()
    assert (
        f"position {evicted:,}" in tip
        and "held by 0 of 1 head of layer 2" in tip
        and "score " in tip
        and "evicted when" in tip
    )

    # the timeline
    for generated in (1, 100, 180):
        page.locator(".kh-slider").evaluate(
            "(slider, to) => { slider.value = to; slider.dispatchEvent(new Event('input')); }", generated
        )
        seen = kara.prompt + generated - 1
        assert page.evaluate("row => player.state().positions(row)", row) == kara.kept_positions(row, seen).tolist()
        visible = page.locator(".kh-pane:last-child .t:visible")
        assert visible.count() == seen + 1
        assert page.locator(".kh-moment").inner_text().startswith(f"token {generated} of")
        struck = page.locator(".kh-pane:last-child .t.evicted:visible").count()
        assert struck == seen - len(kara.kept_positions(row, seen))

    # the export
    with page.expect_download() as saved:
        page.click("text=Save JSON")
    data = json.loads(Path(saved.value.path()).read_text())
    assert [Recording.from_dict(each) for each in data["runs"]] == [full, kara]
    with page.expect_download() as saved:
        page.click("text=Save page")
    place = tmp_path / "run.html"
    saved.value.save_as(place)
    offline = page.context.browser.new_context(offline=True, viewport=PHONE, color_scheme="dark")
    alone, faults = offline.new_page(), []
    alone.on("pageerror", lambda error: faults.append(str(error)))
    alone.goto(place.as_uri())
    alone.wait_for_function(ENDED)
    assert alone.evaluate("() => player.state().positions(5)") == positions[5]
    assert alone.evaluate("() => document.documentElement.scrollWidth") <= PHONE["width"]
    assert alone.locator("body.dark").count() == 1 and not faults
    alone.click("text=Replay")
    alone.wait_for_function("() => player.at > 3")
    offline.close()
    assert gone(sessions)


def test_stop_step_and_start_again(visit, sessions):
    page = visit()
    pace(page, "20 tokens/s")
    run(page, wait=False)
    page.wait_for_function("() => player.generated > 3")
    page.click("#pause")
    page.wait_for_function("() => player.paused")
    page.wait_for_timeout(300)
    at = the_session(sessions).generated
    for more in (1, 2):
        page.click("#step")
        page.wait_for_function("n => player.runs.every(run => run.tokens.length === n)", arg=at + more)
    run(page, wait=False)  # ends that one, although it waits
    page.wait_for_function("() => player.generated > 1 && !player.paused")
    caches = [weakref.ref(each.cache) for each in the_session(sessions).runs]
    page.click("#stop")
    page.wait_for_function(ENDED)
    assert page.locator(".kh-verdict").all_inner_texts()[1].startswith("stopped")
    assert gone(sessions, caches)
    page.click("#step")  # without a run, the first step of a new one
    page.wait_for_function("() => player.paused && !player.done && player.generated <= 1")
    page.click("#step")
    page.wait_for_function("() => player.generated === 1")


def test_bad_input_is_explained_and_the_page_goes_on(visit, sessions):
    page = visit()
    pace(page, "full speed")
    message = page.locator("#status .error")

    def refused(*parts):
        page.click("#start")
        for part in parts:
            page.wait_for_function("part => document.querySelector('#status').innerText.includes(part)", arg=part)
        assert message.count() == 1

    fill(page, "length", 120)
    fill(page, "set-retention", 75)
    refused("retention=75 is not possible: retention must be a number in (0, 1]")
    fill(page, "set-retention", 0.5)
    fill(page, "set-window", -3)
    refused("window=-3 is not possible")
    fill(page, "set-window", 32)
    fill(page, "length", 99999999)
    refused("length=99999999 is not possible", "from 1 to 800")
    page.get_by_label("Own text").click()
    page.wait_for_selector("#text textarea")
    refused("prompt=''", "some text to continue")
    fill(page, "text", "tell me a joke")
    refused("knows only the words of its own problems")
    fill(page, "model", "nobody/has-this")
    page.keyboard.press("Enter")
    refused("model='nobody/has-this' cannot be loaded")
    fill(page, "model", "/etc/passwd")
    page.keyboard.press("Enter")
    refused("model='/etc/passwd' is not possible", "has to be named when the demo is started")
    fill(page, "model", TINY)
    page.keyboard.press("Enter")
    fill(page, "text", "ba : 8 ; xa : 4 ; qo : ba + xa ; ? qo xa >")
    run(page)
    assert message.count() == 0 and "ans" in page.locator(".kh-text").last.inner_text()


def test_visitors_have_their_own_runs_and_leave_nothing_behind(visit, sessions):
    pages = [visit(), visit()]
    for page, length in zip(pages, (300, 200), strict=True):
        fill(page, "length", length)
        pace(page, "20 tokens/s")
        run(page, wait=False)
    for page in pages:
        page.wait_for_function("() => player.generated > 2")
    assert sessions.live == 4
    prompts = [page.evaluate("() => player.prompt.length") for page in pages]
    assert prompts[0] > prompts[1]
    caches = [weakref.ref(each.cache) for session in sessions._of.values() for each in session.runs]
    third = visit()
    fill(third, "length", 80)
    third.click("#start")
    third.wait_for_function("() => document.querySelector('#status').innerText.includes('All 2 places are taken')")
    assert sessions.live == 4
    third.click("#stop")  # gives up waiting
    third.click("#start")
    third.click("#start")
    pages[0].close()
    third.wait_for_function("() => player.generated > 2")
    third.close()
    for _ in range(150):
        if sessions.live == 2:
            break
        time.sleep(0.1)
    assert sessions.live == 2
    before = pages[1].evaluate("() => player.generated")
    pages[1].wait_for_function("n => player.generated > n", arg=before)
    pages[1].goto("about:blank")
    assert gone(sessions, caches)


def test_no_file_is_read_for_a_visitor(address):
    root = Path(__file__).parents[2]
    for path in (
        "/etc/passwd",
        root / "pyproject.toml",
        "pyproject.toml",
        "../main/pyproject.toml",
        BUNDLED[TINY] / "config.json",
    ):
        for prefix in ("gradio_api/file=", "file=", "static/", "gradio_api/file/"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"{address}{prefix}{path}", timeout=20)
            assert refused.value.code in (403, 404, 405), (prefix, path)
    part = (
        b"--x\r\nContent-Disposition: form-data; name=files; filename=a.txt\r\n\r\n" + 10_000 * b"a" + b"\r\n--x--\r\n"
    )
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(f"{address}gradio_api/upload", part, kind), timeout=20)
    assert refused.value.code == 413


def test_other_methods_and_shared_keys(visit, sessions):
    page = visit()
    pace(page, "full speed")
    page.get_by_label("Needle").click()
    page.wait_for_function("() => document.querySelector('#choice input').value === 'KV-Compress'")
    fill(page, "length", 400)
    run(page)
    kept = page.evaluate("() => player.state().kept")
    assert len(set(kept)) > 1 and "Heads differ" in page.locator(".kh-heads .kh-note").first.inner_text()
    assert page.locator(".kh-heads").last.is_hidden()
    page.locator("#choice input").click()
    page.get_by_role("option", name="Kara + PoD", exact=True).click()
    page.wait_for_function("() => document.querySelector('#model input').value === 'deep_reasoner'")
    fill(page, "length", 300)
    page.locator("#set-compress_prompt input").check()
    run(page)
    recording = the_session(sessions).runs[-1].recording
    keys = [
        int(text.split()[0].replace(",", ""))
        for text in page.locator(".kh-heads").last.locator(".cell").all_inner_texts()
    ]
    follows = [lead != layer for lead, (layer, _) in zip(recording.leads, recording.rows, strict=True)]
    for row, (count, follower) in enumerate(zip(keys, follows, strict=True)):
        assert count == (64 if follower else len(recording.kept_positions(row, recording.seen)))
    values = sum(len(recording.kept_positions(row, recording.seen)) for row in range(len(keys)))
    assert (sum(keys) + values) * 32 * 4 == recording.samples[-1][1]  # float32 in 32 dimensions: what the cache reports
    assert page.locator(".kh-heads .follows").count() == sum(follows) > 0
    assert page.locator(".t.shared").count() > 50


LOOKS = """() => {
  const pen = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const ground = getComputedStyle(player.root).backgroundColor;
  const over = colour => {
    for (const each of [ground, colour]) { pen.fillStyle = each; pen.fillRect(0, 0, 1, 1); }
    return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3).map(part => part / 255);
  };
  return Object.fromEntries([...document.querySelectorAll(".kh-legend .t")].map(span => {
    const style = getComputedStyle(span), cues = ["borderTopWidth", "borderBottomWidth", "borderBottomStyle",
      "textDecorationLine", "outlineStyle"].map(name => style[name]).join(" ");
    return [span.classList[1], {ground: over(style.backgroundColor), text: over(style.color), style: cues}];
  }));
}"""
CONES = {  # what is left of linear RGB without one kind of cones (Machado, Oliveira and Fernandes, 2009)
    "full colour": np.eye(3),
    "protanopia": np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]),
    "deuteranopia": np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]),
    "tritanopia": np.array([[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]]),
}


def lab(colour, cones):
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    linear = np.clip(cones @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    f = np.cbrt(xyz / np.array([0.9505, 1.0, 1.089]))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])]), linear @ np.array(
        [0.2126, 0.7152, 0.0722]
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_told_apart_and_texts_read(visit, scheme):
    page = visit(color_scheme=scheme)
    got = page.evaluate(LOOKS)
    tinted = {name: np.array(each["ground"]) for name, each in got.items() if name not in ("evicted", "fresh", "whole")}
    assert set(tinted) == {"prompt", "sealed", "open", "recent", "shared"}
    for kind, cones in CONES.items():
        for (a, one), (b, other) in itertools.combinations(tinted.items(), 2):
            apart = np.linalg.norm(lab(one, cones)[0] - lab(other, cones)[0])
            assert apart > 9 or got[a]["style"] != got[b]["style"], (kind, a, b, apart)
    assert len({each["style"] for each in got.values()}) >= 6  # a second cue, for those who see no colours at all
    for name, each in got.items():
        if name != "evicted":
            light, dark = sorted((lab(np.array(each[part]), np.eye(3))[1] for part in ("ground", "text")), reverse=True)
            assert (light + 0.05) / (dark + 0.05) > 4.5, name


def test_it_fits_a_laptop_and_a_phone(visit):
    for viewport in (WIDE, PHONE):
        page = visit(viewport=viewport)
        fill(page, "length", 80)
        pace(page, "full speed")
        run(page)
        assert page.evaluate("() => document.documentElement.scrollWidth") <= viewport["width"]
        for name in ("#start", "#stop", "#step", "#pause"):
            box = page.locator(name).bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= viewport["width"] and box["height"] >= 24
        panes = [page.locator(".kh-pane").nth(i).bounding_box() for i in (0, 1)]
        assert all(box["width"] > 250 for box in panes)
        beside = panes[0]["y"] == panes[1]["y"]
        assert beside == (viewport is WIDE)
