"""Do the commands do what their help says, and end in a message and an exit code where they cannot?"""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import typer
from huggingface_hub import constants
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.main import get_command
from typer.testing import CliRunner

from quantcache import QuantizedInt8Cache, __version__
from quantcache.backends import processor
from quantcache.cli import hub, talking, terminal
from quantcache.cli.arguments import check_target
from quantcache.cli.main import app
from quantcache.layers._host import cache_argument
from quantcache.planning import GIB
from quantcache.planning.gpus import GPUS, parse_gpu
from tests.cases import NEWEST

COMMANDS = ("demo", "generate", "chat", "plan", "eval", "bench", "inspect", "doctor")

TEMPLATE = (
    "{% for turn in messages %}<{{ turn['role'] }}>{{ turn['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model that reads bytes and has a chat template."""
    path = tmp_path_factory.mktemp("model")
    vocab = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def run(*arguments: str, stdin: str | None = None) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin, env={"COLUMNS": "160"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_every_command_has_help_with_its_options() -> None:
    code, output, _ = run("--help")
    assert code == 0
    for command in COMMANDS:
        assert command in output
        assert run(command, "-h")[0] == 0
    for command in ("generate", "chat", "plan", "eval", "bench", "inspect"):
        assert f"quantcache {command}" in run(command, "--help")[1], "an example"


@pytest.mark.parametrize("command", [*COMMANDS, "serve"])
def test_help_is_whole_at_80_columns(command: str) -> None:
    """Every option in full, and every default that a user cannot see in the signature."""
    group = get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80"}).stdout
    for parameter in group.commands[command].params:
        for option in [*parameter.opts, *parameter.secondary_opts]:
            assert not option.startswith("-") or re.search(rf"{option}\b", shown), option
    assert "…" not in shown
    assert ("SmolLM2-135M-Instruct" in shown) == (command not in ("plan", "inspect", "doctor"))
    assert ("auto: cuda" in re.sub(r"[\s│]+", " ", shown)) == ("--device " in shown)


def test_help_and_wrong_arguments_load_no_torch() -> None:
    calls = [["--help"], *([name, "--help"] for name in COMMANDS)]
    wrong = [["bench", "--dtype", "int3"], ["eval", "--tokens", "9", "--prompt", "9"], ["chat", "-n", "0"], ["plan"]]
    code = (
        "import sys; from typer.testing import CliRunner; from quantcache.cli.main import app;"
        f"print([CliRunner().invoke(app, call).exit_code for call in {calls + wrong}]);"
        "print({'torch', 'transformers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == f"{[0] * len(calls) + [2] * len(wrong)}\nset()\n"


def test_a_shell_can_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from quantcache.cli.main import app; app(prog_name='quantcache')"],
        env={"_QUANTCACHE_COMPLETE": "complete_bash", "COMP_WORDS": "quantcache in", "COMP_CWORD": "1", "PATH": ""}
        | {"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.split() == ["inspect"], done.stderr


def test_generate_keeps_a_cache_and_goes_on_from_it(folder: Path, tmp_path: Path) -> None:
    file, both = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    model = ("--model", str(folder), "--device", "cpu")
    code, _, notes = run("generate", "abc " * 40, *model, "-n", "30", "--save", str(file))
    assert code == 0
    assert f"saved: {file}" in notes
    assert "read by" in notes
    assert "deprecated" not in notes
    stored = QuantizedInt8Cache.load(file).input_ids
    assert stored is not None
    assert stored.shape == (1, 160 + 30)
    # Going on in a second run is what one run over the whole text gives.
    code, second, _ = run("generate", " and so on", *model, "-n", "20", "--load", str(file), "--save", str(both))
    assert code == 0
    loaded, whole = QuantizedInt8Cache.load(both).input_ids, LlamaForCausalLM.from_pretrained(folder).eval()
    prompt = loaded[:, :-20]
    expected = whole.generate(
        prompt, max_new_tokens=20, do_sample=False, **cache_argument(QuantizedInt8Cache(whole.config))
    )
    assert torch.equal(expected, loaded)
    assert second


def test_a_long_text_is_read_once(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "book.safetensors"
    code, answer, _ = run(
        *("generate", "-", "--only-read", "--save", str(file), "--model", str(folder), "--device", "cpu"),
        stdin="It was a dark and stormy night. " * 20,
    )
    assert (code, answer) == (0, "")
    assert QuantizedInt8Cache.load(file).get_seq_length() == 640


def test_sampling_with_a_seed_repeats_itself(folder: Path) -> None:
    arguments = ("generate", "abc", "--model", str(folder), "--device", "cpu", "-n", "20", "--temperature", "2")
    answers = [run(*arguments, "--seed", seed)[1] for seed in ("1", "1", "2")]
    assert answers[0] == answers[1] != answers[2]


def test_a_chat_stays_in_one_cache(folder: Path, tmp_path: Path) -> None:
    file, middle = tmp_path / "talk.safetensors", tmp_path / "middle.safetensors"
    typed = f"hello\n/save {middle}\n/nonsense\n\nagain\n/quit\n"
    code, _, notes = run(
        "chat", "--model", str(folder), "--device", "cpu", "-n", "10", "--save", str(file), stdin=typed
    )
    assert code == 0
    assert "no such command: /nonsense" in notes
    ids = QuantizedInt8Cache.load(file).input_ids
    text = bytes_of(folder, ids)
    assert text.startswith("<user>hello\n<assistant>")
    assert "\n<user>again\n<assistant>" in text
    assert torch.equal(
        QuantizedInt8Cache.load(middle).input_ids, ids[:, : QuantizedInt8Cache.load(middle).get_seq_length()]
    )
    code, _, notes = run(
        "chat", "--model", str(folder), "--device", "cpu", "-n", "5", "--load", str(middle), stdin="more\n"
    )
    assert code == 0
    assert f"tokens from {middle}" in notes


def bytes_of(folder: Path, ids: torch.Tensor) -> str:
    return str(PreTrainedTokenizerFast.from_pretrained(folder).decode(ids[0]))


def test_a_turn_is_what_the_template_writes(folder: Path) -> None:
    """Turn by turn the tokens are those of the whole conversation at once."""
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder).eval(), PreTrainedTokenizerFast.from_pretrained(folder)
    talk = talking.Talk(model, tokenizer, talking.Sampling(max_new_tokens=1), talking.Console(quiet=True))
    talk.ids = talk.turn_ids("one", system="be brief")
    assert tokenizer.decode(talk.ids[0]) == "<system>be brief\n<user>one\n<assistant>"
    talk.ids = torch.cat([talk.ids, talk.plain_ids("reply")], dim=1)
    assert tokenizer.decode(talk.turn_ids("two")[0]) == "\n<user>two\n<assistant>"
    talk.ids = torch.cat([talk.ids, talk.plain_ids("\n")], dim=1)
    assert tokenizer.decode(talk.turn_ids("two")[0]) == "<user>two\n<assistant>", "an end that was said is not repeated"


def test_plan_prints_a_table_json_and_a_picture(tmp_path: Path) -> None:
    code, output, _ = run("plan", "Llama-3.1-8B", "--gpu", "80GiB", "--plot", str(tmp_path / "plan.png"))
    assert code == 0
    assert "131,072" in output
    assert "int4" in output
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    code, output, _ = run("plan", "Llama-3.1-8B", "--gpu", "80GiB", "--json")
    planned = json.loads(output)
    assert (code, planned["bf16_per_token"], len(planned["fits"])) == (0, 131072, 6)
    assert "DeepSeek-V3" in run("plan", "--list")[1]


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("24", 24 * GIB),
        ("80GB", 80 * 10**9),
        ("1.5 GiB", 3 * GIB // 2),
        ("H100", int(GPUS["h100"] * GIB)),
        ("2x80GB", 160 * 10**9),
        ("A100-80GB", int(GPUS["a100"] * GIB)),
        ("A100-40GB", int(GPUS["a100-40"] * GIB)),
    ],
)
def test_sizes_of_gpus_are_read(text: str, nbytes: int) -> None:
    assert parse_gpu(text) == nbytes


def test_eval_measures_what_is_there(folder: Path, tmp_path: Path) -> None:
    small = ("--rows", "2", "--tokens", "200", "--prompt", "120", "--greedy", "8", "--needle", "300", "--device", "cpu")
    code, output, notes = run("eval", "--model", str(folder), *small, "--json", "--plot", str(tmp_path / "quality.png"))
    assert code == 0, notes
    found: dict[str, Any] = json.loads(output)
    assert {"int8 cache", "bf16 cache", "bf16 model"} <= found["caches"].keys()
    int8, worse = (found["caches"][name] for name in ("int8 cache", "QuantizedCache fp8" if NEWEST else "bf16 model"))
    assert int8["tokens"] == 2 * 80
    assert 0 < int8["mean_kl"] < worse["mean_kl"]
    assert len(int8["key_errors"]) == 2
    assert 0 < int8["key_errors"][0] < 0.02
    assert [needle["depth"] for needle in int8["needles"]] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert len(int8["greedy_first_difference"]) == 2
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
    code, output, _ = run(
        "eval", "--model", str(folder), *small[:8], "--needle", "0", "--caches", "int8", "--device", "cpu"
    )
    assert code == 0
    assert "int8 cache" in output
    assert "fp8" not in output


def test_bench_times_both_caches(folder: Path) -> None:
    arguments = ("bench", "--model", str(folder), "-t", "64", "-t", "200", "--steps", "2", "--device", "cpu", "-b", "2")
    code, output, _ = run(*arguments, "--json")
    assert code == 0
    rows = json.loads(output)["rows"]
    assert [(row["batch"], row["seq_len"]) for row in rows] == [(2, 64), (2, 200)]
    assert all(row["default_seconds"] > 0 and row["int8_seconds"] > 0 for row in rows)
    assert "tokens/s" in run(*arguments)[1]


def test_inspect_reads_the_header_alone(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    run("generate", "abc " * 40, "--model", str(folder), "--device", "cpu", "-n", "3", "--save", str(file))
    code, output, _ = run("inspect", str(file))
    assert code == 0
    assert "0 to 1" in output
    assert "2 + 35" in output  # pages + tail of 163 tokens
    code, output, _ = run("inspect", str(file), "--json")
    assert json.loads(output)["layers"][1]["seq_len"] == 163
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert run("inspect", str(file))[0] == 0
    code, _, message = run("inspect", str(file), "--verify")
    assert code == 1
    assert "must have the checksum" in message


LOADED = "print(json.dumps([result.exit_code, sorted({'torch', 'transformers'} & sys.modules.keys()), result.output]))"


def loaded_by(*arguments: str) -> tuple[set[str], str]:
    """Which of torch and transformers a command loads in a process of its own, and what it says."""
    code = (
        "import json, sys; from typer.testing import CliRunner; from quantcache.cli.main import app;"
        f"result = CliRunner().invoke(app, {list(arguments)}); {LOADED}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    exit_code, loaded, output = json.loads(done.stdout)
    assert exit_code == 0, output
    return set(loaded), output


def test_a_folder_that_may_not_be_looked_into_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", refuse)
    with pytest.raises(PermissionError, match=r"talk must be in a folder that this user can write, got: Permission"):
        check_target(tmp_path / "talk")


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "quantcache", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"{__version__}\n"


def test_what_a_header_or_versions_say_is_told_without_torch(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    run("generate", "abc " * 40, "--model", str(folder), "--device", "cpu", "-n", "3", "--save", str(file))
    loaded, output = loaded_by("inspect", str(file), "--verify")
    assert "2 + 35" in output
    assert not loaded
    loaded, output = loaded_by("doctor", "--no-devices", "--json")
    assert json.loads(output)["versions"]["torch"] == torch.__version__
    assert not loaded
    loaded, output = loaded_by("doctor")
    assert transformers.__version__ in output
    assert loaded == {"torch"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["plan"], 2, "name a model, or pass --list"),
        (["plan", "nonsense"], 1, "'nonsense' must be a preset, a hub id"),
        (["plan", "Qwen3-8B", "--gpu", "big"], 2, "must be a size such as 24"),
        (["eval", "--tokens", "100", "--prompt", "100"], 2, "must be less than --tokens, 100, got 100"),
        (
            ["eval", "--model", "MODEL", "--text", "missing.txt"],
            1,
            "must be 'prose', 'code' or a file, got 'missing.txt'",
        ),
        (["eval", "--model", "MODEL", "--caches", "int3"], 1, "a cache must be one of int8, bf16-cache"),
        (["eval", "--model", "MODEL", "--tokens", "90000", "--rows", "1"], 1, "must have 90000 tokens, got"),
        (["bench", "--dtype", "int3"], 2, "must be float32, bfloat16 or float16, got 'int3'"),
        (["bench", "--model", "MODEL", "-t", "4000"], 1, "the model reads 2048 tokens, got 4000"),
        (["inspect", "missing"], 1, "No such file"),
        (["generate", "a", "--only-read"], 2, "needs --save"),
        (["generate", "a", "--load", "missing"], 1, "missing must be a prompt cache, got no such file"),
        (["generate", "", "--model", "MODEL"], 1, "at least one token that is not in the cache, got none"),
        (["generate", "a", "--model", "MODEL", "-n", "9000"], 1, "must fit the 2048 tokens"),
        (["generate", "a", "--model", "missing.gguf"], 1, "missing.gguf must be a GGUF file"),
        (["chat", "--device", "warp"], 2, "must be a device of this machine"),
    ],
)
def test_what_cannot_be_done_is_said(folder: Path, arguments: list[str], code: int, message: str) -> None:
    filled = [str(folder) if argument == "MODEL" else argument for argument in arguments]
    got, _, error = run(*filled, *(["--device", "cpu"] if "MODEL" in arguments else []))
    assert message in " ".join(error.replace("│", " ").split())
    assert got == code
    assert "Traceback" not in error


@pytest.mark.skipif(find_spec("datasets") is not None, reason="datasets is installed")
def test_a_missing_package_is_named_with_its_extra(folder: Path) -> None:
    code, _, error = run("eval", "--model", str(folder), "--dataset", "owner/name:text", "--device", "cpu")
    assert code == 1
    assert "Install it: pip install '.[eval]' in a clone of quantcache." in error


def test_figures_name_the_machine(folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    about = terminal.machine(model, "tiny")
    assert about["versions"]["torch"] == torch.__version__
    assert about["dtype"] == "float32"


def interrupt_after(tokens: int, monkeypatch: pytest.MonkeyPatch, again: bool = False) -> None:
    """Have Ctrl-C pressed when an answer has so many tokens, and once more at the next one."""
    put = terminal.AnswerStream.put

    def pressing(self: terminal.AnswerStream, value: torch.Tensor) -> None:
        put(self, value)
        if len(self.ids) == tokens or (again and len(self.ids) == tokens + 1):
            signal.raise_signal(signal.SIGINT)
            if again:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(terminal.AnswerStream, "put", pressing)


@pytest.mark.parametrize("again", [False, True])
def test_an_interrupt_ends_the_answer_and_saves_what_has_come(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    interrupt_after(20, monkeypatch, again)
    file, before = tmp_path / "a.safetensors", signal.getsignal(signal.SIGINT)
    arguments = ("generate", "abc " * 40, "--model", str(folder), "--device", "cpu", "-n", "500", "--save", str(file))
    code, _, notes = run(*arguments)
    assert code == 130
    (came,) = map(int, re.findall(r"answer: (\d+) tokens", notes))
    assert came in (20, 21), "that of the step at work may still come"
    assert "interrupted" in notes
    loaded = QuantizedInt8Cache.load(file)
    assert loaded.input_ids is not None
    assert loaded.input_ids.shape == (1, 160 + came)
    assert loaded.get_seq_length() == 160 + came
    assert signal.getsignal(signal.SIGINT) == before


def test_a_chat_goes_on_after_an_interrupt(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(15, monkeypatch)
    file = tmp_path / "talk.safetensors"
    arguments = ("chat", "--model", str(folder), "--device", "cpu", "-n", "300", "--save", str(file))
    code, _, notes = run(*arguments, stdin="one\ntwo\n/regen\n/help\n/save\n")
    assert code == 0
    assert len(re.findall(r"answer: 1[56] tokens, .*interrupted", notes)) == 3
    assert "/regen" in notes
    assert "/save must be followed by the name of a file" in notes
    loaded = QuantizedInt8Cache.load(file)
    text = bytes_of(folder, loaded.input_ids)
    assert text.startswith("<user>one\n<assistant>")
    assert text.count("<user>two\n<assistant>") == 1, "the answer that was taken back is gone"
    assert loaded.input_ids is not None
    assert loaded.input_ids.shape[1] == loaded.get_seq_length()


def test_what_a_failing_turn_has_said_is_saved(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "talk.safetensors"
    monkeypatch.setattr(talking.Talk, "answer_again", lambda self: {}["a bug"])
    arguments = ["chat", "--model", str(folder), "--device", "cpu", "-n", "5", "--save", str(file)]
    result = CliRunner().invoke(app, arguments, input="one\n/regen\n")
    assert isinstance(result.exception, KeyError)
    assert bytes_of(folder, QuantizedInt8Cache.load(file).input_ids).startswith("<user>one\n")


@pytest.mark.parametrize("kind", ["int8", "default", "static"])
def test_an_answer_ends_before_a_stop_text(folder: Path, kind: str) -> None:
    model = ("--model", str(folder), "--device", "cpu", "--cache", kind, "--dtype", "float32", "--attn", "sdpa")
    whole = run("generate", "abc", *model, "-n", "40")[1].rstrip("\n")
    stop = whole[10:12]
    code, cut, notes = run("generate", "abc", *model, "-n", "40", "--stop", stop)
    assert code == 0
    assert cut.rstrip("\n") == whole[: whole.index(stop)]
    assert "tokens/s" in notes
    assert "peak memory" in notes
    assert ("int8 begins at 96 tokens" in notes) == (kind == "int8")


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "a", "--save", "FOLDER/none/a.safetensors"],
        ["generate", "a", "--save", "FOLDER"],
        ["chat", "--save", "FOLDER/none/a.safetensors"],
        ["plan", "Qwen3-8B", "--plot", "FOLDER/none/a.png"],
        ["eval", "--plot", "FOLDER/none/a.png"],
        ["eval", "--text", "FOLDER/missing.txt"],
        ["eval", "--caches", "int3"],
    ],
)
def test_files_are_looked_at_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(terminal, "load_model", load)
    code, _, error = run(*(argument.replace("FOLDER", str(tmp_path)) for argument in arguments))
    assert code in (1, 2)
    words = " ".join(error.replace("│", " ").split())
    assert "must be" in words or "is a directory" in words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "a", "--cache", "int3"], "must be int8, default or static, got 'int3'"),
        (["chat", "--cache", "default", "--save", "a"], "must be int8 for --load and --save, got 'default'"),
        (["generate", "a", "--system", "b"], "needs --chat"),
        (["plan", "Qwen3-8B", "--tokens", "0"], "must be a number of tokens from 1, as 8192 or 8k"),
        (["plan", "Qwen3-8B", "--gpu", "h10"], "Is it h100 or h200?"),
        (["plan", "Qwen3-8B", "--prompt-len", "2k"], "needs --requests"),
        (["plan", "Qwen3-8B", "--requests", "2", "--tokens", "2k"], "is for one batch; requests have --prompt-len"),
        (["plan", "Qwen3-8B", "--requests", "2", "--prompt-len", "no"], "must be a number of tokens from 1"),
    ],
)
def test_wrong_choices_are_refused(arguments: list[str], message: str) -> None:
    code, _, error = run(*arguments)
    assert code == 2
    assert message in " ".join(error.replace("│", " ").split())


def test_near_misses_of_presets_are_named() -> None:
    assert "Is it Llama-3.1-8B or " in run("plan", "Llama-3.1-8")[2]


def test_a_plan_takes_numbers_as_people_write_them() -> None:
    plans = [
        json.loads(run("plan", "Llama-3.1-8B", "--json", "--tokens", tokens, *gpu)[1])
        for tokens, *gpu in (("8k", "--gpu", "2x80GB"), ("8,192", "--gpu", "80GB", "--gpus", "2"))
    ]
    assert plans[0] == plans[1]
    assert (plans[0]["tokens"], plans[0]["gpu_nbytes"]) == (8192, 160 * 10**9)


def test_a_plan_of_requests_counts_blocks() -> None:
    requests = ("--requests", "64", "--prompt-len", "2k", "--new-tokens", "128")
    code, output, _ = run("plan", "Qwen2.5-7B", "--gpu", "24GB", *requests)
    assert code == 0
    assert "blocks of a request" in output
    assert "all 64?" in output
    planned = json.loads(run("plan", "Qwen2.5-7B", "--gpu", "24GB", *requests, "--json")[1])
    assert (planned["int8_blocks"], planned["int8"]["tokens"], len(planned["fits"])) == (35, 64, 6)
    assert "what fits" not in run("plan", "Qwen2.5-7B", *requests)[1]
    code, _, error = run("plan", "gemma-3-27b", *requests)
    assert (code, error.count("every layer of gemma-3-27b must be full attention")) == (1, 1)


def test_an_unreachable_hub_is_named_once_and_soon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for command, is_offline in ((["generate", "a", "--model"], "0"), (["plan"], "")):
        monkeypatch.setenv("HF_HUB_OFFLINE", is_offline)
        code, output, error = run(*command, "owner/model-that-is-not-here")
        assert (code, output) == (1, "")
        assert error.count("cannot be reached") == 1
        assert len(error.splitlines()) == 1


def test_a_silent_hub_is_waited_for_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that takes connections and says nothing: a model in its cache is used, and that is said."""
    monkeypatch.setattr(hub, "REACH_SECONDS", 0.2)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        monkeypatch.setenv("HF_HUB_OFFLINE", "")
        with pytest.raises(hub.UnreachableError, match=r"'owner/model' must be .* \(no answer in 0\.2 s\)"):
            hub.look_for("owner/model")
        assert not capsys.readouterr().err
        hub.look_for("owner/model")  # which is known to be in vain
        repository = tmp_path / "models--owner--model"
        snapshot = repository / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
        monkeypatch.setenv("HF_HUB_OFFLINE", "")
        hub.look_for("owner/model")
        said = capsys.readouterr().err
        assert said == f"{endpoint} cannot be reached (no answer in 0.2 s): taking owner/model from the hub's cache\n"


def test_messages_do_not_name_functions(folder: Path) -> None:
    for arguments in (["plan", "nonsense"], ["generate", "a", "--model", "missing.gguf"], ["eval", "--caches", "int9"]):
        error = run(*arguments)[2]
        assert "find_geometry" not in error
        assert "load_model" not in error
        assert "check_names" not in error


def test_a_model_without_a_chat_template_is_said_to_be_one(folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(folder, base, ignore=shutil.ignore_patterns("chat_template*"))
    code, _, notes = run("chat", "--model", str(base), "--device", "cpu", "-n", "3", stdin="one\n")
    assert code == 0
    assert notes.count("no chat template") == 1


def test_a_processor_without_units_computes_in_float32(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LlamaForCausalLM.from_pretrained(folder).to(torch.bfloat16).save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(tmp_path)
    arguments = ("generate", "a", "--model", str(tmp_path), "--device", "cpu", "-n", "2")
    for has, dtype in ((frozenset({"amx_bf16"}), "bfloat16"), (frozenset({"avx2"}), "float32")):
        monkeypatch.setattr(processor, "features", lambda has=has: has)
        notes = run(*arguments)[2]
        assert f"in {dtype} on cpu" in notes
        assert ("has no units for bfloat16" in notes) == (dtype == "float32")


def test_inspect_fits_a_terminal(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    run("generate", "abc " * 40, "--model", str(folder), "--device", "cpu", "-n", "3", "--save", str(file))
    lines = CliRunner().invoke(app, ["inspect", str(file)], env={"COLUMNS": "80"}).stdout.splitlines()
    assert any(line.split()[:3] == ["0", "to", "1"] for line in lines)
    assert max(map(len, lines)) <= 80
