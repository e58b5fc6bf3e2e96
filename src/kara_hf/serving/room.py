"""Room in an engine's pool: who needs it, and what can be forgotten to make it."""

from types import MethodType
from typing import Any
from weakref import ref

from .compressor import Compressor
from .pasts import Pasts
from .pool import Pool
from .requests import Requests
from .seams import living


class Room:
    """What an engine's requests need of its pool, and what of it nobody uses: prefixes, and pasts.

    Args:
        scheduler: the engine's, held weakly.
        pool: its blocks.
        pasts: that go when their room is needed; the engine is told to ask for it here.
        requests: that are known.
        compressor: that holds queries.
    """

    def __init__(self, scheduler: Any, pool: Pool, pasts: Pasts, requests: Requests, compressor: Compressor):
        self._scheduler = ref(scheduler)
        self.pool, self.pasts, self.requests, self.compressor = pool, pasts, requests, compressor
        if pasts.most:
            pool.cache.evict_cached_blocks = self._evict
            pool.cache.can_store_request_tokens = self._store
            pool.cache.free_all_requests = self._free_all

    @property
    def scheduler(self) -> Any:
        """The engine's `Scheduler`.

        Raises:
            ReferenceError: the engine is gone.
        """
        return living(self._scheduler, "the engine is gone")

    # -------------------------------------------------------------------------------------------- what the engine calls
    def _evict(self) -> bool:
        """Forgets prefixes that no request uses, then pasts until the engine's margin is free, and one at least if
        there was no prefix. Returns whether anything was forgotten.
        """
        cache = self.pool.cache
        evict = MethodType(type(cache).evict_cached_blocks, cache)
        evicted: bool = evict()
        while not evicted or cache.compute_free_capacity() < self.scheduler.safety_margin:
            if not self.pasts.forget_oldest():
                break
            evict()
            evicted = True
        return evicted

    def _store(self, state: Any, request_len: int, dry_run: bool = False) -> bool:
        """Finds blocks for the next tokens of a request. Nothing is forgotten if they would not fit then either."""
        cache, allocator = self.pool.cache, self.pool.allocator
        while not type(cache).can_store_request_tokens(cache, state, request_len, dry_run):
            needed = allocator.needs_new_blocks(state.request_id, state.current_len(), request_len)
            if not self.has(needed) or not self._evict():
                return False
        return True

    def _free_all(self, clear_ledgers: bool = False) -> None:
        """Between two runs of an engine prefixes stay, and pasts with them."""
        cache, table = self.pool.cache, self.pool.allocator.block_table
        pasts = {} if clear_ledgers else {key: table.pop(key) for key in list(table) if key in self.pasts}
        type(cache).free_all_requests(cache, clear_ledgers)
        table.update(pasts)

    # --------------------------------------------------------------------------------------------- what requests need
    def has(self, count: int) -> bool:
        """Whether there are so many blocks that are free, or would be if all that nobody uses was forgotten."""
        free = self.pool.free_blocks()
        return count <= free or count <= free + self.pool.prefix_blocks() + self.pasts.forgettable_blocks()

    def reserve(self) -> bool:
        """Takes blocks for the queries of the next tokens, before these take theirs. False: there are too few."""
        requests = self.requests.active(self.scheduler.active_requests) if self.compressor.needs_queries else []
        return all([self.compressor.reserve(request, 1) for request in requests if request.open])

    def starves(self) -> bool:
        """Whether the requests at work would not all find blocks for their next tokens and the queries of these."""
        if not self.reserve():
            return True
        return not self.has(sum(map(self.pool.needed, self.scheduler.active_requests.values())))

    def waits(self) -> bool:
        """Whether a request waits for blocks."""
        scheduler, cache = self.scheduler, self.pool.cache
        if not scheduler.waiting_requests:
            return False
        if cache.compute_free_capacity() < scheduler.safety_margin:
            cache.evict_cached_blocks()  # as the engine does before it chooses a batch
            if cache.compute_free_capacity() < scheduler.safety_margin:
                return True
        return not self.has(self.pool.needed(next(iter(scheduler.waiting_requests.values()))))

    def can_preempt(self) -> bool:
        """Whether the engine can make room by forgetting what nobody uses or preempting."""
        allocators = self.pool.cache.cache_allocators.values()
        unused = len(self.pasts) or any(allocator.ledger.cached_blocks for allocator in allocators)
        return bool(unused or (self.scheduler.starved_requests and len(self.scheduler.active_requests) > 1))

    def stuck(self) -> Any:
        """The request that is in the way when nothing can run."""
        starved = self.scheduler.starved_requests
        return starved[0][0] if starved else self.scheduler.waiting_requests[self.scheduler.waiting_requests_order[0]]
