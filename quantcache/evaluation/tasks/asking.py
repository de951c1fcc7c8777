"""Questions read behind the shots of their topic, through every cache: multiple choice and short texts."""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from quantcache.evaluation.comparison import Candidate, kl_divergence
from quantcache.evaluation.tasks.data import LETTERS, Question, Topic
from quantcache.layers._host import cache_argument, feed

GSM8K_TOKENS: Final = 256
"""Of a worked answer, at most."""

_NUMBER: Final = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Answer:
    """What a model said with one cache.

    Attributes:
        text: the letter, the number or the program.
        right: whether it is the right one.
        kl: divergence of what it thinks of the next token from the exact cache's, in nats; None where it writes.
    """

    text: str
    right: bool
    kl: float | None = None


Answers = dict[str, Answer]
"""By the names of the caches."""

Models = Mapping[str, tuple[PreTrainedModel, Candidate]]
"""By the names of the caches: the model that reads one, and what makes it."""


@torch.no_grad()
def choose(
    tokenizer: PreTrainedTokenizerBase,
    topic: Topic,
    models: Models,
    reference: str,
    questions: Sequence[Question],
    batch: int,
) -> Iterator[dict[str, Answers]]:
    """Which letter each cache finds the likeliest.

    The shots are read once. Each question is read behind a copy of them in a call of its own, and then the cue: so the
    letter is told by a model that has read shots and question from the cache.

    Args:
        tokenizer: the models'.
        topic: the shots.
        models: with which caches.
        reference: the name of the exact one.
        questions: of the topic, those to ask.
        batch: questions that are read at a time, behind as many copies of the shots.

    Yields:
        By the question's name the answers, ``batch`` questions at a time.
    """
    cue = tokenizer(topic.cue, add_special_tokens=False).input_ids
    letters = [tokenizer(shown, add_special_tokens=False).input_ids[-1] for shown in _shown_letters(topic)]
    read = {name: _read(tokenizer, topic, *candidate) for name, candidate in models.items()}
    for start in range(0, len(questions), batch):
        group = questions[start : start + batch]
        ids, mask = _left_padded(tokenizer, [question.text for question in group])
        beliefs = {}
        for name, (model, _) in models.items():
            cache, length = read[name]
            beliefs[name] = _after(model, _copies(cache, len(group)), length, ids, mask, cue)
        exact = beliefs[reference]
        found: dict[str, Answers] = {question.name: {} for question in group}
        for name, belief in beliefs.items():
            divergences = kl_divergence(exact, belief).tolist()
            for row, question in enumerate(group):
                letter = LETTERS[int(belief[row, letters].argmax())]
                found[question.name][name] = Answer(letter, letter == question.answer, divergences[row])
        yield found


@torch.no_grad()
def work_out(
    tokenizer: PreTrainedTokenizerBase,
    topic: Topic,
    models: Models,
    questions: Sequence[Question],
    batch: int,
    new_tokens: int = GSM8K_TOKENS,
) -> Iterator[dict[str, Answers]]:
    """Which number each cache's greedy answer comes to: behind ``####``, as the shots have it, or else the last one.

    Args:
        tokenizer: the models'.
        topic: the shots, read once.
        models: with which caches.
        questions: those to ask.
        batch: see ``choose``.
        new_tokens: of an answer, at most; it ends where the next question would begin.

    Yields:
        See ``choose``.
    """
    read = {name: _read(tokenizer, topic, *candidate) for name, candidate in models.items()}
    shots = torch.tensor([tokenizer(topic.preamble).input_ids])
    for start in range(0, len(questions), batch):
        group = questions[start : start + batch]
        ids, mask = _left_padded(tokenizer, [question.text + topic.cue for question in group])
        ids = torch.cat([shots.expand(len(group), -1), ids], dim=1)
        mask = torch.cat([torch.ones_like(shots).expand(len(group), -1), mask], dim=1)
        found: dict[str, Answers] = {question.name: {} for question in group}
        for name, (model, _) in models.items():
            output = model.generate(  # type: ignore[operator]
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                **cache_argument(_copies(read[name][0], len(group))),
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=padding(tokenizer),
                stop_strings=["Question:"],
                tokenizer=tokenizer,
            )
            for question, text in zip(group, tokenizer.batch_decode(output[:, ids.shape[1] :]), strict=True):
                number = number_of(text)
                found[question.name][name] = Answer(number, number == question.answer)
        yield found


def number_of(text: str) -> str:
    """The number that an answer comes to, without separators; empty if it has none."""
    said = text.partition("Question:")[0]
    last = _NUMBER.findall(said.partition("####")[2].partition("\n")[0]) or _NUMBER.findall(said)
    return last[-1].replace(",", "") if last else ""


def padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """An id to pad with; no model sees it."""
    return next((name for name in (tokenizer.pad_token_id, tokenizer.eos_token_id) if name is not None), 0)


def _shown_letters(topic: Topic) -> list[str]:
    """The letters as a shot of this topic shows them: behind a space, or not."""
    before = topic.shots[0].worked.removesuffix(topic.shots[0].answer) if topic.shots else " "
    return [before + letter for letter in LETTERS]


def _read(
    tokenizer: PreTrainedTokenizerBase, topic: Topic, model: PreTrainedModel, candidate: Candidate
) -> tuple[Cache, int]:
    """A cache that holds the shots, and how many tokens they are."""
    cache = candidate.make_cache()
    ids = torch.tensor([tokenizer(topic.preamble).input_ids], dtype=torch.int64, device=model.device)
    if ids.shape[1]:
        feed(model, ids, cache, logits_to_keep=1)
    return cache, ids.shape[1]


def _copies(cache: Cache, count: int) -> Cache:
    copied = copy.deepcopy(cache)
    if copied.get_seq_length():
        copied.batch_repeat_interleave(count)
    return copied


def _left_padded(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """int64 (texts, longest) ids and mask; each text ends in the last column."""
    rows = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([[padding(tokenizer)] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def _after(model: PreTrainedModel, cache: Cache, length: int, ids: Tensor, mask: Tensor, cue: list[int]) -> Tensor:
    """float64 (rows, vocab_size) log-probabilities of what follows shots, question and cue."""
    device = model.device
    seen = torch.cat([torch.ones(len(ids), length, dtype=mask.dtype), mask], dim=1).to(device)
    positions = length + mask.cumsum(-1).sub(1).clamp_min(0).to(device)
    feed(model, ids.to(device), cache, attention_mask=seen, position_ids=positions, logits_to_keep=1)
    asked = torch.tensor([cue], device=device).expand(len(ids), -1)
    seen = torch.cat([seen, torch.ones_like(asked, dtype=seen.dtype)], dim=1)
    positions = positions[:, -1:] + torch.arange(1, len(cue) + 1, device=device)
    logits = feed(model, asked, cache, attention_mask=seen, position_ids=positions, logits_to_keep=1).logits[:, -1]
    log_probs: Tensor = logits.double().log_softmax(-1)
    return log_probs
