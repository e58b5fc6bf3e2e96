"""The precision that attention works in: that of `scaled_dot_product_attention` in the same context.

Queries, keys and values may each have a dtype of their own. Logits, softmax and sums are float32 in any case.

- Under `torch.autocast` query, keys and values are rounded to its dtype first, and the result has that dtype. float64
  is left alone. The products of an op are not rounded any further.
- Elsewhere nothing is rounded before the result, which has the query's dtype.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import reduce, wraps
from inspect import signature
from typing import ParamSpec, TypeVar

import torch

from .rows import Rows

P = ParamSpec("P")
R = TypeVar("R")
Operand = TypeVar("Operand")


def common_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """The smallest dtype that holds what all of `tensors` hold."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which products on `device` are those of their operands' dtypes."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def as_sdpa(operands: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes an op work in the precision of `scaled_dot_product_attention`.

    Its first `operands` arguments are what attention is made of: tensors, `Rows` or lists of `Rows`, the first one a
    tensor. All else is left as it is. With 0 nothing is rounded, and products under autocast are exact all the same.
    """

    def decorate(op: Callable[P, R]) -> Callable[P, R]:
        names = tuple(signature(op).parameters)
        rounded = names[:operands]

        @wraps(op)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            query = args[0] if args else kwargs[names[0]]
            assert isinstance(query, torch.Tensor)
            device = query.device.type
            if not torch.is_autocast_enabled(device):
                return op(*args, **kwargs)
            dtype = torch.get_autocast_dtype(device)
            given = [_read(part, dtype) if place < operands else part for place, part in enumerate(args)]
            named = {name: _read(part, dtype) if name in rounded else part for name, part in kwargs.items()}
            with torch.autocast(device, enabled=False):
                return op(*given, **named)  # type: ignore[arg-type]

        return run

    return decorate


def _read(operand: Operand, dtype: torch.dtype) -> Operand:
    """`operand` as attention reads it under autocast to `dtype`."""
    if isinstance(operand, torch.Tensor):
        return operand if operand.dtype == torch.float64 else operand.to(dtype)  # type: ignore[return-value]
    if isinstance(operand, Rows):
        return replace(operand, read_as=dtype)
    assert isinstance(operand, list)
    return [_read(part, dtype) for part in operand]  # type: ignore[return-value]
