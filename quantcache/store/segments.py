"""What attention reads of one layer: segments of closed int8 pages, then an exact tail.

Nothing here writes; ``pages.py`` does. Nothing here knows about transformers.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantcache.quantization.options import PLAIN, AttentionOptions
from quantcache.quantization.scheme import PAGE_SIZE
from quantcache.store import ops


class Segment(NamedTuple):
    """Memory for ``capacity`` pages, allocated at once.

    key_qdata: int8 (capacity, batch, num_kv_heads, page_size, head_dim)
    key_metadata: int16 (capacity, batch, num_kv_heads, head_dim, 2)
    value_qdata: int8 (capacity, batch, num_kv_heads, page_size, v_head_dim)
    value_metadata: int16 (capacity, batch, num_kv_heads, page_size, 2)
    """

    key_qdata: Tensor
    key_metadata: Tensor
    value_qdata: Tensor
    value_metadata: Tensor

    @classmethod
    def allocate(cls, capacity: int, key_states: Tensor, value_states: Tensor) -> "Segment":
        """An uninitialised segment for states shaped like (batch, num_kv_heads, any, head_dim)."""
        batch, num_kv_heads, _, head_dim = key_states.shape
        rows, device = (capacity, batch, num_kv_heads), key_states.device

        def memory(dtype: torch.dtype, *tail: int) -> Tensor:
            return torch.empty(*rows, *tail, dtype=dtype, device=device)

        return cls(
            memory(torch.int8, PAGE_SIZE, head_dim),
            memory(torch.int16, head_dim, 2),
            memory(torch.int8, PAGE_SIZE, value_states.shape[-1]),
            memory(torch.int16, PAGE_SIZE, 2),
        )

    @property
    def capacity(self) -> int:
        """Pages that fit."""
        return self.key_qdata.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes allocated, used or not."""
        return sum(part.nbytes for part in self)

    def narrow(self, start: int, stop: int | None) -> "Segment":
        """The pages ``start`` to ``stop`` (None: the end), sharing memory; the segment itself if that is all of it."""
        if start == 0 and stop in (None, self.capacity):
            return self
        return Segment(*(part[start:stop] for part in self))


@dataclass(frozen=True, eq=False)
class ClosedPages:
    """Closed pages, as the operations take them; made once and shared by the views until the pages change."""

    segments: tuple[Segment, ...]

    @cached_property
    def num_pages(self) -> int:
        """Pages in all segments."""
        return sum(segment.capacity for segment in self.segments)

    @cached_property
    def key_parts(self) -> tuple[ops.Parts, ops.Parts]:
        """Codes and metadata of the keys, a tensor a segment."""
        return ops.Parts(s.key_qdata for s in self.segments), ops.Parts(s.key_metadata for s in self.segments)

    @cached_property
    def value_parts(self) -> tuple[ops.Parts, ops.Parts]:
        """Codes and metadata of the values, a tensor a segment."""
        return ops.Parts(s.value_qdata for s in self.segments), ops.Parts(s.value_metadata for s in self.segments)


class PagesView:
    """What one attention call reads: closed pages, then the tail.

    It shares memory with the cache. Appending leaves it valid; a crop followed by an append writes over its tail.

    The newest tokens may not be written yet: one launch of a kernel writes and reads them, which saves a decode step
    another. Everything else that needs them has them written first.

    Attributes:
        closed: the closed pages, without slack.
        backend: what ``dispatch.backend_for`` says of it, where it has been asked.
        pending: the newest keys and values, if they are to be written into the buffers; else None.
    """

    __slots__ = ("_buffers", "_tail_len", "backend", "closed", "pending")

    def __init__(
        self,
        closed: ClosedPages,
        key_tail: Tensor,
        value_tail: Tensor,
        backend: tuple[str, str | None] | None = None,
        tail_len: int | None = None,
        pending: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """A view of ``tail_len`` tokens at the front of the buffers ``key_tail`` and ``value_tail``, all if None."""
        self.closed = closed
        self.backend = backend
        self.pending = pending
        self._buffers = key_tail, value_tail
        self._tail_len = key_tail.shape[2] if tail_len is None else tail_len

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The closed pages, without slack."""
        return self.closed.segments

    @property
    def num_pages(self) -> int:
        """Closed pages in the view."""
        return self.closed.num_pages

    @property
    def tail_len(self) -> int:
        """Tokens in the tail."""
        return self._tail_len

    @property
    def seq_len(self) -> int:
        """Tokens in the view."""
        return self.closed.num_pages * PAGE_SIZE + self._tail_len

    @property
    def key_tail(self) -> Tensor:
        """Exact keys behind the closed pages, (batch, num_kv_heads, tail_len, head_dim)."""
        self.write_pending()
        return self._buffers[0].narrow(2, 0, self._tail_len)

    @property
    def value_tail(self) -> Tensor:
        """Exact values behind the closed pages, (batch, num_kv_heads, tail_len, v_head_dim)."""
        self.write_pending()
        return self._buffers[1].narrow(2, 0, self._tail_len)

    def state_shape(self, is_key: bool) -> tuple[int, int, int, int]:
        """(batch, num_kv_heads, seq_len, head_dim) of the keys, or of the values."""
        batch, num_kv_heads, _, head_dim = self._buffers[0 if is_key else 1].shape
        return batch, num_kv_heads, self.closed.num_pages * PAGE_SIZE + self._tail_len, head_dim

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype."""
        return self._buffers[0].dtype

    @property
    def device(self) -> torch.device:
        """Where the tail is, and the pages when they are read."""
        return self._buffers[0].device

    def write_pending(self) -> None:
        """Write the newest tokens into the buffers, if they are not there yet."""
        if self.pending is not None:
            (key_states, value_states), self.pending = self.pending, None
            start = self._tail_len - key_states.shape[2]
            ops.append_tail(key_states, value_states, *self._buffers, start, self.backend and self.backend[0])

    def shows(self, other: "PagesView") -> bool:
        """Whether ``other`` is of the same tokens in the same memory, as keys and values read one by one are."""
        return self is other or (
            self.closed is other.closed
            and _same_memory(self.key_tail, other.key_tail)
            and _same_memory(self.value_tail, other.value_tail)
        )

    def restore_keys(self) -> Tensor:
        """(batch, num_kv_heads, seq_len, head_dim) in the model's dtype."""
        return ops.restore_keys(*self.closed.key_parts, self.key_tail) if self.segments else self.key_tail

    def restore_values(self) -> Tensor:
        """(batch, num_kv_heads, seq_len, v_head_dim) in the model's dtype."""
        return ops.restore_values(*self.closed.value_parts, self.value_tail) if self.segments else self.value_tail

    def attention(self, query: Tensor, options: AttentionOptions = PLAIN) -> Tensor:
        """``ops.attention`` over this view."""
        parts = (*self.closed.key_parts, *self.closed.value_parts)
        backend = self.backend and self.backend[0]
        if self.pending is not None and ops.is_plain(query) and not (query.requires_grad and torch.is_grad_enabled()):
            output = ops.write_and_attend(
                query, self.pending, *parts, *self._buffers, self._tail_len, backend or "", options
            )
            self.pending = None
            return output
        return ops.attention(query, *parts, self.key_tail, self.value_tail, options, backend)

    def __getstate__(self) -> tuple[object, ...]:
        """A copy or a pickle is of the tokens there are, without slack."""
        return self.closed, self.key_tail.clone(), self.value_tail.clone(), self.backend

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__(*state)  # type: ignore[misc]


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape
