"""The caches that the `kara-hf` command can run: one class for each, registered under the name that `--cache` takes."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache
from transformers.cache_utils import Cache

from ..cache.caches import KaraCache, KVCompressCache, PoDCache
from ..cache.compressed import CompressedCache
from ..config import KaraConfig, KVCompressConfig, require, rounding_bits
from ..integration.attach import detach
from ..policy.sharing import PoDSharing


@dataclass(frozen=True)
class WarmUp:
    """A short run in which everything that a cache does happens once.

    Attributes:
        length: tokens of the prompt.
        new_tokens: tokens generated behind it.
        changes: settings that are other than in the run itself.
    """

    length: int
    new_tokens: int
    changes: dict[str, Any]


class ConfiguredCache(ABC):
    """A kind of cache with its settings.

    Args:
        given: settings that were asked for.
        defaults: of those that were not. Both may hold settings of other methods, which are left aside.

    Attributes:
        title: what the cache is called where it is shown.
        options: names of its settings.

    Raises:
        ValueError: a setting is not possible.
    """

    title: ClassVar[str]
    options: ClassVar[frozenset[str]]

    def __init__(self, given: dict[str, Any], defaults: dict[str, Any]):
        self.settings = {name: value for name, value in {**defaults, **given}.items() if name in self.options}

    @abstractmethod
    def describe(self) -> str:
        """The settings that matter most, in words; empty if there are none."""

    @abstractmethod
    def make(self, model: Any, **changes: Any) -> Cache:
        """An empty cache for `model`, which is attached or detached for it. Raises ValueError."""

    @abstractmethod
    def warm_up(self) -> WarmUp:
        """How to warm up for it."""

    @abstractmethod
    def held(self, cache: Any) -> dict[str, Any]:
        """The fields of `kara_hf.cli.display.CacheRun` that say what the first sequence of `cache` holds."""


class Full(ConfiguredCache):
    """Transformers' own cache, which keeps everything."""

    title = "full cache"
    options = frozenset()

    def describe(self) -> str:
        return ""

    def make(self, model: Any, **changes: Any) -> Cache:
        detach(model)  # so that the comparison is with the model as it is without this package
        return DynamicCache(config=model.config)

    def warm_up(self) -> WarmUp:
        return WarmUp(length=64, new_tokens=4, changes={})

    def held(self, cache: DynamicCache) -> dict[str, Any]:
        """Its tensors' bytes. It grows by copying, so the largest tensor was there twice."""
        leaves = [leaf for layer in cache.layers for leaf in tree_leaves(vars(layer))]
        sizes, seen = [leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor)], cache.get_seq_length()
        return {
            "seen": seen,
            "kept": [seen],
            "full_bytes": sum(sizes),
            "nominal_bytes": sum(sizes),
            "resident_bytes": sum(sizes),
            "peak_bytes": sum(sizes) + max(sizes),
        }


class Compressed(ConfiguredCache):
    """What the caches of this package have in common. A subclass names its cache and the class of its settings."""

    cache_class: ClassVar[type[CompressedCache]]
    config_class: ClassVar[type]

    def __init_subclass__(cls) -> None:
        cls.title = cls.cache_class.__name__
        cls.options = frozenset({"max_bytes", "sharing", *(field.name for field in fields(cls.config_class))})

    def __init__(self, given: dict[str, Any], defaults: dict[str, Any]):
        super().__init__(given, defaults)
        of_config = {field.name for field in fields(self.config_class)}
        self.config = self.config_class(**{name: value for name, value in self.settings.items() if name in of_config})
        if "sharing" in self.settings:
            self.settings["sharing"] = PoDSharing.from_pretrained(self.settings["sharing"])

    def make(self, model: Any, **changes: Any) -> Cache:
        return self.cache_class(model, **{**self.settings, **changes})

    def held(self, cache: CompressedCache) -> dict[str, Any]:
        report = cache.report()
        heads = [(i, head) for i, kept in enumerate(report.kept[:, 0]) for head in kept.nonzero()[:, 0].tolist()]
        return {
            "seen": int(report.seen[0]),
            "kept": [int(report.kept[i, 0, head]) for i, head in heads],
            "full_bytes": report.full_bytes + report.other_bytes,
            "nominal_bytes": report.nominal_bytes + report.other_bytes,
            "resident_bytes": report.resident_bytes + report.other_bytes,
            "peak_bytes": report.peak_bytes + report.other_bytes,
            "rows": [cache.chunks(report.layers[i], 0, head) for i, head in heads],
            "report": report,
        }


def bits_told(config: Any) -> str:
    """What is said of bits behind other settings; nothing, where none are given."""
    bits = rounding_bits(config.bits, config.key_bits, config.value_bits)
    return "" if bits is None else f", {bits[0]} bits" if bits[0] == bits[1] else f", {bits[0]} / {bits[1]} bits"


