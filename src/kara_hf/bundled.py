"""Where the models and adapters are that come with this package."""

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
BUNDLED_MODEL = ASSETS / "tiny_reasoner"


def place_of(name: str) -> str:
    """The folder of the asset of that name; any other name as it is."""
    return str(ASSETS / name) if name and "/" not in name and (ASSETS / name).is_dir() else name
