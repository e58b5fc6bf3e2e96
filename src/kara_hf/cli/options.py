"""What the commands of `kara-hf` have in common: options, and errors. Needs neither torch nor Transformers."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from ..config import KaraConfig, require

Number = TypeVar("Number", int, float)
BUNDLED_DATA = "problems:trace=0.5,fact=0.2,recall=0.3"  # what the bundled model knows
DTYPES = ("auto", "float32", "float16", "bfloat16")

Model = Annotated[
    str | None, typer.Option(help="Hub id or folder of a causal language model [default: the bundled one].")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... [default: a GPU if there is one].")]
Dtype = Annotated[str, typer.Option(help=f"{', '.join(DTYPES[:-1])} or {DTYPES[-1]}.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
PrefillChunk = Annotated[
    int | None,
    typer.Option(
        help="kara, kv-compress: most tokens of a prompt that are read at once; what was read is cut before more comes "
        "[default: all]."
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        help="Text: a file or folder (.txt, .md, .jsonl, .json, .parquet), a dataset of the hub (owner/name or "
        "owner/name:config), or problems:TASK=WEIGHT,... [bundled model: problems].",
    ),
]
SampleLength = Annotated[int | None, typer.Option(help="Tokens of a sample [default: 8192; bundled model: 1024].")]
# Of the methods that are compared, the same for all.
Window = Annotated[
    int | None,
    typer.Option(help=f"Tokens in a window of window methods [default: {KaraConfig.window}; bundled model: 64]."),
]
Recent = Annotated[
    float | None,
    typer.Option(
        metavar="N|SHARE",
        help="Newest tokens, always kept whole, or a share of those held "
        f"[default: {KaraConfig.recent}; bundled model: 32].",
    ),
]
MinCacheTokens = Annotated[
    int | None,
    typer.Option(
        help="Tokens that window and eviction methods hold at least, so that the beginning of an answer stays whole "
        "[default: one window where --recent is a share]."
    ),
]
BlockSize = Annotated[int | None, typer.Option(help="Slots per block of memory [default: 16; bundled model: 4].")]
Observation = Annotated[
    int | None, typer.Option(help="Last prompt queries that vote in eviction methods [default: 32; bundled model: 8].")
]
Sinks = Annotated[
    int | None, typer.Option(help="First tokens that window and eviction methods always keep [default: 4].")
]
Sharing = Annotated[str | None, typer.Option(metavar="DIR", help="Sharing map for the methods with PoD.")]
TextColumn = Annotated[str, typer.Option(help="Column or field of the text.")]


def with_settings(kind: type, settings: dict[str, Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator of commands: options for fields of the dataclass `kind` in place of the parameter ``settings``, which
    is a dict of them.

    Args:
        settings: by the name of a field the help of its option, or an annotation for an option that is None unless it
            is given.
    """
    types = get_type_hints(kind)

    def option(name: str, about: Any) -> inspect.Parameter:
        default = None
        if isinstance(about, str):
            names = [f"--{name.replace('_', '-')}"] if types[name] is bool else []  # no --no-... beside it
            about, default = Annotated[types[name], typer.Option(*names, help=about)], getattr(kind, name)
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=about)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(**given: Any) -> None:
            command(settings={name: given.pop(name) for name in settings}, **given)

        own = inspect.signature(command).parameters.values()
        before = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own if each.name != "settings"]
        made = [option(name, about) for name, about in settings.items()]
        run.__signature__ = inspect.Signature(before + made)  # type: ignore[attr-defined]
        return run

    return decorate


def given(**options: Any) -> dict[str, Any]:
    """The options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def check_dtype(dtype: str | None) -> None:
    """Raises ValueError if there is no such dtype."""
    require(dtype is None or dtype in DTYPES, "dtype", dtype, f"one of {', '.join(DTYPES)}")


def names_in(text: str) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def numbers_in(name: str, text: str, kind: type[Number]) -> list[Number]:
    """Numbers separated by commas. Raises ValueError."""
    try:
        return [kind(part) for part in names_in(text)]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{name}={text!r} is not possible: {name} must be {what} separated by commas") from None


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


def count_or_share(number: float | None) -> Any:
    """A whole number as one, and a share as it is."""
    return int(number) if number is not None and number.is_integer() else number


def count_or_all(name: str, text: str) -> int | None:
    """A whole number, or None for "all". Raises ValueError."""
    if text == "all":
        return None
    require(text.isdecimal() and int(text) >= 1, name, text, "a whole number from 1 on, or all")
    return int(text)
