"""kvpress from an environment of its own: its speed beside that of KVCompressCache, and its answers to the kit's tasks.

    python benchmarks/peer_kvpress.py --parts speed
    python benchmarks/peer_kvpress.py --parts tasks --tasks trace:generated=300 --rules before,after --results results

kvpress stops at transformers 5.3 and this package begins later, so both cannot be imported by one Python. This script
makes an environment in runs/kvpress-env at the first run, which takes some minutes and 1.5 GB, and runs itself there as
the worker, which reads a job and prints what it finds, one JSON line after the other.

speed: kvpress's presses on the weights, prompts and clock of kv_compress.py; rows go to its result file. What the two
have in common is here, because it runs under either: `race`, which takes turns between caches, and `timing`, which
makes numbers of it. Within a race the caches are paired; between the two environments compare each with its own
DynamicCache.

tasks: kvpress answers examples of `kara-hf evaluate`, one after the other; they go to files of results that
`kara-hf report` reads next to the others, under names like "kvpress AdaKV(SnapKV)". A budget is the share of the tokens
that is kept, so `kara-hf evaluate --equal tokens` goes beside it. "before": the press cuts the whole prompt, or
Decoding(...) keeps that share of the prompt and the expected answer together. "after": the press cuts the context.
Bytes are those really held: AdaKV frees none, and Decoding(...) holds the prompt until its first cut.
"""

import contextlib
import copy
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from provenance import load_rows, write_rows
from rich.console import Console
from rich.progress import track

from kara_hf.evaluation.measure.provenance import digest, provenance

Row = dict[str, Any]
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "kv_compress.json"
TORCH = "torch==2.13.0"
REQUIRED = ("transformers<5.3", "kvpress==0.5.5", "typer", "rich")
PARTS = ("speed", "tasks")
FULL = "DynamicCache"
RULES = ("before", "after")
METHODS = "full,SnapKV,AdaKV(SnapKV),Decoding(SnapKV),Decoding(Knorm)"
console = Console()


# ------------------------------------------------------------------------------------------ taking turns, on one clock
@dataclass
class Entry:
    """One cache in a race.

    Attributes:
        name: what it is called in rows.
        ids: its tokens, ``[B, prompt + steps]`` int64.
        prefill: takes the prompt ``[B, prompt]``.
        step: takes one token ``[B, 1]`` at a position.
        held: called without arguments, gives the bytes that the cache holds now.
        cache: what can be asked when the race is over.
    """

    name: str
    ids: torch.Tensor
    prefill: Callable[[torch.Tensor], Any]
    step: Callable[[torch.Tensor, int], Any]
    held: Any
    cache: Any = None


@dataclass
class Trace:
    """What was seen of one entry: seconds of CPU time, and bytes held after the prompt and after every step."""

    batch: int
    prefill: float = 0.0
    prompt_bytes: int = 0
    steps: list[float] = field(default_factory=list)
    held: list[int] = field(default_factory=list)


def cpu_seconds(work: Callable[..., Any], *arguments: Any) -> float:
    """CPU time of this process for one piece of work, which waiting for a busy core does not lengthen."""
    start = time.process_time()
    work(*arguments)
    return time.process_time() - start


@torch.no_grad()
def race(entries: list[Entry], prompt: int, what: str) -> list[Trace]:
    """Every cache takes the prompt, then one step after the other; who goes first changes from step to step."""
    order, traces = random.Random(0), [Trace(len(entry.ids)) for entry in entries]
    for entry, trace in zip(entries, traces, strict=True):
        trace.prefill = cpu_seconds(entry.prefill, entry.ids[:, :prompt])
        trace.prompt_bytes = entry.held()
    turns = list(zip(entries, traces, strict=True))
    steps = entries[0].ids.shape[1] - prompt
    for position in track(range(prompt, prompt + steps), description=what, console=console, transient=True):
        for entry, trace in order.sample(turns, len(turns)):
            trace.steps.append(cpu_seconds(entry.step, entry.ids[:, position : position + 1], position))
            trace.held.append(entry.held())
    return traces


