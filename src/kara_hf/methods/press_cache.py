"""Presses of kvpress as scorers of the paged store: what they rank lowest is memory given back, head by head.

    presses = import_kvpress()
    cache = PressCache(model, presses.SnapKVPress(window_size=32), max_cache_tokens=512)
    out = model.generate(**inputs, cache=cache)

Of a press only `score` is called: sequence by sequence, without padding, on what is stored in the order of true
positions. Budget, passes and memory are those of `kara_hf.KVCompressCache`.
"""

import importlib
from types import ModuleType
from typing import Any

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..cache.compressed import CompressedCache
from ..cache.compression import register_compression
from ..config import KVCompressConfig, is_int, require
from ..integration.attach import unwrap
from ..needs import Package
from .press_scoring import Listener, Press, PressCompression, PressPolicy

register_compression(PressPolicy, PressCompression)

_WITHOUT_ITS_REQUIREMENTS = "pip install --no-deps kvpress"
_BESIDE_IT = ("cachetools", "datasets", "fire", "requests")
KVPRESS = (
    Package("kvpress", _WITHOUT_ITS_REQUIREMENTS),
    *(Package(name, f"pip install {' '.join(_BESIDE_IT)}") for name in _BESIDE_IT),
)
OBSERVATION = 128  # hidden states held for a press that does not say how many it reads
# Presses that read keys and values alone, or do so where the press that they wrap does.
_BLIND = {
    "CriticalKVPress",
    "CURPress",
    "ExpectedAttentionStatsPress",
    "KeyDiffPress",
    "KnormPress",
    "LagKVPress",
    "QFilterPress",
    "RandomPress",
    "StreamingLLMPress",
}
# Presses whose score is defined where every stored token has its hidden state, or its query, at hand.
_PROMPTS_ONLY = {"CompactorPress", "KVzapPress", "LeverageScorePress", "NonCausalAttnPress", "ObservedAttentionPress"}
_READS_ATTENTIONS = {"ObservedAttentionPress"}


def import_kvpress() -> ModuleType:
    """Imports kvpress and puts back what importing it changes in Transformers: attention functions and pipelines.

    Presses of its own that evict by head, such as AdaKVPress, need these functions. To use such presses as well, import
    kvpress itself before; nothing is put back then.

    Raises:
        ModuleNotFoundError: kvpress, or what it imports, is not installed; the message says how it is done.
    """
    from transformers.pipelines import PIPELINE_REGISTRY

    functions: Any = ALL_ATTENTION_FUNCTIONS
    changed = (functions._local_mapping, functions._global_mapping, PIPELINE_REGISTRY.supported_tasks)
    before = [dict(mapping) for mapping in changed]
    try:
        return importlib.import_module("kvpress")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"kvpress cannot be imported, because {error.name} is not installed. Its requirements exclude this version "
            "of Transformers, so install it without them, and what it imports beside it: "
            f"`{_WITHOUT_ITS_REQUIREMENTS}` and `pip install {' '.join(_BESIDE_IT)}`"
        ) from error
    finally:
        for mapping, old in zip(changed, before, strict=True):
            mapping.clear()
            mapping.update(old)


def check_press(press: Any, continual: bool, attentions: bool) -> None:
    """Raises TypeError if `press` cannot score, ValueError if its score is not all there is to it or cannot be had."""
    name = type(press).__name__
    if isinstance(press, type) or not (callable(getattr(press, "score", None)) and hasattr(press, "compression_ratio")):
        raise TypeError(
            f"{press.__name__ if isinstance(press, type) else name} is not an instance of a ScorerPress (with `score` "
            "and `compression_ratio`), so there is no score to rank stored tokens by; pass one, or the press that it "
            "wraps"
        )
    for method in ("compress", "forward_hook", "__call__"):
        owner = next((kind.__name__ for kind in type(press).__mro__ if method in vars(kind)), "BasePress")
        if owner not in ("BasePress", "ScorerPress"):
            raise ValueError(
                f"{name} decides by more than its score ({owner}.{method} is its own), which would be left out here; "
                "pass a plain ScorerPress"
            )
    kinds = {kind.__name__ for each in (press, _innermost(press)) for kind in type(each).__mro__}
    if continual and kinds & _PROMPTS_ONLY:
        raise ValueError(
            f"{name} scores whole prompts only, and is not defined for what is left of one; pass continual=False"
        )
    if not attentions and kinds & _READS_ATTENTIONS:
        raise ValueError(
            f"{name} reads attention probabilities; pass attentions=True, which holds the queries of a prompt until it "
            "is cut, and then the probabilities of one sequence and layer at a time"
        )


