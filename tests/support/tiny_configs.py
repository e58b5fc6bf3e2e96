"""Any config of Transformers in miniature: its defaults shrunk by rules on the names of its fields.

Every width becomes 64, every head 16 wide, every count of experts 4, every window 8 tokens, and of the layers a few
stay, with every kind of layer among them. Configs inside a config are shrunk likewise. Some classes have entries in
`OVERRIDES`: their fields depend on each other in ways of their own, or their defaults leave out a kind of layer.
"""

import dataclasses
import re
from typing import Any

from transformers import PreTrainedConfig

VOCAB_SIZE = 128
PAD_TOKEN_ID = 0
MAX_LAYERS = 6

# Field name -> value, the first match wins. Numbers only ever shrink, and None, booleans and strings stay.
_RULES: list[tuple[str, int]] = [
    (r"(.*_)?vocab_size(_.*)?|vocab_offset", VOCAB_SIZE),
    (r"num_key_value_heads|num_kv_heads|swa_num_key_value_heads|num_query_groups|num_global_key_value_heads", 2),
    (r"linear_num_key_heads", 2),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 8),
    (r"index_n_heads", 2),
    (r"(.*_)?(n_heads?|num_heads|num_attention_heads|attention_heads|linear_num_value_heads|linear_num_heads)", 4),
    (r"(.*_)?num_sliding_attention_heads", 4),
    (r"q_lora_rank", 32),
    (r"kv_lora_rank", 24),
    (r"qk_nope_head_dim|v_head_dim", 16),
    (r"qk_rope_head_dim", 8),
    (r"qk_head_dim", 24),
    (r"rotary_dim", 8),
    (r"o_lora_rank|hc_lowrank|adapter_rank|lora_rank|laurel_rank|gated_norm_rank|loop_gate_rank", 8),
    (r"(.*_)?(head_dim|d_head|headdim|kv_channels|attention_head_size|dim_head|d_kv|query_pre_attn_scalar)", 16),
    (r"(global|swa|linear)_(key_|value_)?head_dim", 16),
    (r"mamba_d_ssm", 128),
    (r"(mamba_d_state|state_size|ssm_state_size|mamba_dt_rank|time_step_rank|hidden_size_per_layer_input)", 8),
    (r"(.*_)?chunk_size", 16),
    (r"moe_intermediate_size|moe_hidden_size|.*shared_expert.*(size|dim)|expert_ffn_hidden_size", 32),
    (r"(.*_)?intermediate_size.*|(.*_)?ffn_dim|ffn_hidden_size|feed_forward_size|mlp_dim", 96),
    (r"d_ff|dff|dim_ff|n_inner|d_inner", 96),
    (r"(.*_)?(hidden_size|d_model|embed_dim|n_embd|emb_dim|embedding_size|embedding_dim|lru_width)(_.*)?", 64),
    (r"(.*_)?(projection_dim|proj_dim|projector_(input|output)_dim|image_token_embed_dim|output_dim|hidden_dim)", 64),
    (r"adapter_(in_dim|out_dim|input_size)|codebook_dim", 64),
    (r"n_shared_experts|num_shared_experts", 1),
    (r"num_experts_per_tok|moe_topk|moe_top_k|top_k_experts|moe_k", 2),
    (r"(.*_)?(num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|zero_expert_num)", 4),
    (r"n_group|num_expert_groups", 2),
    (r"topk_group", 1),
    (r"(.*_)?(sliding_window(_size)?|attention_window_size|local_attention_window_len|window_size|local_attention)", 8),
    (r"attention_chunk_size", 8),
    (r"index_topk", 16),
    (r"index_block_size", 8),
    (r"index_topk_blocks", 2),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_target_positions|max_source_positions", 1024),
    (r"num_kv_shared_layers", 2),
]
_LAYER_COUNTS = re.compile(
    r"(num_hidden_layers|n_layers?|num_layers|decoder_layers|encoder_layers|depth|layers|decoder_num_layers|"
    r"num_(de|en)coder_layers|.*_num_hidden_layers|depths)"
)
_NAMES = re.compile(
    r"(.*_)?token(_id|_index|_ids)?|(.*_)?(start|end|patch|user|bos|eos|pad|sep|boi|eoi)(_token)?_(id|index)"
)


