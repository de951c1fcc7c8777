"""Stored rows that sequences share through a row table, for the tests of the kernels that read one."""

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantcache.quantization import reference
from quantcache.quantization.options import PLAIN, AttentionOptions
from quantcache.store.segments import ClosedPages, Segment
from quantcache.store.view import PagesView
from tests.attention_cases import Case, Stored, build

TABLES = ["identity", "one row", "reversed", "random", "prefix", "runs"]


def make_table(kind: str, batch: int, segments: tuple[int, ...], rows: tuple[int, ...], seed: int = 0) -> Tensor:
    """A row table, int32 (batch, pages).

    Args:
        kind: of ``TABLES``. "prefix": a prompt of all sequences and pages of their own; "runs": neighbours that share,
            other ones from page to page.
        batch: sequences.
        segments: pages of each segment.
        rows: stored rows of each segment.
        seed: of what is random.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for index, (pages, stored) in enumerate(zip(segments, rows, strict=True)):
        sequences = torch.arange(batch)[:, None].expand(batch, pages)
        if kind == "identity":
            part = sequences
        elif kind == "one row":
            part = torch.zeros_like(sequences)
        elif kind == "reversed":
            part = batch - 1 - sequences
        elif kind == "random":
            part = torch.randint(0, stored, (batch, pages), generator=generator)
        elif kind == "prefix":
            part = sequences if index == len(segments) - 1 else torch.zeros_like(sequences)
        else:
            part = (torch.rand(batch, pages, generator=generator) < 0.4).cumsum(0)
        parts.append(part % stored)
    return torch.cat([*parts, torch.empty(batch, 0, dtype=torch.int64)], dim=1).int()


@dataclass(frozen=True)
class Shared:
    """Arguments of ``reads.attention`` with a row table."""

    query: Tensor
    view: PagesView

    def cuda(self) -> "Shared":
        """The same numbers on the GPU."""

        def moved(tensor: Tensor) -> Tensor:
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
            return made.copy_(tensor)

        segments = tuple(Segment(*(part.cuda() for part in segment)) for segment in self.view.segments)
        view = PagesView(ClosedPages(segments, self.table.cuda()), *(moved(buffer) for buffer in self.view.buffers))
        return Shared(moved(self.query), view)

    @property
    def table(self) -> Tensor:
        """The row table."""
        assert self.view.row_table is not None
        return self.view.row_table

    @property
    def copies(self) -> Stored:
        """The same with a copy of each page for each sequence."""
        selected, first = [], 0
        for segment in self.view.segments:
            rows = self.table[:, first : first + segment.capacity]
            selected.append([reference.select_rows(part, rows) for part in segment])
            first += segment.capacity
        parts = [list(part) for part in zip(*selected, strict=True)]
        return Stored(self.query, *parts, *self.view.buffers)

    def expected(self, options: AttentionOptions = PLAIN) -> Tensor:
        """What the specification says in float64."""
        return reference.attend(self.query.double(), *self.copies.exact(), options)

    def error(self, output: Tensor, options: AttentionOptions = PLAIN) -> float:
        """||output - expected|| / ||expected||; raises where the output is not what attention returns."""
        assert output.dtype == self.query.dtype
        assert output.is_contiguous()
        expected = self.expected(options)
        return float((output.double() - expected).norm() / expected.norm())


@functools.lru_cache(maxsize=16)
def _pages(case: Case, seed: int) -> Segment:
    """The pages of a case with one segment; made once for many tables, and not to be written to."""
    return build(case, seed).view.segments[0]


def share(case: Case, kind: str, rows: tuple[int, ...] | None = None) -> Shared:
    """Random states of ``case``, whose sequences read them as a table of ``kind`` says.

    Args:
        case: queries, tail and pages.
        kind: see ``make_table``.
        rows: stored rows of each segment; as many as there are sequences if None.
    """
    rows = rows or (case.batch,) * len(case.segments)
    table = make_table(kind, case.batch, case.segments, rows)
    segments = tuple(
        _pages(replace(case, batch=count, query_len=1, tail_len=1, segments=(pages,)), 7 * index)
        for index, (pages, count) in enumerate(zip(case.segments, rows, strict=True))
    )
    own = build(replace(case, segments=()), seed=99)
    return Shared(own.query, PagesView(ClosedPages(segments, table), own.key_tail, own.value_tail))
