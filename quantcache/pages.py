"""``Int8Pages``: the bytes of one layer, and every operation on them.

Pages live in segments that are allocated whole and never copied again; the tail is a small buffer of the newest tokens
in the model's dtype. Nothing here knows about transformers.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple

import torch
from torch import Tensor

from quantcache import ops
from quantcache.scheme import DEFAULT_RESIDUAL_LENGTH, PAGE_SIZE

TAIL_STEP: Final = 16
"""Tokens by which the tail's buffer grows: one small allocation in 16 steps, at most 15 unused tokens."""

SEGMENT_GROWTH: Final = 16
"""A new segment holds one sixteenth of the pages there are, at least one, so slack stays under 1/16 of the pages.
Two pages at least would put a head_dim of 128 above 0.55 of bfloat16 at 2048 tokens."""


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
        """The pages ``start`` to ``stop`` (None: the end), sharing memory."""
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


@dataclass(eq=False)
class PagesView:
    """What one attention call reads: closed pages, then the tail.

    It shares memory with the cache. Appending leaves it valid; a crop followed by an append writes over its tail.
    """

    closed: ClosedPages
    key_tail: Tensor
    value_tail: Tensor
    backend: tuple[str, str | None] | None = None
    """What ``ops.backend_for`` says of it, where it has been asked."""

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The closed pages, without slack."""
        return self.closed.segments

    @property
    def num_pages(self) -> int:
        """Closed pages in the view."""
        return self.closed.num_pages

    @property
    def seq_len(self) -> int:
        """Tokens in the view."""
        return self.closed.num_pages * PAGE_SIZE + self.key_tail.shape[2]

    def restore_keys(self) -> Tensor:
        """(batch, num_kv_heads, seq_len, head_dim) in the model's dtype."""
        return ops.restore_keys(*self.closed.key_parts, self.key_tail) if self.segments else self.key_tail

    def restore_values(self) -> Tensor:
        """(batch, num_kv_heads, seq_len, v_head_dim) in the model's dtype."""
        return ops.restore_values(*self.closed.value_parts, self.value_tail) if self.segments else self.value_tail

    def attention(
        self,
        query: Tensor,
        *,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        softmax_scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """``ops.attention`` over this view."""
        return ops.attention(
            query,
            *self.closed.key_parts,
            *self.closed.value_parts,
            self.key_tail,
            self.value_tail,
            attn_mask=attn_mask,
            is_causal=is_causal,
            softmax_scale=softmax_scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
        )


class Int8Pages:
    """The keys and values of one layer: closed int8 pages and an exact tail.

    A page is closed at the end of the first ``append`` after which at least ``residual_length`` newer tokens exist, so
    what is stored depends on the tokens and not on how they were cut into calls.

    Args:
        key_states: (batch, num_kv_heads, any, head_dim); fixes shapes, dtype and device, nothing is stored of it.
        value_states: (batch, num_kv_heads, any, v_head_dim).
        residual_length: newer tokens a page waits for, at least 0.
    """

    def __init__(
        self, key_states: Tensor, value_states: Tensor, residual_length: int = DEFAULT_RESIDUAL_LENGTH
    ) -> None:
        self.residual_length = residual_length
        self._closes_at = PAGE_SIZE + residual_length
        self._segments: list[Segment] = []
        self._num_pages = 0
        # Buffers of the tail; the first _tail_len tokens count.
        self._key_tail = key_states[:, :, :0].detach().clone()
        self._value_tail = value_states[:, :, :0].detach().clone()
        self._tail_len = 0
        # What the views share: narrowing a segment takes as long as copying a token. None when the pages have changed.
        self._closed: ClosedPages | None = None
        # What ops.backend_for says; asked once, since asking takes as long as a launch.
        self._backend: tuple[str, str | None] | None = None

    @classmethod
    def of_parts(
        cls, segments: list[Segment], key_tail: Tensor, value_tail: Tensor, residual_length: int
    ) -> "Int8Pages":
        """Pages from what ``view`` gives: full segments, and a tail that is copied."""
        made = cls(key_tail, value_tail, residual_length)
        made._segments, made._num_pages = list(segments), sum(segment.capacity for segment in segments)
        made._key_tail, made._value_tail = _copied(key_tail, value_tail)
        made._tail_len = key_tail.shape[2]
        return made

    @property
    def backend(self) -> tuple[str, str | None]:
        """``ops.backend_for`` the states; the first question for a CPU builds its kernels."""
        if self._backend is None:
            self._backend = ops.backend_for(self._key_tail, self._value_tail)
        return self._backend

    @property
    def seq_len(self) -> int:
        """Tokens stored."""
        return self._num_pages * PAGE_SIZE + self._tail_len

    @property
    def num_pages(self) -> int:
        """Closed pages."""
        return self._num_pages

    @property
    def key_tail(self) -> Tensor:
        """Exact keys behind the closed pages, (batch, num_kv_heads, tail_len, head_dim)."""
        return self._key_tail[:, :, : self._tail_len]

    @property
    def value_tail(self) -> Tensor:
        """Exact values behind the closed pages, (batch, num_kv_heads, tail_len, v_head_dim)."""
        return self._value_tail[:, :, : self._tail_len]

    @property
    def segments(self) -> tuple[Segment, ...]:
        """All segments, slack included."""
        return tuple(self._segments)

    @property
    def nbytes(self) -> int:
        """Bytes allocated: codes, metadata, tail, and their slack."""
        return sum(s.nbytes for s in self._segments) + self._key_tail.nbytes + self._value_tail.nbytes

    @property
    def batch_size(self) -> int:
        """Sequences stored."""
        return self._key_tail.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the bytes are."""
        return self._key_tail.device

    def view(self) -> PagesView:
        """All tokens stored, for reading."""
        return self._view_with(self.key_tail, self.value_tail)

    def append(self, key_states: Tensor, value_states: Tensor) -> PagesView:
        """Store new tokens and return what their queries read.

        In the view the pages that this call closes are still exact, so a chunk always sees itself unquantised. The
        tail of the view of an empty layer is the arguments themselves.

        Args:
            key_states: (batch, num_kv_heads, query_len, head_dim), shapes, dtype and device as at construction.
            value_states: (batch, num_kv_heads, query_len, v_head_dim).
        """
        if key_states.requires_grad or value_states.requires_grad:
            key_states, value_states = key_states.detach(), value_states.detach()
        total = self._tail_len + key_states.shape[2]
        closed, key_buffer, value_buffer = self._closed, self._key_tail, self._value_tail
        if closed is not None and closed.segments and total <= key_buffer.shape[2] and total < self._closes_at:
            # Nothing but the tail grows: what a decode step does, in a few calls.
            if key_buffer.is_inference():
                with _write_access(key_buffer):
                    ops.append_tail(
                        key_states, value_states, key_buffer, value_buffer, self._tail_len, self._append_backend
                    )
            else:
                ops.append_tail(
                    key_states, value_states, key_buffer, value_buffer, self._tail_len, self._append_backend
                )
            self._tail_len = total
            return PagesView(closed, key_buffer.narrow(2, 0, total), value_buffer.narrow(2, 0, total), self._backend)
        closing = max(0, (total - self.residual_length) // PAGE_SIZE)
        is_empty = self.seq_len == 0

        if is_empty:
            key_tail, value_tail = key_states, value_states
            key_buffer, value_buffer = key_states, value_states
        else:
            key_buffer, value_buffer = _extended(
                self._key_tail, self._value_tail, self._tail_len, key_states, value_states, self._append_backend
            )
            key_tail, value_tail = key_buffer.narrow(2, 0, total), value_buffer.narrow(2, 0, total)
        view = self._view_with(key_tail, value_tail)

        new_segment = self._close(key_tail, value_tail, closing) if closing else None
        if closing or is_empty:
            # The rest moves to a buffer of its own: the caller's tensors and a long chunk's buffer are let go.
            start = closing * PAGE_SIZE
            key_buffer, value_buffer = _copied(key_tail[:, :, start:], value_tail[:, :, start:], self._append_backend)
        # Nothing above changed what is stored, so an append that fails for lack of memory leaves the layer as it was.
        if new_segment is not None:
            self._segments.append(new_segment)
        self._key_tail, self._value_tail = key_buffer, value_buffer
        self._num_pages += closing
        if closing:
            self._closed = None
        self._tail_len = total - closing * PAGE_SIZE
        return view

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens.

        A page that loses some of its tokens is reopened: the restored values of the rest become the tail.

        Args:
            tokens_to_remove: from 0 to ``seq_len``.
        """
        seq_len = self.seq_len - tokens_to_remove
        pages, rest = divmod(seq_len, PAGE_SIZE)
        if pages >= self._num_pages:
            self._tail_len = seq_len - self._num_pages * PAGE_SIZE
            return
        # The tail is restored before any page is let go.
        reopened = self._view_pages(pages, pages + 1)
        key_states, value_states = reopened.restore_keys(), reopened.restore_values()
        self._key_tail, self._value_tail = _copied(key_states[:, :, :rest], value_states[:, :, :rest])
        self._tail_len = rest
        self._num_pages, self._closed = pages, None
        while self._segments and sum(s.capacity for s in self._segments[:-1]) >= pages:
            self._segments.pop()

    def index_select(self, indices: Tensor) -> None:
        """Take the sequences ``indices`` (1-D, int64 or bool) of the batch, in that order, byte for byte."""
        indices = indices.to(self.device)
        segments = [Segment(*(part[:, indices] for part in segment)) for segment in self._segments]
        tails = self._key_tail[indices], self._value_tail[indices]
        self._segments, (self._key_tail, self._value_tail), self._closed = segments, tails, None

    def repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence of the batch ``repeats`` times, copies side by side."""
        self.index_select(torch.arange(self.batch_size, device=self.device).repeat_interleave(repeats))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> None:
        """Move the bytes to ``device``."""
        segments = [Segment(*(p.to(device, non_blocking=non_blocking) for p in s)) for s in self._segments]
        tails = (t.to(device, non_blocking=non_blocking) for t in (self._key_tail, self._value_tail))
        self._segments, (self._key_tail, self._value_tail), self._closed = segments, tails, None
        self._backend = None

    def restore(self) -> tuple[Tensor, Tensor]:
        """Keys and values, dense, in the model's dtype; see ``PagesView``."""
        view = self.view()
        return view.restore_keys(), view.restore_values()

    @property
    def _append_backend(self) -> str:
        """Writing a few tokens is no work for the CPU kernels, which need not be built for it."""
        return "torch" if self._key_tail.device.type == "cpu" else self.backend[0]

    def _view_with(self, key_tail: Tensor, value_tail: Tensor) -> PagesView:
        if self._closed is None:
            self._closed = self._view_pages(0, self._num_pages).closed
        return PagesView(self._closed, key_tail, value_tail, self.backend if self._closed.segments else None)

    def _view_pages(self, start: int, stop: int) -> PagesView:
        """The closed pages ``start`` to ``stop``, with an empty tail."""
        narrowed, first = [], 0
        for segment in self._segments:
            low, high = max(start - first, 0), min(stop - first, segment.capacity)
            if low < high:
                narrowed.append(segment.narrow(low, high))
            first += segment.capacity
        return PagesView(ClosedPages(tuple(narrowed)), self._key_tail[:, :, :0], self._value_tail[:, :, :0])

    def _close(self, key_tail: Tensor, value_tail: Tensor, num_pages: int) -> Segment | None:
        """Write the first ``num_pages`` pages of the tail behind the closed ones.

        Returns:
            The segment that had to be made for them, not yet in the list.
        """
        room = sum(s.capacity for s in self._segments) - self._num_pages
        targets = [] if not room else [self._segments[-1].narrow(self._segments[-1].capacity - room, None)]
        new_segment = None
        if room < num_pages:
            growth = max(num_pages - room, self._num_pages // SEGMENT_GROWTH)
            new_segment = Segment.allocate(growth, key_tail, value_tail)
            targets.append(new_segment)
        page = 0
        for target in targets:
            stop = min(page + target.capacity, num_pages)
            tokens = slice(page * PAGE_SIZE, stop * PAGE_SIZE)
            with _write_access(target.key_qdata):
                ops.store_pages(key_tail[:, :, tokens], value_tail[:, :, tokens], *target.narrow(0, stop - page))
            page = stop
        return new_segment


def _extended(
    key_buffer: Tensor,
    value_buffer: Tensor,
    used: int,
    key_states: Tensor,
    value_states: Tensor,
    backend: str = "torch",
) -> tuple[Tensor, Tensor]:
    """The buffers with new tokens written behind their first ``used``, in place if they have room."""
    total = used + key_states.shape[2]
    if total > key_buffer.shape[2]:
        old = key_buffer[:, :, :used], value_buffer[:, :, :used]
        key_buffer, value_buffer = _roomier(key_buffer, total), _roomier(value_buffer, total)
        if used:
            ops.append_tail(*old, key_buffer, value_buffer, 0, backend)
    if key_buffer.is_inference():
        with _write_access(key_buffer):
            ops.append_tail(key_states, value_states, key_buffer, value_buffer, used, backend)
    else:
        ops.append_tail(key_states, value_states, key_buffer, value_buffer, used, backend)
    return key_buffer, value_buffer


def _copied(key_states: Tensor, value_states: Tensor, backend: str = "torch") -> tuple[Tensor, Tensor]:
    """Buffers of their own for some tokens."""
    return _extended(key_states[:, :, :0], value_states[:, :, :0], 0, key_states, value_states, backend)


def _roomier(buffer: Tensor, tokens: int) -> Tensor:
    """Memory shaped like ``buffer`` for at least ``tokens`` tokens."""
    capacity = -(-tokens // TAIL_STEP) * TAIL_STEP
    return buffer.new_empty(*buffer.shape[:2], capacity, buffer.shape[3])


def _write_access(memory: Tensor) -> AbstractContextManager[None]:
    """What a write into ``memory`` needs: tensors made in inference mode can only be written there."""
    if memory.is_inference() and not torch.is_inference_mode_enabled():
        return torch.inference_mode()
    return nullcontext()
