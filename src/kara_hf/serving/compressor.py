"""Which requests of an engine are compressed, and which of their tokens stay."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..policy import KaraPolicy, Window
from .config import ServingConfig
from .queries import QueryPool


@dataclass
class Request:
    """A request with tokens behind its prompt. Its stored tokens are numbered without gaps; positions count on.

    Attributes:
        key: of the request.
        settled: stored tokens in front of the open ones: the prompt and the survivors of sealed windows.
        stored: tokens in the pool.
        evicted: tokens dropped: a stored token behind them is at position number + evicted.
        windows: windows sealed so far.
        slots: where the queries of the open tokens are, oldest first; empty for a score without queries.
    """

    key: str
    settled: int
    stored: int
    evicted: int = 0
    windows: int = 0
    slots: list[int] = field(default_factory=list)

    @property
    def open(self) -> int:
        return self.stored - self.settled


@dataclass(frozen=True)
class Cut:
    """What is done to one request: of the first `width` tokens in each of `count` windows `keep` stay in every head."""

    request: Request
    count: int
    width: int
    keep: int

    @property
    def dropped(self) -> int:
        return self.count * (self.width - self.keep)


class Compressor:
    """Decides which requests are cut, and chooses survivors by the scores of `KaraPolicy`.

    Args:
        config: the settings.

    Attributes:
        queries: of open tokens, for scores that need them.
    """

    def __init__(self, config: ServingConfig):
        self.config, self.policy = config, KaraPolicy(config.kara)
        self.queries = QueryPool()

    @property
    def least(self) -> int:
        """Tokens behind a prompt from which on a request can be compressed."""
        return self.config.kara.window + self.config.kara.recent

    def cut(self, request: Request) -> Cut | None:
        """What is due in a request, or None."""
        kara, count = self.config.kara, self.policy.windows_due(request.open)
        if not count:
            return None
        if self.config.scope == "trace":
            return Cut(request, 1, request.open - kara.recent, kara.kept_per_window)
        return Cut(request, count, kara.window, kara.kept_per_window)

    def due(self, requests: Sequence[Request], page: int) -> list[Cut]:
        """The cuts of the K requests that give most blocks of `page` tokens back, earlier ones first among equals."""
        cuts = [cut for request in requests if (cut := self.cut(request)) is not None]
        cuts.sort(key=lambda cut: blocks(cut.request.stored - cut.dropped, page) - blocks(cut.request.stored, page))
        return cuts[: self.config.requests]

    def select(
        self, layer: int, cuts: Sequence[Cut], keys: torch.Tensor, scaling: float, softcap: float | None
    ) -> torch.Tensor:
        """Survivors in one layer.

        Args:
            layer: its index.
            cuts: of equal width.
            keys: of all their windows, ``[b, H, width, D]``.
            scaling, softcap: of the layer's logits.

        Returns:
            ``[b, H, keep]`` int64 places in the windows, ascending.

        Raises:
            ValueError: a score is NaN.
        """
        kara, width = self.config.kara, cuts[0].width
        queries = later = None
        windows = [(cut.request, number) for cut in cuts for number in range(cut.count)]
        if self.policy.needs_queries:
            pool = self.queries.layers[layer]
            places = [request.slots[n * width : (n + 1) * width + kara.recent] for request, n in windows]
            found = pool[torch.tensor(places, device=pool.device)].transpose(1, 2)  # [b, Hq, width + recent, D]
            queries, later = found[:, :, :width], found[:, :, width:]
        window = Window(
            rows=keys.shape[1],
            keys=keys,
            queries=queries,
            later=later,
            moments=None,
            scaling=scaling,
            softcap=softcap,
            layer=layer,
            sequences=list(range(len(windows))),
            starts=[request.settled + request.evicted + n * width for request, n in windows],
            ordinals=[request.windows + n for request, n in windows],
            keep=cuts[0].keep,
            anchors=kara.anchors,
            seed=kara.seed,
        )
        return self.policy.select(window)

    def done(self, cut: Cut) -> None:
        """Books a cut that was carried out."""
        request, seen = cut.request, cut.count * cut.width
        request.stored -= cut.dropped
        request.evicted += cut.dropped
        request.windows += cut.count
        if self.config.scope == "window":
            request.settled += cut.count * cut.keep
        self.queries.give(request.slots[:seen])
        del request.slots[:seen]

    def drop(self, request: Request) -> None:
        """Forgets a request that is gone."""
        self.queries.give(request.slots)
        request.slots = []


def blocks(tokens: int, page: int) -> int:
    """Blocks of `page` tokens that hold `tokens`."""
    return -(-tokens // page)
