"""What a cache sees to in a call of ``generate()`` that is given it.

The prompt goes on behind what is stored, and no token is fed twice. A model that wants a new cache gets this one,
emptied; where it goes on with another, that is said.
"""

import sys
import warnings
import weakref
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import EncoderDecoderCache, LinearAttentionCacheLayerMixin

from quantcache.layers import _host, native
from quantcache.layers.factory import LayerFactory, check_goes_without_config
from quantcache.store.read_log import FallbackPolicy

NAMES: Final = frozenset(_host.CACHE_NAMES)
"""What the argument of a cache may be called."""


class _Question(NamedTuple):
    """That a cache was asked for the sizes of masks, as it is before tokens are stored in it.

    Attributes:
        cache: which.
        seq_len: tokens that it held then.
    """

    cache: "weakref.ref[Any]"
    seq_len: int


_unanswered: _Question | None = None
"""The last one, until an attention call shows what came of it."""


def watch_generate() -> None:
    """Have ``generate`` see to the caches of this library that it is given. Constructing a cache does it."""
    _host.watch_generate(_begin)


def unwatch_generate() -> None:
    """Put the original methods of ``GenerationMixin`` back; a warning names one that someone wrapped again since."""
    if stay := _host.unwatch_generate():
        warn_of_what_stays("unwatch_generate", stay)


def check_not_passed_over(module: Any, options: Mapping[str, Any]) -> None:
    """Refuse a cache that came to an attention function, since its model took the argument for another's option.

    Args:
        module: the attention layer.
        options: keyword arguments of the attention function.

    Raises:
        TypeError: there is one of this library's, and nothing was stored in it.
    """
    for name in NAMES.intersection(options):
        if _policies(options[name]) and not _seq_len(options[name]):
            raise TypeError(
                f"{type(module).__name__}: the cache must come as {_host.CACHE_NAME}, got it as {name}, which the "
                "model passed over."
            )


def note_question(cache: Any, seq_len: int) -> None:
    """Note that ``cache``, of ``seq_len`` tokens, was asked for the sizes of masks, by a model or by hand."""
    global _unanswered
    _unanswered = _Question(weakref.ref(cache), seq_len)
    cache._make.policy.lost = None


def check_answered(module: Any) -> None:
    """Notice a model that was given a cache, asked it for the sizes of its masks and attends to what it did not store.

    That it attends tells it from one that was stopped before it could store, and from a question by hand.

    Args:
        module: the attention layer, about to read keys that no cache holds.

    Raises:
        FallbackError: there is such a model, and the cache is strict.
    """
    global _unanswered
    question = _unanswered
    if question is None:
        return
    cache, seq_len = question.cache(), question.seq_len
    if cache is None or any(held != seq_len for held in native.seq_lens(cache.layers)):
        _unanswered = None
    elif getattr(module, "is_causal", False):  # no encoder's
        model, _unanswered = model_given(cache), None
        if model is not None:
            reason = "it asked for the sizes of its masks and stored nothing"
            if model.training and _host.is_checkpointing(model):
                reason += ", which gradient checkpointing does in training"
            cache._make.policy.went_without(f"{type(model).__name__} went on without the cache: {reason}")


def model_given(cache: Any) -> PreTrainedModel | None:
    """The outermost of the models at work here that were called with ``cache``, None where it is used by hand."""
    found, frame = None, sys._getframe(1)
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        if frame.f_code.co_name == "forward" and not NAMES.isdisjoint(frame.f_code.co_varnames):
            names = frame.f_locals
            if any(names.get(name) is cache for name in NAMES) and isinstance(names.get("self"), PreTrainedModel):
                found = names["self"]
    return found


def warn_of_what_stays(place: str, stay: list[str]) -> None:
    """Say which functions others put over the wrappers of this library, which are below them still."""
    warnings.warn(
        f"{place}: what others put over this library's wrappers since stays, and may still call them: "
        f"{', '.join(stay)}. Call {place}() again when it is taken out.",
        stacklevel=3,
    )


def _begin(model: Any, inputs: Tensor | None, arguments: Mapping[str, Any]) -> "_Call | None":
    """Check the prompt, before anything changes, and watch the call if its cache is one of this library's."""
    for cache in _host.caches_in(arguments):
        if policies := _policies(cache):
            if isinstance(getattr(cache, "layer_class_to_replicate", None), LayerFactory) and not cache.layers:
                check_goes_without_config(model.config)
            given = [ids for ids in (arguments.get("input_ids"), inputs) if isinstance(ids, Tensor)]
            if given and hasattr(cache, "check_prompt"):
                cache.check_prompt(given[0])
            return _Call(model, cache, policies, given[0] if given else None, arguments)
    return None


