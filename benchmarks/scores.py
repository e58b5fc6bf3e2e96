"""Scores that were tried for the windows of Kara, at equal tokens, on the bundled model: what helps and what does not.

    python benchmarks/scores.py

Each is a few lines under `register_score` and runs in the frame of `kara-hf evaluate --equal tokens`; those that the
package keeps are measured in docs/evidence.md at equal bytes. With 64 problems these are leads and no evidence.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from kv_compress_tables import table
from rich.progress import Progress
from transformers import AutoModelForCausalLM, AutoTokenizer

from kara_hf.bundled import BUNDLED_MODEL
from kara_hf.evaluation.measure.evaluator import Evaluator
from kara_hf.evaluation.measure.provenance import digest
from kara_hf.evaluation.measure.request import Request
from kara_hf.evaluation.measure.results import load, save_packed
from kara_hf.evaluation.report.statistics import summarise
from kara_hf.methods.registry import METHODS, Method, SharedSettings, windows
from kara_hf.policy import Window, register_score
from kara_hf.tasks import reasoner_tasks as _tasks  # noqa: F401  registers the tasks of the bundled model
from kara_hf.tasks.task import make_task

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "scores.json.gz"
TASKS = ("trace:generated=300", "fact:generated=300")
BUDGETS = (0.25, 0.125)
ABOUT: dict[str, str] = {}

Rank = Callable[[Window], torch.Tensor]


def candidate(name: str, about: str, queries: bool = True) -> Callable[[Rank], Rank]:
    ABOUT[name] = about
    return register_score(name, queries=queries)


def logits(window: Window, later: bool = True) -> torch.Tensor:
    """From the queries of the window, and of the recent tokens behind it: ``[b, H, G, n, W]``."""
    assert window.queries is not None and window.later is not None
    queries = torch.cat([window.queries, window.later], 2) if later else window.queries
    grouped = queries.unflatten(1, (window.rows, -1))
    return grouped @ window.keys[:, :, None].transpose(-1, -2) * window.scaling


def causal(values: torch.Tensor, fill: float) -> torch.Tensor:
    """`values` where a query is not before its key, `fill` elsewhere."""
    before = torch.ones(values.shape[-2:], dtype=torch.bool).triu(1)
    return values.masked_fill(before, fill)


def ranks(scores: torch.Tensor) -> torch.Tensor:
    return scores.argsort(-1).argsort(-1).float()


@candidate("with recent queries", "bidirectional attention in which the recent tokens' queries vote too")
def with_recent(window: Window) -> torch.Tensor:
    return logits(window).softmax(-1).mean((2, 3))


@candidate("coverage", "greedy: as much as possible of every query's strongest attention")
def coverage(window: Window) -> torch.Tensor:
    shares = logits(window).softmax(-1).flatten(2, 3)
    best = torch.zeros_like(shares[..., :1])
    order = torch.zeros(shares.shape[:2] + shares.shape[-1:])
    for place in range(window.keep):
        gain = (shares - best).clamp(min=0).sum(2).masked_fill(order > 0, -1)
        chosen = gain.argmax(-1, keepdim=True)
        order.scatter_(2, chosen, float(window.keep - place))
        best = torch.maximum(best, shares.gather(3, chosen[:, :, None].expand(-1, -1, shares.shape[2], -1)))
    return order


@candidate("peak logit", "the largest logit from any query of the window")
def peak(window: Window) -> torch.Tensor:
    return logits(window, later=False).amax((2, 3))


@candidate("peak logit, causal", "the largest logit from queries at or behind the key: a running maximum")
def peak_causal(window: Window) -> torch.Tensor:
    return causal(logits(window), float("-inf")).amax((2, 3))


@candidate("larger rank", "the larger of the ranks by peak logit and by bidirectional attention")
def larger_rank(window: Window) -> torch.Tensor:
    return torch.maximum(ranks(peak_causal(window)), ranks(window.attention()))


@candidate("mean square, window", "mean squared logits from the queries of the window and the recent ones alone")
def mean_square_window(window: Window) -> torch.Tensor:
    return logits(window).square().mean((2, 3))


@candidate("mean square, causal", "mean squared logits from queries at or behind the key: a running sum")
def mean_square_causal(window: Window) -> torch.Tensor:
    squares = causal(logits(window).square(), 0.0)
    votes = causal(torch.ones(squares.shape[-2:]), 0.0).sum(0)
    return squares.sum((2, 3)) / votes


@candidate("variance", "variance of logits over queries: what does not tell queries apart counts nothing")
def variance(window: Window) -> torch.Tensor:
    return logits(window).var(3).mean(2)


@candidate("expected", "log of the mean exponential, to second order: mean and half the variance of logits")
def expected(window: Window) -> torch.Tensor:
    found = logits(window)
    return (found.mean(3) + found.var(3) / 2).mean(2)


@candidate("rank of both", "the larger of the ranks by mean squared logits and by bidirectional attention")
def rank_of_both(window: Window) -> torch.Tensor:
    attention = ranks(with_recent(window))
    return torch.maximum(ranks(mean_square_window(window)), attention) + attention / 1000


BESIDE = ("full", "random", "oracle", "kara-top-k", "mean-square", "key-norm")


def markdown(path: Path = RESULTS) -> str:
    """Right answers by score, best first."""
    rows = summarise(load(path))
    columns = [(task, budget) for task in TASKS for budget in BUDGETS]
    found = {}
    for method, part in rows[rows["method"] != "full"].groupby("method"):
        by_cell = part.set_index(["task", "budget"])["score"]
        found[method] = [float(by_cell[column]) for column in columns]
    lines = [
        [ABOUT.get(name, f"`{name}`"), *(f"{100 * score:.0f} %" for score in scores)]
        for name, scores in sorted(found.items(), key=lambda item: -sum(item[1]))
    ]
    return table(["score", *(f"{task.partition(':')[0]}, {100 * budget:g} %" for task, budget in columns)], lines)


def main(
    n: Annotated[int, typer.Option(help="Problems of each task.")] = 64,
    batch: Annotated[int, typer.Option(help="Sequences generated together.")] = 64,
    work: Annotated[Path, typer.Option(help="Folder of the results as they come.")] = ROOT / "runs" / "scores",
    out: Annotated[Path, typer.Option(help="JSON file of packed results.")] = RESULTS,
) -> None:
    """Measures all of them, and prints a table."""
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL, padding_side="left")
    evaluator = Evaluator(
        model,
        tokenizer,
        name=BUNDLED_MODEL.name,
        weights=digest(BUNDLED_MODEL),
        limit=model.config.max_position_embeddings,
    )
    tried = [Method(name, windows(name), about) for name, about in ABOUT.items()]
    request = Request(
        methods=[*(METHODS[name] for name in BESIDE), *tried],
        budgets=BUDGETS,
        n=n,
        batch=batch,
        equal="tokens",
        shared=SharedSettings(window=64, recent=32, block_size=4),
        keep_text=False,
    )
    with Progress() as progress:
        bar = progress.add_task("", total=len(TASKS) * len(list(request.cells())))
        for task in TASKS:
            evaluator.measure(
                make_task(task, tokenizer),
                request,
                work,
                progress=lambda label, part: progress.update(bar, description=label, advance=part),
            )
    save_packed(load(work), out)
    print(markdown(out))


if __name__ == "__main__":
    typer.run(main)
