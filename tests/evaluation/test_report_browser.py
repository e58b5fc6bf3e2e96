"""The report of the evaluation kit in a real browser: everything is drawn, without a network, on any screen."""

import pytest
from test_evaluation_report import METHODS, measured, page

WIDE, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
DRAWN = "() => [...document.querySelectorAll('.plot')].every(plot => plot.querySelector('svg.main-svg'))"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    page(measured(30, rules=("prompt-kept", "query-agnostic"), budgets=(0.5, 0.125)), folder)
    return folder / "report.html"


@pytest.mark.parametrize("screen, scheme", [(WIDE, "light"), (PHONE, "dark")], ids=["wide, light", "phone, dark"])
def test_the_report_is_drawn(browser, written, screen, scheme):
    context = browser.new_context(viewport=screen, color_scheme=scheme, offline=True)
    shown, wrong = context.new_page(), []
    shown.on("pageerror", lambda error: wrong.append(str(error)))
    shown.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    shown.on(
        "request", lambda request: None if request.url.startswith(("file:", "data:")) else wrong.append(request.url)
    )
    shown.goto(written.as_uri())
    shown.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    for plot in shown.query_selector_all(".plot"):
        plot.scroll_into_view_if_needed()
    shown.wait_for_function(DRAWN, timeout=40_000)
    assert shown.evaluate("document.documentElement.scrollWidth") <= screen["width"]
    ground = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in ground.removeprefix("rgb(").rstrip(")").split(","))
    assert (brightness > 600) == (scheme == "light")
    assert not wrong
    context.close()


def test_methods_are_hidden_and_shown(browser, written):
    context = browser.new_context(viewport=WIDE)
    shown = context.new_page()
    shown.goto(written.as_uri())
    shown.wait_for_selector("#figure0 svg.main-svg", timeout=40_000)
    lines = "() => document.querySelectorAll('#figure0 .scatterlayer .trace').length"
    before = shown.evaluate(lines)
    button = shown.locator(f".legend button[value='{list(METHODS)[0]}']").first
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    shown.wait_for_function(f"({lines})() < {before}", timeout=20_000)
    button.click()
    shown.wait_for_function(f"({lines})() === {before}", timeout=20_000)
    assert button.get_attribute("aria-pressed") == "true"
    context.close()
