"""``QuantizedInt8Cache.to``: the layers of a cache on another device, all of them or none."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quantcache.layers.base import BaseInt8Layer
from quantcache.layers.fixed import StaticInt8Layer

_PLACE = "QuantizedInt8Cache.to"


def checked_device(device: object) -> torch.device:
    """The device, with its index.

    Raises:
        TypeError: something else.
        ValueError: there is none of that name here.
    """
    if isinstance(device, bool) or not isinstance(device, (torch.device, str, int)):
        advice = " A cache keeps the dtype of its model." if isinstance(device, torch.dtype) else ""
        raise TypeError(f"{_PLACE}: device must be a torch.device, its name or its index, got {device!r}.{advice}")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{_PLACE}: device must be one of this machine, got {str(device)!r} ({reason}).") from error


def move(layers: list[Any], device: torch.device) -> None:
    """Move what the layers hold; nothing is changed before all of it is there.

    Raises:
        ValueError: a layer cannot be moved.
    """
    for layer_idx, layer in enumerate(layers):
        if reason := _why_not(layer, device):
            raise ValueError(f"{_PLACE}: layer {layer_idx} {reason}")
    for take in [_moved(layer, device) for layer in layers]:
        take()


def _why_not(layer: Any, device: torch.device) -> str | None:
    held = [tensor.device for tensor in _tensors(layer)]
    if device.type != "meta" and any(place.type == "meta" for place in held):
        return f"must hold numbers to be moved to {device}, got one on the meta device, which has shapes alone."
    is_recorded = isinstance(layer, StaticInt8Layer) and layer.pages is not None and layer.pages.is_recorded
    if is_recorded and any(place != device for place in held):
        return (
            f"must stay on {held[0]}, where a compiled step reads and writes it, got {device}. Use a cache without "
            "max_cache_len, or another cache for each device."
        )
    return None


def _moved(layer: Any, device: torch.device) -> Callable[[], None]:
    """Copies what the layer holds, and gives what puts the copies in place."""
    if isinstance(layer, BaseInt8Layer):
        if layer.pages is None or layer.device == device:
            return lambda: None
        pages = layer.pages.moved(device)
        return lambda: layer.take_over(pages)
    moved = {name: _on(value, device) for name, value in vars(layer).items() if isinstance(value, (Tensor, dict))}
    if isinstance(getattr(layer, "device", None), torch.device):
        moved["device"] = device
    return lambda: vars(layer).update(moved)


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {name: _on(item, device) for name, item in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


def _tensors(layer: Any) -> list[Tensor]:
    """Some that say where the layer is; transformers' layers have tensors or dicts of them as attributes."""
    if isinstance(layer, BaseInt8Layer):
        return [] if layer.pages is None else [layer.pages.key_tail]
    values = [value.values() if isinstance(value, dict) else [value] for value in vars(layer).values()]
    return [item for some in values for item in some if isinstance(item, Tensor)]
