"""Tensor parallelism over two processes: whole heads on each rank, the answers of one process, files of any of them."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from quantcache import QuantizedInt8Cache
from quantcache.files import fingerprint
from tests.file_cases import SIZES, prompt
from tests.parallel_program import MODES, described, generated, runs, stored_on_host
from tests.processes import ROOT, launch, skip_below_two_gpus

MODELS: dict[str, tuple[Any, Any]] = {
    # Whose plan gives each rank its share of the KV heads, and whose plan gives each all of them.
    "llama": (LlamaForCausalLM, LlamaConfig),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config),
}
VOCAB = 98  # older transformers share it among the ranks evenly
HEADS = {"llama": 1, "olmo2": 2}
"""Of the two KV heads, those that each of two ranks holds."""


CONFIG = {**SIZES, "hidden_size": 64, "vocab_size": VOCAB}
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, skip_below_two_gpus])]


def checkpoints(folder: Path, device: str) -> dict[str, PreTrainedModel]:
    made = {}
    for name, (model_class, config_class) in MODELS.items():
        torch.manual_seed(1)
        model_class(config_class(**CONFIG)).save_pretrained(folder / name)
        made[name] = model_class.from_pretrained(folder / name, dtype=torch.float32).eval().to(device)
    return made


class Both:
    """What one process and what two gave, for one model."""

    def __init__(self, name: str, folder: Path, alone: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
        self.name, self.folder, self.alone = name, folder, alone
        self.ranks = [rank[name] for rank in ranks]

    def local(self, stored: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
        """That rank's heads of the tensors of a whole cache."""
        heads = HEADS[self.name]
        first = rank * heads if heads == 1 else 0
        return {name: tensor.narrow(1 if name.endswith("tail") else 2, first, heads) for name, tensor in stored.items()}


@pytest.fixture(scope="module", params=DEVICES)
def all_runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Both]:
    """Every model in one process and in two, once for the tests of this module."""
    folder = tmp_path_factory.mktemp("parallel")
    ids = prompt(150, batch=2)
    torch.save(ids, folder / "ids.pt")
    alone: dict[str, Any] = {}
    with torch.no_grad():
        for name, model in checkpoints(folder, request.param).items():
            cache = QuantizedInt8Cache()
            sequences = generated(model, ids, cache)
            cache.save(folder / f"{name}.one.safetensors", model, sequences)
            alone[name] = {"model": model, "runs": runs(model, ids), "sequences": sequences, **described(cache)}
            loaded = QuantizedInt8Cache.load(folder / f"{name}.one.safetensors", model)
            alone[name]["continued"] = generated(model, sequences, loaded)
    launch(ROOT / "tests" / "parallel_program.py", folder, *MODELS, device=request.param)
    ranks = [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]
    return {name: Both(name, folder, alone[name], ranks) for name in MODELS}


@pytest.fixture(params=MODELS)
def both(request: pytest.FixtureRequest, all_runs: dict[str, Both]) -> Both:
    return all_runs[request.param]


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_give_the_tokens_of_one_process(both: Both, mode: str) -> None:
    """With a float32 model, whose sums in another order move no token; compiled as far as transformers' own cache."""
    for rank in both.ranks:
        assert torch.equal(rank["runs"][mode], both.alone["runs"][mode])


def test_each_rank_holds_and_counts_its_own_heads(both: Both) -> None:
    """Rows and bytes are those of the rank; every rank's pages are int8, as many as one process has."""
    for rank in both.ranks:
        cache = rank["cache"]
        assert {tensor.shape[1] for name, tensor in cache["stored"].items() if name.endswith("tail")} == {
            HEADS[both.name]
        }
        assert cache["nbytes"] == sum(row[2] for row in cache["rows"])
        assert cache["nbytes"] == both.alone["nbytes"] * HEADS[both.name] // 2
        assert [row[:2] for row in cache["rows"]] == [row[:2] for row in both.alone["rows"]]
        assert {row[3] for row in cache["rows"]} <= {"cpu", "torch", "cuda decode"}
        assert cache["stored"]["0.key_qdata"].shape[0] == both.alone["stored"]["0.key_qdata"].shape[0] > 0


def test_two_ranks_write_the_file_of_one_process(both: Both) -> None:
    """It holds the ranks' bytes, head by head, and loads in one process, which goes on as both ranks do."""
    loaded = QuantizedInt8Cache.load(both.folder / f"{both.name}.two.safetensors", both.alone["model"])
    whole = stored_on_host(loaded)
    for number, rank in enumerate(both.ranks):
        for name, tensor in both.local(whole, number).items():
            assert torch.equal(tensor, rank["cache"]["stored"][name]), name
    assert {name: tensor.shape for name, tensor in whole.items()} == {
        name: tensor.shape for name, tensor in both.alone["stored"].items()
    }
    assert torch.equal(loaded.input_ids, both.alone["sequences"][:, :-1])
    continued = generated(both.alone["model"], both.alone["sequences"], loaded)
    for rank in both.ranks:
        assert torch.equal(rank["continued"], continued)