def prompt_told(config: Any) -> str:
    """What is said of pins and chunks behind other settings; nothing, where none are given."""
    chunks = "" if config.prefill_chunk is None else f", read in chunks of {config.prefill_chunk}"
    return "".join(f", pinned {start}:{end}" for start, end in config.pin) + chunks


class Kara(Compressed):
    cache_class, config_class = KaraCache, KaraConfig

    def describe(self) -> str:
        config = self.config
        return (
            f"window {config.window}, retention {config.retention}, recent {config.recent}, {config.score}, "
            f"anchor share {config.anchor_share:g}, sinks {config.sinks}{prompt_told(config)}{bits_told(config)}"
        )

    def warm_up(self) -> WarmUp:
        """One window is sealed within a prompt."""
        recent = self.config.recent if isinstance(self.config.recent, int) else self.config.window
        forced = {"compress_prompt": True, "min_cache_tokens": 0, "max_bytes": None, "pin": ()}
        return WarmUp(self.config.window + recent, 4, forced)


class KVCompress(Compressed):
    cache_class, config_class = KVCompressCache, KVCompressConfig

    def __init__(self, given: dict[str, Any], defaults: dict[str, Any]):
        defaults = {"retention": KaraConfig.retention, **defaults}
        if "max_cache_tokens" in given:
            del defaults["retention"]
        super().__init__(given, defaults)

    def describe(self) -> str:
        config = self.config
        share = f"retention {config.retention}"
        budget = share if config.max_cache_tokens is None else f"{config.max_cache_tokens:,} tokens per head on average"
        voters = "all" if config.observation is None else config.observation
        when = "" if config.continual else ", prompt only"
        return (
            f"{budget}, observation {voters}, protected {config.protected}, sinks {config.sinks}, {config.metric}{when}"
            f"{prompt_told(config)}{bits_told(config)}"
        )

    def warm_up(self) -> WarmUp:
        """A prompt is cut, and a block later what is decoded; half of it, as a budget might allow all of so little."""
        size = self.config.block_size
        retention = 1 if self.config.retention == 1 else 0.5
        changes = {
            "max_cache_tokens": None,
            "retention": retention,
            "min_cache_tokens": 0,
            "max_bytes": None,
            "pin": (),
        }
        return WarmUp((self.config.least_blocks_with(0) + 4) * size, size + 2, changes)


@dataclass(frozen=True)
class PoDConfig:
    """What a `PoDCache` has to be told beside who leads whom."""

    bits: int | None = None
    key_bits: int | None = None
    value_bits: int | None = None
    block_size: int = KaraConfig.block_size

    def __post_init__(self) -> None:
        rounding_bits(self.bits, self.key_bits, self.value_bits)


class PoD(Compressed):
    cache_class, config_class = PoDCache, PoDConfig

    def __init__(self, given: dict[str, Any], defaults: dict[str, Any]):
        require("sharing" in given, "sharing", None, "given for pod: the folder that `kara-hf pod explore` wrote")
        super().__init__(given, defaults)

    def describe(self) -> str:
        sharing: PoDSharing = self.settings["sharing"]
        return (
            f"{100 * sharing.followers_share:.0f} % followers, sinks {sharing.sinks}, recent {sharing.recent}, distant "
            f"query {sharing.distant_query}, prompt {sharing.prefill}{bits_told(self.config)}"
        )

    def warm_up(self) -> WarmUp:
        """A few tokens become distant."""
        return WarmUp(min(512, self.settings["sharing"].proximal + 8), 4, {"max_bytes": None})


CACHES: dict[str, type[ConfiguredCache]] = {"full": Full, "kara": Kara, "kv-compress": KVCompress, "pod": PoD}


def configured_caches(
    names: Sequence[str], given: dict[str, Any], defaults: dict[str, Any]
) -> dict[str, ConfiguredCache]:
    """The methods of these names, in their order.

    Args:
        names: keys of `CACHES`.
        given: settings that were asked for; each must be one of at least one of the methods.
        defaults: settings where none is given.

    Raises:
        ValueError: a name is unknown or there twice, or a setting is not possible or not one of these methods'.
    """
    require(bool(names), "cache", None, "the name of at least one")
    for name in names:
        require(name in CACHES, "cache", name, " or ".join(CACHES))
        require(names.count(name) == 1, "cache", ",".join(names), "each of them named once")
    for option, value in given.items():
        if not any(option in CACHES[name].options for name in names):
            owners = [name for name, method in CACHES.items() if option in method.options]
            raise ValueError(
                f"{option}={value!r} does not apply to {' and '.join(names)}: it is a setting of "
                f"{' and '.join(owners)}; leave it out, or choose {' or '.join(owners)} with --cache"
            )
    return {name: CACHES[name](given, defaults) for name in names}
