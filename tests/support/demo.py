"""Sessions of the demo without a page."""

from kara_hf.demo.models import BUNDLED
from kara_hf.demo.presets import DEFAULTS, KARA, TRACE
from kara_hf.demo.request import DemoRequest, Limits, open_session

TINY, DEEP = BUNDLED
SETTINGS = {**DEFAULTS, "window": 16, "recent": 8, "protected": 8, "observation": 4}


def request(**changes):
    values = {
        "model": TINY,
        "task": TRACE,
        "length": 80,
        "number": 0,
        "text": "",
        "choice": KARA,
        "beside": False,
        "new": 0,
        "temperature": 0,
        "seed": 0,
        "pace": "full speed",
        "settings": {**SETTINGS, **changes.pop("settings", {})},
    }
    return DemoRequest(**{**values, **changes})


def make(models, paused=False, limits=None, **changes):
    return open_session(request(**changes), models, limits or Limits(), paused)


def finished(session):
    session.start()
    for run in session.runs:
        run.join(60)
    assert session.done
    return session
