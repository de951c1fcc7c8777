"""Tiny random models of every supported architecture: the rows of the matrix and of docs/supported.md."""

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,  # attention far from uniform, logits not yet chaotic
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
# All experts take part: choosing some makes a model jump where two are as good, however close its input is.
MOE: dict[str, Any] = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 4}
ROUTED: dict[str, Any] = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
GPT: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 4096}
LOCAL: dict[str, Any] = {"attention_types": [[["global", "local"], 1]]}
NO_FLEX = ("sdpa", "eager")
OWN_CODE = "its eager attention is no function that transformers could be given another for"
WINDOWED = ["sliding_attention", "full_attention"]


@dataclass(frozen=True)
class Architecture:
    """One row of the matrix.

    Attributes:
        name: as the docs write it.
        model_class: in transformers.
        config: arguments of its config, beside ``SIZES``.
        storage: what each layer of ``QuantizedInt8Cache(config)`` is: "int8", "int8 window" or transformers' layer.
        implementations: attention implementations that the model itself has on a CPU.
        note: what the docs say beside it.
        restores: why int8 is restored even by implementations that could read it, "" where it is not.
        eager: why it is restored by the model's eager attention alone, likewise.
        text_in: name of the sub-config of the text model, which ``config`` then goes into.
        bare: leave ``SIZES`` out.
    """

    name: str
    model_class: str
    storage: tuple[str, ...] = ("int8", "int8")
    config: dict[str, Any] = field(default_factory=dict)
    implementations: tuple[str, ...] = ("sdpa", "eager", "flex_attention")
    note: str = ""
    restores: str = ""
    eager: str = ""
    text_in: str | None = None
    bare: bool = False

    @property
    def is_encoder_decoder(self) -> bool:
        return self.model_class.endswith(("T5ForConditionalGeneration", "WhisperForConditionalGeneration"))

    def make_config(self) -> Any:
        model_class = getattr(transformers, self.model_class)
        arguments = self.config if self.bare else SIZES | self.config
        if self.text_in:
            arguments = {k: v for k, v in arguments.items() if k != self.text_in} | {
                self.text_in: {k: v for k, v in arguments.items() if k not in ("vision_config", "audio_config")}
            }
        return model_class.config_class(**arguments)

    def make(self, implementation: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
        """The model, with random weights that are the same each time."""
        config = self.make_config()
        torch.manual_seed(1)
        model = getattr(transformers, self.model_class)._from_config(config, attn_implementation=implementation)
        return model.to(dtype).eval()


ARCHITECTURES = (
    Architecture("Qwen2", "Qwen2ForCausalLM"),
    Architecture("Qwen2-MoE", "Qwen2MoeForCausalLM", config=MOE | {"shared_expert_intermediate_size": 32}),
    Architecture("Qwen3", "Qwen3ForCausalLM", config={"head_dim": 32}),
    Architecture("Qwen3-MoE", "Qwen3MoeForCausalLM", config=MOE | {"head_dim": 32}),
    Architecture(
        "Qwen3-Next",
        "Qwen3NextForCausalLM",
        ("LinearAttentionLayer", "int8"),
        MOE
        | {
            "head_dim": 32,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "shared_expert_intermediate_size": 32,
        },
        implementations=NO_FLEX,
    ),
    Architecture(
        "Qwen3.5",
        "Qwen3_5ForCausalLM",
        ("LinearAttentionLayer", "int8"),
        {
            "head_dim": 32,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
        implementations=NO_FLEX,
    ),
    Architecture("Llama", "LlamaForCausalLM"),
    Architecture("Mistral, window 4096", "MistralForCausalLM", ("int8 window",) * 2, {"sliding_window": 4096}),
    Architecture(
        "Mistral, window 512", "MistralForCausalLM", ("DynamicSlidingWindowLayer",) * 2, {"sliding_window": 512}
    ),
    Architecture("Mixtral", "MixtralForCausalLM", config={"num_local_experts": 4, "num_experts_per_tok": 4}),
    Architecture(
        "Gemma 2",
        "Gemma2ForCausalLM",
        ("DynamicSlidingWindowLayer", "int8"),
        {"head_dim": 16, "sliding_window": 32, "layer_types": WINDOWED, "query_pre_attn_scalar": 16},
        ("eager", "flex_attention"),
        note="softcap, which transformers' sdpa refuses; with flex_attention on a GPU int8 attention applies it",
    ),
    Architecture(
        "Gemma 3",
        "Gemma3ForCausalLM",
        ("DynamicSlidingWindowLayer", "int8"),
        {"head_dim": 16, "sliding_window": 32, "layer_types": WINDOWED, "query_pre_attn_scalar": 16},
    ),
    Architecture(
        "Gemma 3n",
        "Gemma3nForCausalLM",
        ("DynamicSlidingWindowLayer", "int8", "shared", "shared"),
        {
            "head_dim": 16,
            "num_hidden_layers": 4,
            "intermediate_size": [96] * 4,
            "sliding_window": 32,
            "layer_types": WINDOWED * 2,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": 97,
            "hidden_size_per_layer_input": 8,
            "activation_sparsity_pattern": [0.0] * 4,
            "laurel_rank": 4,
        },
    ),
    Architecture(
        "Gemma 4",
        "Gemma4ForCausalLM",
        ("DynamicSlidingWindowLayer", "int8", "shared", "shared"),
        {
            "initializer_range": 0.05,
            "head_dim": 16,
            "global_head_dim": 32,
            "num_hidden_layers": 4,
            "sliding_window": 32,
            "layer_types": WINDOWED * 2,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": 97,
            "hidden_size_per_layer_input": 8,
        },
    ),
    Architecture("Phi-3", "Phi3ForCausalLM"),
    Architecture(
        "GPT-OSS",
        "GptOssForCausalLM",
        ("DynamicSlidingWindowLayer", "int8"),
        {
            "head_dim": 16,
            "sliding_window": 32,
            "layer_types": WINDOWED,
            "num_local_experts": 4,
            "num_experts_per_tok": 4,
        },
        ("eager",),
        note="sinks, which transformers' sdpa lacks, and its flex_attention on a CPU; int8 attention has them",
    ),
    Architecture("GPT-NeoX", "GPTNeoXForCausalLM"),
    Architecture(
        "Falcon",
        "FalconForCausalLM",
        config={"new_decoder_architecture": True, "num_kv_heads": 2},
        implementations=NO_FLEX,
        eager=OWN_CODE,
    ),
    Architecture(
        "GPT-2",
        "GPT2LMHeadModel",
        config={
            "n_positions": 4096,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "vocab_size": 97,
            "initializer_range": 0.1,
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": 0,
        },
        bare=True,
        implementations=NO_FLEX,
    ),
    Architecture("OPT", "OPTForCausalLM", config={"ffn_dim": 96, "word_embed_proj_dim": 64}),
    Architecture(
        "Cohere 2",
        "Cohere2ForCausalLM",
        ("DynamicSlidingWindowLayer", "int8"),
        {"sliding_window": 32, "layer_types": WINDOWED, "logit_scale": 1.0},
    ),
    Architecture(
        "DeepSeek-V3",
        "DeepseekV3ForCausalLM",
        restores="the model caches latents and projects them before attention",
        config={
            "num_key_value_heads": 4,
            "moe_intermediate_size": 32,
            "n_routed_experts": 8,
            "num_experts_per_tok": 8,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 32,
            "q_lora_rank": 32,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
    ),
    Architecture("GLM-4", "Glm4ForCausalLM", config={"head_dim": 16}),
    Architecture("SmolLM3", "SmolLM3ForCausalLM"),
    Architecture(
        "StableLM",
        "StableLmForCausalLM",
        config={"hidden_size": 320, "initializer_range": 0.05},
        note="head_dim 80",
        implementations=NO_FLEX,
    ),
    Architecture(
        "Qwen2.5-VL",
        "Qwen2_5_VLForConditionalGeneration",
        config={
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": 64,
                "fullatt_block_indexes": [0],
            },
        },
        text_in="text_config",
        implementations=NO_FLEX,
    ),
    Architecture("GLM-4-MoE", "Glm4MoeForCausalLM", config=ROUTED | {"head_dim": 16}),
    Architecture(
        "Llama 4",
        "Llama4ForCausalLM",
        ("DynamicSlidingWindowLayer", "int8"),
        {
            "head_dim": 16,
            "intermediate_size_mlp": 96,
            "attention_chunk_size": 64,
            "layer_types": ["chunked_attention", "full_attention"],
            "num_local_experts": 2,
            "num_experts_per_tok": 2,
        },
        note="chunks of more than 1024 tokens, as in the real models, are int8 too",
    ),
    Architecture("Phi", "PhiForCausalLM"),
    Architecture("Granite", "GraniteForCausalLM"),
    Architecture("OLMo 2", "Olmo2ForCausalLM"),
    Architecture("StarCoder 2", "Starcoder2ForCausalLM"),
    Architecture("Nemotron", "NemotronForCausalLM", config={"initializer_range": 0.05}),
    Architecture("GPT-J", "GPTJForCausalLM", config=GPT | {"rotary_dim": 8}, implementations=("eager",)),
    Architecture(
        "GPT-Neo",
        "GPTNeoForCausalLM",
        config={"num_layers": 2, "num_heads": 4, "window_size": 64} | LOCAL,
        implementations=("eager",),
        eager=OWN_CODE,
    ),
    Architecture("GPT-BigCode", "GPTBigCodeForCausalLM", config=GPT, note="one KV head", implementations=NO_FLEX),
    Architecture(
        "Bloom", "BloomForCausalLM", config={"n_layer": 2, "n_head": 4}, implementations=("eager",), eager=OWN_CODE
    ),
    Architecture(
        "LFM2", "Lfm2ForCausalLM", ("LinearAttentionLayer", "int8"), {"layer_types": ["conv", "full_attention"]}
    ),
    Architecture(
        "Jamba",
        "JambaForCausalLM",
        ("LinearAttentionLayer", "int8"),
        {
            "num_experts": 2,
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 8,
            "use_mamba_kernels": False,
        },
        implementations=NO_FLEX,
    ),
    Architecture(
        "Falcon-H1",
        "FalconH1ForCausalLM",
        ("LinearAttentionAndFullAttentionLayer",) * 2,
        {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_n_groups": 1, "mamba_d_state": 8},
        note="attention and a recurrent state in one layer, which transformers keeps",
        implementations=NO_FLEX,
    ),
    Architecture(
        "T5",
        "T5ForConditionalGeneration",
        config={
            "vocab_size": 97,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 96,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": 0,
        },
        implementations=NO_FLEX,
        note="transformers' flex_attention takes a position bias for one row alone",
        bare=True,
    ),
    Architecture(
        "Whisper",
        "WhisperForConditionalGeneration",
        config={
            "vocab_size": 97,
            "d_model": 64,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 96,
            "max_source_positions": 150,
            "max_target_positions": 448,
            "num_mel_bins": 8,
            "init_std": 0.1,
            "decoder_start_token_id": 1,
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": 0,
            "suppress_tokens": [],
            "begin_suppress_tokens": [],
        },
        bare=True,
    ),
)
