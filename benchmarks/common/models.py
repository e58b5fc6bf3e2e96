"""The models of benchmarks on a CPU: one of random weights, the bundled one, and a deep one of the tests."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from kara_hf.bundled import BUNDLED_MODEL

TINY = BUNDLED_MODEL
DEEP = Path(__file__).parents[2] / "tests" / "data" / "deep_reasoner"  # its layers are alike, three by three


def random_llama(layers: int = 4, heads: int = 2) -> Any:
    """A Llama of float32 random weights: 8 query heads and `heads` KV heads of size 64, hidden size 512."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=heads,
        head_dim=64,
        max_position_embeddings=65536,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def multiply_in_float32(model: Any) -> Any:
    """`model` in a dtype that this CPU multiplies slowly, with weights of linear layers made float32.

    What goes in and comes out is rounded to the dtype as before. So only sums differ, which every library adds up in
    float32 too, in an order of its own. Takes twice the memory.
    """

    class Wide(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return F.linear(input.float(), self.weight, self.bias).to(input.dtype)

    for layer in model.modules():
        if type(layer) is torch.nn.Linear and layer.weight.dtype in (torch.bfloat16, torch.float16):
            for name, weight in layer.named_parameters(recurse=False):
                setattr(layer, name, torch.nn.Parameter(weight.float(), requires_grad=False))
            layer.__class__ = Wide
    return model
