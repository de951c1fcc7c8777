"""Which layer each decoder layer of a model gets: int8, or transformers' own."""

from dataclasses import dataclass, field
from typing import Any, Final

from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, StaticCache, StaticLayer

from quantcache.layers.base import BaseInt8Layer
from quantcache.layers.fixed import CommonByKind, StaticInt8Layer
from quantcache.layers.growing import Int8Layer
from quantcache.layers.sliding import Int8SlidingLayer
from quantcache.quantization.scheme import DEFAULT_RESIDUAL_LENGTH, MAX_NATIVE_WINDOW
from quantcache.store.read_log import FallbackPolicy

_OWN_CACHE: Final = {"minimax": "MiniMaxCache"}
"""Models that refuse every cache but their own, by model type."""


@dataclass
class LayerFactory:
    """Makes the int8 layers of one cache; called, it makes one for full attention.

    Attributes:
        residual_length: see ``BaseInt8Layer``.
        policy: what the layers do about slow reads.
        max_cache_len: tokens that fit into each layer, None for layers that grow.
        commons: see ``StaticInt8Layer``.
    """

    residual_length: int = DEFAULT_RESIDUAL_LENGTH
    policy: FallbackPolicy = field(default_factory=FallbackPolicy)
    max_cache_len: int | None = None
    commons: CommonByKind = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a bad ``residual_length`` here, not in the middle of the first forward pass."""
        self()

    def __call__(self) -> BaseInt8Layer:
        """A layer for full attention."""
        if self.max_cache_len is not None:
            return StaticInt8Layer(self.max_cache_len, self.residual_length, self.policy, self.commons)
        return Int8Layer(self.residual_length, self.policy)

    def instead_of(self, native: Any) -> Any:
        """The empty int8 layer for what ``native`` is for, or ``native`` itself where int8 is not for it.

        Full attention goes int8, and so do windows and chunks above ``MAX_NATIVE_WINDOW`` tokens. Small windows, linear
        attention, convolutions, indexed, compressed and shared layers stay transformers' own; with
        ``max_cache_len`` so do all windows.
        """
        if type(native) in (DynamicLayer, StaticLayer):
            return self()
        if type(native) is DynamicSlidingWindowLayer and native.sliding_window > MAX_NATIVE_WINDOW:
            return Int8SlidingLayer(native.sliding_window, self.residual_length, self.policy)
        return native


BY_NUMBER_OF_KEYS: Final = frozenset({"gpt_neo"})
"""Model types whose attention takes the number of keys for the position of the query, which is wrong where there is
memory for more; transformers' ``StaticCache`` gives them wrong tokens without a word."""


def layers_for(config: PreTrainedConfig, make: LayerFactory) -> list[Any]:
    """A layer for each decoder layer of the model of ``config``; transformers says what kind each is.

    Raises:
        ValueError: transformers knows no cache for the model.
    """
    if config.model_type in _OWN_CACHE:
        raise ValueError(
            "QuantizedInt8Cache: config must be that of a model that takes a cache of transformers' general kind, got "
            f"{type(config).__name__}, whose model insists on its {_OWN_CACHE[config.model_type]}."
        )
    if make.max_cache_len is not None and getattr(config, "model_type", None) in BY_NUMBER_OF_KEYS:
        raise ValueError(
            "QuantizedInt8Cache: max_cache_len needs a model that does not take the number of keys for a position, "
            f"got config.model_type={config.model_type!r}. Leave max_cache_len out."
        )
    try:
        if make.max_cache_len is None:
            native = DynamicCache(config=config).layers
        else:
            native = StaticCache(config=config, max_cache_len=make.max_cache_len).layers
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            "QuantizedInt8Cache: config must be that of a decoder whose layers transformers can cache, got "
            f"{type(config).__name__}: {type(error).__name__}: {error}."
        ) from error
    return [make.instead_of(layer) for layer in native]
