"""The seam to Transformers' continuous batching: all that depends on its internals is in this file.

An engine counts a request's tokens in `position_offset`, by which it schedules, admits, reads, writes and allocates.
With Kara that is the number of *stored* tokens; what was evicted is added where true positions count: to the position
ids, and to the lengths that sliding-window layers are told, which keep their own rings. Everything is changed on the
objects of one engine; nothing in Transformers' modules is, except that the attention function in use is wrapped while
an engine with a score that needs queries is there.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from functools import partial
from types import MethodType
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..cache.bound_model import Binding
from ..integration.attach import attach, decoder_config, detach, is_attached, unwrap
from ..policy import KaraPolicy
from .compressor import Compressor, Cut, Request, blocks
from .config import ServingConfig
from .metrics import ServingMetrics

LEAST_TRANSFORMERS = "5.21.0"
FULL, SLIDING = "full_attention", "sliding_attention"

# What is replaced or called, by the object of the engine that has it: methods with the parameters that they must have,
# and attributes, for which nothing stands.
SEAMS: dict[str, dict[str, tuple[str, ...] | None]] = {
    "processor": {
        "_handle_request_error": ("error", "state"),
        "distributed_helper": None,
        "inputs_and_outputs": None,
        "offloading_manager": None,
        "scheduler": None,
        "cache": None,
    },
    "scheduler": {
        "schedule_batch": ("token_budget", "cache_budget"),
        "add_waiting_request": ("state",),
        "finish_request": ("request_id",),
        "active_requests": None,
        "waiting_requests": None,
        "waiting_requests_order": None,
        "starved_requests": None,
        "block_new_requests": None,
        "safety_margin": None,
    },
    "batch": {"prepare_batch_tensors": ("requests_in_batch",), "position_ids": None},
    "offloading": {"offload_requests": (), "free_request_cpu_cache": ("state",)},
    "cache": {
        "mark_complete_blocks": ("state", "complete_blocks"),
        "free_blocks": ("request_id", "no_cache"),
        "compute_free_capacity": (),
        "cache_allocators": None,
        "pool": None,
        "device": None,
        "max_batch_tokens": None,
    },
    "pool": {
        "allocate_sector": ("index",),
        "count_free_blocks": ("index",),
        "free_blocks": ("index", "block_ids"),
        "get_free_blocks": ("index", "num_blocks"),
        "num_free_sectors": None,
    },
    "allocator": {
        "needs_new_blocks": ("request_id", "past_length", "query_length"),
        "allocate_cache_to_request": ("request_id", "past_length", "query_length"),
        "get_read_indices": ("request_id", "past_length", "query_length"),
        "get_write_indices": ("request_id", "past_length", "query_length"),
        "get_seqlen_k": ("past_length", "query_length"),
        "copy_blocks": ("source_block_ids", "dest_block_ids"),
        "_kv_token_views": None,
        "block_table": None,
        "blocks_per_sector": None,
        "index": None,
        "layer_indices": None,
        "ledger": None,
        "num_blocks": None,
        "tokens_per_page": None,
    },
    "ledger": {
        "release": ("block_id", "no_cache"),
        "block_to_hash": None,
        "cached_blocks": None,
        "hash_to_block": None,
        "shared_ref_counts": None,
    },
}


def check_version(found: str = transformers.__version__) -> None:
    """Raises ImportError where Transformers is older than the parts of its engine that are used here."""
    if Version(Version(found).base_version) < Version(LEAST_TRANSFORMERS):
        raise ImportError(
            f"serving needs Transformers {LEAST_TRANSFORMERS} or newer and found {found}, whose continuous batching "
            f'has other internals; pip install "transformers>={LEAST_TRANSFORMERS}"'
        )


def check_seams(parts: dict[str, Any]) -> None:
    """Raises ImportError naming what an engine, given as its `SEAMS` parts, does not have as we know it."""
    moved = []
    for part, names in SEAMS.items():
        for name, parameters in names.items():
            title = f"{type(parts[part]).__name__}.{name}"
            if not hasattr(parts[part], name):
                moved.append(f"{title} is gone")
            elif parameters is not None:
                signature = inspect.signature(getattr(parts[part], name))
                if tuple(signature.parameters)[: len(parameters)] != parameters:
                    moved.append(f"{title}{signature} was ({', '.join(parameters)})")
    if moved:
        raise ImportError(
            f"the continuous batching of Transformers {transformers.__version__} is not the one that kara_hf knows: "
            f"{'; '.join(moved)}; upgrade kara_hf, or install an older transformers (from {LEAST_TRANSFORMERS} on)"
        )


class Engine:
    """Kara on one `ContinuousBatchProcessor`.

    Args:
        processor: of the engine, before its first step.
        config: the settings.

    Attributes:
        metrics: what was done so far.

    Raises:
        ImportError: the engine is not as we know it.
        ValueError: the pool is too small for one window, or the model has no layer of full attention.
    """

    def __init__(self, processor: Any, config: ServingConfig):
        self.processor, self.config = processor, config
        self.cache, self.scheduler = processor.cache, processor.scheduler
        self.batch = processor.inputs_and_outputs
        self.compressor = Compressor(config)
        if FULL not in self.cache.cache_allocators:
            raise ValueError("the model has no layer of full attention: there is nothing to compress")
        self.full = self.cache.cache_allocators[FULL]
        check_seams(
            {
                "processor": processor,
                "scheduler": self.scheduler,
                "batch": self.batch,
                "offloading": processor.offloading_manager,
                "cache": self.cache,
                "pool": self.cache.pool,
                "allocator": self.full,
                "ledger": self.full.ledger,
            }
        )
        self.page: int = self.full.tokens_per_page
        self.metrics = ServingMetrics(blocks=self.full.num_blocks)
        if self.compressor.policy.compresses and self.capacity <= self.compressor.least:
            raise ValueError(
                f"a pool of {self.full.num_blocks} blocks of {self.page} tokens is too small for a window of "
                f"{config.kara.window} tokens and {config.kara.recent} recent ones; give the engine more memory "
                "(num_blocks), or lower window"
            )
        self._known: dict[str, tuple[Any, Request]] = {}  # by id of the request: its state, and what we know of it
        self._turn = 0  # evicted tokens of the request that the engine deals with just now
        self._columns = self._slots = torch.zeros(0, dtype=torch.int64)  # of the batch: whose queries are held, where
        self._logits: dict[int, tuple[float, float | None]] = {}  # scaling and soft cap of each layer
        self._own: dict[str, Callable[..., Any]] = {}  # the engine's methods that ours stand for
        self._replace(self.scheduler, "schedule_batch", self._schedule)
        self._replace(self.scheduler, "add_waiting_request", self._arrive)
        self._replace(self.batch, "prepare_batch_tensors", self._prepare)
        self._replace(self.cache, "mark_complete_blocks", self._mark_complete)
        self._replace(self.cache, "free_blocks", self._free)
        self._replace(processor.offloading_manager, "offload_requests", self._offload)
        if SLIDING in self.cache.cache_allocators:
            self._correct_sliding(self.cache.cache_allocators[SLIDING])

    def _replace(self, owner: Any, name: str, ours: Callable[..., Any]) -> None:
        self._own[name] = getattr(owner, name)
        setattr(owner, name, ours)

    @property
    def capacity(self) -> int:
        """Tokens that the pool holds in full attention layers if it holds nothing else."""
        return self.full.num_blocks * self.page

    @property
    def layers(self) -> list[int]:
        """Indices of the layers that are compressed."""
        return self.full.layer_indices

    # -------------------------------------------------------------------------------------------- what the engine calls
    def _arrive(self, state: Any) -> None:
        """A request is put to wait, for the first time or because it lost its blocks."""
        needed, again = len(state.initial_tokens) + 1, state._true_initial_tokens or state.position_offset
        if not again and needed > self.capacity:
            self.metrics.failed += 1
            raise ValueError(
                f"request {state.request_id} needs room for {needed} tokens and the pool holds {self.capacity}; give "
                "the engine more memory (num_blocks), or shorten the prompt"
            )
        self._own["add_waiting_request"](state)

    def _schedule(self, token_budget: int, cache_budget: int) -> tuple[list[Any] | None, bool, int, int]:
        """Compresses what is due and lets the engine choose its next batch. Where nothing would run, makes room."""
        self._sweep()
        if not self.scheduler.active_requests:
            self.scheduler.block_new_requests = False  # nobody is left whose end the engine could wait for
        periodic = self.config.when == "periodic" and self.metrics.steps % self.config.period == 0
        if periodic or self._starves() or (self.config.when == "pressure" and self._waits()):
            self._compress()
        while True:
            batch = self._own["schedule_batch"](token_budget, cache_budget)
            if batch[0] is not None:
                return batch
            if self._compress():
                continue
            if self._can_preempt():
                return batch
            free = self._free_blocks() * self.page
            if free:  # enough for a part of a long prompt
                batch = self._own["schedule_batch"](min(token_budget, free), cache_budget)
                if batch[0]:
                    return batch
            state = self._stuck()
            self._fail(
                state,
                MemoryError(
                    f"request {state.request_id} cannot go on: it holds {state.position_offset} tokens, the pool "
                    f"{self.capacity} with {free} free, and there is nothing to compress or "
                    "preempt; give the engine more memory (num_blocks), or lower retention, window or max_new_tokens"
                ),
            )

    def _prepare(self, requests_in_batch: list[Any], *args: Any, **kwargs: Any) -> None:
        """Stored lengths go in, true positions come out; finds slots for the queries that this step will bring."""
        known = [self._request(future.state) for future in requests_in_batch]
        turns = [0 if request is None else request.evicted for request in known]
        self._own["prepare_batch_tensors"](_Turns(requests_in_batch, turns, self), *args, **kwargs)
        shifts: list[int] = []
        columns: list[int] = []
        slots: list[int] = []
        for future, request, shift in zip(requests_in_batch, known, turns, strict=True):
            length, start = future.query_length, len(shifts)
            shifts += [shift] * length
            if request is None:
                continue
            request.stored = future.state.position_offset
            if self.compressor.policy.needs_queries:
                new = request.open - len(request.slots)
                request.slots += self.compressor.queries.take(new)
                columns += range(start + length - new, start + length)
                slots += request.slots[-new:] if new else []
        if any(shifts):
            ids = self.batch.position_ids
            ids[: len(shifts)] += torch.tensor(shifts, dtype=ids.dtype, device=ids.device)
        self._columns = torch.tensor(columns, dtype=torch.int64, device=self.cache.device)
        self._slots = torch.tensor(slots, dtype=torch.int64, device=self.cache.device)
        self._count(len(requests_in_batch))

    def _mark_complete(self, state: Any, complete_blocks: dict[str, int]) -> None:
        """Blocks of a compressed request hold no prefix of its tokens, so that nobody may find them by one."""
        request = self._find(state)
        if request is None or not request.evicted:
            self._own["mark_complete_blocks"](state, complete_blocks)

    def _free(self, request_id: str, no_cache: bool = False) -> None:
        self._own["free_blocks"](request_id, no_cache)
        state, _ = self._known.get(request_id, (None, None))
        if state is not None and not no_cache and not state.is_cpu_offloaded:  # it did not go to come back
            self._forget(request_id)
        self.metrics.used_blocks = self.full.num_blocks - self._free_blocks()

    def _offload(self) -> bool:
        before = len(self.scheduler.active_requests)
        done: bool = self._own["offload_requests"]()
        self.metrics.preemptions += before - len(self.scheduler.active_requests)
        return done

    def _correct_sliding(self, allocator: Any) -> None:
        """Sliding layers keep a ring of their own, in which a token's place is given by its true position."""
        for name in ("needs_new_blocks", "allocate_cache_to_request", "get_read_indices", "get_write_indices"):
            setattr(allocator, name, partial(self._at_true_position, getattr(allocator, name)))
        seqlen = allocator.get_seqlen_k
        allocator.get_seqlen_k = lambda past_length, query_length: seqlen(past_length + self._turn, query_length)

    def _at_true_position(self, own: Callable[..., Any], request_id: str, past_length: int, query_length: int) -> Any:
        return own(request_id, past_length + self._evicted(request_id), query_length)

    # --------------------------------------------------------------------------------------------- what the model calls
    @torch.compiler.disable
    def record(self, layer: int, query: torch.Tensor, scaling: float | None, softcap: float | None) -> None:
        """Holds the queries of open tokens of a layer, of ``[1, Hq, T, D]`` as attention sees them."""
        self._logits[layer] = (scaling or query.shape[-1] ** -0.5, softcap)
        if len(self._slots):
            self.compressor.queries.put(layer, self._slots, query[0].transpose(0, 1)[self._columns])

    # -------------------------------------------------------------------------------------------------- what is known
    def _find(self, state: Any) -> Request | None:
        known, request = self._known.get(state.request_id, (None, None))
        return request if known is state else None

    def _evicted(self, request_id: str) -> int:
        _, request = self._known.get(request_id, (None, None))
        return 0 if request is None else request.evicted

    def _request(self, state: Any) -> Request | None:
        """What is known of a request; from its first step on in which tokens come that can be evicted."""
        request = self._find(state)
        prompt = state._true_initial_tokens or len(state.initial_tokens)
        if request is None and state.position_offset + len(state.tokens_to_process) > prompt:
            # Tokens that came as a shared prefix have no queries here: they stay.
            request = Request(state.request_id, max(prompt, state.position_offset), state.position_offset)
            self._known[state.request_id] = (state, request)
        return request

    def _sweep(self) -> None:
        """Forgets requests that were cancelled while their blocks were elsewhere."""
        scheduler = self.scheduler
        for key, (state, _) in list(self._known.items()):
            if scheduler.active_requests.get(key, scheduler.waiting_requests.get(key)) is not state:
                self._forget(key)

    def _forget(self, key: str) -> None:
        _, request = self._known.pop(key)
        self.compressor.drop(request)
        self.metrics.query_bytes = self.compressor.queries.nbytes

    def _count(self, running: int) -> None:
        metrics, queries = self.metrics, self.compressor.queries
        metrics.steps += 1
        metrics.running, metrics.running_sum = running, metrics.running_sum + running
        metrics.waiting = len(self.scheduler.waiting_requests)
        metrics.used_blocks = self.full.num_blocks - self._free_blocks()
        metrics.query_bytes = queries.nbytes
        metrics.peak_query_bytes = max(metrics.peak_query_bytes, queries.nbytes)

    # ------------------------------------------------------------------------------------------------- room in the pool
    def _free_blocks(self) -> int:
        """Blocks of full attention layers that could be had at once."""
        pool = self.cache.pool
        return pool.count_free_blocks(self.full.index) + pool.num_free_sectors * self.full.blocks_per_sector

    def _needed(self, state: Any) -> int:
        """Blocks that a request needs for its next tokens."""
        tokens = state.tokens_to_process if state.status.name == "DECODING" else state.remaining_prefill_tokens
        length = min(len(tokens), self.cache.max_batch_tokens)
        needed: int = self.full.needs_new_blocks(state.request_id, state.current_len(), length)
        return needed

    def _starves(self) -> bool:
        """Whether the requests at work would not all find blocks for their next tokens."""
        free = self._free_blocks() + len(self.full.ledger.cached_blocks)
        return sum(self._needed(state) for state in self.scheduler.active_requests.values()) > free

    def _waits(self) -> bool:
        """Whether a request waits for blocks."""
        scheduler = self.scheduler
        if not scheduler.waiting_requests:
            return False
        if self.cache.compute_free_capacity() < scheduler.safety_margin:
            return True
        free = self._free_blocks() + len(self.full.ledger.cached_blocks)
        return self._needed(next(iter(scheduler.waiting_requests.values()))) > free

    def _can_preempt(self) -> bool:
        """Whether the engine can make room by forgetting prefixes or preempting."""
        allocators = self.cache.cache_allocators.values()
        cached = any(allocator.ledger.cached_blocks for allocator in allocators)
        return cached or bool(self.scheduler.starved_requests and len(self.scheduler.active_requests) > 1)

    def _stuck(self) -> Any:
        """The request that is in the way when nothing can run."""
        starved = self.scheduler.starved_requests
        return starved[0][0] if starved else self.scheduler.waiting_requests[self.scheduler.waiting_requests_order[0]]

    def _fail(self, state: Any, error: Exception) -> None:
        """Ends one request with an error; the others go on."""
        scheduler, key = self.scheduler, state.request_id
        self.processor._handle_request_error(error, state)
        self.processor.offloading_manager.free_request_cpu_cache(state)
        scheduler.finish_request(key)
        if scheduler.waiting_requests.pop(key, None) is not None:
            scheduler.waiting_requests_order.remove(key)
        scheduler.block_new_requests = False
        self.metrics.failed += 1

    # ------------------------------------------------------------------------------------------------------ compression
    def _compress(self) -> int:
        """Cuts the requests whose turn it is and gives their blocks back. Returns how many were cut.

        All survivors are chosen before any token is moved. A request whose survivors cannot be chosen fails alone.
        """
        active = self.scheduler.active_requests
        requests = [request for key, (_, request) in self._known.items() if key in active]
        cuts = [cut for cut in self.compressor.due(requests, self.page) if self._unshare(cut)]
        if not cuts:
            return 0
        errors: dict[str, Exception] = {}
        try:
            chosen = self._choose(cuts)
        except Exception:  # a request's, or what a score of the user's raises: find out whose
            chosen = {}
            for cut in cuts:
                try:
                    chosen |= self._choose([cut])
                except Exception as error:
                    errors[cut.request.key] = error
        good = torch.tensor([cut.request.key not in errors for cut in cuts], dtype=torch.int64)
        good = self.processor.distributed_helper.tp_all_reduce_min(good, on_cpu=True)  # one rank's error is all ranks'
        for cut, fine in zip(cuts, good.tolist(), strict=True):
            if not fine:
                cause = errors.get(cut.request.key, RuntimeError("another rank could not compress this request"))
                self._fail(self._known[cut.request.key][0], cause)
        cuts = [cut for cut, fine in zip(cuts, good.tolist(), strict=True) if fine]
        if cuts:
            self._carry_out(cuts, chosen)
        return len(cuts)

    def _open_rows(self, request: Request) -> list[int]:
        """Rows of the pool's views in which the open tokens of a request are."""
        rows: list[int] = self.full.get_read_indices(request.key, 0, request.stored)
        return rows[request.settled :]

    def _choose(self, cuts: Sequence[Cut]) -> dict[str, dict[int, torch.Tensor]]:
        """For each request and layer the survivors as places in its windows, ``[count, H, keep]`` int64."""
        chosen: dict[str, dict[int, torch.Tensor]] = {cut.request.key: {} for cut in cuts}
        for width in sorted({cut.width for cut in cuts}):
            group = [cut for cut in cuts if cut.width == width]
            places = [self._open_rows(cut.request)[: cut.count * width] for cut in group]
            rows = torch.tensor([row for part in places for row in part], device=self.cache.device)
            for layer in self.layers:
                keys = self.full._kv_token_views[layer][0][rows].unflatten(0, (-1, width)).transpose(1, 2)
                scaling, softcap = self._logits.get(layer, (keys.shape[-1] ** -0.5, None))
                kept = self.compressor.select(layer, group, keys, scaling, softcap)
                for cut, part in zip(group, kept.split([cut.count for cut in group]), strict=True):
                    chosen[cut.request.key][layer] = part
        return chosen

    def _carry_out(self, cuts: Sequence[Cut], chosen: dict[str, dict[int, torch.Tensor]]) -> None:
        """Moves survivors and the tokens behind the windows together, in every layer, and frees the blocks behind."""
        device = self.cache.device
        rows = [self._open_rows(cut.request) for cut in cuts]
        starts = [sum(len(part) for part in rows[:number]) for number in range(len(rows))]
        sources = torch.tensor([row for part in rows for row in part], device=device)
        kept_rows = [part[: len(part) - cut.dropped] for cut, part in zip(cuts, rows, strict=True)]
        targets = torch.tensor([row for part in kept_rows for row in part], device=device)
        for layer in self.layers:
            order = []
            for cut, part, start in zip(cuts, rows, starts, strict=True):
                places = chosen[cut.request.key][layer]  # [count, H, keep]
                windows = torch.arange(cut.count, device=device)[:, None, None] * cut.width + start
                survivors = (places + windows).transpose(1, 2).flatten(0, 1)  # [count * keep, H]
                behind = torch.arange(start + cut.count * cut.width, start + len(part), device=device)
                order += [survivors, behind[:, None].expand(-1, places.shape[1])]
            index = torch.cat(order)[:, :, None]
            for view in self.full._kv_token_views[layer]:
                tokens = view.index_select(0, sources)
                view.index_copy_(0, targets, tokens.gather(0, index.expand(-1, -1, tokens.shape[2])))
        for cut in cuts:
            self._book(cut)

    def _book(self, cut: Cut) -> None:
        """The engine's side of a cut: its length, and its blocks."""
        request, metrics = cut.request, self.metrics
        self.compressor.done(cut)
        self._known[request.key][0].position_offset = request.stored
        table = self.full.block_table[request.key]
        spare = table[blocks(request.stored, self.page) :]
        del table[len(table) - len(spare) :]
        self.cache.pool.free_blocks(
            self.full.index, [block for block in spare if self.full.ledger.release(block, True)]
        )
        metrics.compressions += 1
        metrics.windows += cut.count
        metrics.evicted_tokens += cut.dropped
        metrics.freed_blocks += len(spare)
        metrics.query_bytes = self.compressor.queries.nbytes

    def _unshare(self, cut: Cut) -> bool:
        """Makes the blocks that a cut writes to the request's own, by copying those it shares. False without room."""
        request, ledger = cut.request, self.full.ledger
        table, first = self.full.block_table[request.key], request.settled // self.page
        written = range(first, blocks(request.stored - cut.dropped, self.page))
        shared = [place for place in written if ledger.shared_ref_counts.get(table[place], 1) > 1]
        if len(shared) > self._free_blocks():
            return False
        while self.cache.pool.count_free_blocks(self.full.index) < len(shared):
            self.cache.pool.allocate_sector(self.full.index)
        copies = self.cache.pool.get_free_blocks(self.full.index, len(shared))
        self.full.copy_blocks([table[place] for place in shared], copies)
        for place, copy_of in zip(shared, copies, strict=True):
            ledger.release(table[place])
            table[place] = copy_of
        for place in written:  # what is written over is no prefix of anything
            block_hash = ledger.block_to_hash.pop(table[place], None)
            if block_hash is not None:
                del ledger.hash_to_block[block_hash]
        return True


