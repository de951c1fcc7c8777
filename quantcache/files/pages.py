"""The tensors of an int8 layer, in the layout that ``schema`` checks: as pieces for a file, and read from one."""

from collections.abc import Callable, Iterable, Iterator
from typing import Final

import torch
from torch import Tensor

from quantcache.files import shared
from quantcache.files.description import Refuse
from quantcache.files.schema import PAGE_PARTS, ROW_TABLE, TAILS, StoredPages, part_name
from quantcache.quantization.scheme import PAGE_SIZE
from quantcache.store.segments import RowTable, Segment
from quantcache.store.view import PagesView

STAGED_BYTES: Final = 32 << 20
"""A tensor of a GPU comes to the CPU in pieces of about this size."""

Specs = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def pages_specs(layer_idx: int, view: PagesView) -> Specs:
    """Dtypes and shapes of the tensors that a file holds of one layer, from ``Int8Pages.stored``."""
    batch, num_kv_heads, _, head_dim = view.key_tail.shape
    rows, v_head_dim = (view.num_pages, batch, num_kv_heads), view.value_tail.shape[3]
    if view.row_table is not None:
        rows = (view.num_pages, 1, num_kv_heads)
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "key_qdata": (torch.int8, (*rows, PAGE_SIZE, head_dim)),
        "key_metadata": (torch.int16, (*rows, head_dim, 2)),
        "value_qdata": (torch.int8, (*rows, PAGE_SIZE, v_head_dim)),
        "value_metadata": (torch.int16, (*rows, PAGE_SIZE, 2)),
        "key_tail": (view.key_tail.dtype, tuple(view.key_tail.shape)),
        "value_tail": (view.value_tail.dtype, tuple(view.value_tail.shape)),
    }
    if view.row_table is not None:
        shapes[ROW_TABLE] = (torch.int32, tuple(view.row_table.shape))
    return {part_name(layer_idx, part): spec for part, spec in shapes.items()}


def pages_pieces(view: PagesView, part: str) -> Iterator[Tensor]:
    """The bytes of one part of a layer, in pieces that fit a small staging buffer."""
    if part in (*TAILS, ROW_TABLE):
        yield getattr(view, part)
        return
    for segment in view.segments:
        yield from staged(getattr(segment, part))


def staged(tensor: Tensor) -> Iterable[Tensor]:
    """``tensor`` cut along its first axis, unless it is on the CPU already."""
    if tensor.device.type == "cpu" or tensor.dim() == 0 or not tensor.numel():
        return [tensor]
    pieces: Iterable[Tensor] = tensor.split(max(1, STAGED_BYTES * len(tensor) // tensor.nbytes))
    return pieces


def read_pages(
    stored: StoredPages,
    read: Callable[[str, int | None], Tensor],
    refuse: Refuse,
    device: torch.device,
    max_tokens: int | None,
) -> tuple[list[Segment], RowTable | None, Tensor, Tensor]:
    """What ``Int8Pages.fill`` takes: the pages and tails of one layer, bit for bit as they were saved.

    Args:
        stored: from ``schema.check_pages``.
        refuse: makes the error of a row table that cannot be followed.
        read: gives the first rows (None: all) of the named tensor, on the CPU.
        device: where the bytes go.
        max_tokens: read no more pages than that many tokens need, the last one whole; None for all tokens.
    """
    wanted = stored.held if max_tokens is None else min(max_tokens, stored.held)
    num_pages = min(stored.num_pages, -(-wanted // PAGE_SIZE))
    tail_len = max(0, wanted - stored.num_pages * PAGE_SIZE)
    num_rows, firsts = num_pages, [0]
    if stored.num_rows is not None:
        table = part_name(stored.layer_idx, ROW_TABLE)
        places = read(table, None)
        firsts = shared.first_rows(places, stored.num_rows, lambda rule, got: refuse(f"of {table} {rule}", got))
        num_rows, firsts, places = firsts[num_pages], firsts[: num_pages + 1], places[:, :num_pages]
    parts = (read(part_name(stored.layer_idx, part), num_rows).to(device) for part in PAGE_PARTS)
    closed, row_table = [Segment(*parts)] if num_pages else [], None
    if closed and stored.num_rows is not None:
        closed, row_table = shared.segments_of(closed[0], places, firsts)
    tails = []
    for part in TAILS:
        tail = read(part_name(stored.layer_idx, part), None if tail_len else 0)
        kept = tail[:, :, :tail_len] if tail_len else tail.new_empty(stored.batch, tail.shape[1], 0, tail.shape[3])
        tails.append(kept.to(device))
    return closed, row_table, tails[0], tails[1]
