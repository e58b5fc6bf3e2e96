"""Rounding what has settled, the same for every compression: how much in which step, and the store for it."""

from dataclasses import dataclass

import numpy as np
import torch

from ..config import KaraConfig, KVCompressConfig, rounding_bits
from ..kernels.rounding import Packing
from ..policy.sharing import PoDSharing
from ..storage import MemoryMeter, PagedStore, PoolExhausted, RecordStore, RoundedStore
from .layer import CompressedLayer
from .sequence import Sequence

OPENING = 64  # tokens, at least, that are rounded first: the frame of a row's keys is theirs
AT_ONCE = 16  # tokens, at least, that are rounded together later
NEAREST = 32  # newest tokens that stay whole where a share of them says what may be dropped


@dataclass(frozen=True)
class Rounding:
    """How tokens are rounded that have settled.

    Attributes:
        bits: of keys and of values.
        first: first tokens of a sequence that stay whole.
        near: newest tokens that stay whole, at least.
    """

    bits: tuple[int, int]
    first: int
    near: int

    @classmethod
    def of(
        cls, config: KaraConfig | KVCompressConfig, newest: int | float, sharing: PoDSharing | None, steady: bool
    ) -> "Rounding | None":
        """As `config` says, or None if nothing is rounded; so many `newest` tokens, or a share, are never dropped.

        Raises:
            ValueError: the bits are not possible, or memory must be `steady`.
        """
        bits = rounding_bits(config.bits, config.key_bits, config.value_bits)
        if bits is None:
            return None
        if steady:
            raise ValueError(
                f"cuda_graph=True is not possible with bits={bits[0]}: rounding moves tokens every few steps; leave "
                "one of them out"
            )
        first, near = config.sinks, newest if isinstance(newest, int) else NEAREST
        if sharing is not None:  # followers have keys of their own of proximal tokens alone, and these are whole
            first, near = max(first, sharing.sinks), max(near, sharing.recent)
        return cls(bits, first, near)

    def store(
        self, whole: PagedStore, layer: CompressedLayer, sizes: tuple[int, int], meter: MemoryMeter, ordered: bool
    ) -> RoundedStore:
        """An empty store around an empty `whole` one; `ordered`: no token of it will be dropped but the newest.

        Raises:
            ValueError: what the layer stores cannot be rounded.
        """
        self._check(whole, layer)
        records = RecordStore(
            whole.lengths.shape,
            (Packing(sizes[0], self.bits[0]), Packing(sizes[1], self.bits[1])),
            device=whole.device,
            block_size=whole.block_size,
            meter=meter,
            metric=not whole.shares,
            tight=whole.tight,
            begin=self.first if ordered else None,
            followers=layer.followers,
        )
        return RoundedStore(whole, records, self.first)

    def _check(self, whole: PagedStore, layer: CompressedLayer) -> None:
        if layer.latent:
            raise ValueError(
                f"bits={self.bits[0]} is not possible with {layer.model}: layer {layer.index} keeps one latent row for "
                "all its heads (multi-head latent attention), which is small already; leave bits out"
            )
        for blocks in (whole.keys, whole.values):
            dtype = blocks.pools[0].dtype
            if dtype.itemsize < 2:
                raise ValueError(
                    f"bits={self.bits[0]} is not possible with keys and values of {dtype}, which are rounded already; "
                    "load the model in bfloat16, float16 or float32, or leave bits out"
                )

    def widths(self, sizes: tuple[int, int]) -> tuple[int, int]:
        """Bytes of a record of a key and of one of a value, of these sizes."""
        return Packing(sizes[0], self.bits[0]).width, Packing(sizes[1], self.bits[1]).width

    def record_bytes(self, layer: CompressedLayer, blocks: np.ndarray, block_size: int) -> int:
        """Bytes of a layer's records, with a metric, in so many `blocks` of each row ``[B, H]``."""
        sizes = layer.stored().sizes
        key, value = self.widths(sizes)
        of_keys = blocks if layer.deciding is None else blocks[:, list(layer.deciding)]
        held = block_size * (int(of_keys.sum()) * key + int(blocks.sum()) * (value + 4 + 4))  # position and metric
        tables = (blocks.size + of_keys.size) * int(blocks.max(initial=0)) * 4 + blocks.size * 4
        return held + tables + of_keys.size * 2 * sizes[0] * 4

    def settled(
        self, sequences: list[Sequence], positions: torch.Tensor, kept: torch.Tensor, rounded: torch.Tensor | int
    ) -> torch.Tensor:
        """Which of the tokens at `positions` ``[B, H or 1, N]`` that a pass has left, `kept` ``[B, H, N]`` bool, are
        rounded now: those that are neither among the first nor among the newest, and none of a row whose first ones
        would be too few. Rows have `rounded` ``[B, H]`` records.
        """
        stop = torch.tensor([s.tokens - self.near for s in sequences], device=kept.device)[:, None, None]
        chosen = kept & (positions >= self.first) & (positions < stop)
        begun = (torch.as_tensor(rounded, device=kept.device) > 0) | (chosen.sum(2) >= OPENING)
        return chosen & begun[..., None]

    def round_settled(self, layers: list[CompressedLayer], sequences: list[Sequence]) -> None:
        """Rounds in every layer what a pass has left and is `settled`, as far as there is room."""
        stores = [store for layer in layers if isinstance(store := layer.store, RoundedStore)]
        waiting = [store for store in stores if not self._round_in(store, sequences)]
        if waiting:  # other layers may hold free blocks that these need
            for store in stores:
                store.free_blocks()
            for store in waiting:
                self._round_in(store, sequences)

    def _round_in(self, store: RoundedStore, sequences: list[Sequence]) -> bool:
        """Whether there was room for it."""
        rows = store.whole.rows()
        positions = rows.dense_positions().expand(*rows.lengths.shape, -1)
        chosen = self.settled(sequences, positions, positions >= 0, torch.from_numpy(store.records.lengths))
        return not bool(chosen.any()) or round_chosen([(store, chosen)])

    def free(self, sequence: Sequence, window: int | None, unsure: int = 0) -> int:
        """How many tokens of a sequence may be rounded. None of the newest `unsure`, which may be taken back, counts.

        Where windows of so many tokens are sealed these are settled ones and, behind them, open ones in whole windows,
        so that a window is sealed whole or rounded; where every token is kept (None) all but the first and newest.
        """
        near = self.near + unsure
        if window is None:
            return sequence.settled + sequence.open - near - self.first
        settled = sequence.settled - max(0, near - sequence.open) - self.first
        return settled + self.open_windows(sequence, window, unsure) if settled >= 0 else 0

    def open_windows(self, sequence: Sequence, window: int, unsure: int = 0) -> int:
        """Open tokens, in whole windows, that are none of the newest."""
        return max(0, sequence.open - self.near - unsure) // window * window

    def rounded_open(self, sequence: Sequence, rounded: int) -> int:
        """How many open tokens are rounded of a sequence of which `rounded` are, where windows are sealed."""
        return max(0, rounded - max(0, sequence.settled - self.first))

    def due(self, free: int, rounded: int) -> int:
        """Of `free` tokens that may be rounded, of which `rounded` are, how many are rounded now."""
        more = free - rounded
        return more if more >= self._least(rounded) else 0

    def steps(self, free: int, rounded: int) -> int:
        """New tokens, each of which frees one, after which nothing is due yet."""
        return max(0, self._least(rounded) - (free - rounded) - 1)

    def _least(self, rounded: int) -> int:
        return AT_ONCE if rounded else OPENING