class _Turns(list[Any]):
    """The engine's batch, which says whose turn it is while it is gone through."""

    def __init__(self, batch: Sequence[Any], evicted: Sequence[int], engine: Engine):
        super().__init__(batch)
        self._evicted, self._engine = evicted, engine

    def __iter__(self) -> Iterator[Any]:
        for future, evicted in zip(super().__iter__(), self._evicted, strict=True):
            self._engine._turn = evicted
            yield future


class Serving:
    """What `kara_continuous_batching` yields.

    Attributes:
        config: the settings.
        engines: those that were started, newest last.
    """

    def __init__(self, config: ServingConfig):
        self.config = config
        self.engines: list[Engine] = []
        self._managers: list[Any] = []
        self._held = ExitStack()

    @property
    def metrics(self) -> ServingMetrics:
        """Of the newest engine; all zero before there is one."""
        return self.engines[-1].metrics if self.engines else ServingMetrics()

    def manager(self, own: Callable[..., Any], model: Any, generation_config: Any, config: Any, hints: Any) -> Any:
        """A `ContinuousBatchingManager` of `model` whose engine has Kara.

        Raises:
            ValueError: the engine is to run asynchronously or in CUDA graphs, there is one without Kara already, or the
                score is a key calibration of another model.
        """
        cached: Any = getattr(model, "_cached_continuous_batching_manager", None)
        if cached is not None and cached not in self._managers:
            raise ValueError(
                "the model keeps a continuous batching manager that was started without Kara; call "
                "model.destroy_cached_continuous_batching_manager() first"
            )
        calibration = KaraPolicy(self.config.kara).calibration
        if calibration is not None:
            Binding(model).check_calibration(calibration)
        config = transformers.ContinuousBatchingConfig() if config is None else copy(config)
        for name in ("use_async_batching", "use_cuda_graph"):
            value = getattr(config, name)
            if value is True or (isinstance(value, tuple) and any(value)):
                raise ValueError(f"{name}={value!r} is not possible with Kara, which acts between steps; leave it out")
            setattr(config, name, False)
        manager = own(generation_config=generation_config, continuous_batching_config=config, workload_hints=hints)
        if manager not in self._managers:
            self._managers.append(manager)
            create = manager._create_batch_processor
            manager._create_batch_processor = lambda: self._extend(manager, create)
        return manager

    def _extend(self, manager: Any, create: Callable[[], Any]) -> Any:
        existed = manager.batch_processor
        processor = create()
        if processor is not existed:
            try:
                engine = Engine(processor, self.config)
                if engine.compressor.policy.needs_queries:
                    self._held.enter_context(_recording(manager.model, engine))
            except Exception:
                if manager._original_attn_impl is not None:
                    manager.model.set_attn_implementation(manager._original_attn_impl)
                raise
            self.engines.append(engine)
        return processor

    def close(self, at_once: bool = False) -> None:
        """Stops managers that still run: once their requests are done, or `at_once`, which fails those."""
        for manager in self._managers:
            if manager.is_running():
                manager.stop(hard_stop=at_once)
            manager.destroy()
            if vars(manager.model).get("_cached_continuous_batching_manager") is manager:
                del manager.model._cached_continuous_batching_manager
        self._held.close()


