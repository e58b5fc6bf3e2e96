"""The demo in a real browser: what is drawn agrees with the cache, and whatever visitors do, the page goes on."""

import json
import time
import urllib.error
import urllib.request
import weakref
from pathlib import Path

import pytest
from support.demo import TINY
from support.demo_browser import ENDED, PHONE, fill, gone, pace, run, the_session

from kara_hf.demo.models import BUNDLED
from kara_hf.demo.recorder import CacheRecorder
from kara_hf.demo.recording import Recording


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


def test_what_is_drawn_is_what_the_cache_holds(visit, sessions, last_reports, tmp_path):
    page = visit()
    fill(page, "length", 120)
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

    # the same by keys, which a screen reader tells
    page.locator(".kh-text").last.focus()
    page.keyboard.press("Home")
    for _ in range(evicted):
        page.keyboard.press("ArrowRight")
    assert page.locator(".kh-tip").inner_text() == tip and "evicted" in tip.splitlines()
    assert page.locator(".kh-spoken[role=status]").inner_text() == ", ".join(tip.splitlines())
    assert page.locator(".t[data-at]").count() == 1
    page.keyboard.press("ArrowUp")
    assert page.evaluate("() => player.panes[1].cursor") == max(0, evicted - 64)
    page.keyboard.press("Escape")
    assert page.locator(".kh-tip").is_hidden() and page.locator(".t[data-at]").count() == 0

    # the timeline
    for generated in (1, 50, 90):
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
    pages, third = [visit(), visit()], visit()  # which takes long to open where the machine has other work
    fill(third, "length", 80)
    for page, length in zip(pages, (600, 500), strict=True):  # long enough not to end while the others are used
        fill(page, "length", length)
        pace(page, "20 tokens/s")
    for page in pages:
        run(page, wait=False)
    for page in pages:
        page.wait_for_function("() => player.generated > 2")
    assert sessions.live == 4
    prompts = [page.evaluate("() => player.prompt.length") for page in pages]
    assert prompts[0] > prompts[1]
    caches = [weakref.ref(each.cache) for session in sessions._of.values() for each in session.runs]
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
    page.wait_for_function("() => document.querySelector('#choice input').value === 'KV-Compress, published'")
    fill(page, "length", 240)
    run(page)
    kept = page.evaluate("() => player.state().kept")
    assert len(set(kept)) > 1 and "Heads differ" in page.locator(".kh-heads .kh-note").first.inner_text()
    assert page.locator(".kh-heads").last.is_hidden()
    page.locator("#choice input").click()
    page.get_by_role("option", name="Kara + PoD", exact=True).click()
    page.wait_for_function("() => document.querySelector('#model input').value === 'deep_reasoner'")
    fill(page, "length", 200)
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
    assert page.locator(".t.shared").count() > 20
