"""Models and sharings that the tests of PoDCache run over."""

import torch
from support import architectures
from support.architectures import _small
from transformers import AutoConfig, AutoModelForCausalLM

from kara_hf import PoDSharing

LAYERS, HEADS = 6, 2


LEAD = (
    (0, 0),
    (0, 1),
    (0, 1),
    (3, 1),
    (3, 1),
    (5, 1),
)  # layer 3 leads one head, 5 leads itself in one and follows in one


SHARED = PoDSharing(lead=LEAD, sinks=2, recent=5)


LONG = {"max_new_tokens": 28, "do_sample": False}


def deep(model_type: str = "llama", **changes):
    """A random model of six layers."""
    config = AutoConfig.for_model(**_small(model_type, num_hidden_layers=LAYERS, **changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        architectures._enliven(model)
    generation = model.generation_config
    generation.bos_token_id = generation.eos_token_id = None
    generation.pad_token_id = 0
    return model.eval()


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 2e-4) -> None:
    assert a.shape == b.shape and (a - b).abs().max() < tolerance, float((a - b).abs().max())
