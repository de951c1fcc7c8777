"""What a model and its cache weigh together."""

from dataclasses import astuple, dataclass
from typing import Any

from torch import nn

from quantcache.layers.native import layer_nbytes


@dataclass(frozen=True)
class MemoryReport:
    """Bytes held by a model and a cache; ``str()`` of it is a table. Activations are not held and not counted.

    Attributes:
        packed_weights: layers packed to 4 or 8 bits, their scales and biases included.
        float_weights: everything else of the model.
        cache: keys and values, slack included.
    """

    packed_weights: int
    float_weights: int
    cache: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.packed_weights + self.float_weights + self.cache

    def __str__(self) -> str:
        names = ("packed weights", "float weights", "key-value cache", "together")
        width = len(f"{self.total:,}")
        rows = zip(names, (*astuple(self), self.total), strict=True)
        return "\n".join(f"{name:<16}{nbytes:>{width},} bytes" for name, nbytes in rows)


def memory_report(model: nn.Module, past_key_values: Any = None) -> MemoryReport:
    """Count the bytes of a Qwen v1 model, packed or not, and of the cache that ``generate`` returned.

    Args:
        model: the model.
        past_key_values: any cache with layers; None counts the model alone.
    """
    seen: set[int] = set()
    packed = others = 0
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if id(tensor) in seen:
                continue  # tied
            seen.add(id(tensor))
            if hasattr(module, "qweight"):  # gptqmodel's layers have the name too
                packed += tensor.nbytes
            else:
                others += tensor.nbytes
    layers = [] if past_key_values is None else past_key_values.layers
    return MemoryReport(packed, others, sum(map(layer_nbytes, layers)))
