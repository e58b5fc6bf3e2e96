"""What tests of the demo share: the bundled models, loaded once, and the app with tabs of a browser on it."""

import socket

import pytest
from support.demo import both
from support.demo_browser import SLOW, WIDE

pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'kara_hf[demo]'")

from kara_hf.demo.app import launch
from kara_hf.demo.request import Limits
from kara_hf.demo.sessions import Sessions


@pytest.fixture(scope="session")
def models():
    return both()


@pytest.fixture(scope="module")
def sessions():
    return Sessions()


@pytest.fixture(scope="module")
def address(models, sessions):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    limits = Limits(new=800, prompt=1200, runs=2)
    app = launch(
        models,
        limits,
        sessions,
        server_name="127.0.0.1",
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
    )
    yield app.local_url
    app.close()


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
