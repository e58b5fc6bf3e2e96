"""`kara-hf evaluate` and `kara-hf report`. Torch and Transformers are imported by what runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..bundled import BUNDLED_CALIBRATION, BUNDLED_MODEL
from ..config import require
from .options import DTYPES, readable_errors

# What runs without a model and tasks: the bundled model has a language of its own and short windows.
BUNDLED_TASKS = "trace:generated=300,fact:generated=300"
BUNDLED_SKELETON = {"window": 64, "block_size": 4, "observation": 8}
LADDER = "full,random,random-chunks,recency,causal,kara-top-k,kara,oracle"


def evaluate(
    model: Annotated[
        str | None, typer.Option(help="Hub id or folder of a causal language model [default: the bundled one].")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks with their options, separated by commas, like niah:length=8192,gsm8k:path=test.jsonl; needed "
            f"with --model [default for the bundled model: {BUNDLED_TASKS}]."
        ),
    ] = None,
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.")] = LADDER,
    budgets: Annotated[str, typer.Option(help="Shares that are kept, separated by commas.")] = "0.5,0.25,0.125,0.0625",
    rules: Annotated[
        str,
        typer.Option(
            help="What may be compressed: pinned (not the prompt), before (the prompt too), after (the context, before "
            "the question comes); separated by commas."
        ),
    ] = "pinned",
    equal: Annotated[
        str,
        typer.Option(
            help="bytes: every method gets the share with which it holds what --reference holds; tokens: every method "
            "keeps the same share."
        ),
    ] = "bytes",
    reference: Annotated[str, typer.Option(help="The method whose bytes the others get.")] = "random",
    seeds: Annotated[str, typer.Option(help="Seeds of random methods, separated by commas.")] = "0",
    n: Annotated[int, typer.Option(help="Examples of each task.")] = 200,
    batch: Annotated[int, typer.Option(help="Sequences generated together, in each process.")] = 16,
    window: Annotated[
        int | None, typer.Option(help="Tokens in a window of window methods [default: 256; bundled model: 64].")
    ] = None,
    recent: Annotated[int | None, typer.Option(help="Newest tokens, always kept whole [default: 32].")] = None,
    block_size: Annotated[
        int | None, typer.Option(help="Slots per block of memory [default: 16; bundled model: 4].")
    ] = None,
    observation: Annotated[
        int | None,
        typer.Option(help="Last prompt queries that vote in eviction methods [default: 32; bundled model: 8]."),
    ] = None,
    sinks: Annotated[
        int | None, typer.Option(help="First tokens that eviction methods always keep [default: 4].")
    ] = None,
    sharing: Annotated[str | None, typer.Option(metavar="DIR", help="Sharing map for the methods with PoD.")] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Key calibration for the method `calibrated` [default for the bundled model: its own]."
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, ...; under `accelerate launch` each process has its own.")
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES[:-1])} or {DTYPES[-1]}.")] = "auto",
    no_text: Annotated[bool, typer.Option("--no-text", help="Keep scores and lengths only, not the answers.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder of results; what it holds already is not measured again.")] = Path(
        "results"
    ),
) -> None:
    """Answer the same examples with every method, at equal bytes, and keep a line for each answer.

    A run that was stopped goes on where it was. `accelerate launch -m kara_hf evaluate ...` shares the examples among
    several devices. `kara-hf report DIR` makes a page of the results.
    """
    with readable_errors(), extra():
        require(dtype in DTYPES, "dtype", dtype, f"one of {', '.join(DTYPES)}")
        require(model is None or tasks is not None, "tasks", None, "given with --model, like --tasks niah:length=4096")
        from ..evaluation.measure.evaluator import Evaluator, Request
        from ..integration.loading import Runner
        from ..methods.registry import Skeleton, make_method
        from ..policy import KeyCalibration
        from ..policy.sharing import PoDSharing
        from ..tasks import published  # noqa: F401  they register their tasks
        from ..tasks import reasoner_tasks as bundled  # noqa: F401
        from ..tasks.task import make_task

        if calibration is not None:
            KeyCalibration.from_pretrained(calibration)  # shows now what could not be read later
        skeleton: dict[str, Any] = {} if model else dict(BUNDLED_SKELETON)
        given = {"window": window, "recent": recent, "block_size": block_size, "observation": observation}
        skeleton |= {name: value for name, value in {**given, "sinks": sinks}.items() if value is not None}
        request = Request(
            methods=[make_method(name) for name in _names(methods)],
            budgets=_numbers("budgets", budgets, float),
            rules=_names(rules),
            seeds=_numbers("seeds", seeds, int),
            n=n,
            batch=batch,
            equal=equal,  # type: ignore[arg-type]  # checked by Request
            reference=make_method(reference),
            skeleton=Skeleton(**skeleton),
            sharing=None if sharing is None else PoDSharing.from_pretrained(sharing),
            calibration=calibration or (None if model else str(BUNDLED_CALIBRATION)),
            keep_text=not no_text,
        )
        share = Share(device)
        runner = Runner(
            model or str(BUNDLED_MODEL),
            device=share.device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
        runner.tokenizer.padding_side = "left"
        evaluator = Evaluator(
            runner.model, runner.tokenizer, name=runner.name, weights=weights_of(runner, model), limit=runner.limit
        )
        wanted = [make_task(name, runner.tokenizer) for name in _names(tasks or BUNDLED_TASKS)]
        columns = (
            TextColumn("{task.description:<48}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        console = Console(stderr=True)
        with Progress(*columns, console=console, disable=share.process > 0) as progress:
            bar = progress.add_task("", total=len(wanted) * len(list(request.cells())))
            for task in wanted:
                evaluator.measure(
                    task,
                    request,
                    out,
                    process=share.process,
                    processes=share.processes,
                    together=share.together,
                    progress=lambda label, part: progress.update(bar, description=label, advance=part),
                )
        if share.process == 0:
            typer.echo(f"results are in {out}; `kara-hf report {out}` makes a page of them")


def report(
    results: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of results, or a packed file of them.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for report.html and report.md [default: DIR, or that of the file].")
    ] = None,
    reference: Annotated[str, typer.Option(help="The method that the others are compared with.")] = "random",
    title: Annotated[str, typer.Option(help="Of the page.")] = "Evaluation",
    pack: Annotated[
        Path | None, typer.Option(help="Also write results without answers to this file, small enough to keep.")
    ] = None,
) -> None:
    """Make one self-contained HTML page, which needs no network, and a Markdown file of results."""
    with readable_errors(), extra():
        from ..evaluation.measure.results import load, save_packed
        from ..evaluation.report.write import write

        frame = load(results)
        for path in write(
            frame, out or (results if results.is_dir() else results.parent), reference=reference, title=title
        ):
            typer.echo(path)
        if pack is not None:
            save_packed(frame, pack)
            typer.echo(pack)


@contextmanager
def extra() -> Iterator[None]:
    """Says which extra brings a package that is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None:  # one of ours, which says what to do
            raise
        raise ImportError(f"{error.name} is not installed; run: pip install 'kara_hf[evaluate]'") from error


