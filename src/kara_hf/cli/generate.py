"""`kara-hf generate`. Torch and Transformers are imported when it runs."""

import json
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any

import typer
from rich.console import Console

from ..bundled import BUNDLED_MODEL
from ..config import LEAST_TOKENS, KaraConfig, KVCompressConfig, parse_pins, require
from .display import show_runs
from .options import (
    Device,
    Dtype,
    Model,
    PrefillChunk,
    TrustRemoteCode,
    check_dtype,
    count_or_all,
    count_or_share,
    readable_errors,
)

# What runs without a model and a prompt: the problem, and how strongly its trace is compressed.
BUNDLED_PROBLEM: dict[str, Any] = {"task": "trace", "split": "test", "generated": 900, "seed": 3}
# The bundled model is no language model: what is best for it is not what is best elsewhere.
BUNDLED_SETTINGS: dict[str, Any] = {"retention": 0.4, "window": 64, "recent": 32, "score": "bidirectional"}
BUNDLED_SETTINGS |= {"queries": None, "anchor_share": 1.0, "protected": 32, "votes": "sum", "levels": None}
# What any other model is asked where nothing is said: a short prompt with a long answer.
PROMPT = "Explain step by step, and in full sentences, how a letter travels from a red letterbox to its reader abroad."
# Tokens generated at most: for a problem with a known solution so many times its length, otherwise a fixed number.
SOLUTION_ALLOWANCE = 1.25
MAX_NEW_TOKENS = 512

DEFAULT_CACHES = ("full", "kara")


