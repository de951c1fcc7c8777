"""Whatever the library touches of transformers, torch and accelerate that is private, patched, or renamed by them.

transformers 5.24 renamed the argument ``past_key_values`` of models, masks and ``generate`` to ``cache``, and so the
field of what models return. Elsewhere in this library the name is never spelled: it is asked for here.

Each function has a test in ``tests/test_host.py``, named for what breaks when the host changes. Not here are the
names, private ones among them, that every model and tokenizer of transformers defines or reads; see ``adapters/qwen``.
"""

import functools
import inspect
import threading
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
import transformers
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.models.auto import tokenization_auto
from transformers.quantizers import auto as quantizers_auto
from transformers.utils import output_capturing

_GIVEN: Final = "_is_user_defined"

_lock = threading.Lock()
_patched: dict[tuple[type[Any], str], tuple[Callable[..., Any], Callable[..., Any]]] = {}
"""By class and name, methods of transformers' and what was put in their place."""


CACHE_NAMES: Final = ("cache", "past_key_values")
"""What the argument is called, the newest name first."""


def _host_cache_name() -> str:
    """The name under which ``generate`` hands a model its cache, here and now."""
    known = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return next((name for name in CACHE_NAMES if name in known), CACHE_NAMES[0])


CACHE_NAME: Final = _host_cache_name()
"""The one of ``CACHE_NAMES`` that this transformers hands to models, and takes without a warning."""


def cache_argument(cache: Cache | None, model: Any = None) -> dict[str, Any]:
    """``cache`` as a keyword argument of a model, of ``generate`` or of transformers' other functions.

    Args:
        cache: what to hand over.
        model: the model whose ``forward`` is called, which may know only one of the names; None for ``CACHE_NAME``.
    """
    return {CACHE_NAME if model is None else _name_for(type(model).forward): cache}


def feed(model: Any, ids: Tensor, cache: Cache, **options: Any) -> Any:
    """Call ``model`` with tokens behind those in ``cache``, and see to it that the model takes the cache.

    Args:
        model: a causal language model.
        ids: int64 (batch, query_len), on its device.
        cache: what it reads and fills.
        options: for its ``forward``.

    Returns:
        What the model returns.

    Raises:
        RuntimeError: it went by another cache, because it passed over the argument.
    """
    output = model(ids, use_cache=True, **cache_argument(cache, model), **options)
    used = getattr(output, CACHE_NAME, None)
    if used is not None and used is not cache:
        raise RuntimeError(
            f"feed: {type(model).__name__} must take its cache as {' or '.join(CACHE_NAMES)}, got back another cache "
            f"than it was given as {next(iter(cache_argument(cache, model)))}. Nothing was read from the cache."
        )
    return output


@functools.lru_cache(maxsize=64)
def _name_for(forward: Callable[..., Any]) -> str:
    """The name that ``forward`` knows the cache by; transformers' where it does not say."""
    known = inspect.signature(forward).parameters
    names = [name for name in CACHE_NAMES if name in known]
    return CACHE_NAME if CACHE_NAME in names or not names else names[0]


def take_cache(place: str, arguments: dict[str, Any]) -> Any:
    """Take the cache out of keyword arguments, under whichever name it came.

    Args:
        place: where, for the message.
        arguments: the names of ``CACHE_NAMES`` are removed from it.

    Returns:
        What came, None where nothing did.

    Raises:
        ValueError: two different ones came.
        TypeError: a cache came under a name that is not known here, which a model would pass over in silence.
    """
    found = [value for value in (arguments.pop(name, None) for name in CACHE_NAMES) if value is not None]
    if any(value is not found[0] for value in found):
        raise ValueError(f"{place}: one of {' and '.join(CACHE_NAMES)} must be given, got both. They are one argument.")
    for name, value in arguments.items():
        if isinstance(value, Cache):
            raise TypeError(
                f"{place}: the cache must come as {' or '.join(CACHE_NAMES)}, got it as {name}. transformers "
                f"{transformers.__version__} may have renamed the argument; `quantcache doctor` says what was tested."
            )
    return found[0] if found else None


def caches_in(arguments: Mapping[str, Any]) -> list[Any]:
    """Every cache among the keyword arguments of a call, under each of ``CACHE_NAMES``."""
    return [arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None]


def cache_of(output: Any) -> Any:
    """The cache in what a model or ``generate`` returned, None without one."""
    return getattr(output, CACHE_NAME)