def round_in_order(layers: list[CompressedLayer], counts: list[int]) -> None:
    """Rounds of each sequence the oldest `counts` whole tokens behind the first ones, in all layers or, where there is
    no room for it, in none.
    """
    if any(counts):
        stores = [store for layer in layers if isinstance(store := layer.store, RoundedStore)]
        round_chosen([(store, _oldest(store, counts)) for store in stores])


def _oldest(store: RoundedStore, counts: list[int]) -> torch.Tensor:
    """Of whole tokens the oldest behind the first ones, ``[B, H, N]`` bool."""
    batch, heads = store.whole.lengths.shape
    slots = np.arange(int(store.whole.lengths.max(initial=0)))
    chosen = (slots >= store.first) & (slots < store.first + np.array(counts)[:, None])
    return torch.from_numpy(chosen).to(store.device)[:, None].expand(batch, heads, -1)


def round_chosen(plan: list[tuple[RoundedStore, torch.Tensor]]) -> bool:
    """Settles in every store the whole tokens that were chosen, ``[B, H, N]`` bool; if there is no room, in none, and
    says so. They are then rounded another time.
    """
    try:
        for store, _ in plan:
            store.own_edges()
        plan[0][0].meter.require(sum(store.records.add_bytes(chosen) for store, chosen in plan))
    except PoolExhausted:
        return False
    for store, chosen in plan:
        store.settle(chosen)
    return True
