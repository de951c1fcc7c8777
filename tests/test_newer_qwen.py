"""Qwen2, Qwen2.5 and Qwen3 need no adapter, and their key bias costs the int8 cache nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, DynamicCache, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

import quantcache.adapters.qwen
from quantcache import QuantizedInt8Cache
from quantcache.backends import dispatch
from quantcache.layers._host import cache_argument

SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
PROMPT_LEN, NEW_TOKENS = 180, 20


def make_model(family: str) -> torch.nn.Module:
    """Qwen2.5 has Qwen2's classes and sliding-window layers that are switched off; Qwen3 norms in place of a bias."""
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)).eval()
    options = {"use_sliding_window": False, "max_window_layers": 1} if family == "qwen2.5" else {}
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, **options)).eval()


class PerTokenCache(DynamicCache):
    """The usual int8 rule, for comparison: one symmetric scale for each token and head, of keys and values."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        def rounded(states: Tensor) -> Tensor:
            scale = states.abs().amax(-1, keepdim=True) / 127
            return (states / scale).round() * scale

        return super().update(rounded(key_states), rounded(value_states), layer_idx, *args, **kwargs)


@torch.no_grad()
def mean_kl(model: torch.nn.Module, ids: Tensor, cache: Any) -> float:
    """Of the tokens behind the prompt to an exact cache, each read through ``cache``, in nats a token."""
    exact = model(ids).logits[:, PROMPT_LEN - 1 : -1].double().log_softmax(-1)
    steps = [model(ids[:, :PROMPT_LEN], **cache_argument(cache)).logits[:, -1]]
    steps += [
        model(ids[:, i : i + 1], **cache_argument(cache)).logits[:, -1] for i in range(PROMPT_LEN, ids.shape[1] - 1)
    ]
    read = torch.stack(steps, 1).double().log_softmax(-1)
    return float((exact.exp() * (exact - read)).sum(-1).mean())


@pytest.mark.parametrize("family", ["qwen2", "qwen2.5", "qwen3"])
@pytest.mark.parametrize("with_config", [True, False])
def test_newer_qwen_needs_no_adapter(family: str, with_config: bool) -> None:
    """generate(past_key_values=QuantizedInt8Cache()) is all, and every layer is read in int8."""
    model = make_model(family)
    ids = torch.randint(0, SIZES["vocab_size"], (2, PROMPT_LEN))
    cache = QuantizedInt8Cache(model.config if with_config else None, strict=True)
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "attention_mask": torch.ones_like(ids)}
    output = model.generate(ids, **cache_argument(cache), pad_token_id=0, eos_token_id=None, **options)
    assert output.shape == (2, PROMPT_LEN + NEW_TOKENS)
    assert cache.report().backend == dispatch.choose_backend(torch.device("cpu"))
    assert 0 < mean_kl(model, output, QuantizedInt8Cache()) <= 1e-3


def test_the_adapter_leaves_newer_qwen_alone() -> None:
    """Importing it registers "qwen" and nothing else."""
    assert quantcache.adapters.qwen.QWenConfig.model_type == "qwen"
    for model_type, config in (("qwen2", Qwen2Config), ("qwen3", Qwen3Config)):
        assert type(AutoConfig.for_model(model_type)) is config


def test_a_key_bias_costs_nothing() -> None:
    """A few huge key channels, as trained Qwen2 models have: int8 with a scale for each channel does not see them.

    With a scale for each token every other channel gets their step.
    """
    model = make_model("qwen2")
    ids = torch.randint(0, SIZES["vocab_size"], (2, PROMPT_LEN + NEW_TOKENS))
    before = mean_kl(model, ids, QuantizedInt8Cache())
    with torch.no_grad():
        for layer in model.model.layers:
            # The last channel of each half: rotary turns that pair the slowest, so the bias stays in its channels.
            layer.self_attn.k_proj.bias.view(2, 16)[:, [7, 15]] += 300.0
    ours, usual = mean_kl(model, ids, QuantizedInt8Cache()), mean_kl(model, ids, PerTokenCache())
    assert ours < 10 * before
    assert usual > 100 * ours
