"""`kara-hf compress`, and `kara-hf generate --from`. Torch and Transformers are imported by what runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..bundled import BUNDLED_MODEL
from ..config import require
from .display import readable_bytes
from .options import Device, Dtype, Model, PrefillChunk, TrustRemoteCode, check_dtype, readable_errors

if TYPE_CHECKING:
    from ..integration.loading import LoadedModel

MAX_NEW_TOKENS = 512
CACHES = ("kv-compress", "kara", "pod")


def compress(
    file: Annotated[Path, typer.Option(metavar="TEXT", help="Text to read.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="File to write; then `kara-hf generate --from FILE`.")],
    model: Model = None,
    cache: Annotated[str, typer.Option(metavar="NAME", help=f"{', '.join(CACHES[:-1])} or {CACHES[-1]}.")] = CACHES[0],
    max_cache_tokens: Annotated[
        int | None, typer.Option(help="kv-compress: tokens per KV head and layer, on average, instead of --retention.")
    ] = None,
    retention: Annotated[
        float | None, typer.Option(help="kara, kv-compress: share that is kept [default: 0.25].")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="Bits of what has settled [default: the model's dtype].")] = None,
    block_size: Annotated[int | None, typer.Option(help="Slots per block of memory [default: 16].")] = None,
    sharing: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder or hub id of a sharing map; pod needs one.")
    ] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Most resident bytes.")] = None,
    prefill_chunk: PrefillChunk = None,
    device: Device = None,
    dtype: Dtype = "auto",
    no_chat: Annotated[
        bool, typer.Option("--no-chat", help="Read the text outside the model's chat template.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Read a text once, compress it, and save the cache: `kara-hf generate --from FILE "question"` answers from it.

    Kara compresses the text too here, which it leaves whole elsewhere.
    """
    with readable_errors():
        check_dtype(dtype)
        require(cache in CACHES, "cache", cache, " or ".join(CACHES))
        options = {
            "max_cache_tokens": max_cache_tokens,
            "retention": retention,
            "bits": bits,
            "block_size": block_size,
            "sharing": sharing,
            "max_bytes": max_bytes,
            "prefill_chunk": prefill_chunk,
            "compress_prompt": True if cache == "kara" else None,
        }
        text = file.read_text()
        require(bool(text.strip()), "file", str(file), "a file with some text")

        from ..integration.adapter import has_adapter
        from ..integration.loading import LoadedModel
        from ..methods.caches import configured_caches

        if sharing is not None and has_adapter(sharing):
            raise ValueError(
                f"sharing={sharing!r} is not possible: it has an adapter, which whoever asks {out} would have to put "
                "into the model; pass the adapter's folder with --model, here and there"
            )
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        method = configured_caches([cache], given, {})[cache]
        place = model or str(BUNDLED_MODEL)
        loaded = LoadedModel(place, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        ids = loaded.encode_text(text, chat=not no_chat)
        require(ids.shape[1] < loaded.limit, "file", str(file), f"shorter than the {loaded.limit} tokens of the model")
        made: Any = method.make(loaded.model)
        made.read(ids, complete=True)
        made.compress()
        made.save(out)
        typer.echo(f"{_told(made)}; written to {out}")


def answer(
    loaded: "LoadedModel", file: Path, question: str, *, max_new_tokens: int | None, stream: bool, chat: bool
) -> None:
    """Prints what a model answers to a question about the text that a saved cache has read. Raises ValueError."""
    import torch
    from transformers import TextStreamer

    from ..cache.caches import CompressedCache
    from ..integration.generation import generate, greedy

    cache = CompressedCache.load(file, loaded.model)
    ids = loaded.encode_question(question, chat=chat)
    seen = torch.zeros(1, cache.columns, dtype=torch.long, device=ids.device)  # which tokens they were, nobody asks
    inputs = torch.cat([seen, ids], 1)
    left = loaded.limit - inputs.shape[1]
    wanted = min(MAX_NEW_TOKENS, left) if max_new_tokens is None else max_new_tokens
    require(1 <= wanted <= left, "max_new_tokens", wanted, f"from 1 to {left}, the positions that the model has left")
    streamer = TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    config = greedy(loaded.model, loaded.tokenizer, max_new_tokens=wanted)
    told = _told(cache)
    out = generate(
        loaded.model, cache, config, input_ids=inputs, attention_mask=torch.ones_like(inputs), streamer=streamer
    )
    if not stream:
        typer.echo(loaded.tokenizer.decode(out[0, inputs.shape[1] :], skip_special_tokens=True).strip())
    typer.echo(f"{file}: {told}", err=True)


def _told(cache: Any) -> str:
    """What a cache holds, on one line."""
    report = cache.report()
    return (
        f"{type(cache).__name__} of {cache.columns:,} tokens, {readable_bytes(report.resident_bytes)} of "
        f"{readable_bytes(report.full_bytes)}"
    )
