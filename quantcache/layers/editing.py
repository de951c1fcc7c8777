"""Editing what a layer holds: its states in full precision, stored again when the edit ends."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, StaticLayer

from quantcache.layers.base import BaseInt8Layer
from quantcache.store import reads
from quantcache.store.offloading import write_access


@dataclass
class EditedStates:
    """What ``QuantizedInt8Cache.edit`` gives, to be written into or replaced.

    Attributes:
        keys: (batch, num_kv_heads, tokens, head_dim), in memory of their own.
        values: (batch, num_kv_heads, tokens, v_head_dim), likewise.
    """

    keys: Tensor
    values: Tensor


@contextmanager
def edited(layers: list[Any], layer_idx: int) -> Iterator[EditedStates]:
    """``QuantizedInt8Cache.edit``."""
    if not 0 <= layer_idx < len(layers):
        raise IndexError(
            f"QuantizedInt8Cache.edit: layer_idx must be from 0 to {len(layers) - 1}, got {layer_idx}."
            + ("" if layers else " No token is stored yet.")
        )
    layer = layers[layer_idx]
    if not isinstance(layer, (BaseInt8Layer, DynamicLayer, StaticLayer)):
        raise NotImplementedError(
            f"QuantizedInt8Cache.edit: layer {layer_idx} must be one of keys and values, got a {type(layer).__name__}."
        )
    if not _holds_tokens(layer):
        raise ValueError(f"QuantizedInt8Cache.edit: layer {layer_idx} must hold tokens, got an empty layer.")
    is_offloaded = isinstance(layer, BaseInt8Layer) and layer.pages is not None and layer.pages.is_offloaded
    try:
        states = EditedStates(*(held.clone(memory_format=torch.contiguous_format) for held in _held(layer)))
        yield states
        _check(layer, states)
        _store(layer, states.keys.detach(), states.values.detach())
    finally:
        if is_offloaded:
            layer.offload()


def _holds_tokens(layer: Any) -> bool:
    if isinstance(layer, BaseInt8Layer):
        return not layer.is_empty
    return isinstance(layer.keys, Tensor) and bool(layer.get_seq_length())


def _held(layer: Any) -> tuple[Tensor, Tensor]:
    """Keys and values of the layer, restored where they are int8."""
    if isinstance(layer, BaseInt8Layer):
        assert layer.pages is not None
        return reads.restore_both(layer.pages.view())
    return layer.keys, layer.values


def _check(layer: Any, states: EditedStates) -> None:
    """Refuse states that are not those of the tokens that the layer holds."""
    place = "QuantizedInt8Cache.edit"
    held = (layer.keys, layer.values) if _holds_tokens(layer) else (None, None)
    for name, new, old in (("keys", states.keys, held[0]), ("values", states.values, held[1])):
        if not isinstance(new, Tensor):
            raise TypeError(f"{place}: {name} must be a tensor, got {type(new).__name__}.")
        if old is None or new.shape != old.shape:
            shape = "none" if old is None else tuple(old.shape)
            raise ValueError(
                f"{place}: {name} must have the shape of what the layer holds, {shape}, "
                f"got {tuple(new.shape)}. To drop or add tokens use cache.to_dynamic() and "
                "QuantizedInt8Cache.from_dynamic()."
            )
        if new.dtype != old.dtype:
            raise TypeError(f"{place}: {name} must have the dtype the layer holds, {old.dtype}, got {new.dtype}.")
        if new.device != old.device:
            raise ValueError(f"{place}: {name} must be on the layer's device, {old.device}, got {new.device}.")


def _store(layer: Any, key_states: Tensor, value_states: Tensor) -> None:
    if isinstance(layer, BaseInt8Layer):
        assert layer.pages is not None
        layer.pages.replace(key_states, value_states)
    elif isinstance(layer, StaticLayer):  # compiled steps know its addresses
        keys, values = _held(layer)
        with write_access(keys):
            keys.copy_(key_states)
            values.copy_(value_states)
    else:
        layer.keys, layer.values = key_states.clone(), value_states.clone()
