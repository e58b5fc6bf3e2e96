"""Every method that the kit compares, by name: what it spends its bytes on. Adding one is one function.

The window methods share one frame (`kara_hf.KaraCache`: trigger, window, recent tokens, blocks, protection of the
prompt) in which only the score changes; the eviction methods another (`kara_hf.KVCompressCache`), in which the metric
changes and whether heads may differ.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import DynamicCache, QuantizedCache
from transformers.cache_utils import Cache

from ..cache.caches import KaraCache, KVCompressCache, PoDCache
from ..cache.rounding import NEAREST
from ..config import KaraConfig, KVCompressConfig, require
from ..integration.attach import detach
from ..integration.shape import head_dim
from ..needs import Need, Package, extra
from ..policy.sharing import PoDSharing
from .float8 import Float8Cache
from .oracle import Future, OracleCache
from .peer_scores import PEERS
from .press_cache import KVPRESS, PressCache, import_kvpress
from .rules import PROMPT_KEPT

PRESS = "press:"
QUANTO = Package("optimum.quanto", extra("evaluate"), name="optimum-quanto")


@dataclass(frozen=True)
class SharedSettings:
    """Settings that are the same for all methods.

    Attributes:
        window, recent: of the window methods; `recent`, tokens or a share, is protected by the eviction methods too.
        min_cache_tokens: that window and eviction methods hold at least; None: as `kara_hf.KaraConfig`.
        block_size: slots per block.
        sinks: first tokens that window and eviction methods always keep where prompts are compressed.
        observation: last prompt queries that vote in eviction methods.
    """

    window: int = KaraConfig.window
    recent: int | float = KaraConfig.recent
    min_cache_tokens: int | None = KaraConfig.min_cache_tokens
    block_size: int = KaraConfig.block_size
    sinks: int = KaraConfig.sinks
    observation: int = 32

    @property
    def least_held(self) -> int:
        """Tokens that each method holds at least behind a prompt that is kept whole."""
        least = self.min_cache_tokens
        return KaraConfig(window=self.window, recent=self.recent, min_cache_tokens=least, block_size=1).least_held


@dataclass(frozen=True)
class Plan:
    """What a cache is made for.

    Attributes:
        shared: settings that are the same for all methods.
        rule: what may be compressed.
        share: of the tokens, that is kept where something may be dropped.
        prompts: tokens of each prompt of the batch.
        seed: of what is random.
        sharing: of PoD, or None.
        future: for the oracle; empty where only its bytes matter.
    """

    shared: SharedSettings
    rule: str
    share: float
    prompts: list[int]
    seed: int = 0
    sharing: PoDSharing | None = None
    future: Future = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """One way to spend memory.

    Attributes:
        name: how it is asked for.
        make: a cache for a model and a plan. The model is attached or detached for it.
        budgeted: whether `Plan.share` says how much it holds; otherwise it is run once, beside all budgets.
        random: whether `Plan.seed` changes what it keeps.
        oracle: whether it needs `Plan.future`.
        shares: whether it needs `Plan.sharing`.
        needs: what it needs beside this package.
        about: in words.
    """

    name: str
    make: Callable[[Any, Plan], Cache]
    about: str
    budgeted: bool = True
    random: bool = False
    oracle: bool = False
    shares: bool = False
    needs: tuple[Need, ...] = ()

    def check_given(self, *, sharing: bool) -> None:
        """Raises ValueError if the method needs a sharing map that is not given."""
        if self.shares and not sharing:
            raise ValueError(f"method {self.name!r} needs a sharing map; pass --sharing DIR, or leave it out")


def window_settings(plan: Plan) -> dict[str, Any]:
    """Settings of `KaraCache` as all window methods have them."""
    return {
        "retention": plan.share,
        "window": plan.shared.window,
        "recent": plan.shared.recent,
        "min_cache_tokens": plan.shared.min_cache_tokens,
        "sinks": plan.shared.sinks,
        "block_size": plan.shared.block_size,
        "compress_prompt": plan.rule != PROMPT_KEPT,
        "seed": plan.seed,
    }


def eviction_settings(plan: Plan) -> dict[str, Any]:
    """Settings of `KVCompressCache` as all eviction methods have them. A prompt that is kept is all sinks: of a batch,
    as many tokens as the longest prompt has.
    """
    kept = max(plan.prompts) if plan.rule == PROMPT_KEPT else 0
    return {
        "retention": plan.share,
        "min_cache_tokens": kept + plan.shared.least_held,
        "observation": plan.shared.observation,
        "protected": plan.shared.recent or 1,
        "sinks": kept or plan.shared.sinks,
        "block_size": plan.shared.block_size,
        "seed": plan.seed,
    }


def windows(score: str, **settings: Any) -> Callable[[Any, Plan], Cache]:
    """Kara's frame with another score, which gets all queries, and keeps the best tokens singly."""
    fixed = {"score": score, "anchor_share": 1.0, "queries": None} | settings
    return lambda model, plan: KaraCache(model, **window_settings(plan) | fixed)


