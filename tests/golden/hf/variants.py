"""The models of Hugging Face that goldens are made of: `make` writes them. Plain data, for any Python."""

VOCAB, PAD = 40, 0

_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {"num_key_value_heads": 2}
_FINE_EXPERTS = {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "n_group": 3,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 12,
}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3}
_BERT = {"type_vocab_size": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 8,
    "dropout_rate": 0.0,
    "pad_token_id": PAD,
    "decoder_start_token_id": PAD,
    "eos_token_id": 2,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_GEMMA3_ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}

# Widths of a head differ, as do those of the two latents; layers are dense.
_LATENTS = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 5,
    "first_k_dense_replace": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "beta_fast": 2.0,
    "beta_slow": 0.5,
    "original_max_position_embeddings": 16,
}

# Name: architecture, config class and settings.
VARIANTS = {
    "bert": ("BertForMaskedLM", "BertConfig", _SMALL | _BERT),
    "bert_classifier": (
        "BertForSequenceClassification",
        "BertConfig",
        _SMALL | _BERT | {"num_labels": 3, "classifier_dropout": 0.0},
    ),
    "modernbert": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        _SMALL
        | {
            "num_hidden_layers": 4,
            "global_attn_every_n_layers": 3,
            "local_attention": 4,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
    ),
    "t5_v1_0": (
        "T5ForConditionalGeneration",
        "T5Config",
        _T5 | {"feed_forward_proj": "relu", "tie_word_embeddings": True},
    ),
    "t5_v1_1": (
        "T5ForConditionalGeneration",
        "T5Config",
        _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "marian": (
        "MarianMTModel",
        "MarianConfig",
        {
            "vocab_size": VOCAB,
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 3,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "max_position_embeddings": 64,
            "scale_embedding": True,
            "activation_function": "relu",
            "dropout": 0.0,
            "pad_token_id": PAD,
            "decoder_start_token_id": 1,  # not padding, which its table gives no gradient
            "eos_token_id": 2,
            "forced_eos_token_id": None,
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": VOCAB,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": PAD,
        },
    ),
    "llama2": ("LlamaForCausalLM", "LlamaConfig", _SMALL),
    "llama3": (
        "LlamaForCausalLM",
        "LlamaConfig",
        _SMALL | _GROUPED | {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True},
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", _SMALL | _GROUPED | {"sliding_window": 4}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _SMALL | _GROUPED),
    "qwen3": (
        "Qwen3ForCausalLM",
        "Qwen3Config",
        _SMALL | _GROUPED | {"head_dim": 6, "tie_word_embeddings": True},
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        _SMALL
        | _GROUPED
        | {
            "head_dim": 6,
            "sliding_window": 4,
            "query_pre_attn_scalar": 10,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        _SMALL
        | _GROUPED
        | {
            "num_hidden_layers": 5,
            "head_dim": 6,
            "sliding_window": 4,
            "query_pre_attn_scalar": 10,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "rope_parameters": _GEMMA3_ROPE,
        },
    ),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", _SMALL | _GROUPED),
    "deepseek_v2": (
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        _SMALL
        | _LATENTS
        | {
            "q_lora_rank": None,
            "rope_parameters": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", _SMALL | _LATENTS),
    "deepseek_v3_halves": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        _SMALL | _LATENTS | {"q_lora_rank": None, "rope_interleave": False, "rms_norm_eps": 1e-3},
    ),
    "deepseek_v3_yarn": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        _SMALL | _LATENTS | {"rope_parameters": _YARN | {"mscale": 1.5, "mscale_all_dim": 0.8}},
    ),
    "llama_yarn": ("LlamaForCausalLM", "LlamaConfig", _SMALL | {"rope_parameters": _YARN}),
    "deepseek_v2_experts": (
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        _SMALL
        | _LATENTS
        | _FINE_EXPERTS
        | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5},
    ),
    "deepseek_v3_experts": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        _SMALL | _LATENTS | _FINE_EXPERTS,
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        _SMALL | _GROUPED | {"num_local_experts": 4, "sliding_window": None},
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        _SMALL
        | _GROUPED
        | _EXPERTS
        | {
            "num_hidden_layers": 3,
            "head_dim": 6,
            "moe_intermediate_size": 12,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
        },
    ),
    "qwen3_moe_every_second": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        _SMALL
        | _GROUPED
        | _EXPERTS
        | {
            "num_hidden_layers": 4,
            "moe_intermediate_size": 12,
            "decoder_sparse_step": 2,
        },
    ),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", _SMALL | _GROUPED | _EXPERTS),
}
# A place is a seed: a new variant goes last.
ORDER = (
    *(
        "bert",
        "bert_classifier",
        "gemma2",
        "gemma3",
        "gpt2",
        "llama2",
        "llama3",
        "marian",
        "mistral",
    ),
    *("modernbert", "olmo2", "qwen2", "qwen3", "t5_v1_0", "t5_v1_1", "deepseek_v2", "deepseek_v3"),
    *("deepseek_v3_halves", "deepseek_v3_yarn", "llama_yarn"),
    *("mixtral", "qwen3_moe", "qwen3_moe_every_second", "olmoe"),
    *("deepseek_v2_experts", "deepseek_v3_experts"),
)
WITH_BEAMS = ("gpt2", "llama3", "deepseek_v3", "t5_v1_0", "t5_v1_1", "marian")
ENCODERS = ("bert", "bert_classifier", "modernbert")
ENCODER_DECODERS = ("t5_v1_0", "t5_v1_1", "marian")
