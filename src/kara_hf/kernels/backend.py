"""Which code runs an op: its Triton kernel on a GPU that can run it, else plain torch.

``KARA_BACKEND=reference`` chooses plain torch everywhere, ``KARA_BACKEND=triton`` the kernels or an error. The kernels
agree with their references under Triton's interpreter and compile for sm_80 and sm_90 without spills; no GPU has run
them yet.
"""

import os
import warnings
from functools import lru_cache

import torch

MAX_HEAD_SIZE = 256
OLDEST_TRITON = (3, 6)
OLDEST_GPU = (8, 0)


def use_triton(tensor: torch.Tensor, *head_sizes: int, dtypes: tuple[torch.dtype, ...] = ()) -> bool:
    """Whether the Triton kernel runs an op on `tensor`, with heads of `head_sizes`, beside others of `dtypes`.

    Any mixture of dtypes that have a kernel is taken: elements are cast where they are loaded. Left to choose, a GPU
    that cannot run the kernel warns once of each reason and runs plain torch.

    Raises:
        ValueError: ``KARA_BACKEND`` is none of "auto", "reference" and "triton", or asks for kernels of another dtype
            or size.
        RuntimeError: ``KARA_BACKEND=triton`` cannot be had here.
    """
    asked = os.environ.get("KARA_BACKEND") or "auto"
    if asked == "reference":
        return False
    if asked not in ("auto", "triton"):
        raise ValueError(f"KARA_BACKEND={asked!r} is not known; set it to 'auto', 'reference' or 'triton', or unset it")
    if asked == "auto" and tensor.device.type != "cuda":
        return False
    missing = _missing(tensor.device)
    reason = missing or _unfit((tensor.dtype, *dtypes), max(head_sizes))
    if reason is None:
        return True
    if asked == "auto":
        _warn_once(reason)
        return False
    error = RuntimeError if missing else ValueError
    raise error(f"KARA_BACKEND=triton, but {reason}. KARA_BACKEND=reference chooses plain torch")


@lru_cache
def _missing(device: torch.device) -> str | None:
    """What kernels on `device` lack, and the remedy."""
    return _no_triton() or _not_on(device)


def _no_triton() -> str | None:
    try:
        import triton
    except ImportError:
        return "triton is not installed; pip install triton"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        return f"triton {triton.__version__} is older than {'.'.join(map(str, OLDEST_TRITON))}; pip install -U triton"
    return None


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


def _unfit(dtypes: tuple[torch.dtype, ...], head_size: int) -> str | None:
    for dtype in dtypes:
        if dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"no kernel is made for {dtype}; float16, bfloat16 and float32 have one"
    if head_size > MAX_HEAD_SIZE:
        return f"no kernel is made for heads of size {head_size}, more than {MAX_HEAD_SIZE}"
    return None


@lru_cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"kara_hf runs plain torch on a GPU instead of Triton kernels: {reason}. KARA_BACKEND=reference chooses plain "
        "torch without this warning.",
        stacklevel=3,
    )
