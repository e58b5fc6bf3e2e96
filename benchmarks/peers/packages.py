"""This package, Transformers' caches, kvpress, randkv and OpenVINO GenAI on the same weights, prompts and machine.

Prompts hide several needles, of which each asks for one; all of a run are cut to one length, so that no package has to
pad. Every cache decodes in a process of its own, beside a full cache in the same environment: speed is told as a
multiple of that one's, since the versions of Transformers differ. What the answer says is graded here. OpenVINO opens
the quantised file of the model (``gguf=FILE``), whose weights the others have whole, so its tokens are compared with
its own full cache.
"""

import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..common.aims import Aim, judge
from ..common.case import Job, register
from ..common.environment import KVPRESS, TORCH, Environment, environment, run_worker, source_of
from ..common.memory import STATM
from ..common.models import TINY
from ..common.rows import ROOT, Row, origin
from ..common.run import Run, Skip
from ..quality.kit import evaluator_of, tasks_of
from .worker import FULL, KARA, KV, QUANTIZED, THEN

WORKER = ("-m", "benchmarks.peers.worker")
OURS = "kara_hf"
RANDKV = Environment("randkv", ("transformers>=5.16,<5.17", "randkv==0.1.0"), "randkv.transformers")
OPENVINO = Environment("openvino", ("openvino-genai==2026.4.1.0", "numpy"), "openvino_genai", torch=False)
PEERS = {"kvpress": KVPRESS, "randkv": RANDKV, "OpenVINO": OPENVINO}
METHODS = (
    FULL,
    f"{KV}, all tokens in 4 bits",
    KV,
    f"{KV}, 4 bits",
    f"{KV}, in chunks",
    KARA,
    f"{QUANTIZED}, quanto",
    f"kvpress {FULL}",
    "kvpress SnapKV",
    "kvpress KeyDiff",
    "kvpress AdaKV(SnapKV)",
    f"kvpress SnapKV{THEN}Knorm",
    f"randkv {FULL}",
    "randkv",
    "OpenVINO",
    "OpenVINO H2O",
    "OpenVINO SnapKV",
    "OpenVINO ADAPTIVE_RKV",
)


def peer_of(method: str) -> str:
    """The package that brings a method: the first word, or this one."""
    word = method.partition(" ")[0]
    return word if word in PEERS else OURS


def speed_aims(rows: Sequence[Row]) -> list[Aim]:
    """Aim: where kvpress holds as many tokens to the end, decoding is at least as fast."""
    found = []
    mine = [row for row in rows if row["case"] == "peers" and "speedup" in row]
    for prompt, batch in sorted({(row["prompt"], row["batch"]) for row in mine}):
        of = {row["method"]: row["speedup"] for row in mine if (row["prompt"], row["batch"]) == (prompt, batch)}
        theirs = [speedup for name, speedup in of.items() if THEN in name]
        if theirs and KV in of:
            ratio = of[KV] / max(theirs)
            found.append((ratio, f"{ratio:.2f} at {prompt} tokens, batch {batch}"))
    return [judge("decoding at equal kept tokens, beside kvpress's presses", found, least=1.0)]


@register(
    "peers",
    "other packages on the same model, prompts and machine",
    [
        ("prompt", "{prompt}"),
        ("batch", "{batch}"),
        ("cache", "{method}"),
        ("tokens/s", "{tokens_per_s:.1f}"),
        ("of its full cache's", "{speedup:.2f}"),
        ("first token, s", "{first_s:.1f}"),
        ("holds, MB", "{held_mb:.1f}"),
        ("process, MB", "{process_mb:.0f}"),
        ("needles", "{found} of {batch}"),
        ("tokens as the full cache", "{agreed:.0f}"),
    ],
    sizes={
        "model": "",
        "gguf": "",
        "task": "niah-multikey:length={prompt}",
        "prompts": (2048, 7680),
        "batches": (1, 8),
        "new": 512,
        "share": 0.25,
        "window": 64,
        "interval": 128,
        "methods": METHODS,
        "envs": str(ROOT / "runs"),
        "torch_package": TORCH,
    },
    smoke={
        "task": "recall:length={prompt}",
        "prompts": (160,),
        "batches": (2,),
        "share": 0.5,
        "new": 12,
        "window": 8,
        "interval": 16,
        "methods": METHODS[:6],
    },
    aims=speed_aims,
)
def peer_jobs(
    run: Run,
    model: str,
    gguf: str,
    task: str,
    prompts: Sequence[int],
    batches: Sequence[int],
    new: int,
    methods: Sequence[str],
    envs: str,
    torch_package: str,
    **sizes: Any,
) -> Iterator[Job]:
    evaluator = evaluator_of(model, device="cpu")
    folder = str(Path(model or str(TINY)).absolute())
    for prompt in prompts:
        (made,) = tasks_of(task.format(prompt=prompt), evaluator.tokenizer)
        for batch in batches:
            asked = Asked(evaluator, made, batch)
            common = {"model": folder, "gguf": gguf, "ids": asked.ids, "new": new, **sizes}
            common["kept"] = round(sizes["share"] * asked.length)
            for peer in dict.fromkeys(map(peer_of, methods)):
                names = [name for name in methods if peer_of(name) == peer]
                python, source = None, origin("cpu")
                if peer in PEERS:
                    python = environment(PEERS[peer], Path(envs).absolute() / f"{PEERS[peer].name}-env", torch_package)
                    source = source_of(PEERS[peer], python)
                measure = partial(measured, asked, python, names, common)
                labels = {"model": evaluator.name, "prompt": prompt, "batch": batch, "package": peer}
                yield Job(labels, measure, source=source)


