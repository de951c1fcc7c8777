"""Attention to the pages that neighbouring sequences share, once for all of them; see ``prefill/shared_pages.cuh``."""

import functools
from typing import Final, NamedTuple

import torch
from torch import Tensor

from quantcache.backends.cuda.launch import Gpu, gpu
from quantcache.backends.cuda.pages import SegmentTable
from quantcache.backends.cuda.prefill import (
    MAX_SPLITS,
    MIN_BLOCKS,
    PREFILL_DTYPES,
    Plan,
    Shape,
    Sizes,
    kernels_for,
    launch_plan,
)
from quantcache.backends.cuda.prefill import shape_on as prefill_shape_on
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


def shape_on(device: Gpu, batch: int, rows_each: int, head_dim: int, v_head_dim: int) -> Shape:
    """The shape for sequences that are looked at together, with ``rows_each`` query rows of a KV head each.

    Who reads a page once for few rows waits, for what is copied, converted and multiplied one after the other. Two CTAs
    of 64 rows wait at different times: on an H200 as fast for 256 rows as half as many of 128, and faster for fewer.
    """
    shape = prefill_shape_on(device, batch * rows_each, head_dim, v_head_dim)
    if not shape.is_warpgroup:
        return shape
    if rows_each * LEAST_SEQUENCES <= 64 and max(head_dim, v_head_dim) <= 128:
        small = shape._replace(warps=4, at_once=2)
        if 2 * (small.shared_bytes(head_dim, v_head_dim) + 1024) <= device.shared_per_processor:
            return small
    return shape._replace(warps=min(shape.warps, 4 * -(-batch * rows_each // 64)))  # no more of them than have rows


LEAST_SEQUENCES: Final = 4
"""Neighbours that a CTA of 64 query rows should have room for; with fewer, one of more rows reads a page less often."""


@functools.lru_cache(maxsize=4096)
def plan_for(
    index: int, sizes: Sizes, dtype: torch.dtype, has_mask: bool, has_softcap: bool, num_pages: int, always: bool
) -> Plan | None:
    """The launch for a kind of call, ``sizes`` as unpacked; None if there is none or, unless ``always``, it costs time.

    It does if it takes longer than reading pages again for every sequence, were all of them shared. The kernel for few
    query rows has the rest to do either way.
    """
    batch, num_kv_heads, group, query_len, head_dim, v_head_dim = sizes
    device, rows_each = gpu(index), group * query_len
    shape = shape_on(device, batch, rows_each, head_dim, v_head_dim)
    most = min(shape.rows // rows_each, MAX_SEQUENCES)
    if min(batch, most) < 2 or not num_pages:
        return None
    row_tiles = -(-batch // most)
    sequences = -(-batch // row_tiles)
    tiles, slots = num_kv_heads * row_tiles, device.processors * shape.at_once
    splits = max(1, min(slots // tiles, num_pages // MIN_BLOCKS, MAX_SPLITS))
    if not always:
        rounds, pages_each = -(-tiles * splits // slots), -(-num_pages // splits)
        once = ONCE_START + rounds * pages_each * ONCE_PAGE
        if once >= EACH_PAGE * batch * num_kv_heads * num_pages / device.processors:
            return None
    kernels = kernels_for(index, shape, head_dim, v_head_dim, dtype, has_mask, has_softcap, True, True)
    return Plan(kernels, row_tiles, splits, sequences)


EACH_PAGE: Final = 0.44
"""Microseconds of a processor for a page that a sequence reads alone; this and the next two of an H200, fitted to
``docs/benchmarks/cuda-shared.json``."""

ONCE_START: Final = 11.5
"""Microseconds of the launch that reads pages once, and of merging what it finds, but for the pages."""

ONCE_PAGE: Final = 1.83
"""Microseconds of one of its CTAs for a page: of one of 128 query rows, or of each of two that have 64."""


def attend_shared(
    query: Tensor, view: View, table: SegmentTable, sizes: Sizes, options: AttentionOptions, always: bool
) -> SharedParts:
    """Attention to what neighbours share, as a row table says when the kernel runs, and to nothing else.

    Args:
        query: see ``reads.attention``, with few query rows.
        view: what is read, with a row table; its tail is not.
        table: the view's.
        sizes: of the call.
        options: see ``AttentionOptions``. Sinks are not counted.
        always: whether or not that pays.
    """
    if query.dtype not in PREFILL_DTYPES:
        return NOTHING_SHARED
    asked = options.attn_mask is not None, options.softcap is not None
    plan = plan_for(query.device.index, sizes, query.dtype, *asked, table.num_pages, always)
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
