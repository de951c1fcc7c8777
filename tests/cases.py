"""A model under test, and the three measures by which an operation on its cache is judged.

``same_reading``: attention over int8 gives what a ``DynamicCache`` with the restored states gives, to float error.
``faithful``: logits are those of the exact model, to the quality that the format promises. ``as_exact``: they are those
of the same calls with a ``DynamicCache``, to that quality, which leaves out what transformers does differently between
a cached and a whole forward pass.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch
import transformers
from packaging.version import parse
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin

from quantcache import QuantizedInt8Cache
from quantcache.layers._host import cache_argument
from quantcache.layers.base import BaseInt8Layer
from quantcache.layers.growing import Int8Layer
from tests.architectures import SIZES, Architecture

NEWEST = parse(transformers.__version__) >= parse("5.23")

MAX_MEAN_KL = 1.0e-4
"""Nats a token, the quality that the format promises on a real model; tiny random ones stay below."""

PROMPT = 150


def tokens(length: int, batch: int = 1, seed: int = 2) -> Tensor:
    """Random token ids, none of them special."""
    return torch.randint(2, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


@dataclass
class Case:
    """One model with one attention implementation on one device."""

    architecture: Architecture
    implementation: str
    device: str = "cpu"

    @cached_property
    def model(self) -> Any:
        return self.architecture.make(self.implementation).to(self.device)

    @property
    def config(self) -> Any:
        return self.model.config

    def cache(self, **options: Any) -> Any:
        """An int8 cache as a user makes it for this model."""
        if self.architecture.is_encoder_decoder:
            return QuantizedInt8Cache.for_encoder_decoder(self.config, **options)
        return QuantizedInt8Cache(self.config, **options)

    def exact_cache(self) -> Any:
        if self.architecture.is_encoder_decoder:
            return EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        return DynamicCache(config=self.config)

    def source(self, batch: int) -> dict[str, Tensor]:
        """What the encoder gets, the same for every row, so that rows can be moved about."""
        generator = torch.Generator().manual_seed(7)
        if self.architecture.model_class == "T5ForConditionalGeneration":
            return {"input_ids": tokens(130, seed=7).expand(batch, -1).to(self.device)}
        if self.architecture.model_class == "WhisperForConditionalGeneration":
            features = torch.randn(1, self.config.num_mel_bins, 300, generator=generator)
            return {"input_features": features.expand(batch, -1, -1).to(self.device)}
        return {}

    def named(self, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Arguments of the model for decoder tokens."""
        prefix = "decoder_" if self.architecture.is_encoder_decoder else ""
        named = {f"{prefix}input_ids": ids.to(self.device)}
        if mask is not None:
            named[f"{prefix}attention_mask"] = mask.to(self.device)
        return named | self.source(ids.shape[0])

    def logits(self, ids: Tensor, cache: Any = None) -> Tensor:
        """Logits of a forward pass over ``ids`` behind what ``cache`` holds."""
        options: dict[str, Any] = {"use_cache": False}
        if cache is not None:
            options = {**cache_argument(cache), "use_cache": True}
        if "VL" in self.architecture.name:  # which otherwise goes on from the positions of its last call
            past = 0 if cache is None else cache.get_seq_length()
            positions = torch.arange(past, past + ids.shape[1], device=self.device)
            options["position_ids"] = positions.expand(3, ids.shape[0], -1)
        with torch.no_grad():
            return self.model(**self.named(ids), **options).logits

    def generate(self, ids: Tensor, cache: Any, mask: Tensor | None = None, **options: Any) -> Any:
        """``generate`` with what every call here wants; Whisper's own is for audio longer than its window."""
        if self.architecture.is_encoder_decoder:
            ids = ids.clone()
            ids[:, 0] = self.config.decoder_start_token_id  # else it is put in front
        options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True} | options
        return GenerationMixin.generate(self.model, **self.named(ids, mask), **cache_argument(cache), **options)


