"""Does the comparison with llama.cpp run what it says, on the same weights, and check that it is the same model?"""

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf")


class Server:
    """Answers with the words it is given, as llama.cpp's server would."""

    def __init__(self, params: Any) -> None:
        self.params, self.asked = params, []
        self.told: dict = {"choices": [{"text": "blue"}]}

    def handle_completions(self, asked: dict) -> dict:
        self.asked.append(asked)
        return self.told


def params() -> types.SimpleNamespace:
    threads = {name: types.SimpleNamespace(n_threads=0) for name in ("cpuparams", "cpuparams_batch")}
    return types.SimpleNamespace(model=types.SimpleNamespace(path=""), **threads)


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    fake = types.SimpleNamespace(
        ggml_type=types.SimpleNamespace(GGML_TYPE_Q8_0="q8_0", GGML_TYPE_F16="f16"),
        llama_flash_attn_type=types.SimpleNamespace(LLAMA_FLASH_ATTN_TYPE_ENABLED="on"),
        CommonParams=params,
        Server=Server,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "xllamacpp", fake)
        patch.delitem(sys.modules, "tests.benchmarks.bench_llama_cpp", raising=False)
        from tests.benchmarks import bench_llama_cpp

        yield bench_llama_cpp
        sys.modules.pop("tests.benchmarks.bench_llama_cpp")


def test_the_server_has_the_cache_the_context_and_the_threads_that_are_said(bench: Any) -> None:
    asked = bench.llama_cpp(Path("weights.gguf"), bench.Q8_0, 256).params
    assert (asked.cache_type_k, asked.cache_type_v, asked.flash_attn_type) == ("q8_0", "q8_0", "on")
    assert (asked.n_ctx, asked.n_parallel) == (256, 1)
    assert asked.cpuparams.n_threads == torch.get_num_threads()


def test_the_prompt_is_read_before_the_clock_starts(bench: Any) -> None:
    server = Server(params())
    timed = bench.theirs(server, [1, 2, 3])
    assert [asked["n_predict"] for asked in server.asked] == [1]
    assert timed(7) > 0
    assert server.asked[-1]["n_predict"] == 7
    assert all(asked["prompt"] == [1, 2, 3] and asked["cache_prompt"] for asked in server.asked)


def test_another_model_and_a_refusal_are_errors(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Words:
        def __call__(self, text: str) -> types.SimpleNamespace:
            return types.SimpleNamespace(input_ids=[1, 2])

        def decode(self, ids: list[int]) -> str:
            return "blue" if ids == [7] else "red"

    server = Server(params())
    for answer, alike in (([7], True), ([8], False)):
        monkeypatch.setattr(bench, "our_answer", lambda *_, answer=answer: answer)
        if alike:
            bench.check_same_model(None, Words(), server)
        else:
            with pytest.raises(bench.WrongResultError, match=r"llama\.cpp must answer 'red', got 'blue'"):
                bench.check_same_model(None, Words(), server)
    server.told = {"error": "too long"}
    with pytest.raises(RuntimeError, match="too long"):
        bench.their_answer(server, [1], 1)


def test_float32_weights_are_those_of_the_packed_file(bench: Any, tmp_path: Path) -> None:
    weights = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    packed = tmp_path / "packed.gguf"
    writer = gguf.GGUFWriter(packed, "llama")
    writer.add_block_count(3)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("output.weight", gguf.quantize(weights, gguf.GGMLQuantizationType.Q8_0),
                      raw_dtype=gguf.GGMLQuantizationType.Q8_0)  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    before, after = (gguf.GGUFReader(file) for file in (packed, bench.with_float32_weights(packed, tmp_path)))
    for name in ("general.architecture", "llama.block_count", "tokenizer.ggml.tokens"):
        assert after.get_field(name).contents() == before.get_field(name).contents()
    (stored,), (restored,) = before.tensors, after.tensors
    assert restored.tensor_type == gguf.GGMLQuantizationType.F32
    assert np.array_equal(restored.data, gguf.dequantize(stored.data, stored.tensor_type))
