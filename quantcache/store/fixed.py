"""``StaticInt8Pages``: the bytes of one layer of a fixed capacity, with its lengths in device memory.

Every address stays what it is, so a recorded step and a CUDA graph can run on them. The host counts along while it
makes the steps itself; after recorded ones it has to ask the device.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quantcache.backends import dispatch
from quantcache.quantization.scheme import DEFAULT_RESIDUAL_LENGTH, PAGE_SIZE
from quantcache.store import reads, writes
from quantcache.store.buffer import PAGES, SEQ_LEN, SHARES_READS, TAIL_LEN, BufferLayout, StaticShape, layout_for
from quantcache.store.offloading import HostCopy
from quantcache.store.pages import Indices, Pages, Selection, as_selection, no_tokens
from quantcache.store.requantizing import requantized
from quantcache.store.segments import ClosedPages, Segment
from quantcache.store.tail import gathers_together, take_rows
from quantcache.store.view import PagesView

_outside_inference_mode = torch.inference_mode(False)
"""Memory and views of it that are made in torch's inference mode can be written there alone; these, everywhere."""


def check_room(capacity: int, new_tokens: int, seq_len: int = 0) -> None:
    """Refuse more tokens than fit.

    Raises:
        ValueError: ``seq_len + new_tokens`` is more than ``capacity``; nothing has changed.
    """
    if seq_len + new_tokens > capacity:
        raise ValueError(
            f"QuantizedInt8Cache: at most max_cache_len={capacity} tokens fit, got {new_tokens} more behind {seq_len}. "
            "Make a cache with a larger max_cache_len, or call reset() for new sequences."
        )