class WithExactCache(Case):
    """The same with transformers' own cache: what it refuses has nothing to do with int8."""

    def cache(self, **options: Any) -> Any:
        return self.exact_cache()


def parts(cache: Any) -> list[QuantizedInt8Cache]:
    """The int8 caches in ``cache``."""
    both = (
        [cache.self_attention_cache, cache.cross_attention_cache] if isinstance(cache, EncoderDecoderCache) else [cache]
    )
    return [part for part in both if isinstance(part, QuantizedInt8Cache)]


def int8_layers(cache: Any) -> list[Int8Layer]:
    return [layer for part in parts(cache) for layer in part.layers if isinstance(layer, BaseInt8Layer)]


def restored(cache: Any) -> Any:
    """A ``DynamicCache``, or a pair of them, with what ``cache`` holds."""
    if isinstance(cache, EncoderDecoderCache):
        return EncoderDecoderCache(cache.self_attention_cache.to_dynamic(), cache.cross_attention_cache.to_dynamic())
    return cache.to_dynamic()


def is_native(case: Case) -> bool:
    """Whether no layer of the model is int8."""
    return not any("int8" in storage for storage in case.architecture.storage)


def same_reading(case: Case, cache: Any, ids: Tensor) -> None:
    """The next tokens ``ids`` see in ``cache`` exactly what it restores to."""
    theirs = case.logits(ids, restored(cache))
    ours = case.logits(ids, cache)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=reading_error(case))


def reading_error(case: Case) -> float:
    """How far logits may be from those of another order of summing.

    They are of the order of 10, sums of up to a few hundred float32 terms through a few layers. The CUDA kernels
    multiply probabilities and values as 16-bit floats, 2**-11 of them off, where torch multiplies float32.
    """
    return 2e-3 if case.device == "cpu" else 1e-2


def close_in_quality(exact: Tensor, scores: Tensor) -> None:
    """The mean divergence of ``scores`` from the ``exact`` logits is what the format promises."""
    log_exact, log_int8 = exact.double().log_softmax(-1), scores.double().log_softmax(-1)
    kl = (log_exact.exp() * (log_exact - log_int8)).sum(-1)
    assert kl.mean() <= MAX_MEAN_KL


def faithful(case: Case, output: Any, cache: Any) -> None:
    """The logits of every generated token are those of the exact model on the same tokens, to the format's quality."""
    sequences, scores = output.sequences, torch.stack(list(output.logits), dim=1)
    exact = case.logits(sequences)[:, -scores.shape[1] - 1 : -1]
    close_in_quality(exact, scores)
    if not is_native(case):
        assert any(layer.pages is not None and layer.pages.num_pages for layer in int8_layers(cache))


def as_exact(case: Case, run: Callable[[Any], Any], cache: Any = None) -> Any:
    """``run``, which generates greedily with a cache, gives with an int8 one what it gives with an exact one."""
    cache = cache or case.cache()
    ours, theirs = run(cache), run(case.exact_cache())
    prompt = ours.sequences.shape[1] - len(ours.logits)
    same = (ours.sequences == theirs.sequences).all(0)[prompt:]
    # After a step at which two tokens were as good as equal the texts are two texts.
    steps = len(same) if bool(same.all()) else int((~same).nonzero()[0]) + 1
    exact, int8 = (torch.stack(list(output.logits), dim=1)[:, :steps] for output in (theirs, ours))
    close_in_quality(exact, int8)
    if int8_layers(cache):
        assert any(layer.pages is not None and layer.pages.num_pages for layer in int8_layers(cache))
        assert steps > 1
    return cache


host_warnings = pytest.mark.filterwarnings(
    "ignore:flex_attention called without torch.compile", "ignore:_compile flag on create_block_mask:DeprecationWarning"
)
"""What transformers and torch say of each other."""


@contextmanager
def quiet_flex() -> Iterator[None]:
    """flex_attention uncompiled: compiling takes half a minute a model on a CPU, and is not what is asked here."""
    with torch.compiler.set_stance("force_eager"):
        yield
