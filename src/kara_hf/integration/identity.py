"""What tells a model from others: everything that a forward depends on."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

SAMPLE = 256  # numbers of every weight that its fingerprint is made from, evenly spread

# Where a model lies, who wrote it and how it is attached change nothing.
_NOT_OF_THE_MODEL = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}


def short_digest(content: Any) -> str:
    """The first 16 digits of the SHA-256 of bytes, or of a value's form in JSON."""
    raw = content if isinstance(content, bytes) else json.dumps(content, sort_keys=True, default=str).encode()
    return hashlib.sha256(raw).hexdigest()[:16]


def forward_identity(model: Any) -> dict[str, Any]:
    """Of a model, the weights apart: what a forward depends on."""
    config = {name: value for name, value in model.config.to_diff_dict().items() if name not in _NOT_OF_THE_MODEL}
    return {"dtype": str(model.dtype).removeprefix("torch."), "config": short_digest(config)}


def weights_fingerprint(model: PreTrainedModel, dtype: torch.dtype | None = None) -> str:
    """A digest of every weight of a model; see `fingerprint`."""
    return fingerprint(model.named_parameters(), dtype)


def fingerprint(weights: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype | None = None) -> str:
    """A digest of names, shapes, dtypes and `SAMPLE` numbers of every weight, the same on every device.

    Another training has moved some of these numbers; that a few others were edited does not show. With a `dtype` the
    numbers are read in it, and what was loaded in another dtype without loss has the same digest.
    """
    total = hashlib.sha256()
    for name, weight in weights:
        total.update(f"{name} {tuple(weight.shape)} {dtype or weight.dtype}".encode())
        if weight.numel() and not weight.is_meta:
            flat = getattr(weight, "to_local", lambda weight=weight: weight)().detach().flatten()
            sample = flat[:: max(1, len(flat) // SAMPLE)].cpu().to(dtype or weight.dtype).contiguous()
            total.update(sample.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
