"""What runs in the environment of a package, in a new process for every cache: prints one JSON line.

    python -m benchmarks.peers.worker FOLDER

In other environments than this package's own, neither it nor its Transformers can be imported. Greedy decoding on one
thread, by the wall clock, without an end: every cache takes the same number of steps.
"""

import contextlib
import inspect
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..common.memory import MostResident

Row = dict[str, Any]
FULL, KARA, KV, QUANTIZED = "DynamicCache", "KaraCache", "KVCompressCache", "QuantizedCache"
THEN = ", then "
WARM_UP = 64  # tokens that are read before the clock runs, and as many are kept
CHUNK = 512  # tokens of a prompt that a cache "in chunks" reads at once


@dataclass
class Decoded:
    """What a package did.

    Attributes:
        tokens: that it generated, of each sequence.
        first: seconds to the first token.
        steps: seconds of each further step.
        held: bytes that its cache holds while it decodes, as it counts them; the median over the steps.
        process: most bytes of the process that were in memory from the prompt on.
    """

    tokens: list[list[int]]
    first: float
    steps: list[float]
    held: float
    process: int


@dataclass
class Cut:
    """A cache, what must be entered while the prompt is read and while tokens are decoded, and what reads a prompt and
    returns logits behind it ``[B, V]``; None: a forward.
    """

    cache: Any
    held: Callable[[], int]
    reading: Any = contextlib.nullcontext()
    decoding: Any = contextlib.nullcontext()
    read: Callable[[Any], Any] | None = None


