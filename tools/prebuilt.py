"""Which kernels the wheel brings, and building them; ``tools/wheel.py`` puts them into it.

The wheel has what common models need on each GPU, and ``GPUS`` and ``KINDS`` are the whole choice. Everything else,
float32 among it, is built by NVRTC at first use, as without this wheel.
"""

import fnmatch
import json
import lzma
import multiprocessing
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from typing import Final, NamedTuple

import torch
from rich.progress import track

from quantcache.backends import artifacts, prebuilt
from quantcache.backends.cpu import build
from quantcache.backends.cuda import MAX_DECODE_ROWS, nvrtc, pages, plan
from quantcache.backends.cuda.launch import Gpu
from quantcache.backends.cuda.prefill import arch_for
from quantcache.backends.cuda.prefill import macros_for as prefill_macros
from quantcache.backends.cuda.prefill import shape_on as prefill_shape_on
from quantcache.quantization.errors import BuildError

KIB: Final = 1 << 10

GPUS: Final = (  # architecture, processors, shared memory of one and of a CTA: CUDA's table for compute capabilities
    Gpu("sm_80", 108, 164 * KIB, 163 * KIB),  # A100
    Gpu("sm_86", 84, 100 * KIB, 99 * KIB),  # A10, A40, RTX 30
    Gpu("sm_89", 142, 100 * KIB, 99 * KIB),  # L4, L40, RTX 40
    Gpu("sm_90", 132, 228 * KIB, 227 * KIB),  # H100, H200
    Gpu("sm_100", 148, 228 * KIB, 227 * KIB),  # B200
    Gpu("sm_120", 170, 100 * KIB, 99 * KIB),  # RTX 50
)
"""Whose kernels are built. The number of processors moves the sizes at which a shape is chosen, not the shapes."""


class Kind(NamedTuple):
    """Models whose kernels are built.

    Attributes:
        head_dim: of keys and values.
        softcap: whether there are kernels with softcap besides those without.
    """

    head_dim: int
    softcap: bool


KINDS: Final = (
    Kind(64, softcap=False),  # SmolLM2, Llama 3.2 1B, Qwen2.5 0.5B, gpt-oss
    Kind(128, softcap=True),  # Llama, Mistral, Qwen; with softcap Gemma 2 27B
    Kind(256, softcap=True),  # Gemma; with softcap Gemma 2
)

DTYPES: Final = (torch.bfloat16, torch.float16)

MANY: Final = 10**6
"""KV heads or query rows, of which no shape is for more."""

ARCHIVE_BYTES: Final = 1 << 19
"""Kernels that are compressed together: half as large as each by itself, and unpacked in 5 to 10 ms."""

FILTERS: Final = [
    # Instructions of a GPU are 16 bytes. What packs and unpacks takes memory of the dictionary's size, or ten times.
    {
        "id": lzma.FILTER_LZMA2,
        "preset": 9 | lzma.PRESET_EXTREME,
        "dict_size": 2 * ARCHIVE_BYTES,
        "lc": 0,
        "lp": 4,
        "pb": 4,
    }
]


class Cubin(NamedTuple):
    """One build of a CUDA source: the arguments of ``nvrtc.cubin``."""

    source: str
    macros: nvrtc.Macros
    arch: str

    @property
    def name(self) -> str:
        """In the wheel's index."""
        return f"{self.source} {nvrtc.variant(self.macros, self.arch)}"


def cubins(pattern: str = "*") -> list[Cubin]:
    """What is built, those together that a model uses together.

    Args:
        pattern: of names, as ``fnmatch`` has it.
    """
    chosen = (cubin for gpu in GPUS for kind in KINDS for dtype in DTYPES for cubin in _cubins(gpu, kind, dtype))
    return [cubin for cubin in chosen if fnmatch.fnmatchcase(cubin.name, pattern)]


