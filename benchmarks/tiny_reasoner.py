"""Measure a tiny reasoner on test problems with the full DynamicCache, and write its model card from the rows.

    python benchmarks/tiny_reasoner.py --model src/kara_hf/assets/tiny_reasoner --card

Every row of the result file is one (task, size) with its provenance; a row measured again replaces the old one.
`--card` writes README.md into the model folder from the rows that belong to its weights, `--no-measure --card` only
renders.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from provenance import load_rows, update_rows, wilson
from retention import markdown
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from kara_hf.evaluation.measure.provenance import digest, provenance
from kara_hf.tasks.reasoner import Problem, make_problem

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "tiny_reasoner.json"
CELLS = (
    *(("trace", "generated", size) for size in (64, 128, 300, 512, 768, 1000)),
    *(("fact", "generated", size) for size in (64, 128, 300, 512, 768, 1000)),
    *((task, "length", size) for task in ("recall", "survey", "copy") for size in (128, 256, 512, 1024)),
)


@dataclass(frozen=True)
class Score:
    """Greedy generation on `n` problems; shares are fractions of `n`."""

    n: int
    accuracy: float
    low: float
    high: float
    exact: float
    unfinished: float
    mean_prompt: float
    mean_generated: float
    seconds: float


@torch.inference_mode()
def generate(model: Any, tokenizer: Any, problems: list[Problem]) -> list[str]:
    """Return the greedy completion of each problem, from one left-padded batch on a DynamicCache."""
    inputs = tokenizer([problem.prompt for problem in problems], return_tensors="pt", padding=True).to(model.device)
    room = max(len(problem.completion.split()) for problem in problems) + 16
    output = model.generate(
        **inputs, max_new_tokens=room, do_sample=False, past_key_values=DynamicCache(config=model.config)
    )
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :])


def score(model: Any, tokenizer: Any, problems: list[Problem], batch_size: int) -> Score:
    """Generate for all problems and grade them."""
    start = time.perf_counter()
    texts: list[str] = []
    for at in range(0, len(problems), batch_size):
        texts += generate(model, tokenizer, problems[at : at + batch_size])
    n, pairs = len(problems), list(zip(problems, texts, strict=True))
    right = sum(problem.grade(text) for problem, text in pairs)
    low, high = wilson(right, n)
    return Score(
        n=n,
        accuracy=right / n,
        low=low,
        high=high,
        exact=sum(problem.exact(text) for problem, text in pairs) / n,
        unfinished=sum("<eos>" not in text.split() for text in texts) / n,
        mean_prompt=sum(len(problem.prompt.split()) for problem in problems) / n,
        mean_generated=sum(len(text.replace("<pad>", "").split()) for text in texts) / n,
        seconds=time.perf_counter() - start,
    )


def render_card(rows: list[dict[str, Any]], folder: Path) -> str:
    """The model card of `folder`, with a table of the rows measured on its weights."""
    rows = [row for row in rows if row["weights"] == digest(folder)]
    rows.sort(key=lambda row: CELLS.index((row["task"], row["unit"], row["size"])))
    if not rows:
        raise ValueError(f"no rows measured on the weights in {folder}; run without --no-measure first")
    config = json.loads((folder / "config.json").read_text())
    table = [
        "| task | prompt | generated | problems | answers right (95 % interval) | completions exact |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        table.append(
            f"| {row['task']} | {row['mean_prompt']:.0f} | {row['mean_generated']:.0f} | {row['n']} | "
            f"{100 * row['accuracy']:.1f} % ({100 * row['low']:.1f} to {100 * row['high']:.1f}) | "
            f"{100 * row['exact']:.1f} % |"
        )
    recipe_path = folder / "recipe.txt"
    recipe = recipe_path.read_text().strip() if recipe_path.exists() else "python examples/train_tiny_reasoner.py"
    first = rows[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    return CARD.format(
        size=f"{(folder / 'model.safetensors').stat().st_size / 2**20:.1f}",
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        mlp=config["intermediate_size"],
        words=config["vocab_size"],
        theta=config["rope_parameters"]["rope_theta"],
        recipe=recipe,
        table="\n".join(table),
        needs=markdown(load_rows(RESULTS.parent / "retention.json"), digest(folder)),
        conditions=f"{first['device']}, {versions}, {first['dtype']}, {first['date']}",
    )


CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# Tiny reasoner

A small causal language model that really needs its KV cache, for trying cache compression on machines without a model
hub. It is **no evidence about large models**: it shows whether a method keeps what *this* model needs, nothing more.

`LlamaForCausalLM`, {layers} layers, hidden {hidden}, {heads} query and {kv_heads} key/value heads of {head_dim}
dimensions, MLP {mlp}, RoPE theta {theta:g}, {words} tokens (one word each), tied embeddings, {size} MiB in float32.

## Tasks

Problems come from `kara_hf.tasks.reasoner.make_problem`, pure functions of task, split, length and seed; whether a
prompt is a train or a test prompt is decided by its own hash, so the two never meet.

- `trace`: `zl : 8 ; xa : 4 ; qo : zl + xa ; ... ? qo xa >` is answered step by step, `zl : 8 = zl 8 ; ... qo : zl 8 +
  xa 4 = qo 2 ; ... ans qo 2 xa 4`. Sums are mod 10 and operands uniform over all earlier variables.
- `fact`: a trace whose two asked values are written once, in the first quarter of the sums, and never again before
  the answer.
- `recall`: up to 24 facts `k07 w20 w80 w91 ;` in a haystack, one to four of them asked for; `survey`: up to all.
them.
- `copy`: spans `[ k03 w05 f11 ... ]` of 8 to 16 words in a haystack, one of them asked for.

## Accuracy

Greedy decoding, full `DynamicCache`, left-padded batches, test split. *Answers right* is the share of right final
answers, *exact* the share of completions with every word right.

{table}

Measured on {conditions}.
Rows with full provenance are in `benchmarks/results/tiny_reasoner.json`.

## It needs its cache

Right final answers after 300 generated tokens, 200 problems, when only a share of every window of 64 generated tokens
stays in the cache (the prompt and the last 32 tokens always do), by `python benchmarks/retention.py [--task fact]`.

{needs}

## Recipe

From random initialisation, by `examples/train_tiny_reasoner.py`:

```
{recipe}
```

Fresh problems at every step, loss on completions only, one length a batch with random variation, bf16 autocast over
float32 weights, gradients clipped at 1.0; Muon on the hidden matrices, AdamW on embeddings and norms; warm-up over 50
steps, constant, linear cool-down. The longest length doubles whenever 90 % of the completion tokens are right, short
lengths stay in the mix.

## Limits

- It knows these tasks in these formats only, and no length beyond those it was trained on: there is no extrapolation.
- In long traces it loses lines, so completions stop being exact long before answers stop being right; judge a
  cache by the answers, paired with those of the full cache.
- Attention is very sharp and has no sink, so policies built on sinks or norms behave unlike on large models.
- Compressing the *prompt* of a trace fails for every policy that drops tokens, because every line is needed. Use
  `trace` and `fact` for compression while decoding with the prompt pinned, `recall` and `copy` for compression of the
  prompt.
- In `trace` values are restated at each use; `fact` is the task for values stated once.
"""


