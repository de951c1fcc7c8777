"""Every causal model type of transformers as a tiny random model; docs/supported.md says how each takes the cache."""

import dataclasses
from typing import Any, NamedTuple

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

WINDOW = 48
LAYERS = 4
VOCABULARY = 97

SMALL: dict[str, Any] = {
    # size
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "emb_dim", "embedding_size", "input_embedding_size"), 32),
    **dict.fromkeys(("output_embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("depth", "num_mtp_layers", "num_blocks"), 1),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "dim_head", "kv_channels", "attention_head_size"), 8),
    "global_head_dim": 16,
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "laurel_rank"), 16),
    **dict.fromkeys(("intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "dim_ff", "dff"), 48),
    **dict.fromkeys(("n_inner", "d_inner", "intermediate_size_mlp", "ffn_hidden_size", "feed_forward_size"), 48),
    **dict.fromkeys(("shared_intermediate_size", "dense_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_experts_intermediate_size"), 32),
    "moe_shared_expert_intermediate_size": 32,
    "hidden_size_per_layer_input": 8,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions"), 1024),
    **dict.fromkeys(("context_length", "n_ctx"), 1024),
    # windows
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "attention_window_size", "window_size"), WINDOW),
    **dict.fromkeys(("sliding_window_size", "local_attention"), WINDOW),
    "use_sliding_window": True,
    "max_window_layers": 1,
    # all experts take part: choosing some makes a model jump where two are as good, however close its input is
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 4),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    # states other than keys and values
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "linear_key_head_dim"), 8),
    **dict.fromkeys(("linear_value_head_dim", "linear_head_dim", "mamba_head_dim", "mamba_d_head"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_heads"), 2),
    **dict.fromkeys(("linear_num_value_heads", "mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("mamba_dt_rank", "adapter_rank", "router_hidden_size"), 8),
    **dict.fromkeys(("n_groups", "mamba_n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 16),
    "mamba_d_ssm": 32,
    # sparse attention
    **dict.fromkeys(("index_head_dim", "index_n_heads"), 8),
    **dict.fromkeys(("index_topk", "indexer_budget"), 512),  # all keys, as with experts
    **dict.fromkeys(("indexer_n_heads", "indexer_compress_ratio"), 4),
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    # else
    "num_codebooks": 1,
    "initializer_range": 0.1,  # attention far from uniform, logits not yet chaotic
    "init_std": 0.1,
    "is_decoder": True,
    **dict.fromkeys(("bos_token_id", "decoder_start_token_id"), 1),
    "eos_token_id": None,
    "pad_token_id": 0,
    "is_encoder_decoder": False,
}
"""What makes a model tiny, for each config that has an attribute of the name."""


ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
MAMBA_2 = {"mamba_n_heads": 8, "mamba_d_head": 8}
OVERRIDES: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_size": [3], "encoder_hash_byte_group_vocab": 97},
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "bamba": MAMBA_2 | {"attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_top_k": 4},
    },
    "dots3_note": {"vision_config": {"adapter_out_dim": 32}, "audio_config": {"adapter_out_dim": 32}},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "dory": {"n_input_layers": 1, "n_output_layers": 1},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma4_text": {"head_dim": 32, "global_head_dim": 32},  # its attention has no scale
    "gemma4_unified_text": {"head_dim": 32, "global_head_dim": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": MAMBA_2 | {"layer_types": ["mamba", "attention"] * 2},
    "inkling2_loop_text": {"n_layers_per_attn_res_block": 1, "loop_layer_index_start": 1, "loop_layer_index_end": 3},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "rotary_dim": 8,
        "index_n_heads": 2,
        "index_block_size": 16,
        "index_topk_blocks": 32,
    },
    "phimoe": {"num_local_experts": 2, "num_experts_per_tok": 2, "initializer_range": 0.02},  # a swap weighs them anew
    "reformer": {"axial_pos_shape": [32, 32], "axial_pos_embds_dim": [16, 16]},
    "roc_bert": {"pronunciation_embed_dim": 8, "shape_embed_dim": 8, "shape_vocab_size": 97},
    "xlm": {"causal": True},
    "xlstm": {"hidden_size": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1, "num_experts": 2},
}
"""What a model type needs beside ``SMALL``, or in place of it."""


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NO_CONFIG_NEEDED = _names(
    """
    afmoe apertus apertus1p5_text arcee aria_text axk1 bart beam bert bert-generation big_bird bigbird_pegasus
    biogpt bitnet blenderbot blenderbot-small bloom camembert codegen cohere cohere2 cohere2_moe
    cohere_compass_text cpmant ctrl cwm data2vec-text dbrx deepseek_v2 deepseek_v3 diffllama doge dory dots1
    electra emu3 ernie ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe falcon flex_olmo flint fuyu gemma gemma2
    gemma3 gemma3_text gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_text git glm glm4 glm4_moe
    glm4_moe_lite got_ocr2 gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite
    granite_swa granitemoe granitemoe_swa granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3
    hyperclovax internlm3 iquestcoder jais2 jetmoe kolibri1 laguna llama llama4 llama4_text longcat_flash marian
    mbart megatron-bert mellum mimo_v2_flash minicpm3 minimax_m2 ministral ministral3 mistral mixtral mllama
    modernbert-decoder moss_transcribe_diarize mpt musicgen_melody mvp nanochat nemotron olmo olmo2 olmo3 olmoe
    opt pegasus persimmon phi phi3 phi4_multimodal phimoe plbart prophetnet qwen2 qwen2_moe qwen3 qwen3_moe
    rembert roberta roberta-prelayernorm roc_bert roformer sarvam_mla sarvam_moe seed_oss smollm3 solar_open
    stablelm starcoder2 trocr vaultgemma whisper xglm xlm-roberta xlm-roberta-xl xmod youtu
    """
)
"""Model types of attention alone, whose masks hide what is out of a window: a cache without a config suits them."""


class Need(NamedTuple):
    """Why a model type needs a cache that was made from its config.

    Attributes:
        because: for the docs.
        error: what is raised without.
        match: what it says.
    """

    because: str
    error: type[Exception] | tuple[type[Exception], ...]
    match: str


_RECURRENT = Need(
    "layers have a recurrent state, or that of a convolution",
    ValueError,
    r"QuantizedInt8Cache\.get_conv_state: a hybrid model, .*Use QuantizedInt8Cache\(model\.config\)",
)
_INDEXED = Need(
    "layers have an index of their keys",
    ValueError,
    r"QuantizedInt8Cache\.update_indexer: a hybrid model, .*Use QuantizedInt8Cache\(model\.config\)",
)
_LAYERS_OF_ITS_OWN = Need(
    "layers are of the model's own kinds, and it calls them",
    AttributeError,
    r"Int8Layer\.\w+: an int8 layer holds keys and values alone, .*QuantizedInt8Cache\(model\.config\)",
)
_LOOKED_UP = Need(
    "the model looks into the layers before their first tokens",
    IndexError,
    r"QuantizedInt8Cache\.layers: .* got layer 1 of none\. Use QuantizedInt8Cache\(model\.config\)",
)
_FIRST_LAYER_STORES_NOTHING = Need(
    "the first layer stores no tokens in the cache, and positions and masks are taken from it",
    ValueError,
    r"QuantizedInt8Cache\.update: .* got layer 2 in a cache of none\. Use QuantizedInt8Cache\(model\.config\)",
)
_WINDOW_LEFT_TO_CACHE = Need(
    "the model leaves its window to the cache; seen by `generate()`, and not where the model is called itself",
    ValueError,
    r"a moshi model leaves its window of \d+ tokens to the cache, .*Use QuantizedInt8Cache\(model\.config\)",
)

NEEDS_CONFIG: dict[str, Need] = {
    **dict.fromkeys(
        _names(
            """
            bailing_hybrid bamba falcon_h1 falcon_mamba granitemoehybrid inkling2_loop_text
            inkling2_text inkling_text jamba kimi_linear lara_mini lfm2 lfm2_moe lfm3 mamba mamba2
            nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next zamba
            zamba2 zaya
            """
        ),
        _RECURRENT,
    ),
    **dict.fromkeys(("axk2", "deepseek_v32", "dots3_note", "dots3_note_text", "glm_moe_dsa", "hy_v4"), _INDEXED),
    **dict.fromkeys(("deepseek_v4", "minimax_m3_vl_text"), _LAYERS_OF_ITS_OWN),
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text"), _LOOKED_UP),
    "recurrent_gemma": _FIRST_LAYER_STORES_NOTHING,
    "moshi": _WINDOW_LEFT_TO_CACHE,
}
"""Model types that a cache without a config refuses at the first call."""

LEFT_OUT: dict[str, str] = {
    "blt": "transformers makes no cache from its config",
    "gemma3n": "its vision model needs timm; `gemma3n_text` is its language model",
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"), "it reads the states of another model, and stores none"
    ),
    **dict.fromkeys(("minimax", "reformer", "xlstm"), "it takes a cache of its own alone"),
    "musicgen": "its `generate()` begins without the prompt; `musicgen_melody` has the same decoder",
    **dict.fromkeys(("openai-gpt", "rwkv", "xlnet"), "it takes no cache"),
    "xlm": "its `generate()` writes padding, with every cache",
}
"""Model types that cannot be run with ``DynamicCache(config=...)`` to compare with, and why."""

NO_FIXED_CAPACITY: dict[str, str] = {
    "cpmant": "at most max_cache_len=",
    "deepseek_v4": "config must be that of a decoder whose layers transformers can cache",
    "gpt_neo": "max_cache_len needs a model that does not take the number of keys for a position",
    "moshi": "max_cache_len needs a model that masks its window itself",
    **dict.fromkeys(("inkling2_loop_text", "inkling2_text", "inkling_text"), "The size of tensor a"),
    "prophetnet": "the number of sizes provided",
}
"""Model types that a fixed capacity does not suit, transformers' ``StaticCache`` included, and what is said of it."""

OLDER_NO_FIXED_CAPACITY: dict[str, str] = {
    "bloom": "too many values to unpack",
    **dict.fromkeys(("llama4", "llama4_text"), "unexpected keyword argument 'block_sequence_ids'"),
}
"""What is refused besides before transformers 5.23, see ``tests/refusals.py``."""


def small_config(config_class: Any, **overrides: Any) -> Any:
    """A config with every size of ``SMALL`` that it has, sub-configs included, and each kind of layer that it has."""
    names = {field.name for field in dataclasses.fields(config_class)}
    default = config_class()
    arguments = {name: value for name, value in SMALL.items() if name in names}
    if "kv_lora_rank" in names:
        arguments["num_key_value_heads"] = arguments["num_attention_heads"]  # latents are projected for each head
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or ()))
    if "layer_types" in names and len(kinds) > 1:
        arguments["layer_types"] = [kinds[i % len(kinds)] for i in range(max(LAYERS, len(kinds)))]
        arguments["num_hidden_layers"] = len(arguments["layer_types"])
    for name in config_class.sub_configs:
        part = getattr(default, name, None)
        if part is not None and name not in overrides:
            arguments[name] = small_config(type(part), **OVERRIDES.get(part.model_type, {}))
    return config_class(**arguments | overrides)


def make(model_type: str) -> Any:
    """The model that ``AutoModelForCausalLM`` makes, with random weights that are the same each time."""
    config = small_config(CONFIG_MAPPING[model_type], **OVERRIDES.get(model_type, {}))
    torch.manual_seed(1)
    if hasattr(config, "decoder"):
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config.decoder).eval()
        model.generation_config.max_length = 1024
        return model
    return AutoModelForCausalLM.from_config(config).eval()
