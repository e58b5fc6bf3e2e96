"""kvpress on the weights, prompts and clock of kv_compress.py, in an environment of its own.

    python benchmarks/peer_kvpress.py          # makes the environment at the first run, some minutes and 1.5 GB

kvpress stops at transformers 5.3 and this package begins later, so both cannot be imported by one Python. This script
makes an environment in runs/kvpress-env, writes a job for it (weights, prompts, problems), runs itself there as the
worker, and puts the rows that come back into the result file of kv_compress.py, kvpress's versions with them. The
problems are also solved by KVCompressCache, which keeps as many tokens, for the table.

What the two have in common is here, because it runs under either: `race`, which takes turns between caches, and
`timing`, which makes numbers of it. Within a race the caches are paired; between the two environments compare each with
its own DynamicCache.
"""

import contextlib
import copy
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from provenance import digest, load_rows, provenance, wilson, write_rows
from rich.console import Console
from rich.progress import track

Row = dict[str, Any]
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "kv_compress.json"
TORCH = "torch==2.13.0"
REQUIRED = ("transformers<5.3", "kvpress==0.5.5", "typer", "rich")
PARTS = ("speed", "quality")
FULL = "DynamicCache"
TASKS = ("recall", "survey")
EVICTED = (0.5, 0.75, 0.875)  # shares of a prompt
WINDOW = 16  # queries that vote on the prompts of the bundled model, which are short
OURS = {"block_size": 4, "protected": 8, "observation": WINDOW, "continual": False}
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


@torch.no_grad()
def solve(model: Any, press: Any, prompt: list[int], room: int) -> tuple[list[int], int]:
    """Greedy answer and bytes of the cache; the press reads the whole prompt, positions are those of all tokens."""
    from transformers import DynamicCache

    cache, new = DynamicCache(), []
    with press(model) if press is not None else contextlib.nullcontext():
        out = model(input_ids=torch.tensor([prompt]), past_key_values=cache, use_cache=True, logits_to_keep=1)
    for position in range(len(prompt), len(prompt) + room):
        new.append(int(out.logits[0, -1].argmax()))
        if new[-1] == model.config.eos_token_id:
            break
        place = torch.tensor([[position]])
        out = model(input_ids=torch.tensor([new[-1:]]), past_key_values=cache, use_cache=True, position_ids=place)
    return new, dense_bytes(cache)


def load(folder: Path | str) -> Any:
    """A model from a folder, without a progress bar."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def answers(model: Any, problems: list[Row]) -> list[Row]:
    """Answers of the full cache, SnapKV and AdaKV(SnapKV) to the problems of every task, not graded yet."""
    from kvpress import AdaKVPress, SnapKVPress

    def snap(ratio: float) -> Any:
        return SnapKVPress(compression_ratio=ratio, window_size=WINDOW)

    methods = [(FULL, 0.0, None)]
    for ratio in EVICTED:
        methods += [("SnapKV", ratio, snap(ratio)), ("AdaKV(SnapKV)", ratio, AdaKVPress(snap(ratio)))]
    found = []
    for name, ratio, press in track(methods, description="quality", console=console, transient=True):
        for problem in problems:
            new, held = solve(model, press, problem["ids"], problem["room"])
            found.append({"method": name, "evicted": ratio, "task": problem["task"], "new": new, "bytes": held})
    return found


def check_model(model: Any, tensors: dict[str, torch.Tensor]) -> float:
    """How far its logits are from those of the model that was saved. Raises RuntimeError if it is another model."""
    with torch.no_grad():
        difference = float((model(input_ids=tensors["check"]).logits - tensors["logits"]).abs().max())
    if not difference < 1e-3:
        raise RuntimeError(f"the model is not the one that was saved: its logits differ by {difference}")
    return difference


def worker(folder: Path) -> None:
    """Does the job in `folder`: reads job.json and what it names, writes found.json."""
    job = json.loads((folder / "job.json").read_text())
    found: Row = {"rows": [], "answers": [], "provenance": provenance("cpu")}
    found["provenance"]["versions"]["kvpress"] = version("kvpress")
    if job["cases"]:
        model, tensors = load(folder / "model"), torch.load(folder / "tensors.pt", weights_only=True)
        same = {"weights": digest(folder / "model"), "logits_difference": check_model(model, tensors)}
        for case in job["cases"]:
            found["rows"] += [row | same for row in speed_rows(model, tensors[case["case"]], case, job["repeats"])]
    if job["problems"]:
        found["answers"] = answers(load(job["reasoner"]), job["problems"])
    (folder / "found.json").write_text(json.dumps(found))


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


def as_job(problems: list[Any], tokenizer: Any) -> list[Row]:
    """Problems as the worker reads them, which has no tokenizer."""
    return [
        {
            "task": problem.task,
            "ids": tokenizer(problem.prompt)["input_ids"],
            "room": len(problem.completion.split()) + 16,
        }
        for problem in problems
    ]


def facts(text: str) -> set[str]:
    """The facts of an answer."""
    from kara_hf.evaluation.reasoner import final_answer

    return {fact.strip() for fact in final_answer(text).split(";")} - {""}


def quality_row(problems: list[Any], method: str, evicted: float, texts: list[str], held: list[int]) -> Row:
    """Right answers of one method to the problems of one task with a 95 % interval, the share of the asked facts that
    are in its answers, and bytes.
    """
    n, first = len(problems), problems[0]
    pairs = list(zip(problems, texts, strict=True))
    right = sum(problem.grade(text) for problem, text in pairs)
    low, high = wilson(right, n)
    found = [len(facts(p.completion) & facts(text)) / len(facts(p.completion)) for p, text in pairs]
    return {
        "section": "quality",
        "case": f"{first.task}, {first.length} tokens",
        "method": method,
        "evicted": evicted,
        "first_seed": first.seed,
        "n": n,
        "accuracy": right / n,
        "low": low,
        "high": high,
        "facts": statistics.mean(found),
        "last_bytes": round(statistics.mean(held)),
    }


def their_rows(problems: list[Any], tokenizer: Any, answers: list[Row]) -> list[Row]:
    """Rows of the worker's answers: one for each method, share and task."""
    groups: dict[tuple[str, float, str], list[Row]] = {}
    for answer in answers:
        groups.setdefault((answer["method"], answer["evicted"], answer["task"]), []).append(answer)
    return [
        quality_row(
            [problem for problem in problems if problem.task == task],
            method,
            evicted,
            tokenizer.batch_decode([answer["new"] for answer in group]),
            [answer["bytes"] for answer in group],
        )
        for (method, evicted, task), group in groups.items()
    ]