def attention_function(name: str) -> Callable[..., Any] | None:
    """The attention function that models find under ``name``, or None; ``AttentionInterface.register`` replaces it."""
    from transformers.modeling_utils import AttentionInterface

    found: Any = AttentionInterface._global_mapping.get(name)
    function: Callable[..., Any] | None = found
    return function


def route_eager(route: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Have models with eager attention call ``route`` of their own function, however often this is called."""
    from transformers.modeling_utils import AttentionInterface

    def routed(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def get_interface(self: Any, attn_implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
            function: Callable[..., Any] = original(self, attn_implementation, default)
            return route(function) if attn_implementation == "eager" else function

        return get_interface

    _patch(AttentionInterface, "get_interface", routed)


def unroute_eager() -> list[str]:
    """Have them call it themselves again; what is returned is as for ``unwatch_generate``."""
    from transformers.modeling_utils import AttentionInterface

    return _unpatch(AttentionInterface)


def wants_weights() -> bool:
    """Whether the model that is running collects what its attention functions return as weights."""
    return any(name.endswith("attentions") for name in output_capturing._active_collector.get() or ())


@dataclass
class Step:
    """What ``generate`` is about to feed a model.

    Attributes:
        cache: what the model will read and fill; None where the model asked for a new one.
        fed: tokens at hand, of which the newest ``new_tokens`` are fed.
        new_tokens: see ``fed``; None for all of them.
        total: tokens of the sequence, stored ones included, by the mask; None without one.
    """

    cache: Any
    fed: int
    new_tokens: int | None
    total: int | None


class WatchedCall(Protocol):
    """One call of ``generate`` with a cache that is watched."""

    model: Any
    cache: Any
    was_fed: bool
    """Whether tokens were about to be fed, which is set here."""

    def prepare(self, step: Step) -> None:
        """Called before tokens are fed, except for a decoding step with ``cache``; it may change ``step``."""

    def end(self, used: Any) -> None:
        """Called with the cache that was returned, None for none, unless ``generate`` raised."""

    def break_off(self) -> None:
        """Called in place of ``end`` where ``generate`` raised, as Ctrl-C or a streamer does in the middle of it."""


BeginCall = Callable[[Any, Tensor | None, Mapping[str, Any]], WatchedCall | None]
"""Called with a model, and the first and the keyword arguments of its ``generate``; None where nothing is watched."""

_call: "ContextVar[WatchedCall | None]" = ContextVar("quantcache_call", default=None)
"""The innermost call of ``generate``."""


def watch_generate(begin: BeginCall) -> None:
    """Have ``generate`` of every model ask ``begin`` for what watches the call, however often this is called."""
    _patch(GenerationMixin, "generate", functools.partial(_watched_generate, begin=begin))
    _patch(GenerationMixin, "prepare_inputs_for_generation", _watched_prepare)


def unwatch_generate() -> list[str]:
    """Put the original methods back.

    Returns:
        What stays as it is, because someone wrapped it again since.
    """
    return _unpatch(GenerationMixin)


def _patch(owner: type[Any], name: str, wrapped: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put ``wrapped`` of a method in its place, unless it is there already."""
    with _lock:
        original = getattr(owner, name)
        if (owner, name) not in _patched or original is not _patched[owner, name][1]:
            _patched[owner, name] = original, wrapped(original)
            setattr(owner, name, _patched[owner, name][1])


def _unpatch(owner: type[Any]) -> list[str]:
    """Put the methods of ``owner`` back; what stays, because someone wrapped it again since, is returned."""
    stay = []
    with _lock:
        for (patched, name), (original, wrapper) in list(_patched.items()):
            if patched is not owner:
                continue
            current = getattr(owner, name)
            if current is not wrapper and current is not original:
                stay.append(described(f"{owner.__name__}.{name}", current))
                continue
            setattr(owner, name, original)
            del _patched[owner, name]
    return stay


def described(name: str, function: Any) -> str:
    """``name`` and where ``function``, which stands there now, was written."""
    return f"{name} ({getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', repr(function))})"


def _watched_generate(original: Callable[..., Any], begin: BeginCall) -> Callable[..., Any]:
    @functools.wraps(original)
    def generate(self: Any, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        call = begin(self, inputs, kwargs)
        outer = _call.set(call)  # without a cache too: a draft model's steps are not those of the outer call
        try:
            output = original(self, inputs, *args, **kwargs)
        except BaseException:
            if call is not None:
                call.break_off()
            raise
        finally:
            _call.reset(outer)
        if call is not None:
            call.end(getattr(output, CACHE_NAME, None))
        return output

    return generate


def _watched_prepare(original: Callable[..., Any]) -> Callable[..., Any]:
    """``prepare_inputs_for_generation``, which models override and call, often with what they want instead."""

    @functools.wraps(original)
    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = _call.get()
        if call is not None and call.model is self:
            call.was_fed = True
        new_tokens = kwargs.get("next_sequence_length")
        if call is None or call.model is not self or (kwargs.get(CACHE_NAME) is call.cache and new_tokens is not None):
            return original(self, *args, **kwargs)
        tokens, prefix = args[0] if args else kwargs.get("input_ids"), ""
        if self.config.is_encoder_decoder:
            prefix = "decoder_"
        elif kwargs.get("inputs_embeds") is not None and kwargs.get("is_first_iteration"):
            tokens = kwargs["inputs_embeds"]
        if tokens is None or len(args) > 1:  # a way to call it that no model has
            return original(self, *args, **kwargs)
        given = caches_in(kwargs)
        mask: Any = kwargs.get(f"{prefix}attention_mask")
        total = mask.shape[1] if isinstance(mask, Tensor) and mask.dim() == 2 else None
        step = Step(given[0] if given else None, tokens.shape[1], new_tokens, total)
        call.prepare(step)
        for name in CACHE_NAMES:
            kwargs.pop(name, None)
        kwargs.update({CACHE_NAME: step.cache, "next_sequence_length": step.new_tokens})
        return original(self, *args, **kwargs)

    return prepare


def given_to_generate(check: Callable[[Any], None]) -> property:
    """The attribute ``_is_user_defined``, which ``generate`` sets on a cache it is given; ``check`` may refuse it."""

    def was_given(cache: Any) -> bool:
        return bool(vars(cache).get(_GIVEN, False))

    def give(cache: Any, value: bool) -> None:
        check(cache)
        cache.__dict__[_GIVEN] = value

    return property(was_given, give)


def is_checkpointing(model: Any) -> bool:
    """Whether ``model`` computes activations again in the backward pass, and so keeps no cache in training."""
    names = "is_activation_checkpointing", "is_gradient_checkpointing"
    return any(getattr(model, name) for name in [name for name in names if hasattr(type(model), name)][:1])


def tensor_parallel_mesh(model: Any) -> Any:
    """The device mesh of the ranks that share ``model`` by its ``tp_plan``, None for a model in one process."""
    if (getattr(model, "_tp_size", None) or 1) < 2:
        return None
    mesh = model._device_mesh
    return mesh["tp"] if mesh.ndim > 1 else mesh


def brought_to(module: torch.nn.Module) -> torch.device | None:
    """Where accelerate brings the weights of ``module`` when they are needed; None where they stay."""
    place = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return torch.device("cuda", place) if isinstance(place, int) else None if place is None else torch.device(place)


def note_window(layer: Any, sliding_window: int) -> None:
    """Have iteration over a cache give the window of ``layer`` behind its keys and values."""
    layer._sliding_window_tensor = torch.tensor(sliding_window)


def mark_static_address(tensor: Tensor) -> None:
    """Tell torch.compile that a tensor stays where it is, without which a step that writes it is no CUDA graph."""
    torch._dynamo.mark_static_address(tensor)


def quantized_states(layer: Any) -> tuple[Tensor, Tensor] | None:
    """Dense keys and values of a layer of transformers' ``QuantizedCache``, None for one of another kind."""
    if getattr(layer, "_quantized_keys", None) is None:
        return None
    found = []
    for held, newest in ((layer._quantized_keys, layer.keys), (layer._quantized_values, layer.values)):
        restored = layer._dequantize(held)
        found.append(torch.cat([restored, newest], dim=-2) if newest.numel() else restored)
    return found[0], found[1]


def register_tokenizer(tokenizer: type[Any]) -> None:
    """Have ``AutoTokenizer`` take this class, by its name, in place of a checkpoint's own.

    ``AutoTokenizer.register`` would still run the checkpoint's own tokenizer under ``trust_remote_code=True``.
    """
    tokenization_auto.REGISTERED_TOKENIZER_CLASSES[tokenizer.__name__] = tokenizer


def register_quantizer(method: str, config: Any, quantizer: Any) -> None:
    """Have ``from_pretrained`` load checkpoints whose ``quant_method`` is ``method`` with these classes."""
    quantizers_auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = config
    quantizers_auto.AUTO_QUANTIZER_MAPPING[method] = quantizer


def register_parallel_style(name: str, style: Any) -> None:
    """Let the ``tp_plan`` of a model name ``style``."""
    from transformers.distributed import tensor_parallel

    tensor_parallel.ALL_PARALLEL_STYLES.register(name, style)  # type: ignore[attr-defined]
