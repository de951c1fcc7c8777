"""What the eager attention of a model computes: int8 attention takes its place where it is the same thing.

Each model of transformers has an eager function of its own. Most are copies of a few; that one is, is found out by
asking it: it is called once with small tensors, and ``reference.attend`` has to give what it gives.
"""

import dis
import functools
import inspect
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import torch
from torch import Tensor

from quantcache.quantization import reference
from quantcache.quantization.options import AttentionOptions

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]
"""As transformers calls one: (module, query, key, value, attention_mask, **options), which gives output and weights."""

_INPUTS: Final = ("module", "query", "key", "value", "attention_mask")
_OPTIONS: Final = frozenset({"scaling", "dropout", "softcap", "position_bias", "sliding_window"})
"""What else a function may name that is asked; the mask holds the window already."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def honoured_by(function: AttentionFunction) -> tuple[str, ...] | None:
    """What ``function``, a model's eager attention, honours besides scaling, mask and dropout.

    Returns:
        of "softcap" and "position_bias", its arguments, the latter added to the logits; and of "sinks", which it takes
        from its module. None where it computes something else than ``reference.attend``.
    """
    return _honoured_by(function)


@functools.lru_cache(maxsize=1024)
def _honoured_by(function: AttentionFunction) -> tuple[str, ...] | None:
    if not isinstance(function, types.FunctionType) or hasattr(function, "__wrapped__"):
        return None
    parameters = inspect.signature(function).parameters
    names = [name for name, each in parameters.items() if each.kind is each.POSITIONAL_OR_KEYWORD]
    if tuple(names[: len(_INPUTS)]) != _INPUTS or not _OPTIONS.issuperset(names[len(_INPUTS) :]):
        return None
    if any(_reads(function, name) for name in parameters if name not in names):
        return None
    # In a thread of its own, where no autocast, no default device and no tracing of the caller's is at work.
    with ThreadPoolExecutor(1) as elsewhere:
        return elsewhere.submit(_asked, function, frozenset(names)).result()


def _reads(function: types.FunctionType, name: str) -> bool:
    """Whether the variable ``name`` is looked at in ``function``."""
    return any(
        instruction.opname.startswith("LOAD")
        and name in (instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,))
        for instruction in dis.get_instructions(function)
    )


class _Layer:
    """As much of an attention layer as a known function reads of it.

    Attributes:
        read: which of it was.
    """

    def __init__(self, **attributes: Any) -> None:
        self.read: set[str] = set()
        self._attributes = attributes

    def __getattr__(self, name: str) -> Any:
        if name not in self._attributes:
            raise AttributeError(name)
        self.read.add(name)
        return self._attributes[name]


def _asked(function: AttentionFunction, names: frozenset[str]) -> tuple[str, ...] | None:
    """``honoured_by`` of a function that has arguments of these ``names``, by what it makes of small tensors."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    scaling, num_q_heads, query_len, kv_len, head_dim = 0.3, 4, 3, 5, 8
    query, sinks = random(2, num_q_heads, query_len, head_dim), random(num_q_heads)
    mask, bias = random(2, 1, query_len, kv_len), random(1, num_q_heads, query_len, kv_len)
    mask[:, :, 0, 2:] = torch.finfo(mask.dtype).min
    plain: dict[str, Any] = {"attention_mask": None, "softcap": None, "position_bias": None, "sliding_window": 2}
    honoured: tuple[str, ...] = ()
    for group in (1, 2):
        layer = _Layer(training=False, num_key_value_groups=group, sinks=sinks)
        key, value = (random(2, num_q_heads // group, kv_len, head_dim) for _ in range(2))
        for asked in ({}, {"attention_mask": mask}, {"attention_mask": mask, "softcap": 0.7, "position_bias": bias}):
            named: dict[str, Any] = {name: each for name, each in {**plain, **asked}.items() if name in names}
            try:
                output, _ = function(layer, query, key, value, scaling=scaling, **named)
            except Exception:  # it reads what only a layer of its own has, or what is not there
                return None
            added = named["attention_mask"]
            if added is not None and named.get("position_bias") is not None:
                added = added + named["position_bias"]
            options = AttentionOptions(
                added,
                softmax_scale=scaling,
                softcap=named.get("softcap"),
                sinks=sinks if "sinks" in layer.read else None,
            )
            expected = reference.attend(query, key, value, options)
            if output.shape != expected.shape or not torch.allclose(output, expected, rtol=1e-4, atol=1e-5):
                return None
        honoured = tuple(name for name in ("softcap", "position_bias", "sinks") if name in names | layer.read)
        if "num_key_value_groups" not in layer.read:
            break  # such a model has as many heads of keys as of queries
    return honoured
