r"""What PoD costs and saves on a small model of twelve layers: before and after it was adapted, beside other ways.

    python benchmarks/pod.py explore
    python benchmarks/pod.py adapt --map 35 --weights lora      # and the other maps, and full
    python benchmarks/pod.py adapt --map 35-near --weights lora --steps 480 --distill 0.5 --name 35-near-longer
    python benchmarks/pod.py measure
    python benchmarks/pod.py speed

`explore` compares the attention of all pairs of layers on training problems and groups them for 25 % and 35 % fewer
bytes at 512 tokens, of which an eighth is proximal as in the paper (4,096 of 32,768); a third map reaches 35 % with
half as many proximal tokens and fewer followers. `adapt` trains with shared keys. `measure` answers test problems
greedily with every method; a row that the file holds is not measured again. A model of two million parameters is no
evidence about large ones. `speed` takes paired decode steps of a random-weight Llama with shared keys and without, in
caches that are otherwise the same.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import typer
from kv_compress_tables import FULL, compare, table
from provenance import digest, load_rows, provenance, update_rows, wilson
from rich.progress import Progress
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    QuantizedCache,
)
from transformers import StoppingCriteriaList as Criteria

from kara_hf import KaraCache, KVCompressCache, PoDCache, PoDSharing
from kara_hf.evaluation.measure.memory import MemoryWatch
from kara_hf.pod.adapt import AdaptConfig
from kara_hf.pod.adapt import adapt as adapt_model
from kara_hf.pod.explore import explore as explore_model
from kara_hf.pod.forward import SharedForward
from kara_hf.pod.plot import plot
from kara_hf.tasks.reasoner import Problem, make_problem

ROOT = Path(__file__).parent
MODEL = ROOT.parent / "src" / "kara_hf" / "assets" / "deep_reasoner"
FOLDER = ROOT / "results" / "pod"
RESULTS = ROOT / "results" / "pod.json"
ADAPTED = ROOT.parent / "runs" / "pod"

TOKENS, SINKS = 512, 4
MAPS: dict[str, dict[str, Any]] = {
    "25": {"saving": 0.25, "recent": 60},
    "35": {"saving": 0.35, "recent": 60},
    "35-near": {"saving": 0.35, "recent": 28, "compare": "all"},
}
# Adapted models with more training, by the name given to `adapt`: their map, and what they are called.
LONGER = {"35-near-longer": ("35-near", "PoD 35-near, lora, three times as long, distilled")}
MIX = {"trace": 0.5, "fact": 0.2, "recall": 0.2, "copy": 0.1}
LENGTHS = (192, 704)
CASES = {"trace": {"generated": 300}, "fact": {"generated": 300}, "recall": {"length": TOKENS}}
KEY = ("method", "task", "weights")

app = typer.Typer(help=__doc__, add_completion=False)


def load(folder: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def sample(tokenizer: Any, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids ``[S]`` of a problem with its solution, and labels, which leave the prompt out."""
    prompt, completion = (tokenizer(text)["input_ids"] for text in (problem.prompt, problem.completion))
    ids = torch.tensor([*prompt, *completion, tokenizer.eos_token_id])
    labels = ids.clone()
    labels[: len(prompt)] = -100
    return ids, labels


