"""Tiny random Qwen v1 checkpoints in the released on-disk format, float and GPTQ, written from their description."""

import base64
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, HEADS, LAYERS, WIDTH, SEQ_LENGTH, VOCAB = 32, 2, 2, 24, 16, 512
RANKS = 256 + 2
"""Tokens of the tiny vocabulary: every byte, "he" and "hel"; the special tokens follow."""

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


def gptq_weights(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Checkpoint tensors with the layers' linears packed, and the float model that they stand for."""
    packed, restored = {}, {}
    for name, tensor in weights.items():
        stem = name.removesuffix(".weight")
        if not stem.endswith(LINEARS):
            if not name.endswith("c_attn.bias"):
                packed[name] = restored[name] = tensor.half().float()
                packed[name] = packed[name].half()
            continue
        buffers, restored[name] = pack_linear(tensor)
        packed |= {f"{stem}.{part}": buffer for part, buffer in buffers.items()}
        bias = weights.get(f"{stem}.bias", torch.zeros(tensor.shape[0])).half()  # zeros where the model has none
        packed[f"{stem}.bias"] = bias
        if f"{stem}.bias" in weights:
            restored[f"{stem}.bias"] = bias.float()
    return packed, restored


def write_checkpoint(
    path: Path, weights: dict[str, Tensor] | None = None, gptq: bool = False, **config: object
) -> Path:
    """A folder as released: names, config keys, auto_map and tokenizer file."""
    path.mkdir(exist_ok=True)
    save_file(float_weights() if weights is None else weights, path / "model.safetensors", {"format": "pt"})
    quantization = {
        "bits": 4,
        "group_size": GROUP_SIZE,
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
    tokens = [bytes([byte]) for byte in range(256)] + [b"he", b"hel"]
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]
    (path / "qwen.tiktoken").write_bytes(b"\n".join(lines))
    generation = {
        "chat_format": "chatml",
        "eos_token_id": RANKS,
        "pad_token_id": RANKS,
        "max_new_tokens": 12,
        "max_window_size": 6144,
    }
    (path / "generation_config.json").write_text(json.dumps(generation))
    return path
