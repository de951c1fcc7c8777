"""Quantising pages, restoring them and writing the tail."""

import functools
import operator
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

import torch
from torch import Tensor

from quantcache.backends.cuda import nvrtc
from quantcache.backends.cuda.launch import (
    DTYPES,
    MAX_GRID,
    Kernel,
    current_stream,
    folded,
    launch,
    load_kernel,
    readable,
)
from quantcache.backends.devices import check_pages
from quantcache.backends.protocol import SegmentLike, View
from quantcache.quantization.scheme import PAGE_SIZE

_STORE_ARGS: Final = struct.Struct("2P 2P 2P 6q 2i")
_RESTORE_ARGS: Final = struct.Struct("3P 3q 7i 4Pq Pq")
_APPEND_ARGS: Final = struct.Struct("2P 2P 12q 4i")


def store_pages(key_states: Tensor, value_states: Tensor, target: SegmentLike) -> None:
    """See ``writes.store_pages``."""
    key_states, key_address, *key_strides = readable(key_states)
    value_states, value_address, *value_strides = readable(value_states)
    written, (key_qdata, key_metadata, value_qdata, value_metadata) = _where(target, key_states.device)
    batch, num_kv_heads, _, head_dim = key_states.shape
    kernel = pages_kernel("store_pages", key_states, head_dim, value_states.shape[-1])
    heads, layers = folded(batch * num_kv_heads)
    launch(
        kernel,
        (written[0].shape[0], heads, 2 * layers),
        key_states.device.index,
        _STORE_ARGS,
        *(key_address, value_address, key_qdata, value_qdata, key_metadata, value_metadata),
        *key_strides,
        *value_strides,
        *(num_kv_heads, batch * num_kv_heads),
    )
    for part, source in zip(_parts(target), written, strict=True):
        if part is not source:
            part.copy_(source)


def append_tail(key_states: Tensor, value_states: Tensor, key_tail: Tensor, value_tail: Tensor, position: int) -> None:
    """See ``writes.append_tail``."""
    key_states, key_address, key0, key1, key2 = readable(key_states)
    value_states, value_address, value0, value1, value2 = readable(value_states)
    batch, num_kv_heads, tokens, head_dim = key_states.shape
    v_head_dim = value_states.shape[3]
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
        *(num_kv_heads, batch, tokens, position),
    )


FEW_SEGMENTS: Final = 16
"""Segments that are told in the arguments of a launch, for kernels whose calls often find other pages than the last."""


@dataclass(eq=False)
class SegmentTable:
    """Where the pages are, for the kernels.

    Attributes:
        entries: five numbers for each segment: the addresses of its four parts, and the number of its first page; with
            a row table also, in the upper 32 bits of that, how many rows its pages have.
        num_segments: of them.
        num_pages: pages in all of them.
        row_table: address of the row table, and elements from a sequence to the next; (0, 0) if there is none.
        device: where they are.
        kept: what must live as long as the table is read.
        copies: of the table on the device, by the stream that reads it: another one, as of a thread with a fork of the
            cache, would not wait for it to arrive.
    """

    entries: list[int]
    num_segments: int
    num_pages: int
    row_table: tuple[int, int]
    device: torch.device
    kept: tuple[object, ...]
    copies: dict[int, Tensor] = field(default_factory=dict)

    @property
    def has_row_table(self) -> bool:
        """Whether sequences read rows that a table names."""
        return self.row_table[0] != 0

    @cached_property
    def only(self) -> tuple[int, ...]:
        """The entry of the first segment, zeros if there is none."""
        return tuple(self.entries[:5]) if self.entries else NO_ENTRY

    @cached_property
    def few(self) -> tuple[int, ...]:
        """The entries of ``FEW_SEGMENTS``, zeros behind the last; of more segments zeros."""
        missing = FEW_SEGMENTS - self.num_segments
        return (*self.entries, *NO_ENTRY * missing) if missing >= 0 else NO_ENTRY * FEW_SEGMENTS

    def address_beyond(self, most: int) -> int:
        """Of an int64 (segments + 1, 5) on the device, made when first asked for; 0 where there are at most ``most``.

        It has the entries and one more, with only the number of pages.
        """
        if self.num_segments <= most:
            return 0
        stream = current_stream(self.device.index)
        if stream not in self.copies:
            entries = *self.entries, 0, 0, 0, 0, self.num_pages
            self.copies[stream] = _entries_on(self.device, stream, entries)
        return self.copies[stream].data_ptr()


NO_ENTRY: Final = (0, 0, 0, 0, 0)
"""Of a segment that there is not."""


def segment_table(view: View) -> SegmentTable:
    """The table of a view's closed pages, made once for as long as they do not change."""
    made: SegmentTable | None = view.memo.get("cuda")
    if made is None:
        made = view.memo["cuda"] = _make_table(view.segments, view.row_table, view.buffers[0].device)
    return made


def _make_table(segments: Sequence[SegmentLike], row_table: Tensor | None, device: torch.device) -> SegmentTable:
    entries: list[int] = []
    kept: list[object] = []
    first = 0
    for segment in segments:
        parts, addresses = _where(segment, device)
        pages, rows = parts[0].shape[:2]
        entries += *addresses, (first if row_table is None else first | rows << 32)
        kept.append(parts)
        first += pages
    where = 0, 0
    if row_table is not None and first:
        row_table = row_table if row_table.stride(1) == 1 else row_table.contiguous()
        where = row_table.data_ptr(), row_table.stride(0)
    return SegmentTable(entries, len(segments), first, where, device, (kept, row_table))


def _parts(segment: SegmentLike) -> list[Tensor]:
    return [segment.key_qdata, segment.key_metadata, segment.value_qdata, segment.value_metadata]


def _where(segment: SegmentLike, device: torch.device) -> tuple[list[Tensor], list[int]]:
    """The parts of a segment, contiguous, and their addresses; asked once, for most stay from call to call."""
    found: tuple[torch.device, list[Tensor], list[int]] | None = segment.memo.get("cuda")
    if found is None or found[0] != device:
        parts = _parts(segment)
        check_pages(device, [parts])
        whole = list(map(Tensor.contiguous, parts))
        found = device, whole, list(map(Tensor.data_ptr, whole))
        if all(map(operator.is_, whole, parts)):  # a copy is of what is there now
            segment.memo["cuda"] = found
    return found[1:]


@functools.lru_cache(maxsize=512)
def _entries_on(device: torch.device, stream: int, entries: tuple[int, ...]) -> Tensor:
    """Entries of a table on the device, as kernels of a stream read them.

    Reordering beams makes a table of every layer in every step, of the same entries for a page's worth of them.
    """
    # The driver takes its own copy of memory that is not pinned before it returns, and waits for nothing either.
    return torch.tensor(entries, dtype=torch.int64, device="cpu").to(device, non_blocking=True)


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
            *(table.address_beyond(1), address, output.data_ptr() + start * tokens * width * output.element_size()),
            *strides,
            *(num_kv_heads, heads, start, table.num_segments),
            *(table.num_pages, view.tail_len, is_key),
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


MAKES_PAGES: Final = ("store_pages", "advance", "append_blocks")
"""Kernels of ``pages.cu`` that are launched with kStoreThreads, the others with 256."""


@functools.cache
def _kernel_of_pages(
    name: str, head_dim: int, v_head_dim: int, dtype: torch.dtype, index: int, has_row_table: bool
) -> Kernel:
    macros = macros_for(head_dim, v_head_dim, dtype, has_row_table)
    threads = max(256, 2 * head_dim) if name in MAKES_PAGES else 256
    return load_kernel("pages.cu", macros, name, index, threads, 0)
