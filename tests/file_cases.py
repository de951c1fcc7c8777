"""Caches to be saved: tiny models, filled caches, and a comparison of every stored byte."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from quantcache import QuantizedInt8Cache
from quantcache.files import host_states
from quantcache.layers._host import cache_argument
from quantcache.layers.base import BaseInt8Layer
from tests.strategies import random_states

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def llama(**changes: object) -> PreTrainedModel:
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).eval()


def gemma(**changes: object) -> PreTrainedModel:
    """Two sliding-window layers and two full ones."""
    torch.manual_seed(1)
    config = Gemma3TextConfig(
        **{
            **SIZES,
            "num_hidden_layers": 4,
            "head_dim": 8,
            "sliding_window": 40,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            **changes,
        }
    )
    return Gemma3ForCausalLM(config).eval()


def lfm(**changes: object) -> PreTrainedModel:
    """A layer with a convolution state and one with keys and values."""
    torch.manual_seed(1)
    config = Lfm2Config(**{**SIZES, "layer_types": ["conv", "full_attention"], **changes})
    return Lfm2ForCausalLM(config).eval()


MODELS = {"llama": llama, "gemma": gemma, "lfm": lfm}


def prompt(length: int, batch: int = 1, seed: int = 2) -> Tensor:
    return torch.randint(2, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def read_prompt(model: PreTrainedModel, ids: Tensor, with_config: bool = True) -> QuantizedInt8Cache:
    """A cache that holds ``ids``, fed in two calls."""
    cache = QuantizedInt8Cache(model.config) if with_config else QuantizedInt8Cache()
    first = max(1, ids.shape[1] - 7)
    for chunk in (ids[:, :first], ids[:, first:]):
        if chunk.shape[1]:
            model(chunk, **cache_argument(cache), use_cache=True)
    return cache


def filled_cache(
    tokens: int = 230,
    batch: int = 2,
    heads: int = 3,
    head_dim: int = 8,
    v_head_dim: int = 8,
    layers: int = 2,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> QuantizedInt8Cache:
    """A cache without a model."""
    cache = QuantizedInt8Cache()
    for layer_idx in range(layers):
        key, _ = random_states(batch, heads, tokens, head_dim, seed=layer_idx, dtype=dtype, device=device)
        _, value = random_states(batch, heads, tokens, v_head_dim, seed=100 + layer_idx, dtype=dtype, device=device)
        cache.update(key, value, layer_idx)
    return cache


def stored_tensors(cache: QuantizedInt8Cache) -> dict[str, Tensor]:
    """Every tensor that a cache stores, without slack, by layer and name."""
    found: dict[str, Tensor] = {}
    for layer_idx, layer in enumerate(cache.layers):
        if not isinstance(layer, BaseInt8Layer):
            tensors = host_states.state_of(layer, cache.get_seq_length())
            found.update({f"{layer_idx}.{name}": tensor for name, tensor in tensors.items()})
        elif layer.pages is not None and layer.pages.seq_len:
            view = layer.pages.stored()
            for name in ("key_qdata", "key_metadata", "value_qdata", "value_metadata"):
                parts = [getattr(segment, name) for segment in view.segments]
                if parts:
                    found[f"{layer_idx}.{name}"] = torch.cat(parts)
            found[f"{layer_idx}.key_tail"], found[f"{layer_idx}.value_tail"] = view.key_tail, view.value_tail
    return found


def assert_bit_equal(cache: QuantizedInt8Cache, expected: QuantizedInt8Cache) -> None:
    got, wanted = stored_tensors(cache), stored_tensors(expected)
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(*(t.cpu().contiguous().view(-1).view(torch.uint8) for t in (got[name], tensor))), name


BEYOND = "1e999 without its quotation marks"
"""Stands for a number that JSON knows and a float does not hold."""


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> None:
    """Forge a header: change the table and the description, and give both the right checksum."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    table = json.loads(content[8 : 8 + length])
    description = json.loads(table["__metadata__"]["quantcache"])
    change(table, description)
    path.write_bytes(forged(table, description) + content[8 + length :])


def forged(table: dict[str, Any], description: object) -> bytes:
    if isinstance(description, dict) and "header_xxh3" in description:
        description["header_xxh3"] = "0" * 16
    if isinstance(table.get("__metadata__"), dict) and "quantcache" in table["__metadata__"]:
        text = json.dumps(description, separators=(",", ":"))
        table["__metadata__"]["quantcache"] = text.replace(f'"{BEYOND}"', "1e999")
    header = json.dumps(table, separators=(",", ":")).replace(f'"{BEYOND}"', "1e999").encode()
    header += b" " * (-len(header) % 8)
    digest = xxhash.xxh3_64_hexdigest(header).encode()
    header = header.replace(b'header_xxh3\\":\\"' + b"0" * 16, b'header_xxh3\\":\\"' + digest, 1)
    return struct.pack("<Q", len(header)) + header
