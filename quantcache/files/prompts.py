"""The check that ``generate`` goes on with the prompt that a loaded cache holds."""

from typing import Any, Protocol

from torch import Tensor


class KnownPrompt(Protocol):
    """What files know of a cache: the part of ``QuantizedInt8Cache`` that they read and fill."""

    layers: Any
    layer_class_to_replicate: Any
    input_ids: Tensor | None

    def get_seq_length(self) -> int:
        """Tokens in it."""


def check_prompt(cache: KnownPrompt, input_ids: Tensor) -> None:
    """See ``QuantizedInt8Cache.check_prompt``."""
    stored = cache.input_ids
    if stored is None:
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
    same = input_ids[:, : stored.shape[1]].to("cpu") == stored
    if not bool(same.all()):
        row, column = (int(index) for index in (~same).nonzero()[0])
        raise ValueError(
            f"{place}: the prompt must begin with the {stored.shape[1]} stored tokens, got token "
            f"{int(input_ids[row, column])} for {int(stored[row, column])} at place {column} of row {row}. {advice}"
        )
