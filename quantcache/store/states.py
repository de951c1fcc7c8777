"""``CachedStates``: what every tensor does that stands for stored keys or values, whatever it is made of.

Such a tensor is read-only, and so is whatever shares memory with what it restores to: a write into a restored copy
would change nothing that is stored, and nobody would know.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Final, SupportsIndex, TypeVar

import torch
from torch import Tensor
from torch._dynamo.eval_frame import skip_code
from torch.utils._pytree import tree_map_only

_Function = TypeVar("_Function", bound=Callable[..., Any])


def never_a_graph_of_its_own(function: _Function) -> _Function:
    """Have torch.compile look into ``function`` from a graph alone, and run it as it is behind a graph break.

    A graph of it alone forgets that it runs without torch's overrides, and calls it again, without end.
    """
    skip_code(function.__code__)
    return function


def _methods(*names: str) -> frozenset[object]:
    return frozenset(getattr(Tensor, name) for name in names if hasattr(Tensor, name))


_READS_MEMORY: Final = _methods("numpy", "__array__", "tolist")
"""What reads memory past the dispatcher; restored states have some."""

_ADDRESSES: Final = _methods("data_ptr", "const_data_ptr")
"""What kernels read by; only a ``ReadOnlyTensor`` lies at one address for as long as it lives."""

_GRADIENTS: Final = frozenset({Tensor.requires_grad_, Tensor.requires_grad.__set__})  # type: ignore[attr-defined]
"""What would make a leaf of stored states, whose gradient int8 attention does not compute."""

_HANDS_MEMORY_OUT: Final = _methods(
    *("share_memory_", "untyped_storage", "storage", "_typed_storage", "is_set_to", "as_subclass"),
    *("apply_", "map_", "map2_", "__dlpack__"),
) | {Tensor.data.__set__}  # type: ignore[attr-defined]
"""What writes past the dispatcher, or gives memory to someone who could."""

_PAST_THE_DISPATCHER: Final = _READS_MEMORY | _ADDRESSES | _GRADIENTS | _HANDS_MEMORY_OUT


class CachedStates(Tensor):
    """The keys or the values of a layer, stored as int8 pages and an exact tail; read-only.

    It has the logical shape (batch, num_kv_heads, tokens, head_dim), dtype and device of the states it stands for.
    Attention reads the int8 bytes; every other operation sees the restored values, slower and in full size.
    """

    def restore(self) -> Tensor:
        """The values as a plain dense tensor of its own."""
        raise NotImplementedError

    def restored_for(self, reason: str) -> Tensor:
        """The values to read, said to be a fallback for ``reason``; raises ``FallbackError`` in a strict cache."""
        raise NotImplementedError

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        raise AttributeError(str(read_only_error("__cuda_array_interface__")))  # where no copy is made of it, none is

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = memo[id(self)] = self.restore()
        return copied

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return self.restore().__reduce_ex__(protocol)

    @classmethod
    @never_a_graph_of_its_own
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Results are plain tensors, or a ``ReadOnlyTensor`` that shares the restored memory."""
        if func in _PAST_THE_DISPATCHER:
            return _past_the_dispatcher(func, args, kwargs or {})
        return _original(func, args, kwargs or {})

    @classmethod
    # Dynamo would look into it, behind a graph break, while the tensors are being made.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` on the restored values, unless it would write into them."""
        schema, kwargs = func._schema, kwargs or {}
        writes = False
        if schema.name == "aten::set_":  # which makes its source's memory that of someone else's tensor
            raise read_only_error(schema.name)
        for place, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                writes = True
                if holds_states(args[place] if place < len(args) else kwargs.get(argument.name)):
                    raise read_only_error(schema.name)
        memory: list[Tensor] = []

        def restored(states: CachedStates) -> Tensor:
            memory.append(states.restored_for(f"{schema.name} on cached states"))
            return memory[-1]

        def guarded(output: Tensor) -> Tensor:
            # By memory, not by schema: there are views that the schema does not call one, and copies that it does.
            shared = any(torch._C._is_alias_of(output, dense) for dense in memory)  # type: ignore[attr-defined]
            return ReadOnlyTensor.of(output) if shared else output

        # In inference mode a view of a tensor that was made outside it is no inference tensor.
        is_view = not writes and any(returned.alias_info is not None for returned in schema.returns)
        leaves = is_view and torch.is_inference_mode_enabled() and not args[0].is_inference()
        with torch.inference_mode(False) if leaves else nullcontext():
            args, kwargs = tree_map_only(CachedStates, restored, (args, kwargs))
            outputs = func(*args, **kwargs)
            return outputs if writes else tree_map_only(Tensor, guarded, outputs)


