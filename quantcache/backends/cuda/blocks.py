"""Attention over the blocks of a pool, and new tokens into them; see ``backends/blocks.py``.

The kernels are those of a cache, built to find pages by a block table. Of a batch that mixes them, one takes the
sequences with one new token, and one the others; either leaves what is not its own. A long prompt that has nothing
stored is torch's to attend to. Lengths and blocks are read on the
device, and grids follow from sizes alone, so that a step can be recorded.
"""

import functools
import struct
from collections.abc import Sequence
from typing import Final, NamedTuple, cast

import torch
from torch import Tensor

from quantcache.backends import torch_blocks
from quantcache.backends.blocks import BlockBatch, BlockLayout, BlockPages
from quantcache.backends.cuda.attention import ATTENTION_ARGS, NUM_COUNTERS
from quantcache.backends.cuda.launch import Kernel, gpu, launch, load_kernel, readable
from quantcache.backends.cuda.pages import FEW_SEGMENTS, NO_ENTRY, pages_kernel
from quantcache.backends.cuda.plan import MAX_SPLITS, SHORT, Shape, choose_shape, choose_splits, macros_for
from quantcache.backends.cuda.prefill import PREFILL_ARGS, kernels_for, launch_merge
from quantcache.backends.cuda.prefill import Shape as SeveralShape
from quantcache.backends.cuda.prefill import choose_shape as choose_several_shape
from quantcache.backends.cuda.prefill import choose_splits as choose_several_splits
from quantcache.quantization.options import AttentionOptions
from quantcache.quantization.scheme import PAGE_SIZE

_APPEND_BLOCKS_ARGS: Final = struct.Struct("2P 4q PqPqPP")

MAX_CLOSING_BLOCKS: Final = 64
"""CTAs of one head that share the new pages of a sequence."""

_NO_NEW_STATES, _NO_ROW_TABLE = (0,) * 9, (0,) * 2


def attend_blocks(
    query: Tensor, key_states: Tensor, value_states: Tensor, pages: BlockPages, options: AttentionOptions
) -> Tensor:
    """See ``BlockBackend.attend_blocks``."""
    query_lens = pages.batch.query_lens
    _, num_q_heads, tokens, _ = query.shape
    # Where the host does not know, there may be tokens that are nobody's.
    make = query.new_empty if query_lens is not None and sum(query_lens) == tokens else query.new_zeros
    output = make(1, tokens, num_q_heads, pages.layout.v_head_dim)
    call = _Call(query, key_states, value_states, pages, options, output)
    if query_lens is None or 1 in query_lens:
        attend_single(call)
    if pages.batch.max_query_len > 1:
        several, prompts = _divided(pages, options)
        if several is not None:
            attend_several(call._replace(pages=pages._replace(batch=several)))
        for prompt in prompts:
            own = query[:, :, prompt], key_states[:, :, prompt], value_states[:, :, prompt]
            output[:, prompt] = torch_blocks.attend_causal(*own, options)
    return output


class _Call(NamedTuple):
    """Arguments of ``attend_blocks``, and its result."""

    query: Tensor
    key_states: Tensor
    value_states: Tensor
    pages: BlockPages
    options: AttentionOptions
    output: Tensor


PROMPT_TOKENS: Final = 256
"""New tokens with which a sequence that has nothing stored is given to torch's attention: all it attends to is exact,
which that reads 4.8 times as fast as the prefill kernel (2,048 tokens, 28/4 heads, an H200). Shorter ones would be many
launches."""


def _divided(pages: BlockPages, options: AttentionOptions) -> tuple[BlockBatch | None, Sequence[slice]]:
    """What the prefill kernel has to attend to, and the tokens of the prompts that torch's attention takes.

    That takes them by a kernel which reads grouped heads and writes no scores. The layers of a pass share the division.
    """
    batch, layout = pages.batch, pages.layout
    if batch.query_lens is None or options.softcap is not None or options.sinks is not None:
        return batch, ()
    if layout.head_dim != layout.v_head_dim:
        return batch, ()
    if "prompts" not in batch.memo:
        batch.memo["prompts"] = _divide(batch)
    prompts, several = cast("tuple[list[slice], BlockBatch | None]", batch.memo["prompts"])
    return (several if prompts else batch), prompts


def _divide(batch: BlockBatch) -> tuple[list[slice], BlockBatch | None]:
    """The tokens of the long prompts, and, if there are any, the sequences from the first to the last of the others."""
    prompts, others = [], []
    for index, tokens, stored in torch_blocks.sequences_of(batch):
        count = tokens.stop - tokens.start
        if not stored and count >= PROMPT_TOKENS:
            prompts.append(tokens)
        elif count > 1:
            others.append(index)
    if not prompts or not others:
        return prompts, None
    first, last = others[0], others[-1] + 1
    query_lens, kv_lens = (lens[first:last] for lens in batch.on_host())
    between = BlockBatch(
        block_table=batch.block_table[first:last],
        cu_seqlens_q=batch.cu_seqlens_q[first : last + 1],
        cu_seqlens_k=batch.cu_seqlens_k[first : last + 1],
        max_query_len=max(query_lens),
        max_kv_len=max(kv_lens),
        query_lens=query_lens,
        kv_lens=kv_lens,
    )
    return prompts, between


