"""What is used of Transformers' continuous batching: the oldest version, and the internals that must be there.

The engine looks attention functions up by name and puts `PAGED` before "eager", a prefix that is to go: every name is
known with and without it.
"""

import inspect
from typing import Any

import transformers
from packaging.version import Version

LEAST_TRANSFORMERS = "5.21.0"
PAGED = "paged|"
FULL, SLIDING = "full_attention", "sliding_attention"

# What is replaced or called, by the object that has it: methods with the parameters that they must have, and
# attributes, for which nothing stands.
REQUIRED_INTERNALS: dict[str, dict[str, tuple[str, ...] | None]] = {
    "manager": {
        "_create_batch_processor": (),
        "_original_attn_impl": None,
        "batch_processor": None,
    },
    "attention": {
        "get_interface": ("attn_implementation", "default"),
        "_global_mapping": None,
        "_local_mapping": None,
    },
    "processor": {
        "_generation_step": ("model",),
        "_handle_request_error": ("error", "state"),
        "config": None,
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
    "batch": {"prepare_batch_tensors": ("requests_in_batch",), "position_ids": None, "requests_in_batch": None},
    "offloading": {"offload_requests": (), "free_request_cpu_cache": ("state",)},
    "cache": {
        "mark_complete_blocks": ("state", "complete_blocks"),
        "free_blocks": ("request_id", "no_cache"),
        "search_prefix_match": ("request_id", "prompt_ids"),
        "prepare_fork_request": ("src_state", "dst_req_ids", "copy_src_and_dst"),
        "compute_free_capacity": (),
        "can_store_request_tokens": ("state", "request_len", "dry_run"),
        "evict_cached_blocks": (),
        "free_all_requests": ("clear_ledgers",),
        "cache_allocators": None,
        "pool": None,
        "device": None,
        "max_batch_tokens": None,
        "use_prefix_sharing": None,
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
        "free_blocks": ("request_id",),
        "match_prefix_blocks": ("prompt_ids",),
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
        "acquire": ("block_id",),
        "release": ("block_id", "no_cache"),
        "block_to_hash": None,
        "cached_blocks": None,
        "hash_to_block": None,
        "shared_ref_counts": None,
    },
}


def living(reference: Any, lost: str) -> Any:
    """What a weak reference is to. Raises ReferenceError, which says what is `lost`, if it is gone."""
    found = reference()
    if found is None:
        raise ReferenceError(lost)
    return found


def check_version(found: str = transformers.__version__) -> None:
    """Raises ImportError where Transformers is older than the parts of its engine that are used here."""
    if Version(Version(found).base_version) < Version(LEAST_TRANSFORMERS):
        raise ImportError(
            f"serving needs Transformers {LEAST_TRANSFORMERS} or newer and found {found}, whose continuous batching "
            f'has other internals; pip install "transformers>={LEAST_TRANSFORMERS}"'
        )


def check_internals(parts: dict[str, Any]) -> None:
    """Raises ImportError naming what objects, by their names in `REQUIRED_INTERNALS`, do not have as we know it."""
    moved = []
    for part, owner in parts.items():
        for name, parameters in REQUIRED_INTERNALS[part].items():
            title = f"{type(owner).__name__}.{name}"
            if not hasattr(owner, name):
                moved.append(f"{title} is gone")
            elif parameters is not None:
                signature = inspect.signature(getattr(owner, name))
                if tuple(signature.parameters)[: len(parameters)] != parameters:
                    moved.append(f"{title}{signature} was ({', '.join(parameters)})")
    if moved:
        raise ImportError(
            f"the continuous batching of Transformers {transformers.__version__} is not the one that kara_hf knows: "
            f"{'; '.join(moved)}; upgrade kara_hf, or install an older transformers (from {LEAST_TRANSFORMERS} on)"
        )
