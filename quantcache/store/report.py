"""What a cache says of itself: what each layer stores, and by which path it was last read."""

import warnings
from dataclasses import dataclass, field

from quantcache.quantization.errors import FallbackError, FallbackWarning


@dataclass(frozen=True)
class LayerReport:
    """One row of ``CacheReport``.

    Attributes:
        layer_idx: decoder layer.
        storage: "int8" or "int8, window N", with ", in host memory" while it is offloaded; "empty"; "shared" for a
            layer that reads another one's states; or the transformers layer class that keeps its own states here.
        seq_len: tokens stored.
        nbytes: bytes allocated, slack included.
        kernel: what read the layer last: a backend of ``ops``, "exact" while no page is closed, "restored" after a
            fallback, "native" for a transformers layer, "none" before the first read.
        reason: why the read was a fallback, else None.
    """

    layer_idx: int
    storage: str
    seq_len: int
    nbytes: int
    kernel: str
    reason: str | None


@dataclass(frozen=True)
class CacheReport:
    """What ``QuantizedInt8Cache.report()`` returns; ``str()`` of it is a table."""

    layers: list[LayerReport]

    @property
    def backend(self) -> str:
        """The kernels that read the layers last, each once, in order of the layers."""
        return ", ".join(dict.fromkeys(row.kernel for row in self.layers)) or "none"

    def __str__(self) -> str:
        head = ("layer", "storage", "tokens", "bytes", "kernel", "reason")
        rows = [
            (str(r.layer_idx), r.storage, f"{r.seq_len:,}", f"{r.nbytes:,}", r.kernel, r.reason or "")
            for r in self.layers
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
        return "\n".join(line.rstrip() for line in lines)


def strict_error(reason: str) -> FallbackError:
    """What a strict cache raises where a read would not be int8 attention for ``reason``."""
    return FallbackError(f"QuantizedInt8Cache(strict=True): every read must be int8 attention, got {reason}.")


@dataclass
class FallbackPolicy:
    """What one cache does about slow reads: warn once, or raise."""

    strict: bool = False
    warned: bool = False
    warned_of_gradients: bool = False


@dataclass
class ReadLog:
    """By which path one layer was last read."""

    policy: FallbackPolicy = field(default_factory=FallbackPolicy)
    kernel: str = "none"
    reason: str | None = None

    def ran(self, kernel: str) -> None:
        """Note a read that went the intended way."""
        self.kernel, self.reason = kernel, None

    def cut_gradients(self, kernel: str) -> None:
        """Note a read by ``kernel`` whose gradients end at the tokens of earlier calls; call it before it is done.

        Raises:
            FallbackError: the cache is strict, and the read restores.
        """
        reason = "gradients are enabled, and stop at the tokens of earlier calls"
        if self.policy.strict and kernel == "restored":
            raise strict_error(reason)
        self.kernel, self.reason = kernel, reason
        if not self.policy.warned_of_gradients:
            self.policy.warned_of_gradients = True
            warnings.warn(
                f"QuantizedInt8Cache: {reason}, which the cache holds as constants. "
                "Use torch.no_grad() where no gradients are needed.",
                FallbackWarning,
                stacklevel=3,
            )

    def fell_back(self, reason: str, kernel: str = "restored") -> None:
        """Note a read of restored states by ``kernel``; call it before they are restored.

        Raises:
            FallbackError: the cache is strict.
        """
        advice = "Read cache.report() for every layer"
        if self.policy.strict:
            raise strict_error(reason)
        self.kernel, self.reason = kernel, reason
        if not self.policy.warned:
            self.policy.warned = True
            warnings.warn(
                f"QuantizedInt8Cache: the cache was read by restoring it to full precision ({reason}), which is "
                f"correct but slower and needs memory for one layer. {advice}; strict=True raises instead.",
                FallbackWarning,
                stacklevel=3,
            )