def evictions(**settings: Any) -> Callable[[Any, Plan], Cache]:
    return lambda model, plan: KVCompressCache(model, **eviction_settings(plan) | settings)


def _full(model: Any, plan: Plan) -> Cache:
    detach(model)
    return DynamicCache(config=model.config)


def _adapted(model: Any, plan: Plan) -> Cache:
    """The full cache of the model that was adapted to the plan's sharing; see `kara_hf.integration.adapter`."""
    cache = _full(model, plan)
    cache.sharing = plan.sharing
    return cache


def _float8(model: Any, plan: Plan) -> Cache:
    detach(model)
    return Float8Cache(model.config)


def _quantized(bits: int) -> Callable[[Any, Plan], Cache]:
    def make(model: Any, plan: Plan) -> Cache:
        detach(model)
        text = model.config.get_text_config(decoder=True)
        group = next(n for n in (64, 32, 16, 8) if head_dim(text) % n == 0)
        return QuantizedCache("quanto", model.config, nbits=bits, q_group_size=group, residual_length=64)

    return make


def _pod(bits: int | None = None) -> Callable[[Any, Plan], Cache]:
    def make(model: Any, plan: Plan) -> Cache:
        assert plan.sharing is not None, "the method is marked as one that needs a sharing"
        return PoDCache(model, plan.sharing, bits=bits, block_size=plan.shared.block_size)

    return make


def _all_in(**bits: int) -> Callable[[Any, Plan], Cache]:
    """Every token, in few bits."""
    return windows("random", retention=1.0, recent=NEAREST, **bits)


def _oracle(model: Any, plan: Plan) -> Cache:
    return OracleCache(model, plan.future, **window_settings(plan))


def _press(name: str) -> Callable[[Any, Plan], Cache]:
    kind: Any = getattr(import_kvpress(), name, None)
    require(isinstance(kind, type), "method", PRESS + name, "the name of a scorer press of kvpress, like SnapKVPress")

    def make(model: Any, plan: Plan) -> Cache:
        press = kind()
        if hasattr(press, "window_size"):
            press.window_size = plan.shared.observation
        settings = eviction_settings(plan)
        del settings["observation"], settings["seed"]
        return PressCache(model, press, **settings)

    return make


