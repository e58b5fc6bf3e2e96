"""Caches of a whole model, on random weights in the shapes of public models.

Nothing is downloaded. One sequence is prefilled by the model itself, sealing every window that a sequence of that
length seals; the sequences of a batch are copies of it, each in memory of its own. So all lengths, bytes and layouts
are those of a real run, and the fill costs one sequence instead of a batch.
"""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, Qwen3Config, StaticCache

from kara_hf import CompressedCache, KaraCache, PoDCache, PoDSharing, detach

from ..common.race import FULL as DYNAMIC
from ..common.race import dense_bytes
from ..common.run import Run
from .small_model import graph_setting

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
OPS = ("append", "attend", "merge", "window_scores", "compact", "decode")
SHARED_OPS = ("append", "attend", "attend_shared", "merge", "pod")
LEAD = 24  # steps before a compression, at most


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
            return "StaticCache, compiled" if self.static else DYNAMIC
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
        ops = OPS if self.group is None else SHARED_OPS
        return (*ops, "graph") if self.graph else ops


FULL, STATIC = Kind(), Kind(static=True)
KARA, KARA_GRAPH = Kind(0.2), Kind(0.2, graph=True)


def settings(run: Run) -> dict[str, int]:
    return {"window": 16, "recent": 8} if run.smoke else {"window": 256, "recent": 32}


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
            run.shared["model"] = AutoModelForCausalLM.from_config(config, dtype=run.dtype).eval()
        run.shared["model_name"] = name
        run.shared["weights"] = run.allocated()
    return run.shared["model"]


def lead_of(run: Run) -> int:
    """Steps before a compression."""
    return min(LEAD, settings(run)["window"] // 2)


def tokens_seen(run: Run, length: int) -> int:
    """About `length` tokens: as many as let the step after `lead_of` more be the one that seals a window."""
    window, recent = settings(run)["window"], settings(run)["recent"]
    return length - (length - recent) % window + window - 1 - lead_of(run)


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
    held = dense_bytes(cache)
    return held, held * int(cache.get_seq_length()) // cache.layers[0].keys.shape[2]
