"""What `divergence` leaves in a folder: a file of lines for each cell, an array for each document. Needs no torch."""

from pathlib import Path

import pandas as pd  # type: ignore[import-untyped]

from .results import CELL, Cell, Lines, load

LINES = Lines(
    {
        "number": int,
        "document": str,  # a digest of its ids
        "prompt": int,
        "tokens": int,  # that were forced
        "kl_mean": float,
        "kl_median": float,
        "kl_99": float,
        "kl_max": float,
        "same": float,  # share of tokens at which both caches find the same one likeliest
        "loss": float,
        "full_loss": float,
        "resident_bytes": int,
        "end_bytes": int,
        "full_bytes": int,
        "seconds": float,
    },
    suffix=".divergence",
)
TASK = "divergence:"  # what comes before the name of the data in a cell's task
EQUAL = 0.03  # of a budget of bytes: what counts as equal


def load_divergence(folder: str | Path) -> pd.DataFrame:
    """All lines of a folder: a row for each cell and document, with the fields of `Cell` and of a line, settings and
    provenance, and in ``arrays`` the file of its tokens, from which `numpy.load` reads kl, same, loss and full_loss.

    Raises:
        ValueError: there are none, or a line is damaged.
    """
    frame = load(folder, LINES)
    cells = frame[CELL].to_dict("records")
    frame["arrays"] = [
        str(arrays_of(Path(folder), Cell(**cell), number)) for cell, number in zip(cells, frame["number"], strict=True)
    ]
    return frame


def arrays_of(folder: Path, cell: Cell, number: int) -> Path:
    """The file of the tokens of a document."""
    stem = folder / cell.stem
    return stem.with_name(f"{stem.name}.tokens") / f"{number}.npz"
