"""Rounding: numbers of a token become a record of bytes, each token by itself.

A record of D numbers of `bits` bits has codes first and behind them, as two bfloat16, the step between codes and what
code 0 stands for. Element d lies in byte d % C of the C bytes of codes, from bit (d // C) * bits on. What a record
stands for is float32: code * step + lowest.

Values are rounded as they are. Keys are rounded in a frame of their row: less its centre, divided by its spread, turned
by an orthonormal matrix. The frame is fixed before a row's first key is rounded, so a record means the same wherever in
its row it lies, and moving it rounds nothing again. No later key can fall outside: every record has a range of its own.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

RANGE_BYTES = 4  # of a step and of a lowest number
CHUNK = 2**19  # codes that are made float32 at once


@dataclass(frozen=True)
class Packing:
    """How `size` numbers are packed with `bits` bits each."""

    size: int
    bits: int

    @property
    def per_byte(self) -> int:
        return 8 // self.bits

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def codes(self) -> int:
        """C, bytes of codes; even, so that what is behind them is aligned."""
        return -(-self.size // (2 * self.per_byte)) * 2

    @property
    def width(self) -> int:
        """Bytes of a record."""
        return self.codes + RANGE_BYTES

    def pack(self, numbers: torch.Tensor) -> torch.Tensor:
        """Records ``[..., width]`` uint8 of `numbers` ``[..., D]``, of any float dtype, that are finite."""
        numbers = numbers.float()
        lowest = numbers.amin(-1, keepdim=True).bfloat16()
        step = (numbers.amax(-1, keepdim=True) - lowest.float()) / self.top
        step = step.bfloat16().clamp(min=torch.finfo(torch.bfloat16).tiny)
        codes = ((numbers - lowest.float()) / step.float()).round_().clamp_(0, self.top).to(torch.uint8)
        pieces = F.pad(codes, (0, self.per_byte * self.codes - self.size)).unflatten(-1, (self.per_byte, self.codes))
        packed = pieces[..., 0, :]
        for place in range(1, self.per_byte):
            packed = packed | pieces[..., place, :] << place * self.bits
        return torch.cat([packed, torch.cat([step, lowest], -1).view(torch.uint8)], -1)

    def unpack(self, records: torch.Tensor) -> torch.Tensor:
        """Numbers ``[..., D]`` float32 that `records` ``[..., width]`` stand for."""
        step, lowest = self.ranges(records)
        codes = torch.cat(self.pieces(records), -1)[..., : self.size]
        return codes * step[..., None] + lowest[..., None]

    def pieces(self, records: torch.Tensor) -> list[torch.Tensor]:
        """Codes of the first C elements, of the next, and so on: each ``[..., C]`` float32."""
        codes = records[..., : self.codes]
        if self.per_byte == 1:
            return [codes.float()]
        last = self.per_byte - 1
        shifted = [codes, *(codes >> place * self.bits for place in range(1, self.per_byte))]
        return [(part if place == last else part & self.top).float() for place, part in enumerate(shifted)]

    def ranges(self, records: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Step and lowest number of every record, each ``[...]`` float32."""
        step, lowest = records[..., self.codes :].view(torch.bfloat16).float().unbind(-1)
        return step, lowest

    # -------------------------------------------------------------------------------- products that unpack in chunks
    def products(self, vectors: torch.Tensor, records: torch.Tensor) -> torch.Tensor:
        """Of `vectors` ``[B, H, N, D]`` with the numbers of `records` ``[B, H, T, width]``: ``[B, H, N, T]``
        float32.
        """
        step, lowest = (part[:, :, None] for part in self.ranges(records))
        parts = F.pad(vectors, (0, self.per_byte * self.codes - self.size)).split(self.codes, -1)
        sums = [
            sum(part @ codes.transpose(-1, -2) for part, codes in zip(parts, self.pieces(chunk), strict=True))
            for chunk in self._chunks(records)
        ]
        found = torch.cat(sums, -1) if len(sums) > 1 else sums[0]
        return found.mul_(step).add_(vectors.sum(-1, keepdim=True) * lowest)

    def mixtures(self, weights: torch.Tensor, records: torch.Tensor) -> torch.Tensor:
        """Sums of the numbers of `records` ``[B, H, T, width]`` by `weights` ``[B, H, N, T]``: ``[B, H, N, D]``
        float32.
        """
        step, lowest = (part[:, :, None] for part in self.ranges(records))
        found = weights.new_zeros(*weights.shape[:3], self.per_byte, self.codes)
        chunks = self._chunks(records)
        shares = (weights * step).split([chunk.shape[2] for chunk in chunks], -1)
        for share, chunk in zip(shares, chunks, strict=True):
            for place, codes in enumerate(self.pieces(chunk)):
                found[..., place, :] += share @ codes
        return found.flatten(-2)[..., : self.size] + (weights * lowest).sum(-1, keepdim=True)

    def _chunks(self, records: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`records` ``[B, H, T, width]`` in parts whose codes are float32 one at a time."""
        rows = max(1, records.shape[0] * records.shape[1] * self.codes)
        return records.split(max(64, CHUNK // rows), 2)


@lru_cache
@torch.inference_mode(False)
def rotation(size: int, device: torch.device) -> torch.Tensor:
    """An orthonormal matrix ``[size, size]`` float32 whose elements are as even as can be: it spreads what is large in
    few elements over all. A Hadamard matrix of the powers of two in `size`, times a Hartley matrix of the rest.
    """
    odd = size
    while odd % 2 == 0:
        odd //= 2
    places = torch.arange(odd)
    angles = 2 * torch.pi * (places[:, None] * places % odd).double() / odd
    matrix = (angles.cos() + angles.sin()) / odd**0.5
    half = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.double) / 2**0.5
    while len(matrix) < size:
        matrix = torch.kron(matrix, half)
    return matrix.float().to(device)


def frame_of(keys: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Centre and spread, ``[B, K, 2, D]`` float32, of those `keys` ``[B, K, S, D]`` that are `chosen` ``[B, K, S]``.

    The spread is the root of the standard deviation: a compromise between errors that are the same in every element
    and errors in proportion to what the element holds.
    """
    weights = chosen[..., None].float() / chosen.sum(-1, dtype=torch.float32).clamp(min=1)[..., None, None]
    keys = keys.float().masked_fill(~chosen[..., None], 0.0)
    centre = (keys * weights).sum(2)
    deviation = ((keys - centre[:, :, None]).square() * weights).sum(2).sqrt()
    floor = deviation.amax(-1, keepdim=True).mul(1e-3).clamp(min=1e-6)  # an element that never changes
    return torch.stack([centre, deviation.clamp(min=floor).sqrt()], 2)


def into_frame(keys: torch.Tensor, frame: torch.Tensor) -> torch.Tensor:
    """`keys` ``[B, K, S, D]`` as their rows' `frame` ``[B, K, 2, D]`` sees them, float32."""
    centre, spread = frame[:, :, None].unbind(3)
    return (keys.float() - centre) / spread @ rotation(keys.shape[-1], keys.device)


def out_of_frame(numbers: torch.Tensor, frame: torch.Tensor) -> torch.Tensor:
    """The keys that `into_frame` made `numbers` of, float32."""
    centre, spread = frame[:, :, None].unbind(3)
    return numbers @ rotation(numbers.shape[-1], numbers.device).T * spread + centre
