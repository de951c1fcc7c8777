"""Whatever serving touches of transformers' continuous batching that is private or patched.

Everything here has a test in ``tests/test_serving_host.py``, named for what breaks when the host changes. Imported only
after ``versions.check_version``.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from typing import Any, Final
from unittest import mock

import torch
from transformers import GenerationConfig, StopStringCriteria
from transformers.generation.continuous_batching import cache as host_cache
from transformers.generation.continuous_batching.cache import PagedAttentionMemoryHandler as MemoryHandler
from transformers.generation.continuous_batching.cache_allocators import CachePool
from transformers.generation.continuous_batching.cache_allocators import FullAttentionCacheAllocator as Allocator
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager as Manager
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState, RequestStatus

from quantcache.serving.refusals import tokens_of

__all__ = ["Allocator", "CachePool", "GenerationOutput", "Manager", "MemoryHandler", "RequestState"]

_CACHED: Final = "_cached_continuous_batching_manager"
"""Where a model keeps the manager that ``generate_batch`` takes."""

_STORE: Final = "int8_store"
"""Under which name the store of a layer goes from ``update`` to the attention function."""

STOP_STRINGS: Final = "stop_strings"
"""Under which name the stop strings of a request lie among what a request tells the processors of its logits. This goes
with it everywhere: to other ranks, to its forks, and to what it is when it is started again."""

CHILD: Final = "__child#"
"""What the names of further answers to a request have in them."""

_LEFT: Final = (RequestStatus.FINISHED, RequestStatus.PENDING)
"""What a request is that has left an asynchronous batch in which it still is."""

_patching = threading.Lock()


@contextmanager
def making_caches_of(allocator: type[Allocator], memory_handler: type[MemoryHandler]) -> Iterator[None]:
    """Have this thread make paged caches of full-attention layers with these classes, and other threads as ever."""
    thread = threading.get_ident()

    def ours_here(ours: Any, original: Any) -> Any:
        def make(*args: Any, **kwargs: Any) -> Any:
            return (ours if threading.get_ident() == thread else original)(*args, **kwargs)

        make.supports_block_table = True  # type: ignore[attr-defined] # which is asked of the class
        return make

    with (
        _patching,
        mock.patch.dict(host_cache.ATTN_TYPE_TO_ALLOCATOR, {"full_attention": ours_here(allocator, Allocator)}),
        mock.patch.object(host_cache, "PagedAttentionMemoryHandler", ours_here(memory_handler, MemoryHandler)),
    ):
        yield


def allocator_of(processor: Any) -> Any:
    """The allocator of the full-attention layers of a batch processor."""
    return processor.cache.cache_allocators["full_attention"]


def hand_stores_to_layers(cache: Any) -> None:
    """Have ``update`` of a paged cache, which models call as of 5.24, store nothing and pass on the layer's store."""

    def update(
        key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kwargs[_STORE] = cache.layer_to_allocator[layer_idx]
        return key_states, value_states

    cache.update = update


def store_of(module: Any, kwargs: Mapping[str, Any]) -> Any:
    """The allocator that keeps the pages of an attention module, None outside of a batch.

    Args:
        module: the attention module.
        kwargs: of its attention function. Before 5.24 the whole paged cache is among them.
    """
    if _STORE in kwargs:
        return kwargs[_STORE]
    cache = kwargs.get("cache")
    return None if cache is None else cache.layer_to_allocator[module.layer_idx]


def lengths_of(kwargs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the new tokens of each sequence begin, and all of its tokens: int32 (sequences + 1,) each."""
    return kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]["full_attention"]


def block_table_of(kwargs: Mapping[str, Any], index: int) -> Any:
    """The block table of a batch that decodes, int32 (sequences, width), None for another batch."""
    table = kwargs.get("block_table")
    return None if table is None else table[index]


def prompt_len(processor: Any, request_id: str) -> int | None:
    """Tokens of the prompt of a request that was started again with its answer as part of the prompt, else None."""
    state = processor.scheduler.active_requests.get(request_id)
    return (state._true_initial_tokens or None) if state is not None else None


def tokens_in_batch(processor: Any) -> int:
    """New tokens of the batch that is prepared, padding included; at least 1 where batches are asynchronous."""
    return int(getattr(processor.inputs_and_outputs, "num_q_tokens", 1))


def has_request(processor: Any, request_id: str) -> bool:
    """Whether a request of this name is at work or waits to be."""
    scheduler = processor.scheduler
    return request_id in scheduler.active_requests or request_id in scheduler.waiting_requests


def names_of_answers(request_id: str, number: int) -> list[str]:
    """Under which names a request gets so many answers."""
    return [*(f"{request_id}{CHILD}{index}" for index in range(number - 1)), request_id]


def text_of_tokens(tokenizer: Any) -> dict[int, bytes]:
    """The text of each token, as ``generate`` takes it for its stop strings: UTF-8, or a part of a character in it."""
    mode = StopStringCriteria._get_stop_string_matching_mode(tokenizer)
    pieces, tokens = StopStringCriteria.clean_tokenizer_vocab(tokenizer, stop_string_matching_mode=mode)
    texts = (piece if isinstance(piece, bytes) else piece.encode() for piece in pieces)
    return dict(zip(tokens, texts, strict=True))


def tokens_before(state: RequestState, with_prompt: bool) -> Iterator[int]:
    """The tokens of a request, the newest first, with or without those of its prompt."""
    yield from reversed(state.generated_tokens)
    prompt_len = state._true_initial_tokens or len(state.initial_tokens)
    yield from islice(reversed(state.initial_tokens), None if with_prompt else len(state.initial_tokens) - prompt_len)


def watch_new_tokens(processor: Any, is_completed: Callable[[RequestState, int], bool]) -> None:
    """Have a request end with a token as with one that ends answers, and one that was cancelled get no more.

    Args:
        processor: a batch processor.
        is_completed: asked of each request that brought stop strings, with its new token.
    """
    batches, scheduler, logits = processor.inputs_and_outputs, processor.scheduler, processor.logit_processor

    def prepare_batch_update() -> Any:
        requests, tokens, logprobs = type(batches).prepare_batch_update(batches)
        for request in requests:
            # One whose blocks went while an asynchronous batch was under way: the host would look for them and fail.
            state = request.state
            if state.status not in _LEFT and scheduler.active_requests.get(state.request_id) is not state:
                state.status = RequestStatus.FINISHED
        states = [request.state for request in requests if request.has_new_token]
        for state, token in zip(states, tokens, strict=False):
            if (
                STOP_STRINGS in state.logit_processor_kwargs
                and state.status not in _LEFT
                and is_completed(state, token)
            ):
                state._eos_token_ids.add(token)
        return requests, tokens, logprobs

    def check_kwargs(kwargs: dict[str, Any]) -> None:
        type(logits).check_kwargs(logits, {name: kwargs[name] for name in kwargs if name != STOP_STRINGS})

    batches.prepare_batch_update, logits.check_kwargs = prepare_batch_update, check_kwargs


def cached_manager(model: Any) -> Any:
    """The manager that ``generate_batch`` of a model takes, None for a new one."""
    return getattr(model, _CACHED, None)


def cache_manager(
    model: Any,
    manager: Manager,
    begin: Callable[..., Manager],
    calling: Callable[..., AbstractContextManager[GenerationConfig]],
) -> None:
    """Have ``generate_batch`` of a model and whatever else asks it for a manager take this one.

    Args:
        model: the model.
        manager: the manager.
        begin: called with what ``init_continuous_batching`` is; it returns the manager.
        calling: called with what a call of ``generate_batch`` asks for, a generation config, ``stop_strings`` and a
            ``tokenizer``, each None where it does not say; it has the config of the call while that lasts.
    """
    generate_batch = model.generate_batch

    def with_config(
        inputs: Any,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        stop_strings: Any = None,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> Any:
        prompts = [tokens_of(prompt) for prompt in inputs]  # what fails within is only logged
        with calling(generation_config, stop_strings, tokenizer) as config:
            return generate_batch(prompts, config, *args, **kwargs)

    setattr(model, _CACHED, manager)
    model.init_continuous_batching, model.generate_batch = begin, with_config


def forget_manager(model: Any) -> None:
    """Undo ``cache_manager``."""
    for name in (_CACHED, "init_continuous_batching", "generate_batch"):
        vars(model).pop(name, None)


def new_state(request_id: str, prompt: list[int]) -> RequestState:
    """A request that fails before it is queued."""
    return RequestState(request_id=request_id, initial_tokens=prompt)
