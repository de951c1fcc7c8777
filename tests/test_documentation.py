"""Does the documentation say what is so? Snippets run, tables are those of the measurements, links lead somewhere."""

import json
import pkgutil
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.main import get_command

from quantcache.cli.main import app
from tests.documentation import (
    DOCS,
    PREPARATIONS,
    ROOT,
    RUN_ELSEWHERE,
    Snippet,
    as_this_host_says,
    names,
    pages,
    snippets,
    write_stand_in,
    write_stand_ins,
)
from tests.qwen_checkpoint import write_int4_of

PAGES = {str(page.relative_to(ROOT)): page for page in pages()}
WITH_SNIPPETS = [name for name, page in PAGES.items() if snippets(page) and name not in RUN_ELSEWHERE]

CODE_WIDTH = 78
"""Characters of code and output that a page shows without scrolling."""

EXAMPLES = {
    "long_document_chat.py": ["document.txt", "Who?", "Why?", "--max-new-tokens", "4"],
    "batch_generation.py": ["document.txt", "--batch-size", "2", "--max-new-tokens", "4"],
    "assisted_decoding.py": ["Who are you?", "--assistant", "Qwen/Qwen2.5-0.5B-Instruct", "--max-new-tokens", "20"],
    "int4_weights.py": ["Hello!", "And?"],
    "several_gpus.py": ["Qwen/Qwen2.5-7B-Instruct"],
}
"""Arguments of each example."""


def run(snippet: Snippet, page: Path, known: dict[str, object]) -> None:
    """As if the snippet stood alone in its lines of the page, so that a traceback points there."""
    if snippet.preparation is not None:
        known.update(PREPARATIONS[snippet.preparation](known))
    code = as_this_host_says(snippet.code)
    exec(compile("\n" * (snippet.line - 1) + code, str(page), "exec"), known)


@pytest.mark.parametrize("name", WITH_SNIPPETS)
def test_the_snippets_of_a_page_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = PAGES[name]
    write_stand_ins(page, tmp_path)
    monkeypatch.chdir(tmp_path)
    known: dict[str, object] = dict(names())
    for snippet in snippets(page):
        if snippet.not_run is None:
            run(snippet, page, known)


@pytest.mark.parametrize("name", WITH_SNIPPETS)
def test_a_page_with_the_cache_as_an_argument_says_what_it_was_called_before(name: str) -> None:
    text = PAGES[name].read_text(encoding="utf-8")
    assert "past_key_values=" not in "".join(snippet.code for snippet in snippets(PAGES[name]))
    if any(re.search(r"generate\([^)]*\bcache=", snippet.code) for snippet in snippets(PAGES[name])):
        assert "Before transformers 5.24 the argument is `past_key_values=`." in text


def test_few_snippets_are_not_run_and_each_says_why() -> None:
    left_out = [(name, s.line) for name, page in PAGES.items() for s in snippets(page) if s.not_run is not None]
    reasons = [s.not_run for page in PAGES.values() for s in snippets(page) if s.not_run is not None]
    assert all(len(reason) > 10 for reason in reasons)
    assert len(left_out) <= 6, left_out


@pytest.mark.parametrize("name", RUN_ELSEWHERE)
def test_pages_that_are_run_elsewhere_are_named_there(name: str) -> None:
    assert Path(name).name in (ROOT / RUN_ELSEWHERE[name]).read_text(encoding="utf-8")


