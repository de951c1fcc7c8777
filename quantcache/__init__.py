"""quantcache: the KV cache of Hugging Face models in int8.

    from quantcache import QuantizedInt8Cache
    model.generate(**inputs, cache=QuantizedInt8Cache())  # past_key_values= before transformers 5.24

Importing this package patches, compiles and prints nothing, and loads nothing until a name is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantcache.cache import QuantizedInt8Cache
    from quantcache.quantization.errors import CacheFileError, FallbackError, FallbackWarning
    from quantcache.store.tensor import Int8Tensor

__version__ = "0.1.0"

_HOMES = {
    "QuantizedInt8Cache": "quantcache.cache",
    "Int8Tensor": "quantcache.store.tensor",
    "CacheFileError": "quantcache.quantization.errors",
    "FallbackError": "quantcache.quantization.errors",
    "FallbackWarning": "quantcache.quantization.errors",
}

__all__ = ["CacheFileError", "FallbackError", "FallbackWarning", "Int8Tensor", "QuantizedInt8Cache", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'quantcache' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
