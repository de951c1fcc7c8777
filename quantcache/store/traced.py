"""A layer whose lengths only the host knows, in a graph of torch.compile: a handle, and operations that look behind it.

A graph sees neither the pages nor the lengths of such a layer. It has a tensor that names the layer, and operations
that do, when they run, what the same calls do uncompiled; so one graph serves every length. All of them count as
writing the handle, which keeps them in their order, and it is on the CPU, which keeps them out of CUDA graphs.
"""

import itertools
import weakref
from typing import Any, Final

import torch
from torch import Tensor

from quantcache.quantization.options import SCHEMA, AttentionOptions
from quantcache.store import reads
from quantcache.store.segments import ClosedPages
from quantcache.store.states import CachedStates
from quantcache.store.tensor import RecordedStates, is_recorded_pair, read, read_recorded, restore_recorded, shared_view
from quantcache.store.view import PagesView, same_memory

States = tuple[Tensor, Tensor]

ITSELF: Final = -1
"""In place of ``layer_idx``: the handle names a layer, not a cache of them."""

_library = torch.library.Library("quantcache", "FRAGMENT")
_library.define(
    "update(Tensor key_states, Tensor value_states, Tensor(a!) handle, int layer_idx, bool with_gradient) -> ()"
)
_library.define("look(Tensor(a!) handle, int layer_idx) -> ()")
_library.define("length(Tensor(a!) handle, Tensor seq_len) -> Tensor")
_library.define("places(Tensor(a!) handle, int layer_idx, SymInt new_tokens, Device device) -> Tensor")
_library.define(f"attend(Tensor query, Tensor(a!) handle, int layer_idx, SymInt v_head_dim, {SCHEMA}) -> Tensor")
_library.define(
    "restore_newest(Tensor(a!) handle, int layer_idx, bool is_key, SymInt[] shape, ScalarType dtype, Device device, "
    "str reason) -> Tensor"
)


_named: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()
_numbers = itertools.count()
_newest: "weakref.WeakKeyDictionary[Any, tuple[int, States]]" = weakref.WeakKeyDictionary()
"""By what is named: the layer, and what its last ``update`` returned, which a graph may read more than once."""


def handle_for(named: object) -> Tensor:
    """A new handle, int64 () on the CPU, that does not keep alive what it names.

    Args:
        named: a layer, or a cache of ``layers``, whose ``update`` takes ``layer_idx`` besides what theirs take.
    """
    number = next(_numbers)
    _named[number] = named
    with torch.inference_mode(False):
        return torch.tensor(number, device="cpu")


def forget(named: object) -> None:
    """Let go of what the last ``update`` of a graph returned."""
    _newest.pop(named, None)


class TracedStates(CachedStates):
    """The keys or the values that the newest ``update`` of one layer returned, in a graph that does not see them.

    Attributes:
        handle: of the layer or its cache.
        extent: of the shape, dtype and device of the states; one number, expanded.
        layer_idx: of the layer in its cache, or ``ITSELF``.
        is_key: keys if True, values if False.
    """

    handle: Tensor
    extent: Tensor
    layer_idx: int
    is_key: bool

    @staticmethod
    def __new__(cls, handle: Tensor, extent: Tensor, layer_idx: int, is_key: bool) -> "TracedStates":
        """The keys or the values of a layer."""
        made: TracedStates = Tensor._make_wrapper_subclass(cls, extent.shape, dtype=extent.dtype, device=extent.device)
        made.handle, made.extent, made.layer_idx, made.is_key = handle, extent, layer_idx, is_key
        return made

    def __tensor_flatten__(self) -> tuple[list[str], tuple[int, bool]]:
        return ["handle", "extent"], (self.layer_idx, self.is_key)

    @staticmethod
    def __tensor_unflatten__(
        parts: dict[str, Tensor], meta: tuple[int, bool], outer_size: Any, outer_stride: Any
    ) -> "TracedStates":
        return TracedStates(**parts, layer_idx=meta[0], is_key=meta[1])

    def restore(self) -> Tensor:
        """The values as a plain dense tensor."""
        return restored(self, "")

    def restored_for(self, reason: str) -> Tensor:
        """``restore``, noted as a fallback with its ``reason`` when it runs; a strict cache then raises."""
        return restored(self, reason)


