"""The tuples of Qwen v1's original code: do they come in, and go out, as what they were?"""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from quantcache import QuantizedInt8Cache
from quantcache.adapters import legacy
from quantcache.adapters.qwen import QWenConfig
from tests.bounds import assert_within, truncation_bound
from tests.strategies import random_states

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def test_the_original_rule_by_hand() -> None:
    """One range over all tokens and channels of a head, truncation, a zero point that is not rounded."""
    states = torch.tensor([[[[-1.0, 0.0], [0.5, 1.55]]]])  # range -1 to 1.55: a scale of 0.01, a zero point of 100
    codes, scale, zero_point = legacy.quantize_cache_v(states, 8, 255, 0)
    assert codes.tolist()[0][0][0][0] == 0
    assert codes.tolist()[0][0][1][1] in (254, 255)  # truncated, not rounded
    assert codes.dtype == torch.uint8
    torch.testing.assert_close(scale, torch.full((1, 1, 2, 1), 0.01))
    torch.testing.assert_close(zero_point, torch.full((1, 1, 2, 1), 100.0))
    restored = legacy.dequantize_cache_torch(codes, scale, zero_point)
    assert (restored <= states + 1e-6).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_original_rule_stays_within_its_bound(dtype: torch.dtype) -> None:
    """A step, and the arithmetic of the activation dtype; scale and zero point are the same for a call's tokens."""
    states, _ = random_states(2, 3, 70, 16, dtype=dtype)
    codes, scale, zero_point = legacy.quantize_cache_v(states)
    assert scale.dtype == zero_point.dtype == dtype
    assert scale.shape == zero_point.shape == (2, 3, 70, 1)
    assert (scale == scale[:, :, :1]).all()
    restored = legacy.dequantize_cache_torch(codes, scale, zero_point)
    assert_within(restored, states, truncation_bound(states, scale), unit=scale.expand_as(states))
    as_tensors = legacy.quantize_cache_v(states, 8, torch.tensor(255, dtype=dtype), torch.tensor(0, dtype=dtype))
    assert all(torch.equal(a, b) for a, b in zip((codes, scale, zero_point), as_tensors, strict=True))


def test_a_constant_block_is_nan_as_it_was() -> None:
    _, scale, zero_point = legacy.quantize_cache_v(torch.full((1, 1, 2, 4), 3.0))
    assert (scale == 0).all()
    assert not zero_point.isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [5, 200])
