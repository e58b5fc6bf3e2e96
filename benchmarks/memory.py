"""The most that a cache holds while `generate` runs."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import StoppingCriteria


class Memory(StoppingCriteria):
    """Notes the most bytes that `held` gives while a cache decodes. Stops nothing.

    The first step is left out: a prompt that is to be cut is still there then, whole.
    """

    def __init__(self, held: Callable[[], int]):
        self.held, self.most, self.steps = held, 0, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.steps += 1
        if self.steps > 1:
            self.most = max(self.most, self.held())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
