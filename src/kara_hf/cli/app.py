"""The `kara-hf` command: generate with one cache or several, compared, or from one that was saved; evaluate methods,
measure how far they move a model, and report; plan; serve; show; `pod`; and what is installed.

Torch and Transformers are imported only by a command that runs, so that help is shown at once.
"""

from typing import Annotated

import typer

from .. import __version__
from .compress import compress
from .demo import demo
from .divergence import divergence
from .doctor import doctor
from .evaluate import evaluate, report
from .generate import generate
from .plan import plan
from .pod import app as pod
from .serve import serve

app = typer.Typer(
    help="KV-cache compression for Hugging Face Transformers.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(pod, name="pod")
app.command()(generate)
app.command()(compress)
app.command()(evaluate)
app.command()(divergence)
app.command()(report)
app.command()(plan)
app.command()(serve)
app.command()(demo)
app.command()(doctor)


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
