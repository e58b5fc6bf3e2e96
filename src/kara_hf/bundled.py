"""Where the bundled models and what belongs to them lie."""

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
BUNDLED_MODEL = ASSETS / "tiny_reasoner"
BUNDLED_CALIBRATION = ASSETS / "tiny_reasoner_calibration"
