"""Finds the CPU kernels in the wheel, or builds them with the system's C++ compiler, which ninja runs, once.

What was built is kept under a name made of everything it depends on, so a changed source or compiler makes a new
library and nothing has to be invalidated; ``artifacts`` says where, and what is checked before it is loaded.
"""

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from quantcache.backends import artifacts, prebuilt
from quantcache.quantization.errors import BuildError

COMPILER_VARIABLE: Final = "CXX"

SOURCES: Final = Path(__file__).parents[2] / "csrc" / "cpu"

COMPILERS: Final = ("c++", "g++", "clang++")

FLAGS: Final = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-w")
"""Not -ffast-math: quantising is IEEE arithmetic, and NaN has a meaning."""

LINK_FLAGS: Final = ("-shared", "-lpthread", "-ldl")

ISA_FLAGS: Final = {
    "kernels_avx512.cpp": ("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
    "kernels_avx2.cpp": ("-mavx2", "-mfma"),
}
"""Flags of the files that are compiled for a wider instruction set, and on x86-64 only."""

BUILD_SECONDS: Final = 300
"""When a compiler that does not come back is given up."""

GRACE_SECONDS: Final = 1
"""What a compiler that is told to end gets before it is killed."""

_GROUP: Final = ".group"
"""End of the files in which commands write down the numbers of their process groups."""

_FAILURE: Final = re.compile(r"^FAILED: .*\n", re.MULTILINE)
_EXEC: Final = f"{_GROUP} && exec "
"""What stands before a command of the compiler where ninja runs it."""

logger = logging.getLogger("quantcache")


PROGRAM: Final = "cpu"
"""The kernels, as the wheel names them."""

where_from: Final[list[str]] = []
"""Where each library came from that this process has loaded."""


def load_library(extra_flags: Sequence[str] = ()) -> ctypes.CDLL:
    """The kernels, built if they are neither in the wheel nor in the cache.

    Args:
        extra_flags: for compiling and linking, behind the usual ones.

    Raises:
        BuildError: no compiler, or it fails. The message is the reason.
    """
    found = prebuilt.find(PROGRAM, variant(), built_from(extra_flags))
    if found is not None:
        try:
            library = _loaded(found)
        except BuildError as error:
            logger.warning("quantcache: the CPU kernels of the wheel are not used: %s.", error)
        else:
            where_from.append("in the wheel")
            return library
    compiler = find_compiler()
    prefix = library_prefix(compiler, extra_flags)
    library = _loaded(artifacts.find_kept(prefix, ".so") or build(compiler, prefix, extra_flags))
    where_from.append(f"built by {compiler[0]}")
    return library


def variant() -> str:
    """What a library is built for, as the wheel names it."""
    return f"{sys.platform} {platform.machine()}"


def built_from(extra_flags: Sequence[str] = ()) -> str:
    """All that a build depends on besides the compiler and what it builds for."""
    flags = repr((FLAGS, LINK_FLAGS, sorted(ISA_FLAGS.items()), tuple(extra_flags)))
    sources = (part for source in _source_files() for part in (source.name, source.read_text(encoding="utf-8")))
    return "\0".join((flags, *sources))


def find_compiler() -> list[str]:
    """The command of the compiler: ``$CXX``, or the first of ``COMPILERS`` there is.

    Raises:
        BuildError: there is none.
    """
    chosen = os.environ.get(COMPILER_VARIABLE)
    if chosen:
        command = shlex.split(chosen)
        if shutil.which(command[0]) is None:
            raise BuildError(f"{COMPILER_VARIABLE} names a C++ compiler that is not there: {chosen!r}")
        # A path from here is none from where ninja runs it.
        return [os.path.abspath(command[0]) if os.path.dirname(command[0]) else command[0], *command[1:]]
    for name in COMPILERS:
        if shutil.which(name):
            return [name]
    raise BuildError(
        f"no C++ compiler found: {COMPILER_VARIABLE} is not set, and none of {', '.join(COMPILERS)} is there; "
        "install g++ or clang++"
    )


def library_prefix(compiler: Sequence[str], extra_flags: Sequence[str] = ()) -> str:
    """Start of the file name for these sources, flags, compiler and machine; a digest of the file ends it."""
    digest = hashlib.sha256()
    for part in (built_from(extra_flags), shlex.join(compiler), _printed([*compiler, "--version"]), variant()):
        digest.update(part.encode() + b"\0")
    return f"quantcache_cpu-{digest.hexdigest()[:32]}"


def build(compiler: Sequence[str], prefix: str, extra_flags: Sequence[str] = ()) -> bytes:
    """Compile the library, and keep it if that can be done.

    Raises:
        BuildError: the compiler fails, or there is no room for its files.
    """
    started = time.perf_counter()
    logger.warning("quantcache: building the CPU kernels with %s, once ...", compiler[0])
    try:
        # Something that was killed may still be about to go, so the folder may not be empty at once.
        with tempfile.TemporaryDirectory(prefix="quantcache-", ignore_cleanup_errors=True) as scratch:
            library = Path(scratch) / f"{prefix}.so"
            _compile(compiler, library, extra_flags)
            content = library.read_bytes()
    except OSError as error:
        raise BuildError(f"the CPU kernels cannot be built: {error}") from error
    artifacts.keep(prefix, ".so", content)
    logger.info("quantcache: built the CPU kernels in %.1f s", time.perf_counter() - started)
    return content


def compile_commands(
    compiler: Sequence[str], directory: Path, extra_flags: Sequence[str] = ()
) -> list[tuple[Path, list[str]]]:
    """Per object file in ``directory``, the command that makes it."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    commands = []
    for source in _source_files():
        if source.suffix != ".cpp" or (source.name in ISA_FLAGS and not is_x86):
            continue
        target = directory / f"{source.stem}.o"
        flags = [*FLAGS, *ISA_FLAGS.get(source.name, ()), *extra_flags]
        commands.append((target, [*compiler, *flags, "-c", str(source), "-o", str(target)]))
    return commands


def _compile(compiler: Sequence[str], library: Path, extra_flags: Sequence[str]) -> None:
    """Make ``library`` by one run of ninja in its folder."""
    commands = compile_commands(compiler, library.parent, extra_flags)
    objects = [target.name for target, _ in commands]
    link = [*compiler, *objects, "-o", library.name, *extra_flags, *LINK_FLAGS]
    lines = ["rule run", f"  command = echo $$$$ > $out{_EXEC}$line"]
    for target, command in [*commands, (library, link)]:
        lines += [f"build {target.name}: run {' '.join(objects) if target is library else ''}"]
        lines += ["  line = " + shlex.join(command).replace("$", "$$")]
    (library.parent / "build.ninja").write_text("\n".join([*lines, ""]), encoding="utf-8")
    _run_ninja(library.parent)


def _run_ninja(folder: Path) -> None:
    """Build what ``build.ninja`` in ``folder`` says; whatever happens, nothing is left running.

    The first command that fails ends the others, for which ninja alone would wait.

    Raises:
        BuildError: there is no ninja, a command fails, or all of them together take too long.
    """
    log = folder / "output.txt"
    with log.open("wb") as output:
        try:
            from ninja import BIN_DIR

            process = subprocess.Popen(
                [os.path.join(BIN_DIR, "ninja"), "--quiet"],
                cwd=folder,
                env={**os.environ, "TMPDIR": str(folder)},  # a compiler that is killed leaves its files
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so Ctrl-C reaches this process alone, which ends all others
            )
        except (ImportError, OSError) as error:
            raise BuildError(f"ninja, which runs the C++ compiler, is not there: {error}. pip install ninja") from error
    deadline = time.monotonic() + BUILD_SECONDS
    try:
        while process.poll() is None and time.monotonic() < deadline and not _FAILURE.search(_text(log)):
            time.sleep(0.02)
        returncode = process.returncode
    finally:
        _end(process, folder)
    if returncode or _FAILURE.search(_text(log)):
        raise BuildError(f"the C++ compiler failed: {_first_failure(_text(log))}")
    if returncode is None:
        raise BuildError(f"the C++ compiler took more than {BUILD_SECONDS} s")


def _end(ninja: "subprocess.Popen[bytes]", folder: Path) -> None:
    """End ``ninja`` and its commands: told to end first, and then killed with all that they started.

    Args:
        ninja: a session of its own, in which each command is a process group.
        folder: where each command has written the number of its group.
    """
    try:
        ninja.terminate()
        ninja.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        for record in folder.glob(f"*{_GROUP}") if ninja.returncode != 0 else ():
            # Not there, or not yet written by a command that ninja has ended.
            with contextlib.suppress(OSError, ValueError):
                _kill_group(int(_text(record)), ninja.pid)
        ninja.kill()
        ninja.wait()


def _kill_group(group: int, session: int) -> None:
    """Kill a process group, unless its number has gone to a process of another session.

    Raises:
        ProcessLookupError: there is none.
    """
    with contextlib.suppress(ProcessLookupError):  # the first of the group is gone, which keeps its number
        if os.getsid(group) != session:
            return
    os.killpg(group, signal.SIGKILL)


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def _first_failure(output: str) -> str:
    """The first command that failed and the end of what it printed, out of what ninja printed."""
    sections = _FAILURE.split(re.sub(r"^ninja: build stopped.*\n", "", output, flags=re.MULTILINE))
    command, _, printed = "".join(sections[1:2] or sections).partition("\n")
    return f"{command.rpartition(_EXEC)[2]}\n{printed[-2000:]}"


def _printed(command: Sequence[str]) -> str:
    """What ``command`` prints; whatever happens, it is not left running.

    Raises:
        BuildError: it cannot be run, or takes too long.
    """
    try:
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process:
            try:
                printed, _ = process.communicate(timeout=BUILD_SECONDS)
            except BaseException:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                raise
            return printed
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the C++ compiler {command[0]!r} cannot be run: {error}") from error


def _loaded(content: bytes) -> ctypes.CDLL:
    """The library that these bytes are: loaded is what was built or checked, and no file that its name leads to.

    Raises:
        BuildError: the system does not load it.
    """
    try:
        with contextlib.suppress(AttributeError, OSError):  # not a system that runs files in memory
            return _loaded_from_memory(content)
        with tempfile.TemporaryDirectory(prefix="quantcache-", ignore_cleanup_errors=True) as folder:
            path = Path(folder) / "quantcache_cpu.so"
            path.write_bytes(content)
            return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"the CPU kernels were built but cannot be loaded: {error}") from error


def _loaded_from_memory(content: bytes) -> ctypes.CDLL:
    descriptor = os.memfd_create("quantcache_cpu")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        # It stays open: the loader takes a name that it has seen for the library it has.
        return ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    except OSError:
        os.close(descriptor)
        raise


def _source_files() -> list[Path]:
    return sorted(path for path in SOURCES.iterdir() if path.suffix in (".cpp", ".h", ".inc"))
