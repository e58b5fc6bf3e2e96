"""Engines of tiny models: what is asked of them, what a cache of ours answers, and that nothing is lost."""

import contextlib
import inspect
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from kara_hf import KaraCache, KVCompressCache, detach
from kara_hf.serving.engine import Engine

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
KARA = {"retention": 0.5, "window": 8, "recent": 3, "anchor_share": 0.5}


def make(config_class=LlamaConfig, seed=0, **changes):
    torch.manual_seed(seed)
    config = config_class(**SIZES | {"num_hidden_layers": 2} | changes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def prompts(count, seed=1, shortest=3, longest=30):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(1, 97, (length,), generator=generator).tolist() for length in lengths]


def generation(tokens=40, children=0):
    config = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    config.num_return_sequences = 1 + children  # of greedy ones all are equal, which no user wants and a test does
    return config


def pool(blocks=400, page=4, batch=256, **changes):
    return ContinuousBatchingConfig(page_size=page, num_blocks=blocks, max_batch_tokens=batch, **changes)


def batch(model, inputs, tokens=40, config=None, children=0):
    detach(model)
    out = model.generate_batch(
        inputs, generation_config=generation(tokens, children), continuous_batching_config=config or pool()
    )
    return [result.generated_tokens for result in out.values()]


def single(model, prompt, tokens=40, **kara):
    cache = KaraCache(model, **{"block_size": 4} | kara)
    ids = torch.tensor([prompt])
    out = model.generate(ids, **{CACHE: cache}, generation_config=generation(tokens))
    detach(model)
    return out[0, len(prompt) :].tolist()


def cached(model, cache, past, new, tokens=30):
    """The answer of a cache that has seen the past, but for its last token."""
    prompt = past + new
    out = model.generate(torch.tensor([prompt]), **{CACHE: cache}, generation_config=generation(tokens))
    return out[0, len(prompt) :].tolist()


def kept(model, said, tokens=30, **kara):
    """The answers of one conversation over a `KaraCache` that is kept between turns."""
    cache, past, answers = KaraCache(model, **{"block_size": 4} | kara), [], []
    for new in said:
        answers.append(cached(model, cache, past, new, tokens))
        past = past + new + answers[-1]
    detach(model)
    return answers


def budgeted(model, prompt, most, tokens=16, **settings):
    """The answer over `KVCompressCache` that keeps at most so many tokens of the prompt, in blocks of one."""
    settings = {"block_size": 1, "accumulate": False, "continual": False} | settings
    cache = KVCompressCache(model, max_cache_tokens=most, **settings)
    out = model.generate(torch.tensor([prompt]), **{CACHE: cache}, generation_config=generation(tokens))
    detach(model)
    return out[0, len(prompt) :].tolist()


def audit(engine: Engine) -> None:
    full, ledger = engine.pool.allocator, engine.pool.allocator.ledger
    holders = Counter(block for table in full.block_table.values() for block in table)
    for block, count in holders.items():
        assert ledger.shared_ref_counts.get(block, 1) == count
        assert block not in ledger.cached_blocks
    held = set(engine.queries._used)
    assert not held & (holders.keys() | ledger.cached_blocks.keys())
    assert len(holders) + len(ledger.cached_blocks) + len(held) + engine.pool.free_blocks() == full.num_blocks
    assert {block: h for h, block in ledger.hash_to_block.items()} == ledger.block_to_hash
    assert all(key in full.block_table for key in engine.pasts._pasts) and len(engine.pasts) <= engine.pasts.most
    slots = [slot for _, request in engine.requests.known.values() for slot in request.slots + request.voters]
    assert len(slots) == len(set(slots)) == engine.queries.used
    for state, request in engine.requests.known.values():
        if state.request_id in engine.scheduler.active_requests:
            assert request.stored == state.position_offset
            assert len(full.block_table[request.key]) >= -(-request.stored // engine.pool.page)
            if engine.compressor.policy.needs_queries:
                sampling = engine.compressor.sampling
                held = request.open if sampling.every else sampling.place(request.open - 1) + 2
                assert len(request.slots) >= held * (request.open > 0)


def ended(engine: Engine) -> None:
    """Nothing is held by any request, nor behind."""
    while engine.pasts.forget_oldest():
        pass
    assert not engine.pool.allocator.block_table and not engine.requests.known
    assert engine.queries.nbytes == engine.queries.used == 0
    engine.cache.evict_cached_blocks()
    assert engine.pool.free_blocks() == engine.pool.num_blocks


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Server:
    """`kara-hf serve` in a process of its own, up when the block is entered."""

    def __init__(self, port: int, *options: str):
        self.said = tempfile.TemporaryFile("w+")
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "kara_hf", "serve", "--port", str(port), "--device", "cpu", *options]
        self.process = subprocess.Popen(
            command,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=self.said,  # a pipe that nobody reads is full one day
            stderr=subprocess.STDOUT,
            text=True,
        )

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=5) as answer:
            return answer.read().decode()

    def __enter__(self) -> "Server":
        while True:
            assert self.process.poll() is None, self.output()
            with contextlib.suppress(OSError):
                self.get("/health")
                return self
            time.sleep(0.1)

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)
        self.said.close()

    def output(self) -> str:
        self.said.seek(0)
        return self.said.read()

    def metrics(self) -> dict[str, float]:
        lines = [line.split() for line in self.get("/metrics").splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines}
