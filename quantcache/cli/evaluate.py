"""``quantcache eval``: how close the answers stay, for several caches side by side."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from quantcache._host import cache_argument
from quantcache.cli.bench import machine
from quantcache.cli.terminal import open_model
from quantcache.evaluation import baselines
from quantcache.evaluation.comparison import Candidate, Comparison, compare_caches, first_difference
from quantcache.evaluation.needle import EXACT, Found, find_needles
from quantcache.evaluation.texts import read_dataset, read_text, token_rows

GREEDY_PROMPT: Final = 128
"""Tokens of each row behind which the greedy answers begin."""


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


def run(spec: str | None, settings: Settings, device: torch.device, as_json: bool, plot: Path | None) -> None:
    """Measure and print.

    Args:
        spec: see ``load_model``.
        settings: what to measure.
        device: where to run.
        as_json: print JSON in place of tables.
        plot: where to draw the figures.

    Raises:
        ModelError: the model cannot be had.
        ValueError: settings or texts that leave nothing to measure.
        ImportError: matplotlib or datasets is missing.
    """
    if plot is not None:
        import matplotlib.figure  # noqa: F401 - before minutes are spent
    console = Console(stderr=as_json)
    model, tokenizer, label = open_model(spec, device, console, torch.float32)
    console.print(f"[bold]{label}[/bold] in float32 on {device}; the reference is the exact cache", highlight=False)
    results = measure(model, tokenizer, settings, console)
    if plot is not None:
        draw(results, label, plot)
    if as_json:
        print(json.dumps(to_json(results, settings, machine(model, label)), indent=1))
        return
    for table in tables(results, settings):
        console.print(table)
    for name, reason in results.left_out.items():
        console.print(f"left out: {name}: {reason}", style="dim", soft_wrap=True, markup=False, highlight=False)
    console.print(f"{results.seconds:.0f} s", style="dim")


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
        comparisons = compare_caches(
            model,
            ids,
            compared,
            reference_factory=lambda: DynamicCache(config=model.config),
            prompt_len=settings.prompt_len,
            chunk_len=settings.chunk_len,
            on_progress=lambda done: progress.advance(task, done),
        )
        if settings.greedy_tokens:
            answers = progress.add_task("greedy answers", total=len(ids) * (len(compared) + 1))
            prompts = ids[:, : min(GREEDY_PROMPT, settings.prompt_len)]
            greedy = _greedy(model, prompts, compared, settings.greedy_tokens, lambda: progress.advance(answers))
        if settings.needle_tokens:
            hidden = progress.add_task("needles", total=5)
            needles = find_needles(
                model,
                tokenizer,
                compared,
                read_text("prose"),
                tokens=settings.needle_tokens,
                on_progress=lambda: progress.advance(hidden),
            )
    return Results(comparisons, greedy, needles, left_out, time.perf_counter() - start)


def _greedy(
    model: PreTrainedModel,
    prompts: Tensor,
    compared: dict[str, Candidate],
    length: int,
    on_progress: Callable[[], Any],
) -> dict[str, list[int | None]]:
    """Where greedy answers leave that of the exact cache, for each row."""
    differences: dict[str, list[int | None]] = {name: [] for name in compared}
    exact = Candidate(lambda: DynamicCache(config=model.config))
    for row in prompts.to(model.device).split(1):
        answers = {}
        for name, candidate in {EXACT: exact, **compared}.items():
            generate: Callable[..., Tensor] = (candidate.model or model).generate  # type: ignore[assignment]
            output = generate(
                row,
                attention_mask=torch.ones_like(row),
                **cache_argument(candidate.make_cache()),
                max_new_tokens=length,
                min_new_tokens=length,
                do_sample=False,
                pad_token_id=0,
            )
            answers[name] = output[0, row.shape[1] :].tolist()
            on_progress()
        for name in compared:
            differences[name].append(first_difference(answers[EXACT], answers[name]))
    return differences


def to_json(results: Results, settings: Settings, about: dict[str, Any]) -> dict[str, Any]:
    """Everything measured; NaN, of layers that hold no keys, becomes null."""

    def finite(values: tuple[float, ...]) -> list[float | None]:
        return [None if math.isnan(value) else value for value in values]

    caches = {}
    for name, result in results.comparisons.items():
        caches[name] = {
            **asdict(result),
            "key_errors": finite(result.key_errors),
            "value_errors": finite(result.value_errors),
            "greedy_first_difference": results.greedy.get(name),
            "needles": [asdict(found) for found in results.needles.get(name, [])],
        }
    exact = {"needles": [asdict(found) for found in results.needles.get(EXACT, [])]}
    return {
        **about,
        "settings": asdict(settings),
        "caches": caches,
        EXACT: exact,
        "left_out": results.left_out,
        "seconds": round(results.seconds, 1),
    }


def tables(results: Results, settings: Settings) -> list[Table]:
    """The comparison, and the needles."""
    some = next(iter(results.comparisons.values()))
    table = Table(
        *("", "mean KL", "p99 KL", "same top-1", "perplexity", "worst layer, K", "V"),
        title=f"{some.tokens:,} predictions through the cache; perplexity with the exact cache "
        f"{some.exact_perplexity:.4f}",
    )
    if results.greedy:
        table.add_column("greedy differs at")
    for name, result in results.comparisons.items():
        cells = [
            name,
            f"{result.mean_kl:.1e}",
            f"{result.p99_kl:.1e}",
            f"{result.top1_agreement:.2%}",
            f"{result.perplexity - result.exact_perplexity:+.4f}",
            *(f"{max((e for e in errors if not math.isnan(e)), default=math.nan):.2%}" for errors in _errors(result)),
        ]
        if results.greedy:
            places = results.greedy[name]
            cells.append(", ".join("never" if place is None else str(place) for place in places))
        table.add_row(*cells)
    table.caption = "KL in nats a token; layer errors relative to the RMS of exact keys and values"
    if not results.needles:
        return [table]
    rows = next(iter(results.needles.values()))
    hidden = Table(
        "",
        *(f"depth {found.depth:.0%}" for found in rows),
        title=f"a number hidden in {settings.needle_tokens:,} tokens: loss of the right answer in nats, * where it was "
        "the most likely one",
    )
    for name, answers in results.needles.items():
        hidden.add_row(name, *(f"{found.loss:.4f}{' *' if found.found else ''}" for found in answers))
    return [table, hidden]


def draw(results: Results, label: str, file: Path) -> None:
    """Divergences of all caches, and errors over the layers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(results.comparisons)
    places = range(len(names))
    means = [results.comparisons[name].mean_kl for name in names]
    tails = [results.comparisons[name].p99_kl for name in names]
    left.barh([place + 0.2 for place in places], means, height=0.4, label="mean")
    left.barh([place - 0.2 for place in places], tails, height=0.4, label="99th percentile")
    left.set(yticks=list(places), yticklabels=names, xlabel="KL to the exact cache, nats a token", title=label)
    if max(means) > 0:
        left.set_xscale("log")
    left.invert_yaxis()
    left.legend()
    for name in names:
        keys, values = _errors(results.comparisons[name])
        (line,) = right.plot(range(len(keys)), keys, label=f"{name}, K")
        right.plot(range(len(values)), values, color=line.get_color(), linestyle=":", label=f"{name}, V")
    right.set(xlabel="layer", ylabel="relative RMS error", yscale="log", title="what the layers hold")
    right.legend(fontsize="x-small")
    figure.savefig(file, dpi=150)


def _errors(result: Comparison) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return result.key_errors, result.value_errors
