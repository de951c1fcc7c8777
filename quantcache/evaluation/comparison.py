"""How close answers stay to those of the exact cache: a teacher-forced comparison that truly reads the cache."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from quantcache.layers._host import feed, quantized_states
from quantcache.layers.base import BaseInt8Layer


@dataclass(frozen=True)
class Comparison:
    """What a cache does to the predictions of a model, over the tokens after the prompt.

    Attributes:
        tokens: predictions compared.
        mean_kl: mean KL divergence from the exact cache, KL(exact || cache), over the predictions, in nats per token.
        p99_kl: its 99th percentile.
        top1_agreement: share of predictions whose most likely token is the same, 0 to 1.
        exact_perplexity: exp of the mean negative log-likelihood of the text with the exact cache.
        perplexity: the same with the cache under test.
        key_errors: for each layer, the RMS of the difference between the keys it holds at the end and the exact ones,
            over the RMS of the exact ones; NaN for layers that hold no keys. Errors of earlier layers are in it.
        value_errors: the same of the values.
    """

    tokens: int
    mean_kl: float
    p99_kl: float
    top1_agreement: float
    exact_perplexity: float
    perplexity: float
    key_errors: tuple[float, ...] = field(default=(), repr=False)
    value_errors: tuple[float, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Candidate:
    """A cache under test, and the model that reads it.

    Attributes:
        make_cache: makes the empty cache.
        model: another model than the reference's, None for the same.
    """

    make_cache: Callable[[], Cache]
    model: PreTrainedModel | None = None


EXACT: Final = "exact cache"
"""Its name among others."""


def exact_cache(model: PreTrainedModel) -> Candidate:
    """Transformers' default cache, which stores what the model computed."""
    return Candidate(lambda: DynamicCache(config=model.config))


def compare_teacher_forced(
    model: PreTrainedModel, input_ids: Tensor, cache_factory: Callable[[], Cache], **options: Any
) -> Comparison:
    """``compare_caches`` with one candidate.

    Args:
        model: a causal language model in eval mode.
        input_ids: int64 (batch, seq_len), no padding.
        cache_factory: makes the empty cache under test.
        options: as ``compare_caches`` takes them.

    Raises:
        ValueError: shapes or lengths that leave nothing to compare.
    """
    return compare_caches(model, input_ids, {"tested": Candidate(cache_factory)}, **options)["tested"]


@torch.no_grad()
def compare_caches(
    model: PreTrainedModel,
    input_ids: Tensor,
    candidates: Mapping[str, Candidate],
    *,
    reference_factory: Callable[[], Cache] | None = None,
    prompt_len: int = 512,
    chunk_len: int = 1,
    on_progress: Callable[[int], Any] = lambda tokens: None,
) -> dict[str, Comparison]:
    """Feed the same text through several caches and compare every prediction after the prompt with the exact cache's.

    All get the prompt in one call and then the rest in calls of ``chunk_len`` tokens, so every compared prediction has
    read the prompt and all earlier chunks from the cache. Rows of a batch are fed one after the other.

    Args:
        model: a causal language model in eval mode, the reference.
        input_ids: int64 (batch, seq_len), no padding.
        candidates: caches under test, by name.
        reference_factory: makes the empty cache to compare with; None for transformers' default cache.
        prompt_len: tokens of the first call, from 1 to ``seq_len - 1``.
        chunk_len: tokens of each later call; 1 is how generation reads, more is faster.
        on_progress: called with the number of tokens of each call once all caches have been fed.

    Raises:
        ValueError: shapes or lengths that leave nothing to compare.
    """
    if input_ids.dim() != 2 or len(input_ids) == 0:
        wanted = "(batch, seq_len) with at least one row"
        raise ValueError(f"compare_teacher_forced: input_ids must be {wanted}, got {tuple(input_ids.shape)}.")
    seq_len = input_ids.shape[1]
    if not 1 <= prompt_len < seq_len:
        raise ValueError(f"compare_teacher_forced: prompt_len must be from 1 to {seq_len - 1}, got {prompt_len}.")
    if chunk_len < 1:
        raise ValueError(f"compare_teacher_forced: chunk_len must be at least 1, got {chunk_len}.")

    make_reference = reference_factory or exact_cache(model).make_cache
    exact_losses: list[Tensor] = []
    tallies = {name: _Tally() for name in candidates}
    for row in input_ids.to(model.device).split(1):
        reference = make_reference()
        caches = {name: candidate.make_cache() for name, candidate in candidates.items()}
        start, stop = 0, prompt_len
        while start < seq_len:
            chunk, targets = row[:, start:stop], row[0, start + 1 : stop + 1]
            exact = _log_probs(model, chunk, reference, keep=start > 0)
            for name, candidate in candidates.items():
                tested = _log_probs(candidate.model or model, chunk, caches[name], keep=start > 0)
                if start > 0:
                    tallies[name].add(exact, tested, targets)
            if start > 0:
                exact_losses.append(_losses(exact, targets))
            on_progress(chunk.shape[1])
            start, stop = stop, min(stop + chunk_len, seq_len)
        for name, cache in caches.items():
            tallies[name].layer_errors.append(_layer_errors(reference, cache))
    perplexity = _perplexity(exact_losses)
    return {name: tally.result(perplexity) for name, tally in tallies.items()}