class _Call:
    """One call of ``generate``; see ``_host.WatchedCall``."""

    def __init__(
        self,
        model: Any,
        cache: Any,
        policies: list[FallbackPolicy],
        input_ids: Tensor | None,
        arguments: Mapping[str, Any],
    ) -> None:
        self.model, self.cache, self._policies = model, cache, policies
        name, prompt, prefix = "the prompt", input_ids, ""
        if isinstance(cache, EncoderDecoderCache):
            name, prompt, prefix = "decoder_input_ids", arguments.get("decoder_input_ids"), "decoder_"
        elif arguments.get("inputs_embeds") is not None:
            name, prompt = "inputs_embeds", arguments["inputs_embeds"]
        prompt_len = 1 if prompt is None else prompt.shape[1]  # else the model begins with one token of its own
        mask = arguments.get(f"{prefix}attention_mask")
        # With a longer mask the prompt is only what is new, and is not sliced.
        self._prompt_len, self._before = prompt_len, 0 if mask is None else max(mask.shape[-1] - prompt_len, 0)
        stored = 0 if self._before else _seq_len(cache)
        self._was_empty = not stored
        if stored and prefix:
            _empty(cache)  # the encoder's states in it are those of another call
        elif stored and prompt_len <= stored:
            raise ValueError(
                f"QuantizedInt8Cache: {name} must go on behind the {stored} tokens in the cache, got {prompt_len}. "
                "Pass the whole sequence, stored tokens included; take tokens back with cache.crop(-n), or empty the "
                "cache with cache.reset()."
            )
        for policy in policies:
            policy.lost = None
        self._input_ids = None if prefix or self._before or name == "inputs_embeds" else input_ids
        self.was_fed, self._known_before = False, getattr(cache, "known_ids", None)
        cache.known_ids = None

    def prepare(self, step: _host.Step) -> None:
        """Have the model go on with the cache, and feed it what is not stored yet."""
        if step.cache is None:
            # As LongRoPE does where its factors change: what is stored is no longer right, and all is fed again.
            _empty(self.cache)
            step.cache, step.new_tokens = self.cache, None
        elif step.cache is not self.cache:
            self._lost(f"it went by a {type(step.cache).__name__} of its own")
        elif step.new_tokens is None and (stored := _seq_len(self.cache)):
            total = step.total
            if total is None and step.fed >= self._prompt_len:  # no chunk of it
                total = self._before + step.fed
            if total is None or stored + step.fed <= total:
                return
            if total <= stored and self._was_empty:
                return  # a model with tokens of its own before the prompt, which it slices itself
            if total <= stored:
                raise ValueError(
                    f"QuantizedInt8Cache: {type(self.model).__name__} must be fed what follows the {stored} tokens in "
                    f"the cache, got the first {total} again, from an option of generate() that begins from the front "
                    "over a kept cache (prefill_chunk_size, in older transformers). Leave it out, or empty the cache "
                    "with cache.reset()."
                )
            step.new_tokens = total - stored

    def break_off(self) -> None:
        """Leave the layers at one length, of tokens that are known; a call that was refused changed nothing."""
        if not self.was_fed:
            self.cache.known_ids = self._known_before
            return
        make_even(self.cache)
        if isinstance(getattr(self.cache, "input_ids", None), Tensor) and not _seq_len(self.cache):
            self.cache.input_ids = None  # of an emptied cache there is nothing to check
        self.cache.known_ids = self._input_ids

    def end(self, used: Any) -> None:
        """Notice that the cache was left out, and keep the prompt in it to compare the next one with.

        Not the answer: as text that is tokenized again it may be other tokens, which is common and does little.
        """
        if self._input_ids is not None:
            self.cache.known_ids = self._input_ids.clone()
        if used is not None and used is not self.cache:
            self._lost(f"it went by a {type(used).__name__} of its own")
        elif all(native.holds_nothing(part.layers) for part in _parts(self.cache)):
            self._lost("it stored nothing there")

    def _lost(self, reason: str) -> None:
        """Tell of it, once for the caches of both attentions."""
        reason = f"{type(self.model).__name__} went on without the cache: {reason}"
        for policy in self._policies:
            policy.lost = reason
        self._policies[0].went_without(reason)


def _parts(cache: Any) -> list[Any]:
    """The caches of which ``cache`` consists."""
    is_pair = isinstance(cache, EncoderDecoderCache)
    return [cache.self_attention_cache, cache.cross_attention_cache] if is_pair else [cache]


def _policies(cache: Any) -> list[FallbackPolicy]:
    """The policy of each cache of this library in ``cache``."""
    makes = [getattr(part, "_make", None) for part in _parts(cache)]
    return [make.policy for make in makes if isinstance(make, LayerFactory)]


def _seq_len(cache: Any) -> int:
    """Tokens stored, of the encoder where there are none of the decoder."""
    return next(filter(None, (native.seq_len(part.layers) for part in _parts(cache))), 0)


def make_even(cache: Any) -> None:
    """Have all layers hold the same tokens, where a forward pass was broken off between two of them.

    The newest tokens are forgotten where only some layers have them; where a layer cannot go back, or counts no
    tokens, as linear attention, the cache is emptied. Whoever then passes the whole sequence goes on rightly.
    """
    layers = [layer for part in _parts(cache) for layer in part.layers]
    counted = [layer for layer in layers if hasattr(layer, "get_seq_length")]
    lengths = [int(layer.get_seq_length()) for layer in counted]
    is_pair = isinstance(cache, EncoderDecoderCache)
    if (
        len(counted) < len(layers)
        or is_pair
        or any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)
    ):
        if any(lengths):
            _empty(cache)
        return
    too_many = [length - min(lengths) for length in lengths]
    if not any(too_many):
        return
    try:
        for layer, tokens in zip(counted, too_many, strict=True):
            native.crop([layer], -tokens)
    except ValueError:
        _empty(cache)


def _empty(cache: Any) -> None:
    """Forget all tokens, and nothing else."""
    for part in _parts(cache):
        records_past = any(getattr(layer, "record_past", False) for layer in part.layers)
        for layer in part.layers:
            native.reset(layer)
        if records_past:
            part.activate_past_recording()
    if isinstance(cache, EncoderDecoderCache):
        cache.is_updated = dict.fromkeys(cache.is_updated, False)
