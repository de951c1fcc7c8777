"""Whether tensors are where an operation runs: kernels take their addresses as they are."""

from collections.abc import Iterable

import torch
from torch import Tensor


def check_devices(operation: str, device: torch.device, **tensors: Tensor | None) -> None:
    """Refuse tensors that are on another device than the layer that ``operation`` reads or writes.

    Raises:
        ValueError: it names the first of them, and both devices.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"ops.{operation}: {name} must be on the device of the cached states, {device}, got {tensor.device}."
            )


def check_pages(device: torch.device, segments: Iterable[Iterable[Tensor]]) -> None:
    """Refuse pages that are not where the exact tail is, on ``device``, as the host copies of offloaded ones.

    Raises:
        ValueError: it names both devices.
    """
    for segment in segments:
        for part in segment:
            if part.device != device:
                raise ValueError(
                    f"PagesView: pages and exact tail must be on one device, got {part.device} and {device}."
                )
