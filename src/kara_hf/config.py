"""Settings of the methods: plain data that is checked when it is made and survives a round trip through JSON."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self

Pins = tuple[tuple[int, int], ...]  # stretches of true positions from a first to a last, which is not in; ascending

LEAST_TOKENS = 128  # that a share of a short sequence leaves of it where nothing else is said


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Raises ValueError naming the setting, its value and what would be accepted."""
    if not condition:
        raise ValueError(f"{name}={value!r} is not possible: {name} must be {expected}")


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_count_or_share(value: object, least: int) -> bool:
    """Whether it is a whole number from `least` on, or a float in (0, 1)."""
    return 0 < value < 1 if isinstance(value, float) else is_int(value) and value >= least  # type: ignore[operator]


def as_pins(pins: Iterable[tuple[int, int]]) -> Pins:
    """Stretches ``(start, end)`` in order, of which no two touch. Raises ValueError, naming the one that is none."""
    remedy = (
        "a list of (start, end), true positions with 0 <= start < end, of which end is the first that is not pinned"
    )
    if isinstance(pins, str):
        remedy += "; kara_hf.system_pin(tokenizer, messages) finds those of a system message"
    require(isinstance(pins, list | tuple), "pin", pins, remedy)
    for each in pins:
        pair = isinstance(each, list | tuple) and len(each) == 2 and all(map(is_int, each))
        require(pair and 0 <= each[0] < each[1], "pin", each, remedy)
    return merged(pins)


def parse_pins(text: str) -> Pins:
    """Stretches of a text like "0:20, 300:340". Raises ValueError."""
    parts = [part.split(":") for part in text.split(",") if part.strip()]
    numbers = [[int(end) if end.strip().isdecimal() else end for end in part] for part in parts]
    require(all(len(part) == 2 for part in numbers), "pin", text, "START:END, several of them separated by commas")
    return as_pins(numbers)  # type: ignore[arg-type]


def merged(stretches: Iterable[tuple[int, int]]) -> Pins:
    """Stretches in order, with those that touch as one and without empty ones."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted((int(start), int(stop)) for start, stop in stretches if start < stop):
        if found and start <= found[-1][1]:
            start, last = found.pop()
            stop = max(stop, last)
        found.append((start, stop))
    return tuple(found)


def count_pinned(pins: Pins, sinks: int, tokens: int | None = None) -> int:
    """Pinned tokens behind the `sinks`: of the first `tokens`, or all of them."""
    ends = (end if tokens is None else min(end, tokens) for _, end in pins)
    return sum(max(0, end - max(start, sinks)) for (start, _), end in zip(pins, ends, strict=True))


def check_chunk(tokens: int | None) -> None:
    """Raises ValueError if a prompt cannot be read in chunks of so many tokens."""
    fits = tokens is None or (is_int(tokens) and tokens >= 2)
    require(fits, "prefill_chunk", tokens, "a whole number of tokens from 2 on, or None")


KEY_BITS, VALUE_BITS = (8, 4), (8, 4, 2)


def rounding_bits(bits: int | None, key_bits: int | None, value_bits: int | None) -> tuple[int, int] | None:
    """Bits of keys and of values; None: nothing is rounded. Raises ValueError, naming the setting and the remedy."""
    for name, value, allowed in (
        ("bits", bits, KEY_BITS),
        ("key_bits", key_bits, KEY_BITS),
        ("value_bits", value_bits, VALUE_BITS),
    ):
        expected = f"one of {', '.join(map(str, allowed))}, or None"
        require(value is None or (is_int(value) and value in allowed), name, value, expected)
    of_keys, of_values = key_bits or bits, value_bits or bits
    if of_keys is None and of_values is None:
        return None
    if of_keys is None or of_values is None:
        raise ValueError(
            f"key_bits={key_bits} with value_bits={value_bits} is not possible without bits: keys and values are "
            "rounded together; give bits, or both"
        )
    return of_keys, of_values


@dataclass(frozen=True)
class Settings:
    """What the settings of every method have in common: a form in JSON."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises TypeError on an unknown setting, ValueError on one out of range."""
        data: dict[str, Any] = json.loads(text)
        return cls(**data)


