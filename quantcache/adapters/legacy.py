"""The tuples of Qwen v1's original code, to and from ``QuantizedInt8Cache``."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quantcache.cache import QuantizedInt8Cache
from quantcache.store.tensor import Int8Tensor

_PLACE = "legacy.from_legacy"


def quantize_cache_v(fdata: Tensor, bits: int = 8, qmax: int = 255, qmin: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The original's rule, for comparisons: one range per (batch, head) over all tokens of the call, truncation.

    A constant block gives scale 0 and NaN, as it did there.

    Args:
        fdata: (batch, num_kv_heads, seq_len, head_dim), floating point; arithmetic is done in its dtype.
        bits: ignored, as it was.
        qmax: highest code.
        qmin: lowest code.

    Returns:
        Codes uint8 of ``fdata``'s shape; scale and zero point (batch, num_kv_heads, seq_len, 1) in its dtype.
    """
    highest = fdata.amax((-2, -1), keepdim=True)
    lowest = fdata.amin((-2, -1), keepdim=True)
    scale = (highest - lowest) / (qmax - qmin)
    zero_point = qmin - lowest / scale
    codes = torch.clamp(fdata / scale + zero_point, qmin, qmax).to(torch.uint8)
    per_token = (*fdata.shape[:3], 1)
    return codes, scale.expand(per_token).contiguous(), zero_point.expand(per_token).contiguous()


def dequantize_cache_torch(qdata: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """``scale * (qdata - zero_point)`` in the dtype of ``scale``; shapes as ``quantize_cache_v`` returns them."""
    return scale * (qdata - zero_point)


def _restore_legacy(states: Any, name: str, layer_idx: int) -> Tensor:
    """One key or value entry as (batch, num_kv_heads, seq_len, head_dim), or the error that says what is wrong."""
    place = f"{_PLACE}: layer {layer_idx}: {name}"
    if isinstance(states, Tensor):
        if states.dim() != 4 or not states.is_floating_point():
            raise ValueError(
                f"{place} must be floating point (batch, seq_len, num_heads, head_dim), "
                f"got {states.dtype} {tuple(states.shape)}."
            )
        return states.transpose(1, 2)
    if not isinstance(states, (tuple, list)) or len(states) != 3 or not all(isinstance(x, Tensor) for x in states):
        raise TypeError(f"{place} must be a tensor or (uint8, scale, zero_point), got {type(states).__name__}.")
    qdata, scale, zero_point = states
    if qdata.dtype != torch.uint8 or qdata.dim() != 4:
        raise ValueError(
            f"{place} must be uint8 (batch, num_heads, seq_len, head_dim), got {qdata.dtype} {tuple(qdata.shape)}."
        )
    for word, tensor in (("scale", scale), ("zero_point", zero_point)):
        if tuple(tensor.shape) != (*qdata.shape[:3], 1) or not tensor.is_floating_point():
            raise ValueError(
                f"{place} {word} must be floating point {(*qdata.shape[:3], 1)}, "
                f"got {tensor.dtype} {tuple(tensor.shape)}."
            )
    return dequantize_cache_torch(qdata, scale, zero_point)


def restored_layers(past_key_values: Sequence[Any], config: Any = None) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of the original's ``past_key_values``, each (batch, num_kv_heads, seq_len, head_dim).

    Args:
        past_key_values: see ``from_legacy``.
        config: the model's, to check the number of layers and heads against; None checks neither.

    Raises:
        TypeError, ValueError: see ``from_legacy``.
    """
    if not isinstance(past_key_values, (tuple, list)) or not past_key_values:
        raise TypeError(f"{_PLACE}: past_key_values must be a tuple of layers, got {type(past_key_values).__name__}.")
    if config is not None and len(past_key_values) != config.num_hidden_layers:
        raise ValueError(
            f"{_PLACE}: past_key_values must have the {config.num_hidden_layers} layers of the config, "
            f"got {len(past_key_values)}."
        )
    pairs: list[tuple[Tensor, Tensor]] = []
    for layer_idx, layer in enumerate(past_key_values):
        if not isinstance(layer, (tuple, list)) or len(layer) != 2:
            raise TypeError(f"{_PLACE}: layer {layer_idx} must be a pair (key, value), got {type(layer).__name__}.")
        key, value = (_restore_legacy(x, name, layer_idx) for x, name in zip(layer, ("key", "value"), strict=True))
        if config is not None and key.shape[1] != config.num_attention_heads:
            raise ValueError(
                f"{_PLACE}: layer {layer_idx}: key must have the {config.num_attention_heads} heads of the config, "
                f"got {key.shape[1]}. Float tuples are (batch, seq_len, num_heads, head_dim) here; for "
                "(batch, num_heads, seq_len, head_dim) use QuantizedInt8Cache.from_legacy_cache."
            )
        first = pairs[0][0] if pairs else key
        if (key.shape[0], key.shape[2]) != (first.shape[0], first.shape[2]):
            raise ValueError(
                f"{_PLACE}: every layer must have the batch and seq_len of the first, "
                f"{(first.shape[0], first.shape[2])}, got {(key.shape[0], key.shape[2])} in layer {layer_idx}."
            )
        pairs.append((key, value))
    return pairs


def is_quantized(past_key_values: Sequence[Any]) -> bool:
    """Whether any entry of a valid ``past_key_values`` has the quantised form."""
    return any(not isinstance(states, Tensor) for layer in past_key_values for states in layer)


def from_legacy(past_key_values: Sequence[Any], **kwargs: Any) -> QuantizedInt8Cache:
    """A cache filled from the original's ``past_key_values``, float or quantised; each entry says which it is.

    Args:
        past_key_values: a layer's ``(key, value)``: float (batch, seq_len, num_heads, head_dim), or for each of the
            two ``(qdata, scale, zero_point)`` with uint8 (batch, num_heads, seq_len, head_dim) and (..., 1).
        kwargs: for ``QuantizedInt8Cache``; layers and heads are checked against a ``config`` among them.

    Raises:
        TypeError, ValueError: an entry has neither form, or layers do not fit each other or the config; the layer, the
            rule and the value are named.
    """
    return QuantizedInt8Cache.from_legacy_cache(restored_layers(past_key_values, kwargs.get("config")), **kwargs)


def to_legacy(cache: Any, quantized: bool = False) -> tuple[Any, ...]:
    """The original's ``past_key_values`` from a cache whose layers have ``keys`` and ``values``.

    Args:
        cache: a ``QuantizedInt8Cache`` or any transformers cache of full-attention layers.
        quantized: give ``((uint8, scale, zero_point), ...)`` with ``quantize_cache_v`` over each layer's tokens,
            instead of float (batch, seq_len, num_heads, head_dim).

    Raises:
        ValueError: a layer is empty.
    """
    layers: list[Any] = []
    for layer_idx, layer in enumerate(cache.layers):
        if getattr(layer, "keys", None) is None:
            raise ValueError(f"legacy.to_legacy: every layer must hold tokens, got none in layer {layer_idx}.")
        # Restored on purpose, which is no fallback that a strict cache should refuse.
        dense = [x.restore() if isinstance(x, Int8Tensor) else x for x in (layer.keys, layer.values)]
        if quantized:
            layers.append(tuple(map(quantize_cache_v, dense)))
        else:  # each in memory of its own
            layers.append(tuple(x.transpose(1, 2).clone(memory_format=torch.contiguous_format) for x in dense))
    return tuple(layers)
