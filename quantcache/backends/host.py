"""What the backends share that need no GPU: lengths are read on the host, and tails written by torch."""

import ctypes
import struct
from typing import Final, Protocol

import torch
from torch import Tensor

from quantcache.backends.protocol import Buffers, SegmentLike, Source, View
from quantcache.quantization.options import AttentionOptions
from quantcache.quantization.scheme import PAGE_SIZE

WRITES_ON_READ: Final = False
READS_LENGTHS: Final = False

_LENGTHS: Final = struct.Struct("4i")


class StorePages(Protocol):
    """``Backend.store_pages``."""

    def __call__(self, key_states: Tensor, value_states: Tensor, target: SegmentLike) -> None:
        """Quantise whole pages."""


def append_tail(key_states: Tensor, value_states: Tensor, key_tail: Tensor, value_tail: Tensor, position: int) -> None:
    """See ``writes.append_tail``."""
    key_tail.narrow(2, position, key_states.shape[2]).copy_(key_states)
    value_tail.narrow(2, position, value_states.shape[2]).copy_(value_states)


def advance(
    source: Source | None,
    key_states: Tensor,
    value_states: Tensor,
    buffers: Buffers,
    residual_length: int,
    store_pages: StorePages,
) -> None:
    """``advance`` with lengths that the host reads, and pages quantised by ``store_pages``.

    What is there changes in one copy, the last: before it only memory that nobody reads is written.
    """
    key_source, value_source, lengths = source or (buffers.key_tail, buffers.value_tail, buffers.lengths)
    pages, tail_len, seq_len, counter = lengths.tolist()
    tokens, room = key_states.shape[2], buffers.key_tail.shape[2]
    due = max(tail_len - residual_length, 0) // PAGE_SIZE
    if source is None and not due:  # what most steps of decoding do
        stored = tokens if tail_len + tokens <= room else 0
        if stored:
            append_tail(key_states, value_states, buffers.key_tail, buffers.value_tail, tail_len)
        if tokens:
            _set(lengths, pages, tail_len + stored, seq_len + tokens, counter)
        return
    target = buffers.pages
    closing = min(due, len(target.key_qdata) - pages)
    start = closing * PAGE_SIZE
    if closing:
        store_pages(key_source[:, :, :start], value_source[:, :, :start], target.narrow(pages, pages + closing))
    rest = min(tail_len - start, room)
    stored = tokens if rest + tokens <= room else 0
    made = buffers.like_newest()
    made.newest.copy_(buffers.newest)
    append_tail(
        key_source[:, :, start : start + rest],
        value_source[:, :, start : start + rest],
        *(made.key_tail, made.value_tail),
        position=0,
    )
    if stored:
        append_tail(key_states, value_states, made.key_tail, made.value_tail, rest)
    _set(made.lengths, pages + closing, rest + stored, seq_len + tokens, counter)
    buffers.newest.copy_(made.newest)


def _set(lengths: Tensor, *values: int) -> None:
    if lengths.is_cpu:
        # A tenth of the time of making a tensor and copying it.
        ctypes.memmove(lengths.data_ptr(), _LENGTHS.pack(*values), _LENGTHS.size)
    else:
        lengths.copy_(torch.tensor(values, dtype=torch.int32, device="cpu"))


def write_pending(view: View) -> None:
    """Have the newest tokens in the buffers before they are read there."""
    if view.pending is not None:
        append_tail(*view.pending, *view.buffers, view.tail_len - view.pending[0].shape[2])


def on_host(view: View, options: AttentionOptions) -> tuple[View, AttentionOptions]:
    """A view with lengths in device memory as one whose lengths the host knows, and its mask cut to them."""
    known = view.on_host()
    kv_len = known.num_pages * PAGE_SIZE + known.tail_len
    return known, options.up_to(kv_len)


def make_scratch(device: torch.device, v_head_dim: int) -> Tensor:
    """See ``Backend.make_scratch``: none is needed."""
    return torch.zeros(0, dtype=torch.int32, device=device)
