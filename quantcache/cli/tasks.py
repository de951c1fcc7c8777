"""``quantcache eval --tasks``: questions and programs, answered through several caches."""

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from quantcache.cli.terminal import machine, open_model
from quantcache.evaluation.tasks.suite import CACHES, Record, Score, Settings, run

HEADINGS = {"humaneval": ("solved", "programs alike"), "": ("right", "answers alike")}
"""What right and alike mean: of programs, and of everything else."""


def evaluate_tasks(
    spec: str | None, where: torch.device, settings: Settings, folder: Path | None, resume: Path | None, as_json: bool
) -> None:
    """Ask, and print what came of it.

    Args:
        spec: see ``load_model``.
        where: device of the model.
        settings: what is asked.
        folder: with the user's own questions.
        resume: the record's file.
        as_json: print JSON in place of tables.
    """
    console = Console(stderr=as_json)
    model, tokenizer, label = open_model(spec, where, console, "float32")
    console.print(f"[bold]{label}[/bold] in float32 on {where}; the reference is the exact cache", highlight=False)
    about = machine(model, label)
    with Record(resume, {"model": label, **settings.decisive}) as record:
        scores, left_out = run(model, tokenizer, settings, record, console, folder)
    if as_json:
        told = {task: {name: asdict(score) for name, score in found.items()} for task, found in scores.items()}
        run_as = {"command": shlex.join(["quantcache", *sys.argv[1:]]), "hardware": {"device": about["device"]}}
        about = {**run_as, **about, "settings": asdict(settings)}
        print(json.dumps({**about, "tasks": told, "left_out": left_out}, indent=1))
        return
    for task, found in scores.items():
        console.print(_table(task, found))
    for name, reason in left_out.items():
        console.print(f"left out: {name}: {reason}", style="dim", soft_wrap=True, markup=False, highlight=False)


def task_settings(tasks: str, shots: int, questions: int | None, batch: int, caches: str | None) -> Settings:
    """The settings that the command line's words mean.

    Raises:
        ValueError: a task that there is not.
    """
    names = CACHES if caches is None else tuple(_words(caches))
    return Settings(tuple(_words(tasks)), shots, questions, batch, names)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def _table(task: str, scores: dict[str, Score]) -> Table:
    some = next(iter(scores.values()))
    right, alike = HEADINGS.get(task, HEADINGS[""])
    title = f"{task}: {some.asked:,} {'programs' if task == 'humaneval' else 'questions'}"
    table = Table("", right, "%", alike, "verdicts alike", title=title)
    divergent = any(score.mean_kl is not None for score in scores.values())
    if divergent:
        table.add_column("mean KL")
    for name, score in scores.items():
        cells = [name, f"{score.right:,}", f"{score.right / max(score.asked, 1):.1%}"]
        cells += [f"{score.answers_alike:,}", f"{score.verdicts_alike:,}"]
        if divergent:
            cells.append("-" if score.mean_kl is None else f"{score.mean_kl:.1e}")
        table.add_row(*cells)
    return table
