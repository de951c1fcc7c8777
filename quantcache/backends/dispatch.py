"""Which backend runs an operation: what is asked for, what can run here, and what covers the call."""

import functools
import os
import warnings
from typing import Final

import torch
from torch import Tensor

from quantcache.backends import cpu as cpu_backend
from quantcache.backends import cuda as cuda_backend
from quantcache.backends import torch as torch_backend
from quantcache.backends import torch_blocks
from quantcache.backends.blocks import BlockBackend, BlockLayout
from quantcache.backends.cpu import blocks as cpu_blocks
from quantcache.backends.protocol import Backend
from quantcache.quantization.errors import FallbackWarning

BACKEND_VARIABLE: Final = "QUANTCACHE_BACKEND"


BACKENDS: Final[dict[str, Backend]] = {"torch": torch_backend, "cpu": cpu_backend, "cuda": cuda_backend}

BLOCK_BACKENDS: Final[dict[str, BlockBackend]] = {"torch": torch_blocks, "cpu": cpu_blocks, "cuda": cuda_backend}
"""Those that read and write the blocks of a pool."""


def choose_backend(device: torch.device) -> str:
    """Name of the backend that runs the operations on ``device``.

    Args:
        device: where the tensors are. The first question about a CPU builds its kernels, if nothing is forced.

    Raises:
        ValueError: ``QUANTCACHE_BACKEND`` names a backend that does not exist or cannot run here.
    """
    forced = os.environ.get(BACKEND_VARIABLE)
    if not forced:
        return device.type if device.type in ("cpu", "cuda") and _kernels_run(device) else "torch"
    if forced not in BACKENDS:
        raise ValueError(
            f"{BACKEND_VARIABLE}: must be one of {', '.join(BACKENDS)}, got {forced!r}. "
            "Unset it to let quantcache choose."
        )
    if forced != "torch":
        if device.type != forced:
            raise ValueError(
                f"{BACKEND_VARIABLE}: {forced} runs on {forced.upper()} tensors, got tensors on {device}. Unset it."
            )
        if (reason := _unavailable(device)) is not None:
            raise ValueError(f"{BACKEND_VARIABLE}: {forced} cannot run here: {reason}. Unset it, or set it to torch.")
    return forced


def _unavailable(device: torch.device) -> str | None:
    """Why the kernels for ``device``, a CPU or a GPU, cannot run, or None."""
    return cpu_backend.unavailable() if device.type == "cpu" else cuda_backend.unavailable(device)


@functools.cache
def _kernels_run(device: torch.device) -> bool:
    """Whether the kernels for ``device`` can be built and run; if not, says why in one warning for the device."""
    reason = _unavailable(device)
    if reason is not None:
        where = "" if device.type == "cpu" else f" on {device}"
        warnings.warn(
            f"quantcache: int8 attention{where} runs in plain torch, which is slower, because {reason}. "
            f"Set {BACKEND_VARIABLE}=torch to say that this is meant.",
            FallbackWarning,
            stacklevel=2,
        )
    return reason is None


def why_torch(device: torch.device) -> str:
    """Why ``choose_backend`` picks the torch backend for ``device`` where nothing is forced."""
    if device.type not in ("cpu", "cuda"):
        return f"this version has no kernels for {device.type} devices"
    return _unavailable(device) or f"nothing is against the {device.type.upper()} kernels"


def why_chosen(device: torch.device, name: str) -> str:
    """Why ``choose_backend`` picked the backend ``name`` for ``device``."""
    if os.environ.get(BACKEND_VARIABLE):
        return f"{BACKEND_VARIABLE} asks for it"
    return why_torch(device) if name == "torch" else "the fastest there is for this device"


def where_from(device: torch.device, name: str) -> str:
    """Where the kernels come from with which the backend ``name`` serves ``device``; empty if it has none."""
    if name == "torch":
        return ""
    return cpu_backend.where_from() if name == "cpu" else cuda_backend.where_from(device)


def tail_writer(device: torch.device) -> str | None:
    """What writes a few tokens on a CPU, no work for which kernels need be built; elsewhere None: what reads them."""
    return "torch" if device.type == "cpu" else None


def backend_for(*states: Tensor) -> tuple[str, str | None]:
    """Which backend takes operations on ``states``, and why it is not the chosen one, or None if it is.

    Args:
        states: query, keys or values, as many as the operation has; they are on one device.
    """
    name = choose_backend(states[0].device)
    reason = BACKENDS[name].unsupported(*states)
    return ("torch", reason) if reason else (name, None)


def block_backend_for(device: torch.device, layout: BlockLayout) -> tuple[str, str | None]:
    """Which backend reads and writes a pool on ``device``, and why it is not the chosen one, or None if it is."""
    name = choose_backend(device)
    if name not in BLOCK_BACKENDS:
        return "torch", f"this version has no {name.upper()} kernels for blocks"
    reason = BLOCK_BACKENDS[name].unsupported_blocks(layout)
    return ("torch", reason) if reason else (name, None)


def scratch_for(key_states: Tensor, value_states: Tensor) -> Tensor:
    """Memory that recorded steps of layers with such states need besides them; for all layers that run in turn."""
    name, _ = backend_for(key_states, value_states)
    return BACKENDS[name].make_scratch(key_states.device, value_states.shape[-1])


def why_not_recorded(key_states: Tensor, value_states: Tensor) -> str | None:
    """Why a recorded step cannot run with such states, or None: where lengths would be read on the host, it cannot."""
    if not key_states.is_cuda:
        return None
    name, reason = backend_for(key_states, value_states)
    return None if BACKENDS[name].READS_LENGTHS else reason or why_torch(key_states.device)