# As published there is no least. Windows are those of all window methods, so that only what ranks tokens differs.
_PUBLISHED: dict[str, Any] = {**KVCompressConfig.PUBLISHED, "min_cache_tokens": 0}
_KARA_PUBLISHED: dict[str, Any] = {
    "anchor_share": KaraConfig.anchor_share,
    "min_cache_tokens": 0,
    **{name: value for name, value in KaraConfig.PUBLISHED.items() if name != "window"},
}
# What `KaraCache` is asked for where nothing is said.
KARA = {name: getattr(KaraConfig, name) for name in ("score", "queries", "anchor_share")}

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("full", _full, "Transformers' DynamicCache", budgeted=False),
        Method("kara", windows(**KARA), "KaraCache with default settings"),
        Method(
            "kara-published",
            windows(**_KARA_PUBLISHED),
            "Kara as published: bidirectional attention of all queries, Token2Chunk, 32 recent tokens",
        ),
        Method("kara-top-k", windows("bidirectional"), "bidirectional attention without Token2Chunk"),
        Method("causal", windows("causal"), "causal attention within the window"),
        Method("key-difference", windows("key-difference"), "keys least like the window's mean key (KeyDiff)"),
        Method(
            "random-chunks",
            windows("random-chunks", anchor_share=KaraConfig.anchor_share),
            "chunks as long as Kara's at random places",
            random=True,
        ),
        Method("random", windows("random"), "random tokens of the window, per head", random=True),
        Method("random-shared", windows("random-shared"), "random tokens, the same in all heads", random=True),
        Method("recency", windows("recency"), "the newest tokens of the window"),
        Method("oracle", _oracle, "most future attention of the full-cache run: the upper bound", oracle=True),
        *(Method(name, windows(name), about) for name, about in PEERS.items()),
        Method("kv-compress", evictions(), "KVCompressCache with default settings"),
        Method(
            "kv-compress-published",
            evictions(**_PUBLISHED),
            "KV-Compress as published: votes summed up, heads differ, 32 newest protected",
        ),
        Method("kv-compress-ragged", evictions(levels=None), "kv-compress, and heads may differ"),
        Method("kv-compress-chunked", evictions(prefill_chunk=512), "kv-compress, its prompt cut as it is read"),
        Method(
            "kv-compress-published-chunked",
            evictions(**_PUBLISHED, prefill_chunk=512),
            "kv-compress-published, its prompt cut as it is read",
        ),
        Method("kara-chunked", windows(**KARA, prefill_chunk=512), "kara, its prompt read in chunks"),
        Method(
            "kv-compress-random", evictions(metric="random", levels=1), "random tokens, evicted at once", random=True
        ),
        Method("streaming-llm", evictions(metric="recency", levels=1), "sinks, or the kept prompt, and the newest"),
        Method("pod", _pod(), "shared keys of distant tokens", budgeted=False, shares=True),
        Method("full-adapted", _adapted, "the full cache of the model that PoD adapted", budgeted=False, shares=True),
        Method("8bit", _all_in(bits=8), "all tokens, in 8 bits once they have settled", budgeted=False),
        Method("4bit", _all_in(bits=4), "the same in 4 bits", budgeted=False),
        Method("4bit-2bit", _all_in(key_bits=4, value_bits=2), "the same, values in 2 bits", budgeted=False),
        Method("kara-4bit", windows(**KARA, bits=4), "KaraCache with default settings, and what is kept in 4 bits"),
        Method("key-difference-4bit", windows("key-difference", bits=4), "key-difference, and what is kept in 4 bits"),
        Method("key-difference-8bit", windows("key-difference", bits=8), "the same in 8 bits"),
        Method("random-4bit", windows("random", bits=4), "random tokens in 4 bits", random=True),
        Method("kv-compress-4bit", evictions(bits=4), "kv-compress, and what a pass leaves in 4 bits"),
        Method("streaming-llm-4bit", evictions(metric="recency", levels=1, bits=4), "streaming-llm in 4 bits"),
        Method("pod-8bit", _pod(8), "shared keys of distant tokens, in 8 bits", budgeted=False, shares=True),
        Method("pod-4bit", _pod(4), "the same in 4 bits", budgeted=False, shares=True),
        Method(
            "kara+pod",
            lambda model, plan: KaraCache(model, **window_settings(plan), sharing=plan.sharing),
            "Kara on shared keys",
            shares=True,
        ),
        Method(
            "kv-compress+pod",
            lambda model, plan: KVCompressCache(model, **eviction_settings(plan), sharing=plan.sharing),
            "KV-Compress on shared keys",
            shares=True,
        ),
        Method("float8", _float8, "all tokens in 8-bit floating point", budgeted=False),
        *(
            Method(
                f"quantized-{bits}",
                _quantized(bits),
                f"Transformers' QuantizedCache, {bits} bits",
                budgeted=False,
                needs=(QUANTO,),
            )
            for bits in (4, 2)
        ),
    )
}


def needs_of(name: str) -> tuple[Need, ...]:
    """What the method of that name needs; nothing, where there is none of that name."""
    if name.startswith(PRESS):
        return KVPRESS
    return METHODS[name].needs if name in METHODS else ()


def make_method(name: str) -> Method:
    """The method of that name; ``press:SnapKVPress`` is that class of kvpress in the store of this package.

    Raises:
        ValueError: there is none.
        ModuleNotFoundError: kvpress, or what it imports, is not installed.
    """
    if name.startswith(PRESS) and len(name) > len(PRESS):
        kind = name.removeprefix(PRESS)
        return Method(name, _press(kind), f"{kind} of kvpress, freeing memory", needs=KVPRESS)
    known = ", ".join(METHODS)
    require(name in METHODS, "method", name, f"one of {known}, or {PRESS}NAME with a scorer press of kvpress")
    return METHODS[name]
