"""Quantising pages, restoring them and writing the tail."""

import functools
import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from quantcache.backends.cuda import nvrtc
from quantcache.backends.cuda.launch import DTYPES, MAX_GRID, Kernel, folded, launch, load_kernel, readable
from quantcache.backends.devices import check_pages
from quantcache.backends.protocol import SegmentLike, View
from quantcache.quantization.scheme import PAGE_SIZE

_STORE_ARGS: Final = struct.Struct("2P 2P 2P 6q 2i")
_RESTORE_ARGS: Final = struct.Struct("3P 3q 8i 4Pq Pq")
_APPEND_ARGS: Final = struct.Struct("2P 2P 12q P 4i")


def store_pages(key_states: Tensor, value_states: Tensor, target: SegmentLike) -> None:
    """See ``writes.store_pages``."""
    key_states, key_address, *key_strides = readable(key_states)
    value_states, value_address, *value_strides = readable(value_states)
    targets = [(target.key_qdata, target.value_qdata), (target.key_metadata, target.value_metadata)]
    written = [[t if t.is_contiguous() else torch.empty_like(t).contiguous() for t in pair] for pair in targets]
    batch, num_kv_heads, _, head_dim = key_states.shape
    kernel = pages_kernel("store_pages", key_states, head_dim, value_states.shape[-1])
    heads, layers = folded(batch * num_kv_heads)
    launch(
        kernel,
        (len(target.key_qdata), heads, 2 * layers),
        key_states.device.index,
        _STORE_ARGS,
        *(key_address, value_address),
        *(t.data_ptr() for pair in written for t in pair),
        *key_strides,
        *value_strides,
        *(num_kv_heads, batch * num_kv_heads),
    )
    for pair, sources in zip(targets, written, strict=True):
        for part, source in zip(pair, sources, strict=True):
            if part is not source:
                part.copy_(source)


