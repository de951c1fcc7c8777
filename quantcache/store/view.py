"""``PagesView``: what one call reads of a layer, closed int8 pages and then an exact tail.

Nothing here knows about transformers.
"""

from typing import Any

import torch
from torch import Tensor

from quantcache.quantization.scheme import PAGE_SIZE
from quantcache.store import writes
from quantcache.store.segments import ClosedPages, Segment


class PagesView:
    """Closed pages and a tail, growing and of fixed capacity alike.

    It shares memory with the cache. Appending leaves it valid; a crop followed by an append writes over its tail, and
    so does the end of a page in a layer of fixed capacity.

    The newest tokens may not be written yet: one launch of a kernel writes and reads them, which saves a decode step
    another. Everything else that needs them has them written first.

    Attributes:
        closed: the closed pages, without slack; with ``lengths`` all there is room for.
        buffers: exact keys and values behind the closed pages, (batch, num_kv_heads, at least tail_len, head_dim).
        tail_len: tokens of the buffers that count, unless ``lengths`` says.
        seq_len: tokens in the view.
        backend: what ``dispatch.backend_for`` says of it, where it has been asked.
        pending: the newest keys and values, if they are to be written into the buffers; else None.
        lengths: int32 on the device: closed pages, tokens in the tail, tokens in all. None: the host knows them.
        scratch: see ``Backend.make_scratch``, for a call that is recorded.
        capacity: tokens of the shape that readers see, zeros behind the last; None: as many as there are.
    """

    __slots__ = ("backend", "buffers", "capacity", "closed", "lengths", "pending", "scratch", "seq_len", "tail_len")

    def __init__(
        self,
        closed: ClosedPages,
        key_buffer: Tensor,
        value_buffer: Tensor,
        tail_len: int | None = None,
        backend: tuple[str, str | None] | None = None,
        pending: tuple[Tensor, Tensor] | None = None,
        lengths: Tensor | None = None,
        scratch: Tensor | None = None,
        capacity: int | None = None,
    ) -> None:
        """A view of ``tail_len`` tokens at the front of the buffers, all if None."""
        self.closed = closed
        self.buffers = key_buffer, value_buffer
        self.tail_len = key_buffer.shape[2] if tail_len is None else tail_len
        self.seq_len = closed.num_pages * PAGE_SIZE + self.tail_len
        self.backend = backend
        self.pending = pending
        self.lengths, self.scratch, self.capacity = lengths, scratch, capacity

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The closed pages, without slack."""
        return self.closed.segments

    @property
    def num_pages(self) -> int:
        """Closed pages in the view."""
        return self.closed.num_pages

    @property
    def is_exact(self) -> bool:
        """Whether readers see the exact tail and nothing else."""
        return not self.closed.segments and not self.capacity

    @property
    def row_table(self) -> Tensor | None:
        """Which stored row each sequence reads a page from, int32 (batch, num_pages); None: its own."""
        return self.closed.row_table

    @property
    def may_share(self) -> bool:
        """Whether neighbouring sequences may read one row of the table."""
        return self.closed.may_share

    @property
    def memo(self) -> dict[object, Any]:
        """What backends found out about the segments."""
        return self.closed.memo

    @property
    def key_tail(self) -> Tensor:
        """Exact keys behind the closed pages, (batch, num_kv_heads, tail_len, head_dim)."""
        return self._tail(0)

    @property
    def value_tail(self) -> Tensor:
        """Exact values behind the closed pages, (batch, num_kv_heads, tail_len, v_head_dim)."""
        return self._tail(1)

    def _tail(self, which: int) -> Tensor:
        self.write_pending()
        buffer = self.buffers[which]
        return buffer if buffer.shape[2] == self.tail_len else buffer.narrow(2, 0, self.tail_len)

    def state_shape(self, is_key: bool) -> tuple[int, int, int, int]:
        """(batch, num_kv_heads, tokens, head_dim) of the keys, or of the values, as readers see them."""
        batch, num_kv_heads, _, head_dim = self.buffers[0 if is_key else 1].shape
        return batch, num_kv_heads, self.capacity or self.seq_len, head_dim

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype."""
        return self.buffers[0].dtype

    @property
    def device(self) -> torch.device:
        """Where the tail is, and the pages when they are read."""
        return self.buffers[0].device

    def write_pending(self) -> None:
        """Write the newest tokens into the buffers, if they are not there yet."""
        if self.pending is not None:
            start = self.tail_len - self.pending[0].shape[2]
            writes.append_tail(*self.pending, *self.buffers, start, self.backend and self.backend[0])
            self.pending = None

    def on_host(self) -> "PagesView":
        """The same with lengths that the host knows; waits for the device."""
        if self.lengths is None:
            return self
        num_pages, tail_len = self.lengths[:2].tolist()
        segments = tuple(segment.narrow(0, num_pages) for segment in self.segments if num_pages)
        row_table = None if self.row_table is None else self.row_table[:, :num_pages]
        closed = ClosedPages(segments, row_table, self.may_share)
        return PagesView(closed, *self.buffers, tail_len, self.backend, capacity=self.capacity)

    def shows(self, other: "PagesView") -> bool:
        """Whether ``other`` is of the same tokens in the same memory, as keys and values read one by one are."""
        return self is other or (
            self.closed is other.closed
            and same_memory(self.key_tail, other.key_tail)
            and same_memory(self.value_tail, other.value_tail)
        )

    def __getstate__(self) -> tuple[object, ...]:
        """A copy or a pickle is of the tokens there are, without slack."""
        exact = self.key_tail.clone(), self.value_tail.clone(), None
        return self.closed, *exact, self.backend, None, None, None, self.capacity

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__(*state)  # type: ignore[misc]


def same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same elements; of a step that is traced, where nothing has an address, one tensor."""
    if one is other or torch.compiler.is_compiling():
        return one is other
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape
