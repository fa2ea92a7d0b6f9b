"""Decoders that between them turn every option of a model's config."""

from llm_jax import config as config_lib
from tests import helpers

VARIANTS = {
    "gpt2": helpers.GPT2,
    "gpt2_exact_gelu": helpers.GPT2 | {"activation": "gelu"},
    "llama": {},
    "multi_query": {"num_kv_heads": 1},
    "untied": {"tie_embeddings": False},
    "head_dim": {"head_dim": 6, "mlp_dim": 24},
    "qk_norm": {"use_qk_norm": True},
    "window": {"window": 3},
    "attention_softcap": {"attention_softcap": 0.5},
    "logit_softcap": {"logit_softcap": 1.5},
    "partial_rope": {"rope_fraction": 0.5},
    "rope_theta": {"rope_theta": 100.0, "head_dim": 8},
    "rope_linear": {"rope_scaling": "linear", "rope_scaling_factor": 4.0},
    "rope_llama3": {
        "rope_scaling": "llama3",
        "rope_scaling_factor": 8.0,
        "rope_low_freq_factor": 1.5,
        "rope_high_freq_factor": 3.0,
        "rope_original_length": 16,
        "head_dim": 8,
    },
    "rope_yarn": {
        "rope_scaling": "yarn",
        "rope_scaling_factor": 8.0,
        "rope_beta_fast": 2.0,
        "rope_beta_slow": 0.5,
        "rope_original_length": 16,
        "head_dim": 8,
    },
    "rope_interleave": {"rope_interleave": True},
    "latents": helpers.LATENTS,
    "latents_alone": {"num_kv_heads": None, "kv_latent_dim": 6},
    "latents_yarn": helpers.LATENTS
    | {
        "rope_scaling": "yarn",
        "rope_scaling_factor": 4.0,
        "rope_original_length": 16,
        "rope_attention_factor": 0.8,
        "rope_interleave": True,
        "latent_norm_epsilon": 1e-2,
        "norm_offset": True,
    },
    "latents_kernels": helpers.LATENTS | {"attention": "pallas", "attention_softcap": 2.0},
    "latents_local_and_global": helpers.LATENTS
    | {"num_layers": 3, "layer_pattern": "LG", "window": 3, "attention_softcap": 2.0},
    "alibi": {"positions": "alibi", "num_heads": 8},
    "no_positions": {"positions": "none"},
    "post_norm": {"norm_placement": "post", "norm": "layernorm"},
    "sandwich_norm": {"norm_placement": "sandwich", "norm_offset": True},
    "output_norm": {"norm_placement": "output", "use_qk_norm": True, "qk_norm": "projection"},
    "local_and_global": {
        "num_layers": 5,
        "layer_pattern": "LG",
        "window": 3,
        "rope_local_theta": 100.0,
    },
    "local_and_global_unrolled": {
        "num_layers": 3,
        "layer_pattern": "LG",
        "window": 3,
        "scan_layers": False,
    },
    "relative": {"positions": "relative", "relative_buckets": 6, "relative_max_distance": 8},
    "sinusoidal": {"positions": "sinusoidal", "scale_embeddings": True},
    "scaled": {"scale_logits": True, "attention_scale": 1.0},
    "query_biases": {"use_qkv_bias": True},
    "embedding_norm": {"use_embedding_norm": True, "is_entry_normalised": True},
    "head_transform": {"use_head_transform": True, "use_head_bias": True},
    "biases": {"use_bias": True, "norm": "layernorm", "norm_epsilon": 1e-3, "attention": "jax_nn"},
    "chunked": {"attention": "chunked", "attention_chunk": 5},
    "kernels": {"attention": "pallas", "window": 6, "attention_softcap": 2.0},
    "chunked_window_alibi": {
        "attention": "chunked",
        "attention_chunk": 5,
        "window": 3,
        "positions": "alibi",
        "attention_softcap": 0.5,
    },
    "reference": {"attention": "reference"},
    "experts": helpers.EXPERTS,
    "experts_in_a_pattern": {
        "num_layers": 5,
        "layer_pattern": "LG",
        "window": 3,
        "moe": config_lib.MoeConfig(num_experts=4, every=2, normalise_weights=False),
    },
    "hashed_experts": {"moe": config_lib.MoeConfig(num_experts=4, router="hash")},
    "relu_experts": {
        "moe": config_lib.MoeConfig(num_experts=4, router="relu"),
        "scan_layers": False,
    },
    # Of a longer text an expert has more places: with room for all tokens it makes no difference.
    "expert_capacity": {
        "moe": config_lib.MoeConfig(
            num_experts=4, router="gshard", dispatch="capacity", capacity_factor=4.0
        )
    },
    "relu": {"activation": "relu", "is_gated": False},
    "relu_squared": {"activation": "relu_squared", "is_gated": False},
    "unrolled": {"scan_layers": False, "num_layers": 3},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16_params": {"dtype": "bfloat16", "param_dtype": "bfloat16"},
}
