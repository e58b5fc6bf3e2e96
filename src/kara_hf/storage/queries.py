"""What windows are scored with when their turn comes: the queries of tokens that are not sealed yet, or moments of all
queries that there were."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..kernels import as_sdpa
from .meter import MemoryMeter

GROWTH = 32  # places added at once where every token has one


@dataclass(frozen=True)
class Sampling:
    """Which of a sequence's open tokens have their queries held: n of every window of W, and where these lie.

    Token j of them, counted from 0, has place j * n // W, which it shares with its neighbours. The last of these is the
    one whose query is read, so that a step which cannot look may write every token's query to its place.
    """

    count: int
    window: int

    @property
    def every(self) -> bool:
        """Whether all queries are held."""
        return self.count == self.window

    @property
    def growth(self) -> int:
        """Places that a buffer adds at once."""
        return max(1, GROWTH * self.count // self.window)

    def place(self, token: Any) -> Any:
        """Of token j; also how many queries of the first j tokens are held. Numbers, or tensors or arrays of them."""
        return token * self.count // self.window

    def places(self, tokens: int) -> int:
        """Places that `tokens` tokens are written to."""
        return self.place(tokens - 1) + 1 if tokens else 0

    def tokens(self, places: int) -> int:
        """The most tokens that can be written to so many places."""
        return -(-places * self.window // self.count)

    def tokens_of(self, first: int, last: int) -> list[int]:
        """The tokens from `first` on, and before `last`, whose queries are held."""
        return [((i + 1) * self.window - 1) // self.count for i in range(self.place(first), self.place(last))]

    def of(
        self, queries: torch.Tensor, tokens: np.ndarray, real: torch.Tensor | None
    ) -> tuple[torch.Tensor, np.ndarray, torch.Tensor | None]:
        """What to `append` of the `queries` ``[B, Hq, S, D]`` behind `tokens` ``[B]`` open ones."""
        if self.every:
            return queries, tokens, real
        before, new = int(tokens[0]), queries.shape[2]
        if real is None and (tokens == before).all():
            columns = [token - before for token in self.tokens_of(before, before + new)]
            return queries[:, :, columns], self.place(tokens), None
        counted = torch.ones(len(queries), new, dtype=torch.bool, device=queries.device) if real is None else real
        behind = counted.cumsum(1) + torch.from_numpy(tokens).to(queries.device)[:, None]
        return queries, self.place(tokens), counted & (self.place(behind) > self.place(behind - 1))


class QueryBuffer:
    """Queries of every sequence's open tokens, or of a sample of them, oldest first, ``[B, Hq, C, D]``; all bytes go
    through the meter.

    Queries of another dtype are rounded to that of the buffer: they rank tokens, and attend to none.
    How many of a sequence's C places are in use is the caller's knowledge.

    Args:
        growth: places added at once.
    """

    def __init__(
        self,
        sequences: int,
        heads: int,
        dim: int,
        dtype: torch.dtype,
        device: torch.device,
        meter: MemoryMeter,
        growth: int = GROWTH,
    ):
        self.meter, self.growth = meter, growth
        self.buffer = meter.zeros((sequences, heads, 0, dim), dtype, device)

    @property
    def places(self) -> int:
        """C, of every sequence."""
        return self.buffer.shape[2]

    def reserve(self, places: int) -> None:
        """Makes room for `places` queries of every sequence. Raises `PoolExhausted`; nothing is lost then."""
        if places > self.places:
            self._resize(-(-places // self.growth) * self.growth)

    def put(self, queries: torch.Tensor, places: torch.Tensor) -> None:
        """Writes one query ``[B, Hq, 1, D]`` of every sequence to its place ``[B, 1]`` int64, which must be there."""
        self.buffer.scatter_(2, places[:, None, :, None].expand_as(queries), queries.to(self.buffer.dtype))

    def append(self, queries: torch.Tensor, filled: np.ndarray, real: torch.Tensor | None = None) -> None:
        """Adds `queries` ``[B, Hq, S, D]`` behind the `filled` ``[B]`` ones, those where `real` ``[B, S]`` says so."""
        new, places = queries.shape[2], filled.tolist()
        self.reserve(max(places) + new)
        if real is None and min(places) == max(places):
            self.buffer.narrow(2, places[0], new).copy_(queries)
            return
        for b, start in enumerate(places):
            chosen = queries[b] if real is None else queries[b][:, real[b]]
            self.buffer[b, :, start : start + chosen.shape[1]] = chosen

    def window(self, sequences: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Queries of places `start` to `stop` of the named sequences: ``[b, Hq, stop - start, D]``."""
        return self.buffer[sequences, :, start:stop]

    def forget(self, sequences: torch.Tensor, first: int) -> None:
        """Forgets the oldest `first` queries of the named sequences."""
        rest = self.buffer[sequences, :, first:]
        self.buffer[sequences, :, : rest.shape[2]] = rest

    def shrink(self, filled: np.ndarray, room: int) -> None:
        """Gives memory back down to `room` places, or as many as are in use, rounded up."""
        needed = -(-max(room, int(filled.max(initial=0))) // self.growth) * self.growth
        if self.places > needed:
            self._resize(needed)

    @property
    def nbytes(self) -> int:
        return self.buffer.nbytes

    @torch.inference_mode(False)
    def fork(self, index: torch.Tensor) -> None:
        """Makes sequence i a copy of sequence ``index[i]``."""
        self.meter.require(self.fork_bytes(len(index)))
        self._replace(self.buffer.index_select(0, index.to(self.buffer.device)))

    def fork_bytes(self, sequences: int) -> int:
        """Bytes that `fork` to so many sequences takes."""
        return (sequences - self.buffer.shape[0]) * self.buffer[:1].nbytes

    def close(self) -> None:
        """Stops counting what is held here; the object is not used afterwards."""
        self.meter.uncount(self.buffer)

    @torch.inference_mode(False)
    def _resize(self, places: int) -> None:
        old = self.buffer
        self.meter.require((places - old.shape[2]) * old[:, :, :0].new_empty(*old.shape[:2], 1, old.shape[3]).nbytes)
        fresh = old.new_zeros(*old.shape[:2], places, old.shape[3])
        same = min(places, old.shape[2])
        fresh[:, :, :same] = old[:, :, :same]
        self._replace(fresh)

    def _replace(self, buffer: torch.Tensor) -> None:
        self.meter.count(buffer)
        self.meter.uncount(self.buffer)
        self.buffer = buffer


class QueryMoments:
    """Sums of q q^T over all queries of the G heads that share a KV head, ``[B, H, D, D]`` float32, in the meter.

    What a step adds is held back until `commit`, so that a step that fails adds nothing.
    """

    def __init__(self, sequences: int, heads: int, dim: int, device: torch.device, meter: MemoryMeter):
        self.meter = meter
        self.sums = meter.zeros((sequences, heads, dim, dim), torch.float32, device)
        self._pending: torch.Tensor | None = None
        self._summed = False  # whether that is a sum already

    def add(self, queries: torch.Tensor, real: torch.Tensor | None = None) -> None:
        """Queries ``[B, H * G, S, D]`` of a step, those where `real` ``[B, S]`` says so."""
        queries = queries.detach()
        if real is not None:
            queries = queries.masked_fill(~real[:, None, :, None], 0.0)
        grouped = queries.unflatten(1, (self.sums.shape[1], -1)).flatten(2, 3)
        self._summed = queries.shape[2] > 1  # those of many tokens would be held for all layers
        self._pending = squared(grouped) if self._summed else grouped

    def commit(self) -> None:
        """The step is done."""
        if self._pending is not None:
            self.sums += self._pending if self._summed else squared(self._pending)
            self._pending = None

    def discard_step(self) -> None:
        """Forgets what was not committed."""
        self._pending = None

    @property
    def nbytes(self) -> int:
        return self.sums.nbytes

    @torch.inference_mode(False)
    def fork(self, index: torch.Tensor) -> None:
        """Makes sequence i a copy of sequence ``index[i]``."""
        self.meter.require(self.fork_bytes(len(index)))
        fresh = self.meter.count(self.sums.index_select(0, index.to(self.sums.device)))
        self.meter.uncount(self.sums)
        self.sums = fresh

    def fork_bytes(self, sequences: int) -> int:
        """Bytes that `fork` to so many sequences takes."""
        return (sequences - self.sums.shape[0]) * self.sums[:1].nbytes

    def close(self) -> None:
        """Stops counting what is held here; the object is not used afterwards."""
        self.meter.uncount(self.sums)


@as_sdpa(0)
def squared(queries: torch.Tensor) -> torch.Tensor:
    """Sums of q q^T over queries ``[..., n, D]``, ``[..., D, D]`` float32."""
    queries = queries.float()
    return queries.transpose(-1, -2) @ queries
