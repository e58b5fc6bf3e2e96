"""Equal bytes: the share with which a method holds what another holds with the budget for its share."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ...methods.registry import Method, Plan
from .request import Request, TokenizedExample

TRIAL_EXAMPLES = 8  # on which bytes are made equal
TOLERANCE = 0.005  # by how much of the reference's bytes a method may hold more, where it can help it
HALVINGS = 7

# From examples, method, plan and a number of tokens: bytes held at most while exactly so many are generated.
Trial = Callable[[Sequence[TokenizedExample], Method, Plan, int], int]


class EqualBytes:
    """Finds shares, and remembers what every trial held.

    Args:
        trial: runs a method and counts.
    """

    def __init__(self, trial: Trial):
        self._trial = trial
        self._held: dict[tuple[Any, ...], int] = {}

    def share(self, examples: Sequence[TokenizedExample], method: Method, plan: Plan, request: Request) -> float:
        """The largest share with which `method` holds no more than the reference does with the budget for its share.
        Where there is none, the budget: such a method keeps as many tokens, and holds more.
        """
        reference = request.reference
        if request.equal == "tokens" or reference is None or method.name == reference.name:
            return plan.share
        allowed = (1 + TOLERANCE) * self.held(examples, reference, plan)

        def fits(share: float) -> bool:
            return self.held(examples, method, replace(plan, share=share)) <= allowed

        low, high = 1 / request.shared.window, 1.0
        if fits(plan.share):
            if self.held(examples, method, plan) >= (1 - 3 * TOLERANCE) * allowed:
                return plan.share
            low = plan.share
        elif fits(low):
            high = plan.share
        else:
            return plan.share
        if high == 1.0 and fits(high):
            return high
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def held(self, examples: Sequence[TokenizedExample], method: Method, plan: Plan) -> int:
        """Most bytes held while so many tokens are generated as the examples' solutions have, whatever they are."""
        lengths = [len(example.ids) for example in examples]
        room = round(sum(example.expected for example in examples) / len(examples))
        key = (examples[0].example.task, method.name, plan.rule, plan.share, plan.shared, room)
        if key not in self._held:
            self._held[key] = self._trial(examples, method, replace(plan, prompts=lengths, seed=0), room)
        return self._held[key]
