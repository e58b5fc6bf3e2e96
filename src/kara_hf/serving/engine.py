"""Kara on one engine of Transformers' continuous batching.

An engine counts a request's tokens in `position_offset`, by which it schedules, admits, reads, writes and allocates.
With Kara that is the number of *stored* tokens; what was evicted is added where true positions count: to the position
ids, and to the lengths that sliding-window layers are told, which keep their own rings. Everything is changed on the
objects of one engine, whose methods are replaced; nothing in Transformers' modules is.

The engine's processor owns its `Engine`, by the methods replaced on its parts, and is held weakly in turn. So all of it
goes, pool and queries, when the last reference to the processor does.
"""

from collections.abc import Callable, Sequence
from copy import copy
from types import MethodType
from typing import Any
from weakref import ref

import torch

from .admission import Limits, RequestRefused, check_sampling
from .compressor import Compressor
from .config import ServingConfig
from .metrics import ServingMetrics
from .pasts import Pasts
from .plans import EvictionPlan
from .pool import Pool
from .positions import Positions
from .prompts import PromptCompressor
from .queries import Brought, Places, QueryPool, query_group
from .query_recorder import Logits
from .requests import Requests, prompt_tokens
from .room import Room
from .seams import check_internals, living
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
        pasts: of requests that have ended.
        room: in the pool.
        positions: the true ones.
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
        self.pasts = Pasts(self.pool, config.conversations)
        self.room = Room(self.scheduler, self.pool, self.pasts, self.requests, self.compressor)
        self.positions = Positions(self.cache, self.requests)
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
        return living(self._processor, "the engine is gone: its manager was stopped or destroyed")

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
        found = self.pasts.find(tokens)
        self.limits.check_room(len(tokens) - (found.evicted if found else 0))
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
        if periodic or self.room.starves() or (self.config.trigger == "pressure" and self.room.waits()):
            self._compress()
            self.room.reserve()
        while True:
            batch: tuple[list[Any] | None, bool, int, int] = own(token_budget, cache_budget)
            if batch[0] is not None:
                return batch
            if self._compress():
                continue
            if self.room.can_preempt():
                return batch
            free = pool.free_blocks() * pool.page
            if free:  # enough for a part of a long prompt
                batch = own(min(token_budget, free), cache_budget)
                if batch[0]:
                    return batch
            state = self.room.stuck()
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
        _own(self.batch, "prepare_batch_tensors")(self.positions.turns(requests_in_batch, turns), *args, **kwargs)
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
        self.metrics.computed_tokens += len(shifts)
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
        state = self.scheduler.active_requests.get(request_id)
        if self.pasts.most and state is not None and state.status.name == "FINISHED":
            self._remember(state)
        _own(self.cache, "free_blocks")(request_id, no_cache)
        if not no_cache:
            self.requests.freed(request_id)
        self._measure()

    def _match(self, request_id: str, prompt_ids: list[int]) -> int:
        """A request begins with the past that stands for most of its prompt, or with the blocks of a prefix.

        Without a past, the tokens of a prompt that vote are computed even if somebody has their blocks.
        """
        state = self.scheduler.waiting_requests[request_id]
        prompt = prompt_tokens(state)
        voters = self.prompts.voters(prompt)
        if state.num_children:  # a step computes all but the last token, which each answer computes for itself
            prompt_ids = prompt_ids[:-1]
        known = prompt_ids[: prompt - voters + 1] if voters else prompt_ids  # the last one is never matched
        found = self.pasts.find(prompt_ids)
        if found is not None and found.tokens > self.pool.matched(known):
            request = self.pasts.begin(state, found, self.config.kara.pin)
            if request is not None:
                self.requests.known[request_id] = (state, request)
                state.position_offset -= found.evicted  # to which the engine adds what was found
                self.metrics.found_pasts += 1
                self.metrics.found_tokens += found.tokens
                return found.tokens
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

    # ------------------------------------------------------------------------------------------- requests that fail
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

        A request whose survivors cannot be chosen fails alone.
        """
        done, errors = self._evict(compressor, plans)
        for key, cause in errors.items():
            self._fail(self.requests.known[key][0], RuntimeError(cause))
        return len(done)

    def _remember(self, state: Any) -> None:
        """Leaves what a request that has ended holds to the next turn, with the windows sealed that are due."""
        request, sealing = self.requests.find(state), self.config.trigger == "periodic"
        if request is None or request.key not in self.pool.allocator.block_table:  # it was preempted
            return
        while sealing and (plan := self.compressor.plan(request)) is not None:
            done, errors = self._evict(self.compressor, [plan])
            if errors:
                return
            sealing = bool(done)
        self.pasts.keep(state, request)

    def _evict(
        self, compressor: Compressor | PromptCompressor, plans: list[EvictionPlan]
    ) -> tuple[list[EvictionPlan], dict[str, str]]:
        """Carries plans out where there is room for it. All survivors are chosen before any token is moved.

        Returns the plans that were, and by key of the request why survivors could not be chosen.
        """
        plans = [plan for plan in plans if self.pool.unshare(plan)]
        if not plans:
            return [], {}
        chosen, errors = choose_each(self.pool, compressor, self._logits, plans)
        good = torch.tensor([plan.request.key not in errors for plan in plans], dtype=torch.int64)
        good = self.processor.distributed_helper.tp_all_reduce_min(good, on_cpu=True)  # one rank's error is all ranks'
        for plan, fine in zip(plans, good.tolist(), strict=True):
            if not fine:
                errors.setdefault(plan.request.key, "another rank could not compress this request")
        plans = [plan for plan in plans if plan.request.key not in errors]
        if plans:
            self.pool.move(plans, chosen)
        for plan in plans:
            self._book(compressor, plan)
        return plans, errors

    def _book(self, compressor: Compressor | PromptCompressor, plan: EvictionPlan) -> None:
        """A plan that was carried out: the request's length in the engine, and its blocks."""
        request, metrics = plan.request, self.metrics
        compressor.done(plan)
        self.requests.known[request.key][0].position_offset = request.stored
        metrics.compressions += 1
        setattr(metrics, compressor.counter, getattr(metrics, compressor.counter) + plan.count)
        metrics.evicted_tokens += plan.dropped
        metrics.freed_blocks += self.pool.shrink(plan)
        self._measure()

    def _count(self, running: int) -> None:
        metrics = self.metrics
        metrics.steps += 1
        metrics.running, metrics.running_sum = running, metrics.running_sum + running
        metrics.waiting = len(self.scheduler.waiting_requests)
        self._measure()

    def _measure(self) -> None:
        metrics, nbytes = self.metrics, self.queries.nbytes
        metrics.used_blocks = self.pool.num_blocks - self.pool.free_blocks()
        metrics.query_bytes, metrics.peak_query_bytes = nbytes, max(metrics.peak_query_bytes, nbytes)
        metrics.pasts = len(self.pasts)


def _own(owner: Any, name: str) -> Callable[..., Any]:
    """The method of `owner` that one of ours stands for."""
    return MethodType(getattr(type(owner), name), owner)
