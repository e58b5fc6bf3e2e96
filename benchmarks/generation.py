"""How fast a compressed cache decodes, against Transformers' DynamicCache, on a random-weight Llama.

    python benchmarks/generation.py                        # CPU, one thread per core
    python benchmarks/generation.py --device cuda --dtype bfloat16

Three questions, each answered by paired steps in one process (both caches take turns, so that a busy machine slows
both):

- equal: both caches store the same tokens (retention 1). Ratio of the step times; 1 is as fast.
- compressed: both have seen the same tokens, ours stores a share of them. Ratio of tokens/s; larger is faster.
- compression: the share of decode time that sealing windows takes.

Rows with provenance are appended to a JSON file; a row measured again replaces the old one.
"""

import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from provenance import update_rows
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from kara_hf import KaraCache
from kara_hf.evaluation.measure.provenance import provenance

console = Console()


def random_llama(device: str, dtype: torch.dtype) -> Any:
    """4 layers, 8 query and 2 KV heads of size 64, hidden size 512."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=65536,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()


def step(model: Any, cache: Any, token: torch.Tensor, position: int) -> float:
    """Seconds of one decode step."""
    if token.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    positions = torch.full_like(token, position)
    model(input_ids=token, past_key_values=cache, use_cache=True, position_ids=positions)
    if token.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def measure(model: Any, *, batch: int, seen: int, steps: int, what: str, **settings: Any) -> dict[str, Any]:
    """Fills both caches with one prompt of `seen` tokens and then takes paired decode steps."""
    device = next(model.parameters()).device
    ids = torch.randint(0, model.config.vocab_size, (batch, seen), device=device)
    dense, kara = DynamicCache(config=model.config), KaraCache(model, **settings)
    for cache in (dense, kara):
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    windows = kara.sequences[0].windows
    token = ids[:, -1:]
    times: dict[str, list[float]] = {"dense": [], "kara": []}
    sealing: list[int] = []
    for number in track(range(steps), description=f"{what}: {batch} x {seen} seen", console=console, transient=True):
        pair = [("dense", dense), ("kara", kara)]
        for name, cache in pair if number % 2 else reversed(pair):
            times[name].append(step(model, cache, token, seen + number))
        if kara.sequences[0].windows > windows:
            windows = kara.sequences[0].windows
            sealing.append(number)
    warm = min(8, steps // 4)
    plain = [number for number in range(warm, steps) if number not in sealing]
    ratio = statistics.median(times["kara"][n] / times["dense"][n] for n in plain)
    usual = statistics.median(times["kara"][n] for n in plain)
    total = {name: sum(values[warm:]) for name, values in times.items()}
    compression = sum(times["kara"][number] - usual for number in sealing if number >= warm)
    report = kara.report()
    count = steps - warm
    return {
        "what": what,
        "batch": batch,
        "seen": seen + steps,
        "settings": settings,
        "steps": count,
        "step_time_ratio": ratio,
        "dense_step_ms": 1e3 * statistics.median(times["dense"][n] for n in plain),
        "kara_step_ms": 1e3 * usual,
        "dense_tokens_per_s": batch * count / total["dense"],
        "kara_tokens_per_s": batch * count / total["kara"],
        "speedup": total["dense"] / total["kara"],
        "windows_sealed": len(sealing),
        "compression_share": compression / total["kara"],
        "worst_step_ms": 1e3 * max(times["kara"][warm:]),
        "kept": int(report.kept.max()),
        "full_bytes": report.full_bytes,
        "resident_bytes": report.resident_bytes,
        "peak_bytes": report.peak_bytes,
        "dense_bytes": sum(layer.keys.nbytes + layer.values.nbytes for layer in dense.layers),
    }


def markdown(rows: list[dict[str, Any]], device: str = "cpu") -> str:
    """The rows of one kind of device as a table."""
    lines = [
        "| case | tokens seen | kept per head | DynamicCache ms per step | KaraCache ms per step | step time, "
        "paired | tokens/s | sealing, share of time | resident / full bytes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["device"] == device:
            lines.append(
                f"| {row['what']} | {row['seen']:,} | {row['kept']:,} | {row['dense_step_ms']:.2f} | "
                f"{row['kara_step_ms']:.2f} | {row['step_time_ratio']:.2f} | {row['speedup']:.2f}x | "
                f"{row['compression_share']:.1%} | {row['resident_bytes'] / row['full_bytes']:.1%} |"
            )
    return "\n".join(lines)


def main(
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    batch: Annotated[int, typer.Option(help="sequences")] = 4,
    seen: Annotated[int, typer.Option(help="tokens seen before the timed steps of the long case")] = 8192,
    out: Annotated[Path, typer.Option(help="JSON file of rows")] = Path(__file__).parent
    / "results"
    / "generation.json",
    smoke: Annotated[bool, typer.Option(help="a few short steps, nothing written")] = False,
) -> None:
    """Measures and prints the table; writes the rows."""
    model = random_llama(device, getattr(torch, dtype))
    cases: list[dict[str, Any]] = [
        {"what": "equal", "seen": 512, "steps": 200, "retention": 1.0},
        {"what": "equal", "seen": seen // 4, "steps": 200, "retention": 1.0},
        {"what": "equal", "seen": seen, "steps": 60, "retention": 1.0},
        {"what": "compressed", "seen": seen, "steps": 420, "retention": 0.25, "compress_prompt": True},
        {"what": "compressed", "seen": seen // 4, "steps": 420, "retention": 0.25, "compress_prompt": True},
    ]
    if smoke:
        cases = [dict(case, seen=96, steps=40, window=32, recent=8) for case in cases]
    rows = [measure(model, batch=batch, **case) for case in cases]
    table = Table(
        "case", "seen", "kept", "step ms, dense", "step ms, kara", "ratio", "speed-up", "compression", "bytes"
    )
    for row in rows:
        table.add_row(
            row["what"],
            f"{row['seen']:,}",
            f"{row['kept']:,}",
            f"{row['dense_step_ms']:.2f}",
            f"{row['kara_step_ms']:.2f}",
            f"{row['step_time_ratio']:.2f}",
            f"{row['speedup']:.2f}x",
            f"{row['compression_share']:.1%}",
            f"{row['resident_bytes'] / row['full_bytes']:.1%}",
        )
    console.print(table)
    if not smoke:
        origin = provenance(device)
        kind = {"device": device.partition(":")[0], "dtype": dtype}
        rows = [row | kind | {"provenance": origin} for row in rows]
        update_rows(out, rows, ("what", "batch", "seen", "device", "dtype"))
        console.print(f"written to {out}")


if __name__ == "__main__":
    typer.run(main)
