"""How close the answers stay, for several caches side by side: comparison, greedy answers and needles of one model."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quantcache.evaluation import baselines
from quantcache.evaluation.comparison import EXACT, Candidate, Comparison, compare_caches, exact_cache, first_difference
from quantcache.evaluation.needle import Found, find_needles
from quantcache.evaluation.texts import read_dataset, read_text, token_rows
from quantcache.layers._host import cache_argument

GREEDY_PROMPT: Final = 128
"""Tokens of each row after which the greedy answers begin."""


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        texts: see ``read_text``.
        dataset: see ``read_dataset``; in place of texts.
        rows: sequences of text.
        tokens: of each.
        prompt_len: tokens of the first call.
        chunk_len: tokens of later calls.
        greedy_tokens: length of greedy answers, 0 for none.
        needle_tokens: length of the text with a needle, 0 for none.
        caches: short names of ``baselines.NAMES``, None for all.
    """

    texts: list[str]
    dataset: str | None = None
    rows: int = 2
    tokens: int = 1024
    prompt_len: int = 512
    chunk_len: int = 16
    greedy_tokens: int = 64
    needle_tokens: int = 1024
    caches: list[str] | None = None


@dataclass(frozen=True)
class Results:
    """What was measured, by the names of the caches.

    Attributes:
        comparisons: the teacher-forced comparison.
        greedy: for each row the first token that differs from the exact cache's answer, None for none.
        needles: answers at each depth, the exact cache's among them.
        left_out: caches that cannot be compared here, with the reason.
        seconds: of everything but loading the model.
    """

    comparisons: dict[str, Comparison]
    greedy: dict[str, list[int | None]]
    needles: dict[str, list[Found]]
    left_out: dict[str, str]
    seconds: float


def check_settings(settings: Settings) -> None:
    """Refuse texts and caches that there are not, before a model is loaded for them.

    Raises:
        ValueError, OSError: see ``read_text`` and ``baselines.candidates``.
    """
    baselines.check_names(settings.caches)
    for name in () if settings.dataset else settings.texts:
        read_text(name)


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, console: Console
) -> Results:
    """All figures of one model.

    Args:
        model: in eval mode.
        tokenizer: its tokeniser.
        settings: what to measure.
        console: where progress goes.

    Raises:
        ValueError: settings or texts that leave nothing to measure.
    """
    start = time.perf_counter()
    length = 40 * settings.tokens * settings.rows
    texts = [read_dataset(settings.dataset, length)] if settings.dataset else list(map(read_text, settings.texts))
    ids = token_rows(tokenizer, texts, settings.rows, settings.tokens)
    compared, left_out = baselines.candidates(model, settings.caches)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    greedy: dict[str, list[int | None]] = {}
    needles: dict[str, list[Found]] = {}
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("reading text through every cache, tokens", total=ids.numel())
        lengths: dict[str, Any] = {"prompt_len": settings.prompt_len, "chunk_len": settings.chunk_len}
        comparisons = compare_caches(model, ids, compared, **lengths, on_progress=partial(progress.advance, task))
        if settings.greedy_tokens:
            answers = progress.add_task("greedy answers", total=len(ids) * (len(compared) + 1))
            prompts = ids[:, : min(GREEDY_PROMPT, settings.prompt_len)]
            greedy = _greedy(model, prompts, compared, settings.greedy_tokens, partial(progress.advance, answers))
        if settings.needle_tokens:
            asked = partial(progress.advance, progress.add_task("needles", total=5))
            tokens, prose = settings.needle_tokens, read_text("prose")
            needles = find_needles(model, tokenizer, compared, prose, tokens=tokens, on_progress=asked)
    return Results(comparisons, greedy, needles, left_out, time.perf_counter() - start)


def _greedy(
    model: PreTrainedModel, prompts: Tensor, compared: dict[str, Candidate], length: int, on_progress: Callable[[], Any]
) -> dict[str, list[int | None]]:
    """Where greedy answers leave that of the exact cache, for each row."""
    differences: dict[str, list[int | None]] = {name: [] for name in compared}
    options = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False, "pad_token_id": 0}
    for row in prompts.to(model.device).split(1):
        answers = {}
        for name, candidate in {EXACT: exact_cache(model), **compared}.items():
            generate: Callable[..., Tensor] = (candidate.model or model).generate  # type: ignore[assignment]
            given = cache_argument(candidate.make_cache())
            output = generate(row, attention_mask=torch.ones_like(row), **given, **options)
            answers[name] = output[0, row.shape[1] :].tolist()
            on_progress()
        for name in compared:
            differences[name].append(first_difference(answers[EXACT], answers[name]))
    return differences


def to_json(results: Results, settings: Settings, about: dict[str, Any]) -> dict[str, Any]:
    """Everything measured; NaN, of layers that hold no keys, becomes null."""
    needles = {
        name: [asdict(found) for found in results.needles.get(name, [])] for name in (EXACT, *results.comparisons)
    }
    caches = {}
    for name, result in results.comparisons.items():
        figures = asdict(result)
        for errors in ("key_errors", "value_errors"):
            figures[errors] = [None if math.isnan(value) else value for value in figures[errors]]
        caches[name] = {**figures, "greedy_first_difference": results.greedy.get(name), "needles": needles[name]}
    told = {"settings": asdict(settings), "caches": caches, EXACT: {"needles": needles[EXACT]}}
    return {**about, **told, "left_out": results.left_out, "seconds": round(results.seconds, 1)}
