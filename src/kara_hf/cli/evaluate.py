"""`kara-hf evaluate` and `kara-hf report`. Torch and Transformers are imported by what runs."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..bundled import BUNDLED_MODEL
from ..config import require
from ..needs import Check, Need, Package, check_needs, extra
from . import options
from .options import Dtype, Model, TrustRemoteCode, check_dtype, names_in, numbers_in, readable_errors

# What runs without a model and tasks: the bundled model has a language of its own and short windows.
BUNDLED_TASKS = "trace:generated=300,fact:generated=300"
BUNDLED_SHARED = {"window": 64, "recent": 32, "block_size": 4, "observation": 8}
RESULTS = [Package("pandas", extra("evaluate"))]
REPORT = [*RESULTS, *(Package(name, extra("evaluate")) for name in ("scipy", "plotly"))]
LADDER = "full,random,random-chunks,recency,causal,kara-top-k,kara-published,kara,oracle"


def evaluate(
    model: Model = None,
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
            help="What may be compressed: prompt-kept (not the prompt), query-aware (the prompt too), query-agnostic "
            "(the context, before the question comes); separated by commas."
        ),
    ] = "prompt-kept",
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
    window: options.Window = None,
    recent: options.Recent = None,
    min_cache_tokens: options.MinCacheTokens = None,
    block_size: options.BlockSize = None,
    observation: options.Observation = None,
    sinks: options.Sinks = None,
    sharing: options.Sharing = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, ...; under `accelerate launch` each process has its own.")
    ] = None,
    dtype: Dtype = "auto",
    no_text: Annotated[bool, typer.Option("--no-text", help="Keep scores and lengths only, not the answers.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    out: Annotated[Path, typer.Option(help="Folder of results; what it holds already is not measured again.")] = Path(
        "results"
    ),
) -> None:
    """Answer the same examples with every method, at equal bytes, and keep a line for each answer.

    A run that was stopped goes on where it was. `accelerate launch -m kara_hf evaluate ...` shares the examples among
    several devices. `kara-hf report DIR` makes a page of the results.
    """
    with readable_errors():
        check_dtype(dtype)
        require(model is None or tasks is not None, "tasks", None, "given with --model, like --tasks niah:length=4096")
        task_names, method_names = names_in(tasks or BUNDLED_TASKS), names_in(methods)
        _look_up(task_names, [*method_names, reference], sharing)

        from ..evaluation.measure.evaluator import Evaluator
        from ..evaluation.measure.identity import weights_of
        from ..evaluation.measure.processes import Rank
        from ..evaluation.measure.request import Request
        from ..integration.adapter import load_adapter
        from ..integration.loading import LoadedModel
        from ..methods.registry import SharedSettings, make_method
        from ..policy.sharing import PoDSharing
        from ..tasks import make_task

        shared: dict[str, Any] = {} if model else dict(BUNDLED_SHARED)
        given = {
            "window": window,
            "recent": options.count_or_share(recent),
            "min_cache_tokens": min_cache_tokens,
            "block_size": block_size,
            "observation": observation,
        }
        shared |= {name: value for name, value in {**given, "sinks": sinks}.items() if value is not None}
        request = Request(
            methods=[make_method(name) for name in method_names],
            budgets=numbers_in("budgets", budgets, float),
            rules=names_in(rules),
            seeds=numbers_in("seeds", seeds, int),
            n=n,
            batch=batch,
            equal=equal,  # type: ignore[arg-type]  # checked by Request
            reference=make_method(reference),
            shared=SharedSettings(**shared),
            sharing=None if sharing is None else PoDSharing.from_pretrained(sharing),
            keep_text=not no_text,
        )
        rank = Rank(device)
        place = model or str(BUNDLED_MODEL)
        runner = LoadedModel(place, device=rank.device, dtype=dtype, trust_remote_code=trust_remote_code)
        runner.tokenizer.padding_side = "left"
        weights = weights_of(runner.model, place)
        if sharing is not None:
            load_adapter(runner.model, sharing, request.sharing)
        evaluator = Evaluator(runner.model, runner.tokenizer, name=runner.name, weights=weights, limit=runner.limit)
        wanted = [make_task(name, runner.tokenizer) for name in task_names]
        columns = (
            TextColumn("{task.description:<48}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        console = Console(stderr=True)
        with Progress(*columns, console=console, disable=rank.number > 0) as progress:
            bar = progress.add_task("", total=len(wanted) * len(list(request.cells())))
            for task in wanted:
                evaluator.measure(
                    task,
                    request,
                    out,
                    process=rank.number,
                    processes=rank.processes,
                    barrier=rank.barrier,
                    progress=lambda label, part: progress.update(bar, description=label, advance=part),
                )
        if rank.number == 0:
            typer.echo(f"results are in {out}; `kara-hf report {out}` makes a page of them")


def _look_up(tasks: list[str], methods: list[str], sharing: str | None) -> None:
    """Everything that the run will need, before a model is loaded. Raises ImportError and ValueError."""
    check_needs({"": RESULTS})  # without which the kit cannot be imported
    from ..evaluation.measure import processes
    from ..tasks.task import needs_of

    needs = needs_of_methods(methods, sharing)
    needs[""] = [*processes.needed(), *needs[""]]
    check_needs(needs | {name: needs_of(name) for name in tasks})


def needs_of_methods(methods: list[str], sharing: str | None) -> dict[str, Sequence[Need]]:
    """What methods need, by name, and under "" the files that are given for them."""
    from ..methods import registry
    from ..policy.sharing import PoDSharing

    needs: dict[str, Sequence[Need]] = {name: registry.needs_of(name) for name in methods}
    needs[""] = [Check(partial(PoDSharing.from_pretrained, sharing))] if sharing else []
    for name in methods:
        if name in registry.METHODS:
            needs[name] = [
                *needs[name],
                Check(partial(registry.METHODS[name].check_given, sharing=sharing is not None)),
            ]
    return needs


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
    """Make one self-contained HTML page, which needs no network, and a Markdown file of results.

    Results of `kara-hf divergence` get a page of their own.
    """
    with readable_errors():
        check_needs({"": REPORT})
        from ..evaluation.measure.diverged import LINES, load_divergence
        from ..evaluation.measure.results import load, save_packed
        from ..evaluation.report.write import write, write_divergence

        folder = out or (results if results.is_dir() else results.parent)
        if diverged := results.is_dir() and any(results.rglob(f"*{LINES.suffix}")):
            known = None if reference == "random" else reference
            for path in write_divergence(load_divergence(results), folder, reference=known):
                typer.echo(path)
        if diverged and pack is None and not any(results.rglob("*.jsonl")):
            return
        frame = load(results)
        for path in write(frame, folder, reference=reference, title=title):
            typer.echo(path)
        if pack is not None:
            save_packed(frame, pack)
            typer.echo(pack)