def _cubins(gpu: Gpu, kind: Kind, dtype: torch.dtype) -> Iterator[Cubin]:
    widths = kind.head_dim, kind.head_dim
    options = list(product((False, True), (False, True) if kind.softcap else (False,)))  # mask, softcap
    yield Cubin("pages.cu", pages.macros_for(*widths, dtype), gpu.arch)
    calls = product((1, MAX_DECODE_ROWS), (1, MANY), (True, False))
    shapes = [plan.shape_on(gpu, rows, *widths, dtype, heads, is_short) for rows, heads, is_short in calls]
    for shape, chosen in product(dict.fromkeys(shapes), options):
        yield Cubin("attention.cu", plan.macros_for(shape, *widths, dtype, *chosen), gpu.arch)
    wide_shapes = [prefill_shape_on(gpu, rows, *widths) for rows in (MAX_DECODE_ROWS + 1, MANY)]
    for wide, chosen in product(dict.fromkeys(wide_shapes), options):
        yield Cubin("prefill.cu", prefill_macros(wide, *widths, dtype, *chosen), arch_for(gpu, wide))


def texts() -> dict[str, str]:
    """What the kernels of each program are built from here."""
    return {build.PROGRAM: build.built_from(), **{program: nvrtc.built_from(program) for program in nvrtc.PROGRAMS}}


def build_into(folder: Path, pattern: str = "*") -> None:
    """Build the CPU kernels and those of ``cubins`` that are not kept from before, and write them with their index.

    Args:
        folder: empty.
        pattern: see ``cubins``.

    Raises:
        BuildError: a compiler or NVRTC is not there, or refuses a source.
    """
    current = {program: prebuilt.digest(text.encode()) for program, text in texts().items()}
    places = _archived(_built(cubins(pattern)), folder)
    compiler = build.find_compiler()
    prefix = build.library_prefix(compiler)
    library = artifacts.find_kept(prefix, ".so") or build.build(compiler, prefix)
    (folder / LIBRARY).write_bytes(library)
    places[_library_name()] = prebuilt.Place(LIBRARY, 0, len(library), prebuilt.digest(library))
    index = prebuilt.Index(current, places, nvrtc.version())._asdict()
    (folder / prebuilt.INDEX).write_text(json.dumps(index, indent=0), encoding="utf-8")


LIBRARY: Final = "quantcache_cpu.so"
"""The CPU kernels: portable, AVX2 and AVX-512 in one library."""


def _library_name() -> str:
    return f"{build.PROGRAM} {build.variant()}"


def _built(wanted: list[Cubin]) -> dict[str, bytes]:
    """The cubins by name, in their order, built in as many processes as there are processors."""
    workers, says = min(len(os.sched_getaffinity(0)), len(wanted)), f"{len(wanted)} CUDA kernels"
    if workers < 2:
        return {cubin.name: nvrtc.cubin(*cubin) for cubin in track(wanted, says)}
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    try:
        futures = {pool.submit(nvrtc.cubin, *cubin): cubin for cubin in wanted}
        for future in track(as_completed(futures), says, total=len(wanted)):
            future.result()
        return {cubin.name: future.result() for future, cubin in futures.items()}
    finally:
        pool.shutdown(cancel_futures=True)


def _archived(contents: Mapping[str, bytes], folder: Path) -> dict[str, prebuilt.Place]:
    """Write archives of about ``ARCHIVE_BYTES``; where each content lies."""
    places: dict[str, prebuilt.Place] = {}
    joined, number = b"", 0
    for name, content in contents.items():
        places[name] = prebuilt.Place(f"cuda-{number:03}.xz", len(joined), len(content), prebuilt.digest(content))
        joined += content
        if len(joined) >= ARCHIVE_BYTES or len(places) == len(contents):
            (folder / places[name].archive).write_bytes(lzma.compress(joined, filters=FILTERS))
            joined, number = b"", number + 1
    return places


def check(pattern: str = "*") -> None:
    """Hold the kernels of the ``quantcache`` that is imported, which is the wheel's, against its sources.

    Args:
        pattern: with which they were built.

    Raises:
        BuildError: one is missing, one is too many, or one was not built from the source beside it.
    """
    wanted = {cubin.name for cubin in cubins(pattern)} | {_library_name()}
    if different := wanted ^ set(prebuilt.index().kernels):
        raise BuildError(f"the wheel's kernels are not those of its table: {', '.join(sorted(different))}")
    sources = texts()
    for name in sorted(wanted):
        program, variant = name.split(" ", 1)
        if prebuilt.find(program, variant, sources[program]) is None:
            raise BuildError(f"the wheel's kernel was not built from the source beside it: {name}. Build it again")
