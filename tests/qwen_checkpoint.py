"""Qwen v1 checkpoints in the released on-disk format, float and GPTQ, written from their description: tiny random ones,
and those of a real model of another family.
"""

import base64
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from quantcache.adapters.qwen.tokenization import SPECIAL_TOKENS, _unspelled

HIDDEN, HEADS, LAYERS, WIDTH, SEQ_LENGTH, VOCAB = 32, 2, 2, 24, 16, 512
TINY_VOCABULARY = [*(bytes([byte]) for byte in range(256)), b"he", b"hel"]
RANKS = len(TINY_VOCABULARY)
"""Tokens of the tiny vocabulary; the special tokens follow."""

GROUP_SIZE = 16
LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")


def float_weights(seed: int = 1) -> dict[str, Tensor]:
    """Every tensor of the model under its released name, float32."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    weights = {"transformer.wte.weight": rand(VOCAB, HIDDEN), "lm_head.weight": rand(VOCAB, HIDDEN)}
    weights["transformer.ln_f.weight"] = 1 + rand(HIDDEN)
    for layer in range(LAYERS):
        at = f"transformer.h.{layer}."
        weights |= {
            at + "ln_1.weight": 1 + rand(HIDDEN),
            at + "ln_2.weight": 1 + rand(HIDDEN),
            at + "attn.c_attn.weight": rand(3 * HIDDEN, HIDDEN),
            at + "attn.c_attn.bias": rand(3 * HIDDEN),
            at + "attn.c_proj.weight": rand(HIDDEN, HIDDEN),
            at + "mlp.w1.weight": rand(WIDTH, HIDDEN),
            at + "mlp.w2.weight": rand(WIDTH, HIDDEN),
            at + "mlp.c_proj.weight": rand(HIDDEN, WIDTH),
        }
    return weights


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Integers (words * 32 / bits, columns) as int32 (words, columns), the first in the lowest bits."""
    per_word = 32 // bits
    words = torch.zeros(codes.shape[0] // per_word, codes.shape[1], dtype=torch.int64)
    for place in range(per_word):
        words |= codes[place::per_word].long() << (bits * place)
    return (words - ((words >> 31) << 32)).to(torch.int32)


def pack_linear(
    weight: Tensor, bits: int = 4, group_size: int = GROUP_SIZE, symmetric: bool = True, g_idx: Tensor | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """The GPTQ buffers of a linear layer's ``weight`` (out, in), rounded to nearest, and the weight they stand for."""
    inputs = weight.shape[1]
    if g_idx is None:
        g_idx = torch.arange(inputs) // group_size
    groups, top = int(g_idx.max()) + 1, 2**bits - 1
    columns = weight.T
    scales, zeros = [], []
    for group in range(groups):
        member = columns[g_idx == group]
        low, high = member.amin(0).clamp(max=0), member.amax(0).clamp(min=0)
        spread = 2 * torch.maximum(-low, high) if symmetric else high - low
        scale = (spread / top).to(torch.float16)
        scales.append(scale)
        middle = torch.full_like(scale, (top + 1) // 2, dtype=torch.float32)
        zeros.append(middle if symmetric else (-low / scale.float()).round().clamp(1, top))
    scale, zero = torch.stack(scales), torch.stack(zeros)
    codes = (columns / scale.float()[g_idx] + zero[g_idx]).round().clamp(0, top)
    buffers = {
        "qweight": pack_words(codes, bits),
        "qzeros": pack_words((zero - 1).T.contiguous(), bits).T.contiguous(),
        "scales": scale,
        "g_idx": g_idx.to(torch.int32),
    }
    return buffers, ((codes - zero[g_idx]) * scale.float()[g_idx]).T.contiguous()


def gptq_weights(
    weights: dict[str, Tensor], group_size: int = GROUP_SIZE, symmetric: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Checkpoint tensors with the layers' linears packed, and the float model that they stand for."""
    packed, restored = {}, {}
    for name, tensor in weights.items():
        stem = name.removesuffix(".weight")
        if not stem.endswith(LINEARS):
            if not name.endswith("c_attn.bias"):
                packed[name] = restored[name] = tensor.half().float()
                packed[name] = packed[name].half()
            continue
        buffers, restored[name] = pack_linear(tensor, group_size=group_size, symmetric=symmetric)
        packed |= {f"{stem}.{part}": buffer for part, buffer in buffers.items()}
        bias = weights.get(f"{stem}.bias", torch.zeros(tensor.shape[0])).half()  # zeros where the model has none
        packed[f"{stem}.bias"] = bias
        if f"{stem}.bias" in weights:
            restored[f"{stem}.bias"] = bias.float()
    return packed, restored


def write_checkpoint(
    path: Path,
    weights: dict[str, Tensor] | None = None,
    gptq: bool = False,
    vocabulary: list[bytes] = TINY_VOCABULARY,
    group_size: int = GROUP_SIZE,
    **config: object,
) -> Path:
    """A folder as released: names, config keys, auto_map and tokenizer file."""
    path.mkdir(exist_ok=True)
    save_file(float_weights() if weights is None else weights, path / "model.safetensors", {"format": "pt"})
    quantization = {
        "bits": 4,
        "group_size": group_size,
        "damp_percent": 0.01,
        "desc_act": False,
        "sym": True,
        "true_sequential": True,
        "model_name_or_path": None,
        "model_file_base_name": "model",
        "quant_method": "gptq",
    }
    described = {
        "architectures": ["QWenLMHeadModel"],
        "auto_map": {
            "AutoConfig": "configuration_qwen.QWenConfig",
            "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        },
        "model_type": "qwen",
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "kv_channels": HIDDEN // HEADS,
        "intermediate_size": 2 * WIDTH,
        "seq_length": SEQ_LENGTH,
        "vocab_size": VOCAB,
        "use_flash_attn": "auto",
        "tokenizer_class": "QWenTokenizer",
        **({"fp16": True, "quantization_config": quantization} if gptq else {}),
        **config,
    }
    (path / "config.json").write_text(json.dumps(described))
    tokenizer = {
        "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
        "tokenizer_class": "QWenTokenizer",
        "model_max_length": 8192,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(vocabulary)]
    (path / "qwen.tiktoken").write_bytes(b"\n".join(lines))
    generation = {
        "chat_format": "chatml",
        "eos_token_id": len(vocabulary),
        "pad_token_id": len(vocabulary),
        "max_new_tokens": 12,
        "max_window_size": 6144,
    }
    (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def write_int4_of(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path) -> Path:
    """A Llama model that knows ChatML, in float32, as Qwen v1's Int4: the same function but for the rounding.

    Qwen v1 has as many key and value heads as query heads, a bias where Llama has none, a head of its own, and its
    special tokens behind the others. So small a model wants zero points and groups of 32; the released ones have 128.
    """
    config, state = model.config, model.state_dict()
    special = {str(added): index for index, added in tokenizer.added_tokens_decoder.items()}
    tokens = [token for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer))) if token not in special]
    others = [name for name in special if name not in SPECIAL_TOKENS]  # <repo_name> and the like, in no conversation
    last = [name if name in special else others[0] for name in SPECIAL_TOKENS]
    order = tokenizer.convert_tokens_to_ids([*tokens, *last])
    repeats = config.num_attention_heads // config.num_key_value_heads
    weights = {
        "transformer.wte.weight": state["model.embed_tokens.weight"][order],
        "lm_head.weight": state["lm_head.weight"][order],
        "transformer.ln_f.weight": state["model.norm.weight"],
    }
    for layer in range(config.num_hidden_layers):
        old, new = f"model.layers.{layer}.", f"transformer.h.{layer}."
        query, key, value = (state[f"{old}self_attn.{name}_proj.weight"] for name in "qkv")
        key, value = (
            states.view(config.num_key_value_heads, -1, config.hidden_size).repeat_interleave(repeats, 0).flatten(0, 1)
            for states in (key, value)
        )
        fused = torch.cat([query, key, value])
        weights |= {
            new + "ln_1.weight": state[old + "input_layernorm.weight"],
            new + "ln_2.weight": state[old + "post_attention_layernorm.weight"],
            new + "attn.c_attn.weight": fused,
            new + "attn.c_attn.bias": torch.zeros(len(fused)),
            new + "attn.c_proj.weight": state[old + "self_attn.o_proj.weight"],
            new + "mlp.w1.weight": state[old + "mlp.up_proj.weight"],
            new + "mlp.w2.weight": state[old + "mlp.gate_proj.weight"],
            new + "mlp.c_proj.weight": state[old + "mlp.down_proj.weight"],
        }
    return write_checkpoint(
        path,
        gptq_weights(weights, group_size=32, symmetric=False)[0],
        gptq=True,
        vocabulary=[_unspelled(token) for token in tokens],
        group_size=32,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_hidden_layers=config.num_hidden_layers,
        kv_channels=config.head_dim,
        intermediate_size=2 * config.intermediate_size,
        layer_norm_epsilon=config.rms_norm_eps,
        rotary_emb_base=config.rope_parameters["rope_theta"],
        seq_length=config.max_position_embeddings,
        vocab_size=len(order),
        fp16=False,  # a processor without units for it takes ten times as long
        fp32=True,
    )
