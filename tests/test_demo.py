"""Does ``quantcache demo`` compare two caches on any model, and say what is wrong with its arguments?"""

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


def test_the_table_compares_both_caches(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "TEXT_TOKENS", 256)
    monkeypatch.setattr(demo, "RACE_TOKENS", 128)
    code, output = run(
        "demo", "--model", str(folder), "--prompt", "abc " * 60, "--max-new-tokens", "12", "--device", "cpu"
    )
    assert code == 0
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]
    rows = {row[0]: row[1:] for row in cells}
    # 2 layers, 2 heads of 16 channels, keys and values in float32, 240 + 11 tokens: 251 * 512 bytes.
    assert rows["KV cache"][0] == f"{251 * 512:,} bytes"
    # 3 pages: a byte an element, 4 bytes a channel of keys and a token of values; 59 exact tokens in a buffer of 64.
    codes, metadata, tail = 3 * 64 * 128, 3 * 4 * (16 + 64) * 4, 64 * 512
    assert rows["KV cache"][1] == f"{codes + metadata + tail:,} bytes"
    assert rows["read by"][:2] == ["transformers", dispatch.choose_backend(torch.device("cpu"))]
    assert rows["decoding after 128 tokens"][0].endswith("tokens/s")
    assert rows["answers"][0] == "12 tokens"
    assert rows["mean KL from the default cache"][1].endswith("nats/token")
    assert rows["same most likely token"][1].endswith("of 128")


def test_the_version_is_printed() -> None:
    assert run("--version") == (0, f"{__version__}\n")


def test_help_names_every_option() -> None:
    code, output = run("demo", "--help")
    assert code == 0
    for option in ("--model", "--prompt", "--max-new-tokens", "--device"):
        assert option in output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--device", "warp"], 2, "must be a device of this machine, got 'warp'"),
        (["--max-new-tokens", "0"], 2, "Invalid value for '--max-new-tokens'"),
        (["--model", "missing.gguf", "--device", "cpu"], 1, "missing.gguf must be a GGUF file, got no such file."),
    ],
)
def test_bad_arguments_are_named_without_a_traceback(arguments: list[str], code: int, message: str) -> None:
    got, output = run("demo", *arguments)
    assert got == code
    assert message in " ".join(output.replace("│", " ").split())
    assert "Traceback" not in output
