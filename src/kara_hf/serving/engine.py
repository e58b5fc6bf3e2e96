"""Kara on one engine of Transformers' continuous batching.

An engine counts a request's tokens in `position_offset`, by which it schedules, admits, reads, writes and allocates.
With Kara that is the number of *stored* tokens; what was evicted is added where true positions count: to the position
ids, and to the lengths that sliding-window layers are told, which keep their own rings. Everything is changed on the
objects of one engine, whose methods are replaced; nothing in Transformers' modules is.

The engine's processor owns its `Engine`, by the methods replaced on its parts, and is held weakly in turn. So all of it
goes, pool and queries, when the last reference to the processor does.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from functools import partial
from types import MethodType
from typing import Any
from weakref import proxy, ref

import torch

from .admission import Limits, RequestRefused, check_sampling
from .compressor import Compressor
from .config import ServingConfig
from .metrics import ServingMetrics
from .plans import EvictionPlan
from .pool import Pool
from .prompts import PromptCompressor
from .queries import Brought, Places, QueryPool, query_group
from .query_recorder import Logits
from .requests import Requests, prompt_tokens
from .seams import SLIDING, check_internals
from .survivors import choose_each


class Engine:
    """Kara on one `ContinuousBatchProcessor`, which is held weakly.

    Args:
        processor: of the engine, before its first step.
        config: the settings.
        model: that the engine runs; only read here.

    Attributes:
        pool: the blocks of layers of full attention.
        queries: that requests hold.
        compressor: that decides and chooses of windows.
        prompts: the same of prompts.
        requests: that are known.
        limits: what a request must keep within.
        metrics: what was done so far.

    Raises:
        ImportError: the engine is not as we know it.
        ValueError: the pool is too small for one window, or a block for one query, or the model has no layer of full
            attention.
    """

    def __init__(self, processor: Any, config: ServingConfig, model: Any):
        self._processor, self.config = ref(processor), config
        self.pool = Pool(processor.cache)
        check_internals(
            {
                "processor": processor,
                "scheduler": self.scheduler,
                "batch": self.batch,
                "offloading": processor.offloading_manager,
                "cache": self.cache,
                "pool": self.cache.pool,
                "allocator": self.pool.allocator,
                "ledger": self.pool.allocator.ledger,
            }
        )
        self.queries = QueryPool(self.pool, query_group(model))
        self.compressor, self.prompts = Compressor(config, self.queries), PromptCompressor(config, self.queries)
        self.metrics = ServingMetrics(blocks=self.pool.num_blocks)
        if self.needs_queries:
            self.queries.check()
        least, page = self.compressor.least, self.pool.page
        least += page * self.queries.blocks_of(self.compressor.held(least))
        if self.compressor.policy.compresses and self.pool.capacity <= least:
            raise ValueError(
                f"a pool of {self.pool.num_blocks} blocks of {page} tokens is too small for a window of "
                f"{config.kara.window} tokens, {config.kara.recent} recent ones and their queries; give the engine "
                "more memory (num_blocks), or lower window"
            )
        self.limits = Limits.of(model, self.pool.capacity)
        self.requests = Requests(self.queries, self.compressor, self.prompts)
        self._turn = 0  # evicted tokens of the request that the engine deals with just now
        self._brought: list[Brought] = []  # of the batch: whose queries are held
        self._places: dict[tuple[int, int], Places] = {}  # where they are, by query heads and those of a KV head
        self._logits: dict[int, Logits] = {}
        processor._generation_step = self._step
        self.scheduler.schedule_batch = self._schedule
        self.scheduler.add_waiting_request = self._arrive
        self.batch.prepare_batch_tensors = self._prepare
        self.cache.mark_complete_blocks = self._mark_complete
        self.cache.free_blocks = self._free
        self.cache.search_prefix_match = self._match
        self.cache.prepare_fork_request = self._fork
        processor.offloading_manager.offload_requests = self._offload
        if SLIDING in self.cache.cache_allocators:
            self._correct_sliding(self.cache.cache_allocators[SLIDING])

    @property
    def needs_queries(self) -> bool:
        """Whether it wants to be told of queries."""
        return self.compressor.needs_queries or self.prompts.needs_queries

    @property
    def processor(self) -> Any:
        """The engine's `ContinuousBatchProcessor`.

        Raises:
            ReferenceError: it is gone.
        """
        processor = self._processor()
        if processor is None:
            raise ReferenceError("the engine is gone: its manager was stopped or destroyed")
        return processor

    @property
    def cache(self) -> Any:
        """The engine's `PagedAttentionCache`."""
        return self.processor.cache

    @property
    def scheduler(self) -> Any:
        """The engine's `Scheduler`."""
        return self.processor.scheduler

    @property
    def batch(self) -> Any:
        """The engine's inputs and outputs of a step."""
        return self.processor.inputs_and_outputs

    # -------------------------------------------------------------------------------------------- what the engine calls
    def _arrive(self, state: Any) -> None:
        """A request is put to wait, for the first time or because it lost its blocks.

        Raises:
            RequestRefused: it cannot be computed. The engine ends it with that error, and no other.
        """
        key, again = state.request_id, state._true_initial_tokens or state.position_offset
        if not again:
            try:
                self.check(state.initial_tokens, state.max_new_tokens, state.num_children)
                check_sampling(state.logit_processor_kwargs)
                if key in self.scheduler.active_requests or key in self.scheduler.waiting_requests:
                    raise RequestRefused(f"request {key} is there already; give each request an id of its own")
            except RequestRefused as error:
                self.metrics.refused += 1
                self._fail_children(state, error)
                raise
        _own(self.scheduler, "add_waiting_request")(state)

    def check(self, tokens: Sequence[int], max_new_tokens: int | None, num_children: int = 0) -> None:
        """Raises RequestRefused where a request could not be computed; `Limits.check` says which."""
        self.limits.check(tokens, max_new_tokens)
        if num_children and len(tokens) == 1:
            raise RequestRefused(
                f"num_return_sequences={num_children + 1} needs a prompt of two tokens or more: answers share all of "
                "it but the last; lengthen the prompt, or send it several times"
            )

    def _schedule(self, token_budget: int, cache_budget: int) -> tuple[list[Any] | None, bool, int, int]:
        """Compresses what is due and lets the engine choose its next batch. Where nothing would run, makes room."""
        own, scheduler, pool = _own(self.scheduler, "schedule_batch"), self.scheduler, self.pool
        self.requests.sweep(scheduler)
        if not scheduler.active_requests:
            scheduler.block_new_requests = False  # nobody is left whose end the engine could wait for
        self._compress_prompts()
        periodic = self.config.trigger == "periodic" and self.metrics.steps % self.config.period == 0
        if periodic or self._starves() or (self.config.trigger == "pressure" and self._waits()):
            self._compress()
            self._reserve()
        while True:
            batch: tuple[list[Any] | None, bool, int, int] = own(token_budget, cache_budget)
            if batch[0] is not None:
                return batch
            if self._compress():
                continue
            if self._can_preempt():
                return batch
            free = pool.free_blocks() * pool.page
            if free:  # enough for a part of a long prompt
                batch = own(min(token_budget, free), cache_budget)
                if batch[0]:
                    return batch
            state = self._stuck()
            self._fail(
                state,
                MemoryError(
                    f"request {state.request_id} cannot go on: it holds {state.position_offset} tokens, the pool "
                    f"{pool.capacity} with {free} free, and there is nothing to compress or "
                    "preempt; give the engine more memory (num_blocks), or lower retention, window or max_new_tokens"
                ),
            )

    def _prepare(self, requests_in_batch: list[Any], *args: Any, **kwargs: Any) -> None:
        """Stored lengths go in, true positions come out; finds slots for the queries that this step will bring."""
        known = [self.requests.at(future.state) for future in requests_in_batch]
        turns = [0 if request is None else request.evicted for request in known]
        _own(self.batch, "prepare_batch_tensors")(_Turns(requests_in_batch, turns, self), *args, **kwargs)
        shifts: list[int] = []
        brought: list[Brought] = []
        for future, request, shift in zip(requests_in_batch, known, turns, strict=True):
            length, start = future.query_length, len(shifts)
            shifts += [shift] * length
            if request is None:
                continue
            request.stored = future.state.position_offset
            prompt = request.prompt
            parts = (each.brought(request, start, length) for each in (self.compressor, self.prompts))
            brought += [part for part in parts if part is not None]
            self.metrics.whole_prompts += prompt > request.prompt
        if any(shifts):
            ids = self.batch.position_ids
            ids[: len(shifts)] += torch.tensor(shifts, dtype=ids.dtype, device=ids.device)
        self._brought = brought
        self._places.clear()
        self._count(len(requests_in_batch))

    def _step(self, model: Any) -> None:
        """Computes a batch. An error in it ends the requests of that batch, not the engine, while the device is sound.

        With tensor parallelism the other ranks wait within the step, so that it ends the engine.
        """
        try:
            _own(self.processor, "_generation_step")(model)
        except Exception as error:
            if isinstance(error, torch.AcceleratorError) or self.processor.distributed_helper.tp_size > 1:
                raise
            batch, self.batch.requests_in_batch = self.batch.requests_in_batch, []
            for future in batch:
                self._fail(future.state, error)

    def _mark_complete(self, state: Any, complete_blocks: dict[str, int]) -> None:
        """Blocks of a compressed request hold no prefix of its tokens, so that nobody may find them by one."""
        request = self.requests.find(state)
        if request is None or not request.evicted:
            _own(self.cache, "mark_complete_blocks")(state, complete_blocks)

    def _free(self, request_id: str, no_cache: bool = False) -> None:
        _own(self.cache, "free_blocks")(request_id, no_cache)
        if not no_cache:
            self.requests.freed(request_id)
        self.metrics.query_bytes = self.queries.nbytes
        self.metrics.used_blocks = self.pool.num_blocks - self.pool.free_blocks()

    def _match(self, request_id: str, prompt_ids: list[int]) -> int:
        """The tokens of a prompt that vote are computed, even if somebody has their blocks."""
        prompt = prompt_tokens(self.scheduler.waiting_requests[request_id])
        voters = self.prompts.voters(prompt)
        known = prompt_ids[: prompt - voters + 1] if voters else prompt_ids  # the last one is never matched
        matched: int = _own(self.cache, "search_prefix_match")(request_id, known)
        return matched

    def _fork(self, src_state: Any, dst_req_ids: list[str], copy_src_and_dst: dict[str, Any]) -> list[str]:
        forked: list[str] = _own(self.cache, "prepare_fork_request")(src_state, dst_req_ids, copy_src_and_dst)
        self.requests.fork(src_state, forked)
        return forked

    def _offload(self) -> bool:
        before = len(self.scheduler.active_requests)
        done: bool = _own(self.processor.offloading_manager, "offload_requests")()
        self.metrics.preemptions += before - len(self.scheduler.active_requests)
        return done

    def _correct_sliding(self, allocator: Any) -> None:
        """Sliding layers keep a ring of their own, in which a token's place is given by its true position."""
        kind, weak = type(allocator), proxy(allocator)
        for name in ("needs_new_blocks", "allocate_cache_to_request", "get_read_indices", "get_write_indices"):
            setattr(allocator, name, partial(self._at_true_position, getattr(kind, name), weak))
        allocator.get_seqlen_k = lambda past_length, query_length: kind.get_seqlen_k(
            weak, past_length + self._turn, query_length
        )

    def _at_true_position(
        self, own: Callable[..., Any], allocator: Any, request_id: str, past_length: int, query_length: int
    ) -> Any:
        return own(allocator, request_id, past_length + self.requests.evicted(request_id), query_length)

    # --------------------------------------------------------------------------------------------- what the model calls
    @torch.compiler.disable
    def record(self, layer: int, query: torch.Tensor, logits: Logits) -> None:
        """Holds those queries of a layer that are needed later, of ``[1, Hq, T, D]`` as attention sees them."""
        self._logits[layer] = logits
        if not self._brought:
            return
        heads = query.shape[1]
        shape = heads, heads // self.pool.heads(layer)
        if shape not in self._places:
            self._places[shape] = Places.of(self._brought, *shape, self.cache.device)
        self.queries.put(layer, self._places[shape], query[0])

    # ------------------------------------------------------------------------------------------------- room in the pool
    def _reserve(self) -> bool:
        """Takes blocks for the queries of the next tokens, before these take theirs. False: there are too few."""
        requests = self.requests.active(self.scheduler.active_requests) if self.compressor.needs_queries else []
        return all([self.compressor.reserve(request, 1) for request in requests if request.open])

    def _starves(self) -> bool:
        """Whether the requests at work would not all find blocks for their next tokens and the queries of these."""
        if not self._reserve():
            return True
        free = self.pool.free_blocks() + self.pool.forgettable_blocks()
        return sum(map(self.pool.needed, self.scheduler.active_requests.values())) > free

    def _waits(self) -> bool:
        """Whether a request waits for blocks."""
        scheduler = self.scheduler
        if not scheduler.waiting_requests:
            return False
        if self.cache.compute_free_capacity() < scheduler.safety_margin:
            return True
        free = self.pool.free_blocks() + self.pool.forgettable_blocks()
        return self.pool.needed(next(iter(scheduler.waiting_requests.values()))) > free

    def _can_preempt(self) -> bool:
        """Whether the engine can make room by forgetting prefixes or preempting."""
        allocators = self.cache.cache_allocators.values()
        cached = any(allocator.ledger.cached_blocks for allocator in allocators)
        return cached or bool(self.scheduler.starved_requests and len(self.scheduler.active_requests) > 1)

    def _stuck(self) -> Any:
        """The request that is in the way when nothing can run."""
        starved = self.scheduler.starved_requests
        return starved[0][0] if starved else self.scheduler.waiting_requests[self.scheduler.waiting_requests_order[0]]

    def _fail_children(self, state: Any, error: Exception) -> None:
        """Ends the further answers that a request was to have and that have not begun, for each is waited for."""
        for number in range(state.num_children):
            child = copy(state)
            child.request_id = f"{state.request_id}__child#{number}"
            self.processor._handle_request_error(error, child)
        state.num_children = 0

    def _fail(self, state: Any, error: Exception) -> None:
        """Ends one request with an error; the others go on."""
        scheduler, key = self.scheduler, state.request_id
        self._fail_children(state, error)
        self.processor._handle_request_error(error, state)
        self.processor.offloading_manager.free_request_cpu_cache(state)
        scheduler.finish_request(key)
        if scheduler.waiting_requests.pop(key, None) is not None:
            scheduler.waiting_requests_order.remove(key)
        scheduler.block_new_requests = False
        self.metrics.failed += 1

    # ------------------------------------------------------------------------------------------------------ compression
    def _compress(self) -> int:
        """Compresses windows of the requests whose turn it is. Returns how many requests there were."""
        requests = self.requests.active(self.scheduler.active_requests)
        return self._carry_out(self.compressor, self.compressor.due(requests, self.pool.page))

    def _compress_prompts(self) -> None:
        """Compresses the prompts that have come to their end, before the first token behind them is computed.

        One that would give no block back stays whole. One without room for copies of blocks that others hold waits.
        """
        plans = []
        for plan in self.prompts.due(self.requests.active(self.scheduler.active_requests)):
            if self.pool.gains(plan):
                plans.append(plan)
            else:
                self.prompts.drop(plan.request)
                self.metrics.whole_prompts += 1
        self._carry_out(self.prompts, plans)

    def _carry_out(self, compressor: Compressor | PromptCompressor, plans: list[EvictionPlan]) -> int:
        """Compresses as planned where there is room for it, and gives blocks back. Returns how many requests those are.

        All survivors are chosen before any token is moved. A request whose survivors cannot be chosen fails alone.
        """
        plans = [plan for plan in plans if self.pool.unshare(plan)]
        if not plans:
            return 0
        chosen, errors = choose_each(self.pool, compressor, self._logits, plans)
        good = torch.tensor([plan.request.key not in errors for plan in plans], dtype=torch.int64)
        good = self.processor.distributed_helper.tp_all_reduce_min(good, on_cpu=True)  # one rank's error is all ranks'
        for plan, fine in zip(plans, good.tolist(), strict=True):
            if not fine:
                cause = errors.get(plan.request.key, "another rank could not compress this request")
                self._fail(self.requests.known[plan.request.key][0], RuntimeError(cause))
        plans = [plan for plan, fine in zip(plans, good.tolist(), strict=True) if fine]
        if plans:
            self.pool.move(plans, chosen)
        for plan in plans:
            self._book(compressor, plan)
        return len(plans)

    def _book(self, compressor: Compressor | PromptCompressor, plan: EvictionPlan) -> None:
        """A plan that was carried out: the request's length in the engine, and its blocks."""
        request, metrics = plan.request, self.metrics
        compressor.done(plan)
        self.requests.known[request.key][0].position_offset = request.stored
        metrics.compressions += 1
        setattr(metrics, compressor.counter, getattr(metrics, compressor.counter) + plan.count)
        metrics.evicted_tokens += plan.dropped
        metrics.freed_blocks += self.pool.shrink(plan)
        metrics.query_bytes = self.queries.nbytes

    def _count(self, running: int) -> None:
        metrics, queries = self.metrics, self.queries
        metrics.steps += 1
        metrics.running, metrics.running_sum = running, metrics.running_sum + running
        metrics.waiting = len(self.scheduler.waiting_requests)
        metrics.used_blocks = self.pool.num_blocks - self.pool.free_blocks()
        metrics.query_bytes = queries.nbytes
        metrics.peak_query_bytes = max(metrics.peak_query_bytes, queries.nbytes)


class _Turns(list[Any]):
    """The engine's batch, which says whose turn it is while it is gone through."""

    def __init__(self, batch: Sequence[Any], evicted: Sequence[int], engine: Engine):
        super().__init__(batch)
        self._evicted, self._engine = evicted, engine

    def __iter__(self) -> Iterator[Any]:
        for future, evicted in zip(super().__iter__(), self._evicted, strict=True):
            self._engine._turn = evicted
            yield future


def _own(owner: Any, name: str) -> Callable[..., Any]:
    """The method of `owner` that one of ours stands for."""
    return MethodType(getattr(type(owner), name), owner)