class StaticInt8Pages(Pages):
    """The keys and values of one layer in memory allocated once.

    A page is closed with the first call after ``residual_length`` newer tokens exist, or by the call that brings them
    if it brings more than one token; the codes are those of ``Int8Pages``.

    Args:
        key_states: (batch, num_kv_heads, any, head_dim); fixes shapes, dtype and device, nothing is stored of it.
        value_states: (batch, num_kv_heads, any, v_head_dim).
        capacity: tokens that fit.
        residual_length: newer tokens that a page waits for, at least 0.
    """

    @_outside_inference_mode
    def __init__(
        self, key_states: Tensor, value_states: Tensor, capacity: int, residual_length: int = DEFAULT_RESIDUAL_LENGTH
    ) -> None:
        self.residual_length = residual_length
        self.layout: BufferLayout = layout_for(
            StaticShape.of(capacity, residual_length, key_states, value_states), key_states.dtype
        )
        self.memory = self.layout.allocate(key_states.device)
        self.buffers = self.layout.unpack(self.memory)
        self.is_stale = False
        """Whether recorded steps ran since the host last knew the lengths."""
        self.was_recorded = False
        """Whether the last step that the host knows of was a recorded one."""
        self.is_recorded = False
        """Whether a step was recorded since the last reset, which is valid as long as the shape stays."""
        self.is_reordered = False
        """Whether sequences may read other rows than their own."""
        self._pages = self._tail_len = 0
        # Once pages were offloaded, the tail and the lengths lie apart and ``memory`` is of them alone. Copies of the
        # pages in host memory; what to wait for before those on the device are read, while they are on the way back.
        self._host: HostCopy | None = None
        self.is_offloaded = False
        self._arrival: torch.Event | None = None
        # What the views share, for as many pages as are closed.
        self._closed: ClosedPages | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The memory, and not once more the parts that share it; once offloaded, pages are those in host memory."""
        if self._host is not None:
            self._to_host()
        left_out = "buffers", "_closed", "_backend", "_arrival"
        return {name: value for name, value in vars(self).items() if name not in left_out}

    @_outside_inference_mode
    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.layout = layout_for(self.layout.shape, self.layout.dtype)  # a copy would not be the one that is shared
        self._closed = self._arrival = None
        if self.memory.is_inference():
            self.memory = self.memory.clone()
        if self._host is None:
            self.buffers = self.layout.unpack(self.memory)
        else:
            self.buffers = self.layout.with_pages(self.memory, _no_pages(self._host.segments[0], self.memory.device))

    def is_for(self, key_states: Tensor, value_states: Tensor) -> bool:
        """Whether the memory is that of states of this batch, these heads and head_dims, dtype and device."""
        shape = StaticShape.of(self.capacity, self.residual_length, key_states, value_states)
        have = self.layout.shape._replace(sharing=shape.sharing), self.layout.dtype, self.memory.device
        return have == (shape, key_states.dtype, key_states.device)

    @property
    def capacity(self) -> int:  # type: ignore[override]
        """See ``Pages.capacity``."""
        return self.layout.shape.capacity

    @property
    def nbytes(self) -> int:
        """See ``Pages.nbytes``."""
        if self._host is None:
            return self.memory.nbytes
        return self.memory.nbytes + self.buffers.pages.nbytes + self._host.nbytes

    @property
    def rows_stored(self) -> int:
        """See ``Pages.rows_stored``: those that are read, in memory for one of each sequence. Waits for the device."""
        if not self.is_reordered or self.memory.is_meta:
            return self.batch_size * self.num_pages
        return sum(len(rows.unique()) for rows in self.buffers.row_table[:, : self.num_pages].T.cpu())

    @property
    def keeps_addresses(self) -> bool:
        """Whether all memory stays where it is, as a recorded step needs it: until pages are offloaded."""
        return self._host is None

    @property
    def num_pages(self) -> int:  # type: ignore[override]
        """See ``Pages.num_pages``. Waits for the device after recorded steps, as whatever asks for a length."""
        self.synchronize()
        return self._pages

    @property
    def tail_len(self) -> int:  # type: ignore[override]
        """See ``Pages.tail_len``."""
        self.synchronize()
        return self._tail_len

    @property
    def seq_len(self) -> int:  # type: ignore[override]
        """See ``Pages.seq_len``."""
        return self.num_pages * PAGE_SIZE + self._tail_len

    def _tail_buffers(self) -> tuple[Tensor, Tensor]:
        return self.buffers.key_tail, self.buffers.value_tail

    @property
    def device_seq_len(self) -> Tensor:
        """Tokens stored, int32 () on the device; sees every later step."""
        # A recorded step takes the memory alone, not parts of it too.
        recorded = self.keeps_addresses and torch.compiler.is_compiling()
        buffers = self.layout.constant().unpack(self.memory) if recorded else self.buffers
        return buffers.lengths[SEQ_LEN]

    def synchronize(self) -> None:
        """Learn the lengths from the device, if recorded steps have changed them.

        Raises:
            RuntimeError: compiled steps were given more tokens than fit. They read and wrote nothing out of bounds, but
                the tokens that did not fit are lost.
        """
        if not self.is_stale:
            return
        lengths = self.buffers.lengths.tolist()
        if lengths[SEQ_LEN] > self.capacity:
            raise RuntimeError(
                f"QuantizedInt8Cache: at most max_cache_len={self.capacity} tokens fit, compiled steps were given "
                f"{lengths[SEQ_LEN]}. What was generated beyond is not to be trusted. Make a cache with a larger "
                "max_cache_len, or call reset()."
            )
        self._count(lengths[PAGES], lengths[TAIL_LEN])
        self.was_recorded = True

    def append(self, key_states: Tensor, value_states: Tensor) -> PagesView:
        """See ``Pages.append``.

        Raises:
            ValueError: see ``check_room``.
        """
        new_tokens = key_states.shape[2]
        self.synchronize()
        self._arrive()
        check_room(self.layout.shape.capacity, new_tokens, self._pages * PAGE_SIZE + self._tail_len)
        if key_states.requires_grad or value_states.requires_grad:
            key_states, value_states = key_states.detach(), value_states.detach()
        if new_tokens == 1:
            due = int(self._tail_len >= PAGE_SIZE + self.residual_length)
            pages, tail_len = self._pages + due, self._tail_len - due * PAGE_SIZE + 1
            view = self._view(pages, *self._tail_buffers(), tail_len)
            self._advance(key_states, value_states)
            self._count(pages, tail_len, view.closed)
            return view
        self.close_due_pages()
        buffers, pages, tail_len = self.buffers, self._pages, self._tail_len
        if tail_len:
            key_states, value_states = (
                torch.cat([tail[:, :, :tail_len], states], dim=2)
                for tail, states in ((buffers.key_tail, key_states), (buffers.value_tail, value_states))
            )
        source = key_states, value_states, _with_new(buffers.lengths, new_tokens)
        view = self._view(pages, key_states, value_states, tail_len + new_tokens)
        self._advance(*no_tokens(key_states, value_states), source)
        closed = max(0, (tail_len + new_tokens - self.residual_length) // PAGE_SIZE)
        self._count(pages + closed, tail_len + new_tokens - closed * PAGE_SIZE)
        return view

    def append_recorded(self, key_states: Tensor, value_states: Tensor) -> list[Tensor]:
        """``append`` for a step that is being recorded: nothing is asked of the device, and no room is checked.

        Returns:
            What is read instead of the layer's tail, see ``protocol.Source``; nothing for a single token.
        """
        self.is_stale = self.is_recorded = True
        memory, layout, new_tokens = self.memory, self.layout.constant(), key_states.shape[2]
        if new_tokens == 1:
            writes.advance(key_states, value_states, memory, layout)
            return []
        none = no_tokens(key_states, value_states)
        writes.advance(*none, memory, layout)
        buffers = layout.unpack(memory)
        places = buffers.lengths[TAIL_LEN] + torch.arange(new_tokens, device=memory.device)
        key_tail, value_tail = (
            torch.nn.functional.pad(tail, (0, 0, 0, new_tokens)).index_copy(2, places, states)
            for tail, states in ((buffers.key_tail, key_states), (buffers.value_tail, value_states))
        )
        lengths = _with_new(buffers.lengths, new_tokens)
        writes.advance(*none, memory, layout, (key_tail, value_tail, lengths))
        return [key_tail, value_tail, lengths]

    def close_due_pages(self) -> None:
        """Quantise a page that has as many newer tokens as it waits for, as the next step would."""
        self.synchronize()
        if self._tail_len >= PAGE_SIZE + self.residual_length:
            self._arrive()
            self._advance(*no_tokens(*self._tail_buffers()))
            self._count(self._pages + 1, self._tail_len - PAGE_SIZE)

    def view(self) -> PagesView:
        """See ``Pages.view``."""
        return PagesView(self._pages_until(self.num_pages), *self._tail_buffers(), self._tail_len, self.backend)

    def stored(self, shares: bool = False) -> PagesView:
        """See ``Pages.stored``; pages that are due are closed before."""
        self.close_due_pages()
        closed = self._first(self._pages_held(), self._pages)
        return PagesView(closed if shares else closed.resolved, self.key_tail, self.value_tail)

    def restore(self) -> tuple[Tensor, Tensor]:
        """See ``Pages.restore``."""
        self.close_due_pages()
        return reads.restore_both(self.view())

    def reset(self) -> None:
        """Forget every token and keep the memory."""
        self.buffers.lengths.zero_()
        self.buffers.row_table.copy_(self._own_rows())
        self.is_recorded = self.is_reordered = False
        self._count(0, 0)
        if self._host is not None:
            self._host.num_pages = 0

    @_outside_inference_mode
    def offload(self) -> None:
        """See ``Pages.offload``; the lengths stay, too."""
        if self.is_offloaded:
            return
        self.synchronize()
        self._arrive()
        host, buffers = self._host or HostCopy(), self.buffers
        host.save([buffers.pages], self._pages)
        memory = self.memory if self._host is not None else buffers.newest.clone()
        self.buffers = self.layout.with_pages(memory, _no_pages(buffers.pages, self.device))
        self.memory, self._host, self._closed, self.is_offloaded = memory, host, None, True

    @_outside_inference_mode
    def fetch(self, stream: torch.cuda.Stream | None = None) -> None:
        """See ``Pages.fetch``."""
        if self.is_offloaded:
            assert self._host is not None
            (pages,), self._arrival = self._host.load(self.device, stream)
            self.buffers = self.layout.with_pages(self.memory, pages)
            self.is_offloaded = False

    def _arrive(self) -> None:
        """Have the pages on the device, in the order of the current stream."""
        if self._host is None:
            return
        self.fetch()
        if self._arrival is not None:
            torch.cuda.current_stream(self.device).wait_event(self._arrival)
            self._arrival = None

    def _to_host(self) -> None:
        """Have the pages in host memory alone, and wait until they are there."""
        self.offload()
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def crop(self, tokens_to_remove: int) -> None:
        """See ``Pages.crop``."""
        was_offloaded = self.is_offloaded
        self.close_due_pages()
        pages, rest = divmod(self.seq_len - tokens_to_remove, PAGE_SIZE)
        made = self.buffers.like_newest()
        made.newest.copy_(self.buffers.newest)
        if pages < self._pages:
            page = self._pages_held().narrow(pages, pages + 1)
            on_device = Segment(*(part.to(self.device) for part in page))
            reopened = ClosedPages((on_device,), self._row_table(pages, pages + 1))
            made.row_table[:, pages:] = self._own_rows()
            key_states, value_states = reads.restore_both(PagesView(reopened, *no_tokens(*self._tail_buffers())))
            writes.append_tail(key_states[:, :, :rest], value_states[:, :, :rest], made.key_tail, made.value_tail, 0)
        else:
            rest += (pages - self._pages) * PAGE_SIZE
            pages = self._pages
        seq_len = pages * PAGE_SIZE + rest
        made.lengths.copy_(torch.tensor([pages, rest, seq_len, 0], dtype=torch.int32, device="cpu"))
        self.buffers.newest.copy_(made.newest)
        self._count(pages, rest)
        if self._host is not None:
            self._host.num_pages = min(self._host.num_pages, pages)
        if was_offloaded:
            self.offload()  # a page that was due had it back

    @_outside_inference_mode
    def replace(self, key_states: Tensor, value_states: Tensor) -> None:
        """See ``Pages.replace``; the memory stays where it is, unless pages were offloaded once."""
        self.synchronize()
        self._arrive()
        closed = self._pages * PAGE_SIZE
        memory = self.memory.clone()
        if self._host is None:
            made = self.layout.unpack(memory)
        else:
            made = self.layout.with_pages(memory, Segment(*(part.clone() for part in self.buffers.pages)))
        if closed:
            held, *_ = self._first(self.buffers.pages, self._pages).resolved.segments
            states = key_states[:, :, :closed], value_states[:, :, :closed]
            changed = requantized(held, *states, self.backend[0])
            for part, target in zip(changed, made.pages.narrow(0, self._pages), strict=True):
                target.copy_(part)
        for part, target in ((key_states, made.key_tail), (value_states, made.value_tail)):
            target[:, :, : self._tail_len].copy_(part[:, :, closed:])
        made.row_table.copy_(self._own_rows())
        if self._host is None:
            self.memory.copy_(memory)
        else:
            self.memory, self.buffers = memory, made
            self._host.num_pages = 0  # what is there is of before
        self._closed, self.is_reordered = None, False

    def index_select(self, indices: Indices) -> None:
        """See ``Pages.index_select``; as many sequences as there are, since addresses and shapes are fixed.

        The tails are copied and the row table is indexed, which recorded steps read. The pages are copied, too, where
        the kernels read no such table.
        """
        select_rows([self], as_selection(indices))

    @_outside_inference_mode
    def _copy_rows(self, rows: Tensor) -> None:
        """``index_select`` of the stored bytes."""
        on_device, memory, held = rows.to(self.device), self.memory.clone(), self._pages_held()
        if self._host is None:
            made = self.layout.unpack(memory)
            for part, taken in zip(held, made.pages, strict=True):
                torch.index_select(part, 1, on_device, out=taken)
        else:
            selected = Segment(*(part.index_select(1, rows.to(part.device)) for part in held))
            made = self.layout.with_pages(memory, self.buffers.pages if self.is_offloaded else selected)
        for tail, taken in zip(self._tail_buffers(), (made.key_tail, made.value_tail), strict=True):
            torch.index_select(tail, 0, on_device, out=taken)
        if self._host is None:
            self.memory.copy_(memory)
        else:
            self._host = HostCopy([selected], self._pages) if self.is_offloaded else HostCopy()
            self.memory, self.buffers, self._closed = memory, made, None

    def _own_rows(self) -> Tensor:
        """What the row table says where every sequence reads its own row, (batch, 1)."""
        return torch.arange(self.batch_size, dtype=torch.int32, device=self.device)[:, None]

    def _row_table(self, start: int, stop: int) -> Tensor | None:
        """Of the pages ``start`` to ``stop``; None if every sequence reads its own row."""
        return self.buffers.row_table[:, start:stop] if self.is_reordered else None

    def _first(self, pages: Segment, num_pages: int) -> ClosedPages:
        """The first ``num_pages`` of all that there is room for."""
        if not num_pages:
            return ClosedPages(())
        return ClosedPages((pages.narrow(0, num_pages),), self._row_table(0, num_pages))

    def repeated(self, repeats: int) -> "StaticInt8Pages":
        """``repeats`` times every sequence, copies side by side, in memory for as many."""
        self.close_due_pages()
        tails = self.key_tail.repeat_interleave(repeats, 0), self.value_tail.repeat_interleave(repeats, 0)
        made = StaticInt8Pages(*tails, self.capacity, self.residual_length)
        closed = self._first(self._pages_held(), self._pages).resolved
        shares = dispatch.BACKENDS[self.backend[0]].READS_ROW_TABLE
        for segment in closed.segments:
            for part, taken in zip(segment, made.buffers.pages, strict=True):
                for row in range(1 if shares else repeats):
                    taken[: self._pages, row::repeats].copy_(part)
        writes.append_tail(*tails, made.buffers.key_tail, made.buffers.value_tail, 0)
        made.buffers.lengths.copy_(self.buffers.lengths)
        if shares:
            made._share()
            own = made._own_rows()
            made.buffers.row_table[:, : self._pages] = own - own % repeats
        made._count(self._pages, self._tail_len)
        return made

    def moved(self, device: torch.device) -> "StaticInt8Pages":
        """See ``Pages.moved``; offloaded pages come back. Steps recorded before know nothing of the new memory."""
        self.synchronize()
        keys, values = (states.to(device) for states in no_tokens(*self._tail_buffers()))
        made = StaticInt8Pages(keys, values, self.capacity, self.residual_length)
        for part, target in zip(self._pages_held(), made.buffers.pages, strict=True):
            target.copy_(part)
        made.buffers.newest.copy_(self.buffers.newest)
        made.layout, made.is_reordered = self.layout, self.is_reordered
        made._count(self._pages, self._tail_len)
        return made

    def _share(self) -> None:
        """From now on sequences may read other rows than their own. A step that is recorded stays what it is."""
        self._closed, self.is_reordered = None, True
        if not self.is_recorded:
            self.layout = layout_for(self.layout.shape._replace(sharing=SHARES_READS), self.layout.dtype)

    def _pages_held(self) -> Segment:
        """All pages that there is room for, where they are."""
        if self._host is not None and self.is_offloaded:
            self._to_host()
            return self._host.segments[0]
        self._arrive()
        return self.buffers.pages

    def _advance(
        self, key_states: Tensor, value_states: Tensor, source: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> None:
        """``writes.advance`` of this layer."""
        if not self.keeps_addresses or (writes.is_plain(key_states) and not key_states.is_meta):
            backend = dispatch.BACKENDS[self.backend[0]]
            backend.advance(source, key_states, value_states, self.buffers, self.residual_length)
        else:
            writes.advance(key_states, value_states, self.memory, self.layout, source)

    def _count(self, pages: int, tail_len: int, closed: ClosedPages | None = None) -> None:
        """Note the lengths that the device has, and the pages for the views, where they are at hand."""
        if pages != self._pages:
            self._closed = closed
        self._pages, self._tail_len = pages, tail_len
        self.is_stale = self.was_recorded = False

    @property
    def is_empty(self) -> bool:
        """Whether no token is stored."""
        self.synchronize()
        return not self._pages and not self._tail_len

    def _view(self, pages: int, key_tail: Tensor, value_tail: Tensor, tail_len: int) -> PagesView:
        closed = self._pages_until(pages)
        return PagesView(closed, key_tail, value_tail, tail_len, self.backend, capacity=self.capacity)

    def _pages_until(self, pages: int) -> ClosedPages:
        if pages != self._pages or self._closed is None:
            self._arrive()
            closed = self._first(self.buffers.pages, pages)
            if pages != self._pages:
                return closed
            self._closed = closed
        return self._closed


def select_rows(layers: Sequence[StaticInt8Pages], selection: Selection) -> None:
    """``Pages.index_select`` of several layers, those alike in a few operations for all of them."""
    layers = [layer for layer in layers if selection.changes(layer.batch_size)]

    alike: dict[object, list[StaticInt8Pages]] = {}
    for layer in layers:
        # One by one on a CPU, in whose caches the tails of one layer stay until they are written back.
        together = (id(layer.layout), layer.device) if gathers_together(layer.device) else id(layer)
        alike.setdefault(together, []).append(layer)
    for group in alike.values():
        _select_rows_alike(group, selection)


def _select_rows_alike(layers: Sequence[StaticInt8Pages], selection: Selection) -> None:
    """``select_rows`` of layers of one layout, on one device."""
    first = layers[0]
    if not dispatch.BACKENDS[first.backend[0]].READS_ROW_TABLE:
        for layer in layers:
            layer._copy_rows(selection.rows(layer.batch_size))
        return
    rows, buffers = selection.on(first.device, first.batch_size), [layer.buffers for layer in layers]
    key_tails, value_tails = [each.key_tail for each in buffers], [each.value_tail for each in buffers]
    taken = take_rows(key_tails, rows) + take_rows(value_tails, rows)
    row_tables = [each.row_table for each in buffers]
    tables, lengths = torch.stack(row_tables), torch.stack([each.lengths for each in buffers])
    # Pages to come have a row for each sequence; how many there are the device may know alone.
    is_closed = torch.arange(tables.shape[2], device=rows.device) < lengths[:, PAGES, None, None]
    tables = torch.where(is_closed, tables.index_select(1, rows), first._own_rows())
    torch._foreach_copy_(key_tails + value_tails + row_tables, [*taken, *tables.unbind()])
    for layer in layers:
        layer._share()


def _no_pages(pages: Segment, device: torch.device) -> Segment:
    """Of pages like these none, without memory."""
    return Segment(*(part.new_empty(0, *part.shape[1:], device=device) for part in pages))


def _with_new(lengths: Tensor, new_tokens: int) -> Tensor:
    """The lengths if ``new_tokens`` were part of the tail, on the device."""
    lengths = lengths.clone()
    lengths[TAIL_LEN : SEQ_LEN + 1] += new_tokens
    return lengths
