"""A small model, samples and settings of adaptation, and the attention that it should train with."""

import json
import os

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kara_hf import PoDSharing
from kara_hf.pod.adapt import AdaptConfig, adapt

SHARED = PoDSharing(lead=((0, 0), (0, 1), (0, 1), (3, 1)), sinks=2, recent=4)
LENGTH, VOCAB = 24, 48
QUICK = {"steps": 4, "held_out": 2, "lr": 1e-2, "rank": 4}


def build_model(**changes):
    """A random Llama of four layers, 4 query heads on 2 KV heads."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        head_dim=8,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        **{"num_key_value_heads": 2, **changes},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = LlamaForCausalLM(config)
        for weight in model.parameters():  # attention of fresh weights is all but uniform
            if weight.ndim == 2:
                torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


def numbers(count=8, length=LENGTH, seed=0):
    """Samples in which every token is the one before it plus a step of the sample's own."""
    generator = torch.Generator().manual_seed(seed)
    start, step = (torch.randint(1, VOCAB, (count, 1), generator=generator) for _ in range(2))
    return list((start + step * torch.arange(length)) % VOCAB)


def reference_logits(model, sharing, ids):
    """A Llama in plain torch whose followers take the logits of distant tokens from their leads."""
    config, decoder = model.config, model.model
    batch, length = ids.shape
    at, place = torch.arange(length)[:, None], torch.arange(length)[None]
    distant = (place >= sharing.sinks) & (place <= at - sharing.recent)
    hidden = decoder.embed_tokens(ids)
    cos, sin = decoder.rotary_emb(hidden, torch.arange(length)[None])
    logits = []
    for layer, heads in zip(decoder.layers, sharing.lead, strict=True):
        normed, attention = layer.input_layernorm(hidden), layer.self_attn
        query, key, value = (
            project(normed).view(batch, length, -1, config.head_dim).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        own = query @ key.repeat_interleave(2, 1).transpose(-1, -2) * config.head_dim**-0.5
        logits.append(own)
        leads = torch.stack([logits[heads[head // 2]][:, head] for head in range(4)], 1)
        mixed = torch.where(distant, leads, own).masked_fill(place > at, -torch.inf)
        out = mixed.softmax(-1) @ value.repeat_interleave(2, 1)
        hidden = hidden + attention.o_proj(out.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(decoder.norm(hidden))


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def adapt_as_process(rank, processes, port, settings, output):
    """Adapts as one of several processes on this machine."""
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()} | {"ACCELERATE_USE_CPU": "true"}
    adapt(build_model(), SHARED, numbers(9), AdaptConfig(**settings), output)
