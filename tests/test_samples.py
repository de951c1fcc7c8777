"""Do the answers to a prompt that ran once equal those to copies of it, for samples and beams?"""

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding

from quantcache import QuantizedInt8Cache
from quantcache.layers._host import cache_argument
from tests.architectures import ARCHITECTURES

N = 4


def make(name: str) -> Any:
    return next(architecture for architecture in ARCHITECTURES if architecture.name == name).make()


@pytest.fixture(scope="module")
def model() -> Any:
    return make("Qwen2")


def prompts(tokens: int = 200, batch: int = 2, padding: int = 70) -> dict[str, Tensor]:
    """Of the first ``padding`` tokens are none."""
    ids = torch.randint(2, 97, (batch, tokens), generator=torch.Generator().manual_seed(tokens))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, inputs: Mapping[str, Tensor], cache: QuantizedInt8Cache, **options: Any) -> Tensor:
    torch.manual_seed(5)
    output: Tensor = model.generate(**inputs, **cache_argument(cache), max_new_tokens=40, **options)
    return output


def unshared(model: Any, inputs: Mapping[str, Tensor], **options: Any) -> Tensor:
    """What ``generate`` gives that runs ``N`` copies of each prompt."""
    return generate(model, inputs, QuantizedInt8Cache(model.config), **options)


@pytest.mark.parametrize("name", ["Qwen2", "Gemma 3", "Qwen3-Next", "GPT-2"])
def test_samples_are_those_of_copies_of_the_prompt(name: str) -> None:
    model, inputs = make(name), prompts(padding=0 if name == "Qwen3-Next" else 70)
    sampling = {"do_sample": True, "top_k": 20}
    expected = unshared(model, inputs, num_return_sequences=N, **sampling)
    cache, repeated = QuantizedInt8Cache.for_samples(model, inputs, N, strict=True)
    assert torch.equal(generate(model, repeated, cache, **sampling), expected)
    cache, _ = QuantizedInt8Cache.for_samples(model, inputs, N)
    assert torch.equal(generate(model, inputs, cache, num_return_sequences=N, **sampling), expected)


def test_beams_are_those_of_copies_of_the_prompt(model: Any) -> None:
    for options in ({}, {"num_return_sequences": 2}):
        expected = unshared(model, prompts(), num_beams=N, **options)
        cache, _ = QuantizedInt8Cache.for_samples(model, prompts(), N)
        assert torch.equal(generate(model, prompts(), cache, num_beams=N, **options), expected)


def test_a_fixed_capacity_takes_samples_and_beams(model: Any) -> None:
    inputs, options = prompts(), {"disable_compile": True}
    for given in ({"do_sample": True, "num_return_sequences": N}, {"num_beams": N}):
        expected = unshared(model, inputs, **given)
        cache, _ = QuantizedInt8Cache.for_samples(model, inputs, N, max_cache_len=300)
        assert torch.equal(generate(model, inputs, cache, **given, **options), expected)


def test_the_prompt_runs_once(model: Any) -> None:
    fed: list[tuple[int, ...]] = []
    hook = model.model.embed_tokens.register_forward_hook(
        lambda _, arguments, __: fed.append(tuple(arguments[0].shape))
    )
    cache, repeated = QuantizedInt8Cache.for_samples(model, prompts(), N)
    generate(model, repeated, cache, do_sample=True)
    hook.remove()
    assert fed == [(2, 199)] + [(2 * N, 1)] * 40
    pages = cache.layers[0].pages
    assert (pages.batch_size, pages.segments[0].rows) == (2 * N, 2)


def test_ids_a_dict_and_what_a_tokenizer_returns_are_taken(model: Any) -> None:
    ids = prompts()["input_ids"][1:]
    seen = []
    for inputs in (ids, {"input_ids": ids, "attention_mask": None}, BatchEncoding({"input_ids": ids})):
        cache, repeated = QuantizedInt8Cache.for_samples(model, inputs, 2)
        assert list(repeated) == ["input_ids"]
        seen.append(generate(model, repeated, cache, do_sample=True))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("max_cache_len", [None, 60])
def test_a_prompt_of_one_token_leaves_nothing_to_run(model: Any, max_cache_len: int | None) -> None:
    ids = torch.tensor([[5]])
    cache, repeated = QuantizedInt8Cache.for_samples(model, ids, N, max_cache_len=max_cache_len)
    assert cache.get_seq_length() == 0
    options = {"disable_compile": True} if max_cache_len else {}
    answers = generate(model, repeated, cache, do_sample=True, **options)
    assert torch.equal(answers, unshared(model, {"input_ids": ids}, do_sample=True, num_return_sequences=N))


def right_padded() -> dict[str, Tensor]:
    inputs = prompts()
    inputs["attention_mask"][1, -3:] = 0
    return inputs


@pytest.mark.parametrize(
    ("inputs", "n", "error", "message"),
    [
        (prompts(), 0, ValueError, "n must be at least 1 answer, got 0."),
        (prompts(), 2.0, TypeError, "n must be an int, got float."),
        ({}, 2, ValueError, "inputs must be token ids or have input_ids, got nothing."),
        (
            {"inputs_embeds": torch.zeros(1, 3, 64)},
            2,
            ValueError,
            "inputs must be token ids or have input_ids, got inputs_embeds.",
        ),
        (
            {**prompts(), "pixel_values": torch.zeros(1, 3, 8, 8)},
            2,
            NotImplementedError,
            "inputs must be of input_ids, attention_mask, token_type_ids, got pixel_values.",
        ),
        ({"input_ids": [[1, 2]]}, 2, TypeError, "input_ids must be a tensor, got list."),
        (torch.tensor([1, 2]), 2, ValueError, "input_ids must be (batch, seq_len), at least (1, 1), got (2,)."),
        (
            {"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.ones(1, 4)},
            2,
            ValueError,
            "attention_mask must have the shape of input_ids, (1, 3), got (1, 4).",
        ),
        (right_padded(), 2, ValueError, "prompts must be padded on the left, got padding behind prompt 1."),
    ],
)
def test_what_cannot_be_repeated_is_refused(
    model: Any, inputs: Any, n: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(f"QuantizedInt8Cache.for_samples: {message}")):
        QuantizedInt8Cache.for_samples(model, inputs, n)


def test_models_that_it_does_not_serve_are_refused(model: Any) -> None:
    with pytest.raises(NotImplementedError, match="the model must be a decoder, got T5ForConditionalGeneration"):
        QuantizedInt8Cache.for_samples(make("T5"), prompts(), N)
    with pytest.raises(NotImplementedError, match="every layer must be int8, got a StaticSliding"):
        QuantizedInt8Cache.for_samples(make("Gemma 3"), prompts(), N, max_cache_len=300)
    with pytest.raises(ValueError, match="at most max_cache_len=150 tokens fit, got 200"):
        QuantizedInt8Cache.for_samples(model, prompts(), N, max_cache_len=150)
