"""int8 blocks for a model: in a context, in one call, or for as long as a server runs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from transformers import ContinuousBatchingConfig, GenerationConfig

from quantcache.quantization.scheme import PAGE_SIZE
from quantcache.serving.refusals import PLACE, check_config, check_model
from quantcache.serving.versions import check_version

if TYPE_CHECKING:
    from quantcache.serving._host import GenerationOutput
    from quantcache.serving.manager import Int8BatchingManager


_OPTIONS: Final = {"max_new_tokens", "progress_bar", "record_timestamps", "stop_strings", "warmup"}
"""Of ``generate_batch``, which itself takes any and passes over those that it does not know."""


def check(model: Any, continuous_batching_config: ContinuousBatchingConfig | None = None) -> None:
    """Raise what ``int8_batching`` would raise, without making anything.

    Raises:
        NotImplementedError: transformers is none of 5.21 to 5.24; a layer of the model is not full attention; a setting
            is not served.
        TypeError: the model's dtype is none of float16, bfloat16 and float32.
        ValueError: a setting cannot work; the model has a manager.
    """
    check_version()
    _check_has_no_manager(model)
    check_model(model)
    if continuous_batching_config is not None:
        check_config(continuous_batching_config, model.device)


def _check_has_no_manager(model: Any) -> None:
    from quantcache.serving import _host

    if _host.cached_manager(model) is not None:
        raise ValueError(
            f"{PLACE}: a model must have one manager, {type(model).__name__} has one. Leave its context first, or call "
            "destroy_cached_continuous_batching_manager()."
        )


def create_manager(
    model: Any,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    tokenizer: Any = None,
) -> "Int8BatchingManager":
    """Make a manager of int8 blocks that the model has until ``remove_manager``; see ``int8_batching``."""
    check_version()
    check_model(model)
    _check_has_no_manager(model)
    from quantcache.serving import _host
    from quantcache.serving.manager import Int8BatchingManager, with_end

    if continuous_batching_config is None:
        continuous_batching_config = ContinuousBatchingConfig(page_size=PAGE_SIZE)
    if generation_config is None:
        generation_config = model.generation_config
    manager = Int8BatchingManager(model, with_end(generation_config), continuous_batching_config, tokenizer)
    _host.cache_manager(model, manager, manager.adopt, manager.calling)
    return manager


def remove_manager(model: Any, *, hard_stop: bool = False) -> None:
    """Take the manager of ``create_manager`` from a model and free its pool; without one, do nothing.

    Args:
        model: the model.
        hard_stop: whether to end requests that are still running, rather than wait for them.
    """
    check_version()
    from quantcache.serving import _host
    from quantcache.serving.manager import Int8BatchingManager

    manager = _host.cached_manager(model)
    if not isinstance(manager, Int8BatchingManager):
        return
    try:
        manager.close(hard_stop=hard_stop)
    finally:
        _host.forget_manager(model)


@contextmanager
def int8_batching(
    model: Any,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    tokenizer: Any = None,
) -> Iterator["Int8BatchingManager"]:
    """Have transformers' continuous batching keep keys and values of ``model`` in int8 blocks, within the context.

    ``model.generate_batch``, ``generate(cache_implementation="paged")`` and the methods of the manager then use one
    pool. A block is an int8 page of 64 tokens in every layer; the newest 1 to 63 tokens of a request are exact, in two
    blocks of the same pool (four for a model in float32). A token attends to the exact keys and values of its own page
    and of the tokens that it was fed with, and to int8 before those.

    Args:
        model: a causal language model of transformers whose layers are all full attention. While requests run it
            serves nothing else.
        continuous_batching_config: of transformers, with ``page_size=64``. ``num_blocks`` and ``max_memory_percent``
            mean the bytes that they mean there, which hold 1.9 times the tokens of bfloat16. None for transformers'
            own choices.
        generation_config: how to sample, and how long answers are; None for the model's.
        tokenizer: of the model, for ``stop_strings``, of the config or of a request. A call of ``generate_batch`` can
            bring it, too.

    Yields:
        The manager: ``add_request``, ``request_id_iter``, ``cancel_request`` and the like are transformers',
        ``report()`` says what the pool holds. At the end requests that still run are waited for, after an exception
        they are ended.

    Raises:
        NotImplementedError: transformers is none of 5.21 to 5.24; a layer of the model is not full attention; a setting
            is not served.
        TypeError: the model's dtype is none of float16, bfloat16 and float32.
        ValueError: a setting cannot work; the model has a manager; ``stop_strings`` have no tokenizer.
        MemoryError: the pool does not fit.
    """
    manager = create_manager(model, continuous_batching_config, generation_config, tokenizer=tokenizer)
    hard_stop = True
    try:
        yield manager
        hard_stop = False
    finally:
        remove_manager(model, hard_stop=hard_stop)


def generate_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    tokenizer: Any = None,
    **options: Any,
) -> dict[str, "GenerationOutput"]:
    """Generate for many prompts at once over int8 blocks: ``model.generate_batch`` in a context of its own.

    Args:
        model: see ``int8_batching``.
        prompts: tokens of each prompt.
        continuous_batching_config: see ``int8_batching``.
        generation_config: see ``int8_batching``.
        tokenizer: see ``int8_batching``.
        options: others of ``generate_batch``: ``max_new_tokens``, ``stop_strings``, ``progress_bar``,
            ``record_timestamps``, ``warmup``.

    Returns:
        By the name of the request, in the order of the prompts, what transformers returns: ``generated_tokens``, and an
        ``error`` for a prompt that was refused or failed.

    Raises:
        As ``int8_batching`` does.
    """
    unknown = sorted(options.keys() - _OPTIONS)
    if unknown:
        raise TypeError(f"generate_batch: options must be of {', '.join(sorted(_OPTIONS))}, got {unknown[0]}.")
    with int8_batching(model, continuous_batching_config, generation_config, tokenizer=tokenizer):
        outputs: dict[str, GenerationOutput] = model.generate_batch(prompts, **options)
        return outputs
