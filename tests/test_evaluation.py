"""Does the comparison measure what it says, through the cache?"""

import math
import re

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from quantcache.evaluation.comparison import compare_teacher_forced, first_difference
from quantcache.layers._host import cache_argument

SEQ_LEN, PROMPT_LEN = 60, 20


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=53,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 53, (2, SEQ_LEN), generator=torch.Generator().manual_seed(4))


class DoubledValues(DynamicCache):
    """A cache that returns what it keeps from earlier calls with its values doubled."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        key, value = super().update(key_states, value_states, *args, **kwargs)
        old = value.shape[2] - value_states.shape[2]
        return key, torch.cat([2 * value[:, :, :old], value[:, :, old:]], dim=2)


def test_a_cache_equals_itself(model: LlamaForCausalLM, ids: Tensor) -> None:
    result = compare_teacher_forced(model, ids, DynamicCache, prompt_len=PROMPT_LEN)
    assert result.tokens == 2 * (SEQ_LEN - PROMPT_LEN)
    assert (result.mean_kl, result.p99_kl, result.top1_agreement) == (0.0, 0.0, 1.0)
    assert result.perplexity == result.exact_perplexity


@pytest.mark.parametrize("chunk_len", [1, 7, 100])
def test_the_perplexity_is_that_of_the_plain_model(model: LlamaForCausalLM, ids: Tensor, chunk_len: int) -> None:
    result = compare_teacher_forced(model, ids, DynamicCache, prompt_len=PROMPT_LEN, chunk_len=chunk_len)
    with torch.no_grad():
        log_probs = model(ids).logits.double().log_softmax(-1)[:, PROMPT_LEN:-1]
    loss = -log_probs.gather(-1, ids[:, PROMPT_LEN + 1 :, None]).mean()
    assert math.isclose(result.exact_perplexity, math.exp(loss), rel_tol=1e-5)


def test_a_wrong_cache_is_measured_by_hand(model: LlamaForCausalLM, ids: Tensor) -> None:
    result = compare_teacher_forced(model, ids[:1], DoubledValues, prompt_len=PROMPT_LEN, chunk_len=SEQ_LEN)
    with torch.no_grad():
        exact, wrong = DynamicCache(), DoubledValues()
        logs = []
        for cache in (exact, wrong):
            model(ids[:1, :PROMPT_LEN], **cache_argument(cache))
            logs.append(model(ids[:1, PROMPT_LEN:], **cache_argument(cache)).logits.double().log_softmax(-1)[0])
    kl = torch.nn.functional.kl_div(logs[1], logs[0], log_target=True, reduction="none").sum(-1)
    assert result.mean_kl > 1e-3
    assert math.isclose(result.mean_kl, kl.mean(), rel_tol=1e-9)
    assert math.isclose(result.p99_kl, kl.quantile(0.99), rel_tol=1e-9)
    agreement = (logs[0].argmax(-1) == logs[1].argmax(-1)).double().mean()
    assert result.top1_agreement == agreement < 1


def test_every_token_is_reported_as_progress(model: LlamaForCausalLM, ids: Tensor) -> None:
    seen: list[int] = []
    compare_teacher_forced(model, ids, DynamicCache, prompt_len=PROMPT_LEN, chunk_len=9, on_progress=seen.append)
    assert sum(seen) == ids.numel()


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((60,), {}, "input_ids must be (batch, seq_len) with at least one row, got (60,)."),
        ((0, 60), {}, "input_ids must be (batch, seq_len) with at least one row, got (0, 60)."),
        ((1, 60), {"prompt_len": 60}, "prompt_len must be from 1 to 59, got 60."),
        ((1, 60), {"prompt_len": 0}, "prompt_len must be from 1 to 59, got 0."),
        ((1, 60), {"prompt_len": 20, "chunk_len": 0}, "chunk_len must be at least 1, got 0."),
    ],
)
def test_what_cannot_be_compared_is_refused(
    model: LlamaForCausalLM, shape: tuple[int, ...], options: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape('compare_teacher_forced: ' + message)}$"):
        compare_teacher_forced(model, torch.zeros(shape, dtype=torch.int64), DynamicCache, **options)


def test_the_first_difference_is_found() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference([], []) is None
