"""`kara-hf plan`. Transformers is imported when it runs; no weights are read."""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..bundled import BUNDLED_MODEL
from ..config import KaraConfig, KVCompressConfig, require
from .display import readable_bytes
from .options import DTYPES, TrustRemoteCode, check_dtype, numbers_in, readable_errors
from .serve import parse_bytes

if TYPE_CHECKING:
    from ..cache.plan import Planned


def plan(
    model: Annotated[
        str | None, typer.Option(help="Hub id or folder of a causal language model [default: the bundled one].")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of a sequence at its end.")] = 32768,
    prompt: Annotated[int, typer.Option(help="Tokens of its prompt.")] = 1024,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    shares: Annotated[str, typer.Option(help="Shares of the tokens that are kept, separated by commas.")] = "0.5,0.25",
    bits: Annotated[str, typer.Option(help="Bits that are tried, separated by commas; none if empty.")] = "8,4",
    memory: Annotated[
        str | None, typer.Option(help="Memory for keys and values, like 8GiB: how many sequences fit.")
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}, of keys and values.")] = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show what caches would hold, told from the model's config alone, and what fits.

    Counted are layers of full attention, with positions, tables and held queries; tokens are those of a head, at most.
    While a prompt is read, all of it or one layer of it comes on top where a cache compresses it.
    """
    with readable_errors():
        check_dtype(dtype)
        require(batch >= 1, "batch", batch, "1 or more")
        room = None if memory is None else parse_bytes(memory)
        settings = _settings(numbers_in("shares", shares, float), numbers_in("bits", bits, int))

        import torch
        from transformers import AutoConfig

        from ..cache.plan import plan as planned
        from ..integration.loading import is_folder

        place = model or str(BUNDLED_MODEL)
        is_folder(place)
        config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code).get_text_config(decoder=True)
        number = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
        found = {name: planned(config, each, tokens, prompt=prompt, dtype=number) for name, each in settings.items()}
        full = next(iter(found.values())).full_bytes
        title = f"{place} | {tokens:,} tokens, {prompt:,} of them prompt | {str(number).removeprefix('torch.')}"
        Console(highlight=False).print(_table(found, full, batch, room, title))


def _settings(shares: list[float], bits: list[int]) -> dict[str, KaraConfig | KVCompressConfig]:
    """Every cache with each of these, by how it is made. Raises ValueError."""
    found: dict[str, KaraConfig | KVCompressConfig] = {}
    width: int | None
    for width in bits:
        found[f"KaraCache(retention=1.0, bits={width})"] = KaraConfig(retention=1.0, bits=width)
    for share in shares:
        for width in (None, *bits):
            more: dict[str, Any] = {} if width is None else {"bits": width}
            of_bits = "".join(f", {name}={value}" for name, value in more.items())
            found[f"KaraCache(retention={share}{of_bits})"] = KaraConfig(retention=share, **more)
            found[f"KVCompressCache(retention={share}{of_bits})"] = KVCompressConfig(retention=share, **more)
    require(bool(found), "shares", shares, "given, or bits")
    return found


def _table(found: "dict[str, Planned]", full: int, batch: int, room: int | None, title: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    names = ("cache", "tokens", f"bytes of {batch}" if batch > 1 else "bytes", "of full")
    for name in (*names, *([] if room is None else [f"in {readable_bytes(room)}"])):
        table.add_column(name, justify="left" if name == "cache" else "right", no_wrap=True)

    def row(name: str, tokens: str, held: int) -> None:
        cells = [name, tokens, readable_bytes(batch * held), f"{held / full:.0%}"]
        table.add_row(*cells, *([] if room is None else [f"{room // held:,}"]))

    row("full cache", "all", full)
    for name, each in sorted(found.items(), key=lambda item: -item[1].resident_bytes):
        row(name, f"{each.tokens:,}", each.resident_bytes)
    return table
