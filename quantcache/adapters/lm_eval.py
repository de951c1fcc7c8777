"""lm-evaluation-harness through the int8 cache: ``quantcache lm-eval --model quantcache ...``.

The harness scores an answer in one forward pass over question and answer, in which nothing is read from a cache; its
scores would be the same with any. Here the question fills the cache, and the answer is fed after it, so that every
scored token has read the question from the cache.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm
from transformers.cache_utils import Cache, DynamicCache

from quantcache import QuantizedInt8Cache
from quantcache.layers._host import cache_argument, feed
from quantcache.quantization.scheme import DEFAULT_RESIDUAL_LENGTH

CACHES: Final = ("int8", "exact")

Request = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("quantcache")
class QuantcacheLM(HFLM):  # type: ignore[misc]
    """A causal model of transformers whose scores are read through a cache.

    Args:
        pretrained: as for the harness's ``hf`` model, as are all arguments that are not named here.
        cache: "int8", or "exact" for transformers' default cache, read the same way: the number to compare with.
        residual_length: see ``QuantizedInt8Cache``.
        chunk_len: tokens of an answer that are fed in one call, at least 1. A token sees those of its own call exactly.
        kwargs: passed on.

    Raises:
        ValueError: another cache, a chunk of no tokens.
    """

    def __init__(
        self,
        pretrained: Any,
        cache: str = "int8",
        residual_length: int = DEFAULT_RESIDUAL_LENGTH,
        chunk_len: int = 16,
        **kwargs: Any,
    ) -> None:
        if cache not in CACHES:
            raise ValueError(f"QuantcacheLM: cache must be one of {', '.join(CACHES)}, got {cache!r}.")
        if int(chunk_len) < 1:
            raise ValueError(f"QuantcacheLM: chunk_len must be at least 1, got {chunk_len}.")
        super().__init__(pretrained, **{**kwargs, "backend": "causal"})
        self._cache_name, self._residual_length, self._chunk_len = cache, int(residual_length), int(chunk_len)

    def make_cache(self) -> Cache:
        """An empty cache of the kind under test."""
        if self._cache_name == "exact":
            return DynamicCache(config=self.model.config)
        return QuantizedInt8Cache(self.model.config, residual_length=self._residual_length)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-probability of each answer after its question, and whether it is the greedy one.

        Answers to one question share its cache. Requests are scored one by one: nothing is padded.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for place, (_, context, answer) in enumerate(requests):
            # As the harness does, cut from the left what is too long; the last token of all is never fed.
            kept = (context + answer)[-(self.max_length + 1) :][: -len(answer)] or context[-1:]
            groups.setdefault(tuple(kept), []).append(place)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        progress = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="answers through the cache")
        for question, places in groups.items():
            filled = self.make_cache()
            if len(question) > 1:
                feed(self.model, self._row(question[:-1]), filled, logits_to_keep=1)
            for index, place in enumerate(places):
                # The last reader may use it up.
                cache = filled if index == len(places) - 1 else copy.deepcopy(filled)
                text, _, answer = requests[place]
                results[place] = self._score(cache, question[-1], answer)
                if text is not None:
                    self.cache_hook.add_partial("loglikelihood", text, results[place])
                progress.update(1)
        progress.close()
        return results

    def _score(self, cache: Cache, last: int, answer: list[int]) -> tuple[float, bool]:
        """Feed the last token of the question and all but the last of the answer; each predicts the next."""
        fed, expected = self._row([last, *answer[:-1]]), self._row(answer)[0]
        total, is_greedy = 0.0, True
        for start in range(0, fed.shape[1], self._chunk_len):
            chunk = fed[:, start : start + self._chunk_len]
            logits = feed(self.model, chunk, cache).logits[0]
            targets = expected[start : start + self._chunk_len]
            log_probs = logits.float().log_softmax(-1)
            total += float(log_probs.gather(-1, targets[:, None]).sum())
            is_greedy = is_greedy and bool((log_probs.argmax(-1) == targets).all())
        return total, is_greedy

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """As the harness's, with a cache of the kind under test."""
        generate: Callable[..., Tensor] = super()._model_generate
        return generate(context, max_length, stop, **options, **cache_argument(self.make_cache()))

    def _row(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor([list(tokens)], dtype=torch.int64, device=self.device)


def main() -> None:
    """The harness's own command line, which then knows ``--model quantcache``."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
