"""Layers that transformers keeps itself, as tensors for a file, and back.

All that such a layer holds beside tensors follows from their shapes and from the number of tokens in the cache.

Loads no torch by itself.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Spec: TypeAlias = "tuple[torch.dtype, tuple[int, ...]]"
"""Dtype and shape of a tensor."""


class _Kind(NamedTuple):
    """What a class of layers holds: tensors by name with the number of their axes, a window, convolution states."""

    axes: dict[str, int] = {}  # noqa: RUF012 - never written
    has_window: bool = False
    has_states: bool = False


_KEYS_VALUES: Final = {"keys": 4, "values": 4}
_STATES: Final = ("conv_states", "recurrent_states")

KINDS: Final = {
    "DynamicLayer": _Kind(_KEYS_VALUES),
    "DynamicSlidingWindowLayer": _Kind(_KEYS_VALUES, has_window=True),
    "DynamicIndexedLayer": _Kind({**_KEYS_VALUES, "indexer_keys": 3, "indexer_position_ids": 3}),
    "LinearAttentionLayer": _Kind(has_states=True),
    "LinearAttentionAndFullAttentionLayer": _Kind(_KEYS_VALUES, has_states=True),
    "LinearAttentionAndSlidingWindowAttentionLayer": _Kind(_KEYS_VALUES, has_window=True, has_states=True),
    "DummyLayer": _Kind(),
}


class HostLayerError(ValueError):
    """A layer cannot be put into a file, or what a file holds is no state of it; the caller adds the place."""


def state_of(layer: Any, seq_len: int) -> "dict[str, Tensor]":
    """The tensors that a layer of transformers keeps, by name.

    Args:
        layer: of a cache that has been fed.
        seq_len: tokens in the cache.

    Raises:
        HostLayerError: a class of layers that is not known here, or one that holds more than its tensors tell.
    """
    kind = _kind(layer)
    if getattr(layer, "record_past", False):
        raise HostLayerError(f"{_name(layer)} must not keep a past that waits for crop, got record_past=True")
    found = {name: getattr(layer, name, None) for name in kind.axes}  # older releases lack one
    if kind.has_states:
        found.update({f"{name}.{index}": s for name in _STATES for index, s in getattr(layer, name).items()})
    tensors = {name: tensor for name, tensor in found.items() if tensor is not None}
    check_state(layer, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}, seq_len)
    if kind.has_window and layer.cumulative_length != seq_len:
        raise HostLayerError(f"{_name(layer)} must have seen {seq_len} tokens, got {layer.cumulative_length}")
    for index in range(layer.number_of_states if kind.has_states else 0):
        told = layer.has_previous_state[index], layer.conv_kernel_size[index]
        if told != _flags(tensors.get(f"conv_states.{index}")):
            raise HostLayerError(f"{_name(layer)} must hold what its flags say, got {told} for state {index}")
    return tensors


def check_state(layer: Any, stored: "Mapping[str, Spec]", seq_len: int) -> None:
    """Whether a ``layer`` of this class and these options can hold such tensors.

    Args:
        layer: fresh or filled.
        stored: dtype and shape of each tensor, by name.
        seq_len: tokens in the cache.

    Raises:
        HostLayerError: it cannot, and why.
    """
    kind = _kind(layer)
    states = range(layer.number_of_states if kind.has_states else 0)
    for name, (dtype, shape) in stored.items():
        known = name in kind.axes or name in {f"{state}.{index}" for state in _STATES for index in states}
        if not known or not shape or len(shape) != kind.axes.get(name, len(shape)):
            raise HostLayerError(f"{_name(layer)} must hold only what its class holds, got {name} {shape}")
        # Where no tokens are held there is an axis of none; an empty one elsewhere would let the others be of any size.
        if 0 in shape[:2] or 0 in shape[3:]:
            raise HostLayerError(f"{_name(layer)} must hold states without empty axes, got {name} {shape}")
        if dtype.is_floating_point == (name == "indexer_position_ids"):
            raise HostLayerError(f"{_name(layer)} must hold states of a float dtype, got {name} in {dtype}")
    if ("keys" in stored) != ("values" in stored):
        raise HostLayerError(f"{_name(layer)} must hold keys and values or neither, got one of them")
    if "keys" not in stored:
        return
    (key_dtype, key_shape), (value_dtype, value_shape) = stored["keys"], stored["values"]
    if key_dtype != value_dtype or key_shape[:3] != value_shape[:3]:
        raise HostLayerError(f"keys and values of {_name(layer)} must agree, got {stored['keys']}, {stored['values']}")
    held = min(seq_len, layer.sliding_window - 1) if kind.has_window else seq_len
    if key_shape[2] != held:
        raise HostLayerError(f"{_name(layer)} must hold {held} of {seq_len} tokens, got {key_shape[2]}")


def restore_state(layer: Any, tensors: "Mapping[str, Tensor]", seq_len: int) -> None:
    """Put a checked state into the fresh ``layer``.

    Args:
        layer: as the cache of the config makes it.
        tensors: on the layer's device; the layer keeps them.
        seq_len: tokens in the cache.
    """
    kind = _kind(layer)
    if "keys" in tensors:
        layer.lazy_initialization(tensors["keys"], tensors["values"])
    if "indexer_keys" in tensors:
        layer.lazy_initialization_indexer(tensors["indexer_keys"])
    for name in kind.axes.keys() & tensors.keys():
        setattr(layer, name, tensors[name])
    if kind.has_window:
        layer.cumulative_length = seq_len
    for index in range(layer.number_of_states if kind.has_states else 0):
        for name in _STATES:
            state = tensors.get(f"{name}.{index}")
            if state is not None:
                layer.lazy_initialization(**{name: state}, state_idx=index)
                getattr(layer, name)[index].copy_(state)
        layer.has_previous_state[index], layer.conv_kernel_size[index] = _flags(tensors.get(f"conv_states.{index}"))


def batch_axis(name: str) -> int:
    """The axis of a state's tensor along which the sequences lie."""
    return 1 if name == "indexer_position_ids" else 0


def _flags(conv_state: "Tensor | None") -> tuple[bool, int | None]:
    """has_previous_state and conv_kernel_size of a layer with this convolution state."""
    return conv_state is not None, None if conv_state is None else conv_state.shape[-1]


def _kind(layer: Any) -> _Kind:
    from transformers import cache_utils

    kind = KINDS.get(type(layer).__name__)
    if kind is None or type(layer) is not getattr(cache_utils, type(layer).__name__, None):
        raise HostLayerError(f"a layer must be int8 or one of {', '.join(KINDS)}, got {type(layer).__name__}")
    return kind


def _name(layer: Any) -> str:
    return f"a {type(layer).__name__}" + (f" of {window}" if (window := getattr(layer, "sliding_window", 0)) else "")