def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="Text to continue; left out, the bundled model solves a problem of its own, and any other answers a "
            "question in English."
        ),
    ] = None,
    model: Model = None,
    cache: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="full, kara, kv-compress or pod; repeat it, or separate names by commas, to compare several [default: "
            "full,kara].",
        ),
    ] = None,
    retention: Annotated[
        float | None,
        typer.Option(
            help="kara, kv-compress: share that is kept, of each window or of everything [default: 0.25; bundled "
            "model: 0.4]."
        ),
    ] = None,
    window: Annotated[
        int | None, typer.Option(help=f"kara: tokens in a window [default: {KaraConfig.window}; bundled model: 64].")
    ] = None,
    recent: Annotated[
        float | None,
        typer.Option(
            metavar="N|SHARE",
            help="kara: newest tokens, always kept whole, or a share of those held "
            f"[default: {KaraConfig.recent}; bundled model: 32].",
        ),
    ] = None,
    floor: Annotated[
        int | None,
        typer.Option(
            help="kv-compress: further tokens that every head keeps at least, beside the first and newest [default: 0]."
        ),
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(
            help="kara: what ranks the tokens of a window: blend, bidirectional, key-difference, ... "
            f"[default: {KaraConfig.score}; bundled model: bidirectional]."
        ),
    ] = None,
    queries: Annotated[
        str | None,
        typer.Option(
            metavar="N|all",
            help="kara: tokens of a window whose queries are held for the score "
            f"[default: {KaraConfig.queries or 'all'}; bundled model: all].",
        ),
    ] = None,
    anchor_share: Annotated[
        float | None,
        typer.Option(
            help="kara: share of the kept tokens picked singly, not as chunks [default: 0.5; bundled model: 1]."
        ),
    ] = None,
    compress_prompt: Annotated[
        bool, typer.Option("--compress-prompt", help="kara: compress the prompt too. (kv-compress always does.)")
    ] = False,
    prefill_chunk: PrefillChunk = None,
    seed: Annotated[int | None, typer.Option(help="kara, kv-compress: seed of what is random [default: 0].")] = None,
    max_cache_tokens: Annotated[
        int | None,
        typer.Option(help="kv-compress: tokens per KV head and layer, on average, instead of --retention."),
    ] = None,
    min_cache_tokens: Annotated[
        int | None,
        typer.Option(
            help="kara, kv-compress: tokens per KV head and layer, for kv-compress on average, that --retention leaves "
            f"at least [default: kara, a window where the recent ones are a share; kv-compress, {LEAST_TOKENS} where "
            "the protected ones are]."
        ),
    ] = None,
    observation: Annotated[
        str | None,
        typer.Option(metavar="N|all", help="kv-compress: last prompt queries that vote on what is kept [default: 32]."),
    ] = None,
    protected: Annotated[
        float | None,
        typer.Option(
            metavar="N|SHARE",
            help="kv-compress: newest tokens, never evicted, or a share of what a head may hold "
            f"[default: {KVCompressConfig.protected}].",
        ),
    ] = None,
    votes: Annotated[
        str | None,
        typer.Option(
            help="kv-compress: sum of the votes on a token, or mean of those that were possible "
            f"[default: {KVCompressConfig.votes}]."
        ),
    ] = None,
    sinks: Annotated[
        int | None, typer.Option(help="kara, kv-compress: first tokens, never evicted [default: 4].")
    ] = None,
    pin: Annotated[
        str | None,
        typer.Option(
            metavar="START:END,...|system",
            help="kara, kv-compress: tokens that are never evicted, by position; or the system message of the chat.",
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message in front of PROMPT.")] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="kv-compress: sum squared probabilities (l2) or plain ones (l1); or random, recency [default: l2]."
        ),
    ] = None,
    no_continual: Annotated[
        bool, typer.Option("--no-continual", help="kv-compress: cut the prompt only, not what is generated.")
    ] = False,
    bits: Annotated[
        int | None,
        typer.Option(help="kara, kv-compress, pod: bits of what has settled, 8 or 4 [default: the model's dtype]."),
    ] = None,
    key_bits: Annotated[int | None, typer.Option(help="kara, kv-compress, pod: of keys, where they differ.")] = None,
    value_bits: Annotated[
        int | None, typer.Option(help="kara, kv-compress, pod: of values, where they differ; 8, 4 or 2.")
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(help="kara, kv-compress, pod: slots per block of memory [default: 16].")
    ] = None,
    sharing: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="kara, kv-compress, pod: folder or hub id of the sharing map that `kara-hf pod explore` or `adapt` "
            "wrote; pod needs one. An adapter there is put into the model, and is on with these caches alone.",
        ),
    ] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(
            help="kara, kv-compress, pod: most resident bytes; kara and pod stop with an error there, kv-compress "
            "evicts more while it can."
        ),
    ] = None,
    from_: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="Ask PROMPT about what `kara-hf compress` has read into this file; the cache comes from there.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens generated at most [default: 512; bundled problem: enough to solve it].")
    ] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it is generated.")] = False,
    no_chat: Annotated[
        bool, typer.Option("--no-chat", help="Pass PROMPT as it is, without the model's chat template.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Generate text greedily and show what the cache held: tokens, bytes, speed and what survived.

    Without --cache the prompt runs twice, with the full cache and with KaraCache, side by side. Options that start with
    names of caches are settings of these.
    """
    with readable_errors():
        check_dtype(dtype)
        require(max_new_tokens is None or max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "1 or more")
        require(prompt is None or bool(prompt.strip()), "prompt", prompt, "some text to continue")
        options = {
            "retention": retention,
            "window": window,
            "recent": count_or_share(recent),
            "floor": floor,
            "score": score,
            "votes": votes,
            "anchor_share": anchor_share,
            "compress_prompt": compress_prompt or None,
            "prefill_chunk": prefill_chunk,
            "seed": seed,
            "max_cache_tokens": max_cache_tokens,
            "min_cache_tokens": min_cache_tokens,
            "protected": count_or_share(protected),
            "sinks": sinks,
            "metric": metric,
            "continual": False if no_continual else None,
            "bits": bits,
            "key_bits": key_bits,
            "value_bits": value_bits,
            "block_size": block_size,
            "max_bytes": max_bytes,
            "sharing": sharing,
        }
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        if observation is not None:
            given["observation"] = count_or_all("observation", observation)
        if queries is not None:
            given["queries"] = count_or_all("queries", queries)
        if pin is not None:
            given["pin"] = () if pin == "system" else parse_pins(pin)  # of the system message once there is a tokenizer

        from ..integration.loading import LoadedModel

        if from_ is not None:
            from .compress import answer

            others = ["cache", *given, *([] if system is None else ["system"])]
            if prompt is None or cache or others[1:]:
                raise ValueError(
                    f"--from {from_} needs a PROMPT to ask, and brings a cache with settings: leave out what says "
                    f"others ({', '.join(others)})"
                )
            place = model or str(BUNDLED_MODEL)
            loaded = LoadedModel(place, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
            answer(loaded, from_, prompt, max_new_tokens=max_new_tokens, stream=stream, chat=not no_chat)
            return

        from ..integration.adapter import load_adapter
        from ..integration.generation import ignored
        from ..methods.caches import configured_caches
        from ..policy.sharing import PoDSharing
        from ..tasks.reasoner import make_problem
        from .runs import compare

        names = [name.strip() for names in cache or DEFAULT_CACHES for name in names.split(",")]
        defaults = {} if model else BUNDLED_SETTINGS
        methods = configured_caches(names, given, defaults)  # refuses what is not possible before anything is loaded
        problem = None if prompt or model else make_problem(**BUNDLED_PROBLEM)
        place = model or str(BUNDLED_MODEL)
        loaded = LoadedModel(place, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        if sharing is not None:
            load_adapter(loaded.model, sharing, PoDSharing.from_pretrained(sharing))
        text = problem.prompt if problem else prompt or PROMPT
        ids = loaded.encode(text, chat=not no_chat, system=system)
        if pin is not None:
            given["pin"] = loaded.pins(pin, text, chat=not no_chat, system=system)
            methods = configured_caches(names, given, defaults)
        if model is None and (ids == loaded.tokenizer.unk_token_id).any():
            raise ValueError(
                "the bundled model knows only the words of its own problems, and the prompt has others; pass "
                "--model for text of your own, or leave the prompt out"
            )
        if max_new_tokens is None:
            wanted = int(SOLUTION_ALLOWANCE * len(problem.completion.split())) if problem else MAX_NEW_TOKENS
            max_new_tokens = max(1, min(wanted, loaded.limit - ids.shape[1]))
        left_out = ignored(loaded.model)
        if model is not None and left_out:
            typer.echo(_told(loaded.name, left_out), err=True)
        chosen = list(methods.values())
        runs = compare(loaded, chosen, ids, max_new_tokens=max_new_tokens, stream=stream, problem=problem)
        if len(runs) == 1 and not stream:
            typer.echo(runs[0].text.strip())
        title = f"{loaded.name} | prompt of {ids.shape[1]:,} tokens"
        show_runs(Console(highlight=False), runs, title)


def _told(name: str, left_out: dict[str, Any]) -> str:
    """What of a model's settings does not count, on one line."""
    fields = ", ".join(f"{field}={shorten(json.dumps(value, default=str), 60)}" for field, value in left_out.items())
    return f"Text is generated greedily, with a cache. Left out of generation_config.json of {name}: {fields}"
