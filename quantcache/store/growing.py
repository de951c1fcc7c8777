"""``Int8Pages``: the bytes of one layer, and every operation on them.

Pages live in segments that are allocated whole and never copied again; the tail is a small buffer of the newest tokens
in the model's dtype. Nothing here knows about transformers.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from quantcache.backends import dispatch
from quantcache.quantization.scheme import DEFAULT_RESIDUAL_LENGTH, PAGE_SIZE, SEGMENT_GROWTH, TAIL_STEP
from quantcache.store import ops
from quantcache.store.offloading import HostCopy, write_access
from quantcache.store.segments import ClosedPages, PagesView, Segment

__all__ = ["Int8Pages", "PagesView", "Segment"]


class Int8Pages:
    """The keys and values of one layer: closed int8 pages and an exact tail.

    A page is closed at the end of the first ``append`` after which at least ``residual_length`` newer tokens exist, so
    what is stored depends on the tokens and not on how they were cut into calls.

    Args:
        key_states: (batch, num_kv_heads, any, head_dim); fixes shapes, dtype and device, nothing is stored of it.
        value_states: (batch, num_kv_heads, any, v_head_dim).
        residual_length: newer tokens a page waits for, at least 0.
        reach: how many of the newest tokens must be kept, None for all. Older pages are let go, a segment at a time,
            whenever a page is closed, unless ``keeps_past`` is set.
        first_page: pages that came before the first token and are let go already.
    """

    reader: str | None = None
    """The backend that attention takes; None for the best there is. Set it before anything is stored."""

    def __init__(
        self,
        key_states: Tensor,
        value_states: Tensor,
        residual_length: int = DEFAULT_RESIDUAL_LENGTH,
        reach: int | None = None,
        first_page: int = 0,
    ) -> None:
        self.residual_length = residual_length
        self.reach, self.keeps_past = reach, False
        self._closes_at = PAGE_SIZE + residual_length
        self._segments: list[Segment] = []
        # Pages let go, all older than those held; pages held.
        self._first_page, self._num_pages = first_page, 0
        # Buffers of the tail; the first _tail_len tokens count.
        self._key_tail = key_states[:, :, :0].detach().clone()
        self._value_tail = value_states[:, :, :0].detach().clone()
        self._tail_len = 0
        # The view whose newest tokens may not be in the buffers yet.
        self._newest: PagesView | None = None
        # What the views share: narrowing a segment takes as long as copying a token. None when the pages have changed.
        self._closed: ClosedPages | None = None
        # What dispatch.backend_for says; asked once, since asking takes as long as a launch.
        self._backend: tuple[str, str | None] | None = None
        # Twins of the segments in host memory, if pages were ever evicted; whether the segments are there alone; what
        # to wait for before they are read, while they are on the way back.
        self._host: HostCopy | None = None
        self._is_evicted = False
        self._arrival: torch.Event | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What is stored and nothing else, in memory of its own: no slack, no device address, no twin."""
        stored = self.stored()
        return vars(self) | {
            "_segments": [Segment(*(part.clone() for part in segment)) for segment in stored.segments],
            "_key_tail": self.key_tail.clone(),
            "_value_tail": self.value_tail.clone(),
            "_newest": None,
            "_closed": None,
            "_backend": None,
            "_host": None,
            "_arrival": None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._is_evicted:
            self._host, self._segments = HostCopy(self._segments, self._num_pages), []

    def __deepcopy__(self, memo: dict[int, Any]) -> "Int8Pages":
        copied = memo[id(self)] = Int8Pages.__new__(Int8Pages)
        copied.__setstate__(self.__getstate__())
        return copied

    def stored(self) -> PagesView:
        """As ``view``, but closed pages that were evicted are those in host memory; nothing moves. For copying."""
        segments = self._segments
        if self._is_evicted:
            assert self._host is not None
            if self.device.type != "cpu":
                torch.accelerator.synchronize(self.device)  # the last pages may be on their way
            segments = self._host.segments
        else:
            self._arrive()
        return PagesView(_pages_of(segments, 0, self._num_pages), self.key_tail, self.value_tail)

    def fill(self, closed: Segment | None, key_tail: Tensor, value_tail: Tensor, first_page: int = 0) -> None:
        """Take over what ``stored`` gave of other pages; these must be empty.

        Args:
            closed: the pages, without slack; kept, unless pages are let go here, for which they are cut and copied.
            key_tail: exact keys behind them; copied.
            value_tail: exact values.
            first_page: pages let go before.
        """
        self._segments, self._num_pages, self._first_page = [], 0, first_page
        if closed is not None:
            self._num_pages = closed.capacity
            self._segments = [closed]
            if self.reach is not None:
                size = max(self.reach // PAGE_SIZE // SEGMENT_GROWTH, 1)
                cut = (closed.narrow(start, start + size) for start in range(0, closed.capacity, size))
                self._segments = [Segment(*(part.clone() for part in segment)) for segment in cut]
        self._key_tail, self._value_tail = _copied(key_tail, value_tail)
        self._tail_len, self._closed = key_tail.shape[2], None

    @property
    def backend(self) -> tuple[str, str | None]:
        """``dispatch.backend_for`` the states; the first question for a CPU builds its kernels."""
        if self._backend is None:
            chosen = self.reader and (self.reader, None)
            self._backend = chosen or dispatch.backend_for(self._key_tail, self._value_tail)
        return self._backend

    @property
    def seq_len(self) -> int:
        """Tokens stored so far, those let go included."""
        return (self._first_page + self._num_pages) * PAGE_SIZE + self._tail_len

    @property
    def first_page(self) -> int:
        """Pages let go; the first token held is ``first_page * page_size``."""
        return self._first_page

    @property
    def num_pages(self) -> int:
        """Closed pages held."""
        return self._num_pages

    @property
    def is_evicted(self) -> bool:
        """Whether the closed pages are in host memory alone."""
        return self._is_evicted

    @property
    def is_empty(self) -> bool:
        """Whether no token is held."""
        return not self._num_pages and not self._tail_len

    @property
    def key_tail(self) -> Tensor:
        """Exact keys behind the closed pages, (batch, num_kv_heads, tail_len, head_dim)."""
        self._write_pending()
        return self._key_tail[:, :, : self._tail_len]

    @property
    def value_tail(self) -> Tensor:
        """Exact values behind the closed pages, (batch, num_kv_heads, tail_len, v_head_dim)."""
        self._write_pending()
        return self._value_tail[:, :, : self._tail_len]

    @property
    def segments(self) -> tuple[Segment, ...]:
        """All segments, slack included."""
        self._arrive()
        return tuple(self._segments)

    @property
    def nbytes(self) -> int:
        """Bytes allocated: codes, metadata, tail, their slack, and twins in host memory."""
        held = sum(s.nbytes for s in self._segments) + self._key_tail.nbytes + self._value_tail.nbytes
        return held + (self._host.nbytes if self._host is not None else 0)

    @property
    def batch_size(self) -> int:
        """Sequences stored."""
        return self._key_tail.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the tail is, and the pages when they are read."""
        return self._key_tail.device

    def view(self) -> PagesView:
        """All tokens held, for reading."""
        return self._view_with(self.key_tail, self.value_tail)

    def append(self, key_states: Tensor, value_states: Tensor) -> PagesView:
        """Store new tokens and return what their queries read.

        In the view the pages that this call closes are still exact, so a chunk always sees itself unquantised, and the
        pages that it lets go are still there. The tail of the view of an empty layer is the arguments themselves.

        Args:
            key_states: (batch, num_kv_heads, query_len, head_dim), shapes, dtype and device as at construction.
            value_states: (batch, num_kv_heads, query_len, v_head_dim).
        """
        if key_states.requires_grad or value_states.requires_grad:
            key_states, value_states = key_states.detach(), value_states.detach()
        total = self._tail_len + key_states.shape[2]
        if self._num_pages and total < self._closes_at:
            return self._append_to_tail(key_states, value_states, total)
        self._write_pending()
        self._arrive()
        closing = max(0, (total - self.residual_length) // PAGE_SIZE)
        is_empty = self.is_empty

        if is_empty:
            key_tail, value_tail = key_states, value_states
            key_buffer, value_buffer = key_states, value_states
        else:
            key_buffer, value_buffer = self._buffers_for(total)
            _write(key_states, value_states, key_buffer, value_buffer, self._tail_len, self._append_backend)
            key_tail, value_tail = key_buffer.narrow(2, 0, total), value_buffer.narrow(2, 0, total)
        view = self._view_with(key_tail, value_tail)

        skipped = min(max(self._oldest_needed(key_states.shape[2]) - self._num_pages, 0), closing)
        new_segments = self._close(key_tail, value_tail, skipped, closing) if closing else []
        if closing or is_empty:
            # The rest moves to a buffer of its own: the caller's tensors and a long chunk's buffer are let go.
            start = closing * PAGE_SIZE
            key_buffer, value_buffer = _copied(key_tail[:, :, start:], value_tail[:, :, start:], self._append_backend)
        # Nothing above changed what is stored, so an append that fails for lack of memory leaves the layer as it was.
        if skipped:
            self._first_page += self._num_pages + skipped
            self._segments, self._num_pages, self._host = [], 0, None
        self._segments += new_segments
        self._key_tail, self._value_tail = key_buffer, value_buffer
        self._num_pages += closing - skipped
        self._tail_len = total - closing * PAGE_SIZE
        if closing:
            self._closed = None
            self.let_go()
        return view

    def _append_to_tail(self, key_states: Tensor, value_states: Tensor, total: int) -> PagesView:
        """``append`` where nothing but the tail grows, to ``total`` tokens: what a decode step does, in a few calls."""
        closed, backend = self._closed or self._make_closed(), self.backend
        self._write_pending()
        buffers = self._key_tail, self._value_tail = self._buffers_for(total)
        pending = None
        if backend[0] in dispatch.WRITE_ON_READ:
            pending = key_states, value_states
        else:
            _write(key_states, value_states, *buffers, self._tail_len, self._append_backend)
        view = PagesView(closed, *buffers, backend, total, pending)
        self._newest, self._tail_len = view if pending else None, total
        return view

    def _buffers_for(self, total: int) -> tuple[Tensor, Tensor]:
        """The tail's buffers, or larger ones with the same tokens if ``total`` do not fit."""
        buffers = self._key_tail, self._value_tail
        if total > buffers[0].shape[2]:
            return _roomier(*buffers, self._tail_len, total, self._append_backend)
        return buffers

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens.

        A page that loses some of its tokens is reopened: the restored values of the rest become the tail.

        Args:
            tokens_to_remove: from 0 to the number of tokens held.
        """
        self._write_pending()
        seq_len = self._num_pages * PAGE_SIZE + self._tail_len - tokens_to_remove
        pages, rest = divmod(seq_len, PAGE_SIZE)
        if pages >= self._num_pages:
            self._tail_len = seq_len - self._num_pages * PAGE_SIZE
            return
        # The tail is restored before any page is let go.
        was_evicted = self._is_evicted
        self._arrive()
        reopened = self._view_pages(pages, pages + 1)
        key_states, value_states = reopened.restore_keys(), reopened.restore_values()
        self._key_tail, self._value_tail = _copied(key_states[:, :, :rest], value_states[:, :, :rest])
        self._tail_len = rest
        self._num_pages, self._closed = pages, None
        while self._segments and sum(s.capacity for s in self._segments[:-1]) >= pages:
            self._segments.pop()
        if self._host is not None:
            self._host.crop(len(self._segments), pages)
        if was_evicted:
            self.evict()

    def let_go(self) -> None:
        """Free the segments that lie wholly before the newest ``reach`` tokens. Views that exist keep theirs."""
        needed, pages, segments = self._oldest_needed(0), 0, 0
        if needed <= 0:
            return
        self._arrive()
        while segments < len(self._segments) and pages + self._segments[segments].capacity <= needed:
            pages, segments = pages + self._segments[segments].capacity, segments + 1
        if segments:
            self._segments, self._closed = self._segments[segments:], None
            self._first_page, self._num_pages = self._first_page + pages, self._num_pages - pages
            if self._host is not None:
                self._host.forget(segments, pages)

    def index_select(self, indices: Tensor) -> None:
        """Take the sequences ``indices`` (1-D, int64 or bool) of the batch, in that order, byte for byte."""
        self._write_pending()
        was_evicted = self._is_evicted
        self._arrive()
        indices = indices.to(self.device)
        segments = [Segment(*(part[:, indices] for part in segment)) for segment in self._segments]
        tails = self._key_tail[indices], self._value_tail[indices]
        self._segments, (self._key_tail, self._value_tail), self._closed = segments, tails, None
        self._host = None
        if was_evicted:
            self.evict()  # else beam search would bring every layer back

    def repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence of the batch ``repeats`` times, copies side by side."""
        self.index_select(torch.arange(self.batch_size, device=self.device).repeat_interleave(repeats))

    def evict(self) -> None:
        """Keep the closed pages in host memory alone; the tail stays. Views that exist keep their pages."""
        if not self._is_evicted:
            self._arrive()
            self._host = self._host or HostCopy()
            self._host.save(self._segments, self._num_pages)
            self._segments, self._closed, self._is_evicted = [], None, True

    def fetch(self, stream: torch.cuda.Stream | None = None) -> None:
        """Begin to bring evicted pages back, on ``stream`` if there is one; what reads them waits for them."""
        if self._is_evicted:
            assert self._host is not None
            self._segments, self._arrival = self._host.load(self.device, stream)
            self._is_evicted = False

    def restore(self) -> tuple[Tensor, Tensor]:
        """Keys and values held, dense, in the model's dtype; see ``PagesView``."""
        view = self.view()
        return view.restore_keys(), view.restore_values()

    @property
    def _append_backend(self) -> str:
        """Writing a few tokens is no work for the CPU kernels, which need not be built for it."""
        return "torch" if self._key_tail.device.type == "cpu" else self.backend[0]

    def _write_pending(self) -> None:
        """Have the newest tokens in the buffers of the tail."""
        if self._newest is not None:
            self._newest.write_pending()
            self._newest = None

    def _arrive(self) -> None:
        """Have the pages on the device, in the order of the current stream."""
        self.fetch()
        if self._arrival is not None:
            torch.cuda.current_stream(self.device).wait_event(self._arrival)
            self._arrival = None

    def _oldest_needed(self, new_tokens: int) -> int:
        """Pages, from the first one held, that are out of reach once ``new_tokens`` more are stored."""
        if self.reach is None or self.keeps_past:
            return 0
        return max(self.seq_len + new_tokens - self.reach, 0) // PAGE_SIZE - self._first_page

    def _view_with(self, key_tail: Tensor, value_tail: Tensor) -> PagesView:
        closed = self._closed or self._make_closed()
        return PagesView(closed, key_tail, value_tail, self.backend if closed.segments else None)

    def _make_closed(self) -> ClosedPages:
        """The pages held, which the views share until they change."""
        self._arrive()
        self._closed = _pages_of(self._segments, 0, self._num_pages)
        return self._closed

    def _view_pages(self, start: int, stop: int) -> PagesView:
        """The pages ``start`` to ``stop`` of those held, with an empty tail."""
        return PagesView(_pages_of(self._segments, start, stop), self._key_tail[:, :, :0], self._value_tail[:, :, :0])

    def _close(self, key_tail: Tensor, value_tail: Tensor, skipped: int, closing: int) -> list[Segment]:
        """Write the pages ``skipped`` to ``closing`` of the tail: behind those held, or, if some are skipped, alone.

        Returns:
            The segments that had to be made for them, not yet in the list.
        """
        room = 0 if skipped else sum(s.capacity for s in self._segments) - self._num_pages
        targets = [] if not room else [self._segments[-1].narrow(self._segments[-1].capacity - room, None)]
        new_segments = []
        missing = closing - skipped - room
        while missing > 0:
            if self.reach is None:
                capacity = max(missing, self._num_pages // SEGMENT_GROWTH)
            else:  # of one size, so that the memory of one that is let go serves the next
                capacity = max(self.reach // PAGE_SIZE // SEGMENT_GROWTH, 1)
            new_segments.append(Segment.allocate(capacity, key_tail, value_tail))
            missing -= capacity
        page, backend = skipped, None if self.reader else self.backend[0]
        for target in targets + new_segments:
            stop = min(page + target.capacity, closing)
            tokens = slice(page * PAGE_SIZE, stop * PAGE_SIZE)
            with write_access(target.key_qdata):
                states = key_tail[:, :, tokens], value_tail[:, :, tokens]
                ops.store_pages(*states, *target.narrow(0, stop - page), backend)
            page = stop
        return new_segments


def _pages_of(segments: Iterable[Segment], start: int, stop: int) -> ClosedPages:
    """The pages ``start`` to ``stop``, sharing memory."""
    narrowed, first = [], 0
    for segment in segments:
        low, high = max(start - first, 0), min(stop - first, segment.capacity)
        if low < high:
            narrowed.append(segment.narrow(low, high))
        first += segment.capacity
    return ClosedPages(tuple(narrowed))


def _write(
    key_states: Tensor, value_states: Tensor, key_buffer: Tensor, value_buffer: Tensor, used: int, backend: str
) -> None:
    """Write new tokens behind the first ``used`` of the buffers."""
    with write_access(key_buffer):
        ops.append_tail(key_states, value_states, key_buffer, value_buffer, used, backend)


def _roomier(key_buffer: Tensor, value_buffer: Tensor, used: int, tokens: int, backend: str) -> tuple[Tensor, Tensor]:
    """Larger buffers, for at least ``tokens`` tokens, that begin with the first ``used`` of these."""
    capacity = -(-tokens // TAIL_STEP) * TAIL_STEP
    key_made, value_made = (
        buffer.new_empty(*buffer.shape[:2], capacity, buffer.shape[3]) for buffer in (key_buffer, value_buffer)
    )
    if used:
        ops.append_tail(key_buffer[:, :, :used], value_buffer[:, :, :used], key_made, value_made, 0, backend)
    return key_made, value_made


def _copied(key_states: Tensor, value_states: Tensor, backend: str = "torch") -> tuple[Tensor, Tensor]:
    """Buffers of their own for some tokens."""
    tokens = key_states.shape[2]
    return _roomier(key_states, value_states, tokens, tokens, backend)
