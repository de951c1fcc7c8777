"""The operations on the bytes of the cache: their schemas and fakes, and the functions that check and call them.

Each is registered with ``torch.library`` under the namespace ``quantcache``; the functions of the same name here check
their arguments and call it. P pages of page_size = 64 tokens come as lists of segments, (P_i, ...) each.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from quantcache.backends.dispatch import BACKENDS, backend_for
from quantcache.quantization import reference
from quantcache.quantization.options import PLAIN, SCHEMA, AttentionOptions
from quantcache.quantization.scheme import PAGE_SIZE


class Parts(list[Tensor]):
    """One part of the pages, a tensor a segment, with what backends have found out about it.

    The tensors must not be exchanged once an operation has seen the list.
    """

    __slots__ = ("memo",)

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        super().__init__(tensors)
        self.memo: dict[object, Any] = {}

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        """A copy or a pickle is of the tensors alone: the memo holds their addresses."""
        return Parts, (list(self),)


_library = torch.library.Library("quantcache", "DEF")
_library.define(
    "store_pages(Tensor key_states, Tensor value_states, Tensor(a!) key_qdata, Tensor(b!) key_metadata, "
    "Tensor(c!) value_qdata, Tensor(d!) value_metadata) -> ()"
)
_library.define(
    "append_tail(Tensor key_states, Tensor value_states, Tensor(a!) key_tail, Tensor(b!) value_tail, "
    "int position) -> ()"
)
_library.define("restore_keys(Tensor[] qdata, Tensor[] metadata, Tensor tail) -> Tensor")
_library.define("restore_values(Tensor[] qdata, Tensor[] metadata, Tensor tail) -> Tensor")
_library.define(
    "attention(Tensor query, Tensor[] key_qdata, Tensor[] key_metadata, Tensor[] value_qdata, "
    f"Tensor[] value_metadata, Tensor key_tail, Tensor value_tail, {SCHEMA}) -> Tensor"
)


def _run_attention(query: Tensor, *args: Any) -> Tensor:
    states, options = args[:6], AttentionOptions(*args[6:])
    run: Any = BACKENDS[backend_for(query, states[5])[0]].attention
    output: Tensor = run(query, *states, options)
    return output


def _dispatched(name: str, states_arguments: tuple[int, ...]) -> Callable[..., Tensor | None]:
    """The operation ``name`` on the backend for those of its arguments that are states."""

    def run(*args: Any) -> Tensor | None:
        backend, _ = backend_for(*(args[index] for index in states_arguments))
        result: Tensor | None = getattr(BACKENDS[backend], name)(*args)
        return result

    return run


def _fake_nothing(*_: Any) -> None:
    return None


def _fake_restore(qdata: Sequence[Tensor], metadata: Sequence[Tensor], tail: Tensor) -> Tensor:
    batch, num_kv_heads, tail_len, head_dim = tail.shape
    return tail.new_empty(batch, num_kv_heads, sum(len(q) for q in qdata) * PAGE_SIZE + tail_len, head_dim)


def _fake_attention(query: Tensor, *args: Any) -> Tensor:
    value_tail: Tensor = args[5]
    batch, num_q_heads, query_len, _ = query.shape
    return query.new_empty(batch, query_len, num_q_heads, value_tail.shape[-1])


for _name, _run, _fake in (
    ("store_pages", _dispatched("store_pages", (0, 1)), _fake_nothing),
    ("append_tail", _dispatched("append_tail", (0, 1)), _fake_nothing),
    ("restore_keys", _dispatched("restore_keys", (2,)), _fake_restore),
    ("restore_values", _dispatched("restore_values", (2,)), _fake_restore),
    ("attention", _run_attention, _fake_attention),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"quantcache::{_name}", _fake, lib=_library)


def is_plain(query: Tensor) -> bool:
    """Whether nothing watches operations, so that the dispatcher (10 us with lists of tensors) can be left out."""
    return (
        type(query) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def store_pages(
    key_states: Tensor,
    value_states: Tensor,
    key_qdata: Tensor,
    key_metadata: Tensor,
    value_qdata: Tensor,
    value_metadata: Tensor,
    backend: str | None = None,
) -> None:
    """Quantise whole pages of keys and values into memory that is already there.

    Args:
        key_states: (batch, num_kv_heads, T, head_dim), any float dtype and strides; T = P * page_size.
        value_states: (batch, num_kv_heads, T, v_head_dim).
        key_qdata: written; int8 (P, batch, num_kv_heads, page_size, head_dim).
        key_metadata: written; int16 (P, batch, num_kv_heads, head_dim, 2).
        value_qdata: written; int8 (P, batch, num_kv_heads, page_size, v_head_dim).
        value_metadata: written; int16 (P, batch, num_kv_heads, page_size, 2).
        backend: what ``backend_for`` the states named, if it was asked already.
    """
    written = key_qdata, key_metadata, value_qdata, value_metadata
    if is_plain(key_states):
        BACKENDS[backend or backend_for(key_states, value_states)[0]].store_pages(key_states, value_states, *written)
    else:
        torch.ops.quantcache.store_pages(key_states, value_states, *written)


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
    """
    if is_plain(key_states):
        chosen = BACKENDS[backend or backend_for(key_states, value_states)[0]]
        chosen.append_tail(key_states, value_states, key_tail, value_tail, position)
    else:
        torch.ops.quantcache.append_tail(key_states, value_states, key_tail, value_tail, position)


