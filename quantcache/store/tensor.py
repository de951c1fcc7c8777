"""What a cache hands to attention in place of keys or values: ``Int8Tensor``, and its form in a recorded step."""

import copy
import warnings
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from quantcache.backends import dispatch
from quantcache.quantization.errors import FallbackWarning
from quantcache.quantization.options import AttentionOptions
from quantcache.store import reads
from quantcache.store.buffer import StaticShape
from quantcache.store.read_log import ReadLog, strict_error
from quantcache.store.states import CachedStates, never_a_graph_of_its_own
from quantcache.store.view import PagesView, same_memory

_sdpa = torch.nn.functional.scaled_dot_product_attention


class Int8Tensor(CachedStates):
    """Cached states whose length the host knows.

    They are read-only, and so are views of them, as ``key[:, :, 0]``: a write raises. ``key.clone()`` is a tensor to
    write into, and ``QuantizedInt8Cache.edit`` changes what is stored. ``pickle`` and ``copy.deepcopy`` give such a
    tensor again, ``torch.save`` writes the restored values. ``numpy()`` gives a read-only copy, and a tensor that
    ``torch.from_numpy`` makes of it is one of the copy. ``torch.utils.dlpack.to_dlpack``, which asks no tensor, hands
    out the restored memory that slices share, a copy likewise.

    ``torch.nn.functional.scaled_dot_product_attention`` over a pair of them reads the int8 bytes, too.

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
        shape, like = pages_view.state_shape(is_key), pages_view.buffers[0]
        made: Int8Tensor = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        torch._C._set_throw_on_mutable_data_ptr(made)  # torch's to_dlpack would hand out its address, which is none
        made.pages_view, made.is_key, made.read_log = pages_view, is_key, read_log
        return made

    @classmethod
    def pair(cls, pages_view: PagesView, read_log: ReadLog) -> "tuple[Int8Tensor, Int8Tensor]":
        """Keys and values of one view."""
        return cls(pages_view, True, read_log), cls(pages_view, False, read_log)

    def restore(self) -> Tensor:
        """The values as a plain dense tensor of its own."""
        dense = reads.restore(self.pages_view, self.is_key)
        return dense.clone(memory_format=torch.contiguous_format) if self.pages_view.is_exact else dense

    def restored_for(self, reason: str) -> Tensor:
        """``restore``; where that is more than a copy, noted as a fallback with its ``reason``.

        Raises:
            FallbackError: in a strict cache, likewise.
        """
        if not self.pages_view.is_exact:
            self.read_log.fell_back(reason)
        return self.restore()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Int8Tensor":
        copied = Int8Tensor(copy.deepcopy(self.pages_view, memo), self.is_key, copy.deepcopy(self.read_log, memo))
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        if int(protocol) <= torch.serialization.DEFAULT_PROTOCOL:
            # torch.save's, whose files torch.load takes only where plain tensors are in them.
            return self.restore().__reduce_ex__(protocol)
        return Int8Tensor, (self.pages_view, self.is_key, self.read_log)

    def __repr__(self) -> str:  # type: ignore[override]
        return (
            f"Int8Tensor({'keys' if self.is_key else 'values'}, shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"device={self.device}, pages={self.pages_view.num_pages}, tail={self.pages_view.tail_len})"
        )

    @classmethod
    @never_a_graph_of_its_own
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Attention reads the bytes; shapes and dtypes are the wrapper's own; the rest goes on to the dispatcher."""
        kwargs = kwargs or {}
        if func is _sdpa:
            output = _int8_sdpa(*args, **kwargs)
            if output is not None:
                return output
        return super().__torch_function__(func, types, args, kwargs)