@dataclass
class _Tally:
    """What is kept of every prediction of one candidate."""

    divergences: list[Tensor] = field(default_factory=list)
    agreements: list[Tensor] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    layer_errors: list[Tensor] = field(default_factory=list)

    def add(self, exact: Tensor, tested: Tensor, targets: Tensor) -> None:
        """Take log-probabilities (query_len, vocab_size) and the tokens that followed."""
        self.divergences.append(kl_divergence(exact, tested))
        self.agreements.append(exact.argmax(-1) == tested.argmax(-1))
        self.losses.append(_losses(tested, targets))

    def result(self, exact_perplexity: float) -> Comparison:
        """The figures over all of them; the error of a layer is the root of its mean square over the rows."""
        kl = torch.cat(self.divergences)
        keys, values = torch.stack(self.layer_errors).square().mean(0).sqrt().unbind(-1)
        return Comparison(
            tokens=len(kl),
            mean_kl=float(kl.mean()),
            p99_kl=float(kl.quantile(0.99)),
            top1_agreement=float(torch.cat(self.agreements).double().mean()),
            exact_perplexity=exact_perplexity,
            perplexity=_perplexity(self.losses),
            key_errors=tuple(keys.tolist()),
            value_errors=tuple(values.tolist()),
        )


def kl_divergence(exact: Tensor, tested: Tensor) -> Tensor:
    """KL(exact || tested) in nats, shape (...), of log-probabilities (..., vocab_size)."""
    return (exact.exp() * (exact - tested)).sum(-1)


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """Index of the first place where two sequences differ, or a shorter one ends; None if they are equal."""
    return next((index for index, (one, other) in enumerate(zip_longest(left, right)) if one != other), None)


def held_states(layer: Any) -> tuple[Tensor, Tensor] | None:
    """Dense keys and values that a layer of any cache holds, None for a layer without."""
    if isinstance(layer, BaseInt8Layer):
        return None if layer.pages is None else layer.pages.restore()
    if (restored := quantized_states(layer)) is not None:
        return restored
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    return (keys, values) if isinstance(keys, Tensor) and isinstance(values, Tensor) else None


def _layer_errors(reference: Cache, cache: Cache) -> Tensor:
    """(layers, 2): relative RMS errors of keys and values."""
    errors = []
    for layers in zip(reference.layers, cache.layers, strict=True):
        exact, tested = map(held_states, layers)
        if exact is None or tested is None:
            errors.append([math.nan, math.nan])
        else:
            errors.append(list(map(_relative_rms, exact, tested)))
    return torch.tensor(errors, dtype=torch.float64)


def _relative_rms(exact: Tensor, tested: Tensor) -> float:
    # A window of one cache may hold more old tokens than that of another.
    shared = min(exact.shape[2], tested.shape[2])
    exact, tested = (states[:, :, -shared:].double() for states in (exact, tested))
    return float((tested - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def _log_probs(model: PreTrainedModel, chunk: Tensor, cache: Cache, keep: bool) -> Tensor:
    """float64 (query_len, vocab_size), or of the last token alone where nothing is compared."""
    logits = feed(model, chunk, cache, logits_to_keep=0 if keep else 1).logits[0]
    log_probs: Tensor = logits.double().log_softmax(-1)
    return log_probs


def _losses(log_probs: Tensor, targets: Tensor) -> Tensor:
    return -log_probs[: len(targets)].gather(-1, targets[:, None])[:, 0]


def _perplexity(losses: list[Tensor]) -> float:
    tokens = torch.cat(losses)
    return math.exp(float(tokens.mean())) if len(tokens) else math.nan
