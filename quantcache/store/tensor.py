"""``Int8Tensor``: what the cache hands to attention in place of keys or values."""

import copy
from collections.abc import Callable
from typing import Any, SupportsIndex

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from quantcache.backends import dispatch
from quantcache.quantization.options import AttentionOptions
from quantcache.store.report import ReadLog
from quantcache.store.segments import PagesView

_sdpa = torch.nn.functional.scaled_dot_product_attention


class Int8Tensor(Tensor):
    """The keys or the values of a layer, stored as int8 pages and an exact tail.

    It has the logical shape (batch, num_kv_heads, seq_len, head_dim), dtype and device of the states it stands for.
    ``torch.nn.functional.scaled_dot_product_attention`` over a pair of them reads the int8 bytes; every other operation
    sees the restored values, slower and in full size. It is read-only.

    Attributes:
        pages_view: what is read; the same object in both tensors of a pair.
        is_key: keys if True, values if False.
        read_log: where reads are noted.
    """

    pages_view: PagesView
    is_key: bool
    read_log: ReadLog

    @staticmethod
    def __new__(cls, pages_view: PagesView, is_key: bool, read_log: ReadLog) -> "Int8Tensor":
        """The keys or the values of ``pages_view``."""
        return _made(pages_view.state_shape(is_key), pages_view.dtype, pages_view.device, pages_view, is_key, read_log)

    @classmethod
    def pair(cls, pages_view: PagesView, read_log: ReadLog) -> "tuple[Int8Tensor, Int8Tensor]":
        """Keys and values of one view."""
        dtype, device = pages_view.dtype, pages_view.device
        return (
            _made(pages_view.state_shape(True), dtype, device, pages_view, True, read_log),
            _made(pages_view.state_shape(False), dtype, device, pages_view, False, read_log),
        )

    def restore(self) -> Tensor:
        """The values as a plain dense tensor."""
        return self.pages_view.restore_keys() if self.is_key else self.pages_view.restore_values()

    def restored_for(self, reason: str) -> Tensor:
        """``restore``, noted as a fallback with its ``reason``; raises ``FallbackError`` in a strict cache."""
        self.read_log.fell_back(reason)
        return self.restore()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Int8Tensor":
        copied = Int8Tensor(copy.deepcopy(self.pages_view, memo), self.is_key, copy.deepcopy(self.read_log, memo))
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return Int8Tensor, (self.pages_view, self.is_key, self.read_log)

    def __repr__(self) -> str:  # type: ignore[override]
        return (
            f"Int8Tensor({'keys' if self.is_key else 'values'}, shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"device={self.device}, pages={self.pages_view.num_pages}, tail={self.pages_view.tail_len})"
        )

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Attention reads the bytes; shapes and dtypes are the wrapper's own; the rest goes on to the dispatcher."""
        kwargs = kwargs or {}
        if func is _sdpa:
            output = _int8_sdpa(*args, **kwargs)
            if output is not None:
                return output
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run ``func`` on the restored values."""
        schema = func._schema  # type: ignore[attr-defined]
        for argument, value in zip(schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Int8Tensor):
                raise NotImplementedError(
                    f"Int8Tensor: cached states are read-only, got {schema.name}. "
                    "Change a copy instead: key.restore() or key.clone()."
                )

        def restored(tensor: Int8Tensor) -> Tensor:
            return tensor.restored_for(f"{schema.name} on cached states")

        args, kwargs = tree_map_only(Int8Tensor, restored, (args, kwargs or {}))
        return func(*args, **kwargs)


def _made(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    pages_view: PagesView,
    is_key: bool,
    read_log: ReadLog,
) -> Int8Tensor:
    made: Int8Tensor = Tensor._make_wrapper_subclass(Int8Tensor, shape, dtype=dtype, device=device)
    made.pages_view, made.is_key, made.read_log = pages_view, is_key, read_log
    return made


def shared_view(key: object, value: object) -> "tuple[PagesView, ReadLog] | None":
    """The view and log of a pair of ``Int8Tensor`` keys and values, None for anything else."""
    if isinstance(key, Int8Tensor) and isinstance(value, Int8Tensor) and key.is_key and not value.is_key:
        if key.pages_view.shows(value.pages_view):
            return key.pages_view, key.read_log
    return None


def autocast_to(dtype: torch.dtype, states: Tensor) -> Tensor:
    """``states`` in ``dtype`` where autocast is at work, which lets a model mix dtypes; else as they are."""
    if states.dtype != dtype and torch.is_autocast_enabled(states.device.type):
        return states.to(dtype)
    return states


def read(pages_view: PagesView, read_log: ReadLog, query: Tensor, options: AttentionOptions) -> Tensor:
    """``ops.attention`` over the view, noted in the log."""
    if pages_view.backend is None:
        pages_view.backend = dispatch.backend_for(query, pages_view.value_tail)
    backend, reason = pages_view.backend
    if reason:
        read_log.fell_back(reason, backend)
    else:
        read_log.kernel, read_log.reason = backend, None
    return pages_view.attention(query, options)


def _int8_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """Read torch's scaled_dot_product_attention from an ``Int8Tensor`` pair, None for a form int8 attention lacks."""
    found = shared_view(key, value)
    query = autocast_to(key.dtype, query)
    if found is None or dropout_p or isinstance(query, Int8Tensor) or query.dim() != 4 or query.dtype != key.dtype:
        return None
    if (query.shape[1] != key.shape[1] and not enable_gqa) or (is_causal and attn_mask is not None):
        return None
    view, log = found
    if is_causal:
        # torch aligns the first query with the first key, ops.attention the last with the last.
        attn_mask = torch.ones(query.shape[2], view.seq_len, dtype=torch.bool, device=query.device).tril()
    return read(view, log, query, AttentionOptions(attn_mask, softmax_scale=scale)).transpose(1, 2)
