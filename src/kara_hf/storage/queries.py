"""What windows are scored with when their turn comes: queries of tokens that are not sealed yet."""

from dataclasses import asdict, dataclass

import numpy as np
import torch

from .meter import MemoryMeter
from .saved import Saved, restored_tensor

GROWTH = 32  # places added at once where every token has one


@dataclass(frozen=True)
class Sampling:
    """Which of a sequence's open tokens have their queries held: n of every window of W for every query head.

    Token j of them, counted from 0, has place j * n // W, which it shares with its neighbours. The last of these is the
    one whose query is read, so that a step which cannot look may write every token's query to its place. The G heads
    that share a key take tokens a G-th of such a stretch apart; see `kara_hf.kernels.sampled_places`.
    """

    count: int
    window: int
    group: int = 1

    @property
    def every(self) -> bool:
        """Whether all queries are held."""
        return self.count == self.window

    @property
    def growth(self) -> int:
        """Places that a buffer adds at once."""
        return max(1, GROWTH * self.count // self.window)

    @property
    def earlier(self) -> list[int]:
        """By how many tokens each head of a group is ahead of the first."""
        return [member * self.window // (self.count * self.group) for member in range(self.group)]

    def place(self, token: int) -> int:
        """Of token j in the first head; also how many queries of j tokens every head holds for certain."""
        return token * self.count // self.window

    def places(self, tokens: int) -> int:
        """Places that `tokens` tokens are written to."""
        return self.place(tokens - 1 + self.earlier[-1]) + 1 if tokens else 0

    def among(self, start: int, stop: int) -> bool:
        """Whether a query of tokens `start` to `stop` is held in any head."""
        return any(self.place(start + ahead) < self.place(stop + ahead) for ahead in self.earlier)

    def rounded(self, places: int) -> int:
        """Places that a buffer has for so many."""
        return -(-places // self.growth) * self.growth

    def tokens(self, places: int) -> int:
        """The most tokens that can be written to so many places."""
        return max(0, -(-places * self.window // self.count) - self.earlier[-1])

    def tokens_of(self, first: int, last: int) -> np.ndarray:
        """The tokens whose queries are held in places `first` to `last`, by head of a group ``[G, n]``."""
        ends = (np.arange(first + 1, last + 1) * self.window - 1) // self.count
        return ends - np.array(self.earlier)[:, None]


class QueryBuffer:
    """Queries of every sequence's open tokens, or of a sample of them, oldest first, ``[B, Hq, C, D]``; all bytes go
    through the meter.

    Queries of another dtype are rounded to that of the buffer: they rank tokens, and attend to none.
    How many open tokens a sequence has is the caller's knowledge; all counts are of these.

    Args:
        sampling: which tokens; None: all.
    """

    def __init__(
        self,
        sequences: int,
        heads: int,
        dim: int,
        dtype: torch.dtype,
        device: torch.device,
        meter: MemoryMeter,
        sampling: Sampling | None = None,
    ):
        self.meter, self.sampling = meter, sampling or Sampling(1, 1)
        self.buffer = meter.zeros((sequences, heads, 0, dim), dtype, device)

    @property
    def places(self) -> int:
        """C, of every sequence."""
        return self.buffer.shape[2]

    def reserve(self, tokens: int) -> None:
        """Makes room for queries of `tokens` of every sequence. Raises `PoolExhausted`; nothing is lost then."""
        places = self.sampling.places(tokens)
        if places > self.places:
            self._resize(self.sampling.rounded(places))

    def put(self, queries: torch.Tensor, tokens: torch.Tensor) -> None:
        """Takes one query ``[B, Hq, 1, D]`` of every sequence, of its token ``[B, 1]`` int64, for which there is room.

        Waits for nothing: it is written whether it is one of the sample or not.
        """
        places, sampling = tokens.expand(-1, queries.shape[1]), self.sampling
        if not sampling.every:
            member = torch.arange(queries.shape[1], device=tokens.device) % sampling.group
            earlier = member * sampling.window // (sampling.count * sampling.group)
            places = (places + earlier) * sampling.count // sampling.window
        self.buffer.scatter_(2, places[:, :, None, None].expand_as(queries), queries.to(self.buffer.dtype))

    def append(self, queries: torch.Tensor, filled: np.ndarray, real: torch.Tensor | None = None) -> None:
        """Adds `queries` ``[B, Hq, S, D]`` of tokens behind `filled` ``[B]`` ones, where `real` ``[B, S]`` says so."""
        tokens = filled.tolist()
        self.reserve(max(tokens) + queries.shape[2])
        if real is None and min(tokens) == max(tokens):
            self._write(self.buffer, queries, tokens[0])
            return
        for b, start in enumerate(tokens):
            self._write(self.buffer[b], queries[b] if real is None else queries[b][:, real[b]], start)

    def _write(self, buffer: torch.Tensor, queries: torch.Tensor, start: int) -> None:
        """Those of `queries` ``[..., Hq, S, D]`` of tokens from `start` on that are of the sample."""
        new, sampling = queries.shape[-2], self.sampling
        if not sampling.among(start, start + new):
            return
        if sampling.every:
            buffer.narrow(-2, start, new).copy_(queries)
            return
        first, last = sampling.place(start), sampling.places(start + new)
        chosen = sampling.tokens_of(first, last) - start
        chosen = np.tile(chosen, (buffer.shape[-3] // sampling.group, 1))[..., None]
        index = torch.from_numpy(chosen.clip(0, new - 1)).to(queries.device)
        found = queries.gather(-2, index.expand(*queries.shape[:-2], -1, queries.shape[-1])).to(buffer.dtype)
        held = buffer.narrow(-2, first, last - first)
        brought = torch.from_numpy((0 <= chosen) & (chosen < new)).to(queries.device)
        held.copy_(torch.where(brought, found, held))

    def window(self, sequences: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Queries of tokens `start` to `stop` of the named sequences: ``[b, Hq, n, D]``."""
        return self.buffer[sequences, :, self.sampling.place(start) : self.sampling.place(stop)]

    def forget(self, sequences: torch.Tensor, first: int) -> None:
        """Forgets the oldest `first` tokens of the named sequences; where queries are sampled, whole windows."""
        rest = self.buffer[sequences, :, self.sampling.place(first) :]
        self.buffer[sequences, :, : rest.shape[2]] = rest

    def shrink(self, filled: np.ndarray, room: int) -> None:
        """Gives memory back down to room for `room` tokens, or as many as there are, rounded up."""
        needed = self.sampling.rounded(self.sampling.places(max(room, int(filled.max(initial=0)))))
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

    def saved(self) -> Saved:
        """What is held here; see `kara_hf.storage.saved`."""
        return {"buffer": self.buffer, "sampling": asdict(self.sampling)}

    @classmethod
    def restored(cls, saved: Saved, device: torch.device, meter: MemoryMeter) -> "QueryBuffer":
        """One on `device` that holds what `saved` gave. Raises `PoolExhausted`."""
        sequences, heads, _, dim = saved["buffer"].shape
        made = cls(sequences, heads, dim, saved["buffer"].dtype, device, meter, Sampling(**saved["sampling"]))
        made.buffer = restored_tensor(saved["buffer"], device, meter, made.buffer)
        return made

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