def restored(states: TracedStates, reason: str) -> Tensor:
    """See ``restored_for``; a function, for torch.compile takes methods for those of a tensor."""
    form = states.extent.shape, states.extent.dtype, states.extent.device
    made: Tensor = torch.ops.quantcache.restore_newest(states.handle, states.layer_idx, states.is_key, *form, reason)
    return made


def update(
    handle: Tensor, layer_idx: int, key_states: Tensor, value_states: Tensor, with_gradient: bool = False
) -> None:
    """Have ``update`` called when the graph runs.

    Args:
        handle: of the layer or its cache.
        layer_idx: of the layer in its cache, or ``ITSELF``.
        key_states: (batch, num_kv_heads, query_len, head_dim).
        value_states: (batch, num_kv_heads, query_len, v_head_dim).
        with_gradient: whether it is called with states that require gradients.
    """
    torch.ops.quantcache.update(key_states.detach(), value_states.detach(), handle, layer_idx, with_gradient)


def look(handle: Tensor, layer_idx: int) -> None:
    """Let what is stored when the graph runs be what ``newest`` gives, as if an ``update`` had returned it."""
    torch.ops.quantcache.look(handle, layer_idx)


def wants_gradient(*states: Tensor) -> bool:
    """Whether a graph of these states is to carry gradients; an exported step is not."""
    return torch.is_grad_enabled() and not is_exporting() and any(each.requires_grad for each in states)


def is_exporting() -> bool:
    """Whether torch.export traces a step. Before torch 2.13 torch.compile, too, says yes to torch's own question."""
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def length(handle: Tensor, seq_len: Tensor) -> Tensor:
    """``seq_len``, int32 () on the device, as it is before what comes behind in the graph changes it unseen."""
    taken: Tensor = torch.ops.quantcache.length(handle, seq_len)
    return taken


def newest(handle: Tensor, layer_idx: int, kv_len: int, key_states: Tensor, value_states: Tensor) -> States:
    """What the newest ``update`` returns when the graph runs, if it is ``kv_len`` tokens of states like these."""
    key_extent, value_extent = (
        states.new_empty(()).expand(*states.shape[:2], kv_len, states.shape[3]) for states in (key_states, value_states)
    )
    return TracedStates(handle, key_extent, layer_idx, True), TracedStates(handle, value_extent, layer_idx, False)


def with_gradient(states: Tensor, new_states: Tensor) -> Tensor:
    """``TracedStates`` restored, with the newest tokens of it those that carry gradients."""
    assert isinstance(states, TracedStates)
    new_tokens, device = new_states.shape[2], new_states.device
    places: Tensor = torch.ops.quantcache.places(states.handle, states.layer_idx, new_tokens, device)
    return restored(states, "").index_copy(2, places, new_states)


def is_pair_in_graph(key: Tensor, value: Tensor) -> bool:
    """Whether they are the keys and the values of one layer; what ``shared_view`` asks uncompiled."""
    if not isinstance(key, TracedStates):
        return is_recorded_pair(key, value)
    if not isinstance(value, TracedStates) or not key.is_key or value.is_key or key.layer_idx != value.layer_idx:
        return False
    return same_memory(key.handle, value.handle)


def read_in_graph(key: Tensor, value: Tensor, query: Tensor, options: AttentionOptions) -> Tensor:
    """Attention over the states of one layer in a graph."""
    if isinstance(key, RecordedStates):
        return read_recorded(key, query, options)
    assert isinstance(key, TracedStates)
    output: Tensor = torch.ops.quantcache.attend(query, key.handle, key.layer_idx, value.shape[3], *options)
    return output


def dense_in_graph(states: Tensor) -> Tensor:
    """Dense constants in place of cached states, for what is to carry the gradients of queries alone."""
    if isinstance(states, TracedStates):
        return restored(states, "")
    return restore_recorded(states) if isinstance(states, RecordedStates) else states


