"""The one place that counts bytes: every tensor a cache holds is allocated and dropped through a `MemoryMeter`."""

from collections.abc import Sequence

import torch


class PoolExhausted(RuntimeError):
    """The next allocation would pass `max_bytes`; the cache is as it was before."""


class MemoryMeter:
    """Counts the bytes that the stores of one cache hold.

    Attributes:
        held: bytes held now, unused room included.
        lent: those of them that the cap does not count, because the model made them and they are about to go.
        peak: the most bytes held at any moment, old and new copy of a growing pool counted together.
        max_bytes: cap on `held` without `lent`, or None.
    """

    def __init__(self, max_bytes: int | None = None):
        self.max_bytes = max_bytes
        self.held = 0
        self.lent = 0
        self.peak = 0

    def require(self, more: int) -> None:
        """Raises `PoolExhausted` if holding `more` bytes in addition would pass the cap."""
        held = self.held - self.lent
        if more > 0 and self.max_bytes is not None and held + more > self.max_bytes:
            raise PoolExhausted(
                f"the cache holds {held} bytes and needs {more} more, past max_bytes={self.max_bytes}; raise "
                "max_bytes, lower retention, window or max_cache_tokens, or shorten the batch or the prompt"
            )

    @torch.inference_mode(False)  # what is held is written again, perhaps outside inference mode
    def zeros(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A counted tensor of zeros, so that a slot never written is finite and cannot spoil a masked product."""
        return self.count(torch.zeros(*shape, dtype=dtype, device=device))

    def count(self, tensor: torch.Tensor) -> torch.Tensor:
        """Counts a tensor that someone else allocated, and returns it."""
        self.held += tensor.nbytes
        self.peak = max(self.peak, self.held)
        return tensor

    def borrow(self, tensor: torch.Tensor) -> torch.Tensor:
        """Counts a tensor of the model, outside the cap, and returns it; a view of something larger is copied."""
        if tensor.untyped_storage().nbytes() > tensor.nbytes:
            tensor = tensor.clone()
        self.lent += tensor.nbytes
        return self.count(tensor)

    def uncount_borrowed(self, tensor: torch.Tensor) -> None:
        """Stops counting a borrowed tensor; the caller lets go of it."""
        self.lent -= tensor.nbytes
        self.uncount(tensor)

    def uncount(self, tensor: torch.Tensor) -> None:
        """Stops counting `tensor`; the caller lets go of it."""
        self.held -= tensor.nbytes