def test_the_float_form_comes_back(tokens: int, dtype: torch.dtype) -> None:
    """Heads and tokens change places; what is behind the pages is exact, and pages are what the cache makes of them."""
    key, value = random_states(2, 3, tokens, 16, dtype=dtype)
    past = [(key.transpose(1, 2), value.transpose(1, 2))] * 2
    cache = legacy.from_legacy(past, strict=True)
    expected = QuantizedInt8Cache.from_legacy_cache([(key, value)] * 2)
    back = legacy.to_legacy(cache)
    assert len(back) == 2
    for states, original, restored in zip(back[1], (key, value), expected.layers[1].pages.restore(), strict=True):
        assert type(states) is torch.Tensor
        assert torch.equal(states, restored.transpose(1, 2))
        assert torch.equal(states[:, -5:], original.transpose(1, 2)[:, -5:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_quantised_form_comes_back(dtype: torch.dtype) -> None:
    """Out by the original's rule and in again: each way within a step of it, below a page nothing else is lost."""
    key, value = random_states(2, 3, 60, 16, dtype=dtype)
    cache = QuantizedInt8Cache.from_legacy_cache([(key, value)])
    ((quantized_key, quantized_value),) = legacy.to_legacy(cache, quantized=True)
    assert quantized_key[0].dtype == torch.uint8
    assert quantized_key[0].shape == (2, 3, 60, 16)
    again = legacy.from_legacy(((quantized_key, quantized_value),))
    assert again.layers[0].keys.dtype == dtype
    for restored, states, parts in (
        (again.layers[0].keys, key, quantized_key),
        (again.layers[0].values, value, quantized_value),
    ):
        assert_within(restored, states, truncation_bound(states, parts[1]), unit=parts[1].expand_as(states))


def test_forms_may_be_mixed_and_lists_will_do() -> None:
    key, value = random_states(1, 2, 8, 16)
    cache = legacy.from_legacy([[key.transpose(1, 2), legacy.quantize_cache_v(value)]])
    assert torch.equal(cache.layers[0].keys, key)
    assert legacy.is_quantized([[key, legacy.quantize_cache_v(value)]])
    assert not legacy.is_quantized([[key, value]])


def test_any_cache_of_full_attention_goes_out() -> None:
    key, value = random_states(1, 2, 8, 16)
    dynamic = DynamicCache()
    dynamic.update(key, value, 0)
    ((out_key, out_value),) = legacy.to_legacy(dynamic)
    assert torch.equal(out_key, key.transpose(1, 2))
    assert torch.equal(out_value, value.transpose(1, 2))
    dynamic.layers[0].keys.zero_()
    assert torch.equal(out_key, key.transpose(1, 2))  # nothing is shared
    empty = QuantizedInt8Cache(QWenConfig(num_hidden_layers=2, seq_length=16))
    with pytest.raises(ValueError, match=r"legacy\.to_legacy: every layer must hold tokens, got none in layer 0"):
        legacy.to_legacy(empty)


def wrong_tuples() -> dict[str, tuple[Any, type[Exception], str]]:
    states = torch.zeros(1, 8, 2, 16)
    codes, scale, zero_point = legacy.quantize_cache_v(random_states(1, 2, 8, 16)[0])
    return {
        "no tuple": (None, TypeError, "past_key_values must be a tuple of layers, got NoneType"),
        "nothing": ((), TypeError, "past_key_values must be a tuple of layers, got tuple"),
        "no pair": ((states,), TypeError, r"layer 0 must be a pair \(key, value\), got Tensor"),
        "three": (((states,) * 3,), TypeError, r"layer 0 must be a pair \(key, value\), got tuple"),
        "integers": (((states.int(), states),), ValueError, r"layer 0: key must be floating point .* got torch\.int32"),
        "flat": (((states, states[0]),), ValueError, r"layer 0: value must be floating point .* \(8, 2, 16\)"),
        "a pair of codes": ((((codes, scale), states),), TypeError, r"layer 0: key must be a tensor or \(uint8"),
        "signed codes": ((((codes.char(), scale, zero_point), states),), ValueError, r"must be uint8 .*torch\.int8"),
        "scales of another length": (
            (((codes, scale[:, :, :3], zero_point), states),),
            ValueError,
            r"key scale must be floating point \(1, 2, 8, 1\), got torch\.float32 \(1, 2, 3, 1\)",
        ),
        "whole zero points": (
            (((codes, scale, zero_point.int()), states),),
            ValueError,
            r"key zero_point must be floating point",
        ),
        "unequal pair": (((states, states[:, :4]),), ValueError, "must agree in batch, num_kv_heads and query_len"),
        "unequal layers": (
            ((states, states), (states[:, :4], states[:, :4])),
            ValueError,
            r"every layer must have the batch and seq_len of the first, \(1, 8\), got \(1, 4\) in layer 1",
        ),
    }


@pytest.mark.parametrize("case", wrong_tuples())
def test_what_is_no_such_tuple_is_refused(case: str) -> None:
    """The layer, the rule and the value are named."""
    past, error, message = wrong_tuples()[case]
    with pytest.raises(error, match=message):
        legacy.from_legacy(past)


def test_layers_and_heads_are_those_of_the_config() -> None:
    """The other layout of tuples has tokens where these have heads, which only the config can tell."""
    config = QWenConfig(num_hidden_layers=1, num_attention_heads=2, kv_channels=16, seq_length=16)
    states = torch.zeros(1, 8, 2, 16)
    assert legacy.from_legacy(((states, states),), config=config).get_seq_length() == 8
    with pytest.raises(ValueError, match=r"the 2 heads of the config, got 8\. .* use QuantizedInt8Cache\.from_legacy_"):
        legacy.from_legacy(((states.transpose(1, 2),) * 2,), config=config)
    with pytest.raises(ValueError, match="must have the 1 layers of the config, got 2"):
        legacy.from_legacy(((states, states),) * 2, config=config)
