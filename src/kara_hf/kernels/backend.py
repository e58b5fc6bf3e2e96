"""Which code runs an op: plain torch, or with ``KARA_BACKEND=triton`` in the environment its Triton kernel.

The kernels agree with their references under Triton's interpreter and compile for sm_80 and sm_90 without spills, but
no GPU has run them yet. Until one has, they run only where they are asked for.
"""

import os
from functools import lru_cache

import torch

MAX_HEAD_SIZE = 256
OLDEST_TRITON = (3, 6)
OLDEST_GPU = (8, 0)


def use_triton(tensor: torch.Tensor, *head_sizes: int) -> bool:
    """Whether the Triton kernel runs an op on `tensor`, with heads of `head_sizes`.

    Raises:
        ValueError: ``KARA_BACKEND`` is neither "reference" nor "triton", or asks for kernels of another dtype or size.
        RuntimeError: ``KARA_BACKEND=triton`` cannot be had here.
    """
    asked = os.environ.get("KARA_BACKEND") or "reference"
    if asked == "reference":
        return False
    if asked != "triton":
        raise ValueError(f"KARA_BACKEND={asked!r} is not known; set it to 'reference' or 'triton', or unset it")
    if missing := _no_triton() or _not_on(tensor.device):
        raise RuntimeError(f"KARA_BACKEND=triton, but {missing}")
    if unfit := _unfit(tensor.dtype, max(head_sizes)):
        raise ValueError(f"KARA_BACKEND=triton, but {unfit}; unset it or set it to 'reference'")
    return True


@lru_cache
def _no_triton() -> str | None:
    try:
        import triton
    except ImportError:
        return "triton is not installed; pip install triton"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        return f"triton {triton.__version__} is older than {'.'.join(map(str, OLDEST_TRITON))}; pip install -U triton"
    return None


@lru_cache
def _not_on(device: torch.device) -> str | None:
    if device.type != "cuda":
        import triton

        if device.type == "cpu" and triton.knobs.runtime.interpret:
            return None
        return f"its kernels run on {device.type} tensors only under Triton's interpreter: TRITON_INTERPRET=1 on a CPU"
    if torch.version.cuda is None:
        return "its kernels are made for NVIDIA GPUs"
    if torch.cuda.get_device_capability(device) < OLDEST_GPU:
        return f"its kernels need compute capability {'.'.join(map(str, OLDEST_GPU))}"
    return None


def _unfit(dtype: torch.dtype, head_size: int) -> str | None:
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"no kernel is made for {dtype}"
    if head_size > MAX_HEAD_SIZE:
        return f"no kernel is made for heads of size {head_size}, more than {MAX_HEAD_SIZE}"
    return None
