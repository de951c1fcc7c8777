"""How close answers stay to those of the exact cache: a teacher-forced comparison that truly reads the cache."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache


@dataclass(frozen=True)
class Comparison:
    """What a cache does to the predictions of a model, over the tokens after the prompt.

    Attributes:
        tokens: predictions compared.
        mean_kl: mean of KL(exact || cache) over the predictions, in nats a token.
        p99_kl: its 99th percentile.
        top1_agreement: share of predictions whose most likely token is the same, 0 to 1.
        exact_perplexity: exp of the mean negative log-likelihood of the text with the exact cache.
        perplexity: the same with the cache under test.
    """

    tokens: int
    mean_kl: float
    p99_kl: float
    top1_agreement: float
    exact_perplexity: float
    perplexity: float


@torch.no_grad()
def compare_teacher_forced(
    model: PreTrainedModel,
    input_ids: Tensor,
    cache_factory: Callable[[], Cache],
    *,
    reference_factory: Callable[[], Cache] = DynamicCache,
    prompt_len: int = 512,
    chunk_len: int = 1,
    on_progress: Callable[[int], Any] = lambda tokens: None,
) -> Comparison:
    """Feed the same text through two caches and compare every prediction after the prompt.

    Both get the prompt in one call and then the rest in calls of ``chunk_len`` tokens, so every compared prediction has
    read the prompt and all earlier chunks from the cache. Rows of a batch are fed one after the other.

    Args:
        model: a causal language model in eval mode.
        input_ids: int64 (batch, seq_len), no padding.
        cache_factory: makes the empty cache under test.
        reference_factory: makes the empty cache to compare with.
        prompt_len: tokens of the first call, from 1 to ``seq_len - 1``.
        chunk_len: tokens of each later call; 1 is how generation reads, more is faster.
        on_progress: called with the number of tokens of each call once both caches have been fed.

    Raises:
        ValueError: shapes or lengths that leave nothing to compare.
    """
    if input_ids.dim() != 2 or len(input_ids) == 0:
        raise ValueError(
            "compare_teacher_forced: input_ids must be (batch, seq_len) with at least one row, "
            f"got {tuple(input_ids.shape)}."
        )
    seq_len = input_ids.shape[1]
    if not 1 <= prompt_len < seq_len:
        raise ValueError(f"compare_teacher_forced: prompt_len must be from 1 to {seq_len - 1}, got {prompt_len}.")
    if chunk_len < 1:
        raise ValueError(f"compare_teacher_forced: chunk_len must be at least 1, got {chunk_len}.")

    divergences: list[Tensor] = []
    agreements: list[Tensor] = []
    losses: dict[str, list[Tensor]] = {"exact": [], "tested": []}
    for row in input_ids.to(model.device).split(1):
        caches = {"exact": reference_factory(), "tested": cache_factory()}
        start, stop = 0, prompt_len
        while start < seq_len:
            chunk = row[:, start:stop]
            logits = {
                name: model(chunk, past_key_values=cache, use_cache=True).logits[0] for name, cache in caches.items()
            }
            if start > 0:
                log_probs = {name: values.double().log_softmax(-1) for name, values in logits.items()}
                exact, tested = log_probs["exact"], log_probs["tested"]
                divergences.append((exact.exp() * (exact - tested)).sum(-1))
                agreements.append(exact.argmax(-1) == tested.argmax(-1))
                targets = row[0, start + 1 : stop + 1]
                for name, values in log_probs.items():
                    losses[name].append(-values[: len(targets)].gather(-1, targets[:, None])[:, 0])
            on_progress(chunk.shape[1])
            start, stop = stop, min(stop + chunk_len, seq_len)

    kl = torch.cat(divergences)
    return Comparison(
        tokens=len(kl),
        mean_kl=float(kl.mean()),
        p99_kl=float(kl.quantile(0.99)),
        top1_agreement=float(torch.cat(agreements).double().mean()),
        exact_perplexity=_perplexity(losses["exact"]),
        perplexity=_perplexity(losses["tested"]),
    )


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """Index of the first place where two sequences differ, or a shorter one ends; None if they are equal."""
    for index, (one, other) in enumerate(zip_longest(left, right)):
        if one != other:
            return index
    return None


def _perplexity(losses: list[Tensor]) -> float:
    tokens = torch.cat(losses)
    return math.exp(float(tokens.mean())) if len(tokens) else math.nan
