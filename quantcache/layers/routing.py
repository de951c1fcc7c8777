"""Routes the attention functions of transformers to int8 attention.

The functions registered in ``AttentionInterface`` are wrapped: an ``Int8Tensor`` key goes to ``reads.attention``,
anything else to the original function, untouched. Eager attention is a function of each model's own, which the model
hands to ``AttentionInterface.get_interface``: that gives it back wrapped likewise.
"""

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask

from quantcache.layers import _host, calls
from quantcache.layers.eager import AttentionFunction, honoured_by
from quantcache.quantization.options import PLAIN, AttentionOptions, mask_up_to
from quantcache.store.states import CachedStates
from quantcache.store.tensor import RecordedStates, autocast_to, read, shared_view
from quantcache.store.traced import TracedStates, dense_in_graph, is_pair_in_graph, read_in_graph, wants_gradient

Asked = tuple[str | None, AttentionOptions]
"""What int8 attention does not cover of a call, None if it covers all; and the options, plain where it does not."""

OptionsOf = Callable[[torch.nn.Module, Tensor, int, Any, dict[str, Any]], Asked]
"""Called with module, query, kv_len, mask and keyword arguments of an attention function."""

ROUTED: Final = ("sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
"""Implementations whose arguments are known here. Others still work: they see an ``Int8Tensor``."""

_DENSE_OPTIONS: Final = frozenset({"dropout", "output_attentions"})
"""Options of the original functions that need restored states."""

_DENSE_FLASH_OPTIONS: Final = _DENSE_OPTIONS | {"position_bias"}
_DENSE_SDPA_OPTIONS: Final = _DENSE_OPTIONS | {"softcap"}  # which refuses it itself

_block_masks: "weakref.WeakKeyDictionary[BlockMask, Tensor]" = weakref.WeakKeyDictionary()
"""Block masks as dense ones; the layers of a model share one."""

_lock = threading.Lock()
_wrapped: dict[str, tuple[AttentionFunction, AttentionFunction]] = {}


def install() -> None:
    """Wrap the registered attention functions. Constructing a cache does it; calling it again changes nothing."""
    from transformers.modeling_utils import AttentionInterface

    with _lock:
        for name in ROUTED:
            current = _host.attention_function(name)
            if current is None or (name in _wrapped and current is _wrapped[name][1]):
                continue
            routed = _routed(name, current)
            AttentionInterface.register(name, routed)
            _wrapped[name] = (current, routed)
    _host.route_eager(_routed_eager)


def uninstall() -> None:
    """Put the original attention functions back. Caches that exist keep working, where need be on restored states.

    A function that someone registered over the wrapper since is left in place, and a warning names it.
    """
    from transformers.modeling_utils import AttentionInterface

    stay = []
    with _lock:
        for name, (original, routed) in list(_wrapped.items()):
            current = _host.attention_function(name)
            if current is not routed and current is not original:
                stay.append(_host.described(name, current))
                continue
            AttentionInterface.register(name, original)
            del _wrapped[name]
    stay += _host.unroute_eager()
    if stay:
        calls.warn_of_what_stays("uninstall", stay)


def _routed(name: str, original: AttentionFunction) -> AttentionFunction:
    """``original``, which is registered as ``name``, wrapped."""
    wrapper = functools.partial(_attend, name, functools.partial(_options, name), original)
    return functools.update_wrapper(wrapper, original)


def _routed_eager(original: AttentionFunction) -> AttentionFunction:
    """``original``, the eager attention of a model, wrapped."""
    honoured = honoured_by(original)
    if honoured is None:
        reason = f"eager: unknown is what {original.__module__}.{original.__qualname__} computes"
        return functools.partial(_attend_restored, reason, original)
    return functools.partial(_attend, "eager", functools.partial(_eager_options, honoured), original)


def _attend(
    name: str,
    options_of: OptionsOf,
    original: AttentionFunction,
    /,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    *unnamed: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What stands in the place of ``original``, the attention function ``name``."""
    if unnamed:
        reason = f"{name}: options without their names"
        return _attend_restored(reason, original, module, query, key, value, attention_mask, *unnamed, **kwargs)
    if isinstance(key, (RecordedStates, TracedStates)):
        query = autocast_to(key.dtype, query)
        why, options = options_of(module, query, key.shape[2], attention_mask, kwargs)
        if wants_gradient(query):
            key, value = dense_in_graph(key), dense_in_graph(value)
        elif why is None and query.dtype == key.dtype and is_pair_in_graph(key, value):
            return read_in_graph(key, value, query, options), None
        return original(module, query, key, value, attention_mask, **kwargs)
    if not (isinstance(key, CachedStates) or isinstance(value, CachedStates)):
        if not calls.NAMES.isdisjoint(kwargs):
            calls.check_not_passed_over(module, kwargs)
        if not torch.compiler.is_compiling():
            calls.check_answered(module)
        return original(module, query, key, value, attention_mask, **kwargs)
    found = shared_view(key, value)
    uncovered: str | None = "keys and values of different views"
    if found is not None:
        view, log = found
        if view.is_exact:  # the cross-attention of few tokens
            return original(module, query, view.key_tail, view.value_tail, attention_mask, **kwargs)
        uncovered, options = options_of(module, query, view.capacity or view.seq_len, attention_mask, kwargs)
        if query.dtype != (held := view.dtype):
            query = autocast_to(held, query)
            if uncovered is None and query.dtype != held:
                uncovered = f"query in {query.dtype} and cache in {held}"
        if uncovered is None:
            return read(view, log, query, options), None
    key, value = (s.restored_for(f"{name}: {uncovered}") if isinstance(s, CachedStates) else s for s in (key, value))
    return original(module, query, key, value, attention_mask, **kwargs)


def _attend_restored(
    reason: str, original: AttentionFunction, /, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """What stands in the place of ``original`` where it is not known what it computes of its arguments."""

    def dense(argument: Any) -> Any:
        is_plain = isinstance(argument, CachedStates) and not isinstance(argument, (RecordedStates, TracedStates))
        return argument.restored_for(reason) if is_plain else argument

    return original(*map(dense, args), **{name: dense(argument) for name, argument in kwargs.items()})


def _options(
    name: str, module: torch.nn.Module, query: Tensor, kv_len: int, attention_mask: Any, kwargs: dict[str, Any]
) -> Asked:
    """What one call of the attention function ``name`` asks for.

    Only what the original function honours counts; it ignores every other keyword argument, and so does this.
    """
    is_flash = name != "sdpa" and name.startswith("flash")
    for option in _DENSE_FLASH_OPTIONS if is_flash else _DENSE_SDPA_OPTIONS if name == "sdpa" else _DENSE_OPTIONS:
        value = kwargs.get(option)
        if isinstance(value, Tensor) or value:
            return f"the option {option}", PLAIN

    window = kwargs.get("sliding_window") if is_flash else None
    softcap, sinks = (kwargs.get("softcap"), kwargs.get("s_aux")) if name != "sdpa" else (None, None)
    is_causal = kwargs.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)

    mask = attention_mask
    if isinstance(mask, BlockMask):
        mask = _dense_mask(mask, query, kv_len)
    if mask is None:
        is_causal = is_causal and name != "flex_attention"  # which has no rule of its own
    elif mask.dim() == 4 and not is_flash:
        # The mask is the whole rule, causality and window included; a static one may reach beyond the keys there are.
        mask, is_causal = mask_up_to(kv_len, mask), False
    elif mask.dim() == 2 and is_flash:
        mask = mask[:, None, None, -kv_len:].bool()
    else:
        return f"a mask of {mask.dim()} axes", PLAIN
    position_bias = kwargs.get("position_bias")
    if position_bias is not None and not is_flash:
        mask = _biased(position_bias[..., :kv_len], mask)
    return None, AttentionOptions(mask, is_causal, kwargs.get("scaling"), window, softcap, sinks)


def _eager_options(
    honoured: tuple[str, ...],
    module: torch.nn.Module,
    query: Tensor,
    kv_len: int,
    attention_mask: Any,
    kwargs: dict[str, Any],
) -> Asked:
    """``_options`` of an eager function, which has no rules of its own: what is hidden, the mask says."""
    if kwargs.get("output_attentions") or _host.wants_weights():
        return "the option output_attentions", PLAIN
    if kwargs.get("dropout") and module.training:
        return "the option dropout", PLAIN
    scaling, mask = kwargs.get("scaling"), attention_mask
    if not isinstance(scaling, (float, int)):
        return f"the scaling {type(scaling).__name__}", PLAIN
    if mask is not None:
        if not (isinstance(mask, Tensor) and mask.dim() == 4 and mask.is_floating_point()):
            return "a mask that is not a float tensor of 4 axes", PLAIN
        mask = mask_up_to(kv_len, mask)
    position_bias = kwargs.get("position_bias") if "position_bias" in honoured else None
    if position_bias is not None:
        mask = _biased(position_bias[..., :kv_len], mask)
    softcap = kwargs.get("softcap") if "softcap" in honoured else None
    sinks: Any = module.sinks if "sinks" in honoured else None
    return None, AttentionOptions(mask, False, scaling, None, softcap, sinks)


def _dense_mask(mask: BlockMask, query: Tensor, kv_len: int) -> Tensor:
    """What ``mask`` lets the queries see, bool (batch or 1, heads or 1, query_len, kv_len)."""
    dense = _block_masks.get(mask)
    if dense is None or dense.shape[2:] != (query.shape[2], kv_len):
        batch, heads = mask.shape[:2]
        dense = create_mask(mask.mask_mod, batch, heads, query.shape[2], kv_len, device=query.device)
        _block_masks[mask] = dense
    return dense


def _biased(bias: Tensor, mask: Tensor | None) -> Tensor:
    """``bias`` on the logits where ``mask`` lets them through."""
    if mask is None:
        return bias
    return torch.where(mask, bias, torch.finfo(bias.dtype).min) if mask.dtype == torch.bool else bias + mask
