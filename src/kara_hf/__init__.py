"""KV-cache compression for Hugging Face Transformers that frees the bytes it says it frees.

out = model.generate(**inputs, past_key_values=KaraCache(model, retention=0.25))
"""

from importlib.metadata import PackageNotFoundError, version

from .attention import attach, detach
from .cache import CompressedCache, KaraCache
from .config import KaraConfig
from .policy import KaraPolicy, register_score
from .report import CacheReport
from .storage import PoolExhausted

try:
    __version__ = version("kara_hf")
except PackageNotFoundError:  # a checkout on the path that was never installed
    __version__ = "0+unknown"

__all__ = [
    "CacheReport",
    "CompressedCache",
    "KaraCache",
    "KaraConfig",
    "KaraPolicy",
    "PoolExhausted",
    "attach",
    "detach",
    "register_score",
]
