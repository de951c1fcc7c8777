"""Closed pages: segments of them, and which stored row each sequence of the batch reads a page from."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quantcache.quantization import reference
from quantcache.quantization.scheme import PAGE_SIZE

Rows = npt.NDArray[np.int32]

Sizes = tuple[tuple[int, int], ...]
"""Pages and rows of segments that lie one behind the other."""


class _Parts(NamedTuple):
    """The tensors of a ``Segment``."""

    key_qdata: Tensor
    key_metadata: Tensor
    value_qdata: Tensor
    value_metadata: Tensor


class Segment(_Parts):
    """Memory for ``capacity`` pages, allocated at once.

    key_qdata: int8 (capacity, rows, num_kv_heads, page_size, head_dim)
    key_metadata: int16 (capacity, rows, num_kv_heads, head_dim, 2)
    value_qdata: int8 (capacity, rows, num_kv_heads, page_size, v_head_dim)
    value_metadata: int16 (capacity, rows, num_kv_heads, page_size, 2)
    """

    def __getstate__(self) -> None:
        """A copy or a pickle is of the tensors alone: the memo holds their addresses."""

    @cached_property
    def memo(self) -> dict[object, Any]:
        """What backends found out about it."""
        return {}

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

    @cached_property
    def capacity(self) -> int:
        """Pages that fit."""
        return self.key_qdata.shape[0]

    @property
    def rows(self) -> int:
        """Sequences stored."""
        return self.key_qdata.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes allocated, used or not."""
        return sum(part.nbytes for part in self)

    def narrow(self, start: int, stop: int | None) -> "Segment":
        """The pages ``start`` to ``stop`` (None: the end), sharing memory; the segment itself if that is all of it."""
        if start == 0 and stop in (None, self.capacity):
            return self
        return Segment(*(part[start:stop] for part in self))

    def cloned(self) -> "Segment":
        """The same pages in memory of their own."""
        return Segment(*(part.clone() for part in self))

    def select(self, rows: Rows) -> "Segment":
        """The pages as the sequences of ``rows`` (batch, capacity) read them, in memory of their own."""
        if (rows == rows[:, :1]).all():  # as after one reordering, and rows lie side by side
            order = torch.tensor(rows[:, 0], device=self.key_qdata.device)
            return Segment(*(part.index_select(1, order) for part in self))
        table = torch.tensor(rows, device=self.key_qdata.device)
        return Segment(*(reference.select_rows(part, table) for part in self))


_capacity: Callable[[Segment], int] = attrgetter("capacity")


