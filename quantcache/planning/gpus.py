"""Memory of a GPU, from its name or from a size as people write it."""

import difflib
import re
from typing import Final

from quantcache.planning.fit import GIB

GPUS: Final = {
    "t4": 15.0, "l4": 22.5, "a10g": 22.5, "rtx3090": 24.0, "rtx4090": 24.0, "rtx5090": 31.8,
    "a100-40": 39.5, "l40s": 44.5, "a100": 79.3, "h100": 79.6, "h200": 140.4, "b200": 179.0,
}  # fmt: skip
"""GiB that the driver shows for common cards, about; give a size for another."""

_UNITS: Final = {"": GIB, "g": GIB, "gib": GIB, "gb": 10**9, "m": 1 << 20, "mib": 1 << 20, "mb": 10**6}

_COUNTS: Final = {"": 1, "k": 1 << 10, "m": 1 << 20}
_SEVERAL: Final = re.compile(r"(\d+)[x*](.+)")


def parse_gpu(text: str) -> int:
    """Bytes of a GPU, or of several alike.

    Args:
        text: a name of ``GPUS``, with or without maker and size, as "NVIDIA A100-80GB"; or a size like 24, 80GB or
            79.6GiB, of which a bare number is GiB. Before either a number of GPUs may stand: 2x80GB, 4 x H100.

    Raises:
        ValueError: it is neither; the message names what is nearest.
    """
    cleaned = re.sub(r"[\s_]|nvidia|geforce|tesla", "", text.lower())
    number, cleaned = (int(found[1]), found[2]) if (found := _SEVERAL.fullmatch(cleaned)) else (1, cleaned)
    nbytes = _named(cleaned) or _sized(cleaned)
    if not nbytes or not number:
        near = difflib.get_close_matches(cleaned, GPUS, n=2, cutoff=0.5)
        hint = f" Is it {' or '.join(near)}?" if near else ""
        raise ValueError(
            f"must be a size such as 24, 80GB, 79.6GiB or 2x80GB, or one of {', '.join(GPUS)}, got {text!r}.{hint}"
        )
    return number * nbytes


def parse_count(text: str) -> int:
    """A number of tokens as people write it: 8192, 8,192, 8k (1,024 each) or 1M.

    Raises:
        ValueError: it is none, or below 1.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([km]?)", re.sub(r"[\s_,]", "", text.lower()))
    count = 0 if match is None else int(float(match[1]) * _COUNTS[match[2]])
    if count < 1:
        raise ValueError(f"must be a number of tokens from 1, as 8192 or 8k, got {text!r}")
    return count


def _named(cleaned: str) -> int:
    """Bytes of a card by its name, of those of several sizes the one whose size stands behind it; 0 for none."""
    name, _, size = re.sub(r"(gib|gb|g)$", "", cleaned).partition("-")
    if size and f"{name}-{size}" in GPUS:
        return int(GPUS[f"{name}-{size}"] * GIB)
    if name not in GPUS:
        return 0
    # What a maker calls 80 GB is a little less in GiB of the driver.
    return (
        int(GPUS[name] * GIB) if not size or (size.isdigit() and abs(int(size) - GPUS[name]) < 0.07 * int(size)) else 0
    )


def _sized(cleaned: str) -> int:
    """Bytes of a size; 0 for none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([a-z]*)", cleaned)
    return 0 if match is None or match[2] not in _UNITS else int(float(match[1]) * _UNITS[match[2]])
