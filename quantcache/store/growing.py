"""``Int8Pages``: the bytes of one layer that grows, and every operation on them.

Pages live in segments that are allocated whole and never copied again; the tail is a small buffer of the newest tokens
in the model's dtype. Reordering the batch leaves the pages where they are and indexes a table of their rows. Nothing
here knows about transformers.

It is long since what an operation must leave as it was if it fails can only be seen where all of them stand.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quantcache.backends import dispatch
from quantcache.quantization.scheme import DEFAULT_RESIDUAL_LENGTH, PAGE_SIZE, SEGMENT_GROWTH, WINDOW_SEGMENTS
from quantcache.store import reads, writes
from quantcache.store.offloading import HostCopy, write_access
from quantcache.store.pages import Indices, Pages, as_selection, no_tokens
from quantcache.store.requantizing import requantized
from quantcache.store.segments import (
    ClosedPages,
    RowTable,
    Segment,
    drop_beyond,
    pages_between,
    room_in,
    sizes_until,
    without_room,
)
from quantcache.store.tail import LateTail, copied, roomier, write_tail
from quantcache.store.view import PagesView

LEAST_SHARE_READ = 0.5
"""Of the stored rows; where fewer are still read, pages are copied to give the memory back."""


class Int8Pages(Pages):
    """The keys and values of one layer, growing without a limit.

    A page is closed at the end of the first ``append`` after which at least ``residual_length`` newer tokens exist, so
    what is stored depends on the tokens and not on how they were cut into calls.

    Args:
        key_states: (batch, num_kv_heads, any, head_dim); fixes shapes, dtype and device, nothing is stored of it.
        value_states: (batch, num_kv_heads, any, v_head_dim).
        residual_length: newer tokens a page waits for, at least 0.
        keep_tokens: how many of the newest tokens must be kept, None for all. Older pages are dropped, a segment at a
            time, whenever a page is closed, unless ``keeps_past`` is set.
        first_page: pages that came before the first token and are dropped already.
    """

    reader: str | None = None
    """The backend that attention takes; None for the best there is. Set it before anything is stored."""

    def __init__(
        self,
        key_states: Tensor,
        value_states: Tensor,
        residual_length: int = DEFAULT_RESIDUAL_LENGTH,
        keep_tokens: int | None = None,
        first_page: int = 0,
    ) -> None:
        self.residual_length = residual_length
        self.keep_tokens, self.keeps_past = keep_tokens, False
        self._closes_at = PAGE_SIZE + residual_length
        self._segments: list[Segment] = []
        # Which stored row each sequence reads of the pages held; None: its own.
        self.row_table: RowTable | None = None
        # Pages dropped, all older than those held; pages held.
        self.first_page, self.num_pages = first_page, 0
        # Whether others may read the tail's buffers as well, and how many of the first pages held; see ``fork``.
        self._shares_tail, self._shared = False, 0
        # All tokens, those dropped included, in one number: a traced step computes with it, see ``traced``.
        self.seq_len = first_page * PAGE_SIZE
        # Buffers of the tail; the first tail_len tokens count. They may have to be gathered yet, see ``index_select``.
        self._tail: tuple[Tensor, Tensor] | LateTail = copied(*no_tokens(key_states.detach(), value_states.detach()))
        # The view whose newest tokens may not be in the buffers yet.
        self._newest: PagesView | None = None
        # What the views share: narrowing a segment takes as long as copying a token. None when the pages have changed.
        self._closed: ClosedPages | None = None
        # Copies of the segments in host memory, if pages were ever offloaded; whether the segments are there alone;
        # what to wait for before they are read, while they are on the way back.
        self._host: HostCopy | None = None
        self.is_offloaded = False
        self._arrival: torch.Event | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What is stored and nothing else, in memory of its own: no slack, no device address, no host copy."""
        return self._state(torch.clone, torch.clone)

    def _state(self, copy_page: Callable[[Tensor], Tensor], copy_tail: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """What is stored and nothing else, once parts of pages and tails are copied."""
        segments = without_room(self._readable_segments(), self.num_pages)
        return vars(self) | {
            "_segments": [Segment(*map(copy_page, segment)) for segment in segments],
            "_tail": (copy_tail(self.key_tail), copy_tail(self.value_tail)),
            "_shares_tail": False,
            "_shared": 0,
            "_newest": None,
            "_closed": None,
            "_backend": None,
            "_host": None,
            "_arrival": None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.is_offloaded:
            self._host, self._segments = HostCopy(self._segments, self.num_pages), []

    def __deepcopy__(self, memo: dict[int, Any]) -> "Int8Pages":
        copied = memo[id(self)] = Int8Pages.__new__(Int8Pages)
        copied.__setstate__(self.__getstate__())
        return copied

    def moved(self, device: torch.device) -> "Int8Pages":
        """See ``Pages.moved``."""
        stays_offloaded = self.is_offloaded and device.type != "cpu"
        for_pages = torch.device("cpu") if stays_offloaded else device
        state = self._state(*(functools.partial(_copy_to, device=place) for place in (for_pages, device)))
        made = Int8Pages.__new__(Int8Pages)
        made.__setstate__(state | {"is_offloaded": stays_offloaded})
        return made

    def fork(self) -> "Int8Pages":
        """The same tokens, to go on with alone: what is stored is shared, in host memory too.

        Neither writes where the other reads: tails are copied with the next token, and the room behind the closed pages
        stays that of this one. Memory goes with the last that holds it.
        """
        self._write_pending()
        if not self.is_offloaded:
            self._arrive()
        made = Int8Pages.__new__(Int8Pages)
        vars(made).update(vars(self))
        # Without slack, which stays the room of this one.
        made._segments = list(pages_between(self._segments, 0, self.num_pages))
        made._host = self._host and self._host.narrow(self.num_pages)
        made._shares_tail = self._shares_tail = True
        made._shared = self._shared = self.num_pages
        return made

    def stored(self, shares: bool = False) -> PagesView:
        """See ``Pages.stored``; nothing moves."""
        closed, table = without_room(self._readable_segments(), self.num_pages), None
        if self.row_table is not None and shares:
            table = self.row_table.on(torch.device("cpu"))
        elif self.row_table is not None:
            closed = tuple(self.row_table.select(closed))
        return PagesView(ClosedPages(closed, table), self.key_tail, self.value_tail)

    def _held(self) -> list[Segment]:
        """The segments where they are, in host memory too, whether or not they are all there yet."""
        return self._host.segments if self.is_offloaded and self._host is not None else self._segments

    def _readable_segments(self) -> list[Segment]:
        """The segments where they are, in host memory too, in the order of what reads them next."""
        if not self.is_offloaded:
            self._arrive()
            return self._segments
        assert self._host is not None
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)  # the last pages may be on their way
        return self._host.segments

    def fill(
        self,
        closed: list[Segment],
        key_tail: Tensor,
        value_tail: Tensor,
        first_page: int = 0,
        row_table: RowTable | None = None,
    ) -> None:
        """Take over what ``stored`` gave of other pages; these must be empty.

        Args:
            closed: the pages, without slack; kept, unless pages are dropped here, for which they are cut and copied.
            key_tail: exact keys behind them; copied.
            value_tail: exact values.
            first_page: pages dropped before.
            row_table: which row each sequence reads of them; None: its own.
        """
        if self.keep_tokens is not None:
            size = self._segment_capacity(1)
            closed = [
                segment.narrow(start, min(start + size, segment.capacity)).cloned()
                for segment in closed
                for start in range(0, segment.capacity, size)
            ]
        self._tail = copied(key_tail, value_tail)
        self._segments, self.num_pages = closed, sum(segment.capacity for segment in closed)
        self.first_page, self.row_table, self._closed, self._shared = first_page, row_table, None, 0
        self.seq_len = (first_page + self.num_pages) * PAGE_SIZE + key_tail.shape[2]

    @property
    def backend(self) -> tuple[str, str | None]:
        """See ``Pages.backend``; ``reader`` goes before."""
        if self._backend is None and self.reader:
            self._backend = self.reader, None
        return self._backend or super().backend

    @property
    def tail_len(self) -> int:  # type: ignore[override]
        """See ``Pages.tail_len``."""
        return self.seq_len - (self.first_page + self.num_pages) * PAGE_SIZE

    @property
    def _buffers(self) -> tuple[Tensor, Tensor]:
        tail = self._tail
        if isinstance(tail, LateTail):
            tail = self._tail = tail.take()
        return tail

    def _tail_buffers(self) -> tuple[Tensor, Tensor]:
        self._write_pending()
        return self._buffers

    @property
    def segments(self) -> tuple[Segment, ...]:
        """All segments, slack included."""
        self._arrive()
        return tuple(self._segments)

    @property
    def nbytes(self) -> int:
        """See ``Pages.nbytes``."""
        held = sum(segment.nbytes for segment in self._segments) + sum(buffer.nbytes for buffer in self._buffers)
        return held + (self._host.nbytes if self._host is not None else 0)

    @property
    def rows_stored(self) -> int:
        """See ``Pages.rows_stored``."""
        return sum(segment.capacity * segment.rows for segment in without_room(self._held(), self.num_pages))

    def no_states(self) -> tuple[Tensor, Tensor]:
        """Keys and values of no tokens, with the shapes, dtype and device of those stored; shares their memory."""
        return no_tokens(*self._buffers)

    @property
    def batch_size(self) -> int:
        """See ``Pages.batch_size``."""
        return self._tail.batch if isinstance(self._tail, LateTail) else self._tail[0].shape[0]

    @property
    def device(self) -> torch.device:
        """See ``Pages.device``."""
        return (self._tail.source if isinstance(self._tail, LateTail) else self._tail)[0].device

    def view(self) -> PagesView:
        """See ``Pages.view``."""
        return self._view_with(self.key_tail, self.value_tail)

    def append(self, key_states: Tensor, value_states: Tensor) -> PagesView:
        """See ``Pages.append``; the pages that this call drops are still in the view."""
        if key_states.requires_grad or value_states.requires_grad:
            key_states, value_states = key_states.detach(), value_states.detach()
        used = self.tail_len
        total = used + key_states.shape[2]
        if self.num_pages and total < self._closes_at:
            return self._append_to_tail(key_states, value_states, used, total)
        self._write_pending()
        self._arrive()
        closing = max(0, (total - self.residual_length) // PAGE_SIZE)
        is_empty = self.is_empty

        if is_empty:
            key_tail, value_tail = buffers = key_states, value_states
        elif closing and total > self._buffers[0].shape[2]:  # a buffer for this call alone
            key_tail, value_tail = (
                torch.cat([buffer.narrow(2, 0, used), states], dim=2)
                for buffer, states in zip(self._buffers, (key_states, value_states), strict=True)
            )
        else:
            buffers = self._buffers_for(total)
            write_tail(key_states, value_states, *buffers, used, self._append_backend)
            key_tail, value_tail = (buffer.narrow(2, 0, total) for buffer in buffers)
        view = self._view_with(key_tail, value_tail)

        skipped = min(max(self._oldest_needed(key_states.shape[2]) - self.num_pages, 0), closing)
        room = usable = 0
        if closing and not skipped:
            room = room_in(self._segments, self.num_pages)
            usable = room if room and self._segments[-1].rows == self.batch_size else 0
        new_segments = self._close(key_tail, value_tail, skipped, closing, usable) if closing else []
        if closing or is_empty:
            # The rest moves to a buffer of its own: the caller's tensors and a long chunk's buffer are freed. Where
            # tokens come one by one, the next has room: what is left of a page is as long each time.
            start, rest = closing * PAGE_SIZE, total - closing * PAGE_SIZE
            tails = key_tail.narrow(2, start, rest), value_tail.narrow(2, start, rest)
            buffers = copied(*tails, self._append_backend, room=int(key_states.shape[2] == 1))
        row_table, held = self.row_table and self.row_table.extended(closing), self._segments
        if new_segments and room > usable:  # others cannot follow room that no page can take
            *others, last = without_room(self._segments, self.num_pages)
            held = [*others, last.cloned()]
        # Nothing above changed what is stored, and nothing below can fail.
        if skipped:
            self.first_page += self.num_pages + skipped
            self._segments, self.num_pages, self._host, row_table, self._shared = new_segments, 0, None, None, 0
        elif new_segments:
            if held is not self._segments:
                self._host = None  # its copies have the room
            self._segments = held + new_segments
        self._tail, self._shares_tail, self.row_table = buffers, False, row_table
        self.num_pages += closing - skipped
        self.seq_len += key_states.shape[2]
        if closing:
            self._closed = None
            self.drop_prefix()
        return view

    def _append_to_tail(self, key_states: Tensor, value_states: Tensor, used: int, total: int) -> PagesView:
        """``append`` where the tail alone grows, from ``used`` to ``total``: what a decode step does, in few calls."""
        closed, backend = self._closed or self._make_closed(), self.backend
        self._write_pending()
        buffers = self._buffers_for(total)
        pending = None
        if dispatch.BACKENDS[backend[0]].WRITES_ON_READ:
            pending = key_states, value_states
        else:
            write_tail(key_states, value_states, *buffers, used, self._append_backend)
        view = PagesView(closed, *buffers, total, backend, pending)
        self._tail, self._shares_tail, self._newest = buffers, False, view if pending else None
        self.seq_len += total - used
        return view

    def _buffers_for(self, total: int) -> tuple[Tensor, Tensor]:
        """The tail's buffers, or others with the same tokens if ``total`` do not fit or a fork reads them."""
        buffers = self._buffers
        if self._shares_tail or total > buffers[0].shape[2]:
            return roomier(*buffers, self.tail_len, total, self._append_backend)
        return buffers

    def crop(self, tokens_to_remove: int) -> None:
        """See ``Pages.crop``."""
        self._write_pending()
        seq_len = self.num_pages * PAGE_SIZE + self.tail_len - tokens_to_remove
        pages, rest = divmod(seq_len, PAGE_SIZE)
        if pages >= self.num_pages:
            self.seq_len -= tokens_to_remove
            return
        reopened = pages_between(self._readable_segments(), pages, pages + 1)
        if self.row_table is not None:
            reopened = tuple(self.row_table.narrow(pages, pages + 1).select(reopened))
        on_device = ClosedPages(tuple(Segment(*(part.to(self.device) for part in page)) for page in reopened))
        key_states, value_states = reads.restore_both(PagesView(on_device, *no_tokens(*self._buffers)))
        buffers = copied(key_states[:, :, :rest], value_states[:, :, :rest])
        self._tail, self.num_pages, self._closed = buffers, pages, None
        self.seq_len -= tokens_to_remove
        if pages < self._shared:  # what another reads behind them is no room
            self._segments, self._shared = list(pages_between(self._segments, 0, pages)), pages
            self._host = self._host and self._host.narrow(pages)
        drop_beyond(self._segments, pages)
        if self._host is not None:
            self._host.crop(pages)
        self.row_table = self.row_table and self.row_table.narrow(0, pages)

    def replace(self, key_states: Tensor, value_states: Tensor) -> None:
        """See ``Pages.replace``; pages that are offloaded are brought back. Views that exist keep what they show."""
        self._arrive()
        held, made, start = self.stored(), [], 0
        for segment in held.segments:
            stop = start + segment.capacity * PAGE_SIZE
            states = key_states[:, :, start:stop], value_states[:, :, start:stop]
            made.append(requantized(segment, *states, None if self.reader else self.backend[0]))
            start = stop
        buffers = copied(key_states[:, :, start:], value_states[:, :, start:], self._append_backend)
        if any(new is not old for new, old in zip(made, held.segments, strict=True)):
            # Of what is kept, a part of a segment is copied, and the slack behind it given back.
            whole = {id(segment) for segment in self._segments}
            made = [
                segment if id(segment) in whole or segment is not old else segment.cloned()
                for segment, old in zip(made, held.segments, strict=True)
            ]
            self._take(made)
        self._tail, self._newest = buffers, None

    def drop_prefix(self) -> None:
        """Free the segments that lie wholly before the newest ``keep_tokens``. Views that exist keep theirs."""
        needed, pages, segments = self._oldest_needed(0), 0, 0
        held = self._held()
        while segments < len(held) and pages + held[segments].capacity <= needed:
            pages, segments = pages + held[segments].capacity, segments + 1
        if not segments:
            return
        if self._host is not None:
            self._host.forget(segments, pages)
        self._segments, self._closed = self._segments[segments:], None
        self.row_table = self.row_table and self.row_table.narrow(pages, self.num_pages)
        self.first_page, self.num_pages = self.first_page + pages, self.num_pages - pages
        self._shared = max(self._shared - pages, 0)

    def index_select(self, indices: Indices) -> None:
        """See ``Pages.index_select``: pages stay where they are, and tails are gathered when they are read next.

        Where sequences read fewer than half of the stored rows, the others are given back.
        """
        self._write_pending()
        selection = as_selection(indices)
        batch = self.batch_size
        if not selection.changes(batch):
            return
        tail = selection.tail(self._tail)
        chosen = selection.of(self.row_table, batch, self.num_pages)
        sizes = sizes_until(self._held(), self.num_pages)
        if chosen.is_identity(sizes):
            self.row_table = None
        elif chosen.share_read(sizes) >= LEAST_SHARE_READ:
            self.row_table = chosen
        else:
            self._take(chosen.select(without_room(self._readable_segments(), self.num_pages)))
        self._tail, self._shares_tail, self._closed = tail, False, None

    def _take(self, segments: list[Segment]) -> None:
        """Hold ``segments``, a row for each sequence, instead of those held; in host memory if those are there."""
        if self.is_offloaded:
            self._host = HostCopy(segments, self.num_pages)
        else:
            self._segments, self._host = segments, None
        self.row_table = self._closed = None

    def offload(self) -> None:
        """See ``Pages.offload``."""
        if not self.is_offloaded:
            self._arrive()
            host = self._host or HostCopy()
            host.save(self._segments, self.num_pages)
            self._host, self._segments, self._closed, self.is_offloaded = host, [], None, True

    def fetch(self, stream: torch.cuda.Stream | None = None) -> None:
        """See ``Pages.fetch``."""
        if self.is_offloaded:
            assert self._host is not None
            self._segments, self._arrival = self._host.load(self.device, stream)
            self.is_offloaded = False

    @property
    def _append_backend(self) -> str:
        return dispatch.tail_writer(self.device) or self.backend[0]

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
        """Pages, from the first one held, that are no longer needed once ``new_tokens`` more are stored."""
        if self.keep_tokens is None or self.keeps_past:
            return 0
        return max(self.seq_len + new_tokens - self.keep_tokens, 0) // PAGE_SIZE - self.first_page

    def _view_with(self, key_tail: Tensor, value_tail: Tensor) -> PagesView:
        closed = self._closed or self._make_closed()
        return PagesView(closed, key_tail, value_tail, backend=self.backend if closed.segments else None)

    def _make_closed(self) -> ClosedPages:
        """The pages held, which the views share until they change; for a reader of no row table, in order."""
        self._arrive()
        segments = without_room(self._segments, self.num_pages)
        table, may_share = None, False
        if self.row_table is not None:
            if dispatch.BACKENDS[self.backend[0]].READS_ROW_TABLE:
                table, may_share = self.row_table.on(self.device), self.row_table.neighbours_share
            else:
                self._take(self.row_table.select(segments))
                segments = tuple(self._segments)
        self._closed = ClosedPages(segments, table, may_share)
        return self._closed

    def _segment_capacity(self, missing: int) -> int:
        """Pages of a new segment."""
        if self.keep_tokens is None:
            return max(missing, self.num_pages // SEGMENT_GROWTH)
        # Of one size, so that the memory of one that is dropped serves the next.
        return max(self.keep_tokens // PAGE_SIZE // WINDOW_SEGMENTS, 1)

    def _close(self, key_tail: Tensor, value_tail: Tensor, skipped: int, closing: int, room: int) -> list[Segment]:
        """Write the pages ``skipped`` to ``closing`` of the tail: first into the ``room`` of the last segment.

        Returns:
            The segments that had to be made for them, not yet in the list.
        """
        targets = [] if not room else [self._segments[-1].narrow(self._segments[-1].capacity - room, None)]
        new_segments = []
        missing = closing - skipped - room
        while missing > 0:
            new_segments.append(Segment.allocate(self._segment_capacity(missing), key_tail, value_tail))
            missing -= new_segments[-1].capacity
        page, backend = skipped, None if self.reader else self.backend[0]
        for target in targets + new_segments:
            stop = min(page + target.capacity, closing)
            tokens = page * PAGE_SIZE, (stop - page) * PAGE_SIZE
            with write_access(target.key_qdata):
                states = key_tail.narrow(2, *tokens), value_tail.narrow(2, *tokens)
                writes.store_pages(*states, target.narrow(0, stop - page), backend)
            page = stop
        return new_segments


def _copy_to(part: Tensor, device: torch.device) -> Tensor:
    return part.to(device, copy=True)