@dataclass(frozen=True)
class KaraConfig(Settings):
    """Settings of Kara (arXiv 2607.01237): what is kept of every window of tokens. `PUBLISHED` are those of the paper
    where defaults are ours: ``KaraCache(model, **KaraConfig.PUBLISHED)``.

    Attributes:
        retention: share of a window's tokens that each KV head keeps, in (0, 1]; where `recent` is a share, the share
            of all tokens, recent ones among them, that it holds in the long run.
        window: tokens in a window; a multiple of `block_size`.
        recent: newest tokens that are always kept whole; or a share in (0, 1) of the tokens that a head holds, a prompt
            that is kept whole left out: a window then seals once what stays open behind it is that share of what is
            held after. Queries, if the score needs them, are held of all open tokens, which then grow with the
            sequence.
        min_cache_tokens: tokens that a head holds at least, a prompt that is kept whole left out: a window seals once
            it leaves so many, newer ones among them. The beginning of an answer is then whole, at no more bytes than a
            long one ends with. None: one window where `recent` is a share, of which little is too little; otherwise
            0. Ours.
        sinks: first tokens of a sequence that are kept whatever their score: language models lay the attention that
            they need nowhere on these, and fall apart without (arXiv 2309.17453). They are among the tokens that their
            window keeps; where they are more than that, the window keeps them and no others.
        pin: stretches ``(start, end)`` of true positions that are kept as sinks are, in every sequence.
        score: what ranks a window's tokens: the name of a score; `KaraPolicy` refuses one that is not
            registered.
        queries: how many queries of a window every query head holds for a score that needs them, spread evenly over
            the window and over the heads of a key, from 1 on; None, or more than `window`: all, as published. Means
            over queries are estimated by a sample, at a fraction of the bytes. The recent tokens are sampled as
            densely. Ours.
        anchor_share: share of the kept tokens that are picked singly, by score, before Token2Chunk fills gaps between
            them, in (0, 1]; 1 is plain top-k.
        compress_prompt: whether the prompt is walked in windows too; otherwise it is kept whole.
        prefill_chunk: a prompt or turn of more tokens is read in chunks of at most so many, from 2 on; None: at once.
        bits: how many bits of every number of keys and values are stored once a token has settled, 8 or 4; None: tokens
            stay in the model's dtype. Sinks, open and recent tokens always do. Ours.
        key_bits, value_bits: the same of keys and of values alone, where these differ from `bits`; values may have 2.
        block_size: slots per block.
        seed: of the random scores.

    Raises:
        ValueError: a setting is out of range; the message names it, its value and the range.
    """

    PUBLISHED: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"window": 256, "recent": 32, "score": "bidirectional", "queries": None}
    )

    retention: float = 0.25
    window: int = 128
    recent: int | float = 0.5
    min_cache_tokens: int | None = None
    sinks: int = 4
    pin: Pins = ()
    score: str = "blend"
    queries: int | None = 4
    anchor_share: float = 0.5
    compress_prompt: bool = False
    prefill_chunk: int | None = None
    bits: int | None = None
    key_bits: int | None = None
    value_bits: int | None = None
    block_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "pin", as_pins(self.pin))
        require(
            is_number(self.retention) and 0 < self.retention <= 1, "retention", self.retention, "a number in (0, 1]"
        )
        require(
            is_int(self.block_size) and self.block_size >= 1, "block_size", self.block_size, "a whole number from 1 on"
        )
        require(is_int(self.window) and self.window >= 2, "window", self.window, "a whole number of tokens from 2 on")
        require(
            self.window % self.block_size == 0,
            "window",
            self.window,
            f"a multiple of block_size={self.block_size}, so that sealing it frees whole blocks; round it or lower "
            "block_size",
        )
        require(
            is_count_or_share(self.recent, 0),
            "recent",
            self.recent,
            "a whole number of tokens from 0 on, or a share of the tokens held in (0, 1)",
        )
        for name, value in (("min_cache_tokens", self.least_held), ("sinks", self.sinks)):
            require(is_int(value) and value >= 0, name, value, "a whole number of tokens from 0 on")
        require(
            self.queries is None or (is_int(self.queries) and self.queries >= 1),
            "queries",
            self.queries,
            "a whole number from 1 on, or None for all",
        )
        require(
            is_number(self.anchor_share) and 0 < self.anchor_share <= 1,
            "anchor_share",
            self.anchor_share,
            "a number in (0, 1]",
        )
        require(isinstance(self.compress_prompt, bool), "compress_prompt", self.compress_prompt, "True or False")
        check_chunk(self.prefill_chunk)
        rounding_bits(self.bits, self.key_bits, self.value_bits)
        require(is_int(self.seed), "seed", self.seed, "a whole number")

    @property
    def kept_per_window(self) -> int:
        """k, the tokens a KV head keeps of each window with no more pins: max(1, round(r * W)) of a retention r.

        With a share s of recent tokens, windows keep r (1 - s) / (1 - r s) instead of r: of N tokens r N are held then,
        s r N of them recent ones and the others those of N - s r N tokens in windows.
        """
        share: float = self.retention
        if isinstance(self.recent, float):
            share *= (1 - self.recent) / (1 - self.retention * self.recent)
        return max(1, round(share * self.window))

    @property
    def least_held(self) -> int:
        """Tokens that a head holds at least: `min_cache_tokens`, or what None stands for."""
        if self.min_cache_tokens is not None:
            return self.min_cache_tokens
        return self.window if isinstance(self.recent, float) else 0

    @property
    def queries_held(self) -> int:
        """Queries of a window that every query head holds for a score that needs them."""
        return self.window if self.queries is None else min(self.queries, self.window)

    @property
    def anchors(self) -> int:
        """The tokens of a window picked singly, of k that are kept."""
        return self.anchors_of(self.kept_per_window)

    def anchors_of(self, kept: int) -> int:
        """m = max(1, round(anchor_share * kept)), the tokens picked singly of so many that are chosen."""
        return max(1, round(self.anchor_share * kept))

    def check_budget(self, pins: Pins) -> None:
        """As of `KVCompressConfig`: a window keeps all that is pinned in it, however much that is."""


