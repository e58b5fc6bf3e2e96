"""Where keys and values live: a paged store per layer, its memory meter, and the queries of open windows."""

from .blocks import Blocks, upload
from .meter import MemoryMeter, PoolExhausted
from .paged import PagedStore, Store
from .prompt import Prompt
from .queries import QueryBuffer, QueryMoments

__all__ = [
    "Blocks",
    "MemoryMeter",
    "PagedStore",
    "PoolExhausted",
    "Prompt",
    "QueryBuffer",
    "QueryMoments",
    "Store",
    "upload",
]
