"""The backend of CUDA kernels: reads the int8 pages where they lie, on NVIDIA GPUs from compute capability 8.0.

The sources in ``csrc/cuda`` are built by NVRTC for the head_dims and the kind of call at hand, see ``nvrtc.py``, and
launched with one packed structure, see the ``Args`` of each source. Nothing here waits for the GPU.
"""

import functools
from typing import Final

import torch
from torch import Tensor

from quantcache.backends.cuda import nvrtc
from quantcache.backends.cuda.advance import advance
from quantcache.backends.cuda.attention import MAX_DECODE_ROWS, attention, decode, make_scratch
from quantcache.backends.cuda.launch import DTYPES
from quantcache.backends.cuda.pages import append_tail, restore, segment_table, store_pages
from quantcache.backends.cuda.plan import HEAD_DIM_STEP, MAX_HEAD_DIM
from quantcache.backends.cuda.prefill import prefill

__all__ = [
    "MAX_DECODE_ROWS",
    "READS_LENGTHS",
    "READS_ROW_TABLE",
    "WRITES_ON_READ",
    "advance",
    "append_tail",
    "attention",
    "decode",
    "make_scratch",
    "prefill",
    "restore",
    "segment_table",
    "store_pages",
    "unavailable",
    "unsupported",
]

WRITES_ON_READ: Final = True
READS_ROW_TABLE: Final = True
READS_LENGTHS: Final = True

MIN_CAPABILITY: Final = (8, 0)


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on ``device``, or None."""
    return _unavailable(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _unavailable(index: int) -> str | None:
    if torch.version.hip is not None:
        return "there are no kernels for AMD GPUs"
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        return (
            f"the CUDA kernels need compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}, "
            f"this GPU has {capability[0]}.{capability[1]}"
        )
    return nvrtc.unavailable()


def unsupported(*states: Tensor) -> str | None:
    """Why the kernels do not cover a call with these states, or None. All options of attention are covered."""
    for tensor in states:
        if tensor.dtype not in DTYPES:
            return f"the CUDA kernels compute in float32, got {tensor.dtype}"
        head_dim = tensor.shape[-1]
        if head_dim % HEAD_DIM_STEP or head_dim > MAX_HEAD_DIM:
            return f"the CUDA kernels take head_dims up to {MAX_HEAD_DIM} in steps of {HEAD_DIM_STEP}, got {head_dim}"
    return None
