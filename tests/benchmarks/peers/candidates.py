"""The caches that the benchmarks compare, each made by one call from a model's config."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, QuantizedCache, StaticCache

from quantcache import QuantizedInt8Cache
from quantcache.adapters.legacy import dequantize_cache_torch, quantize_cache_v
from tests.benchmarks.peers.quanto import build_unpack

Rule = Callable[[Tensor], Tensor]
"""What a format makes of new states (batch, num_kv_heads, query_len, head_dim): their restored values."""


class RefusedError(RuntimeError):
    """A cache does not take a model, a device or a package is missing; the message is the reason."""


class QwenRuleLayer(DynamicLayer):
    """The original Qwen's quantised cache in plain torch: uint8, one range for each call and head, no rounding.

    As there, the prompt too attends to what was quantised, and storage grows by ``torch.cat``. Later tokens are
    quantised one by one, as decoding does, also where several come at once.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stored: list[tuple[Tensor, Tensor, Tensor]] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        for count in (1,) * key_states.shape[2] if self.stored else (key_states.shape[2],):
            new = [quantize_cache_v(states[:, :, :count]) for states in (key_states, value_states)]
            key_states, value_states = key_states[:, :, count:], value_states[:, :, count:]
            if self.stored:
                pairs = zip(self.stored, new, strict=True)
                new = [tuple(torch.cat(parts, dim=2) for parts in zip(*pair, strict=True)) for pair in pairs]  # type: ignore[misc]
            self.stored, self.is_initialized = new, True
        keys, values = (dequantize_cache_torch(*parts) for parts in self.stored)
        return keys, values

    def get_seq_length(self) -> int:
        return self.stored[0][0].shape[2] if self.stored else 0


class QwenRuleCache(Cache):
    """A ``QwenRuleLayer`` for each decoder layer."""

    def __init__(self, config: PreTrainedConfig) -> None:
        count = config.get_text_config(decoder=True).num_hidden_layers
        super().__init__(layers=[QwenRuleLayer() for _ in range(count)])


class EmulatedLayer(DynamicLayer):
    """What a format restores, stored as floats: for its quality alone, not for its memory or speed.

    The prompt attends exactly, as in ``QuantizedInt8Cache``.
    """

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        is_prompt = self.get_seq_length() == 0
        read = super().update(self.rule(key_states), self.rule(value_states), *args, **kwargs)
        return (key_states, value_states) if is_prompt else read


class EmulatedCache(Cache):
    """An ``EmulatedLayer`` for each decoder layer."""

    def __init__(self, config: PreTrainedConfig, rule: Rule) -> None:
        count = config.get_text_config(decoder=True).num_hidden_layers
        super().__init__(layers=[EmulatedLayer(rule) for _ in range(count)])


def rounded_to_bfloat16(states: Tensor) -> Tensor:
    return states.bfloat16().to(states.dtype)


def symmetric_per_token(states: Tensor) -> Tensor:
    """int8 with one scale for each token and head."""
    scale = (states.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
    return (states / scale).round() * scale


def asymmetric_per_token(states: Tensor) -> Tensor:
    """int8 with one scale and one offset for each token and head."""
    low, high = states.amin(-1, keepdim=True), states.amax(-1, keepdim=True)
    scale = ((high - low) / 255).clamp_min(1e-30)
    return ((states - low) / scale).round() * scale + low


def groups_of_32(states: Tensor) -> Tensor:
    """int8 with one scale for each 32 channels of a token: the rule of llama.cpp's q8_0."""
    return symmetric_per_token(states.unflatten(-1, (-1, 32))).flatten(-2)


def _quantized(backend: str, package: str | None = None, **options: Any) -> Callable[[PreTrainedConfig, int], Cache]:
    def make(config: PreTrainedConfig, capacity: int) -> Cache:
        if package is not None and find_spec(package.split(".")[0]) is None:
            raise RefusedError(f"{package} is not installed")
        try:
            if backend == "quanto" and torch.cuda.is_available():
                build_unpack()
            return QuantizedCache(backend, config, **options)
        except (ImportError, ValueError, RuntimeError) as error:
            raise RefusedError(str(error).strip().splitlines()[0]) from error

    return make


def _offloaded(config: PreTrainedConfig, capacity: int) -> Cache:
    if not torch.cuda.is_available():
        raise RefusedError("offloading needs an accelerator")
    return DynamicCache(config=config, offloading=True)


INT8, DYNAMIC = "quantcache int8", "DynamicCache"

CACHES: dict[str, Callable[[PreTrainedConfig, int], Cache]] = {
    DYNAMIC: lambda config, capacity: DynamicCache(config=config),
    INT8: lambda config, capacity: QuantizedInt8Cache(config),
    "StaticCache": lambda config, capacity: StaticCache(config=config, max_cache_len=capacity),
    "OffloadedCache": _offloaded,
    "QuantizedCache hqq 8 bit": _quantized("hqq", "hqq", nbits=8, axis_key=1, axis_value=1),
    "QuantizedCache hqq 4 bit": _quantized("hqq", "hqq", nbits=4, axis_key=1, axis_value=1),
    "QuantizedCache quanto 4 bit": _quantized("quanto", "optimum.quanto", nbits=4),
    "QuantizedCache fp8": _quantized("fp8"),
    "original Qwen rule": lambda config, capacity: QwenRuleCache(config),
}
"""Real caches, made from a config and the tokens they must hold."""

EMULATED: dict[str, tuple[Rule, Callable[[int], float]]] = {
    "keys and values rounded to bfloat16": (rounded_to_bfloat16, lambda head_dim: 2.0),
    "int8 a token and head, symmetric": (symmetric_per_token, lambda head_dim: 1 + 2 / head_dim),
    "int8 a token and head, asymmetric": (asymmetric_per_token, lambda head_dim: 1 + 4 / head_dim),
    "int8, groups of 32 channels (q8_0)": (groups_of_32, lambda head_dim: 1 + 2 / 32),
}
"""Formats of which only the rounding is compared, with the bytes that one number would take with 16-bit metadata."""


def held_nbytes(cache: Cache) -> int:
    """Bytes of all memory that the layers of a cache hold on to, in whatever objects; each allocation once."""
    if isinstance(cache, QuantizedInt8Cache):
        return cache.nbytes
    storages: dict[int, int] = {}
    seen: set[int] = set()

    def visit(thing: Any, depth: int = 0) -> None:
        if id(thing) in seen or depth > 8:
            return
        seen.add(id(thing))
        if isinstance(thing, Tensor) and hasattr(thing, "__tensor_flatten__"):
            for name in thing.__tensor_flatten__()[0]:
                visit(getattr(thing, name), depth + 1)
        elif isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, dict):
            for value in thing.values():
                visit(value, depth + 1)
        elif isinstance(thing, (list, tuple)):
            for value in thing:
                visit(value, depth + 1)
        elif type(thing).__module__.split(".")[0] in {"transformers", "hqq", "optimum", "tests", "candidates"}:
            visit(vars(thing) if hasattr(thing, "__dict__") else (), depth + 1)

    visit(list(cache.layers))
    return sum(storages.values())
