"""What of Transformers may go without notice and is used all the same: one list, each with its reason.

When a new version breaks something, it is one of these. A name that is used and not listed fails here, and so does one
that is listed and not used any more.
"""

import ast
from pathlib import Path

import kara_hf

SOURCE = Path(kara_hf.__file__).parent

# Imported from below the top level of Transformers, which alone is public.
IMPORTED = {
    "cache_utils.Cache": "the base class of caches",
    "cache_utils.CacheLayerMixin": "the base class of a cache's layers",
    "cache_utils.DynamicLayer": "the layer of the full cache; the base of the one in 8 bits",
    "cache_utils.LinearAttentionAndFullAttentionLayer": "told apart where layers are chosen for compression",
    "cache_utils.LinearAttentionCacheLayerMixin": "told apart: what it holds is no reading of keys and values",
    "cache_utils.LinearAttentionLayer": "the base of layers that hold attention and recurrent states",
    "cli.serve.Serve": "the server that `kara-hf serve` starts",
    "cli.serving.server": "its module, for the routes that it adds",
    "cli.serving.utils": "what a request's parts are called, and which a model takes",
    "cli.serving.utils.Modality": "as its module",
    "generation.continuous_batching.continuous_api.ContinuousMixin": "the engine whose managers are wrapped",
    "generation.streamers.BaseStreamer": "the base class of streamers",
    "integrations.sdpa_attention.sdpa_attention_forward": "told apart, because it leaves soft caps out",
    "masking_utils.AttentionMaskInterface": "its look-up of mask functions is wrapped",
    "masking_utils.causal_mask_function": "told apart from masks of a model's own",
    "masking_utils.sdpa_mask": "says who sees whom by a mask of a model's own",
    "modeling_utils.ALL_ATTENTION_FUNCTIONS": "the model's own attention function is looked up there",
    "pipelines.PIPELINE_REGISTRY": "importing kvpress adds a pipeline, which is taken out again",
    "utils.find_adapter_config_file": "whether an adapter lies in a folder or a repository",
    "utils.import_utils.is_serve_available": "whether the server's packages are there",
    "utils.logging": "a command is quiet",
}
# Attributes with a leading underscore, by dot or by name in a string, that no code of the package itself defines.
PRIVATE = {
    "_C": "torch: switches a tensor subclass off while its own function runs",
    "_attn_implementation": "names the attention function of a model",
    "_cached_continuous_batching_manager": "the engine that a model keeps between calls",
    "_can_set_attn_implementation": "whether a model looks its attention function up",
    "_cb_config": "settings of the engine that the server runs",
    "_check_alive": "the server's own check of the engine's thread",
    "_commit_hash": "the revision of a model from a hub, which results carry",
    "_compiled_call_impl": "torch: whether a module was compiled",
    "_create_batch_processor": "where the engine makes its cache",
    "_dynamo": "torch: the type of compiled models",
    "_from_model_config": "no setting: says where a generation_config came from",
    "_generation_step": "the engine's forward, which must not end its thread",
    "_global_mapping": "of attention functions; importing kvpress changes it, which is taken back",
    "_gradient_checkpointing_func": "of decoder layers that are trained",
    "_handle_request_error": "where the engine reports a request that failed",
    "_kv_token_views": "the engine's keys and values by token",
    "_local_mapping": "as `_global_mapping`, of one registry",
    "_name_or_path": "where a model came from, which results carry",
    "_orig_mod": "torch: what was compiled",
    "_original_attn_impl": "the engine's own note of the attention function",
    "_supports_default_dynamic_cache": "whether a model has a cache class of its own",
    "_torchdynamo_orig_callable": "torch: whether a forward was compiled",
    "_true_initial_tokens": "tokens of a request's prompt in the engine",
}
# Names that are replaced: the old one is used where the installed version does not know the new one.
DEPRECATED = {
    "past_key_values": "the cache's argument and output, `cache` in newer versions; forward drops it in 5.40, generate "
    "in 6.0",
}
OLD_NAMES = {*DEPRECATED, "cache_params", "past_key_value"}


def trees():
    return [ast.parse(path.read_text()) for path in sorted(SOURCE.rglob("*.py"))]


def imported():
    """Names imported from modules of Transformers below its top level, and private ones from there."""
    found = set()
    for tree in trees():
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.ImportFrom)
                and not node.level
                and (node.module or "").split(".")[0] == "transformers"
            ):
                below = node.module.removeprefix("transformers").removeprefix(".")
                found |= {f"{below}.{alias.name}".strip(".") for alias in node.names if below or alias.name[0] == "_"}
            if isinstance(node, ast.Import):
                found |= {
                    alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("transformers.")
                }
    return found


def own_names():
    """What the package itself defines: functions, classes, variables and attributes of its own objects."""
    found = set()
    for tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            stored = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            if stored and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                found.add(node.attr)
    return found


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name.isidentifier() and name != "_"


def private():
    """Attributes and strings that are private names of somebody else's."""
    found = set()
    for tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and is_private(node.attr):
                found.add(node.attr)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and is_private(node.value):
                found.add(node.value)
    return found - own_names()


def deprecated():
    """Names that are replaced, as an argument, an attribute or in a string that is nothing else."""
    found = set()
    for tree in trees():
        for node in ast.walk(tree):
            names = [getattr(node, part, None) for part in ("arg", "attr", "value")]
            found |= OLD_NAMES & {name for name in names if isinstance(name, str)}
    return found


def told(found, listed):
    return {"new, to be listed with a reason": sorted(found - listed), "not used any more": sorted(listed - found)}


NOTHING = told(set(), set())


def test_every_import_from_below_the_top_level_is_listed():
    assert told(imported(), IMPORTED.keys()) == NOTHING


def test_every_private_name_is_listed():
    words_of_others = {"_high", "_low"}  # columns of a table, in strings
    assert told(private() - words_of_others, PRIVATE.keys()) == NOTHING


def test_every_deprecated_name_is_listed():
    assert told(deprecated(), DEPRECATED.keys()) == NOTHING


def test_every_name_has_a_reason():
    assert all(reason for names in (IMPORTED, PRIVATE, DEPRECATED) for reason in names.values())
