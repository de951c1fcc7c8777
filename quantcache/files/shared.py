"""Stored rows that sequences share, as a file holds them: once, one behind the other, and where each sequence reads."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from quantcache.store.segments import ClosedPages, RowTable, Segment
from quantcache.store.view import PagesView


def flattened(view: PagesView) -> PagesView | None:
    """The rows that some sequence reads, page by page, each as a page of one row; None if none is read by several.

    Args:
        view: with a row table.

    Returns:
        A view with the same tails, whose row table says which of these rows a sequence reads for a page.
    """
    assert view.row_table is not None
    table = view.row_table.cpu().long()
    places, segments, first, count = [], [], 0, 0
    for segment in view.segments:
        rows = table[:, first : first + segment.capacity]
        is_read = rows.new_zeros(segment.capacity, segment.rows, dtype=torch.bool).scatter_(1, rows.T, True).flatten()
        place = is_read.cumsum(0) - 1 + count
        places.append(place[torch.arange(segment.capacity, device="cpu") * segment.rows + rows])
        flat = Segment(*(part.flatten(0, 1)[:, None] for part in segment))
        if not is_read.all():
            kept = is_read.nonzero()[:, 0].to(flat.key_qdata.device)
            flat = Segment(*(part.index_select(0, kept) for part in flat))
        segments.append(flat)
        first, count = first + segment.capacity, count + int(is_read.sum())
    if count == table.numel():
        return None
    return PagesView(ClosedPages(tuple(segments), torch.cat(places, dim=1).int()), view.key_tail, view.value_tail)


def first_rows(places: Tensor, num_rows: int, refuse: Callable[[str, object], Exception]) -> list[int]:
    """The first row of each page, and behind them the number of all.

    Args:
        places: int32 (batch, pages), the row of the file that each sequence reads for a page.
        num_rows: rows in the file.
        refuse: makes the error.

    Raises:
        Exception: from ``refuse``: rows that are not there or that nobody reads, or pages in another order.
    """
    firsts = [0]
    for page, rows in enumerate(places.T):
        first, read = firsts[-1], rows.unique()
        if read.tolist() != list(range(first, first + len(read))):
            got = ", ".join(map(str, read[:8].tolist()))
            raise refuse(f"page {page} must be read from the rows that follow those before it, from {first} on", got)
        firsts.append(first + len(read))
    if firsts[-1] != num_rows:
        raise refuse(f"each of the {num_rows} rows must be read", f"{firsts[-1]} that are")
    return firsts


def segments_of(flat: Segment, places: Tensor, firsts: list[int]) -> tuple[list[Segment], RowTable]:
    """Pages that ``Int8Pages`` can hold, without a copy: a segment for neighbours with as many rows.

    Args:
        flat: the rows, each as a page of one row.
        places: see ``first_rows``, of these pages.
        firsts: from ``first_rows``, of these pages.
    """
    counts = [stop - start for start, stop in itertools.pairwise(firsts)]
    segments, page = [], 0
    while page < len(counts):
        end = page + 1
        while end < len(counts) and counts[end] == counts[page]:
            end += 1
        rows = slice(firsts[page], firsts[end])
        segments.append(Segment(*(part[rows].view(end - page, counts[page], *part.shape[2:]) for part in flat)))
        page = end
    return segments, RowTable((places - places.new_tensor(firsts[:-1])).numpy())
