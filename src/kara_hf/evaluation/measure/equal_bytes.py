"""Equal bytes: the share with which a method holds what another holds with the budget for its share, or the budget
itself of what the full cache holds.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from ...methods.registry import Method, Plan
from .diverged import EQUAL
from .request import Request, TokenizedExample

TRIAL_EXAMPLES = 8  # on which bytes are made equal
TOLERANCE = 0.005  # by how much of the reference's bytes a method may hold more, where it can help it
TRIALS = 8  # of a method, to find its share
CLOSE = 0.01  # of a budget of bytes: what is not worth another trial

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
        """A share with which `method` holds about what the reference does with the budget for its share, and no more.
        Where there is none, the budget: such a method keeps as many tokens, and holds more.
        """
        reference = request.reference
        if request.equal == "tokens" or reference is None or method.name == reference.name:
            return plan.share
        allowed = self.held(examples, reference, plan)
        curve, tried = ShareCurve(request.shared.window), dict[float, float]()
        low, high, share = curve.least, 1.0, plan.share
        while len(tried) < TRIALS:
            tried[share] = self.held(examples, method, replace(plan, share=share)) / allowed
            curve.add(share, tried[share])
            if tried[share] > 1 + TOLERANCE:
                high = share
            elif tried[share] < 1 - 3 * TOLERANCE and share < 1:
                low = share
            else:
                break
            if high <= curve.least:
                break  # it cannot hold so little
            guess = curve.next_share(1 - CLOSE / 2, tried)
            if guess is None and low == curve.least and low not in tried:
                guess = low
            inside = guess is not None and low <= guess <= high and guess not in tried
            share = guess if guess is not None and inside else (low + high) / 2
        fitting = [share for share, held in tried.items() if held <= 1 + TOLERANCE]
        return max(fitting, key=lambda share: tried[share], default=plan.share)

    def held(self, examples: Sequence[TokenizedExample], method: Method, plan: Plan) -> int:
        """Most bytes held while so many tokens are generated as the examples' solutions have, whatever they are."""
        lengths = [len(example.ids) for example in examples]
        room = round(sum(example.expected for example in examples) / len(examples))
        key = (examples[0].example.task, method.name, plan.rule, plan.share, plan.shared, room)
        if key not in self._held:
            self._held[key] = self._trial(examples, method, replace(plan, prompts=lengths, seed=0), room)
        return self._held[key]


class ShareCurve:
    """What a method holds of the full cache's bytes, by share: nearly a line, so that few trials find any budget.

    Args:
        window: tokens in a window, of which one is the least that is kept.
    """

    def __init__(self, window: int):
        self.least = 1 / window
        self._held: dict[float, float] = {}

    def add(self, share: float, held: float) -> None:
        """With `share` the method held `held` of the full cache's bytes."""
        self._held[share] = held

    def next_share(self, budget: float, tried: Collection[float]) -> float | None:
        """The share to try next so that `budget` is held; None where what was `tried` will do, or no other helps."""
        if any(abs(self._held[share] / budget - 1) <= CLOSE for share in tried):
            return None
        points = sorted(self._held.items())
        below = [point for point in points if point[1] <= budget]
        above = [point for point in points if point[1] > budget]
        if below and above:
            ends = below[-1], above[0]
        else:
            outer = points if above else points[::-1]
            ends = outer[0], outer[min(1, len(outer) - 1)]
        (share, held), (other, more) = ends
        slope = (more - held) / (other - share) if other != share else 1.0
        if slope <= 0:
            return None
        found = min(1.0, share + (budget - held) / slope)
        if found < self.least:
            if held - (share - self.least) * slope > (1 + EQUAL) * budget:
                return None  # it cannot hold so little
            found = self.least
        return None if any(abs(found / share - 1) < CLOSE / 2 for share in tried) else found

    def best(self, budget: float, tried: Collection[float]) -> float:
        """Of the shares that were `tried` the one that comes closest, or the budget itself where all hold more."""
        if all(self._held[share] > (1 + EQUAL) * budget for share in tried):
            return budget
        return min(tried, key=lambda share: abs(self._held[share] - budget))
