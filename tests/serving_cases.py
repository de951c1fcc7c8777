"""Models, prompts and managers of the tests of serving, small enough to run on a CPU in moments."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from quantcache import QuantizedInt8Cache, serving
from quantcache.layers._host import cache_argument
from quantcache.serving.versions import KNOWN

is_known = (
    Version(KNOWN.oldest).release <= Version(transformers.__version__).release[:2] <= Version(KNOWN.newest).release
)
needs_known_host = pytest.mark.skipif(
    not is_known, reason=f"transformers {transformers.__version__} has another continuous batching"
)

VOCAB = 211


def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    """Two layers whose weights are large, so that the next token depends on more than the last."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "initializer_range": 0.25,
        "eos_token_id": None,
        "bos_token_id": 1,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval().to(dtype)


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    tokens: list[int] = torch.randint(1, VOCAB, (length,), generator=generator).tolist()
    return tokens


def greedy(max_new_tokens: int = 24, **changes: Any) -> GenerationConfig:
    return GenerationConfig(
        **{"max_new_tokens": max_new_tokens, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0, **changes}
    )


def top_of(number: int, max_new_tokens: int = 24) -> GenerationConfig:
    """Several answers, which are alike: sampled from one token."""
    return greedy(max_new_tokens, do_sample=True, top_k=1, num_return_sequences=number)


def pool(num_blocks: int = 60, **changes: Any) -> ContinuousBatchingConfig:
    settings = {"page_size": 64, "num_blocks": num_blocks, "max_batch_tokens": 4096, "allow_block_sharing": False}
    return ContinuousBatchingConfig(**{**settings, **changes})


def generated(model: Any, tokens: list[int], max_new_tokens: int = 24, **options: Any) -> list[int]:
    """What ``generate`` continues with, one prompt at a time, by the cache whose format the blocks have."""
    cache = QuantizedInt8Cache(residual_length=0)
    ids = torch.tensor([tokens])
    output = model.generate(ids, **cache_argument(cache), generation_config=greedy(max_new_tokens), **options)
    new: list[int] = output[0, len(tokens) :].tolist()
    return new


@contextmanager
def serve(model: Any, *args: Any) -> Iterator[serving.Int8BatchingManager]:
    """``int8_batching`` that leaves no block behind."""
    with serving.int8_batching(model, *args) as manager:
        yield manager
        manager.stop()
        check_ledger(manager)


def check_ledger(manager: serving.Int8BatchingManager) -> None:
    """Nobody works: each block is free or kept, each once, and all are free when none is kept any more."""
    report, processor = manager.report(), manager.batch_processor
    assert (report.requests_running, report.requests_waiting, report.blocks_used) == (0, 0, 0)
    allocator = processor.cache.cache_allocators["full_attention"]
    assert not allocator.block_table
    assert not allocator.ledger.shared_ref_counts
    processor.cache.evict_cached_blocks()
    processor.cache.pool.try_to_free_sectors()
    sectors = processor.cache.pool.free_sectors
    assert len(sectors) == len(set(sectors)) == processor.cache.num_sectors
    assert manager.report().tokens_free == report.tokens


def tokenizer_of_pieces(seed: int = 0) -> PreTrainedTokenizerFast:
    """A token for each of 211 texts of one to three letters out of three, so that a string ends in many ways in many
    tokens; some are halves of a character of two bytes."""
    letters = random.Random(seed)
    texts = {"<s>": 0, "</s>": 1}
    for byte in "é".encode():
        texts[bytes_to_unicode()[byte]] = len(texts)
    while len(texts) < VOCAB:
        texts.setdefault("".join(letters.choices("abc", k=letters.choice((1, 2, 3, 4, 5, 6)))), len(texts))
    core = Tokenizer(models.BPE(texts, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<s>")
