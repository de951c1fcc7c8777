"""The operations that read a layer: their schemas and fakes, and the functions that check and call them.

What they take is a view. For ``torch.library``, which knows tensors and numbers alone, one is packed: of a layer that
grows the parts of its segments and its tail, of a recorded step the one tensor that is its memory.
"""

from typing import Any, Final

import torch
from torch import Tensor

from quantcache.backends.devices import check_devices, check_pages
from quantcache.backends.dispatch import BACKENDS, backend_for
from quantcache.backends.protocol import Backend
from quantcache.quantization import reference
from quantcache.quantization.options import PLAIN, SCHEMA, AttentionOptions
from quantcache.quantization.scheme import PAGE_SIZE
from quantcache.store.buffer import OWN_ROWS, PAGES, SEQ_LEN, SHARES_READS, StaticShape, layout_for
from quantcache.store.segments import ClosedPages, Segment
from quantcache.store.view import PagesView
from quantcache.store.writes import is_plain

_library = torch.library.Library("quantcache", "FRAGMENT")
# The scratch of a recorded view is written, but what is in it before and after means nothing: it counts as read-only.
_library.define("restore(Tensor[] view, int[] form, ScalarType dtype, bool is_key) -> Tensor")
_library.define(f"attention(Tensor query, Tensor[] view, int[] form, {SCHEMA}) -> Tensor")

_PARTS: Final = len(Segment._fields)


def packed(view: PagesView) -> tuple[list[Tensor], list[int]]:
    """The tensors and numbers of a view whose lengths the host knows, with what is pending written."""
    view.write_pending()
    tensors = [part for segment in view.segments for part in segment]
    table = [] if view.row_table is None else [view.row_table]
    return [*tensors, *view.buffers, *table], [len(view.segments), view.tail_len, view.capacity or 0]


def unpacked(tensors: list[Tensor], form: list[int], dtype: torch.dtype) -> PagesView:
    """The view of ``packed``, or of a recorded step: its memory, scratch and ``Source``, and its ``StaticShape``."""
    if len(form) == len(StaticShape._fields):
        memory, scratch, *source = tensors
        shape = StaticShape(*form)
        buffers = layout_for(shape, dtype).unpack(memory)
        key_tail, value_tail, lengths = source or buffers[4:7]
        table = None if shape.sharing == OWN_ROWS else buffers.row_table
        closed = ClosedPages((buffers.pages,), table, shape.sharing == SHARES_READS)
        return PagesView(closed, key_tail, value_tail, lengths=lengths, scratch=scratch, capacity=shape.capacity)
    num_segments, tail_len, capacity = form
    parts, (key_tail, value_tail, *tables) = tensors[: _PARTS * num_segments], tensors[_PARTS * num_segments :]
    segments = tuple(Segment(*parts[start : start + _PARTS]) for start in range(0, len(parts), _PARTS))
    closed = ClosedPages(segments, tables[0] if tables else None)
    return PagesView(closed, key_tail, value_tail, tail_len, capacity=capacity or None)


def restore(view: PagesView, is_key: bool) -> Tensor:
    """Pages and tail as one dense tensor.

    Returns:
        (batch, num_kv_heads, tokens, head_dim) in the model's dtype: the tokens there are, or of fixed capacity as many
        as there is room for, with zeros behind the last.
    """
    if view.is_exact:
        return view.key_tail if is_key else view.value_tail
    restored: Tensor = torch.ops.quantcache.restore(*packed(view), view.dtype, is_key)
    return restored


def restore_both(view: PagesView) -> tuple[Tensor, Tensor]:
    """``restore`` of the keys and of the values."""
    return restore(view, True), restore(view, False)


def attention(query: Tensor, view: PagesView, options: AttentionOptions = PLAIN) -> Tensor:
    """Attention over pages and tail in one softmax; ``reference.attend`` over the restored states is its specification.

    Args:
        query: (batch, num_q_heads, query_len, head_dim); the last query sits on the last key.
        view: what is read, with lengths that the host knows. Pending tokens are written on the way.
        options: see ``AttentionOptions``; the last axis of a mask may be longer than there are keys.

    Returns:
        (batch, query_len, num_q_heads, v_head_dim), contiguous, in the dtype of ``query``.

    Raises:
        ValueError: shapes or numbers that do not fit together, or a tensor on another device than the layer.
        TypeError: a query whose dtype is not the tail's.
    """
    if view.capacity:
        options = options.up_to(view.seq_len)
    _check_attention(query, view, options)
    if query.requires_grad and torch.is_grad_enabled():
        # The operation has no derivative; the same numbers in differentiable torch keep the query's gradient.
        key, value = (dense[:, :, : view.seq_len] for dense in restore_both(view))
        return reference.attend(query, key, value, options)
    if is_plain(query):
        backend = BACKENDS[view.backend[0] if view.backend else backend_for(*view.buffers)[0]]
        output = backend.attention(query, view, options)
        view.pending = None
        return output
    traced: Tensor = torch.ops.quantcache.attention(query, *packed(view), *options)
    return traced


def attention_recorded(
    query: Tensor, tensors: list[Tensor], shape: StaticShape, options: AttentionOptions = PLAIN
) -> Tensor:
    """``attention`` over the tokens that there are when it runs; nothing behind them is read, and time follows them.

    Args:
        query: see ``attention``.
        tensors: see ``unpacked``.
        shape: of the memory.
        options: see ``attention``.
    """
    output: Tensor = torch.ops.quantcache.attention(query, tensors, shape, *options)
    return output


