"""Settings of Kara while serving."""

from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

from ..config import KaraConfig, Settings, is_int, require
from ..policy import KaraPolicy

When = Literal["periodic", "pressure"]
Scope = Literal["window", "trace"]


@dataclass(frozen=True)
class ServingConfig(Settings):
    """When requests of an engine are compressed, and what is kept of them (KvLLM, arXiv 2607.01237).

    Attributes:
        kara: what is kept of a window. Prompts are always kept whole, since requests may share their blocks; the
            engine's pages stand for `block_size`.
        period: engine steps from one compression to the next, from 1 on.
        requests: K, requests compressed at once, those that give most blocks back; None: all that have a window due.
        when: "periodic" compresses every `period` steps; "pressure" only in such a step in which requests wait for
            blocks or would be preempted.
        scope: "window" seals windows one by one, as Kara does; "trace" takes everything behind the prompt, survivors of
            earlier times too, down to ``retention * window`` tokens whenever `window` more than the recent tokens are
            there: the control, for scores that need no queries.

    Raises:
        ValueError: a setting is out of range or does not go with another; the message names it and its value.
    """

    kara: KaraConfig = field(default_factory=lambda: KaraConfig(block_size=1))
    period: int = 64
    requests: int | None = None
    when: When = "periodic"
    scope: Scope = "window"

    @classmethod
    def of(cls, **settings: Any) -> Self:
        """From settings of this class and of `KaraConfig` by name. Raises TypeError where there is no such setting."""
        own = {name: settings.pop(name) for name in ("period", "requests", "when", "scope") if name in settings}
        return cls(kara=KaraConfig(**{"block_size": 1} | settings), **own)

    def __post_init__(self) -> None:
        require(is_int(self.period) and self.period >= 1, "period", self.period, "a number of steps from 1 on")
        require(
            self.requests is None or (is_int(self.requests) and self.requests >= 1),
            "requests",
            self.requests,
            "a number of requests from 1 on, or None for all",
        )
        require(self.when in get_args(When), "when", self.when, " or ".join(get_args(When)))
        require(self.scope in get_args(Scope), "scope", self.scope, " or ".join(get_args(Scope)))
        require(
            not self.kara.compress_prompt,
            "compress_prompt",
            True,
            "False while serving, since requests share the blocks of their prompts",
        )
        policy = KaraPolicy(self.kara)
        require(
            not policy.needs_moments, "score", self.kara.score, "one that needs no moments of queries while serving"
        )
        require(
            self.scope == "window" or not policy.needs_queries,
            "score",
            self.kara.score,
            'one that needs no queries with scope="trace", such as key-norm, recency or random',
        )
