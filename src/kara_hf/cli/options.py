"""What the commands of `kara-hf` have in common. Needs neither torch nor Transformers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

BUNDLED_MODEL = Path(__file__).parents[1] / "assets" / "tiny_reasoner"
BUNDLED_CALIBRATION = Path(__file__).parents[1] / "assets" / "tiny_reasoner_calibration"
DTYPES = ("auto", "float32", "float16", "bfloat16")


@contextmanager
def readable_errors() -> Iterator[None]:
    """Ends the command with one line on stderr; code 2 if what was asked is not possible, 1 if it failed on the way."""
    try:
        yield
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_lack_of_memory(error):
            raise
        typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2 if isinstance(error, ValueError | ImportError) else 1) from error


def _is_lack_of_memory(error: RuntimeError) -> bool:
    from torch import OutOfMemoryError

    from ..storage import PoolExhausted

    return isinstance(error, OutOfMemoryError | PoolExhausted)
