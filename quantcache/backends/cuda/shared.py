"""Attention to the pages that neighbouring sequences share, once for all of them; see ``prefill/shared_pages.cuh``."""

import functools
from typing import Final, NamedTuple

import torch
from torch import Tensor

from quantcache.backends.cuda.launch import gpu
from quantcache.backends.cuda.pages import SegmentTable
from quantcache.backends.cuda.prefill import (
    MAX_SPLITS,
    MIN_BLOCKS,
    PREFILL_DTYPES,
    Plan,
    Sizes,
    choose_shape,
    kernels_for,
    launch_plan,
)
from quantcache.backends.protocol import View
from quantcache.quantization.options import AttentionOptions


class SharedParts(NamedTuple):
    """What has been found for the pages that are shared, as the kernel for few query rows merges it.

    Attributes:
        partial: address of the outputs, not normalised.
        sums: address of the largest logits and sums of weights.
        sequences: neighbours that were looked at together; 1 where nothing was.
        parts: of a row.
        rows: of the sequences that were looked at together, room for more included.
        kept: what must live until the parts are merged.
    """

    partial: int
    sums: int
    sequences: int
    parts: int
    rows: int
    kept: Tensor | None


NOTHING_SHARED: Final = SharedParts(0, 0, 1, 0, 0, None)

MAX_SEQUENCES: Final = 64
"""Neighbours that are looked at together; the kernel has a bit for each."""

WORTH_SHARING: Final = 32
"""Pages for each processor that could be read once instead of again, below which a launch takes longer than that."""


@functools.lru_cache(maxsize=4096)
def plan_for(
    index: int, sizes: Sizes, dtype: torch.dtype, has_mask: bool, has_softcap: bool, num_pages: int
) -> Plan | None:
    """The launch for a kind of call, ``sizes`` as unpacked; None if there is nothing to win."""
    batch, num_kv_heads, group, query_len, head_dim, v_head_dim = sizes
    device = gpu(index)
    if (batch - 1) * num_kv_heads * num_pages < WORTH_SHARING * device.processors:
        return None
    rows_each = group * query_len
    shape = choose_shape(index, batch * rows_each, head_dim, v_head_dim)
    if shape.is_warpgroup:  # no more of them than have rows
        shape = shape._replace(warps=min(shape.warps, 4 * -(-batch * rows_each // 64)))
    most = min(shape.rows // rows_each, MAX_SEQUENCES)
    if most < 2:
        return None
    row_tiles = -(-batch // most)
    sequences = -(-batch // row_tiles)
    splits = max(1, min(device.processors // (num_kv_heads * row_tiles), num_pages // MIN_BLOCKS, MAX_SPLITS))
    kernels = kernels_for(index, shape, head_dim, v_head_dim, dtype, has_mask, has_softcap, True, True)
    return Plan(kernels, row_tiles, splits, sequences)


def attend_shared(
    query: Tensor, view: View, table: SegmentTable, sizes: Sizes, options: AttentionOptions
) -> SharedParts:
    """Attention to what neighbours share, as a row table says when the kernel runs, and to nothing else.

    Args:
        query: see ``reads.attention``, with few query rows.
        view: what is read, with a row table; its tail is not.
        table: the view's.
        sizes: of the call.
        options: see ``AttentionOptions``. Sinks are not counted.
    """
    if query.dtype not in PREFILL_DTYPES:
        return NOTHING_SHARED
    asked = options.attn_mask is not None, options.softcap is not None
    plan = plan_for(query.device.index, sizes, query.dtype, *asked, table.num_pages)
    if plan is None:
        return NOTHING_SHARED
    if options.sinks is not None:
        options = options._replace(sinks=None)
    parts = launch_plan(plan, query, view, table, options, None)
    assert parts is not None
    _, num_kv_heads, *_, v_head_dim = sizes
    rows, partial = plan.kernels.shape.rows, parts.data_ptr()
    sums = partial + 4 * num_kv_heads * plan.row_tiles * plan.num_splits * rows * v_head_dim
    return SharedParts(partial, sums, plan.sequences, plan.num_splits, rows, parts)
