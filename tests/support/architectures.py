"""Tiny random causal language models, one per architecture: the table that the model tests run over.

Everything is built offline from a config, in float32, on the CPU and in eval mode. The weights are redrawn so that a
model is lively although untrained: attention is peaked rather than uniform, and greedy decoding visits many tokens.
Generation never stops early (there is no end-of-sequence token), and 0 is the padding token, so prompts draw from 1 up.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

VOCAB_SIZE = 128
PAD_TOKEN_ID = 0


@dataclass(frozen=True)
class Architecture:
    """One architecture in miniature.

    name: readable id, also the key in `ARCHITECTURES`.
    config: keyword arguments of its config with `model_type` among them, or a callable returning the finished config.
    group: "required" models are supported and tested in full, "extra" ones are covered where it is cheap.
    notes: what is unusual about its attention or its cache.
    padding: left-padded batches give the same tokens as single runs in Transformers itself.
    implementations: the attention implementations of Transformers that run it and agree on its result.
    """

    name: str
    config: dict[str, Any] | Callable[[], PreTrainedConfig]
    group: Literal["required", "extra"] = "required"
    notes: str = ""
    padding: bool = True
    implementations: tuple[str, ...] = ("sdpa", "eager")

    def make_config(self) -> PreTrainedConfig:
        if callable(self.config):
            return self.config()
        return AutoConfig.for_model(**self.config)


def _small(model_type: str, **changes: Any) -> dict[str, Any]:
    """Three layers of grouped-query attention (4 query heads on 2 key-value heads of size 16), with changes on top."""
    config = dict(
        model_type=model_type,
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=PAD_TOKEN_ID,
    )
    config.update(changes)
    return {key: value for key, value in config.items() if value is not _ABSENT}


_ABSENT = object()  # removes one of the common fields from a config that has no such field

_MLA = dict(
    num_key_value_heads=4,
    head_dim=_ABSENT,
    q_lora_rank=32,
    kv_lora_rank=24,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=12,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    moe_intermediate_size=32,
    first_k_dense_replace=1,
)
_GATED_DELTA = dict(
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    linear_conv_kernel_dim=4,
)
_MAMBA2 = dict(mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=8, mamba_d_conv=4, mamba_expand=2)
_FOUR_SLIDING_FULL = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

_TABLE = [
    # Full attention in every layer, through the registered attention function.
    Architecture("llama", _small("llama")),
    Architecture("qwen2", _small("qwen2")),
    Architecture("qwen3", _small("qwen3"), notes="query and key norms"),
    Architecture(
        "qwen3-moe",
        _small("qwen3_moe", moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1),
        notes="mixture of experts, query and key norms",
    ),
    Architecture(
        "mixtral",
        _small("mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
        notes="mixture of experts",
    ),
    Architecture("mistral", _small("mistral", sliding_window=None)),
    Architecture("phi3", _small("phi3", head_dim=_ABSENT, sliding_window=None), notes="one fused projection"),
    Architecture("olmo2", _small("olmo2", head_dim=_ABSENT), notes="norm over the whole query and key width"),
    Architecture(
        "glm4",
        _small("glm4", rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
        notes="rotates half of each head",
    ),
    Architecture(
        "smollm3",
        _small("smollm3", head_dim=_ABSENT, num_hidden_layers=4, no_rope_layer_interval=2),
        notes="every second layer has no position embedding",
    ),
    Architecture(
        "granite",
        _small("granite", head_dim=_ABSENT, attention_multiplier=0.2, residual_multiplier=0.8, logits_scaling=2.0),
        notes="scaling is not head_dim ** -0.5",
    ),
    Architecture(
        "stablelm",
        _small(
            "stablelm",
            head_dim=_ABSENT,
            qk_layernorm=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        ),
        notes="partial rotary",
    ),
    Architecture(
        "gpt-neox",
        _small("gpt_neox", num_key_value_heads=_ABSENT, head_dim=_ABSENT),
        notes="multi-head, partial rotary",
    ),
    # Sliding-window layers, alone or between full layers.
    Architecture("mistral-sliding", _small("mistral", sliding_window=8), notes="no layer has full attention"),
    Architecture(
        "gemma2",
        _small(
            "gemma2",
            num_hidden_layers=4,
            sliding_window=8,
            query_pre_attn_scalar=16,
            attn_logit_softcapping=2.0,
            layer_types=_FOUR_SLIDING_FULL,
        ),
        notes="soft-capped attention scores, which sdpa refuses or (before 5.23) drops without a word",
        implementations=("eager",),
    ),
    Architecture(
        "gemma3",
        _small(
            "gemma3_text",
            num_hidden_layers=4,
            sliding_window=8,
            query_pre_attn_scalar=16,
            layer_types=_FOUR_SLIDING_FULL,
        ),
        notes="query and key norms, one rotary base per layer type",
    ),
    Architecture(
        "gpt-oss",
        _small(
            "gpt_oss",
            num_hidden_layers=4,
            sliding_window=8,
            num_local_experts=4,
            num_experts_per_tok=2,
            layer_types=_FOUR_SLIDING_FULL,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        notes="one attention sink per query head, mixture of experts",
        implementations=("eager",),
    ),
    Architecture(
        "cohere2",
        _small(
            "cohere2",
            head_dim=_ABSENT,
            num_hidden_layers=4,
            sliding_window=8,
            layer_types=_FOUR_SLIDING_FULL,
            logit_scale=1.0,
        ),
        notes="full layers have no position embedding",
    ),
    # Attention modules of their own, and key and value heads of different size.
    Architecture(
        "falcon-new",
        _small(
            "falcon",
            head_dim=_ABSENT,
            num_key_value_heads=_ABSENT,
            num_kv_heads=2,
            new_decoder_architecture=True,
            alibi=False,
        ),
        notes="caches one key-value head per query head; never calls the registered attention function",
    ),
    Architecture(
        "falcon-multi-query",
        _small("falcon", head_dim=_ABSENT, num_key_value_heads=_ABSENT, multi_query=True, alibi=False),
        notes="one key-value head; never calls the registered attention function",
    ),
    Architecture(
        "falcon-alibi",
        _small("falcon", head_dim=_ABSENT, num_key_value_heads=_ABSENT, multi_query=True, alibi=True),
        notes="linear position biases inside the module: to be refused",
    ),
    Architecture(
        "deepseek-v3",
        _small("deepseek_v3", n_group=2, topk_group=1, **_MLA),
        notes="caches one latent head (24) and one rotary head (8); attends with key heads of 24, value heads of 12",
    ),
    Architecture(
        "qwen3-next",
        _small(
            "qwen3_next",
            num_hidden_layers=4,
            layer_types=["linear_attention", "full_attention", "linear_attention", "full_attention"],
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
            decoder_sparse_step=1,
            **_GATED_DELTA,
        ),
        notes="gated delta-rule layers between full layers",
    ),
    # Further ones.
    Architecture("gemma", _small("gemma"), group="extra"),
    Architecture("olmo", _small("olmo", head_dim=_ABSENT), group="extra"),
    Architecture("cohere", _small("cohere", head_dim=_ABSENT, logit_scale=1.0), group="extra"),
    Architecture("olmoe", _small("olmoe", head_dim=_ABSENT, num_experts=4, num_experts_per_tok=2), group="extra"),
    Architecture(
        "olmo3",
        _small("olmo3", head_dim=_ABSENT, num_hidden_layers=4, sliding_window=8, layer_types=_FOUR_SLIDING_FULL),
        group="extra",
    ),
    Architecture("starcoder2", _small("starcoder2", head_dim=_ABSENT, sliding_window=None), group="extra"),
    Architecture("nemotron", _small("nemotron", head_dim=_ABSENT), group="extra"),
    Architecture("phi", _small("phi", head_dim=_ABSENT), group="extra", notes="partial rotary"),
    Architecture(
        "phimoe",
        _small("phimoe", head_dim=_ABSENT, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
        group="extra",
        notes="mixture of experts",
    ),
    Architecture("ernie4-5", _small("ernie4_5"), group="extra"),
    Architecture("hunyuan", _small("hunyuan_v1_dense"), group="extra"),
    Architecture("seed-oss", _small("seed_oss"), group="extra"),
    Architecture("apertus", _small("apertus", head_dim=_ABSENT), group="extra"),
    Architecture(
        "exaone4",
        _small("exaone4", head_dim=_ABSENT, num_hidden_layers=4, sliding_window=8, layer_types=_FOUR_SLIDING_FULL),
        group="extra",
        notes="full layers have no position embedding",
    ),
    Architecture(
        "glm4-moe",
        _small(
            "glm4_moe",
            use_qk_norm=True,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_shared_experts=1,
            moe_intermediate_size=32,
            first_k_dense_replace=1,
        ),
        group="extra",
        notes="mixture of experts, partial rotary",
    ),
    Architecture(
        "deepseek-v2",
        _small("deepseek_v2", **_MLA),
        group="extra",
        notes="caches one latent head (24) and one rotary head (8); attends with key heads of 24, value heads of 12",
    ),
    Architecture(
        "llama4",
        _small(
            "llama4_text",
            num_hidden_layers=4,
            intermediate_size_mlp=96,
            num_local_experts=4,
            num_experts_per_tok=1,
            attention_chunk_size=8,
            layer_types=["chunked_attention", "full_attention", "chunked_attention", "full_attention"],
            no_rope_layers=[1, 0, 1, 0],
            moe_layers=[1, 3],
        ),
        group="extra",
        notes="chunked layers; full layers have no position embedding and scale queries by position",
    ),
    Architecture(
        "gemma3n",
        _small(
            "gemma3n_text",
            num_hidden_layers=5,
            num_kv_shared_layers=2,
            sliding_window=8,
            layer_types=[
                "sliding_attention",
                "sliding_attention",
                "full_attention",
                "sliding_attention",
                "full_attention",
            ],
            intermediate_size=[96] * 5,
            activation_sparsity_pattern=[0.0] * 5,
            hidden_size_per_layer_input=16,
            vocab_size_per_layer_input=VOCAB_SIZE,
            laurel_rank=8,
            altup_num_inputs=2,
            final_logit_softcapping=30.0,
        ),
        group="extra",
        notes="the last layers read the keys and values of earlier ones",
    ),
    Architecture(
        "gemma4",
        _small(
            "gemma4_text",
            num_hidden_layers=5,
            num_kv_shared_layers=2,
            sliding_window=8,
            layer_types=[
                "sliding_attention",
                "sliding_attention",
                "full_attention",
                "sliding_attention",
                "full_attention",
            ],
            global_head_dim=32,
            hidden_size_per_layer_input=16,
            vocab_size_per_layer_input=VOCAB_SIZE,
        ),
        group="extra",
        notes="the last layers read the keys and values of earlier ones; full layers have larger heads",
    ),
    Architecture(
        "gpt2",
        dict(
            model_type="gpt2",
            vocab_size=VOCAB_SIZE,
            n_positions=512,
            n_embd=64,
            n_layer=3,
            n_head=4,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=PAD_TOKEN_ID,
        ),
        group="extra",
        notes="multi-head, learned positions",
    ),
    Architecture(
        "opt",
        _small(
            "opt",
            head_dim=_ABSENT,
            num_key_value_heads=_ABSENT,
            intermediate_size=_ABSENT,
            ffn_dim=96,
            word_embed_proj_dim=64,
        ),
        group="extra",
        notes="multi-head, learned positions",
    ),
    Architecture(
        "gpt-bigcode",
        dict(
            model_type="gpt_bigcode",
            vocab_size=VOCAB_SIZE,
            n_positions=512,
            n_embd=64,
            n_layer=3,
            n_head=4,
            multi_query=True,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=PAD_TOKEN_ID,
        ),
        group="extra",
        notes="one key-value head",
    ),
    Architecture(
        "bloom",
        dict(
            model_type="bloom",
            vocab_size=VOCAB_SIZE,
            hidden_size=64,
            n_layer=3,
            n_head=4,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=PAD_TOKEN_ID,
        ),
        group="extra",
        notes="linear position biases inside the module: to be refused",
        implementations=("eager",),
    ),
    Architecture(
        "mpt",
        dict(
            model_type="mpt",
            vocab_size=VOCAB_SIZE,
            d_model=64,
            n_layers=3,
            n_heads=4,
            expansion_ratio=2,
            max_seq_len=512,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=PAD_TOKEN_ID,
        ),
        group="extra",
        notes="linear position biases inside the module: to be refused",
        implementations=("eager",),
    ),
    Architecture(
        "gptj",
        dict(
            model_type="gptj",
            vocab_size=VOCAB_SIZE,
            n_positions=512,
            n_embd=64,
            n_layer=3,
            n_head=4,
            rotary_dim=8,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=PAD_TOKEN_ID,
        ),
        group="extra",
        notes="attention inside the module: to be refused",
        implementations=("eager",),
    ),
    Architecture(
        "mamba2",
        dict(
            model_type="mamba2",
            vocab_size=VOCAB_SIZE,
            hidden_size=64,
            num_hidden_layers=3,
            num_heads=8,
            head_dim=16,
            n_groups=1,
            state_size=8,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=PAD_TOKEN_ID,
        ),
        group="extra",
        notes="no attention at all: to be refused",
        implementations=("eager",),
    ),
    Architecture(
        "jamba",
        _small(
            "jamba",
            head_dim=_ABSENT,
            num_hidden_layers=4,
            attn_layer_period=2,
            attn_layer_offset=1,
            num_experts=2,
            num_experts_per_tok=1,
            mamba_d_state=8,
            mamba_dt_rank=8,
            use_mamba_kernels=False,
        ),
        group="extra",
        notes="state-space layers between full layers",
    ),
    Architecture(
        "bamba",
        _small("bamba", head_dim=_ABSENT, num_hidden_layers=4, attn_layer_indices=[1, 3], **_MAMBA2),
        group="extra",
        notes="state-space layers between full layers",
    ),
    Architecture(
        "granite-hybrid",
        _small(
            "granitemoehybrid",
            head_dim=_ABSENT,
            num_hidden_layers=4,
            layer_types=["mamba", "attention", "mamba", "attention"],
            shared_intermediate_size=96,
            num_local_experts=2,
            num_experts_per_tok=1,
            **_MAMBA2,
        ),
        group="extra",
        notes="state-space layers between full layers",
    ),
    Architecture(
        "falcon-h1",
        _small(
            "falcon_h1",
            mamba_d_ssm=128,
            mamba_n_heads=8,
            mamba_d_head=16,
            mamba_n_groups=1,
            mamba_d_state=8,
            mamba_d_conv=4,
        ),
        group="extra",
        notes="a state-space model and attention side by side in every layer",
    ),
    Architecture(
        "lfm2",
        _small(
            "lfm2",
            head_dim=_ABSENT,
            num_hidden_layers=4,
            layer_types=["conv", "full_attention", "conv", "full_attention"],
            block_auto_adjust_ff_dim=False,
        ),
        group="extra",
        notes="short convolutions between full layers",
    ),
    Architecture(
        "zamba2",
        _small(
            "zamba2",
            head_dim=_ABSENT,
            num_key_value_heads=4,
            num_hidden_layers=4,
            layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
            num_mem_blocks=1,
            mamba_d_state=8,
            mamba_ngroups=1,
            n_mamba_heads=8,
            use_mamba_kernels=False,
        ),
        group="extra",
        notes="attention beside state-space layers, in modules shared by several layers: module.layer_idx is -1",
    ),
    Architecture(
        "qwen3-5",
        _small(
            "qwen3_5_text",
            num_hidden_layers=4,
            layer_types=["linear_attention", "full_attention", "linear_attention", "full_attention"],
            **_GATED_DELTA,
        ),
        group="extra",
        notes="gated delta-rule layers between full layers",
    ),
    Architecture(
        "minimax",
        _small(
            "minimax",
            num_hidden_layers=4,
            layer_types=["linear_attention", "full_attention", "linear_attention", "full_attention"],
            num_local_experts=2,
            num_experts_per_tok=1,
            block_size=16,
        ),
        group="extra",
        notes="a cache class of its own: to be refused",
        padding=False,
    ),
]

ARCHITECTURES: dict[str, Architecture] = {architecture.name: architecture for architecture in _TABLE}


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """Builds the named model with weights that depend only on `seed`; leaves torch's global generator as it was.

    Raises KeyError for a name that is not in `ARCHITECTURES`.
    """
    config = ARCHITECTURES[name].make_config()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _enliven(model)
    generation = model.generation_config
    generation.bos_token_id = generation.eos_token_id = None
    generation.pad_token_id = PAD_TOKEN_ID
    return model.eval()


# Names within a module's path, by what the module does to attention.
_QUERY_KEY = {"q_proj", "k_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "q_b_proj", "kv_b_proj"}
_QUERY_KEY_NORM = {"q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_layernorm", "key_layernorm"}
_OUTPUT = {"o_proj", "dense", "out_proj"}


@torch.no_grad()
def _enliven(model: PreTrainedModel) -> None:
    """Redraws the weights of `model` in place: unit-scale activations, attention scores with a spread of about two.

    Attention outputs are amplified, since averaging over many values shrinks them and the context would hardly count.
    The output embedding leans away from the input embedding, since a model that favours the last token repeats it.
    """
    for path, module in model.named_modules():
        names = set(path.split("."))
        if isinstance(module, torch.nn.Embedding):
            module.weight.normal_()
        elif isinstance(module, torch.nn.Linear | Conv1D):
            fan_in = module.weight.shape[0 if isinstance(module, Conv1D) else 1]
            gain = 1.5 if names & _QUERY_KEY else 2.0 if names & _OUTPUT else 1.0
            module.weight.normal_(std=gain * fan_in**-0.5)
            if module.bias is not None:
                module.bias.normal_(std=0.1)
        elif names & _QUERY_KEY_NORM and getattr(module, "weight", None) is not None:
            module.weight.add_(0.5)
    for path, parameter in model.named_parameters():
        if path.endswith("sinks"):
            parameter.normal_()
        elif (parameter.ndim == 3 and "experts" in path) or path.endswith(("router.weight", "gate.weight")):
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or not isinstance(embedding, torch.nn.Embedding):
        return
    if head.weight is not embedding.weight and head.weight.shape == embedding.weight.shape:
        head.weight.sub_(embedding.weight * head.weight.shape[1] ** -0.5)
