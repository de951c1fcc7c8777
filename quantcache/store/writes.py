"""The operations that write into a layer: their schemas and fakes, and the functions that call them.

Each is registered with ``torch.library`` under the namespace ``quantcache``, for what traces or fakes tensors; plain
tensors go to the backend at once.
"""

import torch
from torch import Tensor

from quantcache.backends.devices import check_devices
from quantcache.backends.dispatch import BACKENDS, backend_for
from quantcache.backends.protocol import Source
from quantcache.store.buffer import BufferLayout, StaticShape, layout_for
from quantcache.store.segments import Segment

_library = torch.library.Library("quantcache", "FRAGMENT")
_library.define(
    "store_pages(Tensor key_states, Tensor value_states, Tensor(a!) key_qdata, Tensor(b!) key_metadata, "
    "Tensor(c!) value_qdata, Tensor(d!) value_metadata) -> ()"
)
_library.define(
    "append_tail(Tensor key_states, Tensor value_states, Tensor(a!) key_tail, Tensor(b!) value_tail, "
    "int position) -> ()"
)
_library.define(
    "advance(Tensor key_states, Tensor value_states, Tensor(a!) memory, int[] shape, ScalarType dtype, "
    "Tensor? key_source=None, Tensor? value_source=None, Tensor? source_lengths=None) -> ()"
)


def is_plain(states: Tensor) -> bool:
    """Whether operations may go to their backend at once, past torch's dispatcher, which takes 4 us a call.

    Nobody traces, fakes or transforms the tensors then; an operation without a derivative may be called directly.
    """
    return (
        type(states) is Tensor
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def store_pages(key_states: Tensor, value_states: Tensor, target: Segment, backend: str | None = None) -> None:
    """Quantise whole pages of keys and values into memory that is already there.

    Args:
        key_states: (batch, num_kv_heads, T, head_dim), any float dtype and strides; T = P * page_size.
        value_states: (batch, num_kv_heads, T, v_head_dim).
        target: written; P pages.
        backend: what ``backend_for`` the states named, if it was asked already.

    Raises:
        ValueError: see ``check_devices``; nothing is written.
    """
    check_devices("store_pages", target.key_qdata.device, key_states=key_states, value_states=value_states)
    if is_plain(key_states):
        BACKENDS[backend or backend_for(key_states, value_states)[0]].store_pages(key_states, value_states, target)
    else:
        torch.ops.quantcache.store_pages(key_states, value_states, *target)


def append_tail(
    key_states: Tensor,
    value_states: Tensor,
    key_tail: Tensor,
    value_tail: Tensor,
    position: int,
    backend: str | None = None,
) -> None:
    """Write new tokens into memory of the tail that is already there.

    Args:
        key_states: (batch, num_kv_heads, query_len, head_dim), any strides.
        value_states: (batch, num_kv_heads, query_len, v_head_dim).
        key_tail: written from ``position`` on; (batch, num_kv_heads, capacity, head_dim) in the dtype of the states.
        value_tail: written likewise.
        position: token of the tail that is written first.
        backend: what ``backend_for`` the states named, if it was asked already.

    Raises:
        ValueError: see ``check_devices``; nothing is written.
    """
    if key_states.device != key_tail.device or value_states.device != key_tail.device:
        check_devices("append_tail", key_tail.device, key_states=key_states, value_states=value_states)
    if is_plain(key_states):
        chosen = BACKENDS[backend or backend_for(key_states, value_states)[0]]
        chosen.append_tail(key_states, value_states, key_tail, value_tail, position)
    else:
        torch.ops.quantcache.append_tail(key_states, value_states, key_tail, value_tail, position)


def advance(
    key_states: Tensor, value_states: Tensor, memory: Tensor, layout: BufferLayout, source: Source | None = None
) -> None:
    """Take a layer of fixed capacity on: close the pages that are due, append tokens, move the lengths.

    Nothing of it depends on how many tokens there are, so that a recorded step can do it.

    Args:
        key_states: (batch, num_kv_heads, query_len, head_dim), query_len 0 or 1, appended once a page that has as many
            newer tokens as it waits for is closed. A token for which there is no room is counted and not stored.
        value_states: (batch, num_kv_heads, query_len, v_head_dim).
        memory: written.
        layout: of the memory.
        source: instead of the layer's tail: becomes its end, pages that are due and the rest as the tail.
    """
    torch.ops.quantcache.advance(key_states, value_states, memory, layout.shape, layout.dtype, *(source or ()))


def _check_store_pages(*tensors: Tensor) -> None:
    names = ("key_states", "value_states", *Segment._fields)
    check_devices("store_pages", tensors[2].device, **dict(zip(names, tensors, strict=True)))


def _run_store_pages(key_states: Tensor, value_states: Tensor, *target: Tensor) -> None:
    _check_store_pages(key_states, value_states, *target)
    BACKENDS[backend_for(key_states, value_states)[0]].store_pages(key_states, value_states, Segment(*target))


def _check_append_tail(
    key_states: Tensor, value_states: Tensor, key_tail: Tensor, value_tail: Tensor, position: int
) -> None:
    given = {"key_states": key_states, "value_states": value_states, "value_tail": value_tail}
    check_devices("append_tail", key_tail.device, **given)


def _run_append_tail(
    key_states: Tensor, value_states: Tensor, key_tail: Tensor, value_tail: Tensor, position: int
) -> None:
    _check_append_tail(key_states, value_states, key_tail, value_tail, position)
    backend = BACKENDS[backend_for(key_states, value_states)[0]]
    backend.append_tail(key_states, value_states, key_tail, value_tail, position)


def _check_advance(
    key_states: Tensor, value_states: Tensor, memory: Tensor, shape: list[int], dtype: torch.dtype, *source: Tensor
) -> None:
    given = dict(zip(("key_source", "value_source", "source_lengths"), source, strict=False))
    check_devices("advance", memory.device, key_states=key_states, value_states=value_states, **given)


def _run_advance(
    key_states: Tensor,
    value_states: Tensor,
    memory: Tensor,
    shape: list[int],
    dtype: torch.dtype,
    key_source: Tensor | None = None,
    value_source: Tensor | None = None,
    source_lengths: Tensor | None = None,
) -> None:
    source = None
    if key_source is not None and value_source is not None and source_lengths is not None:
        source = key_source, value_source, source_lengths
    _check_advance(key_states, value_states, memory, shape, dtype, *(source or ()))
    static = StaticShape(*shape)
    buffers = layout_for(static, dtype).unpack(memory)
    backend = BACKENDS[backend_for(key_states, value_states)[0]]
    backend.advance(source, key_states, value_states, buffers, static.residual_length)


# What traces or fakes an operation gets its check alone: nothing is returned.
for _name, _run, _check in (
    ("store_pages", _run_store_pages, _check_store_pages),
    ("append_tail", _run_append_tail, _check_append_tail),
    ("advance", _run_advance, _check_advance),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"quantcache::{_name}", _check, lib=_library)
