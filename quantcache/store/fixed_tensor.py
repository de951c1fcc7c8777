"""``StaticInt8Tensor``: what a layer of fixed capacity hands to attention in a step that is being compiled."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from quantcache.quantization.errors import FallbackWarning
from quantcache.quantization.options import AttentionOptions
from quantcache.store import fixed_ops, tensor
from quantcache.store.fixed_ops import Layout, NewerTail, Sizes, layout_for
from quantcache.store.report import ReadLog, strict_error
from quantcache.store.segments import PagesView


class StaticInt8Tensor(Tensor):
    """The keys or the values of a layer, as ``Int8Tensor`` is, with a length that only the device knows.

    Its shape is (batch, num_kv_heads, capacity, head_dim), like that of transformers' static layer; what lies behind
    the last token reads as zero. It is made of plain tensors alone, so that torch.compile can take it apart.

    Attributes:
        memory: of the layer.
        scratch: see ``fixed_ops.make_scratch``.
        key_tail: see ``NewerTail``, as for the two that follow; None where the layer's own tail is read.
        value_tail: see ``NewerTail``.
        lengths: see ``NewerTail``.
        sizes: of the memory.
        is_key: keys if True, values if False.
        on_restore: what happens where it has to be restored: "raise", "warn" or "quiet".
        view_of_host: where the host knows the length, the same as a view; else None.
        read_log: where reads are then noted.
    """

    memory: Tensor
    scratch: Tensor
    key_tail: Tensor | None
    value_tail: Tensor | None
    lengths: Tensor | None
    sizes: Sizes
    is_key: bool
    on_restore: str
    view_of_host: PagesView | None = None
    read_log: ReadLog | None = None

    @staticmethod
    def __new__(
        cls,
        memory: Tensor,
        scratch: Tensor,
        key_tail: Tensor | None = None,
        value_tail: Tensor | None = None,
        lengths: Tensor | None = None,
        *,
        sizes: Sizes,
        dtype: torch.dtype,
        is_key: bool,
        on_restore: str,
    ) -> "StaticInt8Tensor":
        """The keys or the values of a layer."""
        shape = (sizes.batch, sizes.num_kv_heads, sizes.capacity, sizes.head_dim if is_key else sizes.v_head_dim)
        made: StaticInt8Tensor = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=memory.device)
        made.memory, made.scratch = memory, scratch
        made.key_tail, made.value_tail, made.lengths = key_tail, value_tail, lengths
        made.sizes, made.is_key, made.on_restore = sizes, is_key, on_restore
        return made

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Sizes, torch.dtype, bool, str]]:
        newer = [] if self.lengths is None else list(NewerTail._fields)
        return ["memory", "scratch", *newer], (self.sizes, self.dtype, self.is_key, self.on_restore)

    @staticmethod
    def __tensor_unflatten__(
        parts: dict[str, Tensor], meta: tuple[Sizes, torch.dtype, bool, str], outer_size: Any, outer_stride: Any
    ) -> "StaticInt8Tensor":
        sizes, dtype, is_key, on_restore = meta
        return StaticInt8Tensor(**parts, sizes=sizes, dtype=dtype, is_key=is_key, on_restore=on_restore)

    def restore(self) -> Tensor:
        """The values as a plain dense tensor."""
        return fixed_ops.restore(self.memory, layout_for(self.sizes, self.dtype), self.is_key, _newer(self))

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Results are plain tensors."""
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run ``func`` on the restored values."""

        def restored(states: StaticInt8Tensor) -> Tensor:
            if states.read_log is not None:
                states.read_log.fell_back(f"{func} on cached states")
                return states.restore()
            reason = f"{func} on cached states in a compiled step"
            if states.on_restore == "raise":
                raise strict_error(reason)
            if states.on_restore == "warn":
                warnings.warn(
                    f"QuantizedInt8Cache: the cache is read by restoring it to full precision ({reason}), which is "
                    "correct but slower and needs memory for one layer of the whole capacity. strict=True raises "
                    "instead.",
                    FallbackWarning,
                    stacklevel=2,
                )
            return states.restore()

        args, kwargs = tree_map_only(StaticInt8Tensor, restored, (args, kwargs or {}))
        return func(*args, **kwargs)


def read(key: StaticInt8Tensor, query: Tensor, options: AttentionOptions) -> Tensor:
    """Attention over the layer whose keys are ``key``. The mask may be as wide as the capacity."""
    if not torch.compiler.is_compiling() and key.view_of_host is not None and key.read_log is not None:
        if options.attn_mask is not None:
            options = options._replace(attn_mask=options.attn_mask[..., : key.view_of_host.seq_len])
        return tensor.read(key.view_of_host, key.read_log, query, options)
    # Neither methods of the key nor ``layout_for``: torch.compile would take the ones for operations on tensors, and
    # does not look into the memory of the other.
    layout = Layout(key.sizes, key.dtype)
    return fixed_ops.attention(query, key.memory, layout, key.scratch, options, _newer(key))


def _newer(states: StaticInt8Tensor) -> NewerTail | None:
    """What is read instead of the layer's tail."""
    if states.key_tail is None or states.value_tail is None or states.lengths is None:
        return None
    return NewerTail(states.key_tail, states.value_tail, states.lengths)
