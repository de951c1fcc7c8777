"""The check that ``generate`` goes on with the prompt that a cache holds: one it was loaded with, or one it was fed."""

import warnings
from typing import Any, Protocol

from torch import Tensor

from quantcache.layers import native


class KnownPrompt(Protocol):
    """What files know of a cache: the part of ``QuantizedInt8Cache`` that they read and fill."""

    layers: Any
    layer_class_to_replicate: Any
    input_ids: Tensor | None
    known_ids: Tensor | None

    def get_seq_length(self) -> int:
        """Tokens in it."""


def check_prompt(cache: KnownPrompt, input_ids: Tensor) -> None:
    """See ``QuantizedInt8Cache.check_prompt``."""
    stored = cache.input_ids
    if stored is None:
        _warn_of_another(cache, input_ids)
        return
    seq_len = cache.get_seq_length()
    place, advice = (
        "QuantizedInt8Cache.check_prompt",
        "Pass the whole prompt, stored tokens included, or set cache.input_ids = None to leave this check out.",
    )
    if input_ids.shape[0] != stored.shape[0] or input_ids.shape[1] <= seq_len:
        raise ValueError(
            f"{place}: the prompt must begin with the ({stored.shape[0]}, {seq_len}) tokens in the cache and go "
            f"on, got {tuple(input_ids.shape)}. {advice}"
        )
    if difference := _first_difference(input_ids, stored):
        raise ValueError(
            f"{place}: the prompt must begin with the {stored.shape[1]} stored tokens, got {difference}. {advice}"
        )


def _warn_of_another(cache: KnownPrompt, input_ids: Tensor) -> None:
    """Warn where a cache that ``generate`` filled gets another prompt, for which its keys and values are wrong."""
    known = cache.known_ids
    if known is None or len(known) != len(input_ids):
        return
    seq_len = native.seq_len(cache.layers)
    if not seq_len or input_ids.shape[1] <= seq_len:
        return
    known = known[:, :seq_len]
    if difference := _first_difference(input_ids, known):
        warnings.warn(
            f"QuantizedInt8Cache: the prompt does not begin with the {known.shape[1]} tokens that the cache was given, "
            f"got {difference}, so the model goes on from those and not from this prompt. Use a new cache for another "
            "prompt, or empty this one with cache.reset().",
            stacklevel=2,
        )


def _first_difference(input_ids: Tensor, stored: Tensor) -> str | None:
    """Where the beginning of a prompt (batch, seq_len) differs from stored tokens (batch, fewer); None: nowhere."""
    same = input_ids[:, : stored.shape[1]].to(stored.device) == stored
    if bool(same.all()):
        return None
    row, column = (int(index) for index in (~same).nonzero()[0])
    return f"token {int(input_ids[row, column])} for {int(stored[row, column])} at place {column} of row {row}"
