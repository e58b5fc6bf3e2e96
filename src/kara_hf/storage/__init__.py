"""Where keys and values live: a paged store per layer, its memory meter, and the queries of open windows."""

from .blocks import Blocks, upload
from .followers import FollowerStore, paged_store
from .meter import MemoryMeter, PoolExhausted
from .paged import PagedStore
from .prompt import Prompt
from .queries import QueryBuffer, Sampling
from .records import RecordStore
from .rounded import RoundedStore
from .saved import Saved
from .store import Store

Stored = PagedStore | RoundedStore  # what holds a layer's tokens in blocks

__all__ = [
    "Blocks",
    "FollowerStore",
    "MemoryMeter",
    "PagedStore",
    "PoolExhausted",
    "Prompt",
    "QueryBuffer",
    "RecordStore",
    "RoundedStore",
    "Sampling",
    "Saved",
    "Store",
    "Stored",
    "paged_store",
    "upload",
]
