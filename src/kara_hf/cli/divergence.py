"""`kara-hf divergence`. Torch and Transformers are imported by what runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ..bundled import BUNDLED_MODEL
from ..config import require
from ..needs import check_needs
from . import options
from .evaluate import BUNDLED_SHARED, REPORT, needs_of_methods
from .options import Data, Device, Model, TrustRemoteCode, check_dtype, names_in, numbers_in, readable_errors

if TYPE_CHECKING:
    from ..integration.loading import LoadedModel

# What runs without a model and data: the bundled model has a language of its own and short windows.
BUNDLED: dict[str, Any] = {"data": "problems:trace=1", "tokens": 768, "prompt": 64}
REAL: dict[str, Any] = {"data": None, "tokens": 2048, "prompt": 256}
PROBLEM = 256  # tokens of a problem of the bundled model
METHODS = "random,streaming-llm,kv-compress-random,kara,kara-published,kv-compress,kv-compress-published"


def divergence(
    model: Model = None,
    data: Data = None,
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.")] = METHODS,
    budgets: Annotated[
        str, typer.Option(help="Shares of the full cache's bytes, separated by commas.")
    ] = "0.5,0.25,0.125,0.0625",
    rules: Annotated[
        str,
        typer.Option(help="What may be compressed: prompt-kept (not the prompt), query-aware (the prompt too)."),
    ] = "prompt-kept",
    documents: Annotated[int, typer.Option(help="Documents that are read.")] = 10,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of a document [default: 2048; bundled model: 768].")
    ] = None,
    prompt: Annotated[
        int | None, typer.Option(help="Tokens of it that are read as a prompt [default: 256; bundled model: 64].")
    ] = None,
    own_traces: Annotated[
        bool,
        typer.Option(
            "--own-traces",
            help="Replay the model's own answers of --tokens at most; texts are its prompts, cut to --prompt.",
        ),
    ] = False,
    temperature: Annotated[float, typer.Option(help="Of own traces; 0 takes the likeliest token.")] = 0.0,
    no_chat: Annotated[bool, typer.Option("--no-chat", help="Ask without the model's chat template.")] = False,
    pack: Annotated[bool, typer.Option("--pack", help="Join short texts into documents of --tokens.")] = False,
    equal: Annotated[
        str, typer.Option(help="bytes: a budget is a share of the full cache's bytes; tokens: of the tokens.")
    ] = "bytes",
    reference: Annotated[
        str | None, typer.Option(help="The method that the others are compared with [default: random].")
    ] = None,
    step: Annotated[int, typer.Option(help="Tokens of a document that are read at once; 1 decodes.")] = 32,
    batch: Annotated[int, typer.Option(help="Documents that are read together.")] = 4,
    together: Annotated[int, typer.Option(help="Caches that are read together; fewer take less memory.")] = 16,
    window: options.Window = None,
    recent: options.Recent = None,
    min_cache_tokens: options.MinCacheTokens = None,
    block_size: options.BlockSize = None,
    observation: options.Observation = None,
    sinks: options.Sinks = None,
    sharing: options.Sharing = None,
    seed: Annotated[int, typer.Option(help="Of random methods, and of traces that are drawn.")] = 0,
    split: Annotated[str, typer.Option(help="Split of a dataset of the hub.")] = "train",
    text_column: options.TextColumn = "text",
    device: Device = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32, float16 or bfloat16 [default: float32 on a CPU, auto elsewhere].")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    out: Annotated[Path, typer.Option(help="Folder of results; what it holds already is not measured again.")] = Path(
        "divergence"
    ),
) -> None:
    """Say how far every method moves a model from its full cache, token by token, at equal bytes.

    Documents, or the model's own traces, are forced through the full cache and every method. A run that was stopped
    goes on where it was. Writes divergence.html and divergence.md.
    """
    with readable_errors():
        check_dtype(dtype)
        require(model is None or data is not None, "data", None, f"given with --model: --model {model} --data TEXT")
        defaults = REAL if model else BUNDLED
        text = str(defaults["data"] if data is None else data)
        length = defaults["tokens"] if tokens is None else tokens
        first = defaults["prompt"] if prompt is None else prompt
        require(documents >= 1, "documents", documents, "1 or more")
        fits = first >= 1 if own_traces else 1 <= first <= length - 2
        require(fits, "prompt", first, f"from 1 to {length - 2}, with --tokens {length}")
        names = names_in(methods)
        check_needs({"": REPORT})  # without which the kit cannot be imported
        check_needs(needs_of_methods(names, sharing))

        from ..evaluation.measure.divergence import divergence as measure
        from ..evaluation.measure.identity import weights_of
        from ..evaluation.measure.traces import own_traces as make_traces
        from ..evaluation.report.divergence_summary import Divergences
        from ..evaluation.report.write import write_divergence
        from ..integration.adapter import load_adapter
        from ..integration.loading import LoadedModel, find_device
        from ..methods.registry import SharedSettings, make_method
        from ..methods.rules import SINGLE_TEXT_RULES, rule_named
        from ..policy.sharing import PoDSharing
        from ..probing.data import needs_of

        check_needs({"data": needs_of(text)})
        chosen = [make_method(name) for name in names]
        require(
            reference is None or reference in names, "reference", reference, f"one of the methods, {', '.join(names)}"
        )
        shared: dict[str, Any] = {} if model else dict(BUNDLED_SHARED)
        given = {
            "window": window,
            "recent": options.count_or_share(recent),
            "min_cache_tokens": min_cache_tokens,
            "block_size": block_size,
            "observation": observation,
        }
        shared |= {name: value for name, value in {**given, "sinks": sinks}.items() if value is not None}
        settings: dict[str, Any] = {
            "rules": [rule_named(rule) for rule in names_in(rules)],
            "equal": equal,
            "seeds": (seed,),
            "shared": SharedSettings(**shared),
            "sharing": None if sharing is None else PoDSharing.from_pretrained(sharing),
        }
        for rule in settings["rules"]:
            require(rule in SINGLE_TEXT_RULES, "rules", rule, f"one of {', '.join(SINGLE_TEXT_RULES)} for documents")
        place = model or str(BUNDLED_MODEL)
        kind = dtype or ("float32" if find_device(device).type == "cpu" else "auto")
        loaded = LoadedModel(place, device=device, dtype=kind, trust_remote_code=trust_remote_code)
        weights = weights_of(loaded.model, place)
        if sharing is not None:
            load_adapter(loaded.model, sharing, settings["sharing"])
        path = Path(text).expanduser()
        told: dict[str, Any] = {"name": loaded.name, "weights": weights, "data": path.name if path.exists() else text}
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description:<40}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            if own_traces:
                bar = progress.add_task("own traces", total=documents)
                texts = make_traces(
                    loaded.model,
                    loaded.tokenizer,
                    _asked(loaded, text, documents, first, split, text_column, chat=not no_chat),
                    tokens=length,
                    temperature=temperature,
                    seed=seed,
                    out=out,
                    progress=lambda made: progress.advance(bar, made),
                    **told,
                )
                told["data"] += f", own traces, {length} tokens"
            else:
                texts = _texts(loaded, text, documents, length, first, split, text_column, pack=pack)
                told["data"] += f", {length} tokens, prompt {first}"
            budget_list = numbers_in("budgets", budgets, float)
            cells = sum(len(budget_list) * len(settings["rules"]) if each.budgeted else 1 for each in chosen)
            bar = progress.add_task("", total=cells * documents)
            frame = measure(
                loaded.model,
                texts,
                chosen,
                budget_list,
                out=out,
                step=step,
                batch=batch,
                together=together,
                progress=lambda label, done: progress.update(bar, description=label, advance=done),
                **told,
                **settings,
            )
        found = Divergences(frame, reference)
        for name, rows in found.panels():
            Console().print(_table(name, rows))
        for written in write_divergence(frame, out, reference=reference):
            typer.echo(written)


def _texts(
    loaded: "LoadedModel", data: str, count: int, length: int, prompt: int, split: str, text_column: str, *, pack: bool
) -> list[Any]:
    """Documents of one length."""
    from ..evaluation.measure.forced import Document
    from ..probing.data import PROBLEMS, token_samples, whole_documents

    require(length <= loaded.limit, "tokens", length, f"at most the {loaded.limit} positions of the model")
    settings: dict[str, Any] = {"length": length, "count": count, "split": split, "text_column": text_column}
    if pack or data.startswith(PROBLEMS):
        ids = list(token_samples(data, loaded.tokenizer, seed=None, **settings))
    else:
        ids = whole_documents(data, loaded.tokenizer, **settings)
    return [Document(each.tolist(), prompt) for each in ids]


def _asked(
    loaded: "LoadedModel", data: str, count: int, most: int, split: str, text_column: str, *, chat: bool
) -> list[list[int]]:
    """Prompts: the first `most` tokens of each text, in the model's chat template if it has one."""
    from ..probing.data import PROBLEMS, token_samples, whole_documents

    settings: dict[str, Any] = {"count": count, "split": split, "text_column": text_column}
    if data.startswith(PROBLEMS):  # which are longer than a prompt
        samples = token_samples(data, loaded.tokenizer, length=max(most, PROBLEM), seed=None, **settings)
        found = [sample[:most] for sample in samples]
    else:
        found = whole_documents(data, loaded.tokenizer, length=most, least=1, **settings)
    if not (chat and loaded.tokenizer.chat_template):
        return [ids.tolist() for ids in found]
    texts = [loaded.tokenizer.decode(ids, skip_special_tokens=True) for ids in found]
    return [loaded.encode(text, chat=True)[0].tolist() for text in texts]


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    """What fits 80 columns; the page has the rest."""
    from ..evaluation.measure.diverged import EQUAL
    from ..evaluation.report.divergence_summary import loss_of, nats
    from ..evaluation.report.summary import budget_of, is_known, percent

    caption = (
        "holds at most, of the full cache's bytes; * over 3 % away from the budget. KL in nats: mean of documents "
        "with its 95 % interval, then over tokens. same: equal likeliest tokens. loss: beyond the full cache's"
    )
    table = Table(
        title=title,
        title_justify="left",
        caption=caption,
        caption_justify="left",
        highlight=False,
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("method", overflow="fold")
    for name in ("holds", "KL", "95 %", "99 %", "largest", "same", "loss"):
        table.add_column(name, justify="right", no_wrap=True)
    before = None
    for row in rows:
        if before not in (None, row["budget"]):
            table.add_section()
        before = row["budget"]
        far = is_known(row["apart"]) and abs(row["apart"]) > EQUAL
        table.add_row(
            f"{row['method']} {budget_of(row)}".strip(),
            percent(row["resident"], 0) + ("*" if far else ""),
            nats(row["kl"]),
            f"{nats(row['kl_low'])}-{nats(row['kl_high'])}" if is_known(row["kl_low"]) else "",
            nats(row["kl_99"]),
            nats(row["kl_max"]),
            percent(row["same"], 0),
            loss_of(row),
        )
    return table
