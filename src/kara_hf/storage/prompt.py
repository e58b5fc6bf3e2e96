"""A prompt as the model made it, dense, held until it is known what each row keeps of it."""

import numpy as np
import torch

from .meter import MemoryMeter
from .saved import Saved, check_saved

_PARTS = ("keys", "values", "positions", "real", "metric")


class Prompt:
    """Dense keys ``[B, H, S, Dk]``, values ``[B, H, S, Dv]`` and metric ``[B, H, S]`` of a first forward.

    Keys and values are the model's own tensors, not copies; all is counted as held, but not against a cap. Rows are
    those of a `Store`; slots are the columns that hold a token.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    real: torch.Tensor
    metric: torch.Tensor

    def __init__(self, meter: MemoryMeter):
        self.meter = meter

    @torch.inference_mode(False)
    def append(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        real: torch.Tensor | None = None,
        *,
        sync: bool = True,
    ) -> None:
        """Takes the prompt, as `Store.append`; once, and not without looking."""
        self.keys, self.values = (self.meter.borrow(part) for part in (keys, values))
        batch, heads, columns = keys.shape[:3]
        if real is None:
            real = torch.ones(batch, columns, dtype=torch.bool, device=keys.device)
        # All layers of a step have the same positions and padding; a prompt that is cropped changes its own.
        self.positions, self.real = (self.meter.borrow(part.clone()) for part in (positions, real))
        self.metric = self.meter.borrow(keys.new_zeros(batch, heads, columns, dtype=torch.float32))

    @property
    def _tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(getattr(self, name) for name in _PARTS)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, ``[B, H]`` int32."""
        counts = self.real.sum(1, keepdim=True, dtype=torch.int32)
        return counts.expand(-1, self.keys.shape[1]).cpu().numpy()

    @property
    def device(self) -> torch.device:
        return self.keys.device

    @property
    def paged_bytes(self) -> int:
        """Bytes in blocks, tables and lengths, which count against a cap: none."""
        return 0

    @property
    def sizes(self) -> tuple[int, int]:
        """Dk and Dv."""
        return self.keys.shape[-1], self.values.shape[-1]

    @property
    def slot_bytes(self) -> tuple[int, int]:
        """Bytes of one token's key and of its value in one row."""
        return self.keys.shape[-1] * self.keys.itemsize, self.values.shape[-1] * self.values.itemsize

    @property
    def stored_bytes(self) -> int:
        """Bytes of the keys and values of the tokens."""
        return int(self.lengths.sum()) * sum(self.slot_bytes)

    def keys_of(self, sequence: int) -> torch.Tensor:
        """Keys of all heads of a sequence, ``[H, T, Dk]``, in order."""
        return self.keys[sequence][:, self.real[sequence]]

    def add_metric(self, sequence: int, metric: torch.Tensor) -> None:
        """Adds to the metric of a sequence, ``[H, T]`` float32 in order."""
        self.metric[sequence][:, self.real[sequence]] += metric

    def ranked(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Metric and true position of every slot, ``[B, H, S]``; behind a row's length anything."""
        order = self._order()
        return self.metric.gather(2, order), self.positions[:, None].expand(self.metric.shape).gather(2, order)

    def kept(self, dropped: torch.Tensor | None) -> torch.Tensor:
        """Which columns stay, ``[B, H, S]`` bool, where slots `dropped` ``[B, H, S or more]`` go; None: no slot."""
        if dropped is None:
            return self.real[:, None].expand(self.metric.shape)
        order = self._order()
        gone = torch.zeros_like(order, dtype=torch.bool).scatter_(2, order, dropped[:, :, : order.shape[2]])
        return self.real[:, None] & ~gone

    def _order(self) -> torch.Tensor:
        """Column of every slot, ``[B, H, S]`` int64; padding behind."""
        return (~self.real).to(torch.int8).argsort(dim=1, stable=True)[:, None].expand(self.metric.shape)

    def sync_lengths(self) -> np.ndarray:
        return np.zeros(len(self.keys), np.int32)

    def crop(self, tokens: np.ndarray) -> None:
        """Drops the newest `tokens` ``[B]`` of every sequence."""
        count = self.real.sum(1, keepdim=True)
        newest = self.real.cumsum(1) > count - torch.from_numpy(tokens).to(count.device)[:, None]
        self.real &= ~newest

    @torch.inference_mode(False)
    def fork(self, index: np.ndarray) -> None:
        """Makes sequence i a copy of what sequence ``index[i]`` was."""
        chosen = torch.from_numpy(index.astype(np.int64)).to(self.keys.device)
        fresh = [self.meter.borrow(part.index_select(0, chosen)) for part in self._tensors]
        self.close()
        self.keys, self.values, self.positions, self.real, self.metric = fresh

    def fork_bytes(self, index: np.ndarray) -> int:
        """What `fork` takes under the cap: nothing."""
        return 0

    def read(self, sequence: int, head: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys ``[T, Dk]``, values ``[T, Dv]`` and positions ``[T]`` of one row, in order."""
        real = self.real[sequence]
        keys, values = self.keys[sequence, head, real], self.values[sequence, head, real]
        return keys, values, self.positions[sequence, real].long()

    def saved(self) -> Saved:
        """What is held here; see `kara_hf.storage.saved`."""
        return dict(zip(_PARTS, self._tensors, strict=True))

    @torch.inference_mode(False)
    def restore(self, saved: Saved, device: torch.device) -> None:
        """Takes back, into a new prompt on `device`, what `saved` gave. Raises ValueError."""
        keys, values = saved["keys"], saved["values"]
        batch, heads, columns = keys.shape[:3]
        check_saved("values", values, (batch, heads, columns, None), values.dtype)
        check_saved("positions", saved["positions"], (batch, columns), torch.int32)
        check_saved("real", saved["real"], (batch, columns), torch.bool)
        check_saved("metric", saved["metric"], (batch, heads, columns), torch.float32)
        for name in _PARTS:
            setattr(self, name, self.meter.borrow(saved[name].to(device, copy=True)))

    def close(self) -> None:
        """Stops counting what is held here; the object is not used afterwards."""
        for part in self._tensors:
            self.meter.uncount_borrowed(part)
