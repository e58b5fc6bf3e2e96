"""What Kara is worth to Transformers' continuous batching where memory is short, on long traces of the bundled model.

    python benchmarks/serving.py measure
    python benchmarks/serving.py table

64 requests and a pool with blocks for about 8 whole sequences: the engine without this package, with Kara sealing
windows at several settings, and with compression of the whole trace whenever it passes a threshold. Steps of the
engine, running requests and preemptions do not depend on the machine; time does. It is counted as time of the CPU,
which other work on the machine disturbs less. Two kinds of requests:

- traces: problems whose solutions are long, graded. The problem is a third of a sequence, and prompts are kept whole.
- short prompts: 32 tokens and 1,600 that the model must go on with; there is nothing to grade.
"""

import gc
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from kv_compress_tables import table
from provenance import digest, load_rows, provenance, update_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig
from transformers.utils import logging

from kara_hf.serving import kara_continuous_batching
from kara_hf.tasks.reasoner import make_problem

ROOT = Path(__file__).parent
MODEL = ROOT.parent / "src" / "kara_hf" / "assets" / "tiny_reasoner"
RESULTS = ROOT / "results" / "serving.json"

PAGE = 16
WINDOW: dict[str, Any] = {"window": 64, "recent": 32, "anchor_share": 1.0}
# Names and settings; None is the engine alone.
KEY_NORM: dict[str, Any] = {"score": "key-norm", "anchor_share": 1.0, "period": 16}
TRACE: dict[str, Any] = {"unit": "trace", "window": 256, "recent": 32, "retention": 0.5, "period": 16}
METHODS: dict[str, dict[str, Any] | None] = {
    "engine alone": None,
    "off (retention 1)": WINDOW | {"retention": 1.0},
    "key-norm, 25 %": WINDOW | KEY_NORM | {"retention": 0.25},
    "key-norm, 25 %, windows of 32": WINDOW | KEY_NORM | {"retention": 0.25, "window": 32, "recent": 16},
    "key-norm, 25 %, under pressure": WINDOW | KEY_NORM | {"retention": 0.25, "trigger": "pressure"},
    "key-norm, 25 %, at most 4 at once": WINDOW | KEY_NORM | {"retention": 0.25, "max_requests": 4},
    "key-norm, 50 %": WINDOW | KEY_NORM | {"retention": 0.5},
    "bidirectional, 25 %": WINDOW | {"retention": 0.25, "period": 16},
    "Kara as published, 25 %": WINDOW | {"retention": 0.25, "anchor_share": 0.5, "period": 16},
    "random, 25 %": WINDOW | {"retention": 0.25, "score": "random", "period": 16},
    "whole trace over 288 tokens to 160, key-norm": TRACE | {"score": "key-norm"},
    "whole trace over 288 tokens to 160, recency": TRACE | {"score": "recency"},
    "whole trace over 288 tokens to 160, random": TRACE | {"score": "random"},
}
SHORT = ("engine alone", "key-norm, 25 %", "key-norm, 25 %, windows of 32", "bidirectional, 25 %", "random, 25 %")
KEY = ("method", "requests", "n", "generated", "blocks", "weights")

app = typer.Typer(help=__doc__, add_completion=False)


class Counted:
    """Counts what an engine without Kara does, under the names of `ServingMetrics`."""

    def __init__(self, model: Any):
        self.model, self.steps, self.running, self.preemptions = model, 0, 0, 0
        self.windows = self.peak_query_bytes = 0

    @property
    def mean_running(self) -> float:
        return self.running / self.steps

    def __enter__(self) -> "Counted":
        own = self.model.init_continuous_batching

        def init(**kwargs: Any) -> Any:
            manager = own(**kwargs)
            create = manager._create_batch_processor
            manager._create_batch_processor = lambda: self._count(create())
            return manager

        self.model.init_continuous_batching = init
        return self

    def _count(self, processor: Any) -> Any:
        prepare, offload = (
            processor.inputs_and_outputs.prepare_batch_tensors,
            processor.offloading_manager.offload_requests,
        )

        def prepared(requests_in_batch: list[Any], **kwargs: Any) -> None:
            prepare(requests_in_batch=requests_in_batch, **kwargs)
            self.steps, self.running = self.steps + 1, self.running + len(requests_in_batch)

        def offloaded() -> bool:
            before = len(processor.scheduler.active_requests)
            done: bool = offload()
            self.preemptions += before - len(processor.scheduler.active_requests)
            return done

        if not hasattr(processor, "counted"):
            processor.counted = True
            processor.inputs_and_outputs.prepare_batch_tensors = prepared
            processor.offloading_manager.offload_requests = offloaded
        return processor

    def __exit__(self, *error: object) -> None:
        del self.model.init_continuous_batching