def timing(runs: list[Trace], base: list[Trace]) -> Row:
    """Numbers of an entry from one or more runs of the same race, beside those of the entry it is compared with.

    Of every step the median over the runs counts: what a step always does stays, and what disturbed it once does not.
    The first step is the one in which a prompt is cut, if it is cut while decoding; it is part of the loop.
    """
    mine, other = (
        [statistics.median(times) for times in zip(*(trace.steps for trace in traces), strict=True)]
        for traces in (runs, base)
    )
    batch, share = runs[0].batch, runs[0].batch / base[0].batch
    speedups = [share * sum(b.steps) / sum(r.steps) for r, b in zip(runs, base, strict=True)]
    held = runs[0].held
    return {
        "batch": batch,
        "steps": len(mine),
        "repeats": len(runs),
        "tokens_per_s": batch * len(mine) / sum(mine),
        "speedup": share * sum(other) / sum(mine),
        "speedup_low": min(speedups),
        "speedup_high": max(speedups),
        "step_time_ratio": statistics.median(m / o for m, o in zip(mine[1:], other[1:], strict=True)),
        "step_ms": 1e3 * statistics.median(mine[1:]),
        "first_step_ms": 1e3 * mine[0],
        "worst_step_ms": 1e3 * max(mine[1:]),
        "prefill_ms": 1e3 * statistics.median(t.prefill for t in runs),
        "prompt_bytes": runs[0].prompt_bytes,
        "mean_bytes": round(statistics.mean(held)),
        "most_bytes": max(held),
        "last_bytes": held[-1],
    }


def dense_bytes(cache: Any) -> int:
    """Bytes of the keys and values of a DynamicCache."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def twin(model: Any) -> Any:
    """A model of its own modules and hooks, on the same weights."""
    return copy.deepcopy(model, {id(weight): weight for weight in (*model.parameters(), *model.buffers())})


def merge(old: list[Row], new: list[Row]) -> list[Row]:
    """`new` rows in place of the rows that the same package has in the same sections."""
    done = {(row["section"], row["package"]) for row in new}
    return [row for row in old if (row["section"], row["package"]) not in done] + new


# ----------------------------------------------------------------------------------------------- in the environment
def presses(evicted: float = 0.8, window: int = 64, interval: int = 128, target: int = 512) -> dict[str, tuple]:
    """The rows of kvpress: a press, and whether it works while the prompt is read and while tokens are decoded."""
    from kvpress import AdaKVPress, DecodingPress, KnormPress, PrefillDecodingPress, SnapKVPress

    def snap(ratio: float = evicted) -> Any:
        return SnapKVPress(compression_ratio=ratio, window_size=window)

    def decoding(press: Any) -> Any:
        return DecodingPress(press, compression_interval=interval, target_size=target)

    both = PrefillDecodingPress(prefilling_press=snap(), decoding_press=decoding(KnormPress()))
    return {
        FULL: (None, False, False),
        f"SnapKV {evicted}": (snap(), True, False),
        f"AdaKV(SnapKV {evicted})": (AdaKVPress(snap()), True, False),
        f"Decoding(Knorm, {interval}/{target})": (decoding(KnormPress()), False, True),
        f"Decoding(SnapKV, {interval}/{target})": (decoding(snap(0.0)), False, True),
        f"SnapKV {evicted}, then Decoding(Knorm, {interval}/{target})": (both, True, True),
    }


def buffer_bytes(press: Any, model: Any) -> int:
    """What a press holds beside the cache: hidden states, and the places of what is to be taken for evicted."""
    decoding = getattr(press, "decoding_press", press)
    buffers = [part for parts in getattr(decoding, "hidden_states_buffer", {}).values() for part in parts]
    masked = [getattr(layer.self_attn, "masked_key_indices", None) or () for layer in model.model.layers]
    return sum(tensor.nbytes for tensor in (*buffers, *(part for parts in masked for part in parts)))


class Buffers:
    """Bytes of a cache now; notes the most that its press held beside it."""

    def __init__(self, cache: Any, press: Any, model: Any):
        self.cache, self.press, self.model, self.most = cache, press, model, 0

    def __call__(self) -> int:
        self.most = max(self.most, buffer_bytes(self.press, self.model))
        return dense_bytes(self.cache)


def pressed(model: Any, name: str, how: tuple, ids: torch.Tensor, stack: contextlib.ExitStack) -> Entry:
    """An entry with a model of its own, as kvpress's pipeline would use it; `stack` ends what the press does to it."""
    from transformers import DynamicCache

    press, reads, decodes = how
    model, cache = twin(model), DynamicCache()

    def prefill(prompt: torch.Tensor) -> None:
        with press(model) if reads else contextlib.nullcontext():
            model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        if decodes:
            stack.enter_context(press(model))

    def step(token: torch.Tensor, position: int) -> None:
        positions = torch.full_like(token, position)
        model(input_ids=token, past_key_values=cache, use_cache=True, position_ids=positions)

    return Entry(name, ids, prefill, step, Buffers(cache, press, model), cache)


