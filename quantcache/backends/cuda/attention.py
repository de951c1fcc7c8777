"""Attention over pages and tail, and the kernel for few query rows."""

import struct
from typing import Final

import torch
from torch import Tensor

from quantcache.backends.cuda.launch import MASK_DTYPES, NO_BLOCK_TABLE, current_stream, gpu, launch, readable
from quantcache.backends.cuda.pages import append_tail, segment_table
from quantcache.backends.cuda.plan import Plan, Shape, plan_for
from quantcache.backends.cuda.prefill import PREFILL_DTYPES, prefill
from quantcache.backends.cuda.shared import NOTHING_SHARED, attend_shared
from quantcache.backends.protocol import View
from quantcache.quantization.options import AttentionOptions

MAX_DECODE_ROWS: Final = 64
"""Query rows per KV head (group * query_len) from which on reading a layer is arithmetic and no longer memory."""

DECODE: Final = "cuda decode"
PREFILL: Final = "cuda prefill"
"""The kernels, as reports name them."""

ATTENTION_ARGS: Final = struct.Struct("11P 13q 12i 2f 4Pq 2P 6q i Pq 2P 3i PqPqPP")


def attention(query: Tensor, view: View, options: AttentionOptions) -> Tensor:
    """See ``reads.attention``; ``unsupported`` must be None.

    There is a kernel for up to ``MAX_DECODE_ROWS`` query rows per KV head, which reads the pages once for 8 or 16 of
    them, and one for more, see ``prefill``. float32, which tensor cores do not have, is always the first one's.
    """
    if kernel_of(query, view) == PREFILL:
        if view.pending is not None:
            append_tail(*view.pending, *view.buffers, view.tail_len - view.pending[0].shape[2])
        return prefill(query, view, options)
    return decode(query, view, options)


def kernel_of(query: Tensor, view: View) -> str:
    """See ``Backend.kernel_of``: which of ``decode`` and ``prefill`` a call goes to."""
    _, num_q_heads, query_len, _ = query.shape
    is_wide = num_q_heads * query_len > MAX_DECODE_ROWS * view.buffers[0].shape[1]
    return PREFILL if is_wide and query.dtype in PREFILL_DTYPES else DECODE


