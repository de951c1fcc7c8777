"""The cache that a config asks for, and the prompt length that every cache remembers for dynamic NTK."""

from collections.abc import Sequence
from typing import Any, Final

from transformers import DynamicCache
from transformers.cache_utils import Cache

from quantcache.adapters import legacy
from quantcache.adapters.qwen.configuration import QWenConfig
from quantcache.cache import QuantizedInt8Cache

_PROMPT_LEN: Final = "qwen_prompt_len"
_ANNOUNCED_LEN: Final = "qwen_announced_len"


def announce_prompt(cache: Cache, prompt_len: int) -> None:
    """Tell an empty ``cache`` how long its prompt will be, so that one fed in chunks is scaled as one."""
    setattr(cache, _ANNOUNCED_LEN, prompt_len)


def remembered_prompt_len(cache: Cache | None, past_len: int, kv_len: int) -> int:
    """Length of the prompt whose scaling the keys in ``cache`` have; it is noted there, and follows every copy.

    Keys are cached after rotation, so decoding keeps the prompt's factor even when it passes ``seq_length``. The state
    is one number: what a row adds to it, its padding, is in the attention mask, which follows the rows through beams
    and batch operations.

    Args:
        cache: any cache, None without one.
        past_len: tokens in it.
        kv_len: the same with this call's tokens.
    """
    if cache is None:
        return kv_len
    if past_len == 0:
        # What generate announced, without the drafts that may follow it; once, as the cache may be reset.
        prompt_len = int(cache.__dict__.pop(_ANNOUNCED_LEN, kv_len))
    else:
        prompt_len = int(getattr(cache, _PROMPT_LEN, past_len))
    setattr(cache, _PROMPT_LEN, prompt_len)
    return prompt_len


def cache_from_legacy(config: QWenConfig, past_key_values: Sequence[Any]) -> Cache:
    """The original's tuples in the cache that ``config`` asks for; quantised ones always in the int8 cache.

    Raises:
        TypeError, ValueError: see ``legacy.from_legacy``.
    """
    layers = legacy.restored_layers(past_key_values, config)
    cache = new_cache(config, quantized=config.use_cache_quantization or legacy.is_quantized(past_key_values))
    for layer_idx, (key_states, value_states) in enumerate(layers):
        cache.update(key_states, value_states, layer_idx)
    return cache


def new_cache(config: QWenConfig, quantized: bool | None = None) -> Cache:
    """The cache that ``config`` asks for, read by plain torch where ``use_cache_kernel`` is False.

    Args:
        config: the model's.
        quantized: instead of its ``use_cache_quantization``.
    """
    if not (config.use_cache_quantization if quantized is None else quantized):
        return DynamicCache(config=config)
    cache = QuantizedInt8Cache(config)
    if config.use_cache_kernel is False:
        for layer in cache.layers:
            layer.reader = "torch"
    return cache