class Share:
    """Which part of the work is this process's, under `accelerate launch` or torchrun; otherwise all of it."""

    def __init__(self, device: str | None):
        import os

        from ..integration.loading import find_device

        self.process, self.processes, self.device = 0, 1, device
        self._state: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            try:
                from accelerate import PartialState
            except ImportError as error:
                raise ImportError("several processes need accelerate; run: pip install 'kara_hf[evaluate]'") from error

            self._state = PartialState(cpu=find_device(device).type == "cpu")
            self.process, self.processes = self._state.process_index, self._state.num_processes
            self.device = str(self._state.device)

    def together(self) -> None:
        """Waits for the other processes."""
        if self._state is not None:
            self._state.wait_for_everyone()


def weights_of(runner: Any, model: str | None) -> str:
    """What tells these weights from others: a digest of a folder's files, or the revision that a hub gave."""
    from ..evaluation.measure.provenance import digest

    folder = BUNDLED_MODEL if model is None else Path(model)
    if folder.is_dir():
        try:
            return digest(folder)
        except FileNotFoundError:
            return "unknown"
    return str(getattr(runner.model.config, "_commit_hash", None) or "unknown")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(name: str, text: str, kind: Any) -> list[Any]:
    """Numbers separated by commas. Raises ValueError."""
    try:
        return [kind(part) for part in _names(text)]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{name}={text!r} is not possible: {name} must be {what} separated by commas") from None
