"""Kernels that came inside the installed wheel, found by what they were built from.

``tools/wheel.py`` puts them there; an installation without them has no index, and every kernel is built at first use.
One is taken only if it was built from the very text that would be built here, so one whose source was edited since is
not used. They are as trustworthy as the code beside them, and are held against their digests for damage alone.
"""

import functools
import hashlib
import json
import logging
from pathlib import Path
from typing import Final, NamedTuple

FOLDER: Final = Path(__file__).parents[1] / "prebuilt"
INDEX: Final = "index.json"

logger = logging.getLogger("quantcache")


class Place(NamedTuple):
    """Where a kernel lies.

    Attributes:
        archive: file name in the folder; one that ends with ".xz" is compressed.
        start: in what the archive holds.
        size: in bytes.
        content: digest of the kernel.
    """

    archive: str
    start: int
    size: int
    content: str


class Index(NamedTuple):
    """What the wheel has.

    Attributes:
        texts: digest of the text that the kernels of each program were built from.
        kernels: place of each kernel by its name: program and variant, with a space between.
        nvrtc: version that built the CUDA kernels; empty if there are none.
    """

    texts: dict[str, str]
    kernels: dict[str, Place]
    nvrtc: str = ""


def digest(content: bytes) -> str:
    """Of a text or of a kernel."""
    return hashlib.sha256(content).hexdigest()[:32]


@functools.cache
def index() -> Index:
    """Of the wheel; empty where it has no kernels."""
    try:
        read = json.loads((FOLDER / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Index({}, {})
    return Index(read["texts"], {name: Place(*place) for name, place in read["kernels"].items()}, read["nvrtc"])


def is_current(program: str, text: str) -> bool:
    """Whether the kernels of ``program`` in the wheel were built from ``text``."""
    return index().texts.get(program) == digest(text.encode())


def find(program: str, variant: str, text: str) -> bytes | None:
    """A kernel of the wheel, or None: it has none, or one that was built from another text or is damaged.

    Args:
        program: what was built, as "attention.cu".
        variant: what it was built for, and how.
        text: all that it would be built from here.
    """
    place = index().kernels.get(f"{program} {variant}")
    if place is None or not is_current(program, text):
        return None
    try:
        content = _unpacked(place.archive)[place.start : place.start + place.size]
    except Exception as error:  # of reading, of unpacking, or of a Python that was built without lzma
        fault = str(error)
    else:
        if digest(content) == place.content:
            return content
        fault = "it is damaged"
    logger.warning("quantcache: %s of %s is not used: %s.", place.archive, FOLDER, fault)
    return None


@functools.lru_cache(maxsize=2)
def _unpacked(archive: str) -> bytes:
    """What an archive holds; kept for the next kernel of the same model."""
    content = (FOLDER / archive).read_bytes()
    if not archive.endswith(".xz"):
        return content
    import lzma  # where no wheel's kernels are read, it is not needed

    return lzma.decompress(content)
