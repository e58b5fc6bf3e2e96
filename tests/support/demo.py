"""Sessions of the demo without a page."""

from pathlib import Path

from kara_hf.demo.models import BUNDLED, Models
from kara_hf.demo.presets import KARA, SMALL_DEFAULTS, TRACE
from kara_hf.demo.request import DemoRequest, Limits, open_session

(TINY,) = BUNDLED
DEEP_FOLDER = Path(__file__).parents[1] / "data" / "deep_reasoner"  # a small model that has a map
DEEP = DEEP_FOLDER.name
SETTINGS = {**SMALL_DEFAULTS, "window": 16, "recent": 8, "protected": 8, "observation": 4}


def both():
    """The bundled model, which is chosen at first, and the one with a map."""
    models = Models([str(DEEP_FOLDER)], device="cpu")
    models.places = dict(reversed(models.places.items()))
    return models


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
