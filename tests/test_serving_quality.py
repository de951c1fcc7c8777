"""Is a real model over int8 blocks as near to its exact cache as the promise says, chunks and prefixes included?"""

from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from quantcache.evaluation.models import load_model
from quantcache.layers._host import cache_argument
from tests.serving_cases import greedy, needs_known_host, pool, serve

pytestmark = [pytest.mark.real_model, needs_known_host]

MAX_MEAN_KL = 1.0e-4
PROMPT, TOKENS = 512, 768


@pytest.fixture(scope="module")
def real_model() -> tuple[Any, Tensor]:
    """SmolLM2-135M-Instruct and real English, (TOKENS,)."""
    model, tokenizer, _ = load_model(None, device="cpu", dtype=torch.float32)
    text = "\n".join(topics[name] for name in sorted(topics))
    return model, tokenizer(text[: 8 * TOKENS], return_tensors="pt").input_ids[0, :TOKENS]


@pytest.fixture(scope="module")
def exact(real_model: tuple[Any, Tensor]) -> Tensor:
    """Log probabilities behind each token from ``PROMPT`` on, by the exact cache."""
    model, ids = real_model
    with torch.no_grad():
        logits = model(ids[None], **cache_argument(DynamicCache())).logits[0, PROMPT:]
    return logits.log_softmax(-1)


@pytest.mark.parametrize(("chunk", "is_shared"), [(64, True), (256, False)])
def test_quality_is_that_of_the_exact_cache(
    real_model: tuple[Any, Tensor], exact: Tensor, chunk: int, is_shared: bool
) -> None:
    """Of the tokens from ``PROMPT`` on, all of which read int8 pages: of their own prompt, or of a stored prefix."""
    model, ids = real_model
    states: list[Tensor] = []
    config = pool(80, max_batch_tokens=chunk, allow_block_sharing=is_shared)
    with serve(model, config, greedy(1)) as manager:
        if is_shared:
            model.generate_batch([ids[: PROMPT + 1].tolist()])
            assert manager.report().blocks_kept == PROMPT // 64
        hook = model.model.register_forward_hook(
            lambda module, args, output: states.append(output.last_hidden_state[0])
        )
        (output,) = model.generate_batch([ids.tolist()]).values()
        hook.remove()
    assert output.error is None
    fed = torch.cat(states)
    assert len(fed) == TOKENS - (PROMPT if is_shared else 0)
    with torch.no_grad():
        found = model.lm_head(fed[PROMPT - TOKENS :]).log_softmax(-1)
    kl = float((exact.exp() * (exact - found)).sum(-1).mean())
    same = float((exact.argmax(-1) == found.argmax(-1)).float().mean())
    print(f"chunks of {chunk}, {'shared' if is_shared else 'own'} prefix: KL {kl:.2e}, same top token {same:.4f}")
    assert 0 < kl <= MAX_MEAN_KL
    assert same >= 0.99
