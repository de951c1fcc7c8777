"""The operations of a cache of fixed capacity, whose lengths are read from device memory when they run.

A compiled step can use them: nothing in it depends on how many tokens there are. They are registered under the
``quantcache`` as those of ``ops.py`` are, and run on the same backends.

``lengths`` is int32 (4,): closed pages, tokens in the tail, tokens in all, and a counter that kernels leave zero.
A tail has room for page_size + residual_length tokens; when an operation finds it full, it closes a page first.
"""

import math
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from quantcache import ops
from quantcache.backends import cuda as cuda_backend
from quantcache.scheme import PAGE_SIZE

NUM_LENGTHS: Final = 4
PAGES, TAIL_LEN, SEQ_LEN, COUNTER = range(NUM_LENGTHS)


class Memory(NamedTuple):
    """The memory of one layer as a compiled step gets it: no more tensors than transformers' static layer has.

    Every tensor that a compiled step takes is checked before each call, which with one for each part of the pages would
    cost as much again as all other checks.

    pages: uint8 (bytes,), codes and metadata of the keys, then of the values
    tails: (elements,) in the model's dtype, keys and then values
    lengths: int32 (4,)
    """

    pages: Tensor
    tails: Tensor
    lengths: Tensor


class Layout(NamedTuple):
    """Where the parts of a layer lie in its ``Memory``: the sizes from which their shapes follow."""

    num_pages: int
    batch: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    tail_capacity: int

    def allocate(self, dtype: torch.dtype, device: torch.device) -> Memory:
        """Memory without a token in it."""
        shapes = self._shapes()
        nbytes = sum(math.prod(shape) * part_type.itemsize for shape, part_type in shapes[:4])
        elements = sum(math.prod(shape) for shape, _ in shapes[4:])
        return Memory(
            torch.empty(nbytes, dtype=torch.uint8, device=device),
            torch.zeros(elements, dtype=dtype, device=device),
            torch.zeros(NUM_LENGTHS, dtype=torch.int32, device=device),
        )

    def unpack(self, pages: Tensor, tails: Tensor, lengths: Tensor) -> "Store":
        """The parts, sharing the memory."""
        parts, start = [], 0
        for shape, part_type in self._shapes()[:4]:
            stop = start + math.prod(shape) * part_type.itemsize
            parts.append(pages[start:stop].view(part_type).view(shape))
            start = stop
        key_shape, value_shape = (shape for shape, _ in self._shapes()[4:])
        middle = math.prod(key_shape)
        key_tail, value_tail = tails[:middle].view(key_shape), tails[middle:].view(value_shape)
        return Store(*parts, key_tail, value_tail, lengths)  # type: ignore[call-arg]

    def _shapes(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        rows, tail = (
            (self.num_pages, self.batch, self.num_kv_heads),
            (self.batch, self.num_kv_heads, self.tail_capacity),
        )
        return [
            ((*rows, PAGE_SIZE, self.head_dim), torch.int8),
            ((*rows, self.head_dim, 2), torch.int16),
            ((*rows, PAGE_SIZE, self.v_head_dim), torch.int8),
            ((*rows, PAGE_SIZE, 2), torch.int16),
            ((*tail, self.head_dim), torch.float32),
            ((*tail, self.v_head_dim), torch.float32),
        ]


class Store(NamedTuple):
    """The parts of one layer's ``Memory``.

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


_WRITTEN: Final = "Tensor(a!) pages, Tensor(b!) tails, Tensor(c!) lengths, int[] layout, int residual_length"
_library = torch.library.Library("quantcache", "FRAGMENT")
_library.define(f"static_append(Tensor key_states, Tensor value_states, {_WRITTEN}) -> ()")
_library.define(f"static_store(Tensor key_source, Tensor value_source, Tensor source_lengths, {_WRITTEN}) -> ()")
# The scratch is written, but what is in it before and after means nothing, so it counts as read-only.
_library.define(
    "static_attention(Tensor query, Tensor pages, Tensor tails, Tensor lengths, int[] layout, Tensor scratch, "
    "Tensor? attn_mask, bool is_causal, float softmax_scale, int? window, float? softcap, Tensor? sinks) -> Tensor"
)


def append(key_states: Tensor, value_states: Tensor, memory: Memory, layout: Layout, residual_length: int) -> None:
    """Close a page if the tail has one to close, then write at most one new token behind the tail.

    Args:
        key_states: (batch, num_kv_heads, query_len, head_dim), query_len 0 or 1.
        value_states: (batch, num_kv_heads, query_len, v_head_dim).
        memory: written. A token for which there is no room is counted and not stored.
        layout: of the memory.
        residual_length: newer tokens that a page waits for.
    """
    torch.ops.quantcache.static_append(key_states, value_states, *memory, layout, residual_length)


def store_tokens(
    key_source: Tensor,
    value_source: Tensor,
    source_lengths: Tensor,
    memory: Memory,
    layout: Layout,
    residual_length: int,
) -> None:
    """Make the tokens of ``key_source`` the new end of the layer: pages that are due, and the rest as the tail.

    Args:
        key_source: (batch, num_kv_heads, any, head_dim), the exact tokens behind the closed pages, any strides.
        value_source: (batch, num_kv_heads, any, v_head_dim).
        source_lengths: int32 (4,), the lengths with ``key_source`` as the tail.
        memory: written, ``lengths`` included. What there is no room for is counted and not stored.
        layout: of the memory.
        residual_length: newer tokens that a page waits for.
    """
    torch.ops.quantcache.static_store(key_source, value_source, source_lengths, *memory, layout, residual_length)


def attention(
    query: Tensor,
    memory: Memory,
    layout: Layout,
    scratch: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    softmax_scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """``ops.attention`` over the tokens that there are when it runs.

    Args:
        query: (batch, num_q_heads, query_len, head_dim); the last query sits on the last key.
        memory: what is read. Nothing behind its lengths is, and the time follows them.
        layout: of the memory.
        scratch: see ``make_scratch``.
        attn_mask: see ``ops.attention``; its last axis may be longer than there are keys.
        is_causal: see ``ops.attention``, as for the arguments that follow.
        softmax_scale: see ``ops.attention``.
        window: see ``ops.attention``.
        softcap: see ``ops.attention``.
        sinks: see ``ops.attention``.

    Returns:
        (batch, query_len, num_q_heads, v_head_dim), contiguous, in the dtype of ``query``.
    """
    if softmax_scale is None:
        softmax_scale = float(query.shape[-1]) ** -0.5
    output: Tensor = torch.ops.quantcache.static_attention(
        query, *memory, layout, scratch, attn_mask, is_causal, softmax_scale, window, softcap, sinks
    )
    return output


def restore(memory: Memory, layout: Layout, capacity: int, is_key: bool) -> Tensor:
    """All tokens as one dense tensor, (batch, num_kv_heads, capacity, head_dim), zeros behind the last."""
    store = layout.unpack(*memory)
    qdata, metadata, tail = store[:2] + store[4:5] if is_key else store[2:4] + store[5:6]
    make = torch.ops.quantcache.restore_keys if is_key else torch.ops.quantcache.restore_values
    dense = make([qdata], [metadata], tail)
    positions = torch.arange(capacity, device=dense.device)
    # The tail follows the pages there are, not the pages there is room for.
    moved = positions - store.lengths[PAGES] * PAGE_SIZE + len(qdata) * PAGE_SIZE
    is_tail = positions >= store.lengths[PAGES] * PAGE_SIZE
    dense = dense.index_select(2, torch.where(is_tail, moved.clamp(max=dense.shape[2] - 1), positions))
    seen = (positions < store.lengths[SEQ_LEN])[:, None]
    return torch.where(seen, dense, 0)


def make_scratch(key_states: Tensor, value_states: Tensor) -> Tensor:
    """Memory that the kernels on this device need besides the store, zeroed; for all layers that run in turn."""
    if not key_states.is_cuda or ops.backend_for(key_states, value_states)[0] != "cuda":
        return torch.zeros(0, dtype=torch.int32, device=key_states.device)
    return cuda_backend.make_scratch(key_states.device, value_states.shape[-1])


def why_not_compileable(key_states: Tensor, value_states: Tensor) -> str | None:
    """Why a compiled step cannot run with such states, or None: where lengths would be read on the host, it cannot."""
    if not key_states.is_cuda:
        return None
    backend, reason = ops.backend_for(key_states, value_states)
    return None if backend == "cuda" else reason or ops.why_torch(key_states.device)


def _unpacked(args: tuple[Any, ...]) -> tuple[Store, int]:
    *memory, layout, residual_length = args
    return Layout(*layout).unpack(*memory), residual_length


def _run_append(key_states: Tensor, value_states: Tensor, *args: Any) -> None:
    store, residual_length = _unpacked(args)
    backend, _ = ops.backend_for(key_states, value_states)
    if backend == "cuda":
        cuda_backend.static_append(key_states, value_states, store, residual_length)
        return
    pages, tail_len, seq_len, _ = store.lengths.tolist()
    tails = store.key_tail[:, :, :tail_len], store.value_tail[:, :, :tail_len]
    if tail_len >= PAGE_SIZE + residual_length:
        pages, tail_len = _store_on_host(*tails, pages, store, residual_length)
    query_len = key_states.shape[2]
    if tail_len + query_len <= store.key_tail.shape[2]:
        ops.append_tail(key_states, value_states, store.key_tail, store.value_tail, tail_len)
        tail_len += query_len
    _set_lengths(store.lengths, pages, tail_len, seq_len + query_len)


def _run_store(key_source: Tensor, value_source: Tensor, source_lengths: Tensor, *args: Any) -> None:
    store, residual_length = _unpacked(args)
    backend, _ = ops.backend_for(key_source, value_source)
    if backend == "cuda":
        cuda_backend.static_store(key_source, value_source, source_lengths, store, residual_length)
        return
    pages, tail_len, seq_len, _ = source_lengths.tolist()
    sources = key_source[:, :, :tail_len], value_source[:, :, :tail_len]
    pages, tail_len = _store_on_host(*sources, pages, store, residual_length)
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
        targets = (part[pages : pages + closing] for part in store[:4])
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
    pages: Tensor,
    tails: Tensor,
    lengths: Tensor,
    layout: list[int],
    scratch: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    softmax_scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    options = (is_causal, softmax_scale, window, softcap, sinks)
    store = Layout(*layout).unpack(pages, tails, lengths)
    backend, _ = ops.backend_for(query, store.value_tail)
    if backend == "cuda":
        return cuda_backend.static_attention(query, store, scratch, attn_mask, *options)
    num_pages, tail_len, *_ = lengths.tolist()
    if attn_mask is not None and attn_mask.shape[-1] > 1:
        attn_mask = attn_mask[..., : num_pages * PAGE_SIZE + tail_len]
    run: Any = ops.BACKENDS[backend].attention
    parts = ([part[:num_pages]] for part in store[:4])
    tails_of = (tail[:, :, :tail_len] for tail in store[4:6])
    output: Tensor = run(query, *parts, *tails_of, attn_mask, *options)
    return output


def _fake_attention(query: Tensor, *args: Any) -> Tensor:
    batch, num_q_heads, query_len, _ = query.shape
    return query.new_empty(batch, query_len, num_q_heads, Layout(*args[3]).v_head_dim)


for _name, _run, _fake in (
    ("static_append", _run_append, lambda *_: None),
    ("static_store", _run_store, lambda *_: None),
    ("static_attention", _run_attention, _fake_attention),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"quantcache::{_name}", _fake, lib=_library)
