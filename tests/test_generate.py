"""Does ``generate()`` give with the int8 cache what it gives with the default one, in every mode, without a network?"""

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from quantcache import QuantizedInt8Cache
from quantcache.layers._host import cache_argument
from quantcache.layers.base import BaseInt8Layer
from tests.conftest import devices

MAX_MEAN_KL = 1.0e-4
"""Nats a token, the quality that the format promises on a real model; tiny random ones stay far below."""

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.1,  # attention far from uniform, logits not yet chaotic
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MODELS = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> GenerationMixin:
    config_class, model_class, extra = MODELS[request.param]
    torch.manual_seed(1)
    return model_class(config_class(**SIZES, **extra)).eval()


def prompt(length: int, batch: int = 1, seed: int = 2) -> Tensor:
    return torch.randint(2, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def assert_faithful(
    model: GenerationMixin, output: object, cache: QuantizedInt8Cache, mask: Tensor | None = None
) -> None:
    """The logits of every generated token are those of the exact model on the same tokens, to the format's quality."""
    sequences, scores = output.sequences, torch.stack(output.logits, dim=1)
    new = scores.shape[1]
    if mask is not None:
        mask = torch.cat([mask, mask.new_ones(len(mask), sequences.shape[1] - mask.shape[1])], dim=1)
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp_min(0)
    exact = model(sequences, attention_mask=mask, position_ids=positions).logits[:, -new - 1 : -1]
    log_exact, log_int8 = exact.double().log_softmax(-1), scores.double().log_softmax(-1)
    kl = (log_exact.exp() * (log_exact - log_int8)).sum(-1)
    assert kl.mean() <= MAX_MEAN_KL
    assert kl.mean() > 0, "the int8 pages were never read"
    assert any(isinstance(layer, BaseInt8Layer) and layer.pages.num_pages for layer in cache.layers)


RETURN = {"return_dict_in_generate": True, "output_logits": True}


@pytest.mark.parametrize("device", devices())
def test_greedy_decoding_is_faithful(model: GenerationMixin, device: str) -> None:
    cache = QuantizedInt8Cache()
    model.to(device)
    output = model.generate(
        prompt(150).to(device), max_new_tokens=80, do_sample=False, **cache_argument(cache), **RETURN
    )
    assert_faithful(model, output, cache)
    assert cache.get_seq_length() == 150 + 80 - 1
    assert cache.report().backend != "exact"


@pytest.mark.parametrize("device", devices())
def test_short_contexts_give_bit_identical_logits(model: GenerationMixin, device: str) -> None:
    model.to(device)
    runs = [
        model.generate(prompt(40).to(device), max_new_tokens=55, do_sample=False, **cache_argument(cache), **RETURN)
        for cache in (DynamicCache(), QuantizedInt8Cache())
    ]
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    for exact, int8 in zip(runs[0].logits, runs[1].logits, strict=True):
        assert torch.equal(exact, int8)


def test_sampling_is_faithful(model: GenerationMixin) -> None:
    cache = QuantizedInt8Cache()
    torch.manual_seed(5)
    output = model.generate(
        prompt(150), max_new_tokens=60, do_sample=True, num_return_sequences=3, **cache_argument(cache), **RETURN
    )
    assert_faithful(model, output, cache)


def test_beam_search_scores_are_those_of_the_exact_model(model: GenerationMixin) -> None:
    ids, cache = prompt(150, batch=2), QuantizedInt8Cache()
    output = model.generate(
        ids,
        max_new_tokens=40,
        num_beams=4,
        num_return_sequences=2,
        do_sample=False,
        **cache_argument(cache),
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert cache.layers[0].pages.num_pages
    with torch.no_grad():
        log_probs = model(output.sequences).logits[:, 149:-1].log_softmax(-1)
    chosen = log_probs.gather(-1, output.sequences[:, 150:, None]).mean(dim=(1, 2))
    # A sequence whose cache rows were mixed up has the score of another sequence: 0.1 and more away.
    torch.testing.assert_close(output.sequences_scores, chosen, rtol=0, atol=5e-3)


def test_a_left_padded_batch_is_faithful(model: GenerationMixin) -> None:
    ids = prompt(160, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :70] = 0  # more than a whole page of padding
    ids[0, :70] = 0
    options = {"max_new_tokens": 50, "do_sample": False, **RETURN}
    cache = QuantizedInt8Cache()
    output = model.generate(ids, attention_mask=mask, **cache_argument(cache), **options)
    assert_faithful(model, output, cache, mask)


def test_a_kept_cache_carries_a_conversation(model: GenerationMixin) -> None:
    cache = QuantizedInt8Cache()
    first = model.generate(prompt(120), max_new_tokens=20, do_sample=False, **cache_argument(cache))
    ids = torch.cat([first, prompt(90, seed=3)], dim=1)
    output = model.generate(ids, max_new_tokens=30, do_sample=False, **cache_argument(cache), **RETURN)
    assert cache.get_seq_length() == output.sequences.shape[1] - 1
    assert_faithful(model, output, cache)
    cache.reset()
    again = model.generate(prompt(120), max_new_tokens=20, do_sample=False, **cache_argument(cache))
    assert torch.equal(again, first)


@pytest.mark.filterwarnings("ignore::quantcache.FallbackWarning")
def test_eager_attention_is_faithful_on_restored_states(model: GenerationMixin) -> None:
    model.set_attn_implementation("eager")
    cache = QuantizedInt8Cache()
    output = model.generate(
        prompt(150), max_new_tokens=30, do_sample=False, **cache_argument(cache), output_attentions=True, **RETURN
    )
    assert_faithful(model, output, cache)
    assert {row.kernel for row in cache.report().layers} == {"restored"}
    assert output.attentions[-1][0].shape == (1, 4, 1, 179)


@pytest.mark.parametrize("device", devices())
def test_16_bit_models_generate(model: GenerationMixin, device: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        cache = QuantizedInt8Cache(strict=True)
        output = model.to(device, dtype).generate(
            prompt(150).to(device), max_new_tokens=30, do_sample=False, **cache_argument(cache), **RETURN
        )
        assert all(step.isfinite().all() for step in output.logits)
        assert cache.layers[0].keys.dtype == dtype


@pytest.mark.filterwarnings("ignore::quantcache.FallbackWarning")
def test_a_float64_model_is_faithful(model: GenerationMixin) -> None:
    cache = QuantizedInt8Cache()
    output = model.double().generate(prompt(150), max_new_tokens=30, do_sample=False, **cache_argument(cache), **RETURN)
    assert_faithful(model, output, cache)
    assert cache.layers[0].keys.dtype == torch.float64


def test_a_wrecked_cache_would_be_noticed(model: GenerationMixin) -> None:
    """The measure used above rejects a cache whose keys are off by a few steps."""
    cache = QuantizedInt8Cache()
    ids = prompt(150)
    model.generate(ids, max_new_tokens=2, do_sample=False, **cache_argument(cache))
    for layer in cache.layers:
        for segment in layer.pages.segments:
            segment.key_metadata[..., 1] += 40
    output = model.generate(
        torch.cat([ids, prompt(2, seed=9)], dim=1),
        max_new_tokens=30,
        do_sample=False,
        **cache_argument(cache),
        **RETURN,
    )
    with pytest.raises(AssertionError):
        assert_faithful(model, output, cache)


def test_a_sliding_window_model_keeps_native_layers_with_its_config() -> None:
    config = Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=32, layer_types=["full_attention", "sliding_attention"]
    )
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(config).eval()
    for cache in (QuantizedInt8Cache(config), QuantizedInt8Cache()):
        output = model.generate(prompt(150), max_new_tokens=40, do_sample=False, **cache_argument(cache), **RETURN)
        assert_faithful(model, output, cache)
        kernels = [row.kernel for row in cache.report().layers]
        assert kernels[0] != "native"
        assert (kernels[1] == "native") == (cache.layer_class_to_replicate is None)
    assert cache.nbytes > 0