def speed_rows(model: Any, ids: torch.Tensor, case: Row, repeats: int) -> list[Row]:
    """One row for each press, from `repeats` races."""
    runs, buffers = [], {}
    for number in range(repeats):
        with contextlib.ExitStack() as stack:
            shown = presses(**case["press"]).items()
            entries = [pressed(model, name, how, ids, stack) for name, how in shown]
            runs.append(race(entries, case["prompt"], f"{case['case']}, run {number + 1}"))
            buffers = {entry.name: entry.held.most for entry in entries}
    columns = [list(column) for column in zip(*runs, strict=True)]
    return [
        {"section": "speed", "case": case["case"], "method": name, "buffer_bytes": most} | timing(mine, columns[0])
        for (name, most), mine in zip(buffers.items(), columns, strict=True)
    ]


def make_press(name: str, window: int) -> Any:
    """A press by its class's name without "Press", with another in parentheses that it wraps: ``AdaKV(SnapKV)``.

    Raises:
        ValueError: kvpress has no such press.
    """
    import kvpress

    outer, _, inner = name.removesuffix(")").partition("(")
    kind = getattr(kvpress, f"{outer}Press", None)
    if kind is None:
        raise ValueError(f"method={name!r} is not there: kvpress {version('kvpress')} has no {outer}Press")
    press = kind(make_press(inner, window)) if inner else kind()
    if hasattr(press, "window_size"):
        press.window_size = window
    return press


def press_of(method: str, share: float, tokens: int, settings: Row) -> Any:
    """The press that keeps this share; of an example with `tokens` in all if it works while decoding. Or None.

    Raises:
        ValueError: there is no such press, or it cannot be told how much to keep.
    """
    if method == "full":
        return None
    press = make_press(method, settings["window"])
    if decodes(method):
        press.compression_interval, press.target_size = settings["interval"], max(1, round(share * tokens))
    elif hasattr(press, "compression_ratio"):
        press.compression_ratio = 1 - share
    else:
        raise ValueError(f"method={method!r} is not possible: it has no compression_ratio to set a share by")
    return press


def decodes(method: str) -> bool:
    """Whether it cuts while tokens are generated, and not the prompt."""
    return method.startswith("Decoding(")