def _named_by(handle: Tensor) -> Any:
    named = _named.get(int(handle))
    if named is None:
        raise RuntimeError(
            "QuantizedInt8Cache: a compiled graph needs the cache that it was called with, which is gone. "
            "Keep the cache, and compile again for another one."
        )
    return named


def _layer(named: Any, layer_idx: int) -> Any:
    return named if layer_idx == ITSELF else named.layers[layer_idx]


def _stored(layer: Any) -> States:
    return layer.keys, layer.values


def _newest_of(handle: Tensor, layer_idx: int) -> States:
    """What the newest update of a layer returned; what it stores now if another came in between."""
    named = _named_by(handle)
    found, states = _newest.get(named, (None, None))
    return states if found == layer_idx and states is not None else _stored(_layer(named, layer_idx))


def _run_update(
    key_states: Tensor, value_states: Tensor, handle: Tensor, layer_idx: int, with_gradient: bool = False
) -> None:
    named = _named_by(handle)
    if key_states.shape[2] > 1:
        _newest.clear()  # a chunk's exact states are kept for one layer, not for all
    if with_gradient:
        key_states, value_states = key_states.detach().requires_grad_(), value_states.detach().requires_grad_()
    with torch.set_grad_enabled(with_gradient):
        states = named.update(key_states, value_states, *(() if layer_idx == ITSELF else (layer_idx,)))
    if states[0] is not key_states:  # the prompt, which nobody reads from here
        _newest[named] = layer_idx, states


def _run_look(handle: Tensor, layer_idx: int) -> None:
    named = _named_by(handle)
    _newest[named] = layer_idx, _stored(_layer(named, layer_idx))


def _run_length(handle: Tensor, seq_len: Tensor) -> Tensor:
    return seq_len.clone()


def _run_places(handle: Tensor, layer_idx: int, new_tokens: int, device: torch.device) -> Tensor:
    seq_len = int(_layer(_named_by(handle), layer_idx).get_seq_length())
    return torch.arange(seq_len - new_tokens, seq_len, device=device)


def _run_attend(query: Tensor, handle: Tensor, layer_idx: int, v_head_dim: int, *options: Any) -> Tensor:
    key, value = _newest_of(handle, layer_idx)
    # The mask is made for the shape in the graph, which may be that of a capacity.
    found, asked = shared_view(key, value), AttentionOptions(*options).up_to(key.shape[2])
    if found is None:
        return reads.attention(query, PagesView(ClosedPages(()), key, value), asked)
    return read(*found, query, asked)


def _run_restore(
    handle: Tensor,
    layer_idx: int,
    is_key: bool,
    shape: list[int],
    dtype: torch.dtype,
    device: torch.device,
    reason: str,
) -> Tensor:
    states = _newest_of(handle, layer_idx)[0 if is_key else 1].detach()
    if isinstance(states, CachedStates):
        states = states.restored_for(reason) if reason else states.restore()
    missing = shape[2] - states.shape[2]
    return torch.nn.functional.pad(states, (0, 0, 0, missing)) if missing else states.clone()


def _fake_nothing(*_: Any) -> None:
    """Nothing is returned."""


def _fake_places(handle: Tensor, layer_idx: int, new_tokens: int, device: torch.device) -> Tensor:
    return torch.empty(new_tokens, dtype=torch.int64, device=device)


def _fake_attend(query: Tensor, handle: Tensor, layer_idx: int, v_head_dim: int, *options: Any) -> Tensor:
    batch, num_q_heads, query_len, _ = query.shape
    return query.new_empty(batch, query_len, num_q_heads, v_head_dim)


def _fake_restore(handle: Tensor, layer_idx: int, is_key: bool, shape: list[int], *options: Any) -> Tensor:
    dtype, device, _ = options
    return torch.empty(shape, dtype=dtype, device=device)


for _name, _run, _fake in (
    ("update", _run_update, _fake_nothing),
    ("look", _run_look, _fake_nothing),
    ("length", _run_length, _run_length),
    ("places", _run_places, _fake_places),
    ("attend", _run_attend, _fake_attend),
    ("restore_newest", _run_restore, _fake_restore),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"quantcache::{_name}", _fake, lib=_library)
