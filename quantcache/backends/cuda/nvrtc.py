"""Finds CUDA kernels in the wheel, or builds them with NVRTC, once, and finds them again.

No compiler, toolkit or header is needed: NVRTC comes with torch. What it makes is kept under a name made of everything
it depends on, so a changed source or NVRTC makes a new file and nothing has to be invalidated; ``artifacts`` says
where, and what is checked before it is loaded.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import re
from pathlib import Path
from typing import Any, Final

from quantcache.backends import artifacts, prebuilt
from quantcache.quantization.errors import BuildError

SOURCES: Final = Path(__file__).parents[2] / "csrc" / "cuda"

Macros = tuple[tuple[str, int], ...]


PROGRAMS: Final = ("attention.cu", "pages.cu", "prefill.cu")
"""The source files that are built, with what they include."""


def prebuilt_cubin(source: str, macros: Macros, arch: str) -> bytes | None:
    """The machine code of one source file as it came in the wheel, or None. Arguments as of ``cubin``."""
    return prebuilt.find(source, variant(macros, arch), built_from(source))


def cubin(source: str, macros: Macros, arch: str) -> bytes:
    """The machine code of one source file, built if it is not in the cache.

    Args:
        source: file name in ``csrc/cuda``.
        macros: names and values to define.
        arch: what to build for, as "sm_90".

    Raises:
        BuildError: NVRTC is not there or refuses the source. The message is the reason.
    """
    prefix = f"quantcache_cuda-{digest_of(source, macros, arch)}"
    kept = artifacts.find_kept(prefix, ".cubin")
    if kept is not None:
        return kept
    code = _compile(source, macros, arch)
    artifacts.keep(prefix, ".cubin", code)
    return code


def variant(macros: Macros, arch: str) -> str:
    """A build of a source, as the wheel names it."""
    return " ".join([arch, *(f"{name}={value}" for name, value in sorted(macros))])


def built_from(source: str) -> str:
    """All that a build depends on besides its variant and NVRTC."""
    return f"{program_text(source)}\n{OPTIONS!r}"


@functools.cache
def prebuilt_states(arch: str) -> frozenset[tuple[int, int, int]]:
    """For which states the wheel has kernels of every program: head_dim, v_head_dim and number of the element type.

    Args:
        arch: of the GPU, as "sm_90".
    """
    found: dict[str, set[tuple[int, int, int]]] = {program: set() for program in PROGRAMS}
    for name in prebuilt.index().kernels:
        program, built_for, *macros = name.split(" ")
        if program in found and built_for.rstrip("a") == arch:
            values = dict(macro.split("=") for macro in macros)
            found[program].add((int(values["HEAD_DIM"]), int(values["V_HEAD_DIM"]), int(values["DTYPE"])))
    if not all(prebuilt.is_current(program, built_from(program)) for program in PROGRAMS):
        return frozenset()
    return frozenset.intersection(*map(frozenset, found.values()))


def digest_of(source: str, macros: Macros, arch: str) -> str:
    """What the file name of a cubin is made of: sources, macros, architecture and NVRTC's version."""
    digest = hashlib.sha256()
    for part in (program_text(source), repr(sorted(macros)), repr(OPTIONS), arch, repr(version())):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:32]


def program_text(source: str) -> str:
    """What NVRTC is given: the source with the files that it includes, each once, as one text.

    A file names another as ``#include "softmax.cuh"``, from ``csrc/cuda`` on, on a line of its own. One text is all
    that the digest has to cover, and NVRTC needs no folder. Its messages still name the file and the line.
    """
    lines: list[str] = []
    included = set()

    def add(name: str) -> None:
        included.add(name)
        lines.append(f'#line 1 "{name}"')
        for number, line in enumerate((SOURCES / name).read_text(encoding="utf-8").splitlines(), start=1):
            match = re.fullmatch(r'#include "([^"]+)"', line)
            if match and match[1] not in included:
                add(match[1])
                lines.append(f'#line {number + 1} "{name}"')
            else:
                lines.append("" if match else line)

    add(source)
    return "\n".join(lines) + "\n"


OPTIONS: Final[dict[str, Any]] = {"std": "c++17", "device_as_default_execution_space": True}


@functools.cache
def version() -> str:
    """NVRTC's version.

    The package that torch brings says it in a fraction of the time that loading its 100 MB takes.

    Raises:
        BuildError: there is no NVRTC.
    """
    for package in ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    try:
        from cuda.bindings import nvrtc

        status, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # a missing package, a missing library: each has an error of its own
        raise BuildError(f"NVRTC cannot be used: {_first_line(error)}") from error
    if int(status):
        raise BuildError(f"NVRTC cannot be used: nvrtcVersion returned {status}")
    return f"{major}.{minor}"


@functools.cache
def unavailable() -> str | None:
    """Why nothing can be built here, or None; asked once a process."""
    reason = _not_installed("cuda.bindings") or _not_installed("cuda.core")
    if reason is not None:
        return reason
    try:
        version()
    except BuildError as error:
        return str(error)
    return None


def _not_installed(module: str) -> str | None:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    return f"the package {module.replace('.', '-')} is not installed" if found is None else None


def _compile(source: str, macros: Macros, arch: str) -> bytes:
    try:
        from cuda.core import Program, ProgramOptions

        options = ProgramOptions(
            arch=arch, name=source, define_macro=[(name, str(value)) for name, value in macros], **OPTIONS
        )
        code: bytes = Program(program_text(source), "c++", options).compile("cubin").code
    except Exception as error:
        raise BuildError(f"NVRTC cannot build {source} for {arch} with {dict(macros)}: {error}") from error
    return code


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
