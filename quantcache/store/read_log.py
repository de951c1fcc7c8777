"""By which path layers were last read, and what a cache does about slow paths."""

import warnings
from dataclasses import dataclass, field

from quantcache.quantization.errors import FallbackError, FallbackWarning


def strict_error(reason: str) -> FallbackError:
    """What a strict cache raises where a read would not be int8 attention for ``reason``."""
    return FallbackError(f"QuantizedInt8Cache(strict=True): every read must be int8 attention, got {reason}.")


@dataclass
class FallbackPolicy:
    """What one cache does where it is read slowly or not at all: warn once, or raise.

    Attributes:
        strict: raise.
        warned: of a slow read.
        warned_of_gradients: that they end.
        warned_of_loss: that a model went on without the cache.
        lost: how it did in the last call, None where it did not.
    """

    strict: bool = False
    warned: bool = False
    warned_of_gradients: bool = False
    warned_of_loss: bool = False
    lost: str | None = None

    def went_without(self, reason: str) -> None:
        """Note that a model was given the cache and went on without it.

        Raises:
            FallbackError: the cache is strict.
        """
        self.lost = reason
        if self.strict:
            raise FallbackError(f"QuantizedInt8Cache(strict=True): every model must keep the cache, got: {reason}.")
        if not self.warned_of_loss:
            self.warned_of_loss = True
            warnings.warn(
                f"QuantizedInt8Cache: {reason}. Its keys and values were not kept in int8, nor for a later call. "
                "cache.report() says so, too; strict=True raises instead.",
                FallbackWarning,
                stacklevel=3,
            )


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
        if self.policy.strict:
            raise strict_error(reason)
        self.kernel, self.reason = kernel, reason
        if not self.policy.warned:
            self.policy.warned = True
            warnings.warn(
                f"QuantizedInt8Cache: the cache was read by restoring it to full precision ({reason}), which is "
                "correct but slower and needs memory for one layer. Read cache.report() for every layer; "
                "strict=True raises instead.",
                FallbackWarning,
                stacklevel=3,
            )