class Asked:
    """Prompts of one length, and what is right.

    Args:
        evaluator: of the kit, which makes and grades them.
        task: what they are of.
        batch: how many.

    Attributes:
        ids: their tokens, ``[batch][length]``.
    """

    def __init__(self, evaluator: Any, task: Any, batch: int):
        prompts = [evaluator.prompt(task, number) for number in range(batch)]
        self.evaluator, self.examples = evaluator, [prompt.example for prompt in prompts]
        self.length = min(len(prompt.ids) for prompt in prompts)
        self.ids = [self._cut(prompt) for prompt in prompts]

    def _cut(self, prompt: Any) -> list[int]:
        """Tokens of a prompt without some near its begin. Raises ValueError if that takes an answer with it."""
        extra, head = len(prompt.ids) - self.length, len(prompt.ids) // 16
        ids = prompt.ids[:head] + prompt.ids[head + extra :]
        text, whole = map(self.evaluator.tokenizer.decode, (ids, prompt.ids))
        if any(text.count(answer) < whole.count(answer) for answer in prompt.example.answers):
            raise ValueError(
                f"example {prompt.example.number} of {prompt.example.task} cannot be cut to {self.length} tokens "
                "without its answer, which stands near the begin; ask for another length"
            )
        return ids

    def right(self, tokens: Sequence[Sequence[int]]) -> int:
        """How many answers are right, up to their first end token."""
        ends, decode = self.evaluator.ends, self.evaluator.tokenizer.decode
        total = 0
        for example, row in zip(self.examples, tokens, strict=True):
            row = list(row)[: example.max_new_tokens]
            stop = next((place for place, token in enumerate(row) if token in ends), len(row))
            total += example.score(decode(row[:stop], skip_special_tokens=True)) == 1
        return total


def agreed(mine: Sequence[Sequence[int]], full: Sequence[Sequence[int]]) -> float:
    """Tokens until the first that differs, on average over sequences."""
    lengths = [
        next((place for place, (a, b) in enumerate(zip(*rows, strict=True)) if a != b), len(rows[0]))
        for rows in zip(mine, full, strict=True)
    ]
    return sum(lengths) / len(lengths)


def measured(asked: Asked, python: Path | None, names: Sequence[str], job: Row) -> list[Row]:
    """A row for each of a package's caches; the first is its full one."""
    if not STATM.exists():
        raise Skip(f"{STATM} is not there to read a process's memory from")
    if names[0].startswith("OpenVINO") and not job["gguf"]:
        raise Skip("OpenVINO opens a file of quantised weights; name it with --set gguf=FILE")
    rows: list[Row] = [{"method": name} | found(python, job | {"method": name}) for name in names]
    full = rows[0] if "tokens" in rows[0] else None
    return [row if "reason" in row else with_ratios(asked, row, full) | {"kept": job["kept"]} for row in rows]


def found(python: Path | None, job: Row) -> Row:
    """What a worker says of one cache; or why it says nothing."""
    if job["method"] == "randkv" and len(job["ids"]) > 1:
        return {"status": "skipped", "reason": "randkv 0.1.0 takes one sequence"}
    with tempfile.TemporaryDirectory() as folder:
        try:
            (row,) = run_worker(python, Path(folder), job, WORKER)
        except subprocess.CalledProcessError as error:
            return {"status": "failed", "reason": f"its process ended with {error.returncode}; it says why above"}
    return row


def with_ratios(asked: Asked, row: Row, full: Row | None) -> Row:
    """A cache's row beside its package's full cache, and its answers graded; without the tokens."""
    told = {
        "tokens": asked.length,
        "held_mb": row["held_bytes"] / 1e6,
        "process_mb": row["process_bytes"] / 1e6,
        "found": asked.right(row["tokens"]),
    }
    if full is not None:
        told |= {"speedup": full["step_ms"] / row["step_ms"], "agreed": agreed(row["tokens"], full["tokens"])}
    return row | told
