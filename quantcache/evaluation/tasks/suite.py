"""Tasks through several caches: which questions, the record that a run goes on from, and the scores."""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quantcache.evaluation import baselines
from quantcache.evaluation.comparison import EXACT, exact_cache
from quantcache.evaluation.tasks import data
from quantcache.evaluation.tasks.asking import Answer, Answers, Models, choose, work_out
from quantcache.evaluation.tasks.data import Question, Topic
from quantcache.evaluation.tasks.writing import write

CACHES: Final = ("int8", "bf16-cache", "bf16")
"""Short names of the caches that are compared unless others are asked for."""


@dataclass(frozen=True)
class Settings:
    """What is asked.

    Attributes:
        tasks: some of ``data.TASKS``.
        shots: of each topic, with their answers.
        limit: questions of a task, taken evenly from its topics; None for all.
        batch: programs that are written, or questions of a topic that are read, at a time.
        caches: short names of ``baselines.NAMES``.
    """

    tasks: tuple[str, ...]
    shots: int = 5
    limit: int | None = None
    batch: int = 10
    caches: tuple[str, ...] = CACHES

    @property
    def decisive(self) -> dict[str, Any]:
        """What an answer depends on."""
        return {"shots": self.shots, "batch": self.batch, "caches": list(self.caches)}

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in data.TASKS:
                raise ValueError(f"Settings: a task must be one of {', '.join(data.TASKS)}, got {task!r}.")


@dataclass(frozen=True)
class Score:
    """What one cache came to in one task.

    Attributes:
        asked: questions, or programs.
        right: answered rightly; programs that passed their test.
        answers_alike: those that are the exact cache's: the same letter, number or program.
        verdicts_alike: those that are right, or wrong, as the exact cache's is.
        mean_kl: see ``Answer``; None for what is written.
    """

    asked: int
    right: int
    answers_alike: int
    verdicts_alike: int
    mean_kl: float | None


class Record(AbstractContextManager["Record"]):
    """Answers as they come, a line of JSON each, which a later run goes on from, with more questions if it likes.

    Args:
        file: made if it is not there; None keeps the answers in memory alone.
        about: what an answer depends on; a file of other answers is refused.

    Raises:
        ValueError: the file is of another run, or is no record; it is then as it was.
    """

    def __init__(self, file: Path | None, about: dict[str, Any]) -> None:
        self.answers: dict[str, dict[str, Answers]] = {}
        self._lines: TextIO | None = None
        if file is None:
            return
        rows = _rows_of(file) if file.exists() else []
        if rows and rows[0] != about:
            raise ValueError(
                f"Record: {file} must be of the same model and settings, {about}, got {rows[0]}. Name another file."
            )
        for row in rows[1:]:
            answers = {name: Answer(**answer) for name, answer in row["answers"].items()}
            self.answers.setdefault(row["task"], {})[row["name"]] = answers
        whole = file.with_name(file.name + ".new")
        whole.write_text("".join(json.dumps(row) + "\n" for row in rows or [about]), encoding="utf-8")
        whole.replace(file)
        self._lines = file.open("a", encoding="utf-8")

    def add(self, task: str, found: Mapping[str, Answers]) -> None:
        """Keep answers, by the questions' names."""
        self.answers.setdefault(task, {}).update(found)
        if self._lines is not None:
            for name, answers in found.items():
                told = {cache: asdict(answer) for cache, answer in answers.items()}
                self._lines.write(json.dumps({"task": task, "name": name, "answers": told}) + "\n")
            self._lines.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        if self._lines is not None:
            self._lines.close()


