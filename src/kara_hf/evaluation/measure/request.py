"""What is to be measured, and what comes of a batch: plain data."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ...config import require
from ...methods.registry import Method, SharedSettings
from ...methods.rules import PROMPT_KEPT, RULES, rule_named
from ...needs import Need
from ...policy.sharing import PoDSharing
from ...tasks.task import Example


@dataclass(frozen=True)
class Request:
    """What is to be measured.

    Attributes:
        methods: in the order in which they run.
        budgets: shares that are kept, in (0, 1].
        rules: keys of `kara_hf.methods.rules.RULES`, or old spellings of them.
        seeds: of random methods; others run with the first.
        n: examples of each task.
        batch: sequences generated together.
        equal: "bytes": each method gets the share with which it holds as many bytes as `reference` does with the
            budget for its share, or the budget if it cannot hold so few; "tokens": each gets the budget as its share.
        reference: the method whose bytes count.
        shared: settings that are the same for all methods.
        sharing: for methods with shared keys.
        keep_text: whether answers are kept.

    Raises:
        ValueError: a value is not possible, or a method needs something that is not given.
    """

    methods: Sequence[Method]
    budgets: Sequence[float] = (0.5, 0.25, 0.125, 0.0625)
    rules: Sequence[str] = (PROMPT_KEPT,)
    seeds: Sequence[int] = (0,)
    n: int = 200
    batch: int = 16
    equal: Literal["bytes", "tokens"] = "bytes"
    reference: Method | None = None
    shared: SharedSettings = field(default_factory=SharedSettings)
    sharing: PoDSharing | None = None
    keep_text: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(map(rule_named, self.rules)))
        for budget in self.budgets:
            require(0 < budget <= 1, "budgets", budget, "shares in (0, 1]")
        for rule in self.rules:
            require(rule in RULES, "rules", rule, f"one of {', '.join(RULES)}")
        require(self.equal in ("bytes", "tokens"), "equal", self.equal, "'bytes' or 'tokens'")
        for name in ("n", "batch"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        names = [method.name for method in self.methods]
        require(len(names) > 0, "methods", None, "the name of at least one")
        require(len(set(names)) == len(names), "methods", ",".join(names), "each of them named once")
        for method in self.methods:
            method.check_given(sharing=self.sharing is not None)

    def needs(self) -> dict[str, Sequence[Need]]:
        """What its methods need, by name."""
        methods = [*self.methods, *([self.reference] if self.reference and self.equal == "bytes" else [])]
        return {method.name: method.needs for method in methods}

    def cells(self) -> Iterator[tuple[str, Method, float, int]]:
        """Rule, method, budget and seed of everything that is measured of a task; what has no budget comes first."""
        for method in self.methods:
            if not method.budgeted:
                yield "none", method, 1.0, self.seeds[0]
        for rule in self.rules:
            for budget in self.budgets:
                for method in self.methods:
                    if method.budgeted:
                        for seed in self.seeds if method.random else self.seeds[:1]:
                            yield rule, method, budget, seed


@dataclass(frozen=True)
class TokenizedExample:
    """An example as token ids.

    Attributes:
        example: the text.
        context: ids of the context.
        question: ids of the question behind it; empty where it has none of its own.
        expected: tokens that an answer takes: those of a worked solution, or all that there is room for.
    """

    example: Example
    context: list[int]
    question: list[int]
    expected: int

    @property
    def ids(self) -> list[int]:
        return self.context + self.question


@dataclass(frozen=True)
class Answers:
    """What a batch generated, and what that took.

    Attributes:
        tokens: ids of each answer, end of sequence included.
        mean_bytes, resident_bytes, peak_bytes: of the cache, for the whole batch.
        allocated_bytes: what a GPU's allocator gave out at most for all of it; NaN elsewhere.
        steps: decode steps.
        seconds: wall time.
    """

    tokens: list[list[int]]
    mean_bytes: float
    resident_bytes: int
    peak_bytes: int
    allocated_bytes: float
    steps: int
    seconds: float
