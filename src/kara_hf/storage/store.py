"""What a cache asks of the storage of one layer."""

from typing import Protocol

import numpy as np
import torch


class Store(Protocol):
    """Keys, values and positions of one layer. Rows are (sequence, head); slots count a row's tokens from 0."""

    lengths: np.ndarray  # tokens stored in each row, [B, H] int32, on the host

    def reserve(self, tokens: int) -> None:
        """Makes room for `tokens` more in every row. Raises `PoolExhausted` and changes nothing that is stored."""

    def append(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        real: torch.Tensor | None = None,
        *,
        sync: bool = True,
    ) -> None:
        """Stores new tokens: `keys` ``[B, H, S, Dk]``, `values` ``[B, H, S, Dv]``, `positions` and `real` ``[B, S]``.

        They are stored in the dtypes that the store has. Raises ValueError, and stores nothing, where those would round
        them.

        Without `sync`, `real` is not read back from the device: `lengths` count every new token as real, and are upper
        bounds until `sync_lengths`.
        """

    def sync_lengths(self) -> np.ndarray:
        """Makes `lengths` exact again, and returns by how much each sequence's was too large, ``[B]``."""

    def unshare(self, sequences: np.ndarray, start: np.ndarray, count: int) -> None:
        """Copies the blocks that `count` slots from `start` ``[b]`` on share with other sequences.

        `keep` does that first; afterwards it needs no more memory. Raises `PoolExhausted`; changes nothing that is
        stored.
        """

    def keep(self, sequences: np.ndarray, start: np.ndarray, slots: torch.Tensor) -> None:
        """Keeps of the named sequences ``[b]`` the slots below `start` ``[b]`` and `slots` ``[b, H, n]``, no others."""

    def crop(self, tokens: np.ndarray) -> None:
        """Drops the newest `tokens` ``[B]`` of every sequence."""

    def fork(self, index: np.ndarray) -> None:
        """Makes sequence i the same as sequence ``index[i]`` was, by reference."""

    def reset(self, sequences: np.ndarray) -> None:
        """Empties the named sequences and gives their memory back."""

    def read(self, sequence: int, head: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys ``[T, Dk]``, values ``[T, Dv]`` and positions ``[T]`` of one row, in slot order."""
