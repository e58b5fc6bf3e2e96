"""What compression costs the bundled model: final-answer accuracy by score and retention, prompt pinned.

    python benchmarks/retention.py

The same problems for every row (greedy, disjoint from training). A model of under a million parameters shows whether
a method keeps what the model needs; it is no evidence about large ones.
"""

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from provenance import update_rows, wilson
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from kara_hf import KaraCache
from kara_hf.evaluation.measure.provenance import digest, provenance
from kara_hf.tasks.reasoner import Problem, make_problem

ASSETS = Path(__file__).parents[1] / "src" / "kara_hf" / "assets" / "tiny_reasoner"
SCORES = ("bidirectional", "bidirectional, top-k", "causal", "random-chunks", "random", "recency")


def markdown(rows: list[dict[str, Any]], weights: str) -> str:
    """A table of right answers by method, for the rows measured on these weights."""
    rows = [row for row in rows if row["weights"] == weights]
    if not rows:
        return "Not measured on these weights."
    columns = sorted({(row["task"], row["generated"], row["retention"]) for row in rows if row["retention"] < 1})
    columns.sort(key=lambda column: (column[0] != "trace", column[1], -column[2]))
    names = {"bidirectional": "**Kara** (bidirectional, Token2Chunk)", "bidirectional, top-k": "bidirectional, top-k"}
    lines = [
        "| what is kept of each window | " + " | ".join(f"{task}, {kept:.0%}" for task, _, kept in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for method in ("full cache", *SCORES):
        cells = []
        for task, generated, kept in columns:
            share = 1.0 if method == "full cache" else kept
            key = (task, generated, method, share)
            row = next(r for r in rows if (r["task"], r["generated"], r["method"], r["retention"]) == key)
            cells.append(f"{row['accuracy']:.1%} ({row['low']:.0%} to {row['high']:.0%})")
        lines.append(f"| {names.get(method, method)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@torch.inference_mode()
def run(
    model: Any, tokenizer: Any, problems: list[Problem], batch: int, settings: dict[str, Any] | None
) -> dict[str, Any]:
    """Accuracy and bytes of one method; `settings` None is the full cache."""
    right = tokens = 0
    bytes_kept = bytes_full = 0
    start = time.perf_counter()
    for first in range(0, len(problems), batch):
        part = problems[first : first + batch]
        inputs = tokenizer([problem.prompt for problem in part], return_tensors="pt", padding=True)
        cache = DynamicCache(config=model.config) if settings is None else KaraCache(model, **settings)
        room = max(len(problem.completion.split()) for problem in part) + 16
        out = model.generate(**inputs, max_new_tokens=room, do_sample=False, past_key_values=cache)
        new = out[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new)
        right += sum(problem.grade(text) for problem, text in zip(part, texts, strict=True))
        tokens += int((new != tokenizer.pad_token_id).sum())
        if isinstance(cache, KaraCache):
            report = cache.report()
            bytes_kept, bytes_full = bytes_kept + report.resident_bytes, bytes_full + report.full_bytes
    low, high = wilson(right, len(problems))
    return {
        "n": len(problems),
        "accuracy": right / len(problems),
        "low": low,
        "high": high,
        "resident_share": bytes_kept / bytes_full if bytes_full else 1.0,
        "mean_generated": tokens / len(problems),
        "seconds": time.perf_counter() - start,
    }


def main(
    model: Annotated[Path, typer.Option(help="model folder")] = ASSETS,
    n: Annotated[int, typer.Option(help="problems per row")] = 200,
    generated: Annotated[int, typer.Option(help="tokens of the trace")] = 300,
    task: Annotated[str, typer.Option(help="task")] = "trace",
    window: Annotated[int, typer.Option()] = 64,
    recent: Annotated[int, typer.Option()] = 32,
    batch: Annotated[int, typer.Option(help="sequences generated together")] = 50,
    first_seed: Annotated[int, typer.Option(help="seed of the first problem")] = 10_000,
    out: Annotated[Path, typer.Option(help="JSON file of rows")] = Path(__file__).parent / "results" / "retention.json",
) -> None:
    """Measures every score at 50 and 25 % beside the full cache, prints the table and writes the rows."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    problems = [make_problem(task, seed=first_seed + i, generated=generated) for i in range(n)]
    methods: list[tuple[str, float, dict[str, Any] | None]] = [("full cache", 1.0, None)]
    for retention in (0.5, 0.25):
        for name in SCORES:
            score, _, top = name.partition(", ")
            settings = {"score": score, "retention": retention, "window": window, "recent": recent}
            methods.append((name, retention, settings | ({"anchor_share": 1.0} if top else {})))
    rows = []
    with Progress() as progress:
        for name, retention, settings in progress.track(methods, description="methods"):
            result = run(network, tokenizer, problems, batch, settings)
            rows.append({"task": task, "generated": generated, "method": name, "retention": retention} | result)
    origin = {
        **provenance("cpu"),
        "weights": digest(model),
        "window": window,
        "recent": recent,
        "first_seed": first_seed,
    }
    update_rows(out, [row | origin for row in rows], ("task", "generated", "method", "retention", "window"))
    table = Table("method", "kept of each window", "accuracy (95 %)", "resident bytes")
    for row in rows:
        share = f"{row['accuracy']:.1%} ({row['low']:.1%} to {row['high']:.1%})"
        table.add_row(row["method"], f"{row['retention']:.0%}", share, f"{row['resident_share']:.0%}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