# --------------------------------------------------------------------------------------------------- with Transformers
def of_transformers(name: str, job: Row, make: Callable[[Any, str, Row], Cut]) -> Decoded:
    """Decodes by forwards of the model, whose cache `make` gives."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    ids = torch.tensor(job["ids"])
    few = ids[:, :WARM_UP]
    decode(model, make(model, name, job | {"kept": WARM_UP, "prompt": WARM_UP}), few, 4)
    return decode(model, make(model, name, job | {"prompt": ids.shape[1]}), ids, job["new"])


def decode(model: Any, cut: Cut, ids: Any, new: int) -> Decoded:
    """Greedy tokens behind a prompt ``[B, S]`` int64; positions are those of all tokens, whatever is cut."""
    import torch

    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    given = {name: cut.cache, "use_cache": True}
    tokens, steps, held, first = [], [], [], 0.0
    with MostResident() as memory, torch.inference_mode(), contextlib.ExitStack() as stack:
        for number in range(new):
            start = time.perf_counter()
            seen = 0 if number == 0 else ids.shape[1] + number - 1
            entered = tokens[-1] if tokens else ids
            if number == 0 and cut.read is not None:
                logits = cut.read(ids)
            else:
                positions = torch.arange(seen, seen + entered.shape[1]).expand(len(ids), -1)
                with cut.reading if number == 0 else contextlib.nullcontext():
                    out = model(input_ids=entered, position_ids=positions, logits_to_keep=1, **given)
                logits = out.logits[:, -1]
            tokens.append(logits.argmax(-1, keepdim=True))
            seconds = time.perf_counter() - start
            if number == 0:
                first = seconds
                stack.enter_context(cut.decoding)
            else:
                steps.append(seconds)
                held.append(cut.held())
    return Decoded(torch.cat(tokens, 1).tolist(), first, steps, statistics.median(held), memory.most)


def ours(model: Any, name: str, job: Row) -> Cut:
    """Caches of this package and of Transformers."""
    from transformers import DynamicCache, QuantizedCache

    from kara_hf import KaraCache, KVCompressCache
    from kara_hf.evaluation.measure.memory import held_bytes

    kind, _, how = name.partition(", ")
    bits: Row = {"bits": 4} if how == "4 bits" else {}
    cache: Any
    if kind == FULL:
        cache = DynamicCache(config=model.config)
    elif kind == QUANTIZED:
        axis = {"axis_key": 1, "axis_value": 1} if how == "HQQ" else {}  # which has no axis of its own
        cache = QuantizedCache(how.lower(), model.config, nbits=4, **axis)
    elif kind == KARA:
        cache = KaraCache(model, retention=job["kept"] / job["prompt"], compress_prompt=True, **bits)
    elif how == "all tokens in 4 bits":
        cache = KVCompressCache(model, retention=1.0, bits=4)
    else:
        chunk = CHUNK if how == "in chunks" else None
        cache = KVCompressCache(model, max_cache_tokens=job["kept"], prefill_chunk=chunk, **bits)
    read = partial(cache.read, complete=True) if kind in (KV, KARA) else None
    return Cut(cache, lambda: held_bytes(cache), read=read)


def of_kvpress(model: Any, name: str, job: Row) -> Cut:
    """A press by its name, which cuts a prompt to its share; what follows "then" holds that many while decoding."""
    from kvpress import DecodingPress
    from transformers import DynamicCache

    from ..common.race import dense_bytes
    from ..kvpress.worker import buffer_bytes, make_press

    cache, (reads, _, decodes) = DynamicCache(), name.removeprefix("kvpress ").partition(THEN)
    press = None if reads == FULL else make_press(reads, job["window"])
    if press is not None:
        press.compression_ratio = 1 - job["kept"] / job["prompt"]
    later = make_press(decodes, job["window"]) if decodes else None
    if later is not None:
        later = DecodingPress(later, compression_interval=job["interval"], target_size=job["kept"])
    held = lambda: dense_bytes(cache) + buffer_bytes(later or press, model)  # noqa: E731
    return Cut(cache, held, *(contextlib.nullcontext() if each is None else each(model) for each in (press, later)))


def of_randkv(model: Any, name: str, job: Row) -> Cut:
    """It keeps the whole prompt, so its budget is that and what others keep of it."""
    from randkv import RandKVConfig
    from randkv.transformers import RandKVCache

    from ..common.race import dense_bytes

    config = RandKVConfig(budget=job["prompt"] + job["kept"], buffer_size=job["window"])
    cache = RandKVCache(model_config=model.config, prompt_length=job["prompt"], randkv_config=config)
    return Cut(cache, lambda: dense_bytes(cache))


# ------------------------------------------------------------------------------------------------------ with OpenVINO
OPENVINO_BLOCK = 32  # tokens; what it evicts and keeps are whole blocks


def of_openvino(name: str, job: Row) -> Decoded:
    """Its engine opens the quantised file of the same model itself, steps all sequences together and evicts blocks."""
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    mode, prompt = name.removeprefix("OpenVINO").strip(), len(job["ids"][0])
    scheduler = genai.SchedulerConfig()
    scheduler.max_num_batched_tokens = len(job["ids"]) * prompt
    scheduler.enable_prefix_caching = False
    if mode:
        kept = -(-job["kept"] // OPENVINO_BLOCK) * OPENVINO_BLOCK
        recent = kept // 2 // OPENVINO_BLOCK * OPENVINO_BLOCK
        modes = genai.AggregationMode
        scheduler.use_cache_eviction = True
        scheduler.cache_eviction_config = genai.CacheEvictionConfig(
            start_size=OPENVINO_BLOCK,
            recent_size=recent,
            max_cache_size=kept,
            aggregation_mode=modes.ADAPTIVE_RKV if mode == "ADAPTIVE_RKV" else modes.SUM,
            snapkv_window_size=job["window"] if mode == "SnapKV" else 0,
        )
    pipeline = genai.ContinuousBatchingPipeline(job["gguf"], scheduler, "CPU", {"INFERENCE_NUM_THREADS": 1})

    def run(rows: list[list[int]], new: int) -> Decoded:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new, True, False
        handles = [pipeline.add_request(i, ov.Tensor(np.array([row], np.int64)), config) for i, row in enumerate(rows)]
        seconds, held = [], []
        with MostResident() as memory:
            while pipeline.has_non_finished_requests():
                start = time.perf_counter()
                pipeline.step()
                seconds.append(time.perf_counter() - start)
                now = pipeline.get_metrics()
                held.append(now.kv_cache_size_in_bytes * now.cache_usage / 100)
        tokens = [[int(token) for token in handle.read_all()[0].generated_ids] for handle in handles]
        return Decoded(tokens, seconds[0], seconds[1:], statistics.median(held), memory.most)

    run([row[:WARM_UP] for row in job["ids"]], 4)
    return run(job["ids"], job["new"])


# ------------------------------------------------------------------------------------------------------------- working
def decoded(name: str, job: Row) -> Decoded:
    """What the package of that name does."""
    if name.startswith("OpenVINO"):
        return of_openvino(name, job)
    makers = {"kvpress": of_kvpress, "randkv": of_randkv}
    return of_transformers(name, job, makers.get(name.partition(" ")[0], ours))


def measured(job: Row) -> Row:
    """The row of one cache, with the tokens that it generated."""
    found = decoded(job["method"], job)
    return {
        "tokens": found.tokens,
        "first_s": found.first,
        "step_ms": 1e3 * statistics.median(found.steps),
        "tokens_per_s": len(found.tokens) * len(found.steps) / sum(found.steps),
        "held_bytes": found.held,
        "process_bytes": found.process,
    }


def work(folder: Path) -> None:
    """Does the job in `folder` and prints what it finds."""
    job = json.loads((folder / "job.json").read_text())
    if not job["method"].startswith("OpenVINO"):
        import torch

        torch.set_num_threads(1)
    print(json.dumps(measured(job)), flush=True)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
