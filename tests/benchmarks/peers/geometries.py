"""Model geometries of the peers' suite, at full size and at a size that a CPU measures in minutes."""

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel


@dataclass(frozen=True)
class Geometry:
    """Heads and widths of one model, and the tokens behind which it is measured.

    Attributes:
        name: the model that has this geometry.
        num_q_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: channels of a head.
        num_layers: decoder layers of the model for ``generate()``.
        intermediate_size: width of its MLP.
        batch: sequences.
        tokens: context of each.
    """

    name: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int
    intermediate_size: int
    batch: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.name}, {self.batch} x {self.tokens}"

    def config(self, num_layers: int | None = None) -> LlamaConfig:
        """A Llama of this geometry with a small vocabulary, of as many layers as a question needs."""
        return LlamaConfig(
            vocab_size=1024,
            hidden_size=self.num_q_heads * self.head_dim,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=num_layers or self.num_layers,
            num_attention_heads=self.num_q_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=1 << 18,
            dtype=torch.bfloat16,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )

    def model(self, device: torch.device) -> PreTrainedModel:
        """Random bfloat16 weights, made on the device."""
        torch.set_default_dtype(torch.bfloat16)
        try:
            with device:
                model = LlamaForCausalLM(self.config()).eval()
        finally:
            torch.set_default_dtype(torch.float32)
        model.generation_config.eos_token_id = None
        return model


# config.json of Qwen/Qwen-7B, meta-llama/Llama-3.1-8B, Qwen/Qwen2.5-7B and HuggingFaceTB/SmolLM2-135M on the hub.
FULL = (
    Geometry("Qwen-7B", 32, 32, 128, 32, 11008, 32, 1024),
    Geometry("Qwen-7B", 32, 32, 128, 32, 11008, 1, 8192),
    Geometry("Llama-3.1-8B", 32, 8, 128, 32, 14336, 1, 32768),
    Geometry("Llama-3.1-8B", 32, 8, 128, 32, 14336, 16, 8192),
    Geometry("Qwen2.5-7B", 28, 4, 128, 28, 18944, 16, 8192),
    Geometry("SmolLM2-135M", 9, 3, 64, 30, 1536, 1, 8192),
)
SMALL = (
    Geometry("Qwen-7B, 2 layers", 32, 32, 128, 2, 1024, 1, 1024),
    Geometry("Llama-3.1-8B, 2 layers", 32, 8, 128, 2, 1024, 1, 4096),
    Geometry("Qwen2.5-7B, 2 layers", 28, 4, 128, 2, 1024, 2, 2048),
    Geometry("SmolLM2-135M, 4 layers", 9, 3, 64, 4, 1536, 1, 2048),
)
TINY = (Geometry("tiny", 2, 1, 32, 1, 32, 1, 160),)

SIZES = {"full": FULL, "small": SMALL, "tiny": TINY}