def decode(
    query: Tensor,
    view: View,
    options: AttentionOptions,
    shape: Shape | None = None,
    splits: tuple[int, int] | None = None,
    shares_pages: bool | None = None,
) -> Tensor:
    """Attention of any number of query rows, few in a CTA.

    Args:
        query: see ``reads.attention``, as for every argument not named here.
        view: what is read. Pending tokens are written into its buffers by the same launch.
        options: see ``AttentionOptions``.
        shape: instead of the one chosen for the call.
        splits: instead of those chosen: splits of the pages, splits in all.
        shares_pages: whether what neighbouring sequences share is read once for all of them; None where that pays.
    """
    table, lengths, scratch = segment_table(view), view.lengths, view.scratch
    attn_mask, is_causal, _, window, softcap, sinks = options
    batch, num_q_heads, query_len, head_dim = query.shape
    key_tail, value_tail = view.buffers
    _, num_kv_heads, _, v_head_dim = value_tail.shape
    index = query.device.index
    query, query_address, query0, query1, query2 = readable(query)
    key_tail, key_address, key0, key1, key2 = readable(key_tail)
    value_tail, value_address, value0, value1, value2 = readable(value_tail)
    group = num_q_heads // num_kv_heads
    sizes = batch, num_kv_heads, group, query_len, head_dim, v_head_dim
    kind = (
        index,
        sizes,
        query.dtype,
        attn_mask is not None,
        softcap is not None,
        table.has_row_table,
        table.num_pages,
        shape,
    )
    shared = NOTHING_SHARED
    if table.has_row_table and view.may_share and shares_pages is not False:
        shared = attend_shared(query, view, table, sizes, options, always=bool(shares_pages))
        if shared.parts and splits is None:
            splits = 1, 1  # of what is left to read there is little, and merging it takes longer
    plan = plan_for(*kind, splits)
    if scratch is not None and not _fits(scratch, plan, v_head_dim):
        plan = plan_for(*kind, (1, 1))

    mask, mask_strides, mask_dtype = _NO_MASK
    if attn_mask is not None:
        if attn_mask.dtype not in MASK_DTYPES:
            attn_mask = attn_mask.float()
        strides = [0] * (4 - attn_mask.dim())
        strides += [s if n > 1 else 0 for n, s in zip(attn_mask.shape, attn_mask.stride(), strict=True)]
        mask, mask_strides, mask_dtype = attn_mask.data_ptr(), tuple(strides), MASK_DTYPES[attn_mask.dtype]
    if sinks is not None:
        sinks = sinks.float().contiguous()
    partial = sums = counters = 0
    if plan.num_splits > 1:
        workspace = _workspace(query.device, plan.tiles, plan.partial_rows, v_head_dim) if scratch is None else scratch
        counters = workspace.data_ptr()
        partial = counters + 4 * NUM_COUNTERS
        sums = partial + 4 * plan.partial_rows * v_head_dim
    new = _NO_NEW_STATES
    if view.pending is not None:
        new_key, new_key_address, *new_key_strides = readable(view.pending[0])
        _new_value, new_value_address, *new_value_strides = readable(view.pending[1])
        new = (new_key_address, new_value_address, *new_key_strides, *new_value_strides, new_key.shape[2])
    output = query.new_empty(batch, query_len, num_q_heads, v_head_dim)
    launch(
        plan.kernel,
        plan.grid,
        index,
        ATTENTION_ARGS,
        query_address,
        output.data_ptr(),
        table.address_beyond(1),
        key_address,
        value_address,
        mask,
        0 if sinks is None else sinks.data_ptr(),
        0 if lengths is None else lengths.data_ptr(),
        *(partial, sums, counters),
        *(query0, query1, query2, key0, key1, key2, value0, value1, value2),
        *mask_strides,
        *(num_kv_heads, group, query_len, table.num_pages, view.tail_len, table.num_segments),
        *(plan.page_splits, plan.num_splits, is_causal, window or 0, mask_dtype, batch),
        options.scale(head_dim),
        softcap or 0.0,
        *table.only,
        *new,
        *table.row_table,
        *shared[:5],
        *NO_BLOCK_TABLE,
        begins_early=shared.parts > 0 and gpu(index).begins_early,
    )
    return output


_NO_NEW_STATES: Final[tuple[int, ...]] = (0,) * 9
_NO_MASK: Final[tuple[int, tuple[int, ...], int]] = (0, (0, 0, 0, 0), 0)


NUM_COUNTERS: Final = 4096
"""Row tiles whose splits can be merged; each has a counter at the start of a workspace."""

_workspaces: dict[tuple[int, int], Tensor] = {}


def _workspace(device: torch.device, tiles: int, rows: int, v_head_dim: int) -> Tensor:
    """Counters that are zero, then room for the partial outputs and sums of ``rows``.

    There is one for each device and stream, since what a stream runs, it runs in order.
    """
    key = device.index, current_stream(device.index)
    have = _workspaces.get(key)
    if have is None or have.numel() < _words(rows, v_head_dim):
        have = _workspaces[key] = torch.zeros(max(_words(rows, v_head_dim), 1 << 20), dtype=torch.int32, device=device)
    return have


def make_scratch(device: torch.device, v_head_dim: int) -> Tensor:
    """A workspace of its own for calls that are recorded in a graph and must not allocate; int32, zeroed.

    It has room for as many CTAs as can run at once, which is how many splits there are.
    """
    rows = gpu(device.index).processors * SCRATCH_ROWS
    return torch.zeros(_words(rows, v_head_dim), dtype=torch.int32, device=device)


SCRATCH_ROWS: Final = 64
"""Query rows that a processor holds at once at most: CTAs of 8 or 16 rows."""


def _words(rows: int, v_head_dim: int) -> int:
    return NUM_COUNTERS + rows * (v_head_dim + 2)


def _fits(scratch: Tensor, plan: Plan, v_head_dim: int) -> bool:
    return plan.num_splits == 1 or (
        plan.tiles <= NUM_COUNTERS and _words(plan.partial_rows, v_head_dim) <= scratch.numel()
    )