def restore_keys(qdata: Sequence[Tensor], metadata: Sequence[Tensor], tail: Tensor) -> Tensor:
    """Pages and tail as one dense tensor.

    Args:
        qdata: per segment, int8 (P_i, batch, num_kv_heads, page_size, head_dim).
        metadata: per segment, int16 (P_i, batch, num_kv_heads, head_dim, 2).
        tail: (batch, num_kv_heads, tail_len, head_dim), exact.

    Returns:
        (batch, num_kv_heads, sum(P_i) * page_size + tail_len, head_dim) in the dtype of ``tail``.
    """
    restored: Tensor = torch.ops.quantcache.restore_keys(qdata, metadata, tail)
    return restored


def restore_values(qdata: Sequence[Tensor], metadata: Sequence[Tensor], tail: Tensor) -> Tensor:
    """As ``restore_keys``, for values: metadata (P_i, batch, num_kv_heads, page_size, 2)."""
    restored: Tensor = torch.ops.quantcache.restore_values(qdata, metadata, tail)
    return restored


def attention(
    query: Tensor,
    key_qdata: Sequence[Tensor],
    key_metadata: Sequence[Tensor],
    value_qdata: Sequence[Tensor],
    value_metadata: Sequence[Tensor],
    key_tail: Tensor,
    value_tail: Tensor,
    options: AttentionOptions = PLAIN,
    backend: str | None = None,
) -> Tensor:
    """Attention over pages and tail in one softmax; ``reference.attend`` over the restored states is its specification.

    Args:
        query: (batch, num_q_heads, query_len, head_dim); the last query sits on the last key.
        key_qdata: see ``restore_keys``.
        key_metadata: see ``restore_keys``.
        value_qdata: see ``restore_values``.
        value_metadata: see ``restore_values``.
        key_tail: (batch, num_kv_heads, tail_len, head_dim) in the dtype of ``query``.
        value_tail: (batch, num_kv_heads, tail_len, v_head_dim) in the dtype of ``query``.
        options: see ``AttentionOptions``.
        backend: what ``backend_for(query, value_tail)`` named, if it was asked already.

    Returns:
        (batch, query_len, num_q_heads, v_head_dim), contiguous, in the dtype of ``query``.

    Raises:
        ValueError: shapes or numbers that do not fit together.
        TypeError: a query whose dtype is not the tail's.
    """
    _check_attention(query, key_qdata, key_tail, value_tail, key_tail.shape[2], options)
    if torch.is_grad_enabled() and query.requires_grad:
        # The operation has no derivative; the same numbers in differentiable torch keep the query's gradient.
        key = restore_keys(key_qdata, key_metadata, key_tail)
        value = restore_values(value_qdata, value_metadata, value_tail)
        return reference.attend(query, key, value, options)
    states = key_qdata, key_metadata, value_qdata, value_metadata, key_tail, value_tail
    if is_plain(query):
        return BACKENDS[backend or backend_for(query, value_tail)[0]].attention(query, *states, options)
    output: Tensor = torch.ops.quantcache.attention(query, *states, *options)
    return output


def write_and_attend(
    query: Tensor,
    new_states: tuple[Tensor, Tensor],
    key_qdata: Sequence[Tensor],
    key_metadata: Sequence[Tensor],
    value_qdata: Sequence[Tensor],
    value_metadata: Sequence[Tensor],
    key_buffer: Tensor,
    value_buffer: Tensor,
    tail_len: int,
    backend: str,
    options: AttentionOptions,
) -> Tensor:
    """``append_tail`` and ``attention`` in one launch, for plain tensors and a backend of ``WRITE_ON_READ``.

    Args:
        query: see ``attention``, as for every argument not named here.
        new_states: the newest keys and values, the last of the ``tail_len`` tokens, to be written into the buffers.
        key_qdata: see ``attention``.
        key_metadata: see ``attention``.
        value_qdata: see ``attention``.
        value_metadata: see ``attention``.
        key_buffer: (batch, num_kv_heads, capacity, head_dim).
        value_buffer: (batch, num_kv_heads, capacity, v_head_dim).
        tail_len: tokens of the tail, the new ones included.
        backend: what ``backend_for(query, value_buffer)`` named.
        options: see ``attention``.
    """
    _check_attention(query, key_qdata, key_buffer, value_buffer, tail_len, options)
    write: Any = BACKENDS[backend]
    output: Tensor = write.write_and_attend(
        query,
        new_states,
        (key_qdata, key_metadata, value_qdata, value_metadata),
        (key_buffer, value_buffer),
        tail_len,
        options,
    )
    return output


def _check_attention(
    query: Tensor,
    key_qdata: Sequence[Tensor],
    key_tail: Tensor,
    value_tail: Tensor,
    tail_len: int,
    options: AttentionOptions,
) -> None:
    attn_mask, _, _, window, softcap, sinks = options
    batch, num_kv_heads, _, head_dim = key_tail.shape
    if query.dim() != 4 or query.shape[0] != batch or query.shape[3] != head_dim or query.shape[1] % num_kv_heads:
        raise ValueError(
            "ops.attention: query must be (batch, num_q_heads, query_len, head_dim) with batch "
            f"{batch}, head_dim {head_dim} and num_q_heads a multiple of {num_kv_heads}, got {tuple(query.shape)}."
        )
    if query.dtype != key_tail.dtype or query.dtype != value_tail.dtype:
        raise TypeError(
            "ops.attention: query must have the dtype of the cached states, "
            f"{key_tail.dtype} and {value_tail.dtype}, got {query.dtype}."
        )
    if attn_mask is not None:
        kv_len = sum(qdata.shape[0] for qdata in key_qdata) * PAGE_SIZE + tail_len
        full = (batch, query.shape[1], query.shape[2], kv_len)
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
