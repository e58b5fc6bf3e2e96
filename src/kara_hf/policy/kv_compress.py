"""KV-Compress: how many blocks a sequence may hold, and which tokens it gives up for that (arXiv 2410.00161)."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..config import KVCompressConfig, Pins
from .eviction import Eviction, evict
from .pins import staying
from .votes import observe

POWERS = {"l2": 2, "l1": 1}  # by metric: what attention probabilities are raised to before they are summed

Voters = tuple[tuple[int, int], ...]  # stretches of true positions whose queries voted, ascending


class KVCompressPolicy:
    """Decides per sequence, over the rows of all its layers: every row may keep a different number of blocks.

    Counts that the host knows (tokens seen, blocks in use) are integers or numpy arrays ``[B]``, one per sequence.
    *Tokens seen* are those whose keys and values were computed, whether they are still cached or not. *Pins* are given
    for each sequence; None: nothing is pinned.

    Args:
        config: the settings.

    Attributes:
        watch: told of every pass, if there is somebody to tell: which row of a sequence is its first, what it ranks
            tokens by and their true positions, both ``[B, R, N]``, and lengths ``[B, R]`` of the rows, as `evict` gets
            them.
    """

    watch: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None] | None = None

    def __init__(self, config: KVCompressConfig):
        self.config = config

    @property
    def compresses(self) -> bool:
        """Whether anything can ever be evicted."""
        return self.config.retention != 1

    @property
    def votes(self) -> bool:
        """Whether queries have a say in what is evicted. Otherwise none need to be held or observed."""
        return self.compresses and self.config.metric in POWERS

    @property
    def power(self) -> int:
        """What attention probabilities are raised to before they are summed, where there are `votes`."""
        return POWERS[self.config.metric]

    def budget_blocks(self, tokens: int | np.ndarray, rows: int, pins: Sequence[Pins] | None = None) -> np.ndarray:
        """Blocks that the `rows` R rows of a sequence may hold in all once `tokens` were seen.

        With `max_cache_tokens` C: as many as C * R tokens fill. With `retention` r: the ``least_blocks`` of every row
        and the share r, rounded up, of all further blocks that the full cache would have; at least what
        `min_cache_tokens` fill, and one block more than ``least_blocks`` for every row, which new tokens need.

        Args:
            tokens: int or ``[B]`` integer; ``[B]`` with `pins`.
            rows: R.

        Returns:
            int64 of the shape of `tokens`.
        """
        config = self.config
        full = -(-np.asarray(tokens, dtype=np.int64) // config.block_size)
        if config.max_cache_tokens is not None:
            return np.full_like(full, config.max_cache_tokens * rows // config.block_size)
        assert config.retention is not None
        least = np.array(
            [config.least_blocks_with(pinned) for pinned in self._pinned(np.atleast_1d(tokens), pins)], np.int64
        ).reshape(full.shape)
        certain = np.minimum(full, least)
        share = np.ceil((full - certain) * rows * config.retention).astype(np.int64)
        return np.maximum(certain * rows + share, np.minimum(full, self._least_of(least)) * rows)

    def _least_of(self, certain: int | np.ndarray) -> np.ndarray:
        """Blocks of a row, on average, that a `retention` leaves of those there are, if so many are `certain`."""
        return np.maximum(certain + 1, -(-self.config.least_held // self.config.block_size))

    def newest(self, tokens: int, pins: Pins = ()) -> int:
        """Newest tokens that are protected once `tokens` were seen: of a share at most as many as leave every row a
        block for others.
        """
        config = self.config
        if not isinstance(config.protected, float):
            return config.protected
        pinned = config.pinned(pins, tokens)
        aside = config.sinks + pinned
        if config.max_cache_tokens is not None:
            return max(1, round(config.protected * max(0, config.max_cache_tokens - aside)))
        assert config.retention is not None
        full, least = -(-tokens // config.block_size), config.least_blocks_with(pinned)
        certain = min(full, least)
        blocks = max(certain + int((full - certain) * config.retention), min(full, int(self._least_of(least))))
        most = (blocks - 1) * config.block_size - aside - config.floor
        return max(1, min(most, round(config.protected * (blocks * config.block_size - aside))))

    def safe(self, tokens: int, pins: Pins) -> int:
        """Newest tokens that no pass takes."""
        return self.newest(tokens, pins)

    def least_blocks(self, tokens: np.ndarray, pins: Sequence[Pins] | None = None) -> np.ndarray:
        """Blocks that no row of a sequence is cut below once `tokens` ``[B]`` were seen, ``[B]``."""
        given = zip(tokens.tolist(), self._pinned(tokens, pins), self._of_each(tokens, pins), strict=True)
        return np.array([self.config.blocks_of(self.newest(n, each), pinned) for n, pinned, each in given], np.int64)

    def _of_each(self, tokens: np.ndarray | torch.Tensor, pins: Sequence[Pins] | None) -> Sequence[Pins]:
        """What is pinned of each of B sequences."""
        return [()] * len(tokens) if pins is None else pins

    def _pinned(self, tokens: np.ndarray, pins: Sequence[Pins] | None) -> list[int]:
        """How many of the `tokens` seen ``[B]`` are pinned behind the sinks."""
        each = zip(tokens.tolist(), self._of_each(tokens, pins), strict=True)
        return [self.config.pinned(pinned, count) for count, pinned in each]

    def quota(
        self,
        tokens: int | np.ndarray,
        rows: int,
        used_blocks: int | np.ndarray,
        ahead: int | np.ndarray,
        pins: Sequence[Pins] | None = None,
    ) -> np.ndarray:
        """Blocks to free now, so that the budget still holds when the rows have taken `ahead` blocks more.

        Args:
            tokens: int or ``[B]`` integer, tokens seen so far.
            rows: R.
            used_blocks: int or ``[B]`` integer, blocks that all rows of the sequence hold.
            ahead: int or ``[B]`` integer, blocks that they take before the next pass: R where that is `block_size`
                tokens away. The budget is that of the tokens that will have been seen by then.

        Returns:
            int64 of the arguments' shape, 0 where nothing is to be done. `evict` can free that many if `ahead` <= R.
        """
        then = np.asarray(tokens) + np.asarray(ahead) * self.config.block_size // rows
        return np.maximum(0, np.asarray(used_blocks) + ahead - self.budget_blocks(then, rows, pins))

    def evictable(
        self, positions: torch.Tensor, tokens: torch.Tensor, pins: Sequence[Pins] | None = None
    ) -> torch.Tensor:
        """Which tokens may go: neither a sink, nor pinned, nor among the newest that are `safe`.

        Args:
            positions: ``[B, R, N]`` integer, true position of the token in every slot.
            tokens: ``[B]`` integer, tokens seen.

        Returns:
            ``[B, R, N]`` bool. Slots that hold no token give anything.
        """
        of_each = self._of_each(tokens, pins)
        safe = [self.safe(*each) for each in zip(tokens.tolist(), of_each, strict=True)]
        free = positions < (tokens - torch.tensor(safe, device=tokens.device))[:, None, None]
        for may_go, places, pinned in zip(free, positions, of_each, strict=True):
            for start, stop in staying(self.config.sinks, pinned):
                may_go &= (places < start) | (places >= stop)
        return free

    def observe(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        *,
        scaling: float,
        softcap: float | None = None,
        sink_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the last prompt queries of one sequence say about its tokens: ``[H, T]`` float32.

        `queries` ``[Hq, S, D]`` are those of the last S tokens, S >= 1; of more than ``observation`` only the last are
        read. The rest as in `kara_hf.policy.observe`.
        """
        window, pool = self.config.observation, self.config.pool
        if window is None:
            pool = 1
        else:
            queries = queries[:, -window:]
        return observe(
            queries, keys, scaling=scaling, softcap=softcap, sink_logits=sink_logits, power=self.power, pool=pool
        )

    def ranking(
        self, votes: torch.Tensor, positions: torch.Tensor, voters: list[Voters] | None = None, first_row: int = 0
    ) -> torch.Tensor:
        """What tokens are ranked by, larger is better kept: their votes, or what a control puts in their place.

        Args:
            votes: ``[B, R, N]`` float32. Read only where there are `votes`.
            positions: ``[B, R, N]`` integer, true position of the token in every slot.
            voters: of each sequence; needed for the mean.
            first_row: which row of a sequence, over all layers, the first of these is.

        Returns:
            ``[B, R, N]`` float32.
        """
        if self.config.metric == "recency":
            return positions.float()
        if self.config.metric == "random":
            return noise(self.config.seed, positions, first_row)
        return votes if self.config.votes == "sum" or voters is None else votes / could_vote(positions, voters)

    def evict(
        self,
        metric: torch.Tensor,
        positions: torch.Tensor,
        lengths: torch.Tensor,
        tokens: np.ndarray,
        quota: np.ndarray,
        weights: torch.Tensor | None = None,
        voters: list[Voters] | None = None,
        pins: Sequence[Pins] | None = None,
        first_row: int = 0,
    ) -> Eviction:
        """Frees `quota` blocks of each sequence, or as many as protected tokens, pins and the floor allow.

        Args:
            metric: ``[B, R, N]`` float32, the votes.
            positions: ``[B, R, N]`` integer, true position of the token in every slot.
            lengths: ``[B, R]`` integer, tokens in each row. Behind it, `metric` and `positions` hold anything.
            tokens: ``[B]`` integer, tokens seen, on the host.
            quota: ``[B]`` integer, from `quota`, on the host.
            weights: ``[R]`` integer, rows that each row stands for; None: itself alone.
            voters: of each sequence, as in `ranking`.
            pins: of each sequence.
            first_row: as in `ranking`.

        Returns:
            See `kara_hf.policy.evict`.
        """
        device = metric.device
        ranking = self.ranking(metric, positions, voters, first_row)
        if self.watch is not None:
            self.watch(first_row, ranking, positions, lengths)
        return evict(
            ranking,
            self.evictable(positions, torch.as_tensor(tokens, device=device), pins),
            lengths,
            torch.as_tensor(quota, device=device),
            block_size=self.config.block_size,
            least=torch.from_numpy(self.least_blocks(tokens, pins)).to(device),
            levels=self.config.levels,
            weights=weights,
        )