def training(tokenizer: Any, batch: int, seed: int) -> Callable[[int], Iterator[tuple[torch.Tensor, torch.Tensor]]]:
    """Training problems from the n-th on; those of a batch are about equally long."""

    def start(skip: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        number = skip
        while True:
            longest = Random(f"{seed}/{number // batch}").randint(*LENGTHS)
            draw = Random(f"{seed}/{number // batch}/{number % batch}")
            task = draw.choices(list(MIX), list(MIX.values()))[0]
            length = round(longest * draw.uniform(0.85, 1))
            yield sample(tokenizer, make_problem(task, length=length, seed=(seed << 40) + number, split="train"))
            number += 1

    return start


# ------------------------------------------------------------------------------------------------- exploring, adapting
@app.command()
def explore(
    model: Annotated[Path, typer.Option(help="Model folder.")] = MODEL,
    samples: Annotated[int, typer.Option(help="Training problems whose attention is compared.")] = 48,
    out: Annotated[Path, typer.Option(help="Folder for the similarity, the sharing maps and the heat maps.")] = FOLDER,
) -> None:
    """Measures how alike layers attend, and groups them."""
    network, tokenizer = load(model)
    tasks = list(MIX)
    ids = [
        sample(tokenizer, make_problem(tasks[i % len(tasks)], length=TOKENS, seed=i, split="train"))[0]
        for i in range(samples)
    ]
    similarity = explore_model(network, ids, queries=64, sinks=SINKS, recent=MAPS["25"]["recent"])
    similarity.save(out)
    for name, settings in MAPS.items():
        sharing = similarity.group_for(tokens=TOKENS, **settings)
        sharing.save_pretrained(out / name)
        plot(similarity, sharing, out / name / "similarity.png")
        print(name, sharing.origin, f"followers {sharing.followers_share:.3f}", sharing.lead)


@app.command()
def adapt(
    sharing: Annotated[str, typer.Option("--map", help=f"Which map: {', '.join(MAPS)}.")],
    weights: Annotated[str, typer.Option(help="lora or full.")] = "lora",
    model: Annotated[Path, typer.Option(help="Model folder.")] = MODEL,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 160,
    batch: Annotated[int, typer.Option(help="Problems a step.")] = 6,
    precision: Annotated[Literal["no", "bf16"], typer.Option(help="Of autocast.")] = "bf16",
    rank: Annotated[int, typer.Option(help="Of LoRA.")] = 32,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate [default: 2e-3 LoRA, 1e-3 full].")] = None,
    distill: Annotated[float, typer.Option(help="Share of distillation in the loss.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the problems and of LoRA.")] = 11,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    maps: Annotated[Path, typer.Option(help="Folder of the sharing maps.")] = FOLDER,
    name: Annotated[str | None, typer.Option(help="Of the adapted model [default: map and weights].")] = None,
    out: Annotated[Path, typer.Option(help="Folder of adapted models.")] = ADAPTED,
) -> None:
    """Teaches the model to share keys."""
    network, tokenizer = load(model)
    config = AdaptConfig(
        length=LENGTHS[1],
        steps=steps,
        batch=batch,
        rank=rank if weights == "lora" else 0,
        alpha=2 * rank,
        targets="all-linear" if weights == "lora" else None,
        lr=lr or {"lora": 2e-3, "full": 1e-3}[weights],
        distill=distill,
        precision=precision,
        seed=seed,
        save_every=40,
        held_out=0,
    )
    held_out = [
        sample(tokenizer, make_problem(task, length=TOKENS, seed=10_000 + i, split="train"))
        for i in range(16)
        for task in ("trace", "recall")
    ]
    result = adapt_model(
        network,
        PoDSharing.from_pretrained(maps / sharing),
        training(tokenizer, batch, seed),
        config,
        out / (name or f"{sharing}-{weights}"),
        tokenizer=tokenizer,
        held_out=held_out,
        resume=resume,
    )
    print(result.held_out)


# ------------------------------------------------------------------------------------------------------------ measuring
@dataclass(frozen=True)
class Way:
    """One way to spend memory.

    Attributes:
        make: a cache for a model.
        adapted: which adapted model answers, as a folder of `ADAPTED`; None: the base model.
        sharing: which map; None: no keys are shared.
    """

    make: Callable[[Any, PoDSharing | None], Any]
    adapted: str | None = None
    sharing: str | None = None


def pod(prefill: Literal["dense", "pod"]) -> Callable[[Any, PoDSharing | None], Any]:
    def make(model: Any, sharing: PoDSharing | None) -> Any:
        assert sharing is not None
        return PoDCache(model, replace(sharing, prefill=prefill))

    return make


def kept(share: float, **settings: Any) -> Callable[[Any, PoDSharing | None], Any]:
    """Eviction down to a share of all tokens, in the settings of the other comparisons on tiny models."""
    fixed = {"block_size": 4, "protected": 8, "sinks": 4, "observation": 8}
    return lambda model, _: KVCompressCache(model, retention=share, **fixed | settings)


def ways() -> dict[str, Way]:
    found = {FULL: Way(lambda model, _: DynamicCache(config=model.config))}
    for name in MAPS:
        found[f"PoD {name}, not adapted, dense prompt"] = Way(pod("dense"), sharing=name)
        found[f"PoD {name}, not adapted"] = Way(pod("pod"), sharing=name)
        for weights in ("lora", "full"):
            found[f"PoD {name}, {weights}"] = Way(pod("pod"), adapted=f"{name}-{weights}", sharing=name)
    for name, (sharing, title) in LONGER.items():
        found[title] = Way(pod("pod"), adapted=name, sharing=sharing)
    for percent in sorted({round(100 * settings["saving"]) for settings in MAPS.values()}):
        share = 1 - percent / 100
        found[f"KV-Compress {percent}"] = Way(kept(share))
        found[f"uniform heads {percent}"] = Way(kept(share, levels=1))
        found[f"recency {percent}"] = Way(kept(share, metric="recency"))
        found[f"random {percent}"] = Way(kept(share, metric="random"))
        windows = {"retention": share, "window": 64, "recent": 32, "block_size": 4, "compress_prompt": True}
        found[f"Kara {percent}"] = Way(lambda model, _, windows=windows: KaraCache(model, **windows))
        found[f"key norms {percent}"] = Way(
            lambda model, _, windows=windows: KaraCache(model, score="key-norm", anchor_share=1.0, **windows)
        )
    for bits in (4, 2):
        found[f"quantized, {bits} bits"] = Way(
            lambda model, _, bits=bits: QuantizedCache(
                "quanto", model.config, nbits=bits, q_group_size=32, residual_length=64
            )
        )
    return found


@torch.inference_mode()
def solve(model: Any, tokenizer: Any, problems: list[Problem], cache: Any) -> tuple[list[str], int]:
    """Greedy completions of one left-padded batch, and the most bytes held while decoding."""
    inputs = tokenizer([problem.prompt for problem in problems], return_tensors="pt", padding=True)
    memory = MemoryWatch(cache)
    out = model.generate(
        **inputs,
        past_key_values=cache,
        max_new_tokens=max(len(problem.completion.split()) for problem in problems) + 16,
        do_sample=False,
        stopping_criteria=Criteria([memory]),
    )
    return tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :]), memory.most


