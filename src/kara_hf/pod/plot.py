"""Draws how alike layers attend and which of them share keys: a page that needs no network, or a PNG."""

from importlib import import_module
from pathlib import Path

from ..config import require
from ..needs import Check, Need, Package, check_needs, extra
from ..policy.sharing import PoDSharing
from .picture import picture_of
from .similarity import LayerSimilarity

WRITERS = {".html": ("plotly", ".plot_html"), ".png": ("matplotlib", ".plot_png")}  # what draws it, and the module


def needs_of(path: str | Path) -> list[Need]:
    """What drawing into such a file needs: a package, and a folder.

    Raises:
        ValueError: its name ends in neither .html nor .png.
    """
    path = Path(path)
    require(path.suffix in WRITERS, "plot", str(path), f"a file name that ends in {' or '.join(WRITERS)}")
    folder = path.absolute().parent.is_dir()
    return [
        Package(WRITERS[path.suffix][0], extra("plot")),
        Check(lambda: require(folder, "plot", str(path), "in a folder that is there")),
    ]


def plot(similarity: LayerSimilarity, sharing: PoDSharing, path: str | Path) -> None:
    """Draws the similarity of layers for each KV head, with the groups outlined, and beside it who leads.

    Args:
        path: .html (a page that needs no network; with plotly) or .png (with matplotlib).

    Raises:
        ValueError: its name ends in neither, or its folder is not there.
        ImportError: what draws it is not installed.
    """
    path = Path(path)
    check_needs({"plot": needs_of(path)})
    _, module = WRITERS[path.suffix]
    import_module(module, __package__).write(picture_of(similarity, sharing), path)
