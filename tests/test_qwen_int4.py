"""GPTQ checkpoints of Qwen v1 without gptqmodel: packed layers, the int8 cache on top, and what both weigh."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from quantcache import QuantizedInt8Cache
from quantcache.adapters.qwen import QWenConfig, QWenLMHeadModel, gptq, memory_report
from quantcache.adapters.qwen.gptq import GPTQFallbackConfig, GPTQLinear
from quantcache.layers._host import cache_of
from tests.qwen_checkpoint import SEQ_LENGTH, VOCAB, float_weights, gptq_weights, pack_linear, write_checkpoint


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A GPTQ checkpoint and the float one that it stands for."""
    base = tmp_path_factory.mktemp("int4")
    packed, restored = gptq_weights(float_weights())
    return write_checkpoint(base / "int4", packed, gptq=True), write_checkpoint(base / "float", restored)


@pytest.fixture(autouse=True)
def without_gptqmodel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "gptqmodel_is_there", lambda: False)


def load(folder: Path, **options: object) -> QWenLMHeadModel:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("inputs", [32, 40])
def test_a_packed_layer_is_the_layer_it_stands_for(bits: int, in_order: bool, symmetric: bool, inputs: int) -> None:
    """Both widths, activation order, zero points of every group, and a last group that is not full."""
    g_idx = torch.arange(inputs) // 16
    if not in_order:
        g_idx = g_idx[torch.randperm(inputs)]
    buffers, weight = pack_linear(torch.randn(24, inputs), bits, 16, symmetric, g_idx)
    layer = GPTQLinear(inputs, 24, GPTQFallbackConfig(bits=bits, group_size=16))
    layer.load_state_dict({**buffers, "bias": torch.arange(24).half()})
    assert torch.equal(layer.restore(0, 24, torch.float32), weight.T)
    states = torch.randn(2, 3, inputs)
    expected = functional.linear(states, weight, torch.arange(24).float())
    torch.testing.assert_close(layer(states), expected, atol=1e-5, rtol=1e-5)


def test_other_weights_are_read_as_they_are_packed() -> None:
    layer = GPTQLinear(32, 24, GPTQFallbackConfig(group_size=16))
    for symmetric, order in ((True, torch.arange(32)), (False, torch.randperm(32)), (True, torch.arange(32))):
        buffers, weight = pack_linear(torch.randn(24, 32), 4, 16, symmetric, order // 16)
        layer.load_state_dict({**buffers, "bias": torch.zeros(24).half()})
        assert torch.equal(layer.restore(0, 24, torch.float32), weight.T)


def test_a_wide_layer_is_restored_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    buffers, weight = pack_linear(torch.randn(40, 32), symmetric=False)
    layer = GPTQLinear(32, 40, GPTQFallbackConfig(group_size=16))
    layer.load_state_dict({**buffers, "bias": torch.zeros(40).half()})
    states = torch.randn(5, 32)
    monkeypatch.setattr(gptq, "BLOCK_ELEMENTS", 32 * 16)
    torch.testing.assert_close(layer(states), states @ weight.T, atol=1e-5, rtol=1e-5)


def test_zero_points_of_the_second_format_are_stored_as_they_are() -> None:
    buffers, weight = pack_linear(torch.randn(8, 16))
    buffers["qzeros"] = buffers["qzeros"] + 0x11111111
    layer = GPTQLinear(16, 8, GPTQFallbackConfig(group_size=16, checkpoint_format="gptq_v2"))
    layer.load_state_dict({**buffers, "bias": torch.zeros(8).half()})
    assert torch.equal(layer.restore(0, 8, torch.float32), weight.T)


@torch.no_grad()
def test_an_int4_checkpoint_gives_the_logits_of_its_float_model(folders: tuple[Path, Path]) -> None:
    """To float32 rounding in float32; within float16 rounding in the float16 that the files ask for."""
    ids = torch.randint(0, VOCAB, (2, 3 * SEQ_LENGTH))
    expected = load(folders[1]).forward(ids).logits
    model = load(folders[0], dtype=torch.float32)
    assert sum(isinstance(module, GPTQLinear) for module in model.modules()) == 10
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
    half = load(folders[0])
    assert half.dtype == torch.float16
    assert {buffer.dtype for name, buffer in half.named_buffers() if name.endswith("scales")} == {torch.float16}
    assert (half(ids).logits.float() - expected).norm() / expected.norm() < 0.02


def test_int4_weights_and_the_int8_cache_work_together(folders: tuple[Path, Path]) -> None:
    """The whole snippet on an Int4 checkpoint; the report adds up what is held."""
    model = load(folders[0], dtype=torch.float32, use_cache_quantization=True, seq_length=4096)
    ids = torch.randint(0, VOCAB, (1, 150))
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 20, "eos_token_id": None}
    output = model.generate(ids, return_dict_in_generate=True, output_logits=True, **options)
    cache = cache_of(output)
    assert isinstance(cache, QuantizedInt8Cache)
    assert all(layer.pages.num_pages for layer in cache.layers)
    exact = model(output.sequences, past_key_values=DynamicCache()).logits[:, 149:-1].double().log_softmax(-1)
    int8 = torch.stack(output.logits, dim=1).double().log_softmax(-1)
    assert 0 < (exact.exp() * (exact - int8)).sum(-1).mean() <= 3e-3

    report = memory_report(model, cache)
    assert report.cache == cache.nbytes
    assert report.packed_weights == sum(b.nbytes for n, b in model.named_buffers() if ".h." in n)
    assert report.total == report.cache + sum(t.nbytes for t in model.state_dict().values())
    assert f"{report.total:,}" in str(report)
    # 4 bits a weight; scales, zero points and order of groups of 16 and the biases are the rest.
    linears = 2 * (4 * 32 * 32 + 3 * 24 * 32)
    assert linears // 2 < report.packed_weights < linears