def could_vote(positions: torch.Tensor, voters: list[Voters]) -> torch.Tensor:
    """How many of the `voters` of each sequence came at or behind each of `positions` ``[B, R, N]``, at least 1."""
    counts = []
    for row, stretches in zip(positions, voters, strict=True):
        behind = [(stop - row.clamp(min=start)).clamp(min=0) for start, stop in stretches]
        counts.append(sum(behind, torch.zeros_like(row)).clamp(min=1))
    return torch.stack(counts)


def noise(seed: int, positions: torch.Tensor, first_row: int = 0) -> torch.Tensor:
    """Numbers in [0, 1) that depend on `seed`, row and position alone, on every device.

    They are the upper 24 bits of SplitMix64, applied to the seed, to that and the row, and to that and the position.

    Args:
        seed: any integer; only its lower 64 bits count.
        positions: ``[B, R, N]`` integer.
        first_row: number of the first row.

    Returns:
        ``[B, R, N]`` float32.
    """
    device = positions.device
    state = _mix(torch.tensor((seed + 2**63) % 2**64 - 2**63, device=device))
    state = _mix(state + first_row + torch.arange(positions.shape[1], device=device)[:, None])
    return _unsigned_shift(_mix(state + positions), 40).float() / 2**24


def _mix(state: torch.Tensor) -> torch.Tensor:
    """One step of SplitMix64 on int64, whose arithmetic wraps around."""
    state = state - 0x61C8864680B583EB  # plus the golden ratio of 2**64
    state = (state ^ _unsigned_shift(state, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    state = (state ^ _unsigned_shift(state, 27)) * (0x94D049BB133111EB - 2**64)
    return state ^ _unsigned_shift(state, 31)


def _unsigned_shift(state: torch.Tensor, bits: int) -> torch.Tensor:
    return (state >> bits) & (2 ** (64 - bits) - 1)
