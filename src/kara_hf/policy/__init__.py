"""What to keep: scores rank the tokens of a window, Token2Chunk makes chunks of a ranking; KV-Compress observes and
evicts whole blocks. Owns no memory."""

from .eviction import Eviction, evict, moves
from .kara import KaraPolicy
from .kv_compress import KVCompressPolicy
from .scores import SCORES, Window, register_score
from .token2chunk import token2chunk, top_tokens
from .votes import observe

__all__ = [
    "SCORES",
    "Eviction",
    "KVCompressPolicy",
    "KaraPolicy",
    "Window",
    "evict",
    "moves",
    "observe",
    "register_score",
    "token2chunk",
    "top_tokens",
]