def _innermost(press: Any) -> Any:
    """The press that a chain of presses which rescale one another's scores begins with."""
    while callable(getattr(getattr(press, "press", None), "score", None)):
        press = press.press
    return press


class PressCache(CompressedCache):
    """A cache that keeps what a press of kvpress ranks highest, and frees the rest.

    A prompt is cut when decoding begins, and a turn when the answer to it begins, by scores of everything stored. While
    decoding, what is stored is scored again every `block_size` tokens. Exactly one of `max_cache_tokens`,
    `retention` and a ``compression_ratio`` of the press, for 1 less the share kept, is given.

    Args:
        model: a Transformers causal LM, which may be wrapped by PEFT. It is attached by this call, and its attention
            modules get hooks that go with the cache.
        press: an instance of a kvpress `ScorerPress`, or anything with its `score` and `compression_ratio`.
        max_cache_tokens: tokens per KV head and layer that a sequence holds at most, on average, while it decodes.
        retention: share of the tokens that is kept, in (0, 1].
        min_cache_tokens: with `retention`: tokens per KV head and layer that it leaves at least, on average; None: as
            `kara_hf.KVCompressCache`, so 0 for a number of `protected` ones.
        protected: newest tokens that are never evicted, whatever their score.
        sinks: first tokens that are never evicted.
        floor: further tokens that every head keeps at least.
        levels: 1: every head of every layer keeps as many tokens, as with the press alone. None: all of them compete
            for one budget, by the scores as they come. Or a number of different lengths.
        observation: newest hidden states held behind a prompt or turn, whose own are held until it is cut; all are
            counted in `report().resident_bytes`. None: one more than the press's `window_size`, if it has one, and 128
            otherwise; 0 where `continual` is False. No hidden state is held for presses that read keys and values
            alone.
        attentions: gives the press attention probabilities, for which queries are held like hidden states.
        continual: whether eviction goes on while decoding; otherwise the cache grows behind the prompt.
        block_size: slots per block; every head keeps whole blocks.

    Raises:
        TypeError: `model` is no Transformers model, or `press` has no score.
        ValueError: the model, the press or a setting is not supported; the message says why.
    """

    def __init__(
        self,
        model: Any,
        press: Press,
        *,
        max_cache_tokens: int | None = None,
        retention: float | None = None,
        min_cache_tokens: int | None = None,
        protected: int = 0,
        sinks: int = 0,
        floor: int = 0,
        levels: int | None = 1,
        observation: int | None = None,
        attentions: bool = False,
        continual: bool = True,
        block_size: int = KVCompressConfig.block_size,
    ):
        require(isinstance(attentions, bool), "attentions", attentions, "True or False")
        check_press(press, continual, attentions)
        ratio = press.compression_ratio
        if ratio and (max_cache_tokens, retention) == (None, None):
            retention = 1 - ratio
        elif ratio:
            raise ValueError(
                f"compression_ratio={ratio} of {type(press).__name__} is not possible together with "
                f"max_cache_tokens={max_cache_tokens} or retention={retention}: leave the ratio 0, or both of them out"
            )
        config = KVCompressConfig(
            max_cache_tokens=max_cache_tokens,
            retention=retention,
            min_cache_tokens=min_cache_tokens,
            protected=1 if protected == 0 else protected,  # the block that every row has, whatever is in it
            sinks=sinks,
            floor=floor,
            levels=levels,
            continual=continual,
            block_size=block_size,
        )
        chain = {type(press).__name__, type(_innermost(press)).__name__}
        if observation is None and (attentions or chain - _BLIND):
            observation = 1 + getattr(_innermost(press), "window_size", OBSERVATION - 1) if continual else 0
        require(
            observation is None or (is_int(observation) and observation >= 0),
            "observation",
            observation,
            "a whole number from 0 on or None",
        )
        policy = PressPolicy(config, press, protected=protected, observation=observation, attentions=attentions)
        super().__init__(model, policy=policy)
        inner = unwrap(model)
        if callable(getattr(press, "post_init_from_model", None)):
            press.post_init_from_model(inner)  # type: ignore[attr-defined]
        policy.listener = Listener(inner, self.binding)

    @property
    def takes_readings(self) -> bool:
        """No: presses may look at hidden states."""
        return False