def test_a_cache_of_fixed_capacity_is_saved_by_two_ranks_too(both: Both) -> None:
    loaded = QuantizedInt8Cache.load(both.folder / f"{both.name}.static.safetensors", both.alone["model"])
    for number, rank in enumerate(both.ranks):
        for name, tensor in both.local(stored_on_host(loaded), number).items():
            assert torch.equal(tensor, rank["static"]["stored"][name]), name


def test_what_two_ranks_saved_they_load_again(both: Both) -> None:
    for rank in both.ranks:
        for name, tensor in rank["cache"]["stored"].items():
            assert torch.equal(rank["loaded"]["stored"][name], tensor), name


@pytest.mark.parametrize("mmap", [False, True])
def test_each_of_two_ranks_loads_its_heads_of_a_file_of_one_process(both: Both, mmap: bool) -> None:
    part = QuantizedInt8Cache.load(both.folder / f"{both.name}.one.safetensors", both.alone["model"], max_tokens=140)
    for number, rank in enumerate(both.ranks):
        found = rank[f"of one, mmap={mmap}"]["stored"]
        for name, tensor in both.local(stored_on_host(part), number).items():
            assert torch.equal(found[name], tensor), name
        assert torch.equal(rank["continued of one"], both.alone["continued"])


def test_the_digest_of_shared_weights_is_that_of_whole_ones(both: Both) -> None:
    """The file names it, so that loading it compares the weights, in one process and in two."""
    for rank in both.ranks:
        assert rank["digest"] == fingerprint.weights_digest(both.alone["model"])


def test_a_save_that_fails_on_one_rank_fails_on_all(both: Both) -> None:
    """And what they do next still works, which the later results show."""
    for number, rank in enumerate(both.ranks):
        seen = rank["failures"]
        assert "FileNotFoundError" in seen["no folder"]
        assert seen["no folder"].startswith("FileNotFoundError" if number == 0 else "OSError: QuantizedInt8Cache.save")
        assert "among several processes the model must be given" in seen["no model"]
        assert "got model=None in one of 2. Pass model=..., on every rank." in seen["no model"]
        assert seen["other tokens"].startswith("ValueError: QuantizedInt8Cache.save: every rank must hold the same")
        assert "int8 layers must hold the same tokens, at least one" in seen["one empty"]
    assert not (both.folder / "file").exists()


def test_the_example_runs_by_heads_and_by_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both print the same answer, and load each other's file."""
    checkpoints(tmp_path, "cpu")
    words = {f"w{index}": index for index in range(VOCAB)}
    core = Tokenizer(WordLevel(words, unk_token="w0"))
    core.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(tmp_path / "llama")
    prompt_text = " ".join(f"w{index % VOCAB}" for index in range(130))
    arguments = [str(tmp_path / "llama"), "--prompt", prompt_text, "--new-tokens", "8"]
    example = ROOT / "examples" / "several_gpus.py"
    by_heads = launch(example, *arguments, "--tp", "--save", tmp_path / "file")
    monkeypatch.setattr("sys.argv", [str(example), *arguments])
    runpy.run_path(str(example), run_name="__main__")
    by_layers = capsys.readouterr().out.splitlines()
    assert by_layers[0] in by_heads
    assert by_layers[0].startswith(prompt_text)
    assert len(by_layers[0].split()) == 138
    assert by_heads.count("of int8 cache on cpu, read by") == 2
    model = LlamaForCausalLM.from_pretrained(tmp_path / "llama")
    assert QuantizedInt8Cache.load(tmp_path / "file", model).get_seq_length() == 137


def test_the_benchmark_fills_every_cell(tmp_path: Path) -> None:
    """On a CPU, with a tiny model; what fails or takes too long would be null with a reason."""
    program = ROOT / "tests" / "benchmarks" / "bench_parallel.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # The rows of one process come first; they are short of nothing that those of two do not need, too.
    command = [sys.executable, str(program), "--tiny", "--device", "cpu", "--out", str(tmp_path / "out.json")]
    rows = ["--rows", "split/tiny", "tp/tiny/int8"]
    subprocess.run([*command, *rows], env=environment, check=True, timeout=300, capture_output=True)
    report = json.loads((tmp_path / "out.json").read_text())
    assert [len(row["ms"]) for row in report["rows"]] == [2, 2]
    for row in report["rows"]:
        assert row["why"] == {}
        assert all(row["tokens_per_s"].values())
        assert 0 < row["logits_error"] < 0.25
