"""Memory of a GPU, from its name or from a size as people write it."""

import re
from typing import Final

from quantcache.planning.fit import GIB

GPUS: Final = {
    "t4": 15.0, "l4": 22.5, "a10g": 22.5, "rtx3090": 24.0, "rtx4090": 24.0, "rtx5090": 31.8,
    "a100-40": 39.5, "l40s": 44.5, "a100": 79.3, "h100": 79.6, "h200": 140.4, "b200": 179.0,
}  # fmt: skip
"""GiB that the driver shows for common cards, about; give a size for another."""

_UNITS: Final = {"": GIB, "g": GIB, "gib": GIB, "gb": 10**9, "m": 1 << 20, "mib": 1 << 20, "mb": 10**6}


def parse_gpu(text: str) -> int:
    """Bytes of a GPU from a name of ``GPUS`` or a size like 24, 80GB or 79.6GiB; a bare number is GiB.

    Raises:
        ValueError: neither.
    """
    cleaned = text.strip().lower().replace(" ", "")
    if cleaned in GPUS:
        return int(GPUS[cleaned] * GIB)
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([a-z]*)", cleaned)
    if match is None or match[2] not in _UNITS or float(match[1]) == 0:
        raise ValueError(f"must be a size such as 24, 80GB or 79.6GiB, or one of {', '.join(GPUS)}, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])