def main(
    model: Annotated[Path, typer.Option(help="Model folder.")],
    n: Annotated[int, typer.Option(help="Problems per row.")] = 200,
    batch_size: Annotated[int, typer.Option(help="Sequences generated together.")] = 50,
    first_seed: Annotated[int, typer.Option(help="Seed of the first problem of a row.")] = 0,
    only: Annotated[str | None, typer.Option(help="Rows to measure, as task:size,task:size; default all.")] = None,
    results: Annotated[Path, typer.Option(help="Result file.")] = RESULTS,
    device: Annotated[str, typer.Option(help="Torch device.")] = "cpu",
    measure: Annotated[bool, typer.Option(help="Measure, or only render.")] = True,
    card: Annotated[bool, typer.Option("--card", help="Write README.md into the model folder.")] = False,
) -> None:
    """Measure the rows asked for and update the result file."""
    wanted = only.split(",") if only else [f"{task}:{size}" for task, _, size in CELLS]
    cells = [cell for cell in CELLS if f"{cell[0]}:{cell[2]}" in wanted]
    if len(cells) != len(set(wanted)):
        raise ValueError(
            f"--only {only!r} names rows that do not exist; choose from {[f'{t}:{s}' for t, _, s in CELLS]}"
        )
    if measure:
        origin = {**provenance(device), "dtype": "float32", "weights": digest(model)}
        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(model)
        for task, unit, size in cells:
            problems = [make_problem(task, seed=first_seed + i, **{unit: size}) for i in range(n)]
            result = score(network, tokenizer, problems, batch_size)
            print(f"{task:7s}{unit:>10s} {size:5d}  {result}", flush=True)
            row = {"task": task, "unit": unit, "size": size, "split": "test", "first_seed": first_seed}
            update_rows(results, [{**row, **asdict(result), **origin}], key=("task", "unit", "size"))
    if card:
        (model / "README.md").write_text(render_card(load_rows(results), model))


if __name__ == "__main__":
    typer.run(main)
