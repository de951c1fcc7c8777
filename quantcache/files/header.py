"""The header of a safetensors file: where each tensor lies, and what quantcache says about them.

The text is the one that the safetensors library writes for the same tensors, in the same order, so that any safetensors
reader opens the file; reading is stricter, since nothing in a header may be trusted before it is checked.

Loads no torch.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import xxhash

from quantcache.quantization.errors import CacheFileError

if TYPE_CHECKING:
    import torch

METADATA_KEY: Final = "quantcache"
"""The one entry of the header's ``__metadata__``: a JSON object as text."""

MAX_HEADER_BYTES: Final = 100_000_000
"""What the safetensors library accepts."""

MAX_TABLE_BYTES: Final = 4 << 20
"""Of a header without its checksums, which take 16 bytes for each mebibyte of tensors. 128 layers take 0.2 MiB; what a
header becomes when it is parsed may be thirty times as large, which a small file should not bring about."""

LENGTH_BYTES: Final = 8
"""The file begins with the length of the header, an unsigned little-endian integer."""

CHUNK_BYTES: Final = 1 << 20
"""Bytes of a tensor that share a checksum: small enough to stay in a processor's cache from copy to checksum."""

DIGITS: Final = 16
"""Hex digits of an XXH3-64 checksum."""

_HEX: Final = frozenset("0123456789abcdef")

HEADER_DIGEST: Final = "header_xxh3"
CHECKSUMS: Final = "checksums"


class Dtype(NamedTuple):
    """A dtype that files hold: what torch calls it, and bytes of an element."""

    name: str
    itemsize: int


