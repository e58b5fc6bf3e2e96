"""Where keys and values live: a paged store per layer, its memory meter, and the queries of open windows."""

from .blocks import Blocks
from .meter import MemoryMeter, PoolExhausted
from .paged import PagedStore, Store
from .queries import QueryBuffer

__all__ = ["Blocks", "MemoryMeter", "PagedStore", "PoolExhausted", "QueryBuffer", "Store"]
