"""Attention over the blocks of a pool, and new tokens into them, in C++; see ``backends/blocks.py``.

The kernels are those of a cache: a sequence is a batch of one, whose row of the block table is its row table.
"""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from quantcache.backends import cpu
from quantcache.backends.blocks import BlockLayout, BlockPages
from quantcache.backends.torch_blocks import append_with, blocks_of, open_page, sequences_of, single_tokens
from quantcache.quantization.options import AttentionOptions
from quantcache.quantization.scheme import PAGE_SIZE

READS_LENGTHS: Final = cpu.READS_LENGTHS


@dataclass
class _SequenceView:
    """What one sequence reads, as a view of ``protocol.py``: closed pages in the pool, and a tail."""

    num_pages: int
    row_table: Tensor
    buffers: tuple[Tensor, Tensor]
    tail_len: int
    memo: dict[object, Any] = field(default_factory=dict)
    pending: tuple[Tensor, Tensor] | None = None
    lengths: Tensor | None = None
    scratch: Tensor | None = None
    may_share: bool = False

    @property
    def segments(self) -> tuple[Any, ...]:
        """One that ``memo`` tells of, if there is a page."""
        return (None,) if self.num_pages else ()

    def on_host(self) -> "_SequenceView":
        """Itself."""
        return self


def attend_blocks(
    query: Tensor, key_states: Tensor, value_states: Tensor, pages: BlockPages, options: AttentionOptions
) -> Tensor:
    """See ``BlockBackend.attend_blocks``."""
    output = query.new_zeros(1, query.shape[2], query.shape[1], pages.layout.v_head_dim)
    addresses = [part.data_ptr() for part in pages.layout.parts(pages.pool)]
    strides = pages.pool.stride(0), pages.layout.chunk_bytes
    single = single_tokens(pages)
    decoding: Iterator[tuple[Tensor, Tensor]] = iter(())
    if single is not None:
        opened = (single.open_pages(pages, key_states, True), single.open_pages(pages, value_states, False))
        decoding = zip(*(part.split(1) for part in opened), strict=True)
    for index, tokens, stored in sequences_of(pages.batch):
        full, rest = divmod(stored, PAGE_SIZE)
        if tokens.stop - tokens.start == 1:
            tails, tail_len = next(decoding), rest + 1
        else:
            tails = _tail(pages, index, stored, key_states[:, :, tokens], value_states[:, :, tokens])
            tail_len = tails[0].shape[2]
        row = pages.batch.block_table[index : index + 1, :full]
        view = _SequenceView(full, row, tails, tail_len)
        segment = (ctypes.c_int64 * 8)(*addresses, full, 1, *strides)
        view.memo["cpu"] = ctypes.addressof(segment), segment
        output[:, tokens] = cpu.attention(query[:, :, tokens], view, options)
    return output


def _tail(pages: BlockPages, index: int, stored: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The exact keys and values of a sequence: those of its open page and the new ones."""
    full, rest = divmod(stored, PAGE_SIZE)
    if not rest:
        return key, value
    blocks = blocks_of(pages, index, stored)[full:]
    opened = (open_page(pages, blocks, rest, is_key)[None] for is_key in (True, False))
    made = [torch.cat([held, new], dim=2) for held, new in zip(opened, (key, value), strict=True)]
    return made[0], made[1]


def append_blocks(key_states: Tensor, value_states: Tensor, pages: BlockPages) -> None:
    """See ``BlockBackend.append_blocks``."""
    append_with(_quantize, key_states, value_states, pages)


class _Pages(NamedTuple):
    """A segment to be written."""

    key_qdata: Tensor
    key_metadata: Tensor
    value_qdata: Tensor
    value_metadata: Tensor

    @property
    def memo(self) -> dict[object, Any]:
        """Nothing is remembered of it."""
        return {}

    def narrow(self, start: int, stop: int | None) -> "_Pages":
        """The pages ``start`` to ``stop``."""
        return _Pages(*(part[start:stop] for part in self))


def _quantize(key_states: Tensor, value_states: Tensor) -> _Pages:
    made: list[Tensor] = []
    for states, groups in ((key_states, key_states.shape[3]), (value_states, PAGE_SIZE)):
        _, heads, tokens, width = states.shape
        shape = tokens // PAGE_SIZE, 1, heads
        made.append(states.new_empty(*shape, PAGE_SIZE, width, dtype=torch.int8))
        made.append(states.new_empty(*shape, groups, 2, dtype=torch.int16))
    target = _Pages(*made)
    cpu.store_pages(key_states, value_states, target)
    return target


def unsupported_blocks(layout: BlockLayout) -> str | None:
    """Why the kernels do not cover blocks of this layout, or None."""
    states = (
        torch.empty(0, width, dtype=layout.dtype, device="meta") for width in (layout.head_dim, layout.v_head_dim)
    )
    return cpu.unsupported(*states)
