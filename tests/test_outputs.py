"""Are the outputs of commands that the pages show those of the commands?"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from quantcache import QuantizedInt8Cache, __version__
from quantcache.cli import chat
from quantcache.cli.main import app
from quantcache.serving.report import ServingReport
from tests.documentation import ROOT, pages
from tests.strategies import random_states
from tests.test_cli import folder  # noqa: F401 - a fixture

COLUMNS = 78
TOKENS = 1332
"""Of the cache whose inspection is shown."""

_SHOWN = re.compile(r"^```\n\$ quantcache (.*?)```", re.MULTILINE | re.DOTALL)
_LINES_OF_GENERATE = re.compile(r"^```\n(prompt: .*?)```", re.MULTILINE | re.DOTALL)


def shown() -> dict[str, list[str]]:
    """The lines of each block that begins with a command, by page and command, the command's own left out."""
    found = {}
    for page in pages():
        for block in _SHOWN.findall(page.read_text(encoding="utf-8")):
            command, _, output = re.sub(r" \\\n *", " ", block).partition("\n")
            found[f"{page.relative_to(ROOT)}: {command}"] = output.splitlines()
    return found


def run(*arguments: str) -> list[str]:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": str(COLUMNS)})
    assert result.exit_code == 0, result.output
    return [line.rstrip() for line in result.output.splitlines()]


def words(lines: list[str]) -> set[str]:
    """Without numbers and frames, which are another machine's."""
    return set(re.findall(r"[A-Za-z][A-Za-z/,]+", " ".join(lines)))


def plan_is_that(lines: list[str], command: str, model: Path) -> None:
    assert lines == run(*command.split())


def inspect_is_that(lines: list[str], command: str, model: Path) -> None:
    """Of random keys and values with the shapes of the model that is named; lines that are left out are dots."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        dtype=torch.float32,
    )
    with torch.device("meta"):
        described = LlamaForCausalLM(config)
    cache = QuantizedInt8Cache(config)
    for layer_idx in range(config.num_hidden_layers):
        cache.update(*random_states(1, 3, TOKENS, 64, seed=layer_idx), layer_idx)
    file = model / "book.safetensors"
    cache.save(file, model=described, input_ids=torch.zeros(1, TOKENS, dtype=torch.int64))
    have = iter(run("inspect", str(file), "--verify"))
    for line in lines:
        assert line.strip() == "..." or any(line.strip() == other.strip() for other in have), line
    assert f"quantcache {__version__}" in " ".join(lines)


def doctor_is_that(lines: list[str], command: str, model: Path) -> None:
    have = run("doctor")
    told, printed = (next(words([line]) for line in some if "device" in line) for some in (lines, have))
    assert told == printed == {"device", "backend", "why", "kernels"}
    assert words(lines[2:]) - {"cache", "quantcache", "built", "avx"} <= words(have)
    assert (
        re.sub(r"\S*\d\S*", "", " ".join(lines[:2])).split()
        == re.sub(r"\S*\d\S*", "", " ".join(have[: 1 + have[0].endswith("on")])).split()
    )


def bench_is_that(lines: list[str], command: str, model: Path) -> None:
    have = run("bench", "-t", "128", "--steps", "2", "--model", str(model), "--device", "cpu")
    assert words(lines) - {"SmolLM", "Instruct", "MiB", "KiB", "B"} <= words(have)


def eval_is_that(lines: list[str], command: str, model: Path) -> None:
    small = ("--rows", "1", "--tokens", "256", "--prompt", "128", "--greedy", "4", "--needle", "200")
    have = run("eval", "--model", str(model), *small, "--device", "cpu")
    assert words(lines) - {"SmolLM", "Instruct", "never", "hqq", "optimum", "quanto", "never,"} <= words(have)


def chat_is_that(lines: list[str], command: str, model: Path) -> None:
    assert lines[0] in (ROOT / "quantcache/cli/chat.py").read_text(encoding="utf-8")
    assert lines[1] == "you> /help"
    assert "\n".join(lines[2:]) == chat.HELP


def serve_is_that(lines: list[str], command: str, model: Path) -> None:
    """The report of a pool, cut off by dots, and what a server says when it listens."""

    def form(text: str) -> str:
        return re.sub(r"\d[\d.,]*", "0", " ".join(text.split()))

    told, _, said = " ".join(lines).partition(" ... ")
    report = str(ServingReport(9, 0, 0, 9, 9, 9, 9, 9, 9, 2, 0, 0, "float32", "cpu", None, 0, 0, False))
    assert form(report).startswith(form(told))
    source = (ROOT / "quantcache/cli/serve.py").read_text(encoding="utf-8")
    assert form(said).partition("v0; ")[2] in form(source.replace("{most_tokens:,}", "0"))


def nothing_is_shown(lines: list[str], command: str, model: Path) -> None:
    assert [line for line in lines if not line.startswith("$ ")] == []


CHECKS: dict[str, Callable[[list[str], str, Path], None]] = {
    "plan": plan_is_that,
    "inspect": inspect_is_that,
    "doctor": doctor_is_that,
    "bench": bench_is_that,
    "eval": eval_is_that,
    "chat": chat_is_that,
    "generate": nothing_is_shown,
    "serve": serve_is_that,
}
"""By command. A page that shows the output of another command needs a check of its own."""


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("place", shown())
def test_what_a_page_shows_of_a_command_is_what_it_prints(place: str, folder: Path) -> None:  # noqa: F811
    command = place.partition(": ")[2]
    CHECKS[command.split()[0]](shown()[place], command, folder)


def test_the_lines_behind_an_answer_are_those_of_generate(folder: Path) -> None:  # noqa: F811
    (block,) = _LINES_OF_GENERATE.findall((ROOT / "docs/command-line.md").read_text(encoding="utf-8"))

    def form(text: str) -> str:
        return re.sub(r"[\d.,]+ ?(KiB|MiB|GiB)?", "0 ", text.replace(", interrupted", "")).strip()

    lines = run("generate", "abc " * 40, "--model", str(folder), "--device", "cpu", "-n", "9")
    assert form(" ".join(block.split())) == form(" ".join(" ".join(lines[-3:]).split()))