def restore_recorded(tensors: list[Tensor], shape: StaticShape, dtype: torch.dtype, is_key: bool) -> Tensor:
    """``restore`` of a recorded step."""
    restored: Tensor = torch.ops.quantcache.restore(tensors, shape, dtype, is_key)
    return restored


def _reader(name: str, view: PagesView) -> tuple[Backend, PagesView]:
    """The backend ``name``, and the view as it can read it."""
    backend = BACKENDS[name]
    if view.row_table is not None and not backend.READS_ROW_TABLE:
        closed, lengths, scratch = view.closed.resolved, view.lengths, view.scratch
        view = PagesView(closed, *view.buffers, view.tail_len, lengths=lengths, scratch=scratch, capacity=view.capacity)
    return backend, view


def _run_attention(query: Tensor, tensors: list[Tensor], form: list[int], *args: Any) -> Tensor:
    options = AttentionOptions(*args)
    _check_places(tensors, query, options)
    view = unpacked(tensors, form, query.dtype)
    backend, view = _reader(backend_for(query, view.buffers[1])[0], view)
    return backend.attention(query, view, options)


def _check_places(tensors: list[Tensor], query: Tensor, options: AttentionOptions) -> None:
    """``check_devices`` of an attention call over the packed ``tensors``."""
    sinks, attn_mask = options.sinks, options.attn_mask
    check_devices("attention", tensors[0].device, query=query, attn_mask=attn_mask, sinks=sinks)
    check_pages(tensors[0].device, [tensors])


def _fake_attention(query: Tensor, tensors: list[Tensor], form: list[int], *args: Any) -> Tensor:
    _check_places(tensors, query, AttentionOptions(*args))
    batch, num_q_heads, query_len, _ = query.shape
    v_head_dim = unpacked(tensors, form, query.dtype).buffers[1].shape[3]
    return query.new_empty(batch, query_len, num_q_heads, v_head_dim)


def _run_restore(tensors: list[Tensor], form: list[int], dtype: torch.dtype, is_key: bool) -> Tensor:
    check_pages(tensors[0].device, [tensors])
    view = unpacked(tensors, form, dtype)
    backend, view = _reader(backend_for(*view.buffers)[0], view)
    if view.lengths is None:
        dense = backend.restore(view, is_key)
        missing = (view.capacity or 0) - dense.shape[2]
        return torch.nn.functional.pad(dense, (0, 0, 0, missing)) if missing > 0 else dense
    # All there is room for is restored, and put in order by lengths that stay on the device.
    assert view.capacity is not None
    dense = backend.restore(PagesView(view.closed, *view.buffers), is_key)
    positions = torch.arange(view.capacity, device=dense.device)
    # The tail follows the pages there are, not the pages there is room for.
    behind = view.lengths[PAGES] * PAGE_SIZE
    moved = (positions - behind + view.num_pages * PAGE_SIZE).clamp(max=dense.shape[2] - 1)
    dense = dense.index_select(2, torch.where(positions >= behind, moved, positions))
    seen = (positions < view.lengths[SEQ_LEN])[:, None]
    return torch.where(seen, dense, 0)


def _fake_restore(tensors: list[Tensor], form: list[int], dtype: torch.dtype, is_key: bool) -> Tensor:
    view = unpacked(tensors, form, dtype)
    return view.buffers[0].new_empty(view.state_shape(is_key))


for _name, _run, _fake in (("attention", _run_attention, _fake_attention), ("restore", _run_restore, _fake_restore)):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"quantcache::{_name}", _fake, lib=_library)


def _check_attention(query: Tensor, view: PagesView, options: AttentionOptions) -> None:
    attn_mask, _, _, window, softcap, sinks = options
    key_buffer, value_buffer = view.buffers
    batch, num_kv_heads, _, head_dim = key_buffer.shape
    device = key_buffer.device
    if (
        query.device != device
        or (attn_mask is not None and attn_mask.device != device)
        or (sinks is not None and sinks.device != device)
    ):
        check_devices("attention", device, query=query, attn_mask=attn_mask, sinks=sinks)
    if query.dim() != 4 or query.shape[0] != batch or query.shape[3] != head_dim or query.shape[1] % num_kv_heads:
        raise ValueError(
            "ops.attention: query must be (batch, num_q_heads, query_len, head_dim) with batch "
            f"{batch}, head_dim {head_dim} and num_q_heads a multiple of {num_kv_heads}, got {tuple(query.shape)}."
        )
    if query.dtype != key_buffer.dtype or query.dtype != value_buffer.dtype:
        raise TypeError(
            "ops.attention: query must have the dtype of the cached states, "
            f"{key_buffer.dtype} and {value_buffer.dtype}, got {query.dtype}."
        )
    if attn_mask is not None:
        full = (batch, query.shape[1], query.shape[2], view.seq_len)
        aligned = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
        if len(aligned) != 4 or any(have not in (1, want) for have, want in zip(aligned, full, strict=True)):
            raise ValueError(
                "ops.attention: attn_mask must broadcast to (batch, num_q_heads, query_len, kv_len) = "
                f"{full}, got {tuple(attn_mask.shape)}."
            )
        if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
            raise TypeError(f"ops.attention: attn_mask must be bool or floating point, got {attn_mask.dtype}.")
    if window is not None and window < 1:
        raise ValueError(f"ops.attention: window must be at least 1 token, got {window}.")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"ops.attention: softcap must be positive, got {softcap}.")
    if sinks is not None and tuple(sinks.shape) != (query.shape[1],):
        raise ValueError(
            f"ops.attention: sinks must be one number per query head, ({query.shape[1]},), got {tuple(sinks.shape)}."
        )
