"""Samples of text that a command measures a model on: what they need, where they are from, and a bar to count them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..bundled import BUNDLED_MODEL
from ..config import require
from ..needs import check_needs
from .options import check_dtype

if TYPE_CHECKING:
    import torch

    from ..integration.loading import LoadedModel


def open_samples(
    model: str | None,
    data: str | None,
    *,
    samples: int,
    length: int,
    split: str,
    text_column: str,
    seed: int,
    device: str | None,
    dtype: str,
    trust_remote_code: bool,
) -> tuple["LoadedModel", Iterator["torch.Tensor"], dict[str, Any]]:
    """A loaded model, samples of text in its tokens, and where they are from.

    Raises:
        ValueError, OSError, ImportError: something asked is not possible; the message says what.
    """
    check_dtype(dtype)
    require(samples >= 1, "samples", samples, "1 or more")
    require(data is not None, "data", None, f"given with --model: --model {model} --data TEXT")
    own = "problems:..., since the bundled model knows only the words of its own problems; pass --model for other text"
    data = str(data)
    require(model is not None or data.startswith("problems:"), "data", data, own)

    from ..integration.loading import LoadedModel
    from ..probing.data import needs_of, token_samples

    check_needs({"data": needs_of(data)})

    loaded = LoadedModel(model or str(BUNDLED_MODEL), device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    require(length <= loaded.limit, "length", length, f"at most the {loaded.limit} positions of the model")
    text = token_samples(
        data, loaded.tokenizer, length=length, count=samples, split=split, text_column=text_column, seed=seed
    )
    path = Path(data).expanduser()
    return loaded, text, {"data": path.name if path.exists() else data, "split": split, "seed": seed}


@contextmanager
def counting(samples: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, where that is a terminal: to be called with the number of samples done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("samples", total=samples)
        yield lambda done: bar.update(task, completed=done)
