"""The operations whose lengths are in device memory; see ``static_ops.py``."""

import struct
from collections.abc import Sequence
from typing import Final

from torch import Tensor

from quantcache.backends.cuda.attention import fused_attention
from quantcache.backends.cuda.launch import gpu, launch, readable
from quantcache.backends.cuda.pages import pages_kernel, segment_table
from quantcache.quantization.options import AttentionOptions
from quantcache.quantization.scheme import PAGE_SIZE

_ADVANCE_ARGS: Final = struct.Struct("2P 2P 2P 2P 2P 2P 12q 6i")

MAX_CLOSING_BLOCKS: Final = 64
"""CTAs of one head that share the pages of a long source."""


def static_append(key_states: Tensor, value_states: Tensor, store: Sequence[Tensor], residual_length: int) -> None:
    """See ``static_ops.append``."""
    *_, key_tail, value_tail, lengths = store
    _advance((key_tail, value_tail), lengths, (key_states, value_states), store, residual_length, 1)


def static_store(
    key_source: Tensor, value_source: Tensor, source_lengths: Tensor, store: Sequence[Tensor], residual_length: int
) -> None:
    """See ``static_ops.store_tokens``."""
    blocks = min(max(key_source.shape[2] // PAGE_SIZE, 1), MAX_CLOSING_BLOCKS)
    none = key_source[:, :, :0], value_source[:, :, :0]
    _advance((key_source, value_source), source_lengths, none, store, residual_length, blocks)


def _advance(
    source: tuple[Tensor, Tensor],
    source_lengths: Tensor,
    states: tuple[Tensor, Tensor],
    store: Sequence[Tensor],
    residual_length: int,
    blocks: int,
) -> None:
    key_qdata, key_metadata, value_qdata, value_metadata, key_tail, value_tail, lengths = store
    read = [readable(tensor) for tensor in (*source, *states)]
    batch, num_kv_heads, tail_capacity, head_dim = key_tail.shape
    heads = batch * num_kv_heads
    sharing = heads if blocks > 1 else min(heads, gpu(key_tail.device.index).processors)
    launch(
        pages_kernel("advance", key_tail, head_dim, value_tail.shape[3]),
        (blocks, sharing, 2),
        key_tail.device.index,
        _ADVANCE_ARGS,
        *(address for _, address, *_ in read),
        *(key_tail.data_ptr(), value_tail.data_ptr()),
        *(key_qdata.data_ptr(), value_qdata.data_ptr(), key_metadata.data_ptr(), value_metadata.data_ptr()),
        *(source_lengths.data_ptr(), lengths.data_ptr()),
        *(stride for _, _, *strides in read for stride in strides),
        *(num_kv_heads, heads, len(key_qdata), tail_capacity, residual_length, states[0].shape[2]),
    )


def static_attention(
    query: Tensor,
    store: Sequence[Tensor],
    scratch: Tensor,
    options: AttentionOptions,
) -> Tensor:
    """See ``static_ops.attention``."""
    *parts, key_tail, value_tail, lengths = store
    table = segment_table(*([part] for part in parts))
    return fused_attention(
        query,
        table,
        key_tail,
        value_tail,
        options,
        lengths=lengths,
        scratch=scratch,
    )
