"""KV-cache compression for Hugging Face Transformers: evicted tokens give their memory back.

    out = model.generate(**inputs, past_key_values=KaraCache(model, retention=0.2))

From Transformers 5.24 on the argument is called ``cache``. `KVCompressCache(model, max_cache_tokens=512)` and
`PoDCache(model, PoDSharing.from_pretrained("folder"))` are used in the same way. `cache.report()` says what is held.

Names are loaded when they are first used, so that importing the package costs nothing and changes nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bundled import BUNDLED_MODEL
    from .cache.caches import KaraCache, KVCompressCache, PoDCache
    from .cache.compressed import CompressedCache
    from .cache.report import CacheReport
    from .config import KaraConfig, KVCompressConfig
    from .integration.attach import attach, detach
    from .integration.chat import system_pin
    from .policy import KaraPolicy, KVCompressPolicy, register_score
    from .policy.sharing import PoDSharing
    from .storage import PoolExhausted

__version__ = "0.2.0"

_HOMES = {
    "BUNDLED_MODEL": "bundled",
    "CacheReport": "cache.report",
    "CompressedCache": "cache.caches",  # where the classes are that its `load` finds
    "KVCompressCache": "cache.caches",
    "KVCompressConfig": "config",
    "KVCompressPolicy": "policy",
    "KaraCache": "cache.caches",
    "KaraConfig": "config",
    "KaraPolicy": "policy",
    "PoDCache": "cache.caches",
    "PoDSharing": "policy.sharing",
    "PoolExhausted": "storage",
    "attach": "integration.attach",
    "detach": "integration.attach",
    "register_score": "policy",
    "system_pin": "integration.chat",
}

__all__ = [
    "BUNDLED_MODEL",
    "CacheReport",
    "CompressedCache",
    "KVCompressCache",
    "KVCompressConfig",
    "KVCompressPolicy",
    "KaraCache",
    "KaraConfig",
    "KaraPolicy",
    "PoDCache",
    "PoDSharing",
    "PoolExhausted",
    "attach",
    "detach",
    "register_score",
    "system_pin",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
