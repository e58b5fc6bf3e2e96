"""`kara-hf demo`. Torch, Transformers and Gradio are imported when it runs."""

from socket import SO_REUSEADDR, SOL_SOCKET, socket
from typing import Annotated

import typer

from ..config import require
from ..needs import Package, check_needs, extra
from .options import DTYPES, readable_errors


def demo(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder or hub id to be chosen beside the bundled model; repeat it for more. No other folder can be."
        ),
    ] = None,
    sharing: Annotated[
        str | None, typer.Option(metavar="DIR", help="Map of layers that share keys, for PoD with the first --model.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 7860,
    share: Annotated[
        bool, typer.Option("--share", help="Make a public link through Gradio's servers. Off unless given.")
    ] = False,
    open_browser: Annotated[bool, typer.Option("--open", help="Open a browser.")] = False,
    no_hub: Annotated[bool, typer.Option("--no-hub", help="Offer no models of a hub.")] = False,
    runs: Annotated[int, typer.Option(help="Visitors whose runs go on at the same time; others wait.")] = 4,
    max_prompt_tokens: Annotated[int, typer.Option(help="Tokens in a prompt at most.")] = 4096,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens generated at most.")] = 4096,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... [default: a GPU if there is one].")] = None,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES[:-1])} or {DTYPES[-1]}.")] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with a model.")
    ] = False,
) -> None:
    """Open a page that shows what a cache keeps and drops, token by token, beside the full cache."""
    with readable_errors():
        require(dtype in DTYPES, "dtype", dtype, f"one of {', '.join(DTYPES)}")
        for name, value in (
            ("runs", runs),
            ("max_prompt_tokens", max_prompt_tokens),
            ("max_new_tokens", max_new_tokens),
        ):
            require(value >= 1, name, value, "a whole number from 1 on")
        require(0 <= port < 65536, "port", port, "a port, from 0 to 65535")
        require(sharing is None or bool(model), "sharing", sharing, "given with the --model that it is for")
        check_needs({"": [Package("gradio", extra("demo"))]})
        with socket() as asked:
            asked.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
            try:
                asked.bind((host, port))
            except OSError as error:
                raise OSError(
                    f"port={port} of host={host!r} cannot be had ({error.strerror}); choose another"
                ) from error
        from ..demo.app import launch
        from ..demo.models import Models
        from ..demo.request import Limits

        models = Models(
            model or (),
            sharing=sharing,
            hub=not no_hub,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
        launch(
            models,
            Limits(prompt=max_prompt_tokens, new=max_new_tokens, runs=runs),
            server_name=host,
            server_port=port,
            share=share,
            inbrowser=open_browser,
        )
