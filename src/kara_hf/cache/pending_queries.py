"""Queries of a prompt or turn that votes wait for, until it is cut (KV-Compress)."""

import numpy as np
import torch

from ..storage import MemoryMeter, Saved


class PendingQueries:
    """What one layer holds of a prompt or turn that is not cut yet: its newest queries ``[B, Hq, w, D]``, in order.

    They are about to go, like the prompt that they belong to, and like it they are not counted against a cap.
    """

    def __init__(self, meter: MemoryMeter):
        self.meter = meter
        self.undecided = 0  # columns of the prompt or turn
        self.queries: torch.Tensor | None = None
        self.valid: torch.Tensor | None = None  # [B, w] bool
        self._fresh: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def query_bytes(self) -> int:
        return sum(held.nbytes for held in (self.queries, self.valid) if held is not None)

    @torch.inference_mode(False)
    def add(self, queries: torch.Tensor, real: torch.Tensor | None, window: int) -> None:
        """The newest `window` of those held and ``[B, Hq, S, D]`` new ones are held once `commit` follows."""
        if real is None:
            queries = queries[:, :, -window:]
            real = torch.ones(len(queries), queries.shape[2], dtype=torch.bool, device=queries.device)
        if self.queries is not None and self.valid is not None:
            queries = torch.cat([self.queries, queries], dim=2)
            real = torch.cat([self.valid, real], dim=1)
        newest = real.to(torch.int8).argsort(dim=1, stable=True)[:, -window:]  # what is real comes last, in order
        index = newest[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3])
        self._fresh = queries.gather(2, index), real.gather(1, newest)

    def commit(self, columns: int) -> None:
        """The step of `add` is done; it had so many columns."""
        self.undecided += columns
        if self._fresh is not None:
            self._replace(*self._fresh)
            self._fresh = None

    def of(self, sequence: int) -> torch.Tensor | None:
        """Queries of one sequence, ``[Hq, n, D]``, or None if there are none."""
        if self.queries is None or self.valid is None or not self.valid[sequence].any():
            return None
        return self.queries[sequence, :, self.valid[sequence]]

    def crop(self, tokens: np.ndarray) -> None:
        """Takes off the newest `tokens` ``[B]``, one for each column; what voted before them does not come back."""
        self.undecided = max(0, self.undecided - int(tokens.max()))
        if not self.undecided:
            self.close()
        elif self.valid is not None:
            behind = self.valid.sum(1, keepdim=True) - self.valid.cumsum(1)
            self.valid &= behind >= torch.from_numpy(tokens).to(behind.device)[:, None]

    @torch.inference_mode(False)
    def fork(self, index: np.ndarray) -> None:
        if self.queries is not None and self.valid is not None:
            chosen = torch.from_numpy(index.astype(np.int64)).to(self.queries.device)
            self._replace(self.queries.index_select(0, chosen), self.valid.index_select(0, chosen))

    def fork_bytes(self, index: np.ndarray) -> int:
        return 0

    def saved(self) -> Saved:
        return {"undecided": self.undecided, "queries": self.queries, "valid": self.valid}

    @torch.inference_mode(False)
    def restore(self, saved: Saved, device: torch.device, meter: MemoryMeter) -> None:
        self.undecided = int(saved["undecided"])
        if saved["queries"] is not None:
            self._replace(*(saved[name].to(device, copy=True) for name in ("queries", "valid")))

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return ()

    def discard_step(self) -> None:
        self._fresh = None

    def close(self) -> None:
        for held in (self.queries, self.valid):
            if held is not None:
                self.meter.uncount_borrowed(held)
        self.queries = self.valid = None

    def _replace(self, queries: torch.Tensor, valid: torch.Tensor) -> None:
        self.close()
        self.queries, self.valid = self.meter.borrow(queries), self.meter.borrow(valid)