def test_saving_gives_back_a_gptq_checkpoint(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Every name and value of the file, and a config that any GPTQ reader understands."""
    load(folders[0]).save_pretrained(tmp_path)
    before, after = load_file(folders[0] / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (saved["quant_method"], saved["bits"], saved["desc_act"]) == ("gptq", 4, False)
    ids = torch.randint(0, VOCAB, (1, 9))
    assert torch.equal(load(tmp_path)(ids).logits, load(folders[0])(ids).logits)


def test_gptqmodel_is_used_where_it_is(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The config then stays GPTQ, which transformers itself takes to gptqmodel."""
    monkeypatch.setattr(gptq, "gptqmodel_is_there", lambda: True)
    assert AutoConfig.from_pretrained(folders[0]).quantization_config["quant_method"] == "gptq"
    monkeypatch.setattr(gptq, "gptqmodel_is_there", lambda: False)
    assert AutoConfig.from_pretrained(folders[0]).quantization_config["quant_method"] == gptq.METHOD


def test_a_broken_gptqmodel_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed but not importable: a warning says why, and the layers run in plain torch."""
    monkeypatch.undo()
    found = importlib.util.find_spec("json")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.warns(UserWarning, match=r"gptqmodel is installed but cannot be imported \(ModuleNotFoundError: .*opt"):
        assert not gptq.gptqmodel_is_there()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found if name == "gptqmodel" else None)
    assert not gptq.gptqmodel_is_there()


def test_a_float_model_passes_over_the_biases_of_gptq_files(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """gptqmodel's layers have none where the model has none; the files have zeros there."""
    weights = load_file(folders[1] / "model.safetensors")
    weights["transformer.h.0.mlp.w1.bias"] = torch.zeros(24)
    write_checkpoint(tmp_path, weights)
    _, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["unexpected_keys"]


def test_what_only_gptqmodel_reads_is_refused_by_name() -> None:
    quantization = {"quant_method": "gptq", "bits": 3, "group_size": 128}
    with pytest.raises(NotImplementedError, match=r"must have 4 or 8 bits .* got 3 bits in 'gptq'\. Install gptqmodel"):
        QWenConfig(seq_length=16, quantization_config=quantization)
    other = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert QWenConfig(seq_length=16, quantization_config=other).quantization_config == other
