"""``CachedStates``: what every tensor does that stands for stored keys or values, whatever it is made of."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class CachedStates(Tensor):
    """The keys or the values of a layer, stored as int8 pages and an exact tail; read-only.

    It has the logical shape (batch, num_kv_heads, tokens, head_dim), dtype and device of the states it stands for.
    Attention reads the int8 bytes; every other operation sees the restored values, slower and in full size.

    Attributes:
        is_key: keys if True, values if False.
    """

    is_key: bool

    def restore(self) -> Tensor:
        """The values as a plain dense tensor."""
        raise NotImplementedError

    def restored_for(self, reason: str) -> Tensor:
        """``restore``, said to be a fallback for ``reason``; raises ``FallbackError`` in a strict cache."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Results are plain tensors."""
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Run ``func`` on the restored values, unless it would write into them."""
        schema, kwargs = func._schema, kwargs or {}
        for place, argument in enumerate(schema.arguments):
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write and holds_states(value):
                raise read_only_error(schema.name)

        def restored(states: CachedStates) -> Tensor:
            return states.restored_for(f"{schema.name} on cached states")

        args, kwargs = tree_map_only(CachedStates, restored, (args, kwargs))
        return func(*args, **kwargs)


def holds_states(value: object) -> bool:
    """Whether ``value`` is cached states, or a list with some in it."""
    return isinstance(value, CachedStates) or (isinstance(value, (list, tuple)) and any(map(holds_states, value)))


def read_only_error(operation: str) -> NotImplementedError:
    """What an ``operation`` gets that would write into cached states."""
    return NotImplementedError(
        f"Int8Tensor: cached states are read-only, got {operation}. "
        "Change a copy instead: key.restore() or key.clone()."
    )
