"""A safetensors file, written and read a piece at a time, with a checksum for every mebibyte.

The safetensors library maps a file, for ``load(mmap=True)``. It does not write one, since its writer wants every tensor
in memory at once. Nor does it copy one: its "pread" backend (0.8.0) reads all of a tensor for each slice, onto small
pages (1.0 s of CPU for 1.1 GB where this takes 0.3 s, checksums included); copying out of its mapping takes 0.4 s and
ends the process where a file is cut meanwhile.

No torch is loaded before a tensor is read or written, so that `quantcache inspect` answers at once.
"""

import contextlib
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import FileIO
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import xxhash
from safetensors import SafetensorError, safe_open

from quantcache.files.header import (
    CHUNK_BYTES,
    DIGITS,
    DTYPES,
    LENGTH_BYTES,
    Entry,
    decode,
    encode,
    header_length,
    refusal,
)
from quantcache.quantization.errors import CacheFileError

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[int, int], Any]
"""Called with bytes done and bytes in all."""

PathLike = str | os.PathLike[str]


def no_progress(done: int, total: int) -> None:
    """Tell nobody."""


def write(
    path: Path,
    entries: Mapping[str, Entry],
    description: Mapping[str, Any],
    pieces: "Callable[[str], Iterable[Tensor]]",
    on_progress: Progress = no_progress,
) -> None:
    """Write a file in one step: another process sees the old file, or all of the new one.

    Args:
        path: its folder must exist.
        entries: from ``arrange``.
        description: goes into the header as JSON, with the checksums.
        pieces: the tensors that, one behind the other, are the bytes of a name; each is copied to the CPU in turn.
        on_progress: told how many bytes are written.

    Raises:
        OSError: the file cannot be written. What was there before is untouched.
    """
    checksums = {name: "0" * DIGITS * entry.num_chunks for name, entry in entries.items()}
    total = max((entry.stop for entry in entries.values()), default=0)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    # os.open and not mkstemp: the file gets the permissions that the user's umask gives to any new file.
    handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with open(handle, "wb", buffering=0) as file:
            header = encode(entries, description, checksums)
            _write_all(file, memoryview(header))
            for name, entry in entries.items():
                hasher = _ChunkHasher()
                for piece in pieces(name):
                    for view in _chunked(_bytes_of(piece)):
                        _write_all(file, view)
                        hasher.update(view)
                        on_progress(entry.start + hasher.nbytes, total)
                checksums[name] = hasher.digits()
                if hasher.nbytes != entry.nbytes:
                    raise AssertionError(f"{name} has {hasher.nbytes} bytes, its entry {entry.nbytes}")
            file.seek(0)
            _write_all(file, memoryview(encode(entries, description, checksums)))
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_folder(path.parent)