@torch.inference_mode()
def loss_of(model: Any, tokenizer: Any, problems: list[Problem], sharing: PoDSharing | None) -> float:
    """Mean negative log-likelihood (nats) of a word of the reference completions, in forwards over whole problems."""
    shared = None if sharing is None else SharedForward(model, sharing)
    total, words = 0.0, 0
    try:
        for problem in problems:
            ids, labels = sample(tokenizer, problem)
            logits = model(ids[None], use_cache=False).logits[0, :-1]
            scored = labels[1:] >= 0
            total += float(F.cross_entropy(logits[scored], labels[1:][scored], reduction="sum"))
            words += int(scored.sum())
    finally:
        if shared is not None:
            shared.close()
    return total / words


def adapted_model(folder: Path, base: Path) -> Any:
    if (folder / "adapter_config.json").exists():
        from peft import PeftModel

        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return PeftModel.from_pretrained(model, folder).merge_and_unload().eval()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@app.command()
def measure(
    model: Annotated[Path, typer.Option(help="Model folder.")] = MODEL,
    n: Annotated[int, typer.Option(help="Problems of each kind.")] = 200,
    batch: Annotated[int, typer.Option(help="Sequences generated together.")] = 50,
    first_seed: Annotated[int, typer.Option(help="Seed of the first problem.")] = 30_000,
    only: Annotated[str | None, typer.Option(help="Only methods with this in their name.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure what is in the file too.")] = False,
    maps: Annotated[Path, typer.Option(help="Folder of the sharing maps.")] = FOLDER,
    adapted: Annotated[Path, typer.Option(help="Folder of adapted models.")] = ADAPTED,
    out: Annotated[Path, typer.Option(help="JSON file of rows.")] = RESULTS,
) -> None:
    """Answers test problems with every method, and writes each row as it comes."""
    base, tokenizer = load(model)
    origin, weights = provenance("cpu"), digest(model)
    stored = [] if again else load_rows(out)
    wanted = {name: way for name, way in ways().items() if only is None or only in name}
    with Progress() as progress:
        for name, way in progress.track(wanted.items(), description="methods"):
            folder = None if way.adapted is None else adapted / way.adapted
            if folder is not None and not (folder / "pod_adapt.json").exists():
                progress.console.print(f"{name}: there is no adapted model in {folder}; run `adapt` first")
                continue
            for task, size in CASES.items():
                row = {"method": name, "task": task, **size, "n": n, "first_seed": first_seed, "weights": weights}
                if any(row.items() <= old.items() for old in stored):
                    continue
                network = base if folder is None else adapted_model(folder, model)
                sharing = None if way.sharing is None else PoDSharing.from_pretrained(maps / way.sharing)
                problems = [make_problem(task, seed=first_seed + i, **size) for i in range(n)]
                texts, held = [], 0
                for begin in range(0, n, batch):
                    part = problems[begin : begin + batch]
                    new, most = solve(network, tokenizer, part, way.make(network, sharing))
                    texts, held = texts + new, held + most
                config = network.config
                token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
                words = [
                    f"{p.prompt} {text}".replace("<pad>", "").split() for p, text in zip(problems, texts, strict=True)
                ]
                full = token * sum(map(len, words))
                right = [problem.grade(text) for problem, text in zip(problems, texts, strict=True)]
                low, high = wilson(sum(right), n)
                unmodified = way.sharing is None and folder is None and name != FULL
                row |= {
                    "accuracy": sum(right) / n,
                    "low": low,
                    "high": high,
                    "scores": " ".join(str(int(value)) for value in right),
                    "loss": None if unmodified else loss_of(network, tokenizer, problems[:50], sharing),
                    "resident_bytes": held // n,
                    "full_bytes": full // n,
                    "truncated": sum("<eos>" not in text.split() for text in texts) / n,
                }
                update_rows(out, [row | origin], KEY)
                perplexity = "" if row["loss"] is None else f" perplexity {math.exp(row['loss']):.3f}"
                progress.console.print(f"{name:40s} {task:7s} {100 * row['accuracy']:5.1f} % of {n}{perplexity}")