def _rows_of(file: Path) -> list[dict[str, Any]]:
    """What the lines of a record say. A run that was killed may have left half of the last one, which is left out.

    Raises:
        ValueError: a line that is nothing of the kind.
    """
    rows: list[dict[str, Any]] = []
    lines = file.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:  # of JSON, or of what is no text
            row = None
            if 1 < number == len(lines) and not line.endswith(b"\n"):
                break
        if not isinstance(row, dict) or (rows and row.keys() != {"task", "name", "answers"}):
            raise ValueError(f"Record: line {number} of {file} is none of a record of answers. Name another file.")
        rows.append(row)
    return rows


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    record: Record,
    console: Console,
    folder: Path | None = None,
) -> tuple[dict[str, dict[str, Score]], dict[str, str]]:
    """Ask whatever the record has no answers to yet.

    Args:
        model: in eval mode, best in float32; it answers with the exact cache under the name ``EXACT``.
        tokenizer: its tokeniser.
        settings: what to ask.
        record: where answers are kept.
        console: where progress goes.
        folder: with the user's own questions.

    Returns:
        For each task and cache its score; and the caches that are left out, with the reason.

    Raises:
        ValueError: questions that cannot be had, or settings that leave none.
    """
    compared, left_out = baselines.candidates(model, list(settings.caches))
    models = {EXACT: (model, exact_cache(model))}
    models |= {name: (candidate.model or model, candidate) for name, candidate in compared.items()}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    scores = {}
    with Progress(*columns, console=console, transient=True) as progress:
        for task in settings.tasks:
            done = record.answers.setdefault(task, {})
            for name in [name for name, found in done.items() if not models.keys() <= found.keys()]:
                del done[name]  # a cache that was left out when it was asked
            wanted, groups = _asked(task, tokenizer, settings, models, done, folder)
            bar = progress.add_task(task, total=len(wanted), completed=sum(name in done for name in wanted))
            for found in groups:
                record.add(task, found)
                progress.advance(bar, len(found))
            scores[task] = {name: _score([done[asked] for asked in wanted], name) for name in models}
    return scores, left_out


def _asked(
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    models: Models,
    done: Mapping[str, Answers],
    folder: Path | None,
) -> tuple[list[str], Iterator[dict[str, Answers]]]:
    """Names of a task's questions, and what answers those that are not done, some at a time."""
    if task == "humaneval":
        programs = data.programs(folder)[: settings.limit]
        left = [program for program in programs if program.name not in done]
        return [program.name for program in programs], write(tokenizer, left, models, settings.batch)
    topics = limited(data.QUESTIONS[task](settings.shots, folder), settings.limit)
    asking = work_out if task == "gsm8k" else partial(choose, reference=EXACT)
    ask = partial(asking, tokenizer, models=models, batch=settings.batch)

    def groups() -> Iterator[dict[str, Answers]]:
        for topic, questions in topics:
            if left := [question for question in questions if question.name not in done]:
                yield from ask(topic=topic, questions=left)

    return [question.name for _, questions in topics for question in questions], groups()


def limited(topics: Sequence[Topic], limit: int | None) -> list[tuple[Topic, tuple[Question, ...]]]:
    """``limit`` questions, as many of each topic as it has or its share is, picked at random, always the same.

    Args:
        topics: with all their questions.
        limit: None for all.
    """
    left = sum(len(topic.questions) for topic in topics) if limit is None else limit
    shares: dict[str, int] = {}
    # Small topics first, so that what they do not use goes to the others.
    for place, topic in enumerate(sorted(topics, key=lambda topic: len(topic.questions))):
        shares[topic.name] = min(len(topic.questions), left // (len(topics) - place))
        left -= shares[topic.name]
    picked = []
    for topic in topics:
        chosen = random.Random(topic.name).sample(range(len(topic.questions)), shares[topic.name])
        picked.append((topic, tuple(topic.questions[index] for index in sorted(chosen))))
    return picked


def _score(answers: Sequence[Answers], name: str) -> Score:
    pairs = [(found[name], found[EXACT]) for found in answers]
    divergences = [answer.kl for answer, _ in pairs if answer.kl is not None]
    return Score(
        asked=len(pairs),
        right=sum(answer.right for answer, _ in pairs),
        answers_alike=sum(answer.text == exact.text for answer, exact in pairs),
        verdicts_alike=sum(answer.right == exact.right for answer, exact in pairs),
        mean_kl=sum(divergences) / len(divergences) if divergences else None,
    )
