"""Decode steps of the default cache and the int8 cache, taken in turn."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from quantcache import QuantizedInt8Cache
from quantcache.layers._host import feed
from quantcache.layers.native import layer_nbytes

PROMPT_CHUNK: Final = 512
"""Tokens of each call that builds the context."""


@dataclass(frozen=True)
class Race:
    """Decode steps of both caches taken in turn, so that what slows the machine slows both.

    Attributes:
        batch: sequences.
        seq_len: tokens of context after which the steps were taken.
        default_seconds: median of a step with the default cache.
        int8_seconds: with the int8 cache.
        default_nbytes: bytes of the default cache at the end.
        int8_nbytes: of the int8 cache.
        backend: what read the int8 cache.
    """

    batch: int
    seq_len: int
    default_seconds: float
    int8_seconds: float
    default_nbytes: int
    int8_nbytes: int
    backend: str


@torch.no_grad()
def race(model: PreTrainedModel, ids: Tensor, steps: int) -> Race:
    """Which cache decodes faster after a text.

    Args:
        model: a causal language model.
        ids: int64 (batch, seq_len), the context.
        steps: of each cache, at least 1.
    """
    ids = ids.to(model.device)
    caches: dict[str, Cache] = {"default": DynamicCache(config=model.config), "int8": QuantizedInt8Cache(model.config)}
    for chunk in ids.split(PROMPT_CHUNK, dim=1):
        for cache in caches.values():
            feed(model, chunk, cache, logits_to_keep=1)
    seconds = step_in_turn(model, caches, ids[:, -1:].expand(-1, steps))
    int8 = caches["int8"]
    assert isinstance(int8, QuantizedInt8Cache)
    return Race(
        batch=len(ids),
        seq_len=ids.shape[1],
        default_seconds=seconds["default"],
        int8_seconds=seconds["int8"],
        default_nbytes=sum(map(layer_nbytes, caches["default"].layers)),
        int8_nbytes=int8.nbytes,
        backend=int8.report().backend,
    )


@torch.no_grad()
def step_in_turn(
    model: PreTrainedModel,
    caches: Mapping[str, Cache],
    ids: Tensor,
    on_step: Callable[[Mapping[str, Tensor]], object] = lambda logits: None,
) -> dict[str, float]:
    """Decode the same tokens with each cache, a token with one and then with the next; median seconds of a step.

    Args:
        model: a causal language model.
        caches: by name, each with a context.
        ids: int64 (batch, steps), at least one step.
        on_step: told the logits (batch, 1, vocab_size) of each cache once all have taken a step.
    """
    seconds: dict[str, list[float]] = {name: [] for name in caches}
    for token in ids.to(model.device).split(1, dim=1):
        logits = {}
        for name, cache in caches.items():
            synchronize(model.device)
            start = time.perf_counter()
            logits[name] = feed(model, token, cache).logits
            synchronize(model.device)
            seconds[name].append(time.perf_counter() - start)
        on_step(logits)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def synchronize(device: torch.device) -> None:
    """Wait for the work queued on ``device``."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
