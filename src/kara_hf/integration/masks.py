"""What an attention mask says of the tokens of one whole sequence."""

import torch
from torch.nn.attention.flex_attention import BlockMask

from .attention import real_tokens

AttentionMask = torch.Tensor | BlockMask | None  # whatever form Transformers gives it


def causal_tokens(attention_mask: AttentionMask, tokens: int) -> torch.Tensor | None:
    """Which columns of a causal mask hold tokens.

    Args:
        attention_mask: as `real_tokens` takes it.
        tokens: S.

    Returns:
        ``[B, S]`` bool, or None where every column is a token.

    Raises:
        ValueError: the mask is not that of one causal sequence in each row, or as `real_tokens`.
    """
    real = real_tokens(attention_mask, tokens)
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4:
        mask = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
        there = torch.ones(len(mask), tokens, dtype=torch.bool, device=mask.device) if real is None else real
        expected = (there.cumsum(1) * there).sum()  # each token sees itself and those before it
        if bool(((mask[:, 0] & there[:, :, None]).sum() != expected).item()):
            raise ValueError(
                "the attention mask is not that of one causal sequence in each row (several documents packed with "
                "position ids, or both directions), which shared keys do not support; pack without resetting positions"
            )
    return real
