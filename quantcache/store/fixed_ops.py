"""The operations of a cache of fixed capacity, whose lengths are read from device memory when they run.

A compiled step can use them: nothing in it depends on how many tokens there are. They are registered under the
``quantcache`` as those of ``ops.py`` are, and run on the same backends.

A layer is one tensor of bytes. torch.compile checks before each call every tensor and every number that a step takes
from the host, and with one tensor for each part that took longer than all other checks together.

``lengths`` is int32 (4,): closed pages, tokens in the tail, tokens in all, and a counter that kernels leave zero.
A tail has room for page_size + residual_length tokens; when an operation finds it full, it closes a page first.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from quantcache.backends import cuda as cuda_backend
from quantcache.backends import dispatch
from quantcache.quantization.options import PLAIN, SCHEMA, AttentionOptions
from quantcache.quantization.scheme import PAGE_SIZE
from quantcache.store import ops
from quantcache.store.segments import Segment

NUM_LENGTHS: Final = 4
PAGES, TAIL_LEN, SEQ_LEN, COUNTER = range(NUM_LENGTHS)


class Sizes(NamedTuple):
    """The numbers that make a ``Layout``.

    Attributes:
        capacity: tokens that fit.
        residual_length: newer tokens that a page waits for.
        batch: sequences.
        num_kv_heads: of the layer.
        head_dim: of the keys.
        v_head_dim: of the values.
    """

    capacity: int
    residual_length: int
    batch: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int

    @property
    def num_pages(self) -> int:
        """Pages that are ever closed."""
        return max(0, (self.capacity - self.residual_length) // PAGE_SIZE)

    @property
    def tail_capacity(self) -> int:
        """Tokens that the tail has room for."""
        return min(PAGE_SIZE + self.residual_length, self.capacity)


@dataclass(frozen=True)
class Layout:
    """What lies where in the memory of a layer. ``layout_for`` makes it, so that layers alike share one.

    Attributes:
        sizes: numbers of what there is.
        dtype: of the model, and so of the tails.
    """

    sizes: Sizes
    dtype: torch.dtype

    @functools.cached_property
    def _parts(self) -> list[tuple[int, int, torch.dtype, tuple[int, ...]]]:
        """First byte, end, dtype and shape of each part of ``Store``."""
        sizes = self.sizes
        rows = sizes.num_pages, sizes.batch, sizes.num_kv_heads
        tail = sizes.batch, sizes.num_kv_heads, sizes.tail_capacity
        shapes: list[tuple[torch.dtype, tuple[int, ...]]] = [
            (torch.int8, (*rows, PAGE_SIZE, sizes.head_dim)),
            (torch.int16, (*rows, sizes.head_dim, 2)),
            (torch.int8, (*rows, PAGE_SIZE, sizes.v_head_dim)),
            (torch.int16, (*rows, PAGE_SIZE, 2)),
            (self.dtype, (*tail, sizes.head_dim)),
            (self.dtype, (*tail, sizes.v_head_dim)),
            (torch.int32, (NUM_LENGTHS,)),
        ]
        parts, start = [], 0
        for dtype, shape in shapes:
            end = start + math.prod(shape) * dtype.itemsize
            parts.append((start, end, dtype, shape))
            start = -(-end // ALIGNMENT) * ALIGNMENT
        return parts

    @property
    def nbytes(self) -> int:
        """Bytes of the memory."""
        return self._parts[-1][1]

    def allocate(self, device: torch.device) -> Tensor:
        """Memory without a token in it, uint8 (bytes,)."""
        memory = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        memory[self._parts[4][0] :].zero_()
        return memory

    def unpack(self, memory: Tensor) -> "Store":
        """The parts, sharing the memory."""
        return Store(*(memory[start:end].view(dtype).view(shape) for start, end, dtype, shape in self._parts))


@functools.cache
def layout_for(sizes: Sizes, dtype: torch.dtype) -> Layout:
    """The one layout of such layers."""
    return Layout(sizes, dtype)


ALIGNMENT: Final = 16
"""Bytes that the parts are aligned to, as the kernels read them."""


class Store(NamedTuple):
    """The parts of one layer's memory.

    key_qdata: int8 (capacity, batch, num_kv_heads, page_size, head_dim)
    key_metadata: int16 (capacity, batch, num_kv_heads, head_dim, 2)
    value_qdata: int8 (capacity, batch, num_kv_heads, page_size, v_head_dim)
    value_metadata: int16 (capacity, batch, num_kv_heads, page_size, 2)
    key_tail: (batch, num_kv_heads, tail capacity, head_dim) in the model's dtype
    value_tail: (batch, num_kv_heads, tail capacity, v_head_dim)
    lengths: int32 (4,)
    """

    key_qdata: Tensor
    key_metadata: Tensor
    value_qdata: Tensor
    value_metadata: Tensor
    key_tail: Tensor
    value_tail: Tensor
    lengths: Tensor

    @property
    def pages(self) -> Segment:
        """All pages that there is room for."""
        return Segment(*self[:4])


class NewerTail(NamedTuple):
    """Exact tokens behind the closed pages, read instead of the layer's tail.

    key_tail: (batch, num_kv_heads, any, head_dim)
    value_tail: (batch, num_kv_heads, any, v_head_dim)
    lengths: int32 (4,), the layer's lengths with these tokens as the tail
    """

    key_tail: Tensor
    value_tail: Tensor
    lengths: Tensor


_LAYOUT: Final = "int[] sizes, ScalarType dtype"
_library = torch.library.Library("quantcache", "FRAGMENT")
_library.define(f"static_append(Tensor key_states, Tensor value_states, Tensor(a!) memory, {_LAYOUT}) -> ()")
_library.define(
    f"static_store(Tensor key_source, Tensor value_source, Tensor source_lengths, Tensor(a!) memory, {_LAYOUT}) -> ()"
)
# The scratch is written, but what is in it before and after means nothing, so it counts as read-only.
_library.define(
    f"static_attention(Tensor query, Tensor memory, {_LAYOUT}, Tensor? key_tail, Tensor? value_tail, Tensor? lengths, "
    f"Tensor scratch, {SCHEMA}) -> Tensor"
)


def append(key_states: Tensor, value_states: Tensor, memory: Tensor, layout: Layout) -> None:
    """Close a page if the tail has one to close, then write at most one new token behind the tail.

    Args:
        key_states: (batch, num_kv_heads, query_len, head_dim), query_len 0 or 1.
        value_states: (batch, num_kv_heads, query_len, v_head_dim).
        memory: written. A token for which there is no room is counted and not stored.
        layout: of the memory.
    """
    torch.ops.quantcache.static_append(key_states, value_states, memory, layout.sizes, layout.dtype)


def store_tokens(newer: NewerTail, memory: Tensor, layout: Layout) -> None:
    """Make ``newer`` the end of the layer: pages that are due, and the rest as the tail.

    Args:
        newer: any strides.
        memory: written, lengths included. What there is no room for is counted and not stored.
        layout: of the memory.
    """
    torch.ops.quantcache.static_store(*newer, memory, layout.sizes, layout.dtype)


def attention(
    query: Tensor,
    memory: Tensor,
    layout: Layout,
    scratch: Tensor,
    options: AttentionOptions = PLAIN,
    newer: NewerTail | None = None,
) -> Tensor:
    """``ops.attention`` over the tokens that there are when it runs.

    Args:
        query: (batch, num_q_heads, query_len, head_dim); the last query sits on the last key.
        memory: what is read. Nothing behind its lengths is, and the time follows them.
        layout: of the memory.
        scratch: see ``make_scratch``.
        options: see ``AttentionOptions``; the last axis of a mask may be longer than there are keys.
        newer: instead of the tail.

    Returns:
        (batch, query_len, num_q_heads, v_head_dim), contiguous, in the dtype of ``query``.
    """
    output: Tensor = torch.ops.quantcache.static_attention(
        *(query, memory, layout.sizes, layout.dtype, *(newer or (None, None, None)), scratch, *options)
    )
    return output


def restore(memory: Tensor, layout: Layout, is_key: bool, newer: NewerTail | None = None) -> Tensor:
    """All tokens as one dense tensor, (batch, num_kv_heads, capacity, head_dim), zeros behind the last."""
    store = _readable(memory, layout, newer)
    qdata, metadata, tail = store[:2] + store[4:5] if is_key else store[2:4] + store[5:6]
    make = torch.ops.quantcache.restore_keys if is_key else torch.ops.quantcache.restore_values
    dense = make([qdata], [metadata], tail)
    positions = torch.arange(layout.sizes.capacity, device=dense.device)
    # The tail follows the pages there are, not the pages there is room for.
    moved = positions - store.lengths[PAGES] * PAGE_SIZE + len(qdata) * PAGE_SIZE
    is_tail = positions >= store.lengths[PAGES] * PAGE_SIZE
    dense = dense.index_select(2, torch.where(is_tail, moved.clamp(max=dense.shape[2] - 1), positions))
    seen = (positions < store.lengths[SEQ_LEN])[:, None]
    return torch.where(seen, dense, 0)


def _readable(memory: Tensor, layout: Layout, newer: NewerTail | None) -> Store:
    """The parts that are read."""
    store = layout.unpack(memory)
    return store if newer is None else store._replace(**newer._asdict())


def make_scratch(key_states: Tensor, value_states: Tensor) -> Tensor:
    """Memory that the kernels on this device need besides the store, zeroed; for all layers that run in turn."""
    if not key_states.is_cuda or dispatch.backend_for(key_states, value_states)[0] != "cuda":
        return torch.zeros(0, dtype=torch.int32, device=key_states.device)
    return cuda_backend.make_scratch(key_states.device, value_states.shape[-1])


def why_not_compileable(key_states: Tensor, value_states: Tensor) -> str | None:
    """Why a compiled step cannot run with such states, or None: where lengths would be read on the host, it cannot."""
    if not key_states.is_cuda:
        return None
    backend, reason = dispatch.backend_for(key_states, value_states)
    return None if backend == "cuda" else reason or dispatch.why_torch(key_states.device)


def _run_append(key_states: Tensor, value_states: Tensor, memory: Tensor, sizes: list[int], dtype: torch.dtype) -> None:
    layout = layout_for(Sizes(*sizes), dtype)
    store = layout.unpack(memory)
    backend, _ = dispatch.backend_for(key_states, value_states)
    if backend == "cuda":
        cuda_backend.static_append(key_states, value_states, store, layout.sizes.residual_length)
        return
    pages, tail_len, seq_len, _ = store.lengths.tolist()
    tails = store.key_tail[:, :, :tail_len], store.value_tail[:, :, :tail_len]
    if tail_len >= PAGE_SIZE + layout.sizes.residual_length:
        pages, tail_len = _store_on_host(*tails, pages, store, layout.sizes.residual_length)
    query_len = key_states.shape[2]
    if tail_len + query_len <= store.key_tail.shape[2]:
        ops.append_tail(key_states, value_states, store.key_tail, store.value_tail, tail_len)
        tail_len += query_len
    _set_lengths(store.lengths, pages, tail_len, seq_len + query_len)


def _run_store(
    key_source: Tensor,
    value_source: Tensor,
    source_lengths: Tensor,
    memory: Tensor,
    sizes: list[int],
    dtype: torch.dtype,
) -> None:
    layout = layout_for(Sizes(*sizes), dtype)
    store = layout.unpack(memory)
    backend, _ = dispatch.backend_for(key_source, value_source)
    if backend == "cuda":
        cuda_backend.static_store(key_source, value_source, source_lengths, store, layout.sizes.residual_length)
        return
    pages, tail_len, seq_len, _ = source_lengths.tolist()
    sources = key_source[:, :, :tail_len], value_source[:, :, :tail_len]
    pages, tail_len = _store_on_host(*sources, pages, store, layout.sizes.residual_length)
    _set_lengths(store.lengths, pages, tail_len, seq_len)


def _store_on_host(
    key_source: Tensor, value_source: Tensor, pages: int, store: Store, residual_length: int
) -> tuple[int, int]:
    """Pages and tail length after the tokens of ``key_source`` were stored behind ``pages`` pages."""
    tokens = key_source.shape[2]
    due = max(0, (tokens - residual_length) // PAGE_SIZE)
    closing = min(due, len(store.key_qdata) - pages)
    if closing:
        whole = slice(0, closing * PAGE_SIZE)
        targets = store.pages.narrow(pages, pages + closing)
        ops.store_pages(key_source[:, :, whole], value_source[:, :, whole], *targets)
    rest = slice(closing * PAGE_SIZE, min(tokens, closing * PAGE_SIZE + store.key_tail.shape[2]))
    # Copied before they are written: a tail's own tokens move to its front.
    new_tails = key_source[:, :, rest].clone(), value_source[:, :, rest].clone()
    ops.append_tail(*new_tails, store.key_tail, store.value_tail, 0)
    return pages + closing, new_tails[0].shape[2]


def _set_lengths(lengths: Tensor, pages: int, tail_len: int, seq_len: int) -> None:
    lengths.copy_(torch.tensor([pages, tail_len, seq_len, 0], dtype=torch.int32))


def _run_attention(
    query: Tensor,
    memory: Tensor,
    sizes: list[int],
    dtype: torch.dtype,
    key_tail: Tensor | None,
    value_tail: Tensor | None,
    lengths: Tensor | None,
    scratch: Tensor,
    *args: Any,
) -> Tensor:
    options = AttentionOptions(*args)
    newer = None
    if key_tail is not None and value_tail is not None and lengths is not None:
        newer = NewerTail(key_tail, value_tail, lengths)
    store = _readable(memory, layout_for(Sizes(*sizes), dtype), newer)
    backend, _ = dispatch.backend_for(query, store.value_tail)
    if backend == "cuda":
        return cuda_backend.static_attention(query, store, scratch, options)
    num_pages, tail_len, *_ = store.lengths.tolist()
    if options.attn_mask is not None and options.attn_mask.shape[-1] > 1:
        options = options._replace(attn_mask=options.attn_mask[..., : num_pages * PAGE_SIZE + tail_len])
    run: Any = dispatch.BACKENDS[backend].attention
    parts = ([part] for part in store.pages.narrow(0, num_pages))
    output: Tensor = run(query, *parts, *(tail[:, :, :tail_len] for tail in store[4:6]), options)
    return output


def _fake_attention(query: Tensor, memory: Tensor, sizes: list[int], *args: Any) -> Tensor:
    batch, num_q_heads, query_len, _ = query.shape
    return query.new_empty(batch, query_len, num_q_heads, Sizes(*sizes).v_head_dim)


for _name, _run, _fake in (
    ("static_append", _run_append, lambda *_: None),
    ("static_store", _run_store, lambda *_: None),
    ("static_attention", _run_attention, _fake_attention),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"quantcache::{_name}", _fake, lib=_library)