def shrink(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """The default config of a class in miniature, `OVERRIDES` applied; its vocabulary has `VOCAB_SIZE` tokens."""
    first = _NAMED_FIRST.get(config_class.model_type, ())
    fixed = OVERRIDES.get(config_class.model_type, {})
    return _shrunk(config_class(**{name: fixed[name] for name in first}), decoder=True)


def _shrunk(config: PreTrainedConfig, decoder: bool) -> PreTrainedConfig:
    """`config` in miniature; `decoder`: it is the part that writes text, in which all kinds of layers are kept."""
    config_class, values = type(config), _fields(config)
    fixed = OVERRIDES.get(config_class.model_type, {})
    small: dict[str, Any] = {}
    keep = _kept_layers(values) if decoder else [0]
    layers = next((v for k, v in values.items() if _LAYER_COUNTS.fullmatch(k) and isinstance(v, int)), 0)
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            small[name] = _shrunk(value, decoder and name in _DECODERS)
        elif value is None and decoder and name in _NEEDED and "qk_rope_head_dim" not in values:
            small[name] = _NEEDED[name]
        elif isinstance(value, bool) or value is None or isinstance(value, str):
            small[name] = value
        elif isinstance(value, list | tuple) and layers > len(keep) and len(value) == layers:
            picked = [value[layer] for layer in keep]
            small[name] = [_small(name, x) if isinstance(x, int) and not isinstance(x, bool) else x for x in picked]
        elif isinstance(value, int):
            small[name] = min(value, len(keep)) if _LAYER_COUNTS.fullmatch(name) else _small(name, value)
        elif name == "rope_parameters" or name == "rope_scaling":
            small[name] = _rope(value)
            if "mrope_section" in getattr(config_class, "ignore_keys_at_rope_validation", ()) and "rope_type" in value:
                small[name].setdefault("mrope_section", _section([24, 20, 20], value))
        else:
            small[name] = value
    _token_ids(small)
    _together(values, small)
    if decoder and "is_decoder" in values:
        small["is_decoder"] = True
    small.update(fixed)
    for name in config_class.attribute_map.keys() & small.keys() - fixed.keys():
        if config_class.attribute_map[name] in fixed:
            del small[name]
    return config_class(**small)


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Name and value of every field that the config's class takes."""
    names = {field.name for field in dataclasses.fields(config) if field.init}
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    values = {alias: vars(config)[name] for alias, name in config.attribute_map.items() if name in vars(config)}
    values |= vars(config)  # not by attribute: fields that differ between layers do not answer
    return {name: values[name] for name in sorted(names - (common - _COMMON)) if name in values}


_DECODERS = {"text_config", "decoder", "thinker_config", "language_config", "llm_config", "text_model_config"}
_NEEDED = {"head_dim": 16, "num_key_value_heads": 2}  # what some configs leave open and their models need
_COMMON = {"bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "is_decoder"}


def _small(name: str, value: int) -> int:
    for pattern, limit in _RULES:
        if re.fullmatch(pattern, name):
            return min(value, limit)
    return value


def _kept_layers(values: dict[str, Any]) -> list[int]:
    """Layers so that each combination of kinds is among them, at least 3, in their order."""
    layers = next((v for k, v in values.items() if _LAYER_COUNTS.fullmatch(k) and isinstance(v, int)), 0)
    kinds = [
        value
        for name, value in values.items()
        if isinstance(value, list | tuple) and len(value) == layers and name in _KINDS
    ]
    if not kinds:
        return list(range(min(layers, 3)))
    combined = list(zip(*kinds, strict=True))
    seen: dict[Any, list[int]] = {}
    for layer, kind in enumerate(map(str, combined)):
        seen.setdefault(kind, []).append(layer)
    chosen: list[int] = []
    for times in range(layers):  # one of each kind, then a second of each, ...
        for places in seen.values():
            if times < len(places) and (times == 0 or len(chosen) < 4):
                chosen.append(places[times])
        if len(chosen) >= 4:
            break
    return sorted(chosen[:MAX_LAYERS])


_KINDS = {
    "layer_types",
    "mlp_layer_types",
    "indexer_types",
    "layers_block_type",
    "attention_layers",
    "attn_layers",
    "kv_sharing_modes",
}


def _rope(value: Any) -> Any:
    """Rotary settings for heads of 16: sections of multimodal positions are scaled to the width that they must have."""
    if not isinstance(value, dict):
        return value
    out = dict(value)
    if "mrope_section" in out and out["mrope_section"]:
        out["mrope_section"] = _section(out["mrope_section"], out)
    return {key: _rope(item) if isinstance(item, dict) else item for key, item in out.items()}


def _section(section: list[int], rope: dict[str, Any]) -> list[int]:
    width = int(8 * rope.get("partial_rotary_factor", 1.0))
    new = [max(1, part * width // sum(section)) for part in section]
    new[0] += width - sum(new)
    return new


def _token_ids(small: dict[str, Any]) -> None:
    """Special tokens inside the small vocabulary, the model's own ones from the top down."""
    free = iter(range(VOCAB_SIZE - 1, 100, -1))
    for name, value in small.items():
        if name == "pad_token_id":
            small[name] = PAD_TOKEN_ID
        elif name == "eos_token_id":
            small[name] = None
        elif name == "bos_token_id":
            small[name] = None if value is None else 1
        elif _NAMES.fullmatch(name) and isinstance(value, int) and not isinstance(value, bool) and value >= 100:
            small[name] = next(free)


def _together(values: dict[str, Any], small: dict[str, Any]) -> None:
    """Fields that say the same thing twice go on doing so."""
    rope, nope = values.get("qk_rope_head_dim"), values.get("qk_nope_head_dim")
    if isinstance(rope, int) and values.get("head_dim") == rope:
        small["head_dim"] = small["qk_rope_head_dim"]
    elif isinstance(rope, int) and isinstance(nope, int) and values.get("head_dim") == rope + nope:
        small["head_dim"] = small["qk_rope_head_dim"] + small["qk_nope_head_dim"]
    for heads, kv in (
        ("num_attention_heads", "num_key_value_heads"),
        ("swa_num_attention_heads", "swa_num_key_value_heads"),
    ):
        if isinstance(values.get(kv), int) and values.get(kv) == values.get(heads):
            small[kv] = small[heads]


_SLIDING_FULL = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_SHARED = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
_ALL_SHARED = ["sliding_attention", "full_attention"]
_GEMMA4 = {"num_hidden_layers": 5, "num_kv_shared_layers": 2, "layer_types": _SHARED, "global_head_dim": 32}
_ASSISTANT = {
    "model_type": "gemma4_text",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 8,
    "num_hidden_layers": 2,
    "num_kv_shared_layers": 2,
    "layer_types": _ALL_SHARED,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
}
# By model type: fields without which the class has no defaults.
_NAMED_FIRST = {"gemma4_assistant": ("text_config",)}
_DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

# By model type: fields that no rule on names gets right.
OVERRIDES: dict[str, dict[str, Any]] = {
    "apertus1p5": {"image_token_offset": 64, "audio_token_offset": 72},
    "apertus1p5_vision_tokenizer": {"codebook_size": 8, "base_channels": 32},
    "bamba": {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "blenderbot": {"encoder_layers": 3, "num_hidden_layers": 3},
    "blt": {"encoder_hash_byte_group_vocab": 128},
    "chameleon": {"vocabulary_map": {"<image>": 127, "<pad>": 0}},
    "cohere_compass_text": {
        "layer_types": _SLIDING_FULL,
        "num_hidden_layers": 4,
        "rope_parameters": {kind: _DEFAULT_ROPE | {"mrope_section": [2, 3, 3]} for kind in set(_SLIDING_FULL)},
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse"], "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {
        "head_dim": 16,
        "qk_rope_head_dim": 8,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    },
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "dory": {
        "num_hidden_layers": 4,
        "layer_types": _SLIDING_FULL,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 24,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "emu3": {"vocabulary_map": {"<image>": 127, "<|extra_200|>": 126}},
    "emu3_vqgan": {"base_channels": 32},
    "ernie4_5_vl_moe_text": {"rope_parameters": _DEFAULT_ROPE | {"mrope_section": [3, 3, 2]}},
    "falcon": {"num_kv_heads": 4, "alibi": False},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128, "mamba_n_groups": 1},
    "florence_vision": {
        "embed_dim": [16, 16, 16, 16],
        "num_heads": [2, 2, 2, 2],
        "num_groups": [2, 2, 2, 2],
        "depths": [1, 1, 1, 1],
    },
    "gemma3n_text": {
        "num_hidden_layers": 5,
        "num_kv_shared_layers": 2,
        "layer_types": _SHARED,
        "intermediate_size": [96] * 5,
        "activation_sparsity_pattern": [0.0] * 5,
        "altup_num_inputs": 2,
    },
    "gemma4_assistant": {"text_config": _ASSISTANT, "backbone_hidden_size": 64},
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
    "gpt_neo": {
        "num_layers": 4,
        "attention_types": [[["global", "local"], 2]],
        "attention_layers": ["global", "local"] * 2,
    },
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "spatial_target_layers": [0], "downsample_rate": "1/2"},
    "granitemoehybrid": {
        "num_hidden_layers": 4,
        "layer_types": ["mamba", "attention"] * 2,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
    },
    "hrm_text": {"num_hidden_layers": 2, "num_layers_per_stack": None, "L_cycles": 1},
    "hy_v4_vl_text": {"rope_parameters": _DEFAULT_ROPE | {"mrope_section": [2, 1, 1]}},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2, "full_attn_idxs": None},
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"num_layers": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
    },
    "mistral": {"sliding_window": None},
    "mistral4": {"qk_nope_head_dim": 8},
    "molmo2_adapter": {"vision_feature_layer": [0, 0]},
    "paddleocr_vl_text": {"rope_parameters": _DEFAULT_ROPE | {"mrope_section": [2, 3, 3]}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 126},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 126},
    "qwen4_exp_text": {
        "head_dim": 16,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "reformer": {
        "num_hidden_layers": 2,
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds_dim": [16, 48],
        "axial_pos_shape": [8, 16],
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
        "num_buckets": 4,
    },
    "step3p5": {
        "sliding_window": 8,
        "num_hidden_layers": 4,
        "layer_types": _SLIDING_FULL,
        "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
    },
    "wavtokenizer_encoder": {"codebook_size": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {"n_mamba_heads": 8, "mamba_headdim": 16, "mamba_ngroups": 1},
}
