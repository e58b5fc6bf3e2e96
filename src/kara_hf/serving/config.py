"""Settings of Kara while serving."""

import json
import math
import warnings
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self, get_args

from ..config import KaraConfig, KVCompressConfig, Settings, count_pinned, is_int, is_number, require
from ..policy import KaraPolicy

Trigger = Literal["periodic", "pressure"]
Unit = Literal["window", "trace"]

_OLD_NAMES = {"when": "trigger", "scope": "unit", "requests": "max_requests"}


@dataclass(frozen=True)
class ServingConfig(Settings):
    """When requests of an engine are compressed, and what is kept of them (KvLLM, arXiv 2607.01237).

    Attributes:
        kara: what is kept of a window; its sinks and pins are those of prompts too, and of every request. The engine's
            pages stand for `block_size`.
        period: engine steps from one compression to the next, from 1 on.
        max_requests: K, requests compressed at once, those that give most blocks back; None: all with a window due.
        trigger: "periodic" compresses every `period` steps; "pressure" only in such a step in which requests wait for
            blocks or would be preempted.
        unit: "window" seals windows one by one, as Kara does; "trace" takes everything behind the prompt, survivors of
            earlier times too, down to ``retention * window`` tokens whenever `window` more than the recent tokens are
            there: the control, for scores that need no queries.
        prompt_retention: share of a prompt's tokens that every KV head keeps once the prompt has been read, in (0, 1],
            rounded up, and as many as `kara.min_cache_tokens` at least; None: all of them.
        max_prompt_tokens: the most tokens of a prompt that every KV head keeps, instead of a share; None: all of them.
        observation: last tokens of a prompt whose queries vote on what is kept of it.
        conversations: the most requests that have ended whose compressed tokens stay in the pool, until their room is
            needed, for the next turn to begin with; 0: none.

    Raises:
        ValueError: a setting is out of range or does not go with another; the message names it and its value.
    """

    kara: KaraConfig = field(default_factory=lambda: KaraConfig(block_size=1))
    period: int = 64
    max_requests: int | None = None
    trigger: Trigger = "periodic"
    unit: Unit = "window"
    prompt_retention: float | None = None
    max_prompt_tokens: int | None = None
    observation: int = 32
    conversations: int = 0

    @classmethod
    def from_json(cls, text: str) -> Self:
        data: dict[str, Any] = json.loads(text)
        return cls(**data | {"kara": KaraConfig(**data.get("kara", {"block_size": 1}))})

    @classmethod
    def of(cls, **settings: Any) -> Self:
        """From settings of this class and of `KaraConfig` by name.

        The old names ``when``, ``scope`` and ``requests`` still work, with a FutureWarning.

        Raises:
            TypeError: there is no such setting, or it is given under both of its names.
        """
        for old, new in _OLD_NAMES.items():
            if old in settings:
                if new in settings:
                    raise TypeError(f"{old} is the old name of {new}; give {new} alone")
                warnings.warn(f"{old} is called {new} now; the old name goes with the next version", FutureWarning, 3)
                settings[new] = settings.pop(old)
        names = {field.name for field in fields(cls)} - {"kara"}
        own = {name: settings.pop(name) for name in names & settings.keys()}
        return cls(kara=KaraConfig(**{"block_size": 1} | settings), **own)

    def __post_init__(self) -> None:
        require(is_int(self.period) and self.period >= 1, "period", self.period, "a number of steps from 1 on")
        require(
            self.max_requests is None or (is_int(self.max_requests) and self.max_requests >= 1),
            "max_requests",
            self.max_requests,
            "a number of requests from 1 on, or None for all",
        )
        require(self.trigger in get_args(Trigger), "trigger", self.trigger, " or ".join(get_args(Trigger)))
        require(self.unit in get_args(Unit), "unit", self.unit, " or ".join(get_args(Unit)))
        for name in ("bits", "key_bits", "value_bits"):
            require(
                getattr(self.kara, name) is None,
                name,
                getattr(self.kara, name),
                "None while serving: the pool of Transformers' engine holds keys and values of one dtype",
            )
        require(
            self.unit == "window" or not self.kara.pin,
            "pin",
            self.kara.pin,
            'left out with unit="trace", whose window is everything behind the prompt',
        )
        require(
            self.kara.prefill_chunk is None,
            "prefill_chunk",
            self.kara.prefill_chunk,
            "None while serving, where the engine makes chunks (max_batch_tokens)",
        )
        require(
            not self.kara.compress_prompt,
            "compress_prompt",
            True,
            "False while serving, where prompts are compressed by prompt_retention or max_prompt_tokens",
        )
        share, most, pinned = self.prompt_retention, self.max_prompt_tokens, self._pinned()
        least = self.kara.sinks + pinned + 2
        of_pins = f"{pinned} pinned tokens, " if pinned else ""
        require(
            share is None or (is_number(share) and 0 < share <= 1),
            "prompt_retention",
            share,
            "a number in (0, 1], or None",
        )
        require(
            most is None or (is_int(most) and most >= least),
            "max_prompt_tokens",
            most,
            f"a whole number from {least} on, for sinks={self.kara.sinks}, {of_pins}the last token and one to choose, "
            "or None",
        )
        if share is not None and most is not None:
            raise ValueError(
                f"prompt_retention={share} and max_prompt_tokens={most} are not possible together: give the share of a "
                "prompt that is kept, or the most tokens of it"
            )
        require(
            is_int(self.observation) and self.observation >= 1,
            "observation",
            self.observation,
            "a whole number of tokens from 1 on",
        )
        require(
            is_int(self.conversations) and self.conversations >= 0,
            "conversations",
            self.conversations,
            "a whole number from 0 on",
        )
        require(
            self.unit == "window" or is_int(self.kara.recent),
            "recent",
            self.kara.recent,
            'a number of tokens with unit="trace"',
        )
        policy = KaraPolicy(self.kara)
        require(
            self.unit == "window" or not policy.needs_queries,
            "score",
            self.kara.score,
            'one that needs no queries with unit="trace", such as key-difference, recency or random',
        )

    def _pinned(self, tokens: int | None = None) -> int:
        """Pinned tokens behind the sinks, of a prompt of so many tokens or of any."""
        return count_pinned(self.kara.pin, self.kara.sinks, tokens)

    @property
    def compresses_prompts(self) -> bool:
        """Whether of some prompt not all is kept."""
        return self.max_prompt_tokens is not None or self.prompt_retention not in (None, 1)

    def of_prompt(self, tokens: int) -> KVCompressConfig | None:
        """How a prompt of so many tokens is compressed: to `max_cache_tokens` of them. None: it stays whole."""
        keep = self.max_prompt_tokens
        if self.prompt_retention is not None:
            least = self.kara.sinks + self._pinned(tokens) + 2
            keep = max(least, self.kara.least_held, math.ceil(self.prompt_retention * tokens - 1e-9))
        if keep is None or keep >= tokens:
            return None
        return KVCompressConfig(
            max_cache_tokens=keep,
            observation=self.observation,
            sinks=self.kara.sinks,
            pin=tuple((start, min(end, tokens)) for start, end in self.kara.pin if start < tokens),
            accumulate=False,
            continual=False,
            block_size=1,
        )
