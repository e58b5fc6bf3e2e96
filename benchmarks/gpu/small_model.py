"""Decode steps of a small model: against the full cache, captured against eager, and without waiting for the device."""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from kara_hf import KaraCache, PoDCache, PoDSharing, attach, detach

from ..common.rows import Row
from ..common.run import Run, Skip, backend
from .reference import bounded

PROMPT = 45
SMALL = {"window": 32, "recent": 8}


def has_graphs() -> bool:
    """Whether a cache can have its decode steps captured in a CUDA graph."""
    return "cuda_graph" in inspect.signature(KaraCache.__init__).parameters


def graph_setting(run: Run, graph: bool) -> dict[str, bool]:
    """The setting that asks for CUDA graphs or against them. Raises `Skip` where there are none."""
    if graph and not has_graphs():
        raise Skip("not available: KaraCache has no cuda_graph option")
    if graph and not run.cuda:
        raise Skip("not available on a CPU")
    return {"cuda_graph": graph} if has_graphs() else {}


def steps_of(run: Run) -> int:
    """Decode steps of every check, among which windows are sealed."""
    return 40 if run.smoke else 80


def small_llama(run: Run, dtype: torch.dtype) -> Any:
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
    )
    torch.manual_seed(0)
    with run.device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def decode(run: Run, model: Any, cache: Any, guarded: frozenset[int] = frozenset()) -> Iterator[torch.Tensor]:
    """Logits of a prompt and of steps of one token; in `guarded` steps nothing may wait."""
    steps = steps_of(run)
    ids = torch.arange(2 * (PROMPT + steps), device=run.device).view(2, -1) * 37 % model.config.vocab_size
    arguments = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    yield model(input_ids=ids[:, :PROMPT], **arguments).logits
    for step in range(steps):
        token = ids[:, PROMPT + step : PROMPT + step + 1].contiguous()
        position = torch.full_like(token, PROMPT + step)
        with no_waiting(run, step in guarded):
            logits = model(input_ids=token, position_ids=position, **arguments).logits
        yield logits.clone()


@contextmanager
def no_waiting(run: Run, asked: bool) -> Iterator[None]:
    """Makes torch raise where the host waits for the device; does nothing where there is none."""
    if asked and run.cuda:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if asked and run.cuda:
            torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def check_decode(run: Run, graph: bool) -> Row:
    """Logits of a cache that keeps everything, against the full cache in the same dtype and in float32."""
    option = graph_setting(run, graph)
    model = small_llama(run, torch.bfloat16)
    exact_model = copy.deepcopy(model).float()
    outs = [torch.cat(list(decode(run, each, DynamicCache(config=each.config)))) for each in (exact_model, model)]
    with attach(model):
        got = torch.cat(list(decode(run, model, KaraCache(model, retention=1.0, **SMALL, **option))))
    return bounded(got, outs[1], outs[0].double())


@torch.no_grad()
def check_graph(run: Run) -> Row:
    """Captured steps against eager ones in float32, through several compressions: the same tokens kept."""
    graph_setting(run, True)
    model = small_llama(run, torch.float32)
    caches = [KaraCache(model, retention=0.25, **SMALL, cuda_graph=graph) for graph in (False, True)]
    eager, captured = (torch.cat(list(decode(run, model, cache))) for cache in caches)
    detach(model)
    kept = [
        [cache.kept_positions(layer, sequence, head) for layer in range(3) for sequence in (0, 1) for head in (0, 1)]
        for cache in caches
    ]
    same = all(torch.equal(one, other) for one, other in zip(*kept, strict=True))
    error = (captured - eager).abs().max().item()
    return {
        "passed": same and error <= 1e-4 * eager.abs().max().item(),
        "same_tokens_kept": same,
        "bit_for_bit": torch.equal(captured, eager),
        "error": error,
    }


def shared(distant_query: Any = "lead") -> PoDSharing:
    """One layer follows in one head, one in both."""
    return PoDSharing(lead=((0, 0), (0, 1), (0, 1)), sinks=2, recent=14, distant_query=distant_query)


@torch.no_grad()
def check_pod(run: Run, distant_query: str) -> Row:
    """Decode steps with shared keys in float32, by kernels against plain torch."""
    model = small_llama(run, torch.float32)
    with attach(model):
        got = torch.cat(list(decode(run, model, PoDCache(model, shared(distant_query)))))
        with backend("reference"):
            plain = torch.cat(list(decode(run, model, PoDCache(model, shared(distant_query)))))
    error = (got - plain).abs().max().item()
    return {"passed": error <= 1e-4 * plain.abs().max().item(), "error": error}


@torch.no_grad()
def check_pod_graph(run: Run) -> Row:
    """Captured steps with shared keys against eager ones in float32."""
    graph_setting(run, True)
    model = small_llama(run, torch.float32)
    caches = [PoDCache(model, shared(), cuda_graph=graph) for graph in (False, True)]
    eager, captured = (torch.cat(list(decode(run, model, cache))) for cache in caches)
    detach(model)
    error = (captured - eager).abs().max().item()
    return {"passed": error <= 1e-4 * eager.abs().max().item(), "error": error}


@torch.no_grad()
def check_waits(run: Run, graph: bool, sharing: PoDSharing | None = None) -> Row:
    """Steps that neither seal a window nor change the memory held must not wait for the device.

    A first cache shows which steps those are; a second one takes the same steps with torch's check switched on.
    """
    option = graph_setting(run, graph)
    model = small_llama(run, torch.bfloat16)
    option |= {"retention": 0.25, "sharing": sharing} | SMALL
    with attach(model):
        cache = KaraCache(model, **option)
        held, kept = [], []
        for _ in decode(run, model, cache):
            report = cache.report()
            held.append(report.resident_bytes)
            kept.append(int(report.kept.max()))
        steps = steps_of(run)
        quiet = frozenset(n for n in range(steps) if held[n + 1] == held[n] and kept[n + 1] == kept[n] + 1)
        if not run.cuda:
            raise Skip("not available on a CPU")
        for _ in decode(run, model, KaraCache(model, **option), guarded=quiet):
            pass
    return {"passed": len(quiet) > steps // 2, "steps": steps, "steps_that_must_not_wait": len(quiet)}