@contextmanager
def _recording(model: Any, engine: Engine) -> Iterator[None]:
    """Lets `engine` see the queries of its model's layers."""
    name = decoder_config(model)._attn_implementation
    _Observed.install(name)
    modules = [module for module in model.modules() if getattr(module, "layer_idx", None) in engine.layers]
    try:
        for module in modules:
            module.query_recorder = engine
        yield
    finally:
        for module in modules:
            if vars(module).get("query_recorder") is engine:
                del module.query_recorder
        _Observed.remove(name)


class _Observed:
    """Stands for an attention function of Transformers, for as long as an engine looks at what it is given."""

    installed: dict[str, "_Observed"] = {}

    def __init__(self, own: Callable[..., Any]):
        self.own, self.users = own, 0

    def __call__(self, module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        recorder: Engine | None = vars(module).get("query_recorder")
        if recorder is not None and "write_index" in kwargs:  # a step of the engine, not a forward beside it
            recorder.record(module.layer_idx, query, kwargs.get("scaling"), kwargs.get("softcap"))
        return self.own(module, query, *args, **kwargs)

    @classmethod
    def install(cls, name: str) -> None:
        if name not in cls.installed:
            cls.installed[name] = ALL_ATTENTION_FUNCTIONS[name] = cls(ALL_ATTENTION_FUNCTIONS[name])
        cls.installed[name].users += 1

    @classmethod
    def remove(cls, name: str) -> None:
        cls.installed[name].users -= 1
        if not cls.installed[name].users:
            ALL_ATTENTION_FUNCTIONS[name] = cls.installed.pop(name).own


@contextmanager
def serving_models(config: ServingConfig) -> Iterator[Serving]:
    """Within it the continuous batching of every model of the process has Kara, and it ends all of it at once."""
    from transformers.generation.continuous_batching.continuous_api import ContinuousMixin

    with _serving(ContinuousMixin, config) as serving:
        try:
            yield serving
        finally:
            serving.close(at_once=True)


@contextmanager
def kara_continuous_batching(model: Any, config: ServingConfig | None = None, **settings: Any) -> Iterator[Serving]:
    """Within it ``model.generate_batch`` and its other entry points to continuous batching compress with Kara.

    Args:
        model: a causal LM of Transformers, or one that PEFT wraps.
        config: the settings, or
        settings: those of `ServingConfig` and `kara_hf.KaraConfig` by name.

    Yields:
        `Serving`, whose `metrics` say what was done.

    Raises:
        ImportError: Transformers is too old.
        ValueError: a setting is not possible, or what `Serving.manager` and `Engine` say.
    """
    config = ServingConfig.of(**settings) if config is None else config
    model = unwrap(model)
    attached = is_attached(decoder_config(model))
    detach(model)  # the engine knows no other names of attention functions than its own
    try:
        with _serving(model, config) as serving:
            yield serving
    finally:
        if attached:
            attach(model)


@contextmanager
def _serving(owner: Any, config: ServingConfig) -> Iterator[Serving]:
    """Replaces `init_continuous_batching` of a model, or of the class of all."""
    check_version()
    serving, name = Serving(config), "init_continuous_batching"
    before, own = vars(owner).get(name), getattr(owner, name)

    def init(
        model: Any, generation_config: Any = None, continuous_batching_config: Any = None, workload_hints: Any = None
    ) -> Any:
        bound = own if hasattr(own, "__self__") else MethodType(own, model)
        return serving.manager(bound, model, generation_config, continuous_batching_config, workload_hints)

    setattr(owner, name, init if isinstance(owner, type) else MethodType(init, owner))
    try:
        yield serving
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
        serving.close()
