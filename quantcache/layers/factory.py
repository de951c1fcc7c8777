"""Which layer each decoder layer of a model gets: int8, or transformers' own."""

from dataclasses import dataclass, field
from typing import Any, Final

from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, StaticCache, StaticLayer

from quantcache.layers._host import CACHE_NAME
from quantcache.layers.base import BaseInt8Layer
from quantcache.layers.fixed import CommonByKind, StaticInt8Layer
from quantcache.layers.growing import Int8Layer
from quantcache.layers.sliding import Int8SlidingLayer
from quantcache.quantization.scheme import DEFAULT_RESIDUAL_LENGTH, MAX_NATIVE_WINDOW
from quantcache.store.read_log import FallbackPolicy

_OWN_CACHE: Final = {"minimax": "MiniMaxCache", "reformer": "ReformerDynamicCache", "xlstm": "xLSTMCache"}
"""Models that refuse every cache but their own, by model type."""


@dataclass
class LayerFactory:
    """Makes the int8 layers of one cache; called, it makes one for full attention.

    Attributes:
        residual_length: see ``BaseInt8Layer``.
        policy: what the layers do about slow reads.
        max_cache_len: tokens that fit into each layer, None for layers that grow.
        commons: see ``StaticInt8Layer``.
        offloading: likewise.
    """

    residual_length: int = DEFAULT_RESIDUAL_LENGTH
    policy: FallbackPolicy = field(default_factory=FallbackPolicy)
    max_cache_len: int | None = None
    commons: CommonByKind = field(default_factory=dict)
    offloading: bool = False

    def __post_init__(self) -> None:
        """Refuse a bad ``residual_length`` here, not in the middle of the first forward pass."""
        self()

    def __call__(self) -> BaseInt8Layer:
        """A layer for full attention."""
        if self.max_cache_len is not None:
            return StaticInt8Layer(self.max_cache_len, self.residual_length, self.policy, self.commons, self.offloading)
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

WINDOW_LEFT_TO_CACHE: Final = frozenset({"kyutai_speech_to_text", "moshi"})
"""Model types without a mask for their window. They attend to all that they are given, which must be the window to the
token."""


def window_left_to_cache(config: PreTrainedConfig) -> int | None:
    """Tokens of the window that the model of ``config`` leaves to its cache, None where it leaves none."""
    return getattr(config, "sliding_window", None) if config.model_type in WINDOW_LEFT_TO_CACHE else None


def one_for_two_error() -> ValueError:
    """What an encoder-decoder model gets that was given one cache."""
    return ValueError(
        "QuantizedInt8Cache: an encoder-decoder model keeps self- and cross-attention apart and needs two "
        f"caches, got one. Use {CACHE_NAME}=QuantizedInt8Cache.for_encoder_decoder(model.config)."
    )


def check_goes_without_config(config: PreTrainedConfig) -> None:
    """Refuse a model that one cache without a config would serve wrongly, unnoticed by both.

    Raises:
        ValueError: it leaves its window to the cache, or keeps self- and cross-attention in it.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise one_for_two_error()
    if (window := window_left_to_cache(config)) is not None:
        raise ValueError(
            f"QuantizedInt8Cache: a {config.model_type} model leaves its window of {window} tokens to the cache, which "
            "must be made from its config, got config=None. Use QuantizedInt8Cache(model.config)."
        )


class LayersOnUse(list[Any]):
    """The layers of a cache without a config, before there are any: a model that looks one up is told why."""

    def __getitem__(self, index: Any) -> Any:
        if not self and not isinstance(index, slice):
            raise IndexError(
                "QuantizedInt8Cache.layers: a model that looks into the layers before their first tokens needs a cache "
                f"made from its config, got layer {index} of none. Use QuantizedInt8Cache(model.config)."
            )
        return super().__getitem__(index)


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
    keeps_windows = window_left_to_cache(config) is not None  # an int8 one holds whole pages
    if make.max_cache_len is not None and keeps_windows:
        raise ValueError(
            "QuantizedInt8Cache: max_cache_len needs a model that masks its window itself, "
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
    kept = [keeps_windows and getattr(layer, "is_sliding", False) for layer in native]
    return [layer if keep else make.instead_of(layer) for layer, keep in zip(native, kept, strict=True)]