class Container:
    """An open file whose header has been checked against its size; nothing of the tensors is read yet.

    Attributes:
        path: of the file.
        entries: its tensors by name.
        description: what the writer said of them.

    Raises:
        CacheFileError: not such a file, cut short, or its header is damaged or forged.
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapping: Any = None
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would wait for a writer
            raise self.refuse("it must be a regular file", "another kind")
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close
        try:
            size = os.fstat(self._file.fileno()).st_size
            text = bytearray(header_length(path, self._file.read(LENGTH_BYTES) or b"", size))
            self._fill(memoryview(text), "the header")
            header = decode(path, bytes(text), size)
        except BaseException:
            self.close()
            raise
        self.entries, self.description = header.entries, header.description
        self._checksums, self._data_start = header.checksums, header.nbytes

    def __enter__(self) -> "Container":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; tensors that were read or mapped stay valid."""
        self._file.close()
        self._mapping = None

    def refuse(self, rule: str, got: object, advice: str = "") -> CacheFileError:
        """The error that says what must hold in this file."""
        return refusal(self.path, rule, got, advice)

    def read(self, name: str, rows: int | None = None, verify: bool = True) -> "Tensor":
        """A tensor on the CPU, in memory of its own.

        Args:
            name: of the tensor.
            rows: only the first so many along the first axis; None for all.
            verify: compare the checksums of what is read.

        Raises:
            CacheFileError: the bytes are not those that were written.
        """
        import torch

        entry = self.entries[name]
        shape = entry.shape if rows is None else (rows, *entry.shape[1:])
        wanted = prod(shape) * DTYPES[entry.dtype].itemsize
        memory = _roomy_memory(wanted)
        view = memory.data
        self._file.seek(self._data_start + entry.start)
        for index, start in enumerate(range(0, wanted, CHUNK_BYTES)):
            stop = min(start + CHUNK_BYTES, entry.nbytes)
            chunk = view[start : min(stop, wanted)]
            self._fill(chunk, name)
            if verify:
                rest = memoryview(bytearray(max(0, stop - wanted)))  # read for the checksum of its chunk alone
                self._fill(rest, name)
                self._verify(name, index, (start, stop), chunk, rest)
        dtype: torch.dtype = getattr(torch, DTYPES[entry.dtype].name)
        return torch.from_numpy(memory).view(dtype).view(shape)

    def check_bytes(self, name: str) -> None:
        """Read all of a tensor for its checksums, a mebibyte at a time.

        Raises:
            CacheFileError: the bytes are not those that were written.
        """
        entry, memory = self.entries[name], memoryview(bytearray(CHUNK_BYTES))
        self._file.seek(self._data_start + entry.start)
        for index, start in enumerate(range(0, entry.nbytes, CHUNK_BYTES)):
            stop = min(start + CHUNK_BYTES, entry.nbytes)
            chunk = memory[: stop - start]
            self._fill(chunk, name)
            self._verify(name, index, (start, stop), chunk)

    def mapped(self, name: str, rows: int | None = None) -> "Tensor":
        """A tensor whose bytes are read from the file when they are used; writes to it do not reach the file.

        Raises:
            CacheFileError: the safetensors library does not take the file.
        """
        try:
            if self._mapping is None:
                # What is open, whatever its path leads to by now; Windows lets nobody replace an open file.
                opened = f"/dev/fd/{self._file.fileno()}"
                self._mapping = safe_open(opened if os.path.exists(opened) else self.path, "pt")
            whole: Tensor = self._mapping.get_tensor(name)
        except SafetensorError as error:
            raise self.refuse("the safetensors library must take it", str(error)) from error
        return whole if rows is None else whole[:rows]

    def _fill(self, view: memoryview, name: str) -> None:
        """Read until ``view`` is full."""
        done = 0
        while done < len(view):
            got = self._file.readinto(view[done:])
            if not got:
                raise self.refuse(f"{name} must have {len(view)} more bytes", done, "It was cut while it was read.")
            done += got

    def _verify(self, name: str, index: int, place: tuple[int, int], *views: memoryview) -> None:
        """Compare the checksum of a chunk that lies in ``views``."""
        hasher = xxhash.xxh3_64()
        for view in views:
            hasher.update(view)
        expected = self._checksums[name][DIGITS * index : DIGITS * (index + 1)]
        if hasher.hexdigest() != expected:
            raise self.refuse(
                f"bytes {place[0]} to {place[1]} of {name} must have the checksum {expected}",
                hasher.hexdigest(),
                "The file is damaged; save the cache again.",
            )


class _ChunkHasher:
    """Checksums of the bytes of a tensor, chunk by chunk, however they are cut into pieces."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._done: list[str] = []
        self._hasher = xxhash.xxh3_64()

    def update(self, view: memoryview) -> None:
        """Take the next bytes."""
        while len(view):
            room = CHUNK_BYTES - self.nbytes % CHUNK_BYTES
            self._hasher.update(view[:room])
            self.nbytes += min(room, len(view))
            view = view[room:]
            if self.nbytes % CHUNK_BYTES == 0:
                self._done.append(self._hasher.hexdigest())
                self._hasher.reset()

    def digits(self) -> str:
        """The checksums, one behind the other."""
        return "".join([*self._done, *([self._hasher.hexdigest()] if self.nbytes % CHUNK_BYTES else [])])


def _bytes_of(tensor: "Tensor") -> memoryview:
    """The bytes of a tensor, on the CPU, copied only where they must be."""
    import torch

    flat = tensor.detach().to("cpu").contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _chunked(view: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(view), CHUNK_BYTES):
        yield view[start : start + CHUNK_BYTES]


def _write_all(file: FileIO, view: memoryview) -> None:
    while len(view):
        view = view[file.write(view) :]


def _roomy_memory(nbytes: int) -> "numpy.ndarray[Any, numpy.dtype[numpy.uint8]]":
    """Uninitialised bytes, aligned to 64. Large arrays of numpy lie on huge pages where the system has them, which
    makes filling them 1.7 times as fast as a fresh tensor of torch.
    """
    memory = numpy.empty(nbytes + 64, dtype=numpy.uint8)
    offset = -memory.ctypes.data % 64
    return memory[offset : offset + nbytes]


def _sync_folder(folder: Path) -> None:
    """Make the new name last through a power failure, where folders can be synced."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