# ---------------------------------------------------------------------------------------------------------------- speed
def random_llama(layers: int = 8, heads: int = 4) -> Any:
    """8 layers, 8 query and 4 KV heads of size 64, hidden size 512."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=heads,
        head_dim=64,
        max_position_embeddings=65536,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def maps_of(layers: int, heads: int, tokens: int) -> dict[str, PoDSharing]:
    """Sharing maps of a model, an eighth of whose `tokens` is proximal."""
    near: dict[str, Any] = {"sinks": SINKS, "recent": tokens // 8 - SINKS}
    pairs = tuple((layer // 2 * 2,) * heads for layer in range(layers))
    fours = tuple((layer // 4 * 4,) * heads for layer in range(layers))
    mixed = tuple(
        tuple(layer // 2 * 2 if head % 2 else (layer + 1) // 2 * 2 - (layer > 0) for head in range(heads))
        for layer in range(layers)
    )
    return {
        "none": PoDSharing.none(layers, heads, **near),
        "layers in pairs": PoDSharing(lead=pairs, **near),
        "layers in fours": PoDSharing(lead=fours, **near),
        "pairs that differ by head": PoDSharing(lead=mixed, **near),
        "layers in fours, own queries": PoDSharing(lead=fours, distant_query="own", **near),
    }


@app.command()
def speed(
    seen: Annotated[str, typer.Option(help="Lengths of the prompt, separated by commas.")] = "512,2048,8192",
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    steps: Annotated[int, typer.Option(help="Paired decode steps.")] = 40,
    out: Annotated[Path, typer.Option(help="JSON file of rows.")] = ROOT / "results" / "pod_speed.json",
) -> None:
    """Times decode steps: all caches take turns, so that a busy machine slows all of them."""
    model = random_llama()
    layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    for tokens in map(int, seen.split(",")):
        ids = torch.randint(0, model.config.vocab_size, (batch, tokens))
        caches = {name: PoDCache(model, sharing) for name, sharing in maps_of(layers, heads, tokens).items()}
        times: dict[str, list[float]] = {name: [] for name in caches}
        with torch.inference_mode():
            for cache in caches.values():
                model(ids, past_key_values=cache, logits_to_keep=1)
            for _ in range(steps):
                for name, cache in caches.items():
                    start = time.perf_counter()
                    model(ids[:, :1], past_key_values=cache)
                    times[name].append(time.perf_counter() - start)
        for name, cache in caches.items():
            report = cache.report()
            ratios = [mine / plain for mine, plain in zip(times[name], times["none"], strict=True)]
            row = {
                "sharing": name,
                "seen": tokens,
                "batch": batch,
                "steps": steps,
                "ms": 1000 * statistics.median(times[name]),
                "ratio": statistics.median(ratios),
                "resident_bytes": report.resident_bytes,
                "full_bytes": report.full_bytes,
            }
            update_rows(out, [row | provenance("cpu")], ("sharing", "seen", "batch"))
            print(f"{tokens:6d} {name:30s} {row['ms']:7.2f} ms {row['ratio']:.3f}")


# --------------------------------------------------------------------------------------------------------------- tables
def speed_markdown(rows: list[dict[str, Any]]) -> str:
    """Step times with shared keys against the same cache without."""
    if not rows:
        return "Not measured."
    first = rows[0]
    lengths = sorted({row["seen"] for row in rows})
    lines = []
    for name in dict.fromkeys(row["sharing"] for row in rows):
        found = {row["seen"]: row for row in rows if row["sharing"] == name}
        cells = [f"{found[n]['ms']:.2f} ms ({found[n]['ratio']:.2f})" if n in found else "" for n in lengths]
        shares = [found[n]["resident_bytes"] / found[n]["full_bytes"] for n in lengths if n in found]
        lines.append([name, *cells, f"{100 * min(shares):.0f} to {100 * max(shares):.0f} %"])
    return "\n\n".join(
        [
            f"Batch {first['batch']}, {first['steps']} paired steps, medians, in brackets the ratio to no sharing; "
            f"{first['device']}, {first['threads']} thread, torch {first['versions']['torch']}, transformers "
            f"{first['versions']['transformers']}, float32, {first['date']}.",
            table(["sharing", *(f"{n:,} tokens" for n in lengths), "resident / full bytes"], lines),
        ]
    )


def markdown(rows: list[dict[str, Any]], weights: str) -> str:
    """What every method answered right, with its difference to the full cache on the same problems."""
    rows = [row for row in rows if row["weights"] == weights]
    full = {row["task"]: row for row in rows if row["method"] == FULL}
    if set(full) != set(CASES):
        return "Not measured on these weights."
    lines = []
    for name in dict.fromkeys(row["method"] for row in rows):
        cells, held = [], []
        for task in CASES:
            row = next((row for row in rows if (row["method"], row["task"]) == (name, task)), None)
            if row is None:
                cells += ["", ""]
                continue
            mean, low, high, *_ = compare(row, full[task])
            mark = "**" if low > 0 or high < 0 else ""
            versus = "" if name == FULL else f", {mark}{100 * mean:+.1f}{mark} ({100 * low:+.1f} to {100 * high:+.1f})"
            cells.append(f"{100 * row['accuracy']:.1f} %{versus}")
            cells.append("" if row["loss"] is None else f"{math.exp(row['loss']):.3f}")
            held.append(row["resident_bytes"] / row["full_bytes"])
        lines.append([name, f"{100 * min(held):.0f} to {100 * max(held):.0f} %", *cells])
    head = ["method", "resident / full bytes", *(text for task in CASES for text in (task, "perplexity"))]
    first = full["trace"]
    devices = " and ".join(dict.fromkeys(row["device"] for row in rows))
    dates = sorted({row["date"] for row in rows})
    return "\n\n".join(
        [
            f"{first['n']} problems of each kind; {devices}, {first['threads']} thread, torch "
            f"{first['versions']['torch']}, transformers {first['versions']['transformers']}, float32, "
            f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}. "
            "Right final answers; difference to the full cache of the base model in points (95 % interval, paired "
            "bootstrap; bold where it leaves out 0). Perplexity of a word of the reference solution.",
            table(head, lines),
        ]
    )


if __name__ == "__main__":
    app()
