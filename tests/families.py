"""Configs of pico models: of the families that every test runs on, and of more, for what must hold
of any."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

LAYERS = 5
VOCABULARY = 200

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Far from the default of 10000, which a consumer that misses it would take
_LLAMA_LIKE = {
    **_COMMON,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
}
_SCALED_ROPE = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 300.0}}
_MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
PICO_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_LIKE,
    "mistral": {**_LLAMA_LIKE, "sliding_window": 8},
    "qwen2": {
        **_LLAMA_LIKE,
        **_SCALED_ROPE,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 2,
    },
    "qwen3": {**_LLAMA_LIKE, "head_dim": 8},
    "phi3": _LLAMA_LIKE,
    "gemma": {**_LLAMA_LIKE, "head_dim": 8},
    "gemma2": {**_LLAMA_LIKE, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {
        **_LLAMA_LIKE,
        **{"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
        "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 300.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "mixtral": {**_LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **_LLAMA_LIKE,
        **_MOE,
        "shared_expert_intermediate_size": 24,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": {**_LLAMA_LIKE, **_MOE, "head_dim": 8, "mlp_only_layers": [3]},
    "opt": {**_COMMON, "ffn_dim": 40, "word_embed_proj_dim": 32},
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": LAYERS,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
_MULTI_HEAD = {**_COMMON, "intermediate_size": 40}
_SPARSE = {**_LLAMA_LIKE, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = {
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
MORE_CONFIGS: dict[str, dict[str, Any]] = {
    "smollm3": {**_LLAMA_LIKE, "no_rope_layers": [1, 0, 1, 1, 0]},
    "granite": {**_LLAMA_LIKE, "residual_multiplier": 0.22, "attention_multiplier": 0.3},
    "granitemoe": {**_LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo2": _LLAMA_LIKE,
    "olmo3": {**_LLAMA_LIKE, "sliding_window": 8, "layer_types": _ALTERNATING},
    "stablelm": {**_LLAMA_LIKE, "partial_rotary_factor": 0.5},
    "starcoder2": {**_LLAMA_LIKE, "sliding_window": 8},
    "cohere": _LLAMA_LIKE,
    "cohere2": {**_LLAMA_LIKE, "sliding_window": 8, "layer_types": _ALTERNATING},
    "phi": {**_LLAMA_LIKE, "partial_rotary_factor": 0.5},
    "gpt_neox": _MULTI_HEAD,
    "falcon": {**_COMMON, "new_decoder_architecture": True, "num_kv_heads": 2},
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": LAYERS, "n_head": 4},
    "mpt": {
        **{"vocab_size": VOCABULARY, "d_model": 32, "n_layers": LAYERS, "n_heads": 4},
        **{"expansion_ratio": 2, "max_seq_len": 64},
    },
    "gpt_bigcode": {
        **{"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": LAYERS, "n_head": 4},
        "n_positions": 64,
    },
    "glm4": {**_LLAMA_LIKE, "head_dim": 8},
    "arcee": _LLAMA_LIKE,
    "seed_oss": {**_LLAMA_LIKE, "head_dim": 8},
    "helium": {**_LLAMA_LIKE, "head_dim": 8},
    "apertus": _LLAMA_LIKE,
    "nemotron": _LLAMA_LIKE,
    "ernie4_5": {**_LLAMA_LIKE, "head_dim": 8},
    "exaone4": {**_LLAMA_LIKE, "sliding_window": 8, "layer_types": _ALTERNATING},
    "deepseek_v2": {
        **{**_SPARSE, **_LATENT, "num_key_value_heads": 4},
        **{"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 2},
    },
    "deepseek_v3": {
        **{**_SPARSE, **_LATENT, "num_key_value_heads": 4},
        **{"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 2},
        **{"n_group": 2, "topk_group": 1},
    },
    "gpt_oss": {
        **{**_LLAMA_LIKE, "head_dim": 8, "sliding_window": 8, "layer_types": _ALTERNATING},
        **{"num_local_experts": 4, "num_experts_per_tok": 2},
    },
    "llama4_text": {
        **{**_LLAMA_LIKE, "head_dim": 8, "intermediate_size_mlp": 40, "attention_chunk_size": 8},
        **{"num_local_experts": 4, "moe_layers": [1, 3], "no_rope_layers": [1, 1, 1, 0, 1]},
    },
}


def config_of(family: str) -> dict[str, Any]:
    """One of these to keep: some families' configs write into what they are given."""
    return deepcopy((PICO_CONFIGS | MORE_CONFIGS)[family])
