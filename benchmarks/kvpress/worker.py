"""What runs in kvpress's environment: reads a job, and prints what it finds, one JSON line after the other.

    python -m benchmarks.kvpress.worker FOLDER

Neither this package nor the Transformers that it needs are there, so nothing of it is imported.
"""

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..common.console import console
from ..common.race import FULL, Entry, dense_bytes, race, step, timing, twin

Row = dict[str, Any]


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

    return Entry(name, ids, prefill, partial(step, model, cache), Buffers(cache, press, model), cache)


def speed_rows(model: Any, ids: torch.Tensor, job: Row) -> list[Row]:
    """One row for each press, from `repeats` races."""
    runs, buffers = [], {}
    for number in range(job["repeats"]):
        with contextlib.ExitStack() as stack:
            shown = presses(**job["press"]).items()
            entries = [pressed(model, name, how, ids, stack) for name, how in shown]
            runs.append(race(entries, job["prompt"], f"run {number + 1}"))
            buffers = {entry.name: entry.held.most for entry in entries}
    columns = [list(column) for column in zip(*runs, strict=True)]
    return [
        {"method": name, "buffer_bytes": most} | timing(mine, columns[0])
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
    """Rows of all presses."""
    model, tensors = load(folder / "model"), torch.load(folder / "tensors.pt", weights_only=True)
    same = {"logits_difference": check_model(model, tensors)}
    yield from (row | same for row in speed_rows(model, tensors["ids"], job))


def work(folder: Path) -> None:
    """Does the job in `folder` and prints what it finds."""
    console.stderr = True
    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(job["threads"])
    for row in speeds(folder, job) if job["kind"] == "speed" else answers(job):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
