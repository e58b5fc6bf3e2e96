"""`kara-hf serve`: Transformers' own OpenAI-compatible server, with Kara in its continuous batching."""

import re
from typing import Annotated

import typer

from ..bundled import BUNDLED_MODEL
from ..config import KaraConfig, parse_pins, require
from .options import DTYPES, count_or_all, count_or_share, readable_errors

UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def serve(
    model: Annotated[
        str | None, typer.Argument(help="Hub id or folder of a causal language model [default: the bundled one].")
    ] = None,
    retention: Annotated[
        float, typer.Option(help="Share of each window that is kept; 1 turns Kara off.")
    ] = KaraConfig.retention,
    memory: Annotated[
        str | None,
        typer.Option(help="Memory of the pool of keys, values and queries, like 8GiB [default: what is free]."),
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens in a window.")] = KaraConfig.window,
    recent: Annotated[
        float, typer.Option(metavar="N|SHARE", help="Newest tokens, always kept whole, or a share of those held.")
    ] = KaraConfig.recent,
    min_cache_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens that a request holds at least behind its prompt [default: one window where --recent is a "
            "share]."
        ),
    ] = KaraConfig.min_cache_tokens,
    sinks: Annotated[int, typer.Option(help="First tokens of a request, always kept.")] = KaraConfig.sinks,
    pin: Annotated[
        str,
        typer.Option(metavar="START:END,...", help="Tokens of every request, by position, that are never evicted."),
    ] = "",
    score: Annotated[str, typer.Option(help="What ranks the tokens of a window.")] = KaraConfig.score,
    queries: Annotated[
        str, typer.Option(metavar="N|all", help="Tokens of a window whose queries are held for the score.")
    ] = str(KaraConfig.queries or "all"),
    anchor_share: Annotated[
        float, typer.Option(help="Share of kept tokens picked singly by scores with chunks; 1 is plain top-k.")
    ] = KaraConfig.anchor_share,
    prompt_retention: Annotated[
        float | None,
        typer.Option(
            help="Share of each prompt, and --min-cache-tokens at least, that is kept once it was read [default: all]."
        ),
    ] = None,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of each prompt that are kept, instead of a share [default: all].")
    ] = None,
    conversations: Annotated[
        int,
        typer.Option(help="Ended requests whose compressed tokens are kept for the next turn, while there is room."),
    ] = 0,
    period: Annotated[int, typer.Option(help="Engine steps from one compression to the next.")] = 64,
    requests: Annotated[
        int | None, typer.Option(help="Requests compressed at once, those that gain most [default: all].")
    ] = None,
    under_pressure: Annotated[
        bool, typer.Option("--under-pressure", help="Compress only while requests wait for blocks.")
    ] = False,
    page: Annotated[int, typer.Option(help="Tokens in a block of the pool.")] = 16,
    max_batch_tokens: Annotated[int | None, typer.Option(help="Tokens in a step at most.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 8000,
    device: Annotated[str, typer.Option(help="cpu, cuda, ... or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES[:-1])} or {DTYPES[-1]}.")] = "auto",
    attn_implementation: Annotated[
        str | None, typer.Option(help="sdpa, eager or a flash attention [default: what the engine chooses].")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
) -> None:
    """Starts Transformers' OpenAI-compatible server with Kara inside; GET /metrics says what the pool holds."""
    with readable_errors():
        from ..serving.config import ServingConfig
        from ..serving.server import count_blocks, run_server

        config = ServingConfig.of(
            retention=retention,
            window=window,
            recent=count_or_share(recent),
            min_cache_tokens=min_cache_tokens,
            sinks=sinks,
            pin=parse_pins(pin),
            score=score,
            queries=count_or_all("queries", queries),
            anchor_share=anchor_share,
            prompt_retention=prompt_retention,
            max_prompt_tokens=max_prompt_tokens,
            conversations=conversations,
            period=period,
            max_requests=requests,
            trigger="pressure" if under_pressure else "periodic",
        )
        require(dtype in DTYPES, "dtype", dtype, " or ".join(DTYPES))
        name = str(BUNDLED_MODEL) if model is None else model
        run_server(
            config,
            force_model=name,
            page=page,
            num_blocks=None
            if memory is None
            else count_blocks(name, parse_bytes(memory), page, dtype, trust_remote_code),
            max_batch_tokens=max_batch_tokens,
            host=host,
            port=port,
            device=device,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )


def parse_bytes(text: str) -> int:
    """Bytes of "8GiB", "500 MB" or "123456". Raises ValueError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): size for unit, size in UNITS.items()}
    require(
        found is not None and found[2].lower() in units,
        "memory",
        text,
        f"a number with {', '.join(filter(None, UNITS))}",
    )
    assert found is not None
    return int(float(found[1]) * units[found[2].lower()])
