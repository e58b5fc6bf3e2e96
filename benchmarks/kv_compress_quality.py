"""What KV-Compress keeps of what the bundled model needs, beside the same memory spent in other ways.

    python benchmarks/kv_compress_quality.py

All methods run in one skeleton: budget, blocks, sinks, protected tokens and passes are the same, and only what ranks
tokens, or whether heads may differ, changes (`METHODS`). All answer the same problems greedily, which are disjoint from
training. Every result goes into the file at once, and one that the file holds with the same settings and weights is not
measured again. A model of under a million parameters shows whether a method keeps what the model needs; it is no
evidence about large ones.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from kv_compress_tables import CHECK, CONTROL, FULL, OURS, UNEQUAL, markdown, summary
from provenance import load_rows, update_rows
from rich.progress import Progress
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, StoppingCriteriaList

from kara_hf import KVCompressCache, KVCompressConfig
from kara_hf.evaluation.measure.memory import MemoryWatch
from kara_hf.evaluation.measure.provenance import digest, provenance
from kara_hf.tasks.reasoner import Problem, final_answer, make_problem

ROOT = Path(__file__).parent
ASSETS = ROOT.parent / "src" / "kara_hf" / "assets" / "tiny_reasoner"
RESULTS = ROOT / "results" / "kv_compress_quality.json"

# SnapKV averages over the query heads of a group and these metrics sum, which ranks the tokens of a row alike. Its
# queries vote once, at the end of the prompt; "voting on" lets decoded tokens vote as they do in KV-Compress.
METHODS: dict[str, dict[str, Any]] = {
    CONTROL: {"levels": 1},
    OURS: {},
    "SnapKV": {"metric": "l1", "levels": 1, "accumulate": False},
    "SnapKV, voting on": {"metric": "l1", "levels": 1},
    "random": {"metric": "random"},
    CHECK: {"metric": "random", "levels": 1},
    "recency": {"metric": "recency"},
}
SETTINGS: dict[str, Any] = {"block_size": 4, "protected": 8, "sinks": 4, "observation": 8}
KEY = ("problems", "rule", "method", "nominal", "weights")


@dataclass(frozen=True)
class Case:
    """Problems of one kind, and how they are compressed.

    Attributes:
        task: a key of `kara_hf.evaluation.TASKS`.
        unit: whether `size` is the "length" of a problem in tokens, or how many are "generated".
        budgets: for every rule shares of all tokens of a problem. The rule "before" compresses a prompt that ends in
            the question, "after" one that the question follows; "pinned" evicts no token of the prompt, and its shares
            are of the generated tokens.
        keys: fewest and most keys that a question asks for, where that matters.
    """

    task: str
    unit: str
    size: int
    budgets: dict[str, tuple[float, ...]]
    keys: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        if self.keys is None:
            return self.task
        few, most = self.keys
        return f"{self.task}, {most} key" if few == most else f"{self.task}, {few} to {most} keys"

    def problems(self, n: int, first_seed: int) -> list[Problem]:
        """The first `n` of this kind, from seed `first_seed` on."""
        found: list[Problem] = []
        seeds = count(first_seed)
        while len(found) < n:
            problem = make_problem(self.task, seed=next(seeds), **{self.unit: self.size})
            if self.keys is None or self.keys[0] <= len(facts(problem.completion)) <= self.keys[1]:
                found.append(problem)
        return found


PROMPT = dict.fromkeys(("before", "after"), (0.5, 0.25, 0.125, 0.0625))
TRACE = {"before": (0.75, 0.5, 0.25), "pinned": (0.5, 0.25)}
CASES = (
    Case("recall", "length", 384, PROMPT, keys=(1, 1)),
    Case("recall", "length", 384, PROMPT, keys=(2, 4)),
    Case("survey", "length", 384, PROMPT, keys=(5, 8)),
    Case("copy", "length", 384, PROMPT),
    Case("trace", "generated", 200, TRACE),
    Case("fact", "generated", 200, TRACE),
)
SMOKE = tuple(
    replace(case, size={"length": 96, "generated": 48}[case.unit], budgets=dict.fromkeys(case.budgets, (0.25,)))
    for case in (CASES[1], CASES[2], CASES[5])
)


def facts(text: str) -> set[str]:
    """The facts of an answer to a recall or survey."""
    return {fact.strip() for fact in final_answer(text).split(";")} - {""}


def score(problem: Problem, text: str) -> float:
    """1 for a right answer, 0 for another; of a survey the share of the asked facts that the answer holds, because the
    model was trained on questions for up to four keys and answers longer ones in part."""
    if problem.task != "survey":
        return float(problem.grade(text))
    wanted = facts(problem.completion)
    return len(wanted & facts(text)) / len(wanted)


# ------------------------------------------------------------------------------------------------------------ measuring
def settings_of(problems: list[Problem], rule: str, method: str, share: float) -> dict[str, Any] | None:
    """Settings of the cache, its budget in whole blocks; None for the full cache."""
    if method == FULL:
        return None
    settings, size = SETTINGS | METHODS[method], SETTINGS["block_size"]
    prompts, completions = lengths(problems)
    if rule == "pinned":
        settings["sinks"] = max(prompts)
        tokens = max(prompts) + share * sum(completions) / len(problems)
    else:
        tokens = share * sum(prompts + completions) / len(problems)
    return settings | {"max_cache_tokens": round(tokens / size) * size}


def least_tokens(settings: dict[str, Any] | None) -> int:
    """The smallest budget there is with these settings."""
    return 0 if settings is None else settings["block_size"] * (KVCompressConfig(**settings).least_blocks + 1)


def lengths(problems: list[Problem]) -> tuple[list[int], list[int]]:
    """Tokens of all prompts and of all reference completions."""
    return [len(p.prompt.split()) for p in problems], [len(p.completion.split()) for p in problems]


@torch.inference_mode()
def solve(
    model: Any, tokenizer: Any, problems: list[Problem], rule: str, settings: dict[str, Any] | None
) -> tuple[list[str], int]:
    """Completions of one batch, and the most bytes held while decoding; `settings` None is the full cache."""
    cache = DynamicCache(config=model.config) if settings is None else KVCompressCache(model, **settings)
    if rule == "after":
        parts = [problem.prompt.rpartition(" ?") for problem in problems]
        context, question = (
            tokenizer(list(texts), return_tensors="pt", padding=True)
            for texts in zip(*((before, sign.strip() + rest) for before, sign, rest in parts), strict=True)
        )
        positions = (context["attention_mask"].cumsum(1) - 1).clamp(min=0)
        model(**context, position_ids=positions, past_key_values=cache, logits_to_keep=1)
        if isinstance(cache, KVCompressCache):
            cache.compress()
        inputs = {name: torch.cat([context[name], question[name]], dim=1) for name in ("input_ids", "attention_mask")}
    else:
        inputs = dict(tokenizer([problem.prompt for problem in problems], return_tensors="pt", padding=True))
    memory = MemoryWatch(cache)
    out = model.generate(
        **inputs,
        past_key_values=cache,
        max_new_tokens=max(len(problem.completion.split()) for problem in problems) + 16,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([memory]),
    )
    return tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :]), memory.most


def run(
    model: Any, tokenizer: Any, problems: list[Problem], rule: str, settings: dict[str, Any] | None, batch: int
) -> dict[str, Any]:
    """Scores, bytes and lengths of one method on one budget."""
    texts: list[str] = []
    held = 0
    for first in range(0, len(problems), batch):
        new, most = solve(model, tokenizer, problems[first : first + batch], rule, settings)
        texts, held = texts + new, held + most
    config, n = model.config, len(problems)
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    full = token * sum(map(sum, lengths(problems)))
    scores = [score(problem, text) for problem, text in zip(problems, texts, strict=True)]
    return {
        "max_cache_tokens": settings and settings["max_cache_tokens"],
        "score": sum(scores) / n,
        "scores": " ".join(f"{value:.3g}" for value in scores),
        "full_bytes": full // n,
        "resident_bytes": (full if settings is None else held) // n,
        "mean_generated": sum(len(text.replace("<pad>", "").split()) for text in texts) / n,
        "truncated": sum("<eos>" not in text.split() for text in texts) / n,
    }


def run_within(
    most: float, least: int, model: Any, tokenizer: Any, problems: list[Problem], rule: str, settings: Any, batch: int
) -> dict[str, Any]:
    """`run`, with a budget that is lowered, to `least` tokens at worst, until no more than `most` bytes are held."""
    while True:
        row = run(model, tokenizer, problems, rule, settings, batch)
        if settings is None or row["resident_bytes"] <= most or settings["max_cache_tokens"] == least:
            return row
        tokens = settings["max_cache_tokens"]
        fewer = min(tokens - 1, int(tokens * most / row["resident_bytes"]))
        settings = settings | {"max_cache_tokens": max(least, fewer)}


def cells(cases: tuple[Case, ...]) -> Iterator[tuple[Case, str, str, float]]:
    """Case, rule, method and share of all that is measured; random with uniform heads, a check, at one share alone."""
    for case in cases:
        yield case, "none", FULL, 1.0
        for rule, shares in case.budgets.items():
            for share in shares:
                for method in METHODS:
                    if method != CHECK or share == 0.25:
                        yield case, rule, method, share


def main(
    model: Annotated[Path, typer.Option(help="Model folder.")] = ASSETS,
    n: Annotated[int, typer.Option(help="Problems of each kind.")] = 200,
    batch: Annotated[int, typer.Option(help="Sequences generated together.")] = 50,
    first_seed: Annotated[int, typer.Option(help="Seed of the first problem.")] = 20_000,
    only: Annotated[str | None, typer.Option(help="Tasks to measure, separated by commas; default all.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure what is in the file too.")] = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Few and short problems, to try the benchmark itself.")
    ] = False,
    out: Annotated[Path, typer.Option(help="JSON file of rows; the tables go beside it.")] = RESULTS,
) -> None:
    """Measures what is missing in the file, writes every row as it comes, and the tables."""
    if smoke and out == RESULTS:
        raise ValueError("--smoke needs an --out of its own, so that it leaves measured rows alone")
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    weights, origin = digest(model), provenance("cpu")
    wanted = list(cells(tuple(c for c in (SMOKE if smoke else CASES) if only is None or c.task in only.split(","))))
    stored = [] if again else load_rows(out)
    sets: dict[str, list[Problem]] = {}
    allowed = math.inf
    with Progress() as progress:
        for case, rule, method, share in progress.track(wanted, description="cells"):
            if case.name not in sets:
                sets[case.name] = case.problems(n, first_seed)
            problems = sets[case.name]
            settings = settings_of(problems, rule, method, share)
            row = {"problems": case.name, "task": case.task, "size": case.size, "rule": rule, "method": method}
            row |= {"nominal": share, "n": n, "first_seed": first_seed, "batch": batch, "settings": settings}
            row |= {"weights": weights}
            done = next((old for old in stored if row.items() <= old.items()), None)
            if done is None:
                limits = (math.inf if method == CONTROL else allowed, least_tokens(settings))
                done = row | run_within(*limits, network, tokenizer, problems, rule, settings, batch) | origin
                update_rows(out, [done], KEY)
            if method == CONTROL:  # the first of its cell
                allowed = (1 + UNEQUAL) * done["resident_bytes"]
    rows = load_rows(out)
    text = f"# What KV-Compress keeps\n\n{summary(rows, weights)}\n\n{markdown(rows, weights)}\n"
    out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    typer.run(main)
