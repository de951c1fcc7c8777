"""What a cache that is given to ``generate`` has checked before it begins."""

from typing import Any

from torch import Tensor

from quantcache.layers import _host


def watch_generate() -> None:
    """Have ``generate`` check the prompt of caches that know theirs; loading such a cache does it."""
    _host.watch_generate(_check_given)


def unwatch_generate() -> None:
    """Put the original ``generate`` back; one that someone wrapped again since stays."""
    _host.unwatch_generate()


def _check_given(cache: Any, input_ids: Any) -> None:
    if hasattr(cache, "check_prompt") and isinstance(input_ids, Tensor):
        cache.check_prompt(input_ids)
