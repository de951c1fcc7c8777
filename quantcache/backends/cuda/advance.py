"""Taking a layer of fixed capacity on, with its lengths in device memory: one launch."""

import struct
from typing import Final

from torch import Tensor

from quantcache.backends.cuda.launch import MAX_GRID, gpu, launch, readable
from quantcache.backends.cuda.pages import pages_kernel
from quantcache.backends.protocol import Buffers, Source
from quantcache.quantization.scheme import PAGE_SIZE

_ADVANCE_ARGS: Final = struct.Struct("2P 2P 2P 2P 2P 2P 12q 6i")

MAX_CLOSING_BLOCKS: Final = 64
"""CTAs of one head that share the pages of a long source."""


def advance(
    source: Source | None, key_states: Tensor, value_states: Tensor, buffers: Buffers, residual_length: int
) -> None:
    """See ``writes.advance``."""
    key_tail, value_tail, pages = buffers.key_tail, buffers.value_tail, buffers.pages
    key_source, value_source, source_lengths = source or (key_tail, value_tail, buffers.lengths)
    blocks = 1 if source is None else min(max(key_source.shape[2] // PAGE_SIZE, 1), MAX_CLOSING_BLOCKS)
    read = [readable(tensor) for tensor in (key_source, value_source, key_states, value_states)]
    batch, num_kv_heads, tail_capacity, head_dim = key_tail.shape
    heads = batch * num_kv_heads
    sharing = min(heads, MAX_GRID)
    if blocks == 1:
        sharing = min(sharing, gpu(key_tail.device.index).processors)
    launch(
        pages_kernel("advance", key_tail, head_dim, value_tail.shape[3]),
        (blocks, sharing, 2),
        key_tail.device.index,
        _ADVANCE_ARGS,
        *(address for _, address, *_ in read),
        *(key_tail.data_ptr(), value_tail.data_ptr()),
        *(pages.key_qdata.data_ptr(), pages.value_qdata.data_ptr()),
        *(pages.key_metadata.data_ptr(), pages.value_metadata.data_ptr()),
        *(source_lengths.data_ptr(), buffers.lengths.data_ptr()),
        *(stride for _, _, *strides in read for stride in strides),
        *(num_kv_heads, heads, len(pages.key_qdata), tail_capacity, residual_length, key_states.shape[2]),
    )