# In the order of the safetensors library, whose writer puts the last first: sizes fall, so every tensor is aligned.
DTYPES: Final = {
    "BOOL": Dtype("bool", 1),
    "U8": Dtype("uint8", 1),
    "I8": Dtype("int8", 1),
    "I16": Dtype("int16", 2),
    "F16": Dtype("float16", 2),
    "BF16": Dtype("bfloat16", 2),
    "I32": Dtype("int32", 4),
    "F32": Dtype("float32", 4),
    "F64": Dtype("float64", 8),
    "I64": Dtype("int64", 8),
}
_ORDER: Final = {name: place for place, name in enumerate(DTYPES)}
_NAMES: Final = {f"torch.{dtype.name}": name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in a file.

    Attributes:
        dtype: a name of ``DTYPES``.
        shape: of the tensor.
        start: first byte, counted from the end of the header.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def stop(self) -> int:
        """The byte behind its last."""
        return self.start + self.nbytes

    @property
    def num_chunks(self) -> int:
        """Checksums of the tensor."""
        return -(-self.nbytes // CHUNK_BYTES)


def arrange(specs: "Mapping[str, tuple[torch.dtype, tuple[int, ...]]]") -> dict[str, Entry]:
    """Places for tensors of these dtypes and shapes, in the order of the file.

    Raises:
        TypeError: a dtype that files do not hold.
    """
    for name, (dtype, _) in specs.items():
        if str(dtype) not in _NAMES:
            raise TypeError(f"prompt cache: {name} must have one of the dtypes {', '.join(DTYPES)}, got {dtype}.")
    kinds = {name: _NAMES[str(dtype)] for name, (dtype, _) in specs.items()}
    entries, start = {}, 0
    for name in sorted(specs, key=lambda name: (-_ORDER[kinds[name]], name)):
        entries[name] = Entry(kinds[name], specs[name][1], start)
        start = entries[name].stop
    return entries


def encode(entries: Mapping[str, Entry], description: Mapping[str, Any], checksums: Mapping[str, str]) -> bytes:
    """Length and text of the header. Its size does not depend on the digits of the checksums."""
    blank = "0" * DIGITS
    text_of = {**description, HEADER_DIGEST: blank, CHECKSUMS: checksums}
    table: dict[str, Any] = {"__metadata__": {METADATA_KEY: _json(text_of)}}
    for name, entry in entries.items():
        table[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [entry.start, entry.stop]}
    header = bytearray(_json(table).encode())
    header += b" " * (-len(header) % 8)
    place = _digest_place(header, blank)
    header[place : place + DIGITS] = _digest(header, blank).encode()
    return len(header).to_bytes(LENGTH_BYTES, "little") + header


@dataclass(frozen=True)
class Header:
    """A checked header.

    Attributes:
        entries: the tensors by name, in no order.
        description: what ``encode`` was given; its meaning is not checked here.
        checksums: of each tensor, the digits of its chunks one behind the other.
        nbytes: of the header and its length; where the tensors begin.
    """

    entries: dict[str, Entry]
    description: dict[str, Any]
    checksums: dict[str, str]
    nbytes: int


def header_length(path: Path, prefix: bytes, size: int) -> int:
    """Bytes of the header of a file of ``size`` bytes that begins with ``prefix``.

    Raises:
        CacheFileError: more than the file holds.
    """
    length = int.from_bytes(prefix, "little")
    longest = min(MAX_TABLE_BYTES + 2 * DIGITS * (size // CHUNK_BYTES), MAX_HEADER_BYTES)
    if len(prefix) < LENGTH_BYTES or not 2 <= length <= min(size - LENGTH_BYTES, longest):
        raise refusal(
            path,
            f"a safetensors file must start with the length of its header, from 2 to {longest} and less than "
            f"the {size} bytes of the file",
            length if len(prefix) == LENGTH_BYTES else f"{len(prefix)} bytes",
            "Is it a prompt cache, and all of it?",
        )
    return length


def decode(path: Path, text: bytes, size: int) -> Header:
    """Parse a header and check it against the ``size`` of the whole file.

    Raises:
        CacheFileError: no prompt cache, cut short, damaged or forged.
    """
    table = _parse(path, text, "the header")
    metadata = table.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not isinstance(metadata.get(METADATA_KEY), str):
        raise refusal(
            path,
            f"the header must have the entry {METADATA_KEY!r} in __metadata__",
            "none",
            "It may be a safetensors file, but it is no prompt cache of quantcache.",
        )
    if len(metadata) > 1:
        raise refusal(path, f"the entry {METADATA_KEY!r} must be alone in __metadata__", _shown(sorted(metadata)))
    description = _parse(path, metadata[METADATA_KEY].encode("utf-8", "surrogatepass"), f"the entry {METADATA_KEY!r}")
    entries = {name: _entry(path, name, value) for name, value in table.items()}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise refusal(path, f"{name} must start where the tensor before it ends, at byte {end}", entry.start)
        end = entry.stop
    nbytes = LENGTH_BYTES + len(text)
    if nbytes + end != size:
        advice = "Was it copied in full?"
        raise refusal(path, f"the file must have the {nbytes + end} bytes that its header tells", size, advice)
    digest = description.pop(HEADER_DIGEST, None)
    if not isinstance(digest, str) or digest != _digest(text, digest):
        raise refusal(path, "the header must have the checksum it names", "another", "The file is damaged.")
    return Header(entries, description, _checksums(path, description.pop(CHECKSUMS, None), entries), nbytes)


def refusal(path: Path, rule: str, got: object, advice: str = "") -> CacheFileError:
    """The error that says what must hold in a file."""
    return CacheFileError(f"prompt cache {path}: {rule}, got {got}.{' ' + advice if advice else ''}")


def _checksums(path: Path, value: object, entries: Mapping[str, Entry]) -> dict[str, str]:
    """The checksums of every tensor, and of nothing else."""
    if not isinstance(value, dict):
        raise refusal(path, f"{CHECKSUMS!r} must be an object", _shown(value))
    for name, entry in entries.items():
        digits = value.get(name)
        if not isinstance(digits, str) or len(digits) != DIGITS * entry.num_chunks or set(digits) - _HEX:
            raise refusal(path, f"{name} must have {entry.num_chunks} checksums of {DIGITS} digits", _shown(digits))
    for name in value:
        if name not in entries:
            raise refusal(path, "every checksum must be that of a tensor", _shown(name))
    return value


def _entry(path: Path, name: str, value: object) -> Entry:
    """One tensor of the table."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise refusal(path, f"{name} must have exactly dtype, shape and data_offsets", _shown(value))
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise refusal(path, f"the dtype of {name} must be one of {', '.join(DTYPES)}", _shown(dtype))
    if not _are_sizes(shape) or len(shape) > 8:
        raise refusal(path, f"the shape of {name} must be at most 8 sizes", _shown(shape))
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise refusal(path, f"the data_offsets of {name} must be two positions", _shown(offsets))
    entry = Entry(dtype, tuple(shape), offsets[0])
    if entry.stop != offsets[1]:
        raise refusal(path, f"{name}, {dtype} {entry.shape}, must end at byte {entry.stop}", offsets[1])
    return entry


def _parse(path: Path, text: bytes, what: str) -> dict[str, Any]:
    """A JSON object without repeated names and numbers that JSON does not know."""
    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise refusal(path, f"{what} must be JSON", str(error)[:200], "The file is damaged.") from error
    if not isinstance(value, dict):
        raise refusal(path, f"{what} must be a JSON object", type(value).__name__)
    return value


def _digest_place(header: bytes | bytearray, digits: str) -> int:
    """Where the digits of the header's own checksum stand, -1 for nowhere. JSON within JSON escapes quotation marks."""
    key = f'\\"{HEADER_DIGEST}\\":\\"'
    place = header.find(f'{key}{digits}\\"'.encode("utf-8", "surrogatepass"))
    return place if place < 0 else place + len(key)


def _digest(header: bytes | bytearray, digits: str) -> str:
    """XXH3-64 of the header with its own checksum set to zeros; "" if these are not its digits."""
    place = _digest_place(header, digits)
    if place < 0 or len(digits) != DIGITS:
        return ""
    hasher = xxhash.xxh3_64(bytes(header[:place]))
    hasher.update(b"0" * DIGITS)
    hasher.update(bytes(header[place + DIGITS :]))
    return hasher.hexdigest()


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return made


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 62 for size in value)


def _shown(value: object) -> str:
    return repr(value)[:80]
