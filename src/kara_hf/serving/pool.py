"""The engine's pool of blocks, as far as layers of full attention use it: what is free, and how tokens move in it."""

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import ref

import torch

from .plans import EvictionPlan, blocks
from .seams import FULL, living


class Pool:
    """The blocks of one engine's cache in layers of full attention. The cache is held weakly: it belongs to the engine.

    Args:
        cache: a `PagedAttentionCache`.

    Attributes:
        page: tokens in a block.
        num_blocks: blocks in all.

    Raises:
        ValueError: the model has no layer of full attention.
    """

    def __init__(self, cache: Any):
        if FULL not in cache.cache_allocators:
            raise ValueError("the model has no layer of full attention: there is nothing to compress")
        self._cache = ref(cache)
        self.page: int = self.allocator.tokens_per_page
        self.num_blocks: int = self.allocator.num_blocks

    @property
    def cache(self) -> Any:
        """The engine's cache.

        Raises:
            ReferenceError: the engine is gone.
        """
        return living(self._cache, "the engine is gone, and its pool with it")

    @property
    def allocator(self) -> Any:
        """Of the blocks of full attention layers."""
        return self.cache.cache_allocators[FULL]

    @property
    def capacity(self) -> int:
        """Tokens that the pool holds if it holds nothing else."""
        return self.num_blocks * self.page

    @property
    def stride(self) -> int:
        """Rows of a block, in all its layers."""
        stride: int = self.allocator.block_physical_stride
        return stride

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        nbytes: int = self.allocator.bytes_per_block
        return nbytes

    @property
    def layers(self) -> list[int]:
        """Indices of the layers."""
        layers: list[int] = self.allocator.layer_indices
        return layers

    def free_blocks(self) -> int:
        """Blocks that could be had at once."""
        pool, full = self.cache.pool, self.allocator
        free: int = pool.count_free_blocks(full.index) + pool.num_free_sectors * full.blocks_per_sector
        return free

    def prefix_blocks(self) -> int:
        """Blocks of prefixes that no request uses."""
        return len(self.allocator.ledger.cached_blocks)

    def take(self, count: int) -> list[int] | None:
        """`count` free blocks; None: too few. What no request uses is forgotten if need be."""
        pool, index = self.cache.pool, self.allocator.index
        while count > self.free_blocks():
            if not self.cache.evict_cached_blocks():
                return None
        while pool.count_free_blocks(index) < count:
            pool.allocate_sector(index)
        taken: list[int] = pool.get_free_blocks(index, count)
        return taken

    def give(self, blocks: list[int]) -> None:
        """Blocks that nobody uses any more."""
        self.cache.pool.free_blocks(self.allocator.index, blocks)

    def needed(self, state: Any) -> int:
        """Blocks that a request of the engine needs for its next tokens."""
        tokens = state.tokens_to_process if state.status.name == "DECODING" else state.remaining_prefill_tokens
        length = min(len(tokens), self.cache.max_batch_tokens)
        needed: int = self.allocator.needs_new_blocks(state.request_id, state.current_len(), length)
        return needed

    def rows(self, plan: EvictionPlan) -> list[int]:
        """Rows of the pool's views in which the tokens of a plan's windows are, and those behind them."""
        rows: list[int] = self.allocator.get_read_indices(plan.request.key, 0, plan.request.stored)
        return rows[plan.start :]

    def raw(self, layer: int) -> torch.Tensor:
        """Rows ``[H, D]``: from ``block * stride`` on a layer's page of a block's keys, then that of its values."""
        rows: torch.Tensor = self.allocator._kv_token_views[layer][0]
        return rows

    def heads(self, layer: int) -> int:
        """KV heads of a layer."""
        heads: int = self.allocator._kv_token_views[layer][0].shape[1]
        return heads

    def keys(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """The keys of a layer in `rows` ``[T]`` int64, as ``[T, H, D]``."""
        keys: torch.Tensor = self.allocator._kv_token_views[layer][0][rows]
        return keys

    def values(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """As `keys` the values, ``[T, H, Dv]``."""
        values: torch.Tensor = self.allocator._kv_token_views[layer][1][rows]
        return values

    def gains(self, plan: EvictionPlan) -> bool:
        """Whether a plan gives more blocks back than it takes for copies of those that others hold too."""
        table, counts = self.allocator.block_table[plan.request.key], self.allocator.ledger.shared_ref_counts
        return sum(block not in counts for block in table) > blocks(plan.stored_after, self.page)

    def unshare(self, plan: EvictionPlan) -> bool:
        """Makes the blocks that a plan writes to the request's own, by copying those it shares. False without room.

        Of a plan that leaves its blocks findable, those that a later prompt may find are copied too, as far as there is
        room.
        """
        request, full = plan.request, self.allocator
        ledger, table, first = full.ledger, full.block_table[request.key], plan.start // self.page
        written = range(first, blocks(plan.stored_after, self.page))
        shared = [place for place in written if ledger.shared_ref_counts.get(table[place], 1) > 1]
        if not self.copy(request.key, shared):
            return False
        if plan.findable:
            own = [place for place in written if table[place] in ledger.block_to_hash]
            self.copy(request.key, own[: self.free_blocks()])
        for place in written:  # what is written over is no prefix of anything
            block_hash = ledger.block_to_hash.pop(table[place], None)
            if block_hash is not None:
                del ledger.hash_to_block[block_hash]
        return True

    def copy(self, key: str, places: list[int]) -> bool:
        """Puts copies in the place of blocks of a request. False: there is no room, and nothing was changed."""
        full, table = self.allocator, self.allocator.block_table[key]
        copies = self.take(len(places))
        if copies is None:
            return False
        full.copy_blocks([table[place] for place in places], copies)
        for place, copied in zip(places, copies, strict=True):
            if full.ledger.release(table[place]):
                self.give([table[place]])
            table[place] = copied
        return True

    def matched(self, tokens: Sequence[int]) -> int:
        """The tokens of a prompt whose blocks the engine finds by their content."""
        return len(self.allocator.match_prefix_blocks(tokens)) * self.page

    def share(self, source: Any, key: str, tokens: int) -> bool:
        """Lets a request begin with the first `tokens` stored by `source`, the last block of which is copied if it is
        not full. False: there is no room for that.
        """
        table = self.allocator.block_table
        table[key] = table[source][: blocks(tokens, self.page)]
        for block in table[key]:
            self.allocator.ledger.acquire(block)
        if tokens % self.page and not self.copy(key, [len(table[key]) - 1]):
            self.allocator.free_blocks(key)
            return False
        return True

    def move(self, plans: Sequence[EvictionPlan], chosen: Mapping[str, Mapping[int, torch.Tensor]]) -> None:
        """Moves survivors and the tokens behind the windows together, in every layer. Lengths stay as they are.

        Args:
            plans: of different requests, whose blocks are unshared.
            chosen: by key of the request and layer: the survivors as places in its windows, ``[count, H, keep]`` int64.
        """
        device = self.cache.device
        rows = [self.rows(plan) for plan in plans]
        starts = [sum(len(part) for part in rows[:number]) for number in range(len(rows))]
        sources = torch.tensor([row for part in rows for row in part], device=device)
        kept_rows = [part[: len(part) - plan.dropped] for plan, part in zip(plans, rows, strict=True)]
        targets = torch.tensor([row for part in kept_rows for row in part], device=device)
        for layer in self.layers:
            order = []
            for plan, part, start in zip(plans, rows, starts, strict=True):
                places = chosen[plan.request.key][layer]
                windows = torch.arange(plan.count, device=device)[:, None, None] * plan.width + start
                survivors = (places + windows).transpose(1, 2).flatten(0, 1)  # [count * keep, H]
                behind = torch.arange(start + plan.count * plan.width, start + len(part), device=device)
                order += [survivors, behind[:, None].expand(-1, places.shape[1])]
            index = torch.cat(order)[:, :, None]
            for view in self.allocator._kv_token_views[layer]:
                tokens = view.index_select(0, sources)
                view.index_copy_(0, targets, tokens.gather(0, index.expand(-1, -1, tokens.shape[2])))

    def shrink(self, plan: EvictionPlan) -> int:
        """Gives the blocks behind a request's stored tokens back once its plan is booked. Returns how many."""
        full, request = self.allocator, plan.request
        table = full.block_table[request.key]
        spare = table[blocks(request.stored, self.page) :]
        del table[len(table) - len(spare) :]
        self.give([block for block in spare if full.ledger.release(block, not plan.findable)])
        return len(spare)