@dataclass(frozen=True)
class KVCompressConfig(Settings):
    """Settings of KV-Compress (arXiv 2410.00161): how much a sequence may hold, and what ranks its tokens. `PUBLISHED`
    are those of the paper where defaults are ours, as in
    ``KVCompressCache(model, retention=r, **KVCompressConfig.PUBLISHED)``.

    Exactly one of `max_cache_tokens` and `retention` is given. Both are averages over all KV heads and layers of a
    sequence; a single head may hold far more or less.

    Controls change one thing and leave the rest as it is: ``metric="random"`` and ``"recency"`` say what votes are
    worth, ``levels=1`` what it is worth that heads differ. SnapKV is ``metric="l1", levels=1, accumulate=False``.

    Attributes:
        max_cache_tokens: C, most tokens per KV head and layer that a sequence holds once its prompt was compressed,
            partly filled blocks counted whole.
        retention: share that is kept of the tokens beyond `least_blocks`, in (0, 1].
        min_cache_tokens: tokens per KV head and layer, on average, that a `retention` leaves at least, so that a short
            sequence is not cut to a share of little. None: `LEAST_TOKENS` where `protected` is a share, otherwise 0.
            Ours.
        observation: w, last prompt queries that vote on what is kept; None: all of them, and no pooling.
        protected: newest cached tokens that are never evicted, from 1 on; or a share, in (0, 1), of what a row may hold
            on average behind its sinks and pins, which grows with the sequence where the budget does (`retention`).
        sinks: first tokens of a sequence that are never evicted.
        pin: stretches ``(start, end)`` of true positions that are never evicted, in every sequence.
        pool: width of the max-pool along keys, odd; 1 is no pooling.
        metric: what ranks tokens. "l2" sums squared attention probabilities, "l1" the probabilities. "recency" keeps
            the newest tokens, "random" those of large numbers, which `seed`, row and true position alone give, so that
            they are the same at every pass and in every batch. The last two take no votes: `observation`, `pool` and
            `accumulate` do nothing.
        votes: "sum" adds the votes on a token up, as published, so that those of old tokens count most; "mean" divides
            by how many queries could vote on it, those that came behind it and voted at all (ours).
        floor: further tokens that every head keeps at least, on top of `sinks` and `protected`.
        accumulate: whether queries vote while decoding too.
        continual: whether eviction goes on while decoding; otherwise it follows prompts only.
        prefill_chunk: a prompt or turn of more tokens is read in chunks of at most so many, from 2 on, and before each
            further one what was read is cut to the budget, by the votes of the last `observation` queries of every
            chunk so far; None: it is read at once, and cut when decoding begins.
        levels: different block counts that a pass may leave its compressed rows with; None: as many as there are rows,
            as published. 1 gives every row of a sequence the same count: the same metric with uniform heads.
        bits: how many bits of every number of keys and values are stored once a token has settled, 8 or 4; None: tokens
            stay in the model's dtype. Sinks and protected tokens always do. Ours.
        key_bits, value_bits: the same of keys and of values alone, where these differ from `bits`; values may have 2.
        block_size: slots per block.
        seed: of the random numbers.

    Raises:
        ValueError: a setting is out of range, or both or none of `max_cache_tokens` and `retention` are given; the
            message names the settings, their values and the remedy.
    """

    PUBLISHED: ClassVar[Mapping[str, Any]] = MappingProxyType({"protected": 32, "votes": "sum", "levels": None})

    max_cache_tokens: int | None = None
    retention: float | None = None
    min_cache_tokens: int | None = None
    observation: int | None = 32
    protected: int | float = 0.5
    sinks: int = 4
    pin: Pins = ()
    pool: int = 7
    metric: Literal["l2", "l1", "random", "recency"] = "l2"
    votes: Literal["sum", "mean"] = "mean"
    floor: int = 0
    accumulate: bool = True
    continual: bool = True
    prefill_chunk: int | None = None
    levels: int | None = 1
    bits: int | None = None
    key_bits: int | None = None
    value_bits: int | None = None
    block_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        def count(name: str, least: int, optional: bool = False) -> None:
            value = getattr(self, name)
            fits = (optional and value is None) or (is_int(value) and value >= least)
            require(fits, name, value, f"a whole number from {least} on" + (" or None" if optional else ""))

        object.__setattr__(self, "pin", as_pins(self.pin))
        for name, least in (("block_size", 1), ("sinks", 0), ("floor", 0)):
            count(name, least)
        require(
            is_count_or_share(self.protected, 1),
            "protected",
            self.protected,
            "a whole number from 1 on, or a share in (0, 1) of what a row may hold behind its sinks",
        )
        for name in ("observation", "levels"):
            count(name, 1, optional=True)
        check_chunk(self.prefill_chunk)
        require(is_int(self.pool) and self.pool >= 1 and self.pool % 2 == 1, "pool", self.pool, "an odd whole number")
        metrics = ("l2", "l1", "random", "recency")
        require(self.metric in metrics, "metric", self.metric, "'l2', 'l1', 'random' or 'recency'")
        require(self.votes in ("sum", "mean"), "votes", self.votes, "'sum' or 'mean'")
        require(isinstance(self.accumulate, bool), "accumulate", self.accumulate, "True or False")
        require(isinstance(self.continual, bool), "continual", self.continual, "True or False")
        rounding_bits(self.bits, self.key_bits, self.value_bits)
        require(is_int(self.seed), "seed", self.seed, "a whole number")
        if (self.max_cache_tokens is None) == (self.retention is None):
            raise ValueError(
                f"max_cache_tokens={self.max_cache_tokens!r} and retention={self.retention!r} are not possible "
                "together: give exactly one of them, max_cache_tokens (tokens per KV head and layer, on average) or "
                "retention (the share kept)"
            )
        if self.max_cache_tokens is not None:
            require(
                is_int(self.max_cache_tokens), "max_cache_tokens", self.max_cache_tokens, "a whole number of tokens"
            )
            self.check_budget(self.pin)
        elif self.retention is not None:
            require(
                is_number(self.retention) and 0 < self.retention <= 1, "retention", self.retention, "a number in (0, 1]"
            )
        given = self.min_cache_tokens
        fits = given is None or (is_int(given) and given >= 0 and self.max_cache_tokens is None)
        require(fits, "min_cache_tokens", given, "a whole number from 0 on, and goes with retention alone, or None")

    @property
    def least_held(self) -> int:
        """Tokens per row that a `retention` leaves at least: `min_cache_tokens`, or what None stands for."""
        if self.min_cache_tokens is not None:
            return self.min_cache_tokens
        return LEAST_TOKENS if self.retention is not None and isinstance(self.protected, float) else 0

    def check_budget(self, pins: Pins) -> None:
        """Raises ValueError, with the numbers, if `max_cache_tokens` cannot hold `pins` beside what has to stay."""
        if self.max_cache_tokens is None:
            return
        pinned = self.pinned(pins)
        blocks = self.least_blocks_with(pinned)
        least = self.block_size * (blocks + 1)
        of_pins = f", {pinned} pinned tokens" if pinned else ""
        require(
            self.max_cache_tokens >= least,
            "max_cache_tokens",
            self.max_cache_tokens,
            f"a whole number from {least} on: every row keeps {blocks} blocks of {self.block_size} for "
            f"sinks={self.sinks}{of_pins}, protected={self.protected} and floor={self.floor}, and needs one more for "
            "new tokens; raise it, or lower one of these",
        )

    def pinned(self, pins: Pins, tokens: int | None = None) -> int:
        """Pinned tokens behind the sinks: of the first `tokens`, or all of them."""
        return count_pinned(pins, self.sinks, tokens)

    @property
    def least_blocks(self) -> int:
        """Blocks that no row is ever cut below once all of `pin` was seen."""
        return self.least_blocks_with(self.pinned(self.pin))

    def least_blocks_with(self, pinned: int) -> int:
        """Blocks that no row is ever cut below where so many tokens are `pinned` behind the sinks: these and sinks,
        protected and floor tokens, rounded up to whole blocks.

        A share of what grows counts as one token here.
        """
        protected: int | float = self.protected
        if isinstance(protected, float):
            protected = max(1, round(protected * max(0, (self.max_cache_tokens or 0) - self.sinks - pinned)))
        return self.blocks_of(protected, pinned)

    def blocks_of(self, protected: int, pinned: int = 0) -> int:
        """Blocks that hold so many protected and pinned tokens with `sinks` and `floor`."""
        return -(-(self.sinks + pinned + protected + self.floor) // self.block_size)
