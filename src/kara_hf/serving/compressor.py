"""Which requests of an engine have windows compressed, and which of their tokens stay."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..policy import KaraPolicy, Window
from ..storage import Sampling
from .config import ServingConfig
from .queries import Brought, QueryPool
from .query_recorder import Logits


@dataclass
class ServedRequest:
    """A request with tokens that can be evicted. Its stored tokens are numbered without gaps; positions count on.

    Attributes:
        key: of the request.
        settled: stored tokens in front of the open ones: the prompt, or what stayed of it, and the survivors of sealed
            windows.
        stored: tokens in the pool.
        prompt: tokens of a prompt that is still to be compressed; 0: it was, or stays whole.
        kept: survivors of sealed windows.
        evicted: tokens dropped: a stored token behind them is at position number + evicted.
        windows: windows sealed so far.
        slots: where those queries of open tokens that are held are, oldest first; empty for a score without queries.
        voters: where the queries of the last tokens of a prompt that is still to be compressed are.
    """

    key: str
    settled: int
    stored: int
    prompt: int = 0
    kept: int = 0
    evicted: int = 0
    windows: int = 0
    slots: list[int] = field(default_factory=list)
    voters: list[int] = field(default_factory=list)

    @property
    def open(self) -> int:
        return max(0, self.stored - self.settled)

    @property
    def tokens(self) -> int:
        """Tokens seen."""
        return self.stored + self.evicted


@dataclass(frozen=True)
class EvictionPlan:
    """What is done to one request: from the stored token `start` on, of the `width` tokens in each of `count` windows
    `keep` stay in every head. Each is judged by so many `queries`, its own and of the tokens behind it. A `findable`
    plan leaves the blocks that it empties to be found by their content, until their room is needed.
    """

    request: ServedRequest
    start: int
    count: int
    width: int
    keep: int
    queries: int
    findable: bool = False

    @property
    def dropped(self) -> int:
        return self.count * (self.width - self.keep)

    @property
    def stored_after(self) -> int:
        return self.request.stored - self.dropped


class Compressor:
    """Decides of which requests windows are compressed, and chooses survivors by the scores of `KaraPolicy`.

    Args:
        config: the settings.
        queries: where those of open tokens are held, for scores that need them.

    Attributes:
        sampling: of which open tokens.
        counter: the metric that counts what it does.
    """

    counter = "windows"

    def __init__(self, config: ServingConfig, queries: QueryPool):
        self.config, self.policy, self.queries = config, KaraPolicy(config.kara), queries
        self.sampling = Sampling(config.kara.queries_held, config.kara.window)

    @property
    def needs_queries(self) -> bool:
        return self.policy.needs_queries

    @property
    def needs_values(self) -> bool:
        return self.policy.score.values

    @property
    def least(self) -> int:
        """Tokens behind a prompt from which on a request can be compressed."""
        return self.policy.open_limit(ServedRequest("", 0, 0)) + 1

    def plan(self, request: ServedRequest) -> EvictionPlan | None:
        """What is due in a request, or None."""
        width, due = self.config.kara.window, self.policy.due(request)
        if not due:
            return None
        if self.config.unit == "trace":
            width, keep = request.open - due[0].recent, self.policy.kept_of(request.settled)
            return EvictionPlan(request, request.settled, 1, width, keep, 0)
        # A plan is of windows of which equally many tokens stay, judged by equally many queries.
        plans = [
            (seal.keep, self.sampling.place(width + seal.recent) if self.policy.needs_queries else 0) for seal in due
        ]
        keep, queries = plans[0]
        return EvictionPlan(request, request.settled, plans.count(plans[0]), width, keep, queries)

    def due(self, requests: Sequence[ServedRequest], page: int) -> list[EvictionPlan]:
        """The plans of the K requests that give most blocks of `page` tokens back, earlier ones first among equals."""
        plans = [plan for request in requests if (plan := self.plan(request)) is not None]
        plans.sort(key=lambda plan: blocks(plan.stored_after, page) - blocks(plan.request.stored, page))
        return plans[: self.config.max_requests]

    def select(
        self,
        layer: int,
        plans: Sequence[EvictionPlan],
        keys: torch.Tensor,
        logits: Logits,
        values: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What `Chooser.select` says. Raises ValueError: a score is NaN."""
        kara, width = self.config.kara, plans[0].width
        queries = later = None
        trace = self.config.unit == "trace"  # its window begins at the prompt again, and sinks are there still
        windows = [(plan.request, number) for plan in plans for number in range(plan.count)]
        if self.policy.needs_queries:
            pool = self.queries.layers[layer]
            own, all_of_them = self.sampling.place(width), plans[0].queries
            places = [request.slots[n * own : n * own + all_of_them] for request, n in windows]
            found = pool[torch.tensor(places, device=pool.device)].transpose(1, 2)
            queries, later = found.tensor_split([own], dim=2)
        window = Window(
            rows=keys.shape[1],
            keys=keys,
            queries=queries,
            later=later,
            scaling=logits.scaling,
            softcap=logits.softcap,
            layer=layer,
            sequences=list(range(len(windows))),
            starts=[request.settled + n * width + (0 if trace else request.evicted) for request, n in windows],
            ordinals=[request.windows + n for request, n in windows],
            keep=plans[0].keep,
            anchors=kara.anchors_of(plans[0].keep),
            seed=kara.seed,
            values=values,
        )
        return self.policy.select(window)

    def slots(self, request: ServedRequest) -> list[int]:
        """For the queries of all open tokens of a request, those that have come just now among them."""
        needed = request.open if self.sampling.every else self.sampling.place(request.open - 1) + 2
        request.slots += self.queries.take(max(0, needed - len(request.slots)))
        return list(request.slots)

    def brought(self, request: ServedRequest, column: int, length: int) -> Brought | None:
        """The queries to hold of a step whose columns from `column` on are the newest `length` tokens of a request."""
        new = min(length, request.open) if self.needs_queries else 0
        if not new:
            return None
        return Brought(column + length - new, request.open - new, new, self.slots(request), self.sampling)

    def done(self, plan: EvictionPlan) -> None:
        """Books a cut that was carried out."""
        request, seen = plan.request, plan.count * plan.width
        request.stored -= plan.dropped
        request.evicted += plan.dropped
        request.windows += plan.count
        if self.config.unit == "window":
            request.settled += plan.count * plan.keep
            request.kept += plan.count * plan.keep
        sampled = self.sampling.place(seen)
        self.queries.give(request.slots[:sampled])
        del request.slots[:sampled]

    def drop(self, request: ServedRequest) -> None:
        """Forgets a request that is gone."""
        self.queries.give(request.slots)
        request.slots = []


def blocks(tokens: int, page: int) -> int:
    """Blocks of `page` tokens that hold `tokens`."""
    return -(-tokens // page)