@dataclass(frozen=True, eq=False)
class ClosedPages:
    """Closed pages, as the operations take them; made once and shared by the views until the pages change.

    Attributes:
        segments: without slack.
        row_table: see ``RowTable``, where the pages lie; None if every sequence reads its own row.
        may_share: whether neighbours may read one row, so that looking for it can be worth it.
        memo: what backends found out about the segments.
    """

    segments: tuple[Segment, ...]
    row_table: Tensor | None = None
    may_share: bool = True
    memo: dict[object, Any] = field(default_factory=dict)

    @cached_property
    def num_pages(self) -> int:
        """Pages in all segments."""
        return sum(map(_capacity, self.segments))

    @cached_property
    def resolved(self) -> "ClosedPages":
        """The same for who reads no row table: what is shared is copied."""
        if self.row_table is None:
            return self
        return ClosedPages(tuple(RowTable(self.row_table.cpu().numpy()).select(self.segments)))

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle is of the pages alone: the memo holds their addresses."""
        return vars(self) | {"memo": {}}


def pages_between(segments: Iterable[Segment], start: int, stop: int) -> tuple[Segment, ...]:
    """The pages ``start`` to ``stop`` of segments that lie one behind the other, sharing memory."""
    narrowed, first = [], 0
    for segment in segments:
        low, high = max(start - first, 0), min(stop - first, segment.capacity)
        if low < high:
            narrowed.append(segment.narrow(low, high))
        first += segment.capacity
    return tuple(narrowed)


def room_in(segments: Iterable[Segment], num_pages: int) -> int:
    """Pages that segments have room for behind the first ``num_pages``."""
    return sum(map(_capacity, segments)) - num_pages


def without_room(segments: Sequence[Segment], num_pages: int) -> tuple[Segment, ...]:
    """The first ``num_pages`` pages of segments of which only the last has room behind them, sharing memory."""
    room = room_in(segments, num_pages)
    if not room:
        return tuple(segments)
    *others, last = segments
    return *others, last.narrow(0, last.capacity - room)


def sizes_until(segments: Iterable[Segment], stop: int) -> Sizes:
    """Of the pages up to ``stop`` of segments that lie one behind the other."""
    sizes, first = [], 0
    for segment in segments:
        if first >= stop:
            break
        qdata = segment.key_qdata
        sizes.append((min(len(qdata), stop - first), qdata.shape[1]))
        first += len(qdata)
    return tuple(sizes)


def drop_beyond(segments: list[Segment], num_pages: int) -> None:
    """Drop the last segments that hold none of the first ``num_pages`` pages."""
    while segments and sum(segment.capacity for segment in segments[:-1]) >= num_pages:
        segments.pop()


_Made = TypeVar("_Made")


class MadeOnce:
    """What keeps what it has made, for who asks again."""

    def __init__(self) -> None:
        self._made: dict[object, Any] = {}

    def _once(self, name: object, make: Callable[[], _Made]) -> _Made:
        if name not in self._made:
            self._made[name] = make()
        made: _Made = self._made[name]
        return made


class RowTable(MadeOnce):
    """Which stored row each sequence of the batch reads a page from, on the host; immutable.

    Reordering, selecting and repeating sequences is an index on it; pages stay where they are, and sequences that were
    one share its bytes. What is made of it is made once: layers alike share one table.

    Attributes:
        rows: int32 (batch, pages).
    """

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = rows

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle is of the rows alone."""
        return {"rows": self.rows, "_made": {}}

    @classmethod
    def identity(cls, batch: int, pages: int) -> "RowTable":
        """Every sequence reads its own row."""
        return cls(np.broadcast_to(np.arange(batch, dtype=np.int32)[:, None], (batch, pages)))

    def on(self, device: torch.device) -> Tensor:
        """As a tensor on ``device``."""
        return self._once(device, lambda: torch.tensor(self.rows, device=device))

    def select(self, segments: Iterable[Segment]) -> list[Segment]:
        """Segments without slack as the sequences read them, each in memory of its own."""
        made, first = [], 0
        for segment in segments:
            made.append(segment.select(self.rows[:, first : first + segment.capacity]))
            first += segment.capacity
        return made

    def is_identity(self, sizes: Sizes) -> bool:
        """Whether every sequence reads its own row of segments with as many rows as there are sequences."""
        batch = len(self.rows)
        if any(rows != batch for _, rows in sizes):
            return False
        return self._once("identity", lambda: bool((self.rows == np.arange(batch)[:, None]).all()))

    @property
    def neighbours_share(self) -> bool:
        """Whether some sequence reads a page from the row that the one before it reads it from."""
        return self._once("neighbours", lambda: bool((self.rows[1:] == self.rows[:-1]).any()))

    def share_read(self, sizes: Sizes) -> float:
        """The share of the stored rows of all pages that some sequence reads, from 0 to 1."""
        return self._once(sizes, lambda: self._share_read(sizes))

    def _share_read(self, sizes: Sizes) -> float:
        stored = used = first = 0
        for capacity, rows in sizes:
            part = self.rows[:, first : first + capacity]
            seen = np.zeros((rows, part.shape[1]), dtype=bool)
            seen[part, np.arange(part.shape[1])] = True
            used, stored, first = used + int(seen.sum()), stored + seen.size, first + capacity
        return used / stored if stored else 1.0

    def narrow(self, start: int, stop: int) -> "RowTable":
        """Of the pages ``start`` to ``stop`` alone."""
        return self._once((start, stop), lambda: RowTable(self.rows[:, start:stop]))

    def extended(self, pages: int) -> "RowTable":
        """With ``pages`` more, which have a row for each sequence."""
        if not pages:
            return self
        more = RowTable.identity(len(self.rows), pages).rows
        return self._once(pages, lambda: RowTable(np.concatenate([self.rows, more], axis=1)))