class SinglePlan(NamedTuple):
    """How sequences with one new token each are attended to."""

    kernel: Kernel
    row_tiles: int
    num_splits: int
    partial_rows: int


@functools.lru_cache(maxsize=4096)
def plan_single(
    index: int, sequences: int, group: int, layout: BlockLayout, has_softcap: bool, num_pages: int
) -> SinglePlan:
    """The launch for ``sequences`` of up to ``num_pages`` pages each, of ``group`` query heads for each KV head."""
    num_kv_heads, head_dim, v_head_dim, dtype = layout.num_kv_heads, layout.head_dim, layout.v_head_dim, layout.dtype
    heads = sequences * num_kv_heads
    is_short = heads * num_pages < SHORT * gpu(index).processors
    shape = choose_shape(index, group, head_dim, v_head_dim, dtype, heads, is_short)
    row_tiles = -(-group // shape.rows)
    tiles = heads * row_tiles
    splits, _ = choose_splits(index, shape, head_dim, v_head_dim, dtype, tiles, num_pages)
    if tiles > NUM_COUNTERS:
        splits = 1
    return SinglePlan(_single_kernel(index, shape, layout, has_softcap), row_tiles, splits, tiles * splits * shape.rows)


@functools.cache
def _single_kernel(index: int, shape: Shape, layout: BlockLayout, has_softcap: bool) -> Kernel:
    head_dim, v_head_dim, dtype = layout.head_dim, layout.v_head_dim, layout.dtype
    macros = macros_for(shape, head_dim, v_head_dim, dtype, False, has_softcap, has_block_table=True)
    shared_bytes = shape.shared_bytes(head_dim, v_head_dim, dtype.itemsize, MAX_SPLITS + 1)
    return load_kernel("attention.cu", macros, "attention", index, shape.threads, shared_bytes)


def attend_single(call: _Call, plan: SinglePlan | None = None) -> None:
    """Attention of the sequences with one new token; ``plan`` goes before the one chosen."""
    query, pages, options, layout = call.query, call.pages, call.options, call.pages.layout
    index, group = query.device.index, query.shape[1] // layout.num_kv_heads
    sequences = len(pages.batch.block_table)
    num_pages = (pages.batch.max_kv_len - 1) // PAGE_SIZE
    has_softcap = options.softcap is not None
    plan = plan or plan_single(index, sequences, group, layout, has_softcap, num_pages)
    partial = sums = counters = 0
    if plan.num_splits > 1:
        counters = _scratch(pages, plan.partial_rows, query.device).data_ptr()
        partial = counters + 4 * NUM_COUNTERS
        sums = partial + 4 * plan.partial_rows * layout.v_head_dim
    addresses, strides, _kept = _states(call)
    launch(
        plan.kernel,
        (plan.num_splits, layout.num_kv_heads * plan.row_tiles, sequences),
        index,
        ATTENTION_ARGS,
        *(addresses[0], call.output.data_ptr(), 0, addresses[1], addresses[2]),
        *(0, _sinks(pages, options), 0),
        *(partial, sums, counters),
        *strides,
        *(0, 0, 0, 0),
        *(layout.num_kv_heads, group, 1, 0, 0, 0),
        *(plan.num_splits, plan.num_splits, options.is_causal, options.window or 0, 0, sequences),
        options.scale(layout.head_dim),
        options.softcap or 0.0,
        *NO_ENTRY,
        *_NO_NEW_STATES,
        *_NO_ROW_TABLE,
        *(0, 0, 1, 0, 0),
        *_block_table(pages),
    )


def attend_several(call: _Call, shape: SeveralShape | None = None, splits: int | None = None) -> None:
    """Attention of the sequences with two new tokens or more; ``shape`` and ``splits`` go before those chosen."""
    query, pages, options, layout, batch = call.query, call.pages, call.options, call.pages.layout, call.pages.batch
    index, group, sequences = query.device.index, query.shape[1] // layout.num_kv_heads, len(batch.block_table)
    widths = layout.head_dim, layout.v_head_dim
    shape = shape or choose_several_shape(index, group * batch.max_query_len, *widths)
    row_tiles = _row_tiles(batch, query.shape[2], group, shape.rows)
    tiles = layout.num_kv_heads * row_tiles
    if splits is None:
        num_blocks = -(-batch.max_kv_len // PAGE_SIZE)
        splits = choose_several_splits(index, shape, *widths, tiles, num_blocks)
    kernels = kernels_for(
        *(index, shape, *widths, layout.dtype, False, options.softcap is not None, False), has_block_table=True
    )
    partial = sums = 0
    if splits > 1:
        rows = tiles * splits * shape.rows
        workspace = torch.empty(rows * (layout.v_head_dim + 2), dtype=torch.float32, device=query.device)
        partial = workspace.data_ptr()
        sums = partial + 4 * rows * layout.v_head_dim
    addresses, strides, _kept = _states(call)
    arguments = (
        *(addresses[0], call.output.data_ptr(), 0, addresses[1], addresses[2]),
        *(0, 0, 0),
        *(_sinks(pages, options), 0),
        *(partial, sums),
        *strides,
        *(0,) * 10,
        *(layout.num_kv_heads, group, 0, 0, 0, 0),
        *(splits, options.is_causal, options.window or 0, 0, 1, row_tiles),
        options.scale(layout.head_dim),
        options.softcap or 0.0,
        *NO_ENTRY * FEW_SEGMENTS,
        *_NO_ROW_TABLE,
        sequences,
        *_block_table(pages),
    )
    launch(kernels.prefill, (tiles * splits, 1, 1), index, PREFILL_ARGS, *arguments)
    if splits > 1:
        launch_merge(kernels, tiles * shape.rows, index, arguments)


def append_blocks(key_states: Tensor, value_states: Tensor, pages: BlockPages) -> None:
    """See ``BlockBackend.append_blocks``."""
    layout, batch = pages.layout, pages.batch
    key_states, key_address, _, key_head, key_token = readable(key_states)
    value_states, value_address, _, value_head, value_token = readable(value_states)
    closing = min(max(batch.max_query_len // PAGE_SIZE, 1), MAX_CLOSING_BLOCKS)
    launch(
        pages_kernel("append_blocks", key_states, layout.head_dim, layout.v_head_dim),
        (closing, layout.num_kv_heads, len(batch.block_table)),
        key_states.device.index,
        _APPEND_BLOCKS_ARGS,
        *(key_address, value_address, key_head, key_token, value_head, value_token),
        *_block_table(pages),
    )


def _row_tiles(batch: BlockBatch, tokens: int, group: int, rows: int) -> int:
    """Tiles of ``rows`` query rows that the sequences with several new tokens have in a KV head, or more."""
    if batch.query_lens is None:
        return tokens * group // rows + min(len(batch.block_table), tokens // 2)
    return sum(-(-group * query_len // rows) for query_len in batch.query_lens if query_len > 1)


def _states(call: _Call) -> tuple[list[int], list[int], list[Tensor]]:
    """Addresses of query and new states; strides as the kernels take them, batches counting tokens; what must live."""
    addresses, strides, kept = [], [], []
    for states in (call.query, call.key_states, call.value_states):
        states, address, _, head, token = readable(states)
        addresses.append(address)
        strides += [token, head, token]
        kept.append(states)
    return addresses, strides, kept


def _sinks(pages: BlockPages, options: AttentionOptions) -> int:
    """Address of the sinks as float32, which live as long as the forward pass; 0 if there are none."""
    if options.sinks is None:
        return 0
    sinks = options.sinks.float().contiguous()
    pages.batch.memo.setdefault("cuda sinks", []).append(sinks)
    return sinks.data_ptr()


def _scratch(pages: BlockPages, partial_rows: int, device: torch.device) -> Tensor:
    """Counters that are zero, then room for ``partial_rows``; of a forward pass, whose layers run in turn."""
    v_head_dim = pages.layout.v_head_dim
    key, words = ("cuda scratch", device.index), NUM_COUNTERS + partial_rows * (v_head_dim + 2)
    scratch: Tensor | None = pages.batch.memo.get(key)
    if scratch is None or scratch.numel() < words:
        scratch = torch.empty(words, dtype=torch.int32, device=device)
        scratch[:NUM_COUNTERS].zero_()
        pages.batch.memo[key] = scratch
    return scratch


def _block_table(pages: BlockPages) -> tuple[int, int, int, int, int, int]:
    """``BlockTable`` of ``common/types.cuh``."""
    pool, batch = pages.pool, pages.batch
    table = batch.block_table
    if table.stride(1) != 1 and table.shape[1] > 1:
        raise ValueError(f"attend_blocks: the rows of block_table must be contiguous, got strides {table.stride()}.")
    if (pool.data_ptr() | pool.stride(0)) & 15:
        raise ValueError(
            "attend_blocks: pages must begin at multiples of 16 bytes, "
            f"got a pool at {pool.data_ptr():#x} with {pool.stride(0)} bytes from block to block."
        )
    return (
        *(pool.data_ptr(), pool.stride(0), table.data_ptr(), table.stride(0)),
        *(batch.cu_seqlens_q.data_ptr(), batch.cu_seqlens_k.data_ptr()),
    )
