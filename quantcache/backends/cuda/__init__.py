"""The backend of CUDA kernels: reads the int8 pages where they lie, on NVIDIA GPUs from compute capability 8.0.

The sources in ``csrc/cuda`` are built for the head_dims and the kind of call at hand, by NVRTC if they did not come
built in the wheel, see ``nvrtc.py``, and launched with one packed structure, see the ``Args`` of each source. Nothing
here waits for the GPU.
"""

import functools
from typing import Final

import torch
from torch import Tensor

from quantcache.backends.blocks import BlockLayout
from quantcache.backends.cuda import nvrtc
from quantcache.backends.cuda.advance import advance
from quantcache.backends.cuda.attention import MAX_DECODE_ROWS, attention, decode, kernel_of, make_scratch
from quantcache.backends.cuda.blocks import append_blocks, attend_blocks
from quantcache.backends.cuda.launch import DTYPES, gpu, reads_wheel
from quantcache.backends.cuda.pages import append_tail, restore, segment_table, store_pages
from quantcache.backends.cuda.plan import HEAD_DIM_STEP, MAX_HEAD_DIM
from quantcache.backends.cuda.prefill import prefill

__all__ = [
    "MAX_DECODE_ROWS",
    "READS_LENGTHS",
    "READS_ROW_TABLE",
    "WRITES_ON_READ",
    "advance",
    "append_blocks",
    "append_tail",
    "attend_blocks",
    "attention",
    "decode",
    "kernel_of",
    "make_scratch",
    "prefill",
    "restore",
    "segment_table",
    "store_pages",
    "unavailable",
    "unsupported",
    "unsupported_blocks",
    "where_from",
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
    reason = nvrtc.unavailable()
    return None if reason and reads_wheel() and nvrtc.prebuilt_states(gpu(index).arch) else reason


def where_from(device: torch.device) -> str:
    """Where the kernels come from that ``device`` runs."""
    reason = nvrtc.unavailable()
    others = f"none, because {reason}" if reason else f"built at first use by NVRTC {nvrtc.version()}"
    arch = gpu(device.index if device.index is not None else torch.cuda.current_device()).arch
    states = nvrtc.prebuilt_states(arch)
    if not states or not reads_wheel():
        return others
    names = {number: str(dtype).removeprefix("torch.") for dtype, number in DTYPES.items()}
    kinds = sorted({(names[number], head_dim, v_head_dim) for head_dim, v_head_dim, number in states})
    head_dims = sorted({head_dim for _, head_dim, _ in kinds})
    dtypes = sorted({dtype for dtype, *_ in kinds})
    return (
        f"of {arch} in the wheel, for head_dim {', '.join(map(str, head_dims))} in {' and '.join(dtypes)}; "
        f"others: {others}"
    )


def unsupported(*states: Tensor) -> str | None:
    """Why the kernels do not cover a call with these states, or None. All options of attention are covered."""
    for tensor in states:
        if tensor.dtype not in DTYPES:
            return f"the CUDA kernels compute in float32, got {tensor.dtype}"
        head_dim = tensor.shape[-1]
        if head_dim % HEAD_DIM_STEP or head_dim > MAX_HEAD_DIM:
            return f"the CUDA kernels take head_dims up to {MAX_HEAD_DIM} in steps of {HEAD_DIM_STEP}, got {head_dim}"
    if states[0].is_cuda and (reason := nvrtc.unavailable()):
        # head_dim of queries or keys comes first, and that of values last.
        kind = (states[0].shape[-1], states[-1].shape[-1], DTYPES[states[0].dtype])
        if kind not in nvrtc.prebuilt_states(gpu(states[0].device.index).arch):
            return f"the wheel has no kernels for head_dims {kind[:2]} in {states[0].dtype}, and {reason}"
    return None


def unsupported_blocks(layout: BlockLayout) -> str | None:
    """Why the kernels do not cover blocks of this layout, or None. The wheel has none of those that read blocks."""
    if layout.open_blocks > 1:
        return f"the CUDA kernels read blocks of 16-bit models, got {layout.dtype} with head_dim {layout.head_dim}"
    states = (
        torch.empty(0, width, dtype=layout.dtype, device="meta") for width in (layout.head_dim, layout.v_head_dim)
    )
    return unsupported(*states) or nvrtc.unavailable()
