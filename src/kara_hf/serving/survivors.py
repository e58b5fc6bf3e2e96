"""Which tokens of an engine's requests survive, chosen from the keys in its pool."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

import torch

from .plans import EvictionPlan
from .pool import Pool
from .query_recorder import Logits

Survivors = dict[str, dict[int, torch.Tensor]]  # by key of a request and layer: ``[count, H, keep]`` int64


class Chooser(Protocol):
    """What chooses survivors: of windows, or of prompts."""

    @property
    def needs_values(self) -> bool:
        """Whether it reads values."""

    def select(
        self,
        layer: int,
        plans: Sequence[EvictionPlan],
        keys: torch.Tensor,
        logits: Logits,
        values: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Survivors in one layer as places in the windows of `plans`, ``[b, H, keep]`` int64, ascending.

        Args:
            layer: its index.
            plans: that differ in request and number of windows alone.
            keys: of all their windows, ``[b, H, width, D]``.
            logits: how the layer makes them.
            values: of all their windows, ``[b, H, width, Dv]``, if it needs them.

        Raises:
            ValueError: what ranks tokens is NaN.
        """


def choose_each(
    pool: Pool, chooser: Chooser, logits: dict[int, Logits], plans: Sequence[EvictionPlan]
) -> tuple[Survivors, dict[str, str]]:
    """What `choose` returns of those for which it does not raise, and by key of the request why it did."""
    with suppress(Exception):
        return choose(pool, chooser, logits, plans), {}
    chosen: Survivors = {}
    errors: dict[str, str] = {}
    for plan in plans:  # a request's error, or what a score of the user's raises: find out whose
        try:
            chosen |= choose(pool, chooser, logits, [plan])
        except Exception as error:
            errors[plan.request.key] = str(error)  # as text: an error holds what its frames hold
    return chosen, errors


def choose(pool: Pool, chooser: Chooser, logits: dict[int, Logits], plans: Sequence[EvictionPlan]) -> Survivors:
    """For each request and layer the survivors as places in its windows, ``[count, H, keep]`` int64.

    Raises:
        ValueError: a score is NaN. Otherwise what a score raises.
    """
    chosen: Survivors = {plan.request.key: {} for plan in plans}
    kinds = {(plan.width, plan.keep, plan.queries) for plan in plans}
    for width, keep, queries in sorted(kinds):
        group = [plan for plan in plans if (plan.width, plan.keep, plan.queries) == (width, keep, queries)]
        places = [pool.rows(plan)[: plan.count * width] for plan in group]
        rows = torch.tensor([row for part in places for row in part], device=pool.cache.device)
        for layer in pool.layers:
            keys = pool.keys(layer, rows).unflatten(0, (-1, width)).transpose(1, 2)
            values = None
            if chooser.needs_values:
                values = pool.values(layer, rows).unflatten(0, (-1, width)).transpose(1, 2)
            kept = chooser.select(layer, group, keys, logits.get(layer, Logits(keys.shape[-1] ** -0.5)), values)
            for plan, part in zip(group, kept.split([plan.count for plan in group]), strict=True):
                chosen[plan.request.key][layer] = part
    return chosen
