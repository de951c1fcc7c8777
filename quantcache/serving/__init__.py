"""Many requests at once: int8 pages under transformers' continuous batching.

    from quantcache import serving
    with serving.int8_batching(model) as manager:
        outputs = model.generate_batch(prompts, max_new_tokens=256)
        print(manager.report())

``generate_batch``, streaming and ``generate(cache_implementation="paged")`` of transformers then keep keys and values
in int8 blocks. Importing this loads nothing until a name is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantcache.serving.batching import check, create_manager, generate_batch, int8_batching, remove_manager
    from quantcache.serving.manager import Int8BatchingManager
    from quantcache.serving.report import ServingReport

_HOMES = {
    "Int8BatchingManager": "quantcache.serving.manager",
    "ServingReport": "quantcache.serving.report",
    "check": "quantcache.serving.batching",
    "create_manager": "quantcache.serving.batching",
    "generate_batch": "quantcache.serving.batching",
    "int8_batching": "quantcache.serving.batching",
    "remove_manager": "quantcache.serving.batching",
}

__all__ = [
    "Int8BatchingManager",
    "ServingReport",
    "check",
    "create_manager",
    "generate_batch",
    "int8_batching",
    "remove_manager",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'quantcache.serving' has no attribute {name!r}")
    if _HOMES[name] == "quantcache.serving.manager":
        importlib.import_module("quantcache.serving.versions").check_version()
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
