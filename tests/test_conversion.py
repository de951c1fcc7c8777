"""Do conversions from and to transformers' own cache keep every token, and leave their source alone?"""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from quantcache import QuantizedInt8Cache
from quantcache.layers._host import cache_argument
from quantcache.layers.base import BaseInt8Layer
from quantcache.quantization import reference
from tests.test_generate import SIZES, prompt


def filled(config: object, length: int, batch: int = 2) -> tuple[LlamaForCausalLM, DynamicCache, Tensor]:
    model_class = Qwen2ForCausalLM if isinstance(config, Qwen2Config) else LlamaForCausalLM
    model = model_class(config).eval()
    cache, ids = DynamicCache(config=config), prompt(length, batch)
    with torch.no_grad():
        model(ids, **cache_argument(cache))
    return model, cache, ids


def states_of(cache: DynamicCache) -> list[Tensor]:
    return [states for layer in cache.layers for states in (layer.keys, layer.values)]


@pytest.mark.parametrize("with_config", [False, True])
@pytest.mark.parametrize("length", [1, 95, 96, 300])
def test_there_and_back_gives_the_restored_pages_and_the_exact_tail(length: int, with_config: bool) -> None:
    config = LlamaConfig(**SIZES)
    _, dynamic, _ = filled(config, length)
    before = [states.clone() for states in states_of(dynamic)]
    int8 = QuantizedInt8Cache.from_dynamic(dynamic, config if with_config else None)
    back = int8.to_dynamic()
    assert type(back) is DynamicCache
    assert back.get_seq_length() == int8.get_seq_length() == length
    pages = (length - 32) // 64 * 64 if length >= 96 else 0
    operations = (
        (reference.quantize_key_pages, reference.restore_key_pages),
        (reference.quantize_value_pages, reference.restore_value_pages),
    )
    for index, (exact, restored) in enumerate(zip(before, states_of(back), strict=True)):
        assert torch.equal(restored[:, :, pages:], exact[:, :, pages:])
        if pages:
            quantize, restore = operations[index % 2]
            assert torch.equal(restored[:, :, :pages], restore(*quantize(exact[:, :, :pages]), exact.dtype))
    for now, then in zip(states_of(dynamic), before, strict=True):
        assert torch.equal(now, then)


def test_nothing_is_shared() -> None:
    """Writing into one cache changes none of the others."""
    _, dynamic, _ = filled(LlamaConfig(**SIZES), 40)
    int8 = QuantizedInt8Cache.from_dynamic(dynamic)
    back = int8.to_dynamic()
    for states in states_of(dynamic):
        states.zero_()
    assert all(states.abs().sum() > 0 for states in states_of(back))
    for states in states_of(back):
        states.zero_()
    assert all(states.abs().sum() > 0 for states in states_of(int8.to_dynamic()))


@torch.no_grad()
@pytest.mark.parametrize("forth", [True, False])
def test_generation_goes_on_from_a_converted_cache(forth: bool) -> None:
    """A converted cache predicts the next token as the cache it came from does, up to what quantising costs."""
    model, dynamic, ids = filled(LlamaConfig(**SIZES), 200)
    int8 = QuantizedInt8Cache.from_dynamic(dynamic)
    source, target = (dynamic, int8) if forth else (int8, int8.to_dynamic())
    token = ids[:, :1]
    wanted = model(token, **cache_argument(source)).logits.double().log_softmax(-1)
    got = model(token, **cache_argument(target)).logits.double().log_softmax(-1)
    assert (wanted.exp() * (wanted - got)).sum(-1).mean() <= 1e-4
    assert target.get_seq_length() == 201


def test_layers_of_other_kinds_are_copied() -> None:
    config = Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=32, layer_types=["full_attention", "sliding_attention"]
    )
    model, dynamic, ids = filled(config, 150)
    for given in (config, None):
        int8 = QuantizedInt8Cache.from_dynamic(dynamic, given)
        assert isinstance(int8.layers[0], BaseInt8Layer)
        assert type(int8.layers[1]) is DynamicSlidingWindowLayer
        assert torch.equal(int8.layers[1].keys, dynamic.layers[1].keys)
        assert int8.layers[1].keys.data_ptr() != dynamic.layers[1].keys.data_ptr()
        output = model.generate(
            torch.cat([ids, ids[:, :1]], dim=1), **cache_argument(int8.to_dynamic()), max_new_tokens=3, do_sample=False
        )
        assert output.shape == (2, 154)


def test_an_empty_cache_converts_to_an_empty_one() -> None:
    assert QuantizedInt8Cache.from_dynamic(DynamicCache()).layers == []
    assert QuantizedInt8Cache().to_dynamic().layers == []
    config = LlamaConfig(**SIZES)
    made = QuantizedInt8Cache.from_dynamic(DynamicCache(config=config), config)
    assert made.get_seq_length() == 0
    assert len(made.to_dynamic().layers) == 2


def test_what_is_no_dynamic_cache_is_refused() -> None:
    config = LlamaConfig(**SIZES)
    with pytest.raises(TypeError, match="cache must be a DynamicCache, got StaticCache"):
        QuantizedInt8Cache.from_dynamic(StaticCache(config=config, max_cache_len=8))
    with pytest.raises(TypeError, match="cache must be a DynamicCache, got tuple"):
        QuantizedInt8Cache.from_dynamic(())
    _, dynamic, _ = filled(config, 5)
    other = LlamaConfig(**{**SIZES, "num_hidden_layers": 3})
    with pytest.raises(ValueError, match="the layers of the config, 3, got 2"):
        QuantizedInt8Cache.from_dynamic(dynamic, other)