def our_row(problems: list[Any], tokenizer: Any, model: Any, evicted: float) -> Row:
    """The same of KVCompressCache, which keeps of each prompt as many tokens per head, on average, as SnapKV does.

    Rounded down to whole blocks; as with SnapKV, what is decoded comes on top.
    """
    from kara_hf import KVCompressCache

    texts, held = [], []
    for problem in problems:
        inputs = tokenizer(problem.prompt, return_tensors="pt")
        seen = inputs["input_ids"].shape[1]
        cache = KVCompressCache(model, max_cache_tokens=int(seen * (1 - evicted)), **OURS)
        room = len(problem.completion.split()) + 16
        out = model.generate(**inputs, past_key_values=cache, max_new_tokens=room, do_sample=False)
        texts.append(tokenizer.decode(out[0, seen:]))
        held.append(cache.report().resident_bytes)
    return quality_row(problems, "KVCompressCache", evicted, texts, held)


def run_worker(python: Path, folder: Path, job: Row) -> tuple[list[Row], list[Row], Row]:
    """Has the job done in the other environment: rows, answers, and where they come from."""
    (folder / "job.json").write_text(json.dumps(job))
    subprocess.run([str(python), "-W", "ignore", __file__, "--worker", str(folder)], check=True)
    found = json.loads((folder / "found.json").read_text())
    return found["rows"], found["answers"], found["provenance"] | {"command": provenance("cpu")["command"]}


def all_problems(n: int, length: int) -> list[Any]:
    """The first `n` test problems of every task, none of which the bundled model was trained on."""
    from kara_hf.evaluation import make_problem

    return [make_problem(task, seed=seed, length=length) for task in TASKS for seed in range(10_000, 10_000 + n)]


def measure(python: Path, parts: list[str], sizes: Row) -> list[Row]:
    """All rows of the parts asked for."""
    from retention import ASSETS
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ASSETS)
    problems = all_problems(sizes["problems"], sizes["length"]) if "quality" in parts else []
    cases = sizes["cases"] if "speed" in parts else []
    job = {
        "cases": cases,
        "problems": as_job(problems, tokenizer),
        "reasoner": str(ASSETS),
        "repeats": sizes["repeats"],
    }
    with tempfile.TemporaryDirectory() as name:
        if cases:
            write_model(Path(name), cases)
        rows, answers, origin = run_worker(python, Path(name), job)
    same, weights = {"device": "cpu", "dtype": "float32"}, {"weights": digest(ASSETS)}
    rows += [row | weights for row in their_rows(problems, tokenizer, answers)]
    model, ours = load(ASSETS) if problems else None, []
    for task in track(TASKS if problems else (), description="ours", console=console, transient=True):
        asked = [problem for problem in problems if problem.task == task]
        ours += [our_row(asked, tokenizer, model, evicted) | weights for evicted in EVICTED]
    theirs, mine = {"package": "kvpress", "provenance": origin}, {"package": "kara_hf", "provenance": provenance("cpu")}
    return [row | same | theirs for row in rows] + [row | same | mine for row in ours]


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
    repeats: Annotated[int, typer.Option(help="races of every case")] = 3,
    problems: Annotated[int, typer.Option(help="problems of each task")] = 120,
    out: Annotated[Path | None, typer.Option(help="JSON file of rows; default: that of kv_compress.py")] = None,
    smoke: Annotated[bool, typer.Option(help="a few short steps and problems")] = False,
    worker_folder: Annotated[Path | None, typer.Option("--worker", hidden=True)] = None,
) -> None:
    """Measures kvpress, prints the tables of the rows and merges them into the result file."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)  # 5.17 knows no other name
    if worker_folder is not None:
        worker(worker_folder)
        return
    names, path = chosen_parts(parts), result_file(out, smoke)
    from kv_compress import CASES, case_name, markdown

    shapes, press = CASES, {"window": 64, "interval": 128, "target": 512}
    sizes: Row = {"repeats": repeats, "problems": problems, "length": 384}
    if smoke:
        shapes, press = ((160, 24),), {"window": 4, "interval": 8, "target": 64}
        sizes = {"repeats": 1, "problems": 2, "length": 256}
    sizes["cases"] = [{"case": case_name(p, n), "prompt": p, "new": n, "press": press} for p, n in shapes]
    rows = measure(environment(env.absolute(), torch_requirement), names, sizes)
    console.print(markdown(rows), markup=False, highlight=False, soft_wrap=True)
    if path is not None:
        write_rows(path, merge(load_rows(path), rows))
        console.print(f"written to {path}")


if __name__ == "__main__":
    typer.run(main)
