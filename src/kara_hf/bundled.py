"""Where the models are that come with this package."""

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
BUNDLED_MODEL = ASSETS / "tiny_reasoner"