class RecordedStates(CachedStates):
    """Cached states of fixed capacity in a step that is being recorded, with a length that only the device knows.

    The shape is (batch, num_kv_heads, capacity, head_dim), like that of transformers' static layer; what lies behind
    the last token reads as zero. It is made of plain tensors alone, so that torch.compile can take it apart.

    Attributes:
        memory: of the layer.
        scratch: see ``Backend.make_scratch``.
        key_tail: keys read instead of the layer's tail, see ``protocol.Source``; None where the layer's own is read.
        value_tail: values likewise.
        lengths: of the layer with these tokens as the tail, likewise.
        shape_of_memory: see ``StaticShape``.
        is_key: keys if True, values if False.
        on_restore: what happens where it has to be restored: "raise", "warn" or "quiet".
    """

    memory: Tensor
    scratch: Tensor
    key_tail: Tensor | None
    value_tail: Tensor | None
    lengths: Tensor | None
    shape_of_memory: StaticShape
    is_key: bool
    on_restore: str

    @staticmethod
    def __new__(
        cls,
        memory: Tensor,
        scratch: Tensor,
        key_tail: Tensor | None = None,
        value_tail: Tensor | None = None,
        lengths: Tensor | None = None,
        *,
        shape_of_memory: StaticShape,
        dtype: torch.dtype,
        is_key: bool,
        on_restore: str,
    ) -> "RecordedStates":
        """The keys or the values of a layer."""
        form = shape_of_memory
        shape = (form.batch, form.num_kv_heads, form.capacity, form.head_dim if is_key else form.v_head_dim)
        made: RecordedStates = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=memory.device)
        made.memory, made.scratch = memory, scratch
        made.key_tail, made.value_tail, made.lengths = key_tail, value_tail, lengths
        made.shape_of_memory, made.is_key, made.on_restore = form, is_key, on_restore
        return made

    def __tensor_flatten__(self) -> tuple[list[str], tuple[StaticShape, torch.dtype, bool, str]]:
        source = [] if self.lengths is None else ["key_tail", "value_tail", "lengths"]
        return ["memory", "scratch", *source], (self.shape_of_memory, self.dtype, self.is_key, self.on_restore)

    @staticmethod
    def __tensor_unflatten__(
        parts: dict[str, Tensor], meta: tuple[StaticShape, torch.dtype, bool, str], outer_size: Any, outer_stride: Any
    ) -> "RecordedStates":
        form, dtype, is_key, on_restore = meta
        return RecordedStates(**parts, shape_of_memory=form, dtype=dtype, is_key=is_key, on_restore=on_restore)

    def restore(self) -> Tensor:
        """The values as a plain dense tensor, zeros behind the last token."""
        return restore_recorded(self)

    def restored_for(self, reason: str) -> Tensor:
        """``restore``, with what ``on_restore`` says of it."""
        reason += " in a compiled step"
        if self.on_restore == "raise":
            raise strict_error(reason)
        if self.on_restore == "warn":
            warnings.warn(
                f"QuantizedInt8Cache: the cache is read by restoring it to full precision ({reason}), which is "
                "correct but slower and needs memory for one layer of the whole capacity. strict=True raises instead.",
                FallbackWarning,
                stacklevel=3,
            )
        return self.restore()


def _parts(states: RecordedStates) -> list[Tensor]:
    """The tensors that ``reads.unpacked`` takes; a function, for torch.compile takes methods for those of a tensor."""
    if states.key_tail is None or states.value_tail is None or states.lengths is None:
        return [states.memory, states.scratch]
    return [states.memory, states.scratch, states.key_tail, states.value_tail, states.lengths]


def restore_recorded(states: RecordedStates) -> Tensor:
    """``states.restore()``, likewise."""
    return reads.restore_recorded(_parts(states), states.shape_of_memory, states.dtype, states.is_key)


def is_recorded_pair(key: object, value: object) -> bool:
    """Whether they are keys and values of one layer as one recorded step left it; what ``shared_view`` asks."""
    if not (isinstance(key, RecordedStates) and isinstance(value, RecordedStates)):
        return False
    parts = _parts(key), _parts(value)
    return key.is_key and not value.is_key and len(parts[0]) == len(parts[1]) and all(map(same_memory, *parts))


def read_recorded(key: RecordedStates, query: Tensor, options: AttentionOptions) -> Tensor:
    """Attention over the layer whose keys are ``key``. The mask may be as wide as the capacity."""
    return reads.attention_recorded(query, _parts(key), key.shape_of_memory, options)


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
    """``reads.attention`` over the view, noted in the log."""
    if pages_view.backend is None:
        pages_view.backend = dispatch.backend_for(*pages_view.buffers)
    backend, reason = pages_view.backend
    if reason:
        read_log.fell_back(reason, backend)
    else:
        read_log.kernel, read_log.reason = dispatch.BACKENDS[backend].kernel_of(query, pages_view), None
    return reads.attention(query, pages_view, options)


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
    if view.is_exact:
        return None
    if is_causal:
        # torch aligns the first query with the first key, reads.attention the last with the last.
        attn_mask = torch.ones(query.shape[2], view.seq_len, dtype=torch.bool, device=query.device).tril()
    return read(view, log, query, AttentionOptions(attn_mask, softmax_scale=scale)).transpose(1, 2)
