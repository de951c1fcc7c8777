"""The memory of a layer of fixed capacity: one tensor of bytes, and what lies where in it.

torch.compile checks before each call every tensor and every number that a step takes from the host, and with one tensor
for each part that took longer than all other checks together.
"""

import functools
import math
import operator
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from quantcache.quantization.scheme import PAGE_SIZE
from quantcache.store.segments import Segment

NUM_LENGTHS: Final = 4
PAGES, TAIL_LEN, SEQ_LEN, COUNTER = range(NUM_LENGTHS)
"""Places in ``lengths``: closed pages, tokens in the tail, tokens in all, and a counter that kernels leave zero."""

OWN_ROWS, FOLLOWS_TABLE, SHARES_READS = range(3)
"""What a recorded step reads: of every sequence its own row; the row that the row table names; and that once for all
neighbours that it names for."""

ALIGNMENT: Final = 16
"""Bytes that the parts are aligned to, as the kernels read them."""


Part = tuple[int, int, torch.dtype, tuple[int, ...]]
"""First byte, end, dtype and shape of a part of ``FixedBuffers``, but of the last."""


class FixedBuffers(NamedTuple):
    """The parts of one layer's memory.

    key_qdata: int8 (num_pages, batch, num_kv_heads, page_size, head_dim)
    key_metadata: int16 (num_pages, batch, num_kv_heads, head_dim, 2)
    value_qdata: int8 (num_pages, batch, num_kv_heads, page_size, v_head_dim)
    value_metadata: int16 (num_pages, batch, num_kv_heads, page_size, 2)
    key_tail: (batch, num_kv_heads, tail capacity, head_dim) in the model's dtype
    value_tail: (batch, num_kv_heads, tail capacity, v_head_dim)
    lengths: int32 (4,)
    row_table: int32 (batch, num_pages), the stored row that each sequence reads a page from; its own of pages to come
    newest: uint8 (bytes,), the last four as they lie in memory: one copy of them changes all at once
    """

    key_qdata: Tensor
    key_metadata: Tensor
    value_qdata: Tensor
    value_metadata: Tensor
    key_tail: Tensor
    value_tail: Tensor
    lengths: Tensor
    row_table: Tensor
    newest: Tensor

    @property
    def pages(self) -> Segment:
        """All pages that there is room for."""
        return Segment(*self[:4])

    def like_newest(self) -> "FixedBuffers":
        """Tails, lengths and row table in memory of their own, uninitialised, beside the same pages."""
        newest = torch.empty_like(self.newest)
        first = self.newest.storage_offset()

        def moved(part: Tensor) -> Tensor:
            start = part.storage_offset() * part.itemsize - first
            return newest[start : start + part.nbytes].view(part.dtype).view(part.shape)

        return FixedBuffers(*self[:4], *map(moved, self[4:8]), newest)  # type: ignore[call-arg]


class StaticShape(NamedTuple):
    """The numbers that make a ``BufferLayout``.

    Attributes:
        capacity: tokens that fit.
        residual_length: newer tokens that a page waits for.
        batch: sequences.
        num_kv_heads: of the layer.
        head_dim: of the keys.
        v_head_dim: of the values.
        sharing: ``OWN_ROWS``, ``FOLLOWS_TABLE`` or ``SHARES_READS``. Nothing lies elsewhere for it.
    """

    capacity: int
    residual_length: int
    batch: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    sharing: int = OWN_ROWS

    @classmethod
    def of(cls, capacity: int, residual_length: int, key_states: Tensor, value_states: Tensor) -> "StaticShape":
        """For states like these, (batch, num_kv_heads, any, head_dim).

        Steps of several sequences are recorded so that they stay valid when these are reordered.
        """
        batch, num_kv_heads, _, head_dim = key_states.shape
        sharing = FOLLOWS_TABLE if batch > 1 else OWN_ROWS
        return cls(capacity, residual_length, batch, num_kv_heads, head_dim, value_states.shape[3], sharing)

    @property
    def num_pages(self) -> int:
        """Pages that are ever closed."""
        return max(0, (self.capacity - self.residual_length) // PAGE_SIZE)

    @property
    def tail_capacity(self) -> int:
        """Tokens that the tail has room for: when an operation finds it full, it closes a page first."""
        return min(PAGE_SIZE + self.residual_length, self.capacity)


@dataclass(frozen=True)
class BufferLayout:
    """What lies where in the memory of a layer. ``layout_for`` makes it, so that layers alike share one.

    Attributes:
        shape: numbers of what there is.
        dtype: of the model, and so of the tails.
    """

    shape: StaticShape
    dtype: torch.dtype

    def constant(self) -> "BufferLayout":
        """The same in numbers that torch.compile takes for constants of the graph, not for its arguments."""
        return BufferLayout(StaticShape(*map(operator.index, self.shape)), self.dtype)

    @functools.cached_property
    def _parts(self) -> list[Part]:
        return self._made_parts()

    def _made_parts(self) -> list[Part]:
        shape = self.shape
        rows = shape.num_pages, shape.batch, shape.num_kv_heads
        tail = shape.batch, shape.num_kv_heads, shape.tail_capacity
        shapes: list[tuple[torch.dtype, tuple[int, ...]]] = [
            (torch.int8, (*rows, PAGE_SIZE, shape.head_dim)),
            (torch.int16, (*rows, shape.head_dim, 2)),
            (torch.int8, (*rows, PAGE_SIZE, shape.v_head_dim)),
            (torch.int16, (*rows, PAGE_SIZE, 2)),
            (self.dtype, (*tail, shape.head_dim)),
            (self.dtype, (*tail, shape.v_head_dim)),
            (torch.int32, (NUM_LENGTHS,)),
            (torch.int32, (shape.batch, shape.num_pages)),
        ]
        parts, start = [], 0
        for dtype, sizes in shapes:
            end = start + math.prod(sizes) * dtype.itemsize
            parts.append((start, end, dtype, sizes))
            start = -(-end // ALIGNMENT) * ALIGNMENT
        return parts

    @property
    def nbytes(self) -> int:
        """Bytes of the memory."""
        return self._parts[-1][1]

    def allocate(self, device: torch.device) -> Tensor:
        """Memory without a token in it, uint8 (bytes,)."""
        memory = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        memory[self._parts[4][0] :].zero_()
        row_table = self.unpack(memory).row_table
        row_table.copy_(torch.arange(len(row_table), device=device)[:, None])
        return memory

    def with_pages(self, newest: Tensor, pages: Segment) -> FixedBuffers:
        """The parts where the pages lie apart from ``newest``, which is shared."""
        first = self._parts[4][0]
        shared = [
            newest[start - first : end - first].view(dtype).view(sizes) for start, end, dtype, sizes in self._parts[4:]
        ]
        return FixedBuffers(*pages, *shared, newest)  # type: ignore[call-arg]

    def unpack(self, memory: Tensor) -> FixedBuffers:
        """The parts, sharing the memory."""
        # torch.compile does not enter the lock of a cached property.
        parts = self._made_parts() if torch.compiler.is_compiling() else self._parts
        shared = [memory[start:end].view(dtype).view(sizes) for start, end, dtype, sizes in parts]
        return FixedBuffers(*shared, memory[parts[4][0] :])  # type: ignore[call-arg]


@functools.cache
def layout_for(shape: StaticShape, dtype: torch.dtype) -> BufferLayout:
    """The one layout of such layers."""
    return BufferLayout(shape, dtype)
