"""Which kernel reads a call, for every GPU, mask, head ratio, dtype and head_dim? A stand-in for the driver tells."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from quantcache import QuantizedInt8Cache
from quantcache.layers._host import cache_argument
from tests import emulated_cuda

CONTEXT = 150

MASKS = ("none", "bool", "left padding", "lowest", "-inf")


def mask_of(kind: str, query_len: int, dtype: torch.dtype) -> torch.Tensor | None:
    kv_len = CONTEXT + query_len
    seen = torch.ones(query_len, kv_len, dtype=torch.bool).tril(CONTEXT).expand(2, 1, -1, -1).clone()
    if kind == "none":
        return None
    if kind == "left padding":
        seen[1, :, :, :70] = False
    if kind in ("bool", "left padding"):
        return seen
    hidden = -torch.inf if kind == "-inf" else torch.finfo(dtype).min
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, hidden)


def expected(rows: int, dtype: torch.dtype) -> str:
    """The kernel for so many query rows for each KV head; float32, which tensor cores lack, has one for any number."""
    return "prefill" if rows > 64 and dtype != torch.float32 else "attention"


@pytest.mark.parametrize("arch", emulated_cuda.GENERATIONS)
@pytest.mark.parametrize("head_dims", [(64, 64), (80, 80), (128, 128), (192, 128), (256, 256)], ids=str)
def test_every_call_reads_the_bytes_by_the_kernel_for_its_rows(
    arch: str, head_dims: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is restored, whatever torch's own attention would make of the call on this GPU."""
    launched = emulated_cuda.emulate(monkeypatch)
    emulated_cuda.become(monkeypatch, arch)
    module: Any = torch.nn.Module().eval()
    for dtype in (torch.bfloat16, torch.float16, torch.float32) if head_dims == (128, 128) else (torch.bfloat16,):
        for ratio, query_len in ((1, 1), (1, 65), (7, 9), (7, 10)):
            cache = QuantizedInt8Cache(strict=True)
            key, value = (torch.randn(2, 2, CONTEXT, width, dtype=dtype) for width in head_dims)
            cache.update(key, value, 0)
            module.is_causal, module.num_key_value_groups = True, ratio
            query = torch.randn(2, 2 * ratio, query_len, head_dims[0], dtype=dtype)
            pair = cache.update(key[:, :, :query_len], value[:, :, :query_len], 0)
            for kind in MASKS if query_len == 10 else MASKS[:1]:
                for name in ("sdpa", "eager", "flash_attention_2"):
                    mask = mask_of(kind, query_len, dtype)
                    is_float = mask is not None and mask.dtype != torch.bool
                    if name == "eager" and not is_float and mask is not None:
                        continue  # which no model passes it
                    if name.startswith("flash"):
                        if kind not in ("none", "left padding"):
                            continue
                        mask = None if mask is None else mask[:, 0, -1]
                    launched.clear()
                    function = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
                    output, _ = function(module, query, *pair, mask, scaling=0.1)
                    assert output.shape == (2, query_len, 2 * ratio, head_dims[1])
                    kernels = [kernel for kernel in launched if kernel in ("attention", "prefill")]
                    assert kernels == [expected(ratio * query_len, dtype)], (dtype, ratio, query_len, kind, name)
                    assert "restore" not in launched
                    report = cache.report().layers[0]
                    named = "cuda prefill" if kernels == ["prefill"] else "cuda decode"
                    assert (report.kernel, report.reason) == (named, None)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("capacity", [None, 400])
def test_a_second_turn_and_chunks_of_a_prompt_go_to_the_prefill_kernel(
    attention: str, capacity: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a cache that grows and in one of fixed capacity."""
    launched = emulated_cuda.emulate(monkeypatch)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=None, dtype=torch.bfloat16,
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config, attn_implementation=attention, dtype=torch.bfloat16).eval()
    cache = QuantizedInt8Cache(config, max_cache_len=capacity, strict=True)
    options: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "disable_compile": True, "pad_token_id": 0}
    ids = torch.randint(64, (2, 200))
    ids = model.generate(ids, **cache_argument(cache), prefill_chunk_size=100, **options)
    assert launched.count("prefill") == 2  # the second chunk, in each layer
    launched.clear()
    turn = torch.cat([ids, torch.randint(64, (2, 60))], dim=1)
    turn = model.generate(turn, **cache_argument(cache), **options | {"max_new_tokens": 1})
    assert launched.count("prefill") == 2
    report = cache.report()
    assert {layer.kernel for layer in report.layers} == {"cuda prefill"}
    assert report.backend == "cuda prefill"
    for shown in (str(report), report._repr_html_()):
        assert "cuda prefill" in shown
        assert "cuda decode" not in shown
    model.generate(turn, **cache_argument(cache), **options)
    assert "restore" not in launched
    assert {layer.kernel for layer in cache.report().layers} == {"cuda decode"}
