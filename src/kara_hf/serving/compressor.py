"""Which requests of an engine have windows compressed, and which of their tokens stay."""

from collections.abc import Sequence

import torch

from ..policy import KaraPolicy, Window
from ..storage import Sampling
from .config import ServingConfig
from .plans import EvictionPlan, ServedRequest, blocks
from .queries import Brought, QueryPool
from .query_recorder import Logits
from .survivors import Chooser


class Compressor(Chooser):
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
        kara, width = self.config.kara, plans[0].width
        queries = later = None
        trace = self.config.unit == "trace"  # its window begins at the prompt again, and sinks are there still
        windows = [(plan.request, number) for plan in plans for number in range(plan.count)]
        if self.policy.needs_queries:
            own, all_of_them = self.sampling.place(width), plans[0].queries
            places = [request.slots[n * own : n * own + all_of_them] for request, n in windows]
            queries, later = self.queries.read(layer, places).tensor_split([own], dim=2)
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
            pins=tuple(request.pins for request, _ in windows),
        )
        return self.policy.select(window)

    def held(self, tokens: int) -> int:
        """Slots for the queries of so many open tokens."""
        if not self.needs_queries:
            return 0
        return tokens if self.sampling.every else self.sampling.place(tokens - 1) + 2

    def reserve(self, request: ServedRequest, ahead: int = 0) -> bool:
        """Slots for the queries of all open tokens of a request and of `ahead` more; False: there is no room."""
        taken = self.queries.take(max(0, self.held(request.open + ahead) - len(request.slots)))
        request.slots += taken or []
        return taken is not None

    def brought(self, request: ServedRequest, column: int, length: int) -> Brought | None:
        """The queries to hold of a step whose columns from `column` on are the newest `length` tokens of a request.

        Without room for them, what is open stays whole.
        """
        new = min(length, request.open) if self.needs_queries else 0
        if not new:
            return None
        if not self.reserve(request):
            self.drop(request)
            request.settle()
            return None
        return Brought(column + length - new, request.open - new, new, list(request.slots), self.sampling)

    def done(self, plan: EvictionPlan) -> None:
        """Books a cut that was carried out."""
        request, seen = plan.request, plan.count * plan.width
        for number in range(plan.count):
            request.evict("sealed", plan.start + number * plan.keep, plan.width, plan.keep)
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