def append_tail(
    key_states: Tensor, value_states: Tensor, key_tail: Tensor, value_tail: Tensor, position: int | Tensor
) -> None:
    """See ``writes.append_tail``; ``position`` may also be an int32 tensor (pages, tail_len) on the device."""
    key_states, key_address, key0, key1, key2 = readable(key_states)
    value_states, value_address, value0, value1, value2 = readable(value_states)
    batch, num_kv_heads, tokens, head_dim = key_states.shape
    v_head_dim = value_states.shape[3]
    lengths, start = (position.data_ptr(), 0) if isinstance(position, Tensor) else (0, position)
    kernel = pages_kernel("append", key_states, head_dim, v_head_dim)
    words = batch * num_kv_heads * tokens * max(head_dim, v_head_dim) // 4
    if not words:
        return
    to_key0, to_key1, to_key2, _ = key_tail.stride()
    to_value0, to_value1, to_value2, _ = value_tail.stride()
    launch(
        kernel,
        (-(-words // 256), 1, 2),
        key_states.device.index,
        _APPEND_ARGS,
        key_address,
        value_address,
        key_tail.data_ptr(),
        value_tail.data_ptr(),
        *(key0, key1, key2, value0, value1, value2),
        *(to_key0, to_key1, to_key2, to_value0, to_value1, to_value2),
        lengths,
        *(num_kv_heads, batch, tokens, start),
    )


class SegmentTable(NamedTuple):
    """Where the pages are, for the kernels.

    Attributes:
        address: of an int64 (segments + 1, 5) on the device, an entry like ``only`` for each segment. 0 where there is
            one segment.
        num_segments: entries without the last, which has only the number of pages.
        num_pages: pages in all of them.
        only: of the first segment the addresses of the four parts, and the number of its first page; with a row table
            also, in the upper 32 bits of that, how many rows its pages have.
        row_table: address of the row table, and elements from a sequence to the next; (0, 0) if there is none.
        kept: what must live as long as the table is read.
    """

    address: int
    num_segments: int
    num_pages: int
    only: tuple[int, int, int, int, int]
    row_table: tuple[int, int]
    kept: tuple[object, ...]

    @property
    def has_row_table(self) -> bool:
        """Whether sequences read rows that a table names."""
        return self.row_table[0] != 0


def segment_table(view: View) -> SegmentTable:
    """The table of a view's closed pages, made once for as long as they do not change."""
    made: SegmentTable | None = view.memo.get("cuda")
    if made is None:
        made = view.memo["cuda"] = _make_table(view.segments, view.row_table, view.buffers[0].device)
    return made


def _make_table(segments: Sequence[SegmentLike], row_table: Tensor | None, device: torch.device) -> SegmentTable:
    contiguous = [
        [part.contiguous() for part in (s.key_qdata, s.key_metadata, s.value_qdata, s.value_metadata)] for s in segments
    ]
    check_pages(device, contiguous)
    entries, first = [], 0
    for parts in contiguous:
        rows = 0 if row_table is None else parts[0].shape[1]
        entries += [*(part.data_ptr() for part in parts), first | rows << 32]
        first += len(parts[0])
    entries += [0, 0, 0, 0, first]
    only = (entries[0], entries[1], entries[2], entries[3], entries[4] if segments else 0)
    where = 0, 0
    if row_table is not None and first:
        row_table = row_table if row_table.stride(1) == 1 else row_table.contiguous()
        where = row_table.data_ptr(), row_table.stride(0)
    if len(segments) < 2:
        return SegmentTable(0, len(segments), first, only, where, (contiguous, row_table))
    # The driver takes its own copy of memory that is not pinned before it returns, and waits for nothing either.
    on_device = torch.tensor(entries, dtype=torch.int64).to(device, non_blocking=True)
    return SegmentTable(on_device.data_ptr(), len(segments), first, only, where, (on_device, contiguous, row_table))


def restore(view: View, is_key: bool) -> Tensor:
    """See ``reads.restore``."""
    table = segment_table(view)
    head_dim, v_head_dim = (buffer.shape[3] for buffer in view.buffers)
    tail, address, *strides = readable(view.buffers[0 if is_key else 1])
    batch, num_kv_heads, _, width = tail.shape
    tokens = table.num_pages * PAGE_SIZE + view.tail_len
    output = tail.new_empty(batch, num_kv_heads, tokens, width)
    blocks, heads = table.num_pages + (view.tail_len > 0), batch * num_kv_heads
    for start in range(0, heads if blocks else 0, MAX_GRID):
        launch(
            pages_kernel("restore", tail, head_dim, v_head_dim, table.has_row_table),
            (blocks, min(heads - start, MAX_GRID), 1),
            tail.device.index,
            _RESTORE_ARGS,
            *(table.address, address, output.data_ptr() + start * tokens * width * output.element_size()),
            *strides,
            *(num_kv_heads, heads, start, table.num_segments),
            *(table.num_pages, 0, view.tail_len, is_key),
            *table.only,
            *table.row_table,
        )
    return output


def pages_kernel(name: str, states: Tensor, head_dim: int, v_head_dim: int, has_row_table: bool = False) -> Kernel:
    """The kernel ``name`` of ``pages.cu`` for states like these; those that write pages write the sequences' own."""
    return _kernel_of_pages(name, head_dim, v_head_dim, states.dtype, states.device.index, has_row_table)


def macros_for(head_dim: int, v_head_dim: int, dtype: torch.dtype, has_row_table: bool = False) -> nvrtc.Macros:
    """See ``pages/build.cuh``."""
    return (
        *(("HEAD_DIM", head_dim), ("V_HEAD_DIM", v_head_dim), ("DTYPE", DTYPES[dtype])),
        ("HAS_ROW_TABLE", int(has_row_table)),
    )


@functools.cache
def _kernel_of_pages(
    name: str, head_dim: int, v_head_dim: int, dtype: torch.dtype, index: int, has_row_table: bool
) -> Kernel:
    macros = macros_for(head_dim, v_head_dim, dtype, has_row_table)
    threads = max(256, 2 * head_dim) if name in ("store_pages", "advance") else 256
    return load_kernel("pages.cu", macros, name, index, threads, 0)
