"""``StaticInt8Tensor``: what a layer of fixed capacity hands to attention in a step that is being compiled."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from quantcache import static_ops, tensor
from quantcache.errors import FallbackWarning
from quantcache.report import ReadLog, strict_error
from quantcache.segments import PagesView
from quantcache.static_ops import Layout, Memory


class StaticInt8Tensor(Tensor):
    """The keys or the values of a layer, as ``Int8Tensor`` is, with a length that only the device knows.

    Its shape is (batch, num_kv_heads, capacity, head_dim), like that of transformers' static layer; what lies behind
    the last token reads as zero. It is made of plain tensors alone, so that torch.compile can take it apart.

    Attributes:
        pages: see ``Memory``, as for the tails and the lengths.
        memory_layout: of the memory.
        scratch: see ``static_ops.make_scratch``.
        capacity: tokens that its shape shows.
        is_key: keys if True, values if False.
        on_restore: what happens where it has to be restored: "raise", "warn" or "quiet".
        view_of_host: where the host knows the length, the same as a view; else None.
        read_log: where reads are then noted.
    """

    _PARTS = (*Memory._fields, "scratch")

    memory_layout: Layout
    capacity: int
    is_key: bool
    on_restore: str
    view_of_host: PagesView | None = None
    read_log: ReadLog | None = None

    @staticmethod
    def __new__(
        cls,
        pages: Tensor,
        tails: Tensor,
        lengths: Tensor,
        scratch: Tensor,
        memory_layout: Layout,
        capacity: int,
        is_key: bool,
        on_restore: str,
    ) -> "StaticInt8Tensor":
        """The keys or the values of a ``Memory``."""
        head_dim = memory_layout.head_dim if is_key else memory_layout.v_head_dim
        shape = (memory_layout.batch, memory_layout.num_kv_heads, capacity, head_dim)
        made: StaticInt8Tensor = Tensor._make_wrapper_subclass(cls, shape, dtype=tails.dtype, device=tails.device)
        parts = (pages, tails, lengths, scratch)
        for name, part in zip(cls._PARTS, parts, strict=True):
            setattr(made, name, part)
        made.memory_layout, made.capacity, made.is_key, made.on_restore = memory_layout, capacity, is_key, on_restore
        return made

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Layout, int, bool, str]]:
        return list(self._PARTS), (self.memory_layout, self.capacity, self.is_key, self.on_restore)

    @staticmethod
    def __tensor_unflatten__(
        parts: dict[str, Tensor], meta: tuple[Layout, int, bool, str], outer_size: Any, outer_stride: Any
    ) -> "StaticInt8Tensor":
        return StaticInt8Tensor(**parts, memory_layout=meta[0], capacity=meta[1], is_key=meta[2], on_restore=meta[3])

    def memory(self) -> Memory:
        """What is read."""
        return Memory(*(getattr(self, name) for name in Memory._fields))

    def restore(self) -> Tensor:
        """The values as a plain dense tensor."""
        return static_ops.restore(self.memory(), self.memory_layout, self.capacity, self.is_key)

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


def read(key: StaticInt8Tensor, query: Tensor, **options: Any) -> Tensor:
    """Attention over the layer whose keys are ``key``; ``options`` are the keyword arguments of ``ops.attention``.

    The mask may be as wide as the capacity.
    """
    if not torch.compiler.is_compiling() and key.view_of_host is not None and key.read_log is not None:
        attn_mask = options.get("attn_mask")
        if attn_mask is not None:
            options["attn_mask"] = attn_mask[..., : key.view_of_host.seq_len]
        return tensor.read(key.view_of_host, key.read_log, query, **options)
    return static_ops.attention(query, key.memory(), key.memory_layout, key.scratch, **options)  # type: ignore[attr-defined]
