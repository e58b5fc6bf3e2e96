"""What a test does on the page of the demo."""

import gc
import time

WIDE, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
ENDED = "() => player.runs.length && player.done && player.runs.every(run => run.head.end) && player.at === null"
SLOW = 40_000  # milliseconds, on a busy machine


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
