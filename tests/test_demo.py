"""Does ``quantcache demo`` compare two caches on any model, and say what is wrong with its arguments?"""

import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from quantcache import __version__
from quantcache.backends import dispatch
from quantcache.cli import demo
from quantcache.cli.main import app


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny random model that reads bytes."""
    vocab = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "120"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_the_demo_compares_answer_memory_and_speed(folder: Path) -> None:
    code, output = run(
        "demo", "--model", str(folder), "--prompt", "abc " * 60, "--max-new-tokens", "12", "--device", "cpu"
    )
    assert code == 0
    assert "float32 on cpu" in output
    assert "a prompt of 240 tokens" in output
    assert re.search(r"^The same answer\.$|^The answers differ from token \d+ on\.$", output, re.MULTILINE)
    bars = dict(re.findall(r"^(\w+) +█+ (.*)$", output, re.MULTILINE))
    # 2 layers, 2 heads of 16 channels, keys and values, 240 + 11 tokens: 251 * 512 bytes in float32.
    assert bars["bfloat16"] == f"{251 * 256 / 1024:.2f} KiB"
    assert f"In float32 the default cache takes {251 * 512 / 1024:.2f} KiB here" in output
    # 3 pages: a byte an element, 4 bytes a channel of keys and a token of values; 59 exact tokens in a buffer of 64.
    codes, metadata, tail = 3 * 64 * 128, 3 * 4 * (16 + 64) * 4, 64 * 512
    assert f" {(codes + metadata + tail) / 1024:.2f} KiB" in output
    assert f"int8 takes {(codes + metadata + tail) / (251 * 256):.0%} of bfloat16" in output
    assert bars["default"].endswith("tokens/s")
    assert bars["int8"].endswith("tokens/s")
    assert f"read by {dispatch.choose_backend(torch.device('cpu'))}" in output
    assert "The next 32 predictions" in output
    assert re.search(r"the same most likely token in \d+, mean KL [\d.e-]+ nats", output)


def test_the_demo_takes_the_options_of_generate(folder: Path) -> None:
    arguments = ("demo", "--model", str(folder), "--prompt", "abc " * 30, "--device", "cpu", "-n", "8")
    code, output = run(*arguments, "--dtype", "bfloat16", "--attn", "eager")
    assert code == 0
    assert "bfloat16 on cpu" in output
    assert "default cache takes" not in output  # in another dtype than the one that is compared with
    answer = re.search(r"^default +(.*)$", output, re.MULTILINE)
    assert answer is not None
    said = answer[1].strip()
    assert len(said) > 4
    code, output = run(*arguments, "--dtype", "bfloat16", "--attn", "eager", "--stop", said[2:4])
    assert code == 0
    assert re.search(rf"^default +{re.escape(said[: said.index(said[2:4])])}$", output, re.MULTILINE)
    code, output = run(*arguments, "--system", "Be brief.")
    assert code == 1
    assert "--system must go with a model that has a chat template" in output


@pytest.mark.real_model
def test_the_demo_answers_rightly_about_a_document_that_is_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "DOCUMENT_CHARACTERS", 1400)  # a quarter of what is shown, for time
    code, output = run("demo", "--device", "cpu")
    assert code == 0
    answers = re.findall(r"^(default|int8) +(.*4827.*)$", output, re.MULTILINE)
    assert [name for name, _ in answers] == ["default", "int8"]
    assert "\nThe same answer.\n" in output
    sizes = {name: float(size) for name, size in re.findall(r"^(\w+) +█+ ([\d.]+) MiB$", output, re.MULTILINE)}
    assert sizes["int8"] < 0.85 * sizes["bfloat16"]


def test_the_version_is_printed() -> None:
    assert run("--version") == (0, f"{__version__}\n")


def test_help_names_every_option() -> None:
    code, output = run("demo", "--help")
    assert code == 0
    for option in ("--model", "--prompt", "--max-new-tokens", "--device", "--dtype", "--attn", "--stop", "--system"):
        assert option in output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--device", "warp"], 2, "must be a device of this machine, got 'warp'"),
        (["--max-new-tokens", "0"], 2, "Invalid value for '--max-new-tokens'"),
        (["--dtype", "int8"], 2, "must be float32, bfloat16 or float16, got 'int8'"),
        (["--model", "missing.gguf", "--device", "cpu"], 1, "missing.gguf must be a GGUF file, got no such file."),
    ],
)
def test_bad_arguments_are_named_without_a_traceback(arguments: list[str], code: int, message: str) -> None:
    got, output = run("demo", *arguments)
    assert got == code
    assert message in " ".join(output.replace("│", " ").split())
    assert "Traceback" not in output
