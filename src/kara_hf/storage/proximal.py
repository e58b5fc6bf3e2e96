"""Keys of followers (PoD, 2412.02252): of the proximal tokens only, in a ring where each new one takes an old one's
place.
"""

from dataclasses import replace

import numpy as np
import torch

from ..kernels import Proximal, ProximalKeys
from .blocks import upload
from .meter import MemoryMeter
from .saved import Saved, check_saved, restored_array, restored_tensor

HEADROOM = 1 / 8  # room made ahead, as a share of what is there, until the ring is full


class ProximalRing:
    """The keys of F followers of one layer: those of the first tokens of every sequence and of the newest.

    Which tokens a policy evicts elsewhere makes no difference here: what lies where is a matter of true positions.

    Args:
        shape: B sequences and H heads.
        heads: the followers, ascending.
        size: Dk.
        proximal: what is proximal.
        block_size: room is made in so many places at a time.
        meter: counts every byte.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        heads: tuple[int, ...],
        size: int,
        proximal: Proximal,
        *,
        dtype: torch.dtype,
        device: torch.device,
        block_size: int,
        meter: MemoryMeter,
    ):
        self.meter, self.block_size = meter, block_size
        sequences = shape[0]
        keys = meter.zeros((sequences, len(heads), 0, size), dtype, device)
        rest = np.setdiff1d(np.arange(shape[1]), heads)
        index, whole = (meter.count(upload(part.astype(np.int64), device)) for part in (np.array(heads), rest))
        self.rows = ProximalKeys(heads, keys, proximal, proximal.recent, index, whole)
        self.tokens = np.zeros(sequences, np.int64)  # seen by each sequence; upper bounds, as its lengths are
        # Behind the first, from where on all keys are there; what tokens counted since then took is not noted yet.
        self._oldest = np.full(sequences, proximal.first, np.int64)
        self._before: tuple[torch.Tensor, np.ndarray] | None = None

    @property
    def nbytes(self) -> int:
        return self.rows.keys.nbytes + self.rows.index.nbytes + self.rows.rest.nbytes

    @property
    def oldest(self) -> np.ndarray:
        """Behind the first tokens, from which position on all keys are there, ``[B]``."""
        return np.maximum(self._oldest, self.tokens - self.rows.ring)

    @property
    def held(self) -> int:
        """Keys stored, in all rows."""
        most = self.rows.bounds.first + self.rows.bounds.recent
        return len(self.rows.heads) * int(np.minimum(self.tokens, most).sum())

    def growth(self, tokens: int) -> int:
        """Bytes that `grow` by so many tokens takes."""
        return max(0, self._places(tokens) - self.rows.keys.shape[2]) * self._place_bytes

    @torch.inference_mode(False)
    def grow(self, tokens: int) -> None:
        """Makes room for `tokens` more in every sequence; those that become distant need none."""
        places = self._places(tokens)
        if places > self.rows.keys.shape[2]:
            self._resize(places)

    def room(self) -> int:
        """Tokens that every sequence can take as it is."""
        if self.rows.keys.shape[2] >= self._most:
            return np.iinfo(np.int32).max
        return self.rows.keys.shape[2] - int(self.tokens.max(initial=0))

    def append(self, keys: torch.Tensor, positions: torch.Tensor, real: torch.Tensor | None = None) -> None:
        """Writes the keys of new tokens: `keys` ``[B, H, S, Dk]`` of all heads; the rest as in `Store.append`.

        They are not counted yet. One token of each sequence makes the host wait for nothing.
        """
        new = keys.shape[2]
        if not new:
            return
        rows = self.rows
        keys = keys.to(rows.keys.dtype)
        keys = keys if len(rows.heads) == keys.shape[1] else keys.index_select(1, rows.index)
        places = rows.places(positions).long()
        if new == 1:
            if real is not None:  # padding rewrites what is there
                index = places.clamp(0, rows.keys.shape[2] - 1)[:, None, :, None].expand_as(keys)
                keys = torch.where(real[:, None, :, None], keys, rows.keys.gather(2, index))
                places = places.clamp(0, rows.keys.shape[2] - 1)
            rows.keys.scatter_(2, places[:, None, :, None].expand_as(keys), keys)
        else:
            if self.tokens.any():
                self._keep_before()
            last = positions.max(1, keepdim=True).values if real is None else _last(positions, real)
            # Of several tokens with one place the newest one's key is written, and no other's.
            stays = (positions < rows.bounds.first) | (positions > last - self.rows.ring)
            if real is not None:
                stays = stays & real
            for sequence, chosen in enumerate(stays):
                rows.keys[sequence].index_copy_(1, places[sequence, chosen], keys[sequence][:, chosen])

    def count(self, tokens: np.ndarray | int) -> None:
        """The host's part of `append`: counts `tokens` ``[B]`` more, less where what was counted was padding."""
        self.tokens = self.tokens + tokens

    def can_crop(self, tokens: np.ndarray) -> np.ndarray:
        """Whether enough keys are left once the newest `tokens` ``[B]`` go, ``[B]`` bool."""
        first, recent = self.rows.bounds.first, self.rows.bounds.recent
        return np.maximum(first, self.tokens - tokens + 1 - recent) >= self.oldest

    def crop(self, tokens: np.ndarray) -> None:
        self._oldest = self.oldest
        self.tokens = self.tokens - tokens

    def rollback(self, tokens: np.ndarray) -> None:
        """Undoes the `append` of the newest `tokens` ``[B]``."""
        self.crop(tokens)
        if self._before is not None:
            keys, self._oldest = self._before
            self.rows.keys.copy_(keys)
        self.commit()

    def commit(self) -> None:
        """The last `append` will not be taken back."""
        if self._before is not None:
            self.meter.uncount_borrowed(self._before[0])
            self._before = None

    @torch.inference_mode(False)
    def widen(self, spare: int) -> None:
        """From now on also holds keys of `spare` tokens that were proximal before, so that as many can be cropped."""
        ring = self.rows.bounds.recent + spare
        if ring <= self.rows.ring:
            return
        old, first = self.rows, self.rows.bounds.first
        wider = replace(old, ring=ring)
        places = min(first + ring, int(self.tokens.max(initial=0)))
        keys = self.meter.zeros((*old.keys.shape[:2], places, old.keys.shape[3]), old.keys.dtype, old.keys.device)
        for sequence, tokens in enumerate(self.tokens.tolist()):
            oldest = int(self.oldest[sequence])
            held = np.r_[np.arange(min(first, tokens)), np.arange(min(oldest, tokens), tokens)]
            positions = torch.from_numpy(held).to(keys.device)
            keys[sequence, :, wider.places(positions)] = old.keys[sequence][:, old.places(positions)]
        self.meter.uncount(old.keys)
        self._oldest = self.oldest
        self.rows = replace(wider, keys=keys)

    @torch.inference_mode(False)
    def fork(self, index: np.ndarray) -> None:
        chosen = torch.from_numpy(index.astype(np.int64)).to(self.rows.keys.device)
        self._replace(self.rows.keys.index_select(0, chosen))
        self.tokens, self._oldest = self.tokens[index], self._oldest[index]

    def fork_bytes(self, index: np.ndarray) -> int:
        """Bytes that `fork` takes."""
        return (len(index) - len(self.tokens)) * self.rows.keys.shape[2] * self._place_bytes // max(1, len(self.tokens))

    def reset(self, sequences: np.ndarray) -> None:
        self.tokens[sequences], self._oldest[sequences] = 0, self.rows.bounds.first

    def close(self) -> None:
        self.commit()
        for tensor in (self.rows.keys, self.rows.index, self.rows.rest):
            self.meter.uncount(tensor)

    def saved(self) -> Saved:
        """What is held here between steps; see `kara_hf.storage.saved`."""
        return {"keys": self.rows.keys, "ring": self.rows.ring, "tokens": self.tokens, "oldest": self._oldest}

    def restore(self, saved: Saved) -> None:
        """Takes back, into a new ring, what `saved` gave. Raises ValueError and `PoolExhausted`."""
        keys, old, ring = saved["keys"], self.rows.keys, int(saved["ring"])
        check_saved("keys of followers", keys, (*old.shape[:2], None, old.shape[3]), old.dtype)
        tokens, oldest = (restored_array(saved, name, self.tokens) for name in ("tokens", "oldest"))
        places = np.minimum(tokens, self.rows.bounds.first + ring)
        if ring < self.rows.bounds.recent or (tokens < 0).any() or (places > keys.shape[2]).any():
            raise ValueError(f"a ring of {ring} and {keys.shape[2]} places is too short for its tokens")
        self.tokens, self._oldest = tokens, oldest
        self.rows = replace(self.rows, ring=ring, keys=restored_tensor(keys, old.device, self.meter, old))

    @property
    def _most(self) -> int:
        return self.rows.bounds.first + self.rows.ring

    @property
    def _place_bytes(self) -> int:
        batch, heads, _, size = self.rows.keys.shape
        return batch * heads * size * self.rows.keys.itemsize

    def _places(self, tokens: int) -> int:
        """Places needed for `tokens` more."""
        wanted, there = int(self.tokens.max(initial=0)) + tokens, self.rows.keys.shape[2]
        if wanted <= there or there >= self._most:
            return there
        if there:
            wanted += int(there * HEADROOM)
        return min(self._most, -(-wanted // self.block_size) * self.block_size)

    def _resize(self, places: int) -> None:
        old = self.rows.keys
        keys = old.new_zeros(*old.shape[:2], places, old.shape[3])
        keys[:, :, : old.shape[2]] = old
        self._replace(keys)

    def _replace(self, keys: torch.Tensor) -> None:
        self.meter.count(keys)
        self.meter.uncount(self.rows.keys)
        self.rows = replace(self.rows, keys=keys)

    @torch.inference_mode(False)
    def _keep_before(self) -> None:
        """Holds what the ring has, which several new tokens may overwrite more of than one step back can spare."""
        self.commit()
        self._before = self.meter.borrow(self.rows.keys.clone()), self.oldest


def _last(positions: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Position of the newest real token of each sequence, ``[B, 1]``."""
    return positions.masked_fill(~real, -1).max(1, keepdim=True).values
