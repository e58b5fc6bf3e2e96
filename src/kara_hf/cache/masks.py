"""What a mask on a later step says: which new columns hold tokens, and which of those seen before may be looked at."""

from dataclasses import dataclass
from typing import Any

import torch

from ..integration.attention import as_visible


@dataclass(frozen=True)
class Visibility:
    """Who sees whom in a step whose mask is not that of causal sequences without gaps.

    Attributes:
        mask: which columns each new query may see, ``[B, S, C]`` bool.
        columns: column of a sequence's first, second, ... token, ``[B, C]`` int64; behind its tokens anything.
        uniform: whether all it does is to hide tokens seen before, the same ones from every query.
    """

    mask: torch.Tensor
    columns: torch.Tensor
    uniform: bool

    def of(self, positions: torch.Tensor) -> torch.Tensor:
        """Which tokens of true `positions` ``[B, H, T]`` each new query may see: ``[B, H, S, T]`` bool."""
        heads, queries = positions.shape[1], self.mask.shape[1]
        columns = self.columns.to(positions.device)
        places = positions.long().clamp(0, columns.shape[1] - 1).flatten(1)
        index = columns.gather(1, places).unflatten(1, (heads, -1))
        visible = self.mask.to(positions.device)[:, None].expand(-1, heads, -1, -1)
        return visible.gather(3, index[:, :, None].expand(-1, -1, queries, -1))

    def hidden(self, positions: torch.Tensor) -> torch.Tensor:
        """Which tokens seen before, of true `positions` ``[B, H, T]``, no query may see, ``[B, H, T]`` bool."""
        return ~self.of(positions)[:, :, -1]


@dataclass(frozen=True)
class StepMask:
    """What a mask says of a step: `real`, which new columns hold tokens ``[B, S]`` bool (None: all), and `visibility`
    (None: tokens see all tokens up to themselves).
    """

    real: torch.Tensor | None = None
    visibility: Visibility | None = None


def flattened(attention_mask: Any) -> Any:
    """A mask ``[B, 1, 1, C]`` of bool for one new token as ``[B, C]``; any other as it is."""
    one = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4 and attention_mask.shape[1:3] == (1, 1)
    return attention_mask[:, 0, 0] if one and attention_mask.dtype == torch.bool else attention_mask


def read_mask(
    attention_mask: Any, batch: int, seen: int, new: int, padding: torch.Tensor | None, model: str
) -> StepMask:
    """Reads the mask of a later step. Waits for the device.

    Args:
        attention_mask: None; ``[B, C]`` bool over all tokens seen, the new ones last, which is causal; or as
            `as_visible` takes it.
        batch: sequences.
        seen: columns seen before.
        new: S, columns of the step; C is both together.
        padding: which columns seen before hold tokens, as in `CacheState`.
        model: its name, for messages.

    Raises:
        ValueError: the mask is of another shape, adds a bias, differs between heads, or shows columns again that were
            padding when they were seen.
    """
    if attention_mask is None:
        return StepMask()
    total = seen + new
    attention_mask = flattened(attention_mask)
    flat = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2 and attention_mask.dtype == torch.bool
    shape = tuple(getattr(attention_mask, "shape", ()))
    if not shape or shape[-1] != total or not (flat or (len(shape) == 4 and shape[-2] == new)):
        raise ValueError(
            f"the attention mask that reaches the attention of {model} is not made of 0 and 1 for each of the {total} "
            f"tokens seen (its shape is {shape}; ALiBi, a bias or a hand-made mask?), which a compressed cache would "
            "lose; pass a 2-D mask over all tokens to a model with rotary or no position encoding"
        )
    if flat:
        if padding is None and bool(attention_mask.all()):
            return StepMask()
        visible, past, real = None, attention_mask[:, :seen], attention_mask[:, seen:]
    else:
        visible = as_visible(attention_mask, total).expand(batch, -1, -1)
        past, among = visible[:, :, :seen].any(1), visible[:, :, seen:]
        real = among[:, -1] | among.any(1)
    stored = torch.ones_like(past)
    if padding is not None:
        stored[:, : padding.shape[1]] = padding.to(past.device)
    again = (past & ~stored).any(0)
    if bool(again.any()):
        raise ValueError(
            f"the attention mask shows column {int(again.nonzero()[0])}, which was padding when it was seen and was "
            "not stored; give it 0 there again, or reset() the cache and read everything anew"
        )
    whole = None if bool(real.all()) else real
    unchanged = torch.equal(past, stored)
    if visible is None and unchanged:
        return StepMask(whole)
    tokens = torch.cat([stored, real], 1)
    causal = torch.ones(new, total, dtype=torch.bool, device=past.device).tril(seen)
    plain = torch.cat([past, real], 1)[:, None] & causal
    uniform = visible is None or bool((visible == plain)[real].all())
    if uniform and unchanged:
        return StepMask(whole)
    columns = (~tokens).to(torch.int8).argsort(dim=1, stable=True)
    return StepMask(whole, Visibility(plain if visible is None else visible, columns, uniform))