class ReadOnlyTensor(CachedStates):
    """Restored states, or a view of them, which are read like any dense tensor and raise where they are written.

    Attributes:
        dense: the same values in the same memory.
    """

    dense: Tensor

    @staticmethod
    def of(dense: Tensor) -> "ReadOnlyTensor":
        """``dense``, read-only."""
        if type(dense) is not Tensor:
            return TracedReadOnlyTensor(dense)
        # With its memory, for what asks no dispatcher before it reads.
        made: ReadOnlyTensor = Tensor._make_subclass(ReadOnlyTensor, dense)
        made.dense = dense
        return made

    def restore(self) -> Tensor:
        """The values in memory of their own."""
        return self.dense.clone()

    def restored_for(self, reason: str) -> Tensor:
        """The values; that they were restored was said then."""
        return self.dense

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.dense!r})"


class TracedReadOnlyTensor(ReadOnlyTensor):
    """The same in a step that is traced, as torch.compile can take it apart."""

    @staticmethod
    def __new__(cls, dense: Tensor) -> "TracedReadOnlyTensor":
        """``dense``, read-only."""
        layout = dense.shape, dense.stride(), dense.storage_offset()
        made: TracedReadOnlyTensor = Tensor._make_wrapper_subclass(cls, *layout, dtype=dense.dtype, device=dense.device)
        made.dense = dense
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["dense"], None

    @staticmethod
    def __tensor_unflatten__(
        parts: dict[str, Tensor], meta: None, outer_size: Any, outer_stride: Any
    ) -> "TracedReadOnlyTensor":
        return TracedReadOnlyTensor(parts["dense"])


@never_a_graph_of_its_own
def _original(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _is_traced() -> bool:
    """Whether torch asks for itself: its compiler tells by their storages which tensors are views of one another."""
    return torch.compiler.is_compiling() or torch._guards.CompileContext.try_get() is not None


@never_a_graph_of_its_own
def _past_the_dispatcher(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What the methods do that act on a tensor's memory or flags with no operation that the dispatcher would see."""
    name = func.__self__.__name__ if func.__name__ == "__set__" else func.__name__
    if func in _GRADIENTS and not (args[1] if len(args) > 1 else kwargs.get("requires_grad", True)):
        return args[0] if func is Tensor.requires_grad_ else None
    is_copied = func is Tensor.__dlpack__ and kwargs.get("copy")
    at_one_address = func in _ADDRESSES and isinstance(args[0], ReadOnlyTensor)
    if func is Tensor.untyped_storage and _is_traced():
        return _original(func, args, kwargs)
    if not (func in _READS_MEMORY or is_copied or at_one_address):
        raise read_only_error(name)
    states, *others = args
    is_shared = func in _READS_MEMORY and isinstance(states, ReadOnlyTensor)
    dense = states.restore() if is_shared else states.restored_for(f"{name} on cached states")
    result = func(dense, *others, **kwargs)
    if func in _READS_MEMORY and func is not Tensor.tolist:
        result.setflags(write=False)
    return result


def holds_states(value: object) -> bool:
    """Whether ``value`` is cached states, or a list with some in it."""
    return isinstance(value, CachedStates) or (isinstance(value, (list, tuple)) and any(map(holds_states, value)))


def read_only_error(operation: str) -> NotImplementedError:
    """What an ``operation`` gets that would write into cached states, or give their memory away."""
    return NotImplementedError(
        f"Int8Tensor: cached states are read-only, got {operation}. "
        "Take a copy with .clone(), or change what is stored within `with cache.edit(layer_idx) as states:`."
    )
