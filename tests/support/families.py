"""Configs of small random models, one a family or variant of one.

What stands behind a `+` in a name tells variants of one model type apart. Families of the same code are left out.
"""

from __future__ import annotations

from typing import Any

VOCABULARY = 256
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128}
HEAD = {**LLAMA, "head_dim": 8}
GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SLIDE = {"sliding_window": 8}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
LINEAR = ["linear_attention", "linear_attention", "full_attention"]
MLA = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
NEO = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_layers": 3,
    "num_heads": 4,
    "max_position_embeddings": 128,
}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "mistral": {**LLAMA, "sliding_window": None},
    "mistral+window": {**LLAMA, **SLIDE},
    "qwen2": LLAMA,
    "qwen2+window": {**LLAMA, **SLIDE, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": HEAD,
    "gemma": HEAD,
    "gemma2": {**HEAD, **SLIDE},
    "gemma3_text": {**HEAD, **SLIDE, "layer_types": MIXED},
    "gpt2": GPT,
    "gpt_neox": {**SMALL, "intermediate_size": 64, "max_position_embeddings": 128},
    "gpt_neo": {**NEO, "attention_types": [[["global"], 3]]},
    "gpt_neo+window": {**NEO, "attention_types": [[["local", "global", "local"], 1]], "window_size": 8},
    "gptj": {**GPT, "rotary_dim": 4},
    "phi": {**LLAMA, "partial_rotary_factor": 0.5},
    "phi3": {**LLAMA, "pad_token_id": 1},
    "opt": {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 128},
    "falcon": {**SMALL, "new_decoder_architecture": False, "multi_query": True, "parallel_attn": True},
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "mpt": {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 128},
    "olmo": LLAMA,
    "olmo2": LLAMA,
    "olmo3": {**LLAMA, **SLIDE, "layer_types": MIXED},
    "olmoe": {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2},
    "glm": {**HEAD},
    "glm4": {**HEAD},
    "glm4_moe": {**HEAD, **ROUTED},
    "exaone4": {**LLAMA, **SLIDE, "sliding_window_pattern": 2, "layer_types": MIXED},
    "gemma4_text": {
        **HEAD,
        **SLIDE,
        "layer_types": MIXED,
        "hidden_size_per_layer_input": 0,
        "global_head_dim": 8,
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": VOCABULARY,
    },
    "gemma4_text+ple": {
        **HEAD,
        **SLIDE,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "hidden_size_per_layer_input": 4,
        "global_head_dim": 8,
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": VOCABULARY,
    },
    "granite": {
        **LLAMA,
        "residual_multiplier": 0.22,
        "embedding_multiplier": 6.0,
        "logits_scaling": 4.0,
        "attention_multiplier": 0.3,
    },
    "granitemoe": {**LLAMA, "residual_multiplier": 0.22, **LOCAL},
    "granitemoeshared": {**LLAMA, "residual_multiplier": 0.22, **LOCAL, "shared_intermediate_size": 16},
    "qwen2_moe": {**LLAMA, **MOE, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**HEAD, **MOE},
    "mixtral": {**LLAMA, **LOCAL},
    "gpt_oss": {**HEAD, **SLIDE, **LOCAL, "layer_types": MIXED},
    "deepseek_v2": {**LLAMA, **MLA, "num_key_value_heads": 4, **ROUTED},
    "deepseek_v3": {**LLAMA, **MLA, "num_key_value_heads": 4, **ROUTED},
    "llama4_text": {
        **HEAD,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 48,
        "attention_chunk_size": 8,
        "interleave_moe_layer_step": 2,
    },
    "gemma3": {
        "text_config": {**HEAD, **SLIDE, "layer_types": MIXED},
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
        "image_token_index": 250,
        "boi_token_index": 251,
        "eoi_token_index": 252,
    },
    "qwen3_next": {**HEAD, **MOE, **DELTA, "shared_expert_intermediate_size": 16, "layer_types": LINEAR},
    "qwen3_5_text": {**HEAD, **DELTA, "layer_types": LINEAR},
    "qwen3_5_moe_text": {**HEAD, **MOE, **DELTA, "shared_expert_intermediate_size": 16, "layer_types": LINEAR},
    "cohere": LLAMA,
    "cohere2": {**LLAMA, **SLIDE, "layer_types": MIXED},
    "starcoder2": {**LLAMA, "sliding_window": None},
    "stablelm": LLAMA,
    "smollm3": {**LLAMA, "no_rope_layers": [1, 0, 1], "pad_token_id": 1},
    "nemotron": LLAMA,
    "helium": HEAD,
    "ministral": {**HEAD, **SLIDE},
    "ministral3": HEAD,
    "seed_oss": HEAD,
    "hunyuan_v1_dense": HEAD,
    "hunyuan_v1_moe": {**HEAD, "num_experts": 4, "moe_topk": 2},
    "ernie4_5": HEAD,
    "ernie4_5_moe": {
        **LLAMA,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 16,
        "moe_layer_start_index": 1,
    },
    "dots1": {**LLAMA, **ROUTED},
    "lfm2": {**LLAMA, "layer_types": ["conv", "full_attention", "conv"], "block_ff_dim": 48},
    "codegen": {**GPT, "rotary_dim": 4},
    "gpt_bigcode": {**GPT, "multi_query": True},
    "persimmon": {**SMALL, "intermediate_size": 64, "max_position_embeddings": 128},
    "xglm": {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "num_layers": 3,
        "attention_heads": 4,
        "ffn_dim": 48,
        "max_position_embeddings": 128,
    },
    "biogpt": {**SMALL, "intermediate_size": 48, "max_position_embeddings": 128},
    "apertus": LLAMA,
    "arcee": LLAMA,
    "bitnet": LLAMA,
    "diffllama": LLAMA,
    "jetmoe": {**LLAMA, **LOCAL, "kv_channels": 8, "num_key_value_heads": 2},
    "jamba": {
        **LLAMA,
        "num_experts": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "use_mamba_kernels": False,
    },
    "bamba": {**LLAMA, **MAMBA, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        **LLAMA,
        "layer_types": ["mamba", "attention", "mamba"],
        **LOCAL,
        "shared_intermediate_size": 16,
        **MAMBA,
    },
    "falcon_h1": {
        **HEAD,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
    },
    "minimax": {**HEAD, **LOCAL, "layer_types": LINEAR},
    "olmo_hybrid": {**LLAMA, **DELTA, "layer_types": LINEAR},
    "minicpm3": {**LLAMA, **MLA, "num_key_value_heads": 4},
    "dbrx": {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 128,
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000},
    },
    "nanochat": LLAMA,
    "vaultgemma": {**HEAD, **SLIDE, "layer_types": MIXED},
    "exaone_moe": {**HEAD, **SLIDE, "layer_types": MIXED, **MOE, "first_k_dense_replace": 1},
    "phimoe": {**LLAMA, **LOCAL},
    "flex_olmo": {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2},
    "mamba": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 4},
    "modernbert-decoder": {**SMALL, "intermediate_size": 48, "max_position_embeddings": 128},
    "cwm": {**HEAD, **SLIDE, "layer_types": MIXED},
    "doge": LLAMA,
}

REFUSED: dict[str, dict[str, Any]] = {
    "bert": {**SMALL, "intermediate_size": 48, "is_decoder": True},  # a norm behind each half
    "minimax": CONFIGS.pop("minimax"),  # each half reads and adds to a normed stream
}
"""Families whose blocks do not add their halves to a residual stream."""

ATTENTION = (
    *("bloom", "cohere", "falcon", "gemma", "gemma2", "gemma3", "gemma3_text", "glm", "glm4", "gpt2", "gpt_neo"),
    *("gpt_neox", "gptj", "granite", "llama", "mistral", "mistral+window", "mixtral", "mpt", "olmo2", "olmo3", "opt"),
    *("phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "stablelm", "starcoder2"),
)
"""Families in which heads, queries, keys and values are known in every layer."""
