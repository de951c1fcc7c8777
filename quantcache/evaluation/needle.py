"""Needle at depth: a sentence hidden in a long text, asked for at its end, with everything read through the cache."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from quantcache.evaluation.comparison import EXACT, Candidate, exact_cache
from quantcache.layers._host import feed

NEEDLE: Final = " The secret number of the lighthouse is {answer}. "
QUESTION: Final = (
    "\n\nQuestion: What is the secret number of the lighthouse?\nAnswer: The secret number of the lighthouse is"
)
ANSWERS: Final = (" 7315", " 4862", " 9047", " 2683", " 5190")
DEPTHS: Final = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Found:
    """One needle and one cache.

    Attributes:
        depth: where it lay, 0 at the beginning of the text and 1 at its end.
        found: whether every token of the answer was the most likely one.
        loss: mean negative log-likelihood of the answer's tokens, in nats.
    """

    depth: float
    found: bool
    loss: float


@torch.no_grad()
def find_needles(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    candidates: Mapping[str, Candidate],
    text: str,
    *,
    tokens: int = 1024,
    depths: Sequence[float] = DEPTHS,
    on_progress: Callable[[], Any] = lambda: None,
) -> dict[str, list[Found]]:
    """Hide a number at each depth of a text and ask every cache for it.

    The text is the first call, the question the second, the answer the third: the needle is read from the cache alone.

    Args:
        model: a causal language model in eval mode; it answers with the exact cache under the name ``EXACT``.
        tokenizer: its tokeniser.
        candidates: caches under test, by name.
        text: of at least ``tokens`` tokens.
        tokens: of text and needle.
        depths: from 0 to 1.
        on_progress: called after each depth.

    Raises:
        ValueError: the text is too short.
    """
    hay = _ids(tokenizer, text[: 40 * tokens])
    question = _ids(tokenizer, QUESTION)
    caches = {EXACT: exact_cache(model), **candidates}
    found: dict[str, list[Found]] = {name: [] for name in caches}
    for place, depth in enumerate(depths):
        answer = ANSWERS[place % len(ANSWERS)]
        needle = _ids(tokenizer, NEEDLE.format(answer=answer.strip()))
        room = tokens - len(needle)
        if room < 1 or len(hay) < room:
            raise ValueError(f"find_needles: the text must have {room} tokens besides the needle, got {len(hay)}.")
        at = round(depth * room)
        context = torch.cat([hay[:at], needle, hay[at:room]])
        expected = _ids(tokenizer, answer)
        for name, candidate in caches.items():
            asked = candidate.model or model
            log_probs = _answer(asked, candidate.make_cache(), context, question, expected)
            chosen = log_probs.gather(-1, expected.to(log_probs.device)[:, None])[:, 0]
            best = log_probs.argmax(-1).cpu()
            found[name].append(Found(depth, torch.equal(best, expected), float(-chosen.mean())))
        on_progress()
    return found


def _answer(model: PreTrainedModel, cache: Cache, *parts: Tensor) -> Tensor:
    """(answer_len, vocab_size) log-probabilities of the answer's tokens, the last of ``parts``."""
    context, question, answer = (part[None].to(model.device) for part in parts)
    feed(model, context, cache, logits_to_keep=1)
    first = feed(model, question, cache, logits_to_keep=1).logits
    rest = feed(model, answer, cache).logits[:, :-1]
    log_probs: Tensor = torch.cat([first, rest], dim=1)[0].double().log_softmax(-1)
    return log_probs


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    ids: Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]
    return ids
