"""Conversion between a cache of int8 layers and transformers' ``DynamicCache``, layer by layer."""

import copy
from typing import Any

from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from quantcache.layers.base import BaseInt8Layer
from quantcache.layers.sliding import Int8SlidingLayer


def filled(empty: Any, native: Any) -> Any:
    """The layer ``empty`` with the contents of ``native``, or a copy of ``native`` where it cannot take them."""
    is_window = type(native) is DynamicSlidingWindowLayer and isinstance(empty, Int8SlidingLayer)
    if not is_window and type(native) is not DynamicLayer:
        return copy.deepcopy(native)
    if native.keys is not None and native.values is not None and native.get_seq_length():
        if is_window:
            empty.fill(native.keys, native.values, native.get_seq_length())
        else:  # all tokens: what a layer of any kind begins with
            empty.update(native.keys, native.values)
    return empty


def dense(layer: Any) -> Any:
    """The layer of a ``DynamicCache`` with what ``layer`` holds, restored; a copy of a layer that is not int8."""
    if not isinstance(layer, BaseInt8Layer):
        return copy.deepcopy(layer)
    made = DynamicSlidingWindowLayer(layer.sliding_window) if isinstance(layer, Int8SlidingLayer) else DynamicLayer()
    if layer.pages is None or layer.pages.is_empty:
        return made
    key_states, value_states = layer.pages.restore()
    made.lazy_initialization(key_states, value_states)
    if isinstance(made, DynamicSlidingWindowLayer):
        newest = slice(-made.sliding_window + 1, None)
        key_states, value_states = key_states[:, :, newest], value_states[:, :, newest]
        made.cumulative_length = layer.get_seq_length()
    made.keys, made.values = key_states.clone(), value_states.clone()
    return made
