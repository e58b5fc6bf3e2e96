"""Draws how alike layers attend and which of them share keys: a page that needs no network, or a PNG."""

from importlib import import_module
from pathlib import Path

from ..config import require
from ..policy.sharing import PoDSharing
from ..requirements import require_packages
from .picture import picture_of
from .similarity import LayerSimilarity

WRITERS = {".html": ("plotly", ".plot_html"), ".png": ("matplotlib", ".plot_png")}  # what draws it, and the module


def packages_of(path: str | Path) -> dict[str, str]:
    """What drawing into such a file needs, as `require_packages` takes it.

    Raises:
        ValueError: its name ends in neither .html nor .png, or its folder is not there.
    """
    path = Path(path)
    require(path.suffix in WRITERS, "plot", str(path), f"a file name that ends in {' or '.join(WRITERS)}")
    require(path.absolute().parent.is_dir(), "plot", str(path), "in a folder that is there")
    return {WRITERS[path.suffix][0]: "kara_hf[plot]"}


def plot(similarity: LayerSimilarity, sharing: PoDSharing, path: str | Path) -> None:
    """Draws the similarity of layers for each KV head, with the groups outlined, and beside it who leads.

    Args:
        path: .html (a page that needs no network; with plotly) or .png (with matplotlib).

    Raises:
        ValueError: as `packages_of`.
        ImportError: what draws it is not installed.
    """
    path = Path(path)
    require_packages(f"a picture in {path.suffix}", packages_of(path))
    _, module = WRITERS[path.suffix]
    import_module(module, __package__).write(picture_of(similarity, sharing), path)
