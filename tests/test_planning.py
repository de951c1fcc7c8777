"""Does the planner say before what a cache takes, and what fits, what is measured afterwards?"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from quantcache import QuantizedInt8Cache
from quantcache.backends.blocks import BlockLayout
from quantcache.layers._host import cache_argument
from quantcache.layers.native import layer_nbytes
from quantcache.planning import GIB, Geometry, GeometryError, find_geometry, plan, plan_requests, preset_names, sources
from quantcache.planning.serving import blocks
from quantcache.planning.sizes import exact_nbytes, int8_nbytes

TOLERANCE = 0.03
"""The promise; what is left of it below is a few bytes that transformers keeps beside states."""

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "head_dim": 32,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, wide heads": ("llama", {"head_dim": 96, "tie_word_embeddings": True}),
    "qwen2, window": ("qwen2", {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 2}),
    "mistral, large window": ("mistral", {"sliding_window": 1100}),
    "gemma3": ("gemma3_text", {"head_dim": 32, "sliding_window": 64}),
    "gpt-oss": ("gpt_oss", {"head_dim": 32, "sliding_window": 48, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek": ("deepseek_v3", {**LATENT, "q_lora_rank": 16, "n_group": 2, "topk_group": 1}),
    "deepseek-v2": ("deepseek_v2", {**LATENT, "q_lora_rank": None, "topk_method": "greedy"}),
    "qwen3-next": (
        "qwen3_next",
        {
            **LINEAR,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"] * 2}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "gpt2": ("gpt2", {"n_embd": 64, "n_head": 4, "n_layer": 4, "n_positions": 4096}),
}


def tiny(name: str) -> PreTrainedModel:
    model_type, changes = MODELS[name]
    torch.manual_seed(0)
    sizes = {"vocab_size": 97} if model_type == "gpt2" else SIZES
    config = AutoConfig.for_model(model_type, **{**sizes, **changes})
    return AutoModelForCausalLM.from_config(config).eval().to(torch.bfloat16)


def written_config(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    """The config as the hub would store it."""
    model.config.save_pretrained(folder)
    return {**json.loads((folder / "config.json").read_text()), "dtype": "bfloat16"}


@pytest.mark.filterwarnings("ignore::quantcache.FallbackWarning")  # latent attention has its own code
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_prediction_is_what_the_cache_takes(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    geometry = Geometry.from_config(written_config(model, tmp_path))
    for prompt, new_tokens in ((90, 3), (300, 40), (1500, 130)):
        caches = {"int8": QuantizedInt8Cache(model.config), "exact": DynamicCache(config=model.config)}
        ids = torch.randint(2, 90, (2, prompt + new_tokens))
        for cache in caches.values():
            model(ids[:, :prompt], **cache_argument(cache), use_cache=True)
        for position in range(prompt, prompt + new_tokens):
            model(ids[:, position : position + 1], **cache_argument(caches["int8"]), use_cache=True)
        model(ids[:, prompt : prompt + 1], **cache_argument(caches["exact"]), use_cache=True)
        measured = caches["int8"].nbytes
        predicted = int8_nbytes(geometry, 2, prompt + new_tokens, new_tokens)
        assert abs(predicted - measured) <= TOLERANCE * measured, (prompt, new_tokens)
        measured = sum(layer_nbytes(layer) for layer in caches["exact"].layers)
        assert abs(exact_nbytes(geometry, 2, prompt + 1) - measured) <= TOLERANCE * measured, prompt


@pytest.mark.parametrize("tokens", [1, 95, 96, 160, 4000])
@pytest.mark.parametrize("new_tokens", [0, 1, 200])
@pytest.mark.parametrize("residual_length", [0, 32, 100])
def test_every_page_and_every_spare_token_is_counted(tokens: int, new_tokens: int, residual_length: int) -> None:
    """Layers of int8 alone: equal to the byte."""
    model = tiny("llama")
    cache = QuantizedInt8Cache(model.config, residual_length=residual_length)
    prompt = max(1, tokens - new_tokens)
    states = torch.randn(2, 1, 2, tokens, 16).bfloat16()
    for layer_idx in range(4):
        cache.update(*states[:, :, :, :prompt], layer_idx)
        for position in range(prompt, tokens):
            cache.update(*states[:, :, :, position : position + 1], layer_idx)
    geometry = Geometry.from_config({**SIZES, "model_type": "llama", "dtype": "bfloat16"})
    assert int8_nbytes(geometry, 1, tokens, new_tokens, residual_length) == cache.nbytes


@pytest.mark.parametrize("name", [name for name in MODELS if name != "lfm2"])
def test_the_count_of_weights_is_that_of_the_model(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    counted = Geometry.from_config(written_config(model, tmp_path)).num_params
    assert counted is not None
    # Norms and biases are left out; in models of 64 channels they are a few percent, in real ones nothing.
    left_out = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    expected = sum(p.numel() for p in model.parameters()) - left_out
    assert abs(counted - expected) <= TOLERANCE * expected


@pytest.mark.parametrize("name", preset_names())
def test_presets_have_the_published_number_of_weights(name: str) -> None:
    published = sources._presets()[name]["published_params"]
    counted = find_geometry(name).num_params
    assert counted is not None
    assert abs(counted - published) <= 0.01 * published


@pytest.mark.parametrize("name", preset_names())
def test_presets_have_the_layers_that_transformers_makes(name: str) -> None:
    config = dict(sources._presets()[name]["config"])
    if config["model_type"] == "qwen":
        pytest.skip("Qwen v1 is quantcache's own model")
    model_type = config.pop("model_type")
    # Old spellings that transformers' classes no longer take as arguments are what from_dict reads.
    made = AutoConfig.for_model(model_type).from_dict(config)
    kinds = [
        (type(layer).__name__, getattr(layer, "sliding_window", None)) for layer in DynamicCache(config=made).layers
    ]
    expected = []
    for layer in find_geometry(name).layers:
        if layer.window is not None:
            expected.append(("DynamicSlidingWindowLayer", layer.window))
        else:
            expected.append(("DynamicLayer" if layer.num_kv_heads else "LinearAttentionLayer", None))
    assert kinds == expected


def test_known_numbers() -> None:
    """By hand: Llama-3.1-8B keeps 32 layers * 2 * 8 heads * 128 channels."""
    planned = plan(find_geometry("llama-3.1-8b"), batch=4, tokens=8192, new_tokens=0)
    assert planned.bf16_per_token == 32 * 2 * 8 * 128 * 2 == 131072
    assert planned.bf16_nbytes == 4 * 8192 * 131072
    pages, tail = (8192 - 32) // 64, 96
    page = 8 * (64 * 256 + 4 * (128 + 64))
    assert planned.int8_nbytes == 4 * 32 * (pages * page + (8192 - 64 * pages) * 8 * 256 * 2)
    assert 8192 - 64 * pages <= tail
    latent = plan(find_geometry("DeepSeek-V2-Lite"), tokens=1)
    assert latent.bf16_per_token == 27 * (512 + 64) * 2


def test_what_fits_fits_and_one_more_does_not() -> None:
    geometry = find_geometry("Qwen2.5-7B")
    planned = plan(geometry, batch=4, tokens=16384, new_tokens=256, gpu_nbytes=40 * GIB, overhead=0.1)
    assert {(fit.weights, fit.cache) for fit in planned.fits} == {
        (weights, cache) for weights in ("bf16", "int8", "int4") for cache in ("bf16", "int8")
    }
    for fit in planned.fits:
        room = int(40 * GIB * 0.9) - fit.weights_nbytes
        assert fit.free_nbytes == room

        def size(batch: int, tokens: int, cache: str = fit.cache) -> int:
            return (
                exact_nbytes(geometry, batch, tokens) if cache == "bf16" else int8_nbytes(geometry, batch, tokens, 256)
            )

        assert size(fit.largest_batch, 16384) <= room < size(fit.largest_batch + 1, 16384)
        assert size(4, fit.longest_context) <= room < size(4, fit.longest_context + 200)
    sizes = {(fit.weights, fit.cache): fit.longest_context for fit in planned.fits}
    assert sizes["bf16", "int8"] > 1.8 * sizes["bf16", "bf16"]


def test_a_model_that_is_too_large_fits_nothing() -> None:
    planned = plan(find_geometry("DeepSeek-V3"), gpu_nbytes=80 * GIB)
    assert {(fit.largest_batch, fit.longest_context) for fit in planned.fits} == {(0, 0)}


def test_a_folder_is_read_with_its_weights(tmp_path: Path) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    geometry = find_geometry(str(tmp_path))
    assert geometry.num_params == sum(p.numel() for p in model.parameters())
    assert find_geometry(str(tmp_path / "config.json")).layers == geometry.layers


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "the config must have num_hidden_layers or n_layer or n_layers or num_layers, got neither."),
        ({"num_hidden_layers": 2}, "the config must have num_attention_heads or n_head or num_heads, got neither."),
        ({**SIZES, "dtype": "int3"}, "dtype must be one of float64, float32, bfloat16, float16, got 'int3'."),
        ({**SIZES, "model_type": "zamba", "mamba_d_state": 2}, "must be of a kind known here, got model_type 'zamba'."),
        ({**SIZES, "layer_types": ["rwkv"] * 4}, "layer 0 must be of a kind whose memory is known here, got 'rwkv'."),
        ({**SIZES, "layer_types": ["rwkv"]}, "layer_types must have 4 entries, got 1."),
    ],
)
def test_a_config_that_does_not_tell_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(GeometryError) as caught:
        Geometry.from_config(config)
    assert message in str(caught.value)


def test_unknown_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(GeometryError, match="'nonsense' must be a preset, a hub id"):
        find_geometry("nonsense")
    with pytest.raises(
        GeometryError, match=r"the config.json of 'owner/none' must be on the hub or in its cache, got:"
    ):
        find_geometry("owner/none")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(GeometryError, match="must be a JSON object, got list"):
        find_geometry(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"), [({"batch": 0}, "batch must be"), ({"overhead": 1.0}, "overhead must")]
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^plan: {message}"):
        plan(find_geometry("Qwen3-8B"), **options)


def test_planning_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from quantcache.planning import find_geometry, plan;"
        "plan(find_geometry('Qwen3-8B'), gpu_nbytes=1 << 36);"
        "print({'torch', 'transformers', 'numpy'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"


def test_requests_by_hand() -> None:
    """Llama-3.1-8B: 2,048 + 128 tokens store 2,175, which are 33 pages and 63 tokens in two blocks of exact ones."""
    planned = plan_requests(find_geometry("Llama-3.1-8B"), requests=10, prompt_len=2048, new_tokens=128)
    page = 8 * (64 * 256 + 4 * (128 + 64))
    assert (planned.int8.tokens, planned.int8.nbytes, planned.int8_blocks) == (64, 32 * page, 35)
    assert (planned.bf16.tokens, planned.bf16.nbytes, planned.bf16_blocks) == (256, 256 * 131072, 9)
    assert (planned.int8_nbytes, planned.bf16_nbytes) == (10 * 35 * 32 * page, 10 * 9 * 256 * 131072)


@pytest.mark.parametrize(("tokens", "blocks"), [(1, 2), (63, 2), (64, 2), (65, 3), (127, 3), (128, 3), (129, 4)])
def test_a_request_keeps_the_blocks_of_its_last_open_page(tokens: int, blocks: int) -> None:
    """One that closes a page has held the exact keys and values of it, one block more than it then reads."""
    assert plan_requests(find_geometry("Qwen3-8B"), prompt_len=tokens, new_tokens=0).int8_blocks == blocks


def test_exact_pages_of_float32_take_more_blocks() -> None:
    geometry = Geometry.from_config({**SIZES, "model_type": "llama", "dtype": "float32"})
    assert plan_requests(geometry, prompt_len=65, new_tokens=0).int8_blocks == 1 + 2 * 2


def test_requests_that_fit_fit_and_one_more_does_not() -> None:
    planned = plan_requests(
        find_geometry("Qwen2.5-7B"), requests=64, prompt_len=2048, new_tokens=128, gpu_nbytes=40 * GIB, overhead=0.1
    )
    assert [(fit.weights, fit.cache) for fit in planned.fits] == [
        (weights, cache) for weights in ("bf16", "int8", "int4") for cache in ("bf16", "int8")
    ]
    for fit in planned.fits:
        each = planned.bf16 if fit.cache == "bf16" else planned.int8
        needed = planned.bf16_blocks if fit.cache == "bf16" else planned.int8_blocks
        assert fit.free_nbytes == int(40 * GIB * 0.9) - fit.weights_nbytes
        room = fit.free_nbytes - 2 * each.nbytes  # what no request has
        assert fit.num_requests * needed * each.nbytes <= room < (fit.num_requests + 1) * needed * each.nbytes
    sizes = {(fit.weights, fit.cache): fit.num_requests for fit in planned.fits}
    assert sizes["bf16", "int8"] > 1.85 * sizes["bf16", "bf16"]


@pytest.mark.parametrize(
    ("name", "message"), [("gemma-3-27b", "layers with a window"), ("Qwen3-Next-80B-A3B", "layers with a state")]
)
def test_models_that_are_not_served_are_refused_with_their_layers(name: str, message: str) -> None:
    with pytest.raises(GeometryError, match=message):
        plan_requests(find_geometry(name))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"requests": 0}, "requests must be at least 1, got 0"),
        ({"prompt_len": 0}, "prompt_len must be at least 1, got 0"),
        ({"new_tokens": -1}, "new_tokens must be at least 0, got -1"),
        ({"overhead": 1.0}, "overhead must be from 0 to below 1"),
    ],
)
def test_requests_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^plan_requests: {message}"):
        plan_requests(find_geometry("Qwen3-8B"), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_blocks_are_those_of_the_pool(dtype: torch.dtype) -> None:
    layout = BlockLayout(num_kv_heads=2, head_dim=16, v_head_dim=16, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    each = blocks(Geometry.from_config({**SIZES, "model_type": "llama", "dtype": name}), "int8")
    assert each.nbytes == SIZES["num_hidden_layers"] * layout.page_bytes
    assert each.num_open == 2 * layout.open_blocks
    for tokens in range(1, 300):
        assert each.most_of_request(tokens) == layout.peak_blocks(tokens)
