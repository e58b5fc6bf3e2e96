"""Whole models: decode speed, memory and the largest batch, on random weights in the shapes of public models.

Nothing is downloaded. One sequence is prefilled by the model itself, sealing every window that a sequence of that
length seals; the sequences of a batch are copies of it, each in memory of its own. So all lengths, bytes and layouts
are those of a real run, and the fill costs one sequence instead of a batch.
"""

import contextlib
import copy
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from gpu_checks import graph_setting, has_graphs
from gpu_report import GIB, LONG, SHORT
from gpu_run import DTYPE, Case, Row, Run, Skip, spread
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, Qwen3Config, StaticCache

from kara_hf import CompressedCache, KaraCache, PoDCache, PoDSharing, detach

LLAMA, QWEN = "Llama-3.1-8B", "Qwen3-8B"
CONFIGS: dict[str, Any] = {
    LLAMA: partial(
        LlamaConfig,
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    QWEN: partial(
        Qwen3Config,
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ),
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
KERNELS = ("append", "attend", "merge", "window_scores", "compact", "decode")
SHARED_KERNELS = ("append", "attend", "attend_shared", "merge", "pod")
MIDDLE = 16 * 1024
LEAD, TAIL, WARM = 24, 24, 8  # steps before and after a compression, and those that count for nothing
AFTER = 4  # steps that may pay for a compression: its own, and those behind it that capture a graph anew
WHOLE_WINDOW_SECONDS = 6.0  # a whole window is timed where it takes no longer
LIMIT_GIB = 24.0


@dataclass(frozen=True)
class Kind:
    """A cache and its settings: KaraCache where `retention` is given, PoDCache where it is a `group` of layers whose
    first leads the others; 1: nothing is shared.
    """

    retention: float | None = None
    graph: bool = False
    static: bool = False
    group: int | None = None

    def __str__(self) -> str:
        if not self.ours:
            return "StaticCache, compiled" if self.static else "DynamicCache"
        groups = "nothing shared" if self.group == 1 else f"groups of {self.group} layers"
        name = f"KaraCache {self.retention}" if self.group is None else f"PoDCache, {groups}"
        return name + (", CUDA graph" if self.graph else "")

    @property
    def ours(self) -> bool:
        return self.retention is not None or self.group is not None

    @property
    def followers(self) -> float | None:
        """Share of the layers that follow another."""
        return None if self.group is None else 1 - 1 / self.group

    @property
    def needs(self) -> tuple[str, ...]:
        """Ops whose checks come before its numbers."""
        if not self.ours:
            return ()
        ops = KERNELS if self.group is None else SHARED_KERNELS
        return (*ops, "graph") if self.graph else ops


FULL, STATIC = Kind(), Kind(static=True)
KARA, KARA_GRAPH = Kind(0.2), Kind(0.2, graph=True)


# ------------------------------------------------------------------------------------------------------------ the cases
def decode_cases(run: Run) -> list[Case]:
    """The comparison that matters most: one model, KaraCache at 0.2 with and without graphs, and the full cache."""
    main = (KARA_GRAPH, KARA, FULL)
    if run.smoke:
        return grid(run, LLAMA, 96, (2,), main)
    found = grid(run, LLAMA, LONG, (16, 1, 8, 64), main) + grid(run, LLAMA, SHORT, (16, 64, 1), main)
    return found + grid(run, LLAMA, MIDDLE, (16,), main)


def pod_cases(run: Run) -> list[Case]:
    """One model with no, half and three quarters of its layers following another; then with graphs."""
    if run.smoke:
        return grid(run, LLAMA, 96, (2,), (Kind(group=2), Kind(group=1)))
    kinds = tuple(Kind(group=group) for group in (4, 1, 2))
    graphs = tuple(Kind(group=group, graph=True) for group in (4, 1))
    return (
        grid(run, LLAMA, LONG, (8, 1), kinds)
        + grid(run, LLAMA, MIDDLE, (8,), kinds)
        + grid(run, LLAMA, LONG, (8, 1), graphs)
    )


def more_cases(run: Run) -> list[Case]:
    """Other retentions, StaticCache, a whole `generate`, and a second model."""
    kinds = (Kind(0.5, True), Kind(1.0, True), Kind(0.5), Kind(1.0))
    if run.smoke:
        found = grid(run, LLAMA, 96, (2,), (Kind(0.5), Kind(1.0), STATIC))
        return found + generate_cases(run, KARA) + grid(run, QWEN, 96, (2,), (KARA_GRAPH, KARA, FULL))
    found = generate_cases(run, KARA_GRAPH if has_graphs() else KARA)
    found += grid(run, LLAMA, LONG, (1,), (STATIC,)) + grid(run, LLAMA, LONG, (16, 1), kinds)
    found += grid(run, QWEN, LONG, (16, 1, 8, 64), (KARA_GRAPH, KARA, FULL))
    found += grid(run, LLAMA, SHORT, (16,), (STATIC, *kinds)) + generate_cases(run, FULL)
    return found + grid(run, QWEN, SHORT, (16, 64, 1), (KARA_GRAPH, KARA, FULL))


def limit_cases(run: Run) -> list[Case]:
    """The largest batch within a fixed limit."""
    length, limit = (96, 5 * 10**5) if run.smoke else (LONG, int(LIMIT_GIB * GIB))
    found = []
    for kind in (KARA, FULL):
        labels = {"what": str(kind), "model": LLAMA, "length": length, "limit_bytes": limit}
        found.append(Case(labels, partial(largest_batch, run, LLAMA, kind, length, limit), kind.needs))
    return found


def grid(run: Run, model: str, length: int, batches: tuple[int, ...], kinds: tuple[Kind, ...]) -> list[Case]:
    """One kind after the other, so that a prefilled sequence serves all batches."""
    found = []
    for kind in kinds:
        for batch in batches:
            labels = {"what": str(kind), "model": model, "length": length, "batch": batch, "retention": kind.retention}
            measure = partial(decode_speed, run, model, kind, length, batch)
            labels |= {"graph": kind.graph} | ({} if kind.group is None else {"followers": kind.followers})
            found.append(Case(labels, measure, kind.needs, seconds=90))
    return found


def generate_cases(run: Run, kind: Kind) -> list[Case]:
    prompt, new, batch = (16, 48, 2) if run.smoke else (128, 2048, 16)
    labels = {"what": f"generate, {kind}", "model": LLAMA, "batch": batch, "prompt": prompt, "new": new}
    return [Case(labels, partial(generate_speed, run, kind, batch, prompt, new), kind.needs, seconds=100)]


# ------------------------------------------------------------------------------------------------- models and caches
def settings(run: Run) -> dict[str, int]:
    return {"window": 32, "recent": 8} if run.smoke else {"window": 256, "recent": 32}


def the_model(run: Run, name: str) -> Any:
    """The model of that name; the one before is let go."""
    if run.shared.get("model_name") != name:
        for held in ("model", "prefilled", "prefilled_as"):
            run.shared.pop(held, None)
        run.tidy()
        config = CONFIGS[name](**TINY if run.smoke else {})
        config.bos_token_id = config.eos_token_id = None  # a random model must not stop by itself
        torch.manual_seed(0)
        with run.device:
            run.shared["model"] = AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval()
        run.shared["model_name"] = name
        run.shared["weights"] = run.allocated()
    return run.shared["model"]


def tokens_seen(run: Run, length: int) -> int:
    """About `length` tokens: as many as let the step after `LEAD` more be the one that seals a window."""
    window, recent = settings(run)["window"], settings(run)["recent"]
    lead = min(LEAD, window // 2)
    return length - (length - recent) % window + window - 1 - lead


def new_cache(run: Run, model: Any, kind: Kind, whole_prompt: bool = True) -> Any:
    """An empty cache; without `whole_prompt`, KaraCache seals the windows of a prompt too."""
    if not kind.ours:
        return DynamicCache(config=model.config)
    if kind.group is not None:
        return PoDCache(model, sharing(run, model, kind.group), **graph_setting(run, kind.graph))
    options = settings(run) | graph_setting(run, kind.graph) | {"compress_prompt": not whole_prompt}
    return KaraCache(model, retention=kind.retention, **options)


def sharing(run: Run, model: Any, group: int) -> PoDSharing:
    """Every `group` layers share the keys of the first, in all heads."""
    layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    lead = tuple((layer - layer % group,) * heads for layer in range(layers))
    return PoDSharing(lead=lead, sinks=2, recent=14) if run.smoke else PoDSharing(lead=lead)


@contextlib.contextmanager
def attached(run: Run, model: Any, kind: Kind) -> Iterator[None]:
    """In it the model serves caches of this kind, copies of them too; behind it the model is as it was."""
    if kind.ours:
        new_cache(run, model, kind)  # making one is what attaches a model
    try:
        yield
    finally:
        detach(model)
        if kind.static:
            torch.compiler.reset()


def prefilled(run: Run, name: str, kind: Kind, length: int) -> Any:
    """A cache that has seen one sequence of about `length` tokens, windows sealed as they would be while decoding."""
    model, source = the_model(run, name), FULL if kind.static else kind
    if run.shared.get("prefilled_as") != (name, source, length):
        run.shared.pop("prefilled", None)
        run.shared["prefilled_as"] = None
        run.tidy()
        cache = new_cache(run, model, source, whole_prompt=False)
        torch.manual_seed(1)
        ids = torch.randint(0, model.config.vocab_size, (1, tokens_seen(run, length)), device=run.device)
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        run.shared["prefilled"], run.shared["prefilled_as"] = cache, (name, source, length)
    return run.shared["prefilled"]


def batch_of(run: Run, one: Any, kind: Kind, batch: int, room: int) -> Any:
    """A cache of `batch` sequences that are copies of `one`, none of them sharing memory with another."""
    if not kind.ours:
        config = run.shared["model"].config
        seen = one.get_seq_length()
        cache = StaticCache(config=config, max_cache_len=seen + room) if kind.static else DynamicCache(config=config)
        for index, layer in enumerate(one.layers):
            cache.update(*(part.expand(batch, -1, -1, -1) for part in (layer.keys, layer.values)), index)
        return cache
    cache = copy.deepcopy(one)
    cache.batch_repeat_interleave(batch)
    for layer in cache.layers:  # sequences share their blocks until they are written: here each gets its own
        store = layer.stored()
        store.unshare(np.arange(batch), np.zeros(batch, np.int64), int(store.lengths.max()))
    report = cache.report()
    if report.resident_bytes < report.nominal_bytes:
        raise RuntimeError("sequences of the batch still share memory")
    return cache


def cache_bytes(cache: Any) -> tuple[int, int]:
    """Bytes held by a cache's own account, and those of keys and values alone of the tokens kept."""
    if isinstance(cache, CompressedCache):
        report = cache.report()
        return report.resident_bytes, report.nominal_bytes
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return held, held * int(cache.get_seq_length()) // cache.layers[0].keys.shape[2]


# --------------------------------------------------------------------------------------------------------- decode steps
def compiled(run: Run, model: Any) -> Callable[..., Any]:
    """The model as `torch.compile` with CUDA graphs makes it; where nothing is measured, only traced."""
    fast = torch.compile(model, backend="eager") if run.smoke else torch.compile(model, mode="reduce-overhead")

    def forward(**arguments: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        try:
            return fast(**arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise Skip(f"torch.compile failed, {type(error).__name__}: {error}"[:200]) from error

    return forward


def decode_steps(run: Run, forward: Callable[..., Any], cache: Any, batch: int, first: int, count: int) -> list[float]:
    """Seconds of `count` steps of one token from position `first` on, each from an idle device to an idle device."""
    token = torch.ones(batch, 1, dtype=torch.long, device=run.device)
    times = []
    for position in range(first, first + count):
        step = partial(forward, input_ids=token, position_ids=torch.full_like(token, position), past_key_values=cache)
        times.append(run.seconds(partial(step, use_cache=True)))
    return times


@torch.no_grad()
def decode_speed(run: Run, name: str, kind: Kind, length: int, batch: int) -> Row:
    """Decode steps at about `length` tokens seen, one of which seals a window, and the memory they take."""
    model = the_model(run, name)
    with attached(run, model, kind):
        one = prefilled(run, name, kind, length)
        before, seen, window = run.allocated(), tokens_seen(run, length), settings(run)["window"]
        lead = min(LEAD, window // 2)
        count = lead + 1 + TAIL
        cache = batch_of(run, one, kind, batch, room=count)
        forward = compiled(run, model) if kind.static else model
        run.forget_peak()
        times = decode_steps(run, forward, cache, batch, seen, count)
        compresses = kind.retention is not None and kind.retention < 1
        whole = compresses and not run.smoke and window * statistics.median(times[WARM:]) <= WHOLE_WINDOW_SECONDS
        if whole:
            times += decode_steps(run, forward, cache, batch, seen + count, window)
        if kind.graph and not cache.graph.replays:
            raise RuntimeError("no step was replayed from a CUDA graph")
        numbers = step_numbers(times, batch, window, lead, compresses, whole)
        return numbers | {"seen": seen + len(times)} | memory_numbers(run, cache, before)


def step_numbers(times: list[float], batch: int, window: int, lead: int, compresses: bool, whole: bool) -> Row:
    """Times of steps as numbers of a row: the usual step, tokens in a second, and what compressing takes of a window.

    Step `lead` seals a window; where a `whole` window is timed behind it, so does the step one window later. Otherwise
    a window is made of usual steps and one compression, in which kernels may run for the first time.
    """
    if not compresses:
        rest = times[WARM:]
        return spread([1e3 * t for t in rest], "step_ms") | {"tokens_per_s": batch * len(rest) / sum(rest)}
    seals = [lead, lead + window] if whole else [lead]
    paying = {seal + n for seal in seals for n in range(AFTER)}
    plain = [t for n, t in enumerate(times) if n >= WARM and n not in paying]
    usual = statistics.median(plain)
    cost = sum(t - usual for t in times[seals[-1] : seals[-1] + AFTER])
    total = sum(times[lead + 1 : lead + 1 + window]) if whole else window * statistics.mean(plain) + cost
    return spread([1e3 * t for t in plain], "step_ms") | {
        "tokens_per_s": batch * window / total,
        "compression_ms": 1e3 * cost,
        "compression_share": cost / total,
        "window": window,
        "whole_window_timed": whole,
    }


def memory_numbers(run: Run, cache: Any, before: int) -> Row:
    """Bytes of a cache by its own account and by the allocator's, which had `before` bytes when it was made.

    What the allocator held beside the weights and the cache, such as the sequence that was copied, is left out.
    """
    run.tidy()
    resident, nominal = cache_bytes(cache)
    numbers = {"resident_bytes": resident, "nominal_bytes": nominal}
    if run.cuda:
        numbers |= {"allocated_bytes": run.allocated() - before}
        numbers |= {"peak_bytes": run.peak() - before + run.shared["weights"]}
    return numbers


@torch.no_grad()
def generate_speed(run: Run, kind: Kind, batch: int, prompt: int, new: int) -> Row:
    """One `generate` from a prompt to its last token, by the wall clock."""
    model = the_model(run, LLAMA)
    ids = torch.randint(0, model.config.vocab_size, (batch, prompt), device=run.device)
    with attached(run, model, kind):
        before = run.allocated()
        cache = new_cache(run, model, kind)
        run.forget_peak()
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": cache}
        seconds = run.seconds(partial(model.generate, **inputs, do_sample=False, max_new_tokens=new))
        del inputs
        if cache.get_seq_length() != prompt + new - 1:
            raise RuntimeError(f"{cache.get_seq_length()} tokens were seen instead of {prompt + new - 1}")
        numbers = {"seconds": seconds, "tokens_per_s": batch * new / seconds, "seen": prompt + new - 1}
        return numbers | memory_numbers(run, cache, before)


@torch.no_grad()
def largest_batch(run: Run, name: str, kind: Kind, length: int, limit: int) -> Row:
    """The largest batch whose decode steps take at most `limit` bytes beside the weights; one more takes more."""
    model, steps = the_model(run, name), LEAD + AFTER
    with attached(run, model, kind):
        one = prefilled(run, name, kind, length)

        def need(batch: int) -> int:
            run.tidy()
            before = run.allocated()
            cache = batch_of(run, one, kind, batch, room=steps)
            run.forget_peak()
            decode_steps(run, model, cache, batch, tokens_seen(run, length), steps)
            return run.peak() - before if run.cuda else cache_bytes(cache)[0]

        if (one_takes := need(1)) > limit:
            raise Skip(f"one sequence takes {one_takes / GIB:.1f} GiB")
        batch = limit // one_takes
        while (used := need(batch)) > limit:
            batch -= 1
        while (more := need(batch + 1)) <= limit:
            batch, used = batch + 1, more
    return {"batch": batch, "used_bytes": used, "used_by_one_more_bytes": more}
