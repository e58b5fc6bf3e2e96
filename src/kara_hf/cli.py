"""The `kara-hf` command: generate with the full cache, with `KaraCache`, or with both, compared.

Torch and Transformers are imported only by a command that runs, so that help is shown at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from . import __version__
from .config import require
from .display import show_runs

# What runs without a model and a prompt: the problem, and how strongly its trace is compressed.
BUNDLED_MODEL = Path(__file__).parent / "assets" / "tiny_reasoner"
BUNDLED_PROBLEM: dict[str, Any] = {"task": "trace", "split": "test", "generated": 900, "seed": 3}
BUNDLED_SETTINGS: dict[str, Any] = {"retention": 0.4, "window": 64, "recent": 32, "anchor_share": 1.0}
# Tokens generated at most: for a problem with a known solution so many times its length, otherwise a fixed number.
SOLUTION_ALLOWANCE = 1.25
MAX_NEW_TOKENS = 512

CACHES = ("full", "kara")
DTYPES = ("auto", "float32", "float16", "bfloat16")

app = typer.Typer(
    help="KV-cache compression for Hugging Face Transformers.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kara-hf {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """KV-cache compression for Hugging Face Transformers."""


@app.command()
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="Text to continue; left out, the bundled model solves a problem of its own.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Hub id or folder of a causal language model [default: the bundled one].")
    ] = None,
    cache: Annotated[str | None, typer.Option(help="full or kara [default: both, compared].")] = None,
    retention: Annotated[
        float | None, typer.Option(help="Share of each window that is kept [default: 0.25; bundled model: 0.4].")
    ] = None,
    window: Annotated[int | None, typer.Option(help="Tokens in a window [default: 256; bundled model: 64].")] = None,
    recent: Annotated[int | None, typer.Option(help="Newest tokens, always kept whole [default: 32].")] = None,
    score: Annotated[
        str | None, typer.Option(help="What ranks the tokens of a window [default: bidirectional].")
    ] = None,
    anchor_share: Annotated[
        float | None,
        typer.Option(help="Share of the kept tokens picked singly, not as chunks [default: 0.5; bundled model: 1]."),
    ] = None,
    compress_prompt: Annotated[bool, typer.Option("--compress-prompt", help="Compress the prompt too.")] = False,
    block_size: Annotated[int | None, typer.Option(help="Slots per block of memory [default: 16].")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the random scores [default: 0].")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Stop with an error if KaraCache needs more bytes.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens generated at most [default: 512; bundled problem: enough to solve it].")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... [default: a GPU if there is one].")] = None,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES[:-1])} or {DTYPES[-1]}.")] = "auto",
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it is generated.")] = False,
    no_chat: Annotated[
        bool, typer.Option("--no-chat", help="Pass PROMPT as it is, without the model's chat template.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
) -> None:
    """Generate text greedily and show what the cache held: tokens, bytes, speed and what survived.

    Without --cache the prompt runs twice, with the full cache and with KaraCache, side by side.
    """
    with _readable_errors():
        require(cache is None or cache in CACHES, "cache", cache, "full or kara, or left out for both")
        require(dtype in DTYPES, "dtype", dtype, f"one of {', '.join(DTYPES)}")
        require(max_new_tokens is None or max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "1 or more")
        require(prompt is None or bool(prompt.strip()), "prompt", prompt, "some text to continue")
        require(model is None or prompt is not None, "prompt", None, f'given with --model: --model {model} "text"')
        given = {
            "retention": retention,
            "window": window,
            "recent": recent,
            "score": score,
            "anchor_share": anchor_share,
            "compress_prompt": compress_prompt,
            "block_size": block_size,
            "seed": seed,
        }
        settings = {} if model else dict(BUNDLED_SETTINGS)
        settings |= {name: value for name, value in given.items() if value is not None}

        from .evaluation import make_problem
        from .runner import Runner

        problem = None if prompt else make_problem(**BUNDLED_PROBLEM)
        runner = Runner(
            model or str(BUNDLED_MODEL),
            settings,
            max_bytes=max_bytes,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
        text = problem.prompt if problem else str(prompt)
        ids = runner.encode(text, chat=not no_chat)
        if model is None and (ids == runner.tokenizer.unk_token_id).any():
            raise ValueError(
                "the bundled model knows only the words of its own problems, and the prompt has others; pass "
                "--model for text of your own, or leave the prompt out"
            )
        if max_new_tokens is None:
            wanted = int(SOLUTION_ALLOWANCE * len(problem.completion.split())) if problem else MAX_NEW_TOKENS
            max_new_tokens = max(1, min(wanted, runner.limit - ids.shape[1]))
        names = [cache] if cache else list(CACHES)
        runs = runner.run(names, ids, max_new_tokens=max_new_tokens, stream=stream, problem=problem)

        config, console = runner.config, Console(highlight=False)
        title = f"{runner.name} | prompt of {ids.shape[1]:,} tokens"
        if "kara" in names:
            title += f" | window {config.window}, retention {config.retention}, recent {config.recent}"
            title += f", {config.score}, anchor share {config.anchor_share:g}"
        if cache and not stream:
            typer.echo(runs[0].text.strip())
        show_runs(console, runs, title)


@contextmanager
def _readable_errors() -> Iterator[None]:
    """Ends the command with one line on stderr; code 2 if what was asked is not possible, 1 if it failed on the way."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_lack_of_memory(error):
            raise
        typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2 if isinstance(error, ValueError) else 1) from error


def _is_lack_of_memory(error: RuntimeError) -> bool:
    from torch import OutOfMemoryError

    from .storage import PoolExhausted

    return isinstance(error, OutOfMemoryError | PoolExhausted)
