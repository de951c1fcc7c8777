"""Qwen v1 checkpoints as released: what runs, what is understood, what is refused and what is saved."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from quantcache import QuantizedInt8Cache
from quantcache.adapters.qwen import QWenConfig, QWenLMHeadModel
from quantcache.backends import dispatch
from quantcache.layers._host import cache_of
from tests.qwen_checkpoint import HIDDEN, VOCAB, write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("qwen") / "checkpoint")


@pytest.fixture(scope="module")
def model(folder: Path) -> QWenLMHeadModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def hub(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint in a hub's cache, as a download of Qwen/Qwen-7B-Chat would leave it."""
    cache = tmp_path_factory.mktemp("hub")
    repository = cache / "models--Qwen--Qwen-7B-Chat"
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    return cache


@pytest.mark.parametrize("trust", [None, False, True])
@pytest.mark.parametrize("place", ["folder", "hub id"])
def test_the_original_snippet_runs(folder: Path, hub: Path, trust: bool | None, place: str) -> None:
    """The three lines of the original, auto_map notwithstanding, chat from the int8 cache."""
    name, options = str(folder), {"trust_remote_code": trust}
    if place == "hub id":
        name, options = "Qwen/Qwen-7B-Chat", {"trust_remote_code": trust, "cache_dir": hub, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    model = AutoModelForCausalLM.from_pretrained(
        name, device_map="auto", use_cache_quantization=True, use_cache_kernel=True, use_flash_attn=False, **options
    ).eval()
    response, history = model.chat(tokenizer, "Hello!", history=None)
    assert type(model) is QWenLMHeadModel
    assert history == [("Hello!", response)]
    again, longer = model.chat(tokenizer, "And?", history=history)
    assert history == [("Hello!", response)]
    assert longer == [("Hello!", response), ("And?", again)]
    output = model.generate(torch.tensor([[1, 2, 3]]), return_dict_in_generate=True)
    assert isinstance(cache_of(output), QuantizedInt8Cache)


def test_saving_writes_the_original_names(folder: Path, model: QWenLMHeadModel, tmp_path: Path) -> None:
    """A save and a load give back every name and value, and no auto_map."""
    model.save_pretrained(tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("hello<|im_end|>")["input_ids"] == tokenizer("hello<|im_end|>")["input_ids"]


def test_first_release_names_are_understood(folder: Path, model: QWenLMHeadModel, tmp_path: Path) -> None:
    """n_embd and its like describe the same model; buffers that old files carry are passed over."""
    write_checkpoint(tmp_path, {**load_file(folder / "model.safetensors"),
                                "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
                                "transformer.h.0.attn.rotary_emb.inv_freq": torch.ones(8)})  # fmt: skip
    described = json.loads((folder / "config.json").read_text())
    names = {
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
        "intermediate_size": "ffn_hidden_size",
    }
    old = {names.get(key, key): value for key, value in described.items()}
    old |= {"n_positions": 8192, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "n_inner": None, "apply_residual": False}
    (tmp_path / "config.json").write_text(json.dumps(old))
    again, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not loading["unexpected_keys"]
    assert not loading["missing_keys"]
    assert (again.config.n_embd, again.config.hidden_size, again.config.max_position_embeddings) == (
        HIDDEN,
        HIDDEN,
        8192,
    )
    ids = torch.randint(0, VOCAB, (1, 20))
    assert torch.equal(again.eval()(ids).logits, model(ids).logits)


@pytest.mark.parametrize("key", ["visual", "audio"])
@pytest.mark.parametrize("trust", [None, True])
def test_models_that_see_or_hear_are_refused_by_name(tmp_path: Path, key: str, trust: bool | None) -> None:
    """They share the model_type; their own code is not run either."""
    write_checkpoint(tmp_path, **{key: {"width": 16}})
    with pytest.raises(ValueError, match=rf"QWenConfig: .* got the key '{key}' of Qwen-VL or Qwen-Audio"):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=trust)


def test_dtype_switches_of_the_original_are_understood(folder: Path, tmp_path: Path) -> None:
    """bf16=True and its like, in the file or as arguments; dtype goes before them, and two of them are refused."""

    def dtype(path: Path, **options: object) -> torch.dtype:
        return AutoModelForCausalLM.from_pretrained(path, **options).dtype

    assert dtype(folder) == torch.float32
    assert dtype(folder, bf16=True) == torch.bfloat16
    assert dtype(folder, fp16=True) == torch.float16
    assert dtype(folder, bf16=True, dtype=torch.float32) == torch.float32
    write_checkpoint(tmp_path, bf16=True)
    assert dtype(tmp_path) == torch.bfloat16
    assert dtype(tmp_path, fp32=True) == torch.float32
    with pytest.raises(ValueError, match="only one of bf16, fp16 and fp32 may be true, got bf16 and fp16"):
        QWenConfig(seq_length=16, bf16=True, fp16=True)


@pytest.mark.parametrize("kernel", [True, False, None])
def test_the_kernel_is_a_choice_that_never_fails(folder: Path, tmp_path: Path, kernel: bool | None) -> None:
    """False reads with plain torch, True and None with the best there is; nobody is warned of what he asked for."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_cache_quantization=True, use_cache_kernel=kernel
    ).eval()
    ids = torch.randint(0, VOCAB, (1, 150))
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 3}
    cache = cache_of(model.generate(ids, return_dict_in_generate=True, **options))
    # What the original saves has all its defaults written out, which nobody chose.
    assert AutoConfig.from_pretrained(write_checkpoint(tmp_path, use_cache_kernel=False)).use_cache_kernel is None
    best = dispatch.choose_backend(torch.device("cpu"))
    assert cache.report().backend == ("torch" if kernel is False else best)


def test_a_model_without_a_training_length_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.seq_length must be the training length in tokens, got None"):
        QWenLMHeadModel(QWenConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, kv_channels=16))


def test_only_the_adapter_registers_and_nothing_is_patched() -> None:
    """Importing quantcache leaves "qwen" unknown; importing the adapter makes it known, quietly, and wraps nothing."""
    program = """
        import transformers
        from transformers import AutoConfig, CONFIG_MAPPING
        from transformers.modeling_utils import AttentionInterface
        before = dict(AttentionInterface._global_mapping)
        import quantcache
        quantcache.QuantizedInt8Cache
        assert "qwen" not in CONFIG_MAPPING
        import quantcache.adapters.qwen
        assert "qwen" in CONFIG_MAPPING
        assert dict(AttentionInterface._global_mapping) == before
    """
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:quantcache", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_the_documentation_runs(hub: Path, tmp_path: Path) -> None:
    """Every block of the page about moving, in its order, against the checkpoint; but for the one of several GPUs."""
    page = (Path(__file__).parent.parent / "docs" / "moving-from-use-cache-quantization.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    runnable = [block for block in blocks if "DistributedConfig" not in block]
    assert len(runnable) == len(blocks) - 1 >= 6
    runnable[0] = "import quantcache.adapters.qwen"  # what was before it no longer runs
    program = tmp_path / "page.py"
    program.write_text("\n".join([*runnable, "assert len(answers) == 3 and response == history[0][1]"]))
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:quantcache", str(program)],
        env={**os.environ, "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "key-value cache" in done.stdout
