"""Prompts of an engine's requests, each compressed once, when all of it is in the pool (KV-Compress, arXiv 2410.00161).

Every KV head keeps the same number of tokens, as blocks that all heads and layers of a request share demand; which they
are each head decides for itself.
"""

from collections.abc import Sequence

import numpy as np
import torch

from ..policy import KVCompressPolicy
from ..storage import Sampling
from .config import ServingConfig
from .plans import EvictionPlan, ServedRequest
from .queries import Brought, QueryPool
from .query_recorder import Logits
from .survivors import Chooser


class PromptCompressor(Chooser):
    """Decides which prompts are compressed, and chooses survivors by the votes of `KVCompressPolicy`.

    Args:
        config: the settings.
        queries: where those of the last tokens of prompts are held.

    Attributes:
        counter: the metric that counts what it does.
    """

    counter = "prompts"
    needs_values = False

    def __init__(self, config: ServingConfig, queries: QueryPool):
        self.config, self.queries = config, queries

    @property
    def needs_queries(self) -> bool:
        return self.config.compresses_prompts

    def voters(self, tokens: int) -> int:
        """How many of the last tokens of a prompt vote; 0: it stays whole."""
        return min(tokens, self.config.observation) if self.config.of_prompt(tokens) else 0

    def due(self, requests: Sequence[ServedRequest]) -> list[EvictionPlan]:
        """The plans of all requests whose prompts are in the pool and still to be compressed."""
        plans = []
        for request in requests:
            how = self.config.of_prompt(request.prompt) if request.prompt <= request.stored else None
            if how is not None and how.max_cache_tokens is not None:
                keep, queries = how.max_cache_tokens, len(request.voters)
                plans.append(EvictionPlan(request, 0, 1, request.prompt, keep, queries, findable=True))
        return plans

    def select(
        self,
        layer: int,
        plans: Sequence[EvictionPlan],
        keys: torch.Tensor,
        logits: Logits,
        values: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return torch.stack([self._survivors(layer, plan, part, logits) for plan, part in zip(plans, keys, strict=True)])

    def _survivors(self, layer: int, plan: EvictionPlan, keys: torch.Tensor, logits: Logits) -> torch.Tensor:
        """Of one prompt with keys ``[H, P, D]``, ``[H, keep]``."""
        (heads, tokens, _), how = keys.shape, self.config.of_prompt(plan.width)
        assert how is not None
        policy = KVCompressPolicy(how)
        queries = self.queries.read(layer, [plan.request.voters])[0]
        scaling, softcap, sink_logits = logits
        votes = policy.observe(queries, keys, scaling=scaling, softcap=softcap, sink_logits=sink_logits)
        if votes.isnan().any():
            raise ValueError(
                f"the votes on a prompt in layer {layer} are NaN: the model's queries or keys are not finite; load it "
                "in bfloat16 or float32"
            )
        eviction = policy.evict(
            votes[None],
            torch.arange(tokens, device=keys.device).expand(1, heads, -1),
            torch.full((1, heads), tokens, device=keys.device),
            np.array([tokens]),
            policy.quota(np.array([tokens]), heads, heads * tokens, 0),
            voters=[((tokens - plan.queries, tokens),)],
            pins=[how.pin],
        )
        return (~eviction.dropped[0]).nonzero()[:, 1].view(heads, plan.keep)

    def brought(self, request: ServedRequest, column: int, length: int) -> Brought | None:
        """The queries to hold of a step whose columns from `column` on are the newest `length` tokens of a request.

        Without room for them, its prompt stays whole.
        """
        count, before = self.voters(request.prompt), request.stored - length
        start = max(before, request.prompt - count)
        new = min(request.stored, request.prompt) - start
        if new <= 0:
            return None
        if not request.voters:
            taken = self.queries.take(count)
            if taken is None:
                self.drop(request)
                return None
            request.voters = taken
        first = start - (request.prompt - count)
        return Brought(column + start - before, first, new, request.voters, Sampling(count, count))

    def done(self, plan: EvictionPlan) -> None:
        """Books a cut that was carried out."""
        request = plan.request
        request.evict("prompt", plan.start, plan.width, plan.keep)
        request.settled -= plan.dropped
        self.drop(request)

    def drop(self, request: ServedRequest) -> None:
        """Forgets a prompt that was compressed, stays whole or is gone."""
        self.queries.give(request.voters)
        request.prompt, request.voters = 0, []