@torch.no_grad()
def solve(model: Any, method: str, press: Any, asked: Row, ends: list[int]) -> Row:
    """A greedy answer and what it took; positions are those of all tokens, whatever was cut.

    The press reads the context, or it works from the first token behind it on. Bytes are noted after every decode step,
    those that the press holds beside the cache with them.
    """
    from transformers import DynamicCache

    cache, new, held, peaks, start = DynamicCache(), [], [], [], time.perf_counter()
    context, question = asked["context"], asked["question"]
    seen = len(context) + len(question)

    def read(ids: list[int], first: int) -> Any:
        positions = torch.arange(first, first + len(ids), device=model.device)[None]
        ids = torch.tensor([ids], device=model.device)
        return model(input_ids=ids, past_key_values=cache, use_cache=True, position_ids=positions, logits_to_keep=1)

    def note() -> None:
        held.append(dense_bytes(cache) + buffer_bytes(press, model))
        peaks.append(held[-1] + max(layer.keys.nbytes for layer in cache.layers))  # it grows by copying

    with contextlib.ExitStack() as stack:
        with contextlib.nullcontext() if press is None or decodes(method) else press(model):
            out = read(context, 0)
        if press is not None and not decodes(method):  # while a layer is cut it is there as a whole, too
            whole = max(2 * layer.keys.nbytes // layer.keys.shape[2] * len(context) for layer in cache.layers)
            peaks.append(dense_bytes(cache) + whole)
        if decodes(method):
            stack.enter_context(press(model))
        if question:
            out = read(question, len(context))
        for position in range(seen, seen + asked["room"]):
            new.append(int(out.logits[0, -1].argmax()))
            if new[-1] in ends or len(new) == asked["room"]:
                break
            out = read(new[-1:], position)
            note()
        if not held:
            note()
    return {
        "tokens": new,
        "mean_bytes": statistics.mean(held),
        "resident_bytes": max(held),
        "peak_bytes": max(peaks),
        "steps": len(new),
        "seconds": time.perf_counter() - start,
    }


def answers(job: Row) -> Iterator[Row]:
    """Answers to every example that a cell lacks."""
    model = load(job["model"], getattr(torch, job["dtype"])).to(job["device"])
    for place, cell in enumerate(job["cells"]):
        for number in cell["missing"]:
            asked = job["examples"][number]
            if cell["rule"] != "after":
                asked = asked | {"context": asked["context"] + asked["question"], "question": []}
            tokens = len(asked["context"]) + asked["expected"]
            press = press_of(cell["method"], cell["budget"], tokens, job)
            yield {"cell": place, "number": number} | solve(model, cell["method"], press, asked, job["ends"])


def load(folder: Path | str, dtype: torch.dtype = torch.float32) -> Any:
    """A model, without a progress bar."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def check_model(model: Any, tensors: dict[str, torch.Tensor]) -> float:
    """How far its logits are from those of the model that was saved. Raises RuntimeError if it is another model."""
    with torch.no_grad():
        difference = float((model(input_ids=tensors["check"]).logits - tensors["logits"]).abs().max())
    if not difference < 1e-3:
        raise RuntimeError(f"the model is not the one that was saved: its logits differ by {difference}")
    return difference


def speeds(folder: Path, job: Row) -> Iterator[Row]:
    """Rows of every case."""
    model, tensors = load(folder / "model"), torch.load(folder / "tensors.pt", weights_only=True)
    same = {"weights": digest(folder / "model"), "logits_difference": check_model(model, tensors)}
    for case in job["cases"]:
        yield from (row | same for row in speed_rows(model, tensors[case["case"]], case, job["repeats"]))


def worker(folder: Path) -> None:
    """Does the job in `folder`: prints where its findings come from, then each of them."""
    console.stderr = True
    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(job["threads"])
    found = speeds(folder, job) if "cases" in job else answers(job) if "cells" in job else iter(())
    origin = provenance(job["device"])
    origin["versions"]["kvpress"] = version("kvpress")
    for row in (origin, *found):
        print(json.dumps(row), flush=True)


# ---------------------------------------------------------------------------------------------------------- around it
def environment(folder: Path, torch_requirement: str) -> Path:
    """The Python of an environment with kvpress in `folder`, which is made if it is not there already.

    Raises:
        typer.BadParameter: the folder holds something else.
        subprocess.CalledProcessError: an installation failed; the next call starts it again.
    """
    stamp, wanted, python = folder / "installed.json", [torch_requirement, *REQUIRED], folder / "bin" / "python"
    if stamp.exists() and json.loads(stamp.read_text()) == wanted:
        return python
    if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").exists():
        raise typer.BadParameter(f"{folder} is not empty and no environment; name another folder with --env")
    console.print(f"making an environment in {folder}, which takes some minutes")
    stamp.unlink(missing_ok=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    # torch comes first and is named again, so that nothing that needs it brings another build.
    for packages in ([torch_requirement], wanted):
        subprocess.run([str(python), "-m", "pip", "install", "-qq", *packages], check=True)
    subprocess.run([str(python), "-W", "ignore", "-c", "import kvpress"], check=True)
    stamp.write_text(json.dumps(wanted))
    return python


def write_model(folder: Path, cases: list[Row]) -> None:
    """Writes the random weights, logits to know them by, and the tokens of every case."""
    from generation import random_llama
    from kv_compress import tokens
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = random_llama("cpu", torch.float32)
    model.save_pretrained(folder / "model")
    check = tokens(64, 1)
    with torch.no_grad():
        tensors = {"check": check, "logits": model(input_ids=check).logits}
    torch.save(tensors | {case["case"]: tokens(case["prompt"], case["new"]) for case in cases}, folder / "tensors.pt")


def run_worker(python: Path, folder: Path, job: Row) -> Iterator[Row]:
    """Has the job done in the other environment: where its findings come from, then each as it is found.

    Raises:
        subprocess.CalledProcessError: the worker failed; what it found until then has come.
    """
    (folder / "job.json").write_text(json.dumps(job))
    command = [str(python), "-W", "ignore", __file__, "--worker", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        rows = map(json.loads, process.stdout)
        yield next(rows, {}) | {"command": provenance("cpu")["command"]}
        yield from rows
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def measure_speed(python: Path, cases: list[Row], repeats: int) -> list[Row]:
    """Rows of the presses in every case."""
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name), cases)
        job = {"device": "cpu", "threads": 1, "cases": cases, "repeats": repeats}
        origin, *rows = run_worker(python, Path(name), job)
    same = {"device": "cpu", "dtype": "float32", "package": "kvpress", "provenance": origin}
    return [row | same for row in rows]


def cells_of(methods: str, budgets: str, rules: str) -> list[Row]:
    """Method, rule and budget of everything that is measured of a task, as the options of the command name them.

    Raises:
        typer.BadParameter: a budget is no share, or a rule is not one that kvpress can follow.
    """
    asked, shares, ruled = (
        [name.strip() for name in text.split(",") if name.strip()] for text in (methods, budgets, rules)
    )
    if not set(ruled) <= set(RULES):
        raise typer.BadParameter(f"rules={rules!r} is not possible: rules must be of {', '.join(RULES)}")
    try:
        kept = [float(share) for share in shares]
    except ValueError:
        kept = [0.0]
    if not all(0 < share <= 1 for share in kept):
        raise typer.BadParameter(f"budgets={budgets!r} is not possible: budgets must be shares in (0, 1]")
    cells = [{"method": "full", "rule": "none", "budget": 1.0}] if "full" in asked else []
    for rule in ruled:
        able = [name for name in asked if name != "full" and not (rule == "after" and decodes(name))]
        cells += [{"method": name, "rule": rule, "budget": share} for share in kept for name in able]
    return cells


def measure_tasks(python: Path, tasks: str, cells: list[Row], model: str | None, n: int, out: Path) -> None:
    """Has every cell of every task answered that is not in `out` already, and appends each answer as it comes.

    Raises:
        ValueError: a task does not exist or does not fit the model or the rules.
    """
    from kara_hf.bundled import BUNDLED_MODEL
    from kara_hf.cli.evaluate import BUNDLED_SHARED
    from kara_hf.evaluation.measure.evaluator import Evaluator
    from kara_hf.evaluation.measure.identity import weights_of
    from kara_hf.evaluation.measure.request import Answers
    from kara_hf.evaluation.measure.results import Cell, CellFile
    from kara_hf.integration.loading import LoadedModel, find_device
    from kara_hf.methods.registry import SharedSettings
    from kara_hf.methods.rules import OLD_SPELLINGS
    from kara_hf.tasks import english, published  # noqa: F401  they register their tasks
    from kara_hf.tasks import reasoner_tasks as bundled  # noqa: F401
    from kara_hf.tasks.task import make_task

    shared, folder = SharedSettings(**{} if model else BUNDLED_SHARED), model or str(BUNDLED_MODEL)
    runner = LoadedModel(folder, device="cpu")  # it reads prompts and grades, the worker generates
    evaluator = Evaluator(
        runner.model, runner.tokenizer, name=runner.name, weights=weights_of(runner.model, folder), limit=runner.limit
    )
    threads = torch.get_num_threads() if model else 1  # the bundled model is too small for several
    here = {"device": str(find_device(None)), "threads": threads}
    job = here | {
        "model": folder,
        "dtype": str(runner.model.dtype).removeprefix("torch."),
        "ends": sorted(evaluator.ends),
        "window": shared.observation,
        "interval": shared.window,
    }
    with tempfile.TemporaryDirectory() as name:
        (origin,) = run_worker(python, Path(name), here)
        origin |= {"dtype": job["dtype"]}
        for asked in tasks.split(","):
            task = make_task(asked.strip(), runner.tokenizer)
            prompts = [evaluator.prompt(task, i) for i in range(n if task.size is None else min(n, task.size))]
            if not prompts[0].question and any(cell["rule"] == "after" for cell in cells):
                raise ValueError(
                    f"task {task.name!r} has no question apart from its context; leave out the rule 'after'"
                )
            files, lacking = [], []
            for cell in cells:
                rule = OLD_SPELLINGS.get(cell["rule"], cell["rule"])
                key = (task.name, rule, f"kvpress {cell['method']}", cell["budget"], "tokens", 0)
                settings = {"share": cell["budget"], "batch": 1, "shared": asdict(shared)}
                files.append(CellFile(out, Cell(evaluator.name, evaluator.weights, *key), settings, origin))
                lacking.append(cell | {"missing": [i for i in range(len(prompts)) if i not in files[-1].done]})
            total = sum(len(cell["missing"]) for cell in lacking)
            if not total:
                continue
            examples = [as_asked(prompt, runner.tokenizer) for prompt in prompts]
            rows = run_worker(python, Path(name), job | {"cells": lacking, "examples": examples})
            next(rows)  # where they come from, which is known
            for row in track(rows, description=task.name, total=total, console=console, transient=True):
                place, prompt = row.pop("cell"), prompts[row.pop("number")]
                answer = Answers(**row | {"tokens": [row["tokens"]], "allocated_bytes": math.nan})
                files[place].append(evaluator.lines([prompt], answer, prompt.example.max_new_tokens, True))


def as_asked(prompt: Any, tokenizer: Any) -> Row:
    """An example as the worker reads it, which has no tokenizer; `expected` is how long its answer should be."""
    example, expected = prompt.example, prompt.example.max_new_tokens
    if example.reference is not None:
        solution = tokenizer(example.reference, add_special_tokens=False)["input_ids"]
        expected = min(expected, len(solution) + 1)
    return {
        "context": prompt.context,
        "question": prompt.question,
        "room": example.max_new_tokens,
        "expected": expected,
    }


def chosen_parts(names: str) -> list[str]:
    """The parts asked for. Raises `typer.BadParameter` on another name."""
    asked = [name.strip() for name in names.split(",")] if names else list(PARTS)
    if unknown := sorted(set(asked) - set(PARTS)):
        raise typer.BadParameter(f"{', '.join(unknown)} is no part; choose from {', '.join(PARTS)}")
    return asked


def result_file(out: Path | None, smoke: bool) -> Path | None:
    """Where rows go: nowhere in a smoke run, unless a file outside the results is named."""
    if not smoke:
        return out or RESULTS
    if out is not None and out.resolve().is_relative_to(RESULTS.parent.resolve()):
        raise typer.BadParameter("a smoke run measures nothing; name a file outside benchmarks/results")
    return out


def main(
    parts: Annotated[str, typer.Option(help=f"comma-separated, of {', '.join(PARTS)}; empty: both")] = "",
    env: Annotated[Path, typer.Option(help="folder of the environment")] = ROOT / "runs" / "kvpress-env",
    torch_requirement: Annotated[str, typer.Option("--torch", help="what to install as torch")] = TORCH,
    repeats: Annotated[int, typer.Option(help="speed: races of every case")] = 3,
    out: Annotated[Path | None, typer.Option(help="speed: JSON file of rows; default: that of kv_compress.py")] = None,
    model: Annotated[str | None, typer.Option(help="tasks: hub id or folder; default: the bundled model")] = None,
    tasks: Annotated[str, typer.Option(help="tasks: as in `kara-hf evaluate`")] = "trace:generated=300",
    methods: Annotated[str, typer.Option(help="tasks: full, and presses, comma-separated")] = METHODS,
    budgets: Annotated[str, typer.Option(help="tasks: shares that are kept")] = "0.5,0.25,0.125,0.0625",
    rules: Annotated[str, typer.Option(help=f"tasks: what is cut, of {', '.join(RULES)}")] = "before",
    n: Annotated[int, typer.Option(help="tasks: examples of each")] = 200,
    results: Annotated[Path, typer.Option(help="tasks: folder of results, as of `kara-hf evaluate`")] = Path("results"),
    smoke: Annotated[bool, typer.Option(help="a few short steps and examples")] = False,
    worker_folder: Annotated[Path | None, typer.Option("--worker", hidden=True)] = None,
) -> None:
    """Measures kvpress: prints the table of its speed and merges its rows, and appends its answers to results."""
    warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)  # 5.17 knows no other name
    if worker_folder is not None:
        worker(worker_folder)
        return
    names, path, cells = chosen_parts(parts), result_file(out, smoke), cells_of(methods, budgets, rules)
    python = environment(env.absolute(), torch_requirement)
    if "tasks" in names:
        with tempfile.TemporaryDirectory() as scratch:
            measure_tasks(python, tasks, cells, model, 2 if smoke else n, Path(scratch) if smoke else results)
        console.print("answers of a smoke run are gone" if smoke else f"written to {results}")
    if "speed" in names:
        torch.set_num_threads(1)
        from kv_compress import CASES, case_name, markdown

        shapes, press = CASES, {"window": 64, "interval": 128, "target": 512}
        if smoke:
            shapes, press, repeats = ((160, 24),), {"window": 4, "interval": 8, "target": 64}, 1
        cases = [{"case": case_name(p, new), "prompt": p, "new": new, "press": press} for p, new in shapes]
        rows = measure_speed(python, cases, repeats)
        console.print(markdown(rows), markup=False, highlight=False, soft_wrap=True)
        if path is not None:
            write_rows(path, merge(load_rows(path), rows))
            console.print(f"written to {path}")


if __name__ == "__main__":
    typer.run(main)
