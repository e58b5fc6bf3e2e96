"""What a holder of tensors gives to be saved, and takes back: `saved()` and `restore(saved)` of the classes beside."""

from typing import Any

import numpy as np
import torch

from .meter import MemoryMeter

Saved = dict[str, Any]  # by name: tensors, arrays, plain values, and more of these; arrays come back as tensors


def check_saved(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...], dtype: torch.dtype) -> None:
    """Raises ValueError if a saved tensor is not of this dtype and shape, in which None stands for any size."""
    same = len(shape) == tensor.ndim and all(n in (None, m) for n, m in zip(shape, tensor.shape, strict=True))
    if not same or tensor.dtype != dtype:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and {tensor.dtype} instead of {shape} and {dtype}, with None for "
            "any size"
        )


def restored_array(saved: Saved, name: str, like: np.ndarray) -> np.ndarray:
    """The saved array of this name. Raises ValueError if it has not the shape and dtype of `like`."""
    check_saved(name, saved[name], like.shape, torch.from_numpy(like).dtype)
    return saved[name].numpy().copy()


@torch.inference_mode(False)
def restored_tensor(
    tensor: torch.Tensor, device: torch.device, meter: MemoryMeter, old: torch.Tensor | None = None
) -> torch.Tensor:
    """A counted copy on `device`, in the place of `old`. Raises `PoolExhausted`."""
    meter.require(tensor.nbytes - (0 if old is None else old.nbytes))
    fresh = meter.count(tensor.to(device, copy=True))
    if old is not None:
        meter.uncount(old)
    return fresh
