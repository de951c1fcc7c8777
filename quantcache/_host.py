"""What is assumed of transformers that it has changed or may change: the cache's argument, and the tested releases.

transformers 5.24 renamed the argument ``past_key_values`` of models, masks and ``generate`` to ``cache``, and so the
field of what models return. Elsewhere in this library the name is never spelled: it is asked for here.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import Cache

CACHE_NAMES: Final = ("cache", "past_key_values")
"""What the argument is called, the newest name first."""


def _host_cache_name() -> str:
    """The name under which ``generate`` hands a model its cache, here and now."""
    known = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return next((name for name in CACHE_NAMES if name in known), CACHE_NAMES[0])


CACHE_NAME: Final = _host_cache_name()
"""The one of ``CACHE_NAMES`` that this transformers hands to models, and takes without a warning."""


class Releases(NamedTuple):
    """The releases of a package that the tests run with.

    Attributes:
        oldest: which the package's own requirements allow, and no older one.
        newest: newer ones are allowed too, and may have changed what is relied on.
    """

    oldest: str
    newest: str


TESTED: Final = {"torch": Releases("2.11.0", "2.14.1"), "transformers": Releases("5.17.0", "5.24.0")}


def untested() -> list[str]:
    """A sentence for each package whose release here is outside of ``TESTED``."""
    sentences = []
    for name, version in (("torch", torch.__version__), ("transformers", transformers.__version__)):
        oldest, newest = TESTED[name]
        release = Version(str(version)).release
        if release > Version(newest).release:
            sentences.append(f"{name} {version} is untested: it is newer than {newest}, the newest that was tested.")
        elif release < Version(oldest).release:
            sentences.append(f"{name} {version} is not supported: it is older than {oldest}, the oldest that is.")
    return sentences


def cache_argument(cache: Cache | None, model: Any = None) -> dict[str, Any]:
    """``cache`` as a keyword argument of a model, of ``generate`` or of transformers' other functions.

    Args:
        cache: what to hand over.
        model: the model whose ``forward`` is called, which may know only one of the names; None for ``CACHE_NAME``.
    """
    return {CACHE_NAME if model is None else _name_for(type(model).forward): cache}


def feed(model: Any, ids: Tensor, cache: Cache, **options: Any) -> Any:
    """Call ``model`` with tokens behind those in ``cache``, and see to it that the model takes the cache.

    Args:
        model: a causal language model.
        ids: int64 (batch, query_len), on its device.
        cache: what it reads and fills.
        options: for its ``forward``.

    Returns:
        What the model returns.

    Raises:
        RuntimeError: it went by another cache, because it passed over the argument.
    """
    output = model(ids, use_cache=True, **cache_argument(cache, model), **options)
    used = getattr(output, CACHE_NAME, None)
    if used is not None and used is not cache:
        raise RuntimeError(
            f"feed: {type(model).__name__} must take its cache as {' or '.join(CACHE_NAMES)}, got back another cache "
            f"than it was given as {next(iter(cache_argument(cache, model)))}. Nothing was read from the cache."
        )
    return output


@functools.lru_cache(maxsize=64)
def _name_for(forward: Callable[..., Any]) -> str:
    """The name that ``forward`` knows the cache by; transformers' where it does not say."""
    known = inspect.signature(forward).parameters
    names = [name for name in CACHE_NAMES if name in known]
    return CACHE_NAME if CACHE_NAME in names or not names else names[0]


def take_cache(place: str, arguments: dict[str, Any], *, given: Any = None) -> Any:
    """Take the cache out of keyword arguments, under whichever name it came.

    Args:
        place: where, for the message.
        arguments: the names of ``CACHE_NAMES`` are removed from it.
        given: a cache that came some other way; None for none.

    Returns:
        What came, None where nothing did.

    Raises:
        ValueError: two different ones came.
        TypeError: a cache came under a name that is not known here, which a model would pass over in silence.
    """
    found = [value for value in (given, *(arguments.pop(name, None) for name in CACHE_NAMES)) if value is not None]
    if any(value is not found[0] for value in found):
        raise ValueError(f"{place}: one of {' and '.join(CACHE_NAMES)} must be given, got both. They are one argument.")
    for name, value in arguments.items():
        if isinstance(value, Cache):
            raise TypeError(
                f"{place}: the cache must come as {' or '.join(CACHE_NAMES)}, got it as {name}. transformers "
                f"{transformers.__version__} may have renamed the argument; `quantcache doctor` says what was tested."
            )
    return found[0] if found else None


def caches_in(arguments: Mapping[str, Any]) -> list[Any]:
    """Every cache among the keyword arguments of a call, under each of ``CACHE_NAMES``."""
    return [arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None]


def cache_of(output: Any) -> Any:
    """The cache in what a model or ``generate`` returned, None without one."""
    return getattr(output, CACHE_NAME)
