"""Which tokens of an engine's requests survive, chosen from the keys in its pool."""

from collections.abc import Sequence
from contextlib import suppress

import torch

from .compressor import Compressor, EvictionPlan
from .pool import Pool

Logits = dict[int, tuple[float, float | None]]  # of each layer: scaling and soft cap
Survivors = dict[str, dict[int, torch.Tensor]]  # by key of a request and layer: ``[count, H, keep]`` int64


def choose_each(
    pool: Pool, compressor: Compressor, logits: Logits, plans: Sequence[EvictionPlan]
) -> tuple[Survivors, dict[str, str]]:
    """What `choose` returns of those for which it does not raise, and by key of the request why it did."""
    with suppress(Exception):
        return choose(pool, compressor, logits, plans), {}
    chosen: Survivors = {}
    errors: dict[str, str] = {}
    for plan in plans:  # a request's error, or what a score of the user's raises: find out whose
        try:
            chosen |= choose(pool, compressor, logits, [plan])
        except Exception as error:
            errors[plan.request.key] = str(error)  # as text: an error holds what its frames hold
    return chosen, errors


def choose(pool: Pool, compressor: Compressor, logits: Logits, plans: Sequence[EvictionPlan]) -> Survivors:
    """For each request and layer the survivors as places in its windows, ``[count, H, keep]`` int64.

    Raises:
        ValueError: a score is NaN. Otherwise what a score raises.
    """
    chosen: Survivors = {plan.request.key: {} for plan in plans}
    kinds = {(plan.width, plan.keep, plan.queries) for plan in plans}
    for width, keep, queries in sorted(kinds):
        group = [plan for plan in plans if (plan.width, plan.keep, plan.queries) == (width, keep, queries)]
        places = [pool.open_rows(plan.request)[: plan.count * width] for plan in group]
        rows = torch.tensor([row for part in places for row in part], device=pool.cache.device)
        for layer in pool.layers:
            keys = pool.keys(layer, rows).unflatten(0, (-1, width)).transpose(1, 2)
            scaling, softcap = logits.get(layer, (keys.shape[-1] ** -0.5, None))
            values = None
            if compressor.policy.score.values:
                values = pool.values(layer, rows).unflatten(0, (-1, width)).transpose(1, 2)
            kept = compressor.select(layer, group, keys, scaling, softcap, values)
            for plan, part in zip(group, kept.split([plan.count for plan in group]), strict=True):
                chosen[plan.request.key][layer] = part
    return chosen
