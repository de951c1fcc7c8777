"""Warnings and errors of quantcache that are not plain ``ValueError`` or ``TypeError``."""


class FallbackWarning(UserWarning):
    """The cache was read by a slower path than int8 attention; ``cache.report()`` says where and why."""


class FallbackError(RuntimeError):
    """What ``FallbackWarning`` tells, raised by a cache made with ``strict=True``."""


class CacheFileError(ValueError):
    """A file is no prompt cache, is damaged or of another model; the message says which, and nothing was loaded."""


class BuildError(RuntimeError):
    """Kernels cannot be built or used here; the message is the reason."""
