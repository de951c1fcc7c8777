"""A cache that knows which tokens it was loaded with, and a ``generate`` that holds its prompt against them."""

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import Cache

from quantcache._host import caches_in


class KnownPrompt(Cache):
    """The part of ``QuantizedInt8Cache`` that knows its tokens.

    Attributes:
        input_ids: int64 (batch, tokens) on the CPU, the tokens that a file brought, or None. While it is set,
            ``generate`` refuses a prompt that does not begin with it; set it to None to leave that check out.
    """

    input_ids: Tensor | None = None

    def check_prompt(self, input_ids: Tensor) -> None:
        """Refuse a prompt that does not begin with the stored tokens; ``generate`` calls it by itself.

        Args:
            input_ids: int64 (batch, seq_len), the whole prompt, stored tokens included.

        Raises:
            ValueError: it does not begin with them, or holds nothing beyond what is cached.
        """
        stored = self.input_ids
        if stored is None:
            return
        seq_len = self.get_seq_length()
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

    def reset(self) -> None:
        """Forget everything, the stored tokens included."""
        super().reset()  # type: ignore[no-untyped-call]
        self.input_ids = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens; see ``Int8Layer.crop``."""
        super().crop(tokens_to_remove)
        if self.input_ids is not None and tokens_to_remove and self.get_seq_length() < self.input_ids.shape[1]:
            self.input_ids = self.input_ids[:, : self.get_seq_length()]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the sequences ``beam_idx`` (batch,) of the batch, in that order."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._select_ids(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices`` (1-D, int64 or bool) of the batch, in that order."""
        super().batch_select_indices(indices)
        self._select_ids(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence of the batch ``repeats`` times, copies side by side."""
        super().batch_repeat_interleave(repeats)
        if self.input_ids is not None:
            self.input_ids = self.input_ids.repeat_interleave(repeats, dim=0)

    def _select_ids(self, indices: Tensor) -> None:
        if self.input_ids is not None:
            self.input_ids = self.input_ids[torch.as_tensor(indices).to("cpu")]


_lock = threading.Lock()
_wrapped: tuple[Callable[..., Any], Callable[..., Any]] | None = None


def watch_generate() -> None:
    """Have ``generate`` check the prompt of caches that know theirs; loading such a cache does it."""
    global _wrapped
    with _lock:
        original = GenerationMixin.generate
        if _wrapped is not None and original is _wrapped[1]:
            return

        @functools.wraps(original)
        def generate(self: Any, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
            ids = kwargs.get("input_ids", inputs)
            for cache in caches_in(kwargs):
                if isinstance(cache, KnownPrompt) and isinstance(ids, Tensor):
                    cache.check_prompt(ids)
            return original(self, inputs, *args, **kwargs)

        GenerationMixin.generate = generate  # type: ignore[method-assign]
        _wrapped = original, generate


def unwatch_generate() -> None:
    """Put the original ``generate`` back; one that someone wrapped again since stays."""
    global _wrapped
    with _lock:
        if _wrapped is not None and GenerationMixin.generate is _wrapped[1]:
            GenerationMixin.generate = _wrapped[0]  # type: ignore[method-assign]
        _wrapped = None