@app.command()
def measure(
    n: Annotated[int, typer.Option(help="Requests.")] = 64,
    short: Annotated[
        bool, typer.Option("--short", help="Short prompts, 1,600 tokens each, instead of traces.")
    ] = False,
    generated: Annotated[
        int | None, typer.Option(help="Tokens of a trace [default: 900; 1,600 behind short prompts].")
    ] = None,
    sequences: Annotated[int, typer.Option(help="Whole sequences that the pool holds.")] = 8,
    first_seed: Annotated[int, typer.Option(help="Seed of the first problem.")] = 50_000,
    only: Annotated[str | None, typer.Option(help="Only methods with this in their name.")] = None,
    out: Annotated[Path, typer.Option(help="JSON file of rows.")] = RESULTS,
) -> None:
    """Serves the same requests with every method."""
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    generated = generated or (1600 if short else 900)
    problems = [make_problem("trace", generated=900 if short else generated, seed=first_seed + i) for i in range(n)]
    prompts = [tokenizer(problem.prompt)["input_ids"] for problem in problems]
    longest = [len(tokenizer(problem.completion)["input_ids"]) + 1 for problem in problems]
    if short:
        prompts, longest = [prompt[:32] for prompt in prompts], [generated] * n
    whole = max(len(prompt) + length for prompt, length in zip(prompts, longest, strict=True))
    blocks = sequences * -(-whole // PAGE)
    settings = GenerationConfig(
        max_new_tokens=generated if short else max(longest) + 16,
        do_sample=False,
        eos_token_id=-1 if short else tokenizer.eos_token_id,
        pad_token_id=0,
    )
    cell = {
        "requests": "short prompts" if short else "traces",
        "n": n,
        "generated": generated,
        "first_seed": first_seed,
        "blocks": blocks,
        "page": PAGE,
        "pool_bytes": blocks * PAGE * model.config.num_hidden_layers * model.config.num_key_value_heads * 32 * 2 * 4,
        "weights": digest(MODEL),
    }
    for name, method in METHODS.items():
        if (only is not None and only not in name) or (short and name not in SHORT):
            continue
        gc.collect()
        counts = Counted(model) if method is None else kara_continuous_batching(model, **method)
        with counts as engine:
            start, start_cpu = time.perf_counter(), time.process_time()
            results = model.generate_batch(
                prompts,
                generation_config=settings,
                continuous_batching_config=ContinuousBatchingConfig(
                    page_size=PAGE, num_blocks=blocks, max_batch_tokens=1024
                ),
            )
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
        texts = [tokenizer.decode(result.generated_tokens, skip_special_tokens=True) for result in results.values()]
        graded = [problem.grade(text) for problem, text in zip(problems, texts, strict=True)]
        metrics = engine if method is None else engine.metrics
        row = {
            "method": name,
            "settings": method,
            "right": None if short else sum(graded),
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "tokens": sum(len(result.generated_tokens) for result in results.values()),
            "errors": sum(result.error is not None for result in results.values()),
            "steps": metrics.steps,
            "mean_running": metrics.mean_running,
            "preemptions": metrics.preemptions,
            "windows": metrics.windows,
            "peak_query_bytes": metrics.peak_query_bytes,
        }
        update_rows(out, [row | cell | provenance("cpu")], KEY)
        print({key: value for key, value in row.items() if key != "settings"}, flush=True)


def markdown(rows: list[dict[str, Any]], requests: str) -> str:
    """One line per method, beside the engine alone."""
    rows = [row for row in rows if row["requests"] == requests]
    alone = next((row for row in rows if row["settings"] is None), None)
    if alone is None:
        return "Not measured."
    rows = [row for row in rows if all(row[name] == alone[name] for name in KEY[1:])]
    graded = alone["right"] is not None
    lines = []
    for row in rows:
        done, base = (row["right"], alone["right"]) if graded else (row["n"], alone["n"])
        rate, base = done / row["cpu_seconds"], base / alone["cpu_seconds"]
        lines.append(
            [
                row["method"],
                f"{row['steps']:,} ({alone['steps'] / row['steps']:.2f})",
                f"{row['mean_running']:.1f}",
                str(row["preemptions"]),
                *([f"{row['right']}"] if graded else []),
                f"{row['cpu_seconds']:.0f} s",
                f"{rate:.2f} ({rate / base:.2f})",
                f"{100 * row['peak_query_bytes'] / row['pool_bytes']:.0f} %",
            ]
        )
    what = "right" if graded else "done"
    head = ["method", "steps (times fewer)", "running", "preempted", *(["right"] if graded else []), "CPU time"]
    head += [f"{what} per second (times)", "queries / pool"]
    first = f"{alone['n']} requests with traces of about {alone['generated']:,} tokens behind their problems"
    if not graded:
        first = f"{alone['n']} requests of {alone['generated']:,} tokens behind 32"
    return "\n\n".join(
        [
            f"{first}; {alone['blocks']} blocks of {alone['page']} tokens ({alone['pool_bytes'] / 2**20:.1f} MiB); "
            f"{alone['device']}, {alone['threads']} thread, torch {alone['versions']['torch']}, transformers "
            f"{alone['versions']['transformers']}, float32, {alone['date']}.",
            table(head, lines),
        ]
    )


@app.command("table")
def show(rows: Annotated[Path, typer.Option(help="JSON file of rows.")] = RESULTS) -> None:
    """Prints the tables."""
    for requests in ("traces", "short prompts"):
        print(markdown(load_rows(rows), requests), end="\n\n")


if __name__ == "__main__":
    app()
