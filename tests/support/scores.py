"""A score of one's own, as users add them."""

import torch

from kara_hf.policy import SCORES, Window, register_score

VALUE_NORM = "value-norm"

if VALUE_NORM not in SCORES:

    @register_score(VALUE_NORM, values=True)
    def value_norm(window: Window) -> torch.Tensor:
        assert window.values is not None
        return window.values.float().norm(dim=-1)
