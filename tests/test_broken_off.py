"""Is a cache usable after a call that ended in the middle, or that was meant for another prompt?"""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

from quantcache import QuantizedInt8Cache
from quantcache.layers._host import cache_argument


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def ids(tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 97, (1, tokens), generator=torch.Generator().manual_seed(seed))


def generated(model: Any, prompt: Tensor, cache: QuantizedInt8Cache, tokens: int = 8, **options: Any) -> Tensor:
    options |= {"max_new_tokens": tokens, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    output: Tensor = model.generate(prompt, **cache_argument(cache), **options)
    return output


class Leaving(BaseStreamer):
    """A reader of a stream that leaves after some tokens."""

    def __init__(self, tokens: int) -> None:
        self.left = tokens + 1  # the prompt comes first

    def put(self, value: Tensor) -> None:
        self.left -= 1
        if self.left < 0:
            raise BrokenPipeError("the reader left")

    def end(self) -> None: ...


class Interrupting:
    """Ctrl-C in the middle of a forward pass: behind the first of three layers, after some calls."""

    def __init__(self, layer: torch.nn.Module, calls: int) -> None:
        self.left = calls
        self.hook = layer.register_forward_hook(self)

    def __call__(self, *_: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.fixture(params=["growing", "fixed"])
def cache(request: pytest.FixtureRequest, model: LlamaForCausalLM) -> QuantizedInt8Cache:
    return QuantizedInt8Cache(model.config, max_cache_len=512 if request.param == "fixed" else None)


def assert_goes_on(model: Any, cache: QuantizedInt8Cache, prompt: Tensor) -> None:
    """The whole sequence goes on behind what is stored as it does from one pass over what is stored."""
    lengths = {int(layer.get_seq_length()) for layer in cache.layers}
    assert len(lengths) == 1
    (stored,) = lengths
    fresh = QuantizedInt8Cache(model.config)
    if stored:
        with torch.no_grad():
            model(prompt[:, :stored], **cache_argument(fresh, model))
    longer = torch.cat([prompt, ids(8, seed=5)], dim=1)
    assert torch.equal(generated(model, longer, cache), generated(model, longer, fresh))


@pytest.mark.parametrize("tokens", [0, 40])
def test_a_stream_whose_reader_leaves_keeps_a_usable_cache(
    model: LlamaForCausalLM, cache: QuantizedInt8Cache, tokens: int
) -> None:
    prompt = ids(150)
    with pytest.raises(BrokenPipeError):
        generated(model, prompt, cache, 60, streamer=Leaving(tokens))
    said = generated(model, prompt, QuantizedInt8Cache(model.config), 60)
    assert_goes_on(model, cache, said[:, : 150 + tokens])


@pytest.mark.parametrize("steps", [0, 1, 40])
def test_an_interrupt_between_two_layers_keeps_a_usable_cache(
    model: LlamaForCausalLM, cache: QuantizedInt8Cache, steps: int
) -> None:
    prompt = ids(150)
    interrupting = Interrupting(model.model.layers[0], steps)
    try:
        with pytest.raises(KeyboardInterrupt):
            generated(model, prompt, cache, 60)
    finally:
        interrupting.hook.remove()
    assert {int(layer.get_seq_length()) for layer in cache.layers} == {0 if steps == 0 else 149 + steps}
    said = generated(model, prompt, QuantizedInt8Cache(model.config), 60)
    assert_goes_on(model, cache, said[:, : 150 + steps])


def test_another_prompt_on_a_used_cache_warns(model: LlamaForCausalLM, cache: QuantizedInt8Cache) -> None:
    said = generated(model, ids(100), cache)
    other = said.clone()
    other[0, 3] = (other[0, 3] + 1) % 97
    message = r"does not begin with the 100 tokens that the cache was given, got token \d+ for \d+ at place 3 of"
    with pytest.warns(UserWarning, match=message):
        generated(model, other, cache, 2)
    cache.reset()
    generated(model, ids(100, seed=9), cache, 2)


def test_an_answer_that_is_tokenized_otherwise_does_not_warn(
    model: LlamaForCausalLM, cache: QuantizedInt8Cache
) -> None:
    said = generated(model, ids(100), cache)
    said[0, 104] = (said[0, 104] + 1) % 97
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generated(model, said, cache, 2)


def test_the_same_conversation_does_not_warn(model: LlamaForCausalLM, cache: QuantizedInt8Cache) -> None:
    said = generated(model, ids(100), cache)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = generated(model, torch.cat([said, ids(4, seed=2)], dim=1), cache)
        cache.crop(-20)
        generated(model, torch.cat([said[:, :99], ids(4, seed=3)], dim=1), cache)


def test_a_refused_call_leaves_what_is_known(model: LlamaForCausalLM, cache: QuantizedInt8Cache) -> None:
    said = generated(model, ids(100), cache)
    with pytest.raises(ValueError, match="no_such_option"):
        generated(model, torch.cat([said, ids(4)], dim=1), cache, no_such_option=1)
    assert cache.get_seq_length() == 107
    with pytest.warns(UserWarning, match="at place"):
        generated(model, ids(120, seed=7), cache, 2)


def test_a_shorter_prompt_than_the_cache_holds_is_refused(model: LlamaForCausalLM, cache: QuantizedInt8Cache) -> None:
    generated(model, ids(100), cache)
    for tokens in (30, 107):
        with pytest.raises(
            ValueError, match=rf"the prompt must go on behind the 107 tokens in the cache, got {tokens}"
        ):
            generated(model, ids(tokens, seed=4), cache)