@pytest.mark.real_model
def test_getting_started_prints_what_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    page = PAGES["docs/getting-started.md"]
    (snippet,) = snippets(page)
    shown = re.search(r"It prints:\n\n```text\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert shown is not None
    run(snippet, page, {})
    assert capsys.readouterr().out == shown[1]


@pytest.mark.real_model
def test_home_prints_what_it_shows(
    real_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = PAGES["docs/index.md"]
    (snippet,) = snippets(page)
    folder = tmp_path / "HuggingFaceTB" / real_model.name  # in bfloat16, as the hub has it
    AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(real_model).save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    shown = re.search(r"It prints:\n\n```text\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert shown is not None
    run(snippet, page, {})
    assert capsys.readouterr().out == shown[1]


@pytest.mark.real_model
def test_the_notebook_runs(capsys: pytest.CaptureFixture[str]) -> None:
    cells = json.loads((ROOT / "examples" / "first_steps.ipynb").read_text(encoding="utf-8"))["cells"]
    known: dict[str, object] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "a notebook is kept without outputs"
            exec(as_this_host_says("".join(cell["source"])), known)
    assert "30 int8 layers" in capsys.readouterr().out


def test_every_example_is_run_and_described() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)
    described = PAGES["docs/examples.md"].read_text(encoding="utf-8")
    assert all(path.name in described for path in (ROOT / "examples").iterdir() if path.is_file())


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = (ROOT / "examples" / name).read_text(encoding="utf-8")
    named = re.findall(r"Qwen/Qwen[\w.-]+", source)
    for model_id in dict.fromkeys(named):
        write_stand_in(model_id, tmp_path / model_id)
    (tmp_path / "document.txt").write_text("\n".join(f"Line {number} of a document." for number in range(9)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [name, *EXAMPLES[name]])
    script = tmp_path / name
    script.write_text(as_this_host_says(source), encoding="utf-8")
    runpy.run_path(str(script), run_name="__main__")
    first = capsys.readouterr().out
    assert "int8" in first or ">" in first
    if name == "long_document_chat.py":  # again, from the file that the first run left
        assert (tmp_path / "document.txt.safetensors").exists()
        runpy.run_path(str(script), run_name="__main__")
        assert capsys.readouterr().out.split("\n", 1)[1] == first.split("\n", 1)[1]


LIGHTHOUSE = """The lighthouse stands on a reef eleven miles off the coast, which the sea covers at every high tide. \
It was built by Robert Stevenson between 1807 and 1810, is 35 metres high, and is the oldest sea lighthouse that \
still stands. Its stones are cut so that each holds the next. Its lamp was first lit in February 1811 and can be seen \
from 35 miles away. Keepers lived in it until 1988; since then it has worked by itself.
"""
QUESTION = "Who built the lighthouse, and when?"


@pytest.fixture
def run_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """A function that runs an example with arguments, in a folder of its own, and returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def run_it(name: str, *arguments: str) -> tuple[str, str]:
        script = tmp_path / name
        script.write_text(as_this_host_says((ROOT / "examples" / name).read_text("utf-8")), encoding="utf-8")
        monkeypatch.setattr("sys.argv", [name, *arguments])
        runpy.run_path(str(script), run_name="__main__")
        said = capsys.readouterr()
        return said.out, said.err

    return run_it


@pytest.mark.real_model
def test_a_document_that_was_edited_is_read_again(run_example: Any, real_model: Path) -> None:
    model = ["--model", str(real_model), "--max-new-tokens", "10"]
    Path("document.txt").write_text(LIGHTHOUSE, encoding="utf-8")
    first, said = run_example("long_document_chat.py", "document.txt", QUESTION, *model)
    assert "Robert Stevenson" in first.partition(QUESTION)[2]
    assert "MiB in int8" in first
    assert not said.count("again")
    Path("document.txt").write_text(LIGHTHOUSE.replace("Robert Stevenson", "Alice Miller"), encoding="utf-8")
    second, said = run_example("long_document_chat.py", "document.txt", QUESTION, *model)
    assert "Alice Miller" in second.partition(QUESTION)[2]
    assert "document.txt.safetensors is of another text: the document is read again." in said
    third, said = run_example("long_document_chat.py", "document.txt", QUESTION, *model)
    assert third.partition("\n")[2] == second.partition("\n")[2]
    assert not said.count("again")


@pytest.mark.real_model
def test_every_prompt_of_a_batch_is_answered(run_example: Any, real_model: Path) -> None:
    prompts = ["What is the capital of France?", "Name a colour.", "Write one sentence about the sea."]
    Path("prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    arguments = ("prompts.txt", "--batch-size", "2", "--model", str(real_model), "--max-new-tokens", "12")
    said, notes = run_example("batch_generation.py", *arguments)
    answers = dict(re.findall(r"^> (.*)\n(.+)$", said, re.MULTILINE))
    assert list(answers) == prompts
    assert "Paris" in answers[prompts[0]]
    assert all(len(answer.split()) > 1 and answer != prompt for prompt, answer in answers.items())
    assert notes.count("MiB") == 2


@pytest.mark.real_model
def test_drafts_and_spread_layers_answer_in_words(run_example: Any, real_model: Path) -> None:
    prompt = f"{LIGHTHOUSE}\n{QUESTION}"
    said, _ = run_example("assisted_decoding.py", prompt, "--model", str(real_model), "--max-new-tokens", "12")
    assert "Robert Stevenson" in said
    assert prompt not in said
    said, _ = run_example("several_gpus.py", str(real_model), "--prompt", LIGHTHOUSE, "--new-tokens", "12")
    assert len(said.partition(LIGHTHOUSE.strip())[2].partition("rank 0")[0].split()) > 3
    assert "of int8 cache on cpu, read by" in said


@pytest.mark.real_model
def test_int4_weights_answer_a_conversation(run_example: Any, real_model: Path, tmp_path: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(real_model), AutoTokenizer.from_pretrained(real_model)
    folder = write_int4_of(model, tokenizer, tmp_path / "int4")
    questions = ["What is the capital of France?", "And of Italy?"]
    said, _ = run_example("int4_weights.py", *questions, "--model", str(folder))
    answers = dict(re.findall(r"^> (.*)\n(.+)$", said, re.MULTILINE))
    assert list(answers) == questions
    assert "Paris" in answers[questions[0]]
    assert "Rome" in answers[questions[1]]
    packed = int(re.search(r"packed weights +([\d,]+) bytes", said)[1].replace(",", ""))
    assert packed < 0.8 * (model.num_parameters() - model.get_input_embeddings().weight.numel())


@pytest.mark.parametrize("name", PAGES)
def test_code_is_no_wider_than_the_column(name: str) -> None:
    text = PAGES[name].read_text(encoding="utf-8")
    blocks = re.findall(r"^ *```.*?\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    wide = [line for block in blocks for line in block.splitlines() if len(line) > CODE_WIDTH]
    assert not wide, f"{name}: {wide}"


def commands(page: Path) -> list[list[str]]:
    """Lines of shell blocks, and code between single backticks, that call ``quantcache`` with lower-case words."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:sh|bash|console)\n(.*?)```", text, re.DOTALL)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`(quantcache [a-z][^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    found = [line.split(" #")[0].split(" < ")[0].split(" | ")[0] for line in [*lines, *inline]]
    return [shlex.split(line.replace("\n", " "))[1:] for line in found if line.startswith("quantcache ")]


@pytest.mark.parametrize("name", PAGES)
def test_the_commands_of_a_page_exist_with_their_options(name: str) -> None:
    group = get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    for words in commands(PAGES[name]):
        if words[0].startswith("-"):
            continue
        assert words[0] in group.commands, f"{name}: quantcache {words[0]}"
        if group.commands[words[0]].ignore_unknown_options:
            continue  # it hands them on
        options = {option for parameter in group.commands[words[0]].params for option in parameter.opts}
        asked = {word.split("=")[0] for word in words[1:] if re.match(r"--?[a-z]", word)}
        assert asked <= options | {"--help"}, f"{name}: quantcache {words[0]} has no {asked - options}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs both make them for plain headings."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_the_links_of_a_page_lead_to_files_and_headings(name: str) -> None:
    """In the repository, where README and pages are read too; the strict build checks those of the site."""
    page = PAGES[name]
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        made = {DOCS / "changelog.md", DOCS / "contributing.md", DOCS / "licence.md"}
        assert file.exists() or file in made, f"{name}: {target} leads nowhere"
        if anchor and file.suffix == ".md" and file.exists():
            assert anchor in anchors(file), f"{name}: {target}: no such heading"


@pytest.mark.parametrize("name", [*PAGES, "CONTRIBUTING.md"])
def test_the_modules_and_files_that_a_page_names_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for dotted in set(re.findall(r"\bquantcache(?:\.[A-Za-z_]\w*)+", text)):
        pkgutil.resolve_name(dotted)
    for path in set(re.findall(r"`([a-z_/]+/(?:[a-z_]+\.py)?)`", text)) - {"site/"}:  # which make docs makes
        assert (ROOT / path).exists() or (ROOT / "quantcache" / path).exists(), f"{name}: {path} is not there"


def test_every_room_is_in_the_table() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rooms = {path.parent.name for path in (ROOT / "quantcache").glob("*/__init__.py")}
    assert all(f"| `{room}/`" in table for room in rooms)


def test_the_tables_are_those_of_the_measurements() -> None:
    pytest.importorskip("tools")
    from tools.pages import stale

    assert not stale(), "run python -m tools.pages"


@pytest.mark.parametrize("missing", ["cuda-attention", "memory", "quality", "peers-cpu"])
def test_a_missing_measurement_is_said_to_be_missing(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tools import measurements
    from tools.figures import FIGURES, THEMES
    from tools.tables import TABLES

    for file in measurements.FOLDER.glob("*.json"):
        if file.stem != missing:
            (tmp_path / file.name).write_text(file.read_text())
    monkeypatch.setattr(measurements, "FOLDER", tmp_path)
    monkeypatch.setattr(measurements, "ROOT", tmp_path)
    said = 0
    for make in [*TABLES.values(), *(lambda draw=draw: draw(THEMES["light"]) for draw in FIGURES.values())]:
        try:
            assert make()
        except measurements.NotMeasuredError as reason:
            said += f"{missing}.json" in str(reason)
    assert said >= 1


def test_every_table_and_figure_is_used_and_every_measurement_is_shown() -> None:
    from tools.figures import FIGURES
    from tools.measurements import FOLDER
    from tools.tables import TABLES

    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES.values())
    assert set(re.findall(r"<!-- table ([a-z0-9-]+) -->", text)) == set(TABLES)
    assert set(re.findall(r"<!-- figure ([a-z0-9-]+):", text)) == set(FIGURES)
    code = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tools").rglob("*.py"))
    for file in FOLDER.glob("*.json"):
        assert f'"{file.stem}"' in code, f"{file.name} is shown nowhere"
