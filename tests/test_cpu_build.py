"""Are the CPU kernels built once, atomically, and is a machine without a compiler served?"""

import errno
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from quantcache.backends import artifacts, cpu, dispatch
from quantcache.backends.artifacts import CACHE_VARIABLE
from quantcache.backends.cpu import build
from quantcache.quantization.errors import BuildError, FallbackWarning
from quantcache.store import reads
from tests.attention_cases import Case
from tests.attention_cases import build as build_case

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"no CPU kernels here: {cpu.unavailable()}")

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g", "-O1")

USE = "from quantcache.backends import cpu; print(cpu.isa())"


@pytest.fixture(scope="module")
def library() -> bytes:
    """The kernels, built once."""
    prefix = build.library_prefix(build.find_compiler())
    return artifacts.find_kept(prefix, ".so") or build.build(build.find_compiler(), prefix)


@pytest.fixture
def built(library: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, with the kernels in it, so that nothing is compiled twice."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    artifacts.keep(build.library_prefix(build.find_compiler()), ".so", library)
    (target,) = artifacts.kernel_folder().iterdir()
    return target


def compile_nothing(*_: object) -> None:
    raise AssertionError("the compiler was called")


def test_a_library_in_the_cache_is_used_without_compiling_or_a_message(
    built: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "_compile", compile_nothing)
    with caplog.at_level(logging.DEBUG, "quantcache"):
        assert build.load_library().quantcache_isa
    assert not caplog.records


def test_a_corrupt_library_is_built_again_with_a_message(
    built: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = built.read_bytes()
    built.write_bytes(whole[: len(whole) // 2])
    monkeypatch.setattr(build, "_compile", lambda compiler, library, flags: library.write_bytes(whole))
    with caplog.at_level(logging.WARNING, "quantcache"):
        build.load_library()
    assert built.read_bytes() == whole
    assert sum("building the CPU kernels" in record.getMessage() for record in caplog.records) == 1
    assert [path.name for path in built.parent.iterdir()] == [built.name]


def test_what_was_checked_is_loaded_whatever_lies_there_since(
    built: Path, library: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the check and the loader the file becomes one that no loader takes."""
    find = artifacts.find_kept

    def find_and_replace(prefix: str, suffix: str) -> bytes | None:
        found = find(prefix, suffix)
        built.write_bytes(b"another program")
        return found

    monkeypatch.setattr(build, "_compile", compile_nothing)
    monkeypatch.setattr(artifacts, "find_kept", find_and_replace)
    assert build.load_library().quantcache_isa


def test_a_system_that_runs_no_files_in_memory_takes_a_private_one(
    library: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_loaded_from_memory", lambda content: os.stat(tmp_path / "missing"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert build._loaded(library).quantcache_isa
    assert not list(tmp_path.iterdir())


def test_sources_flags_and_compiler_make_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = build.find_compiler()
    name = build.library_prefix(compiler)
    assert name == build.library_prefix(compiler)
    assert name != build.library_prefix(compiler, ["-g"])
    changed = tmp_path / "cpu"
    shutil.copytree(build.SOURCES, changed)
    (changed / "simd.h").write_text((changed / "simd.h").read_text() + "\n")
    monkeypatch.setattr(build, "SOURCES", changed)
    assert name != build.library_prefix(compiler)


def test_without_a_folder_to_keep_them_the_kernels_serve_the_process(
    library: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(artifacts, "_said", [])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(build, "_compile", lambda compiler, target, flags: target.write_bytes(library))
    assert build.load_library().quantcache_isa
    assert build.load_library().quantcache_isa
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert sum("built kernels cannot be kept" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize(("owner", "name"), [(tempfile, "mkdtemp"), (Path, "write_text")])
def test_without_room_to_build_plain_torch_runs_with_one_warning(
    owner: Any, name: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.delenv(dispatch.BACKEND_VARIABLE, raising=False)
    caches = cpu.library, cpu.unavailable, dispatch._kernels_run
    for cached in caches:
        cached.cache_clear()
    try:
        monkeypatch.setattr(owner, name, full)
        with pytest.warns(FallbackWarning, match=re.escape(os.strerror(number))) as warned:
            names = [dispatch.choose_backend(torch.device("cpu")) for _ in range(2)]
        assert names == ["torch", "torch"]
        assert len(warned) == 1
    finally:
        for cached in caches:
            cached.cache_clear()


def run_python(code: str, **environment: str) -> subprocess.Popen[str]:
    variables = {**os.environ, **environment, "PYTHONPATH": str(Path(reads.__file__).parent.parent)}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_two_processes_at_once_both_get_the_kernels(tmp_path: Path) -> None:
    quick = tmp_path / "c++"  # optimises nothing, which takes a quarter of the time
    quick.write_text(f'#!/bin/sh\nexec {shlex.join(build.find_compiler())} "$@" -O0\n')
    quick.chmod(0o755)
    running = [run_python(USE, QUANTCACHE_CACHE=str(tmp_path), CXX=str(quick)) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in running]
    assert all(process.returncode == 0 for process in running), outputs
    assert all(output.splitlines()[-1] == cpu.isa() for output in outputs)
    assert len(list((tmp_path / "kernels").iterdir())) == 1


def test_without_a_compiler_one_warning_and_the_torch_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.BACKEND_VARIABLE, raising=False)
    monkeypatch.setattr(cpu, "unavailable", lambda: "no C++ compiler found")
    dispatch._kernels_run.cache_clear()
    try:
        with pytest.warns(FallbackWarning, match=r"no C\+\+ compiler found"):
            assert dispatch.choose_backend(torch.device("cpu")) == "torch"
        assert dispatch.choose_backend(torch.device("cpu")) == "torch"
        monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "cpu")
        with pytest.raises(ValueError, match="QUANTCACHE_BACKEND: cpu cannot run here: no C"):
            dispatch.choose_backend(torch.device("cpu"))
    finally:
        dispatch._kernels_run.cache_clear()


def test_the_reason_names_what_was_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(build.COMPILER_VARIABLE, raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(BuildError, match=r"none of c\+\+, g\+\+, clang\+\+ is there"):
        build.find_compiler()
    monkeypatch.setenv(build.COMPILER_VARIABLE, "nosuch++ -O1")
    with pytest.raises(BuildError, match="nosuch"):
        build.find_compiler()


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str, otherwise: str = ":") -> list[str]:
    """A compiler that does what ``script`` says, in ``folder``, for the AVX2 kernels and ``otherwise`` for the rest."""
    program = folder / "a compiler$"
    program.write_text(f'#!/bin/sh\ncd "{folder}"\ncase "$*" in *kernels_avx2.cpp*) {script};; *) {otherwise};; esac\n')
    program.chmod(0o755)
    monkeypatch.setenv(CACHE_VARIABLE, str(folder / "cache"))
    return [str(program)]


def test_a_failed_build_names_the_command_and_what_it_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = stand_in(tmp_path, monkeypatch, "echo 'error: this' >&2; exit 3")
    with pytest.raises(
        BuildError, match=r"^the C\+\+ compiler failed: '.*a compiler\$' .*kernels_avx2\.cpp .*\nerror: this\n$"
    ):
        build.build(compiler, "library")
    assert not (tmp_path / "cache").exists()


STUBBORN = "trap '' TERM INT HUP; "
"""What a compiler does that cannot be told to end; it goes for what it starts, too."""

ENDLESS = "sleep 600 & echo $$ $! >> started; wait"


@pytest.mark.parametrize("script", [ENDLESS, STUBBORN + ENDLESS, f"({STUBBORN}{ENDLESS}) & wait"])
def test_a_build_that_takes_too_long_leaves_nothing_running(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = stand_in(tmp_path, monkeypatch, script)
    monkeypatch.setattr(build, "BUILD_SECONDS", 1)
    with pytest.raises(BuildError, match=r"the C\+\+ compiler took more than 1 s"):
        build.build(compiler, "library")
    assert_ended(tmp_path / "started", 2)
    assert not (tmp_path / "cache").exists()


def test_the_first_failure_ends_the_other_compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, and the reason is the failure: not the one that would take too long."""
    until_started = "while ! [ -s started ]; do sleep 0.01; done"
    compiler = stand_in(tmp_path, monkeypatch, f"{until_started}; echo 'error: this' >&2; exit 3", STUBBORN + ENDLESS)
    before = time.monotonic()
    with pytest.raises(BuildError, match=r"the C\+\+ compiler failed: .*kernels_avx2\.cpp .*\nerror: this\n$"):
        build.build(compiler, "library")
    assert time.monotonic() - before < 60
    assert_ended(tmp_path / "started", 2)


@pytest.mark.parametrize("script", [ENDLESS, STUBBORN + ENDLESS], ids=["obedient", "stubborn"])
def test_an_interrupted_build_leaves_nothing_running(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = stand_in(tmp_path, monkeypatch, script)
    # As in a terminal, also where these tests run in the background of a shell, which has them ignore it.
    hears = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    process = run_python(f"{hears}; from quantcache.backends.cpu import build; build.build({compiler!r}, 'library')")
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline, "the compiler has not been started"
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert output.rstrip().endswith("KeyboardInterrupt")
    assert_ended(tmp_path / "started", 2)
    assert not (tmp_path / "cache").exists()


def test_a_compiler_that_does_not_tell_its_version_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = stand_in(tmp_path, monkeypatch, "", STUBBORN + ENDLESS)
    monkeypatch.setattr(build, "BUILD_SECONDS", 1)
    with pytest.raises(BuildError, match=r"a compiler\$' cannot be run: .* timed out after 1 seconds"):
        build.library_prefix(compiler)
    assert_ended(tmp_path / "started", 2)


def assert_ended(started: Path, at_least: int) -> None:
    """Every process whose number stands in the file ``started`` ends within seconds."""
    numbers = [int(number) for number in started.read_text().split()]
    assert len(numbers) >= at_least
    deadline = time.monotonic() + 10
    for number in numbers:
        while is_running(number):
            assert time.monotonic() < deadline, f"process {number} is still there"
            time.sleep(0.01)


def is_running(number: int) -> bool:
    """Whether there is such a process; one that nobody has asked for its end counts as ended."""
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(number)], capture_output=True, text=True)
    return bool(done.stdout.strip()) and not done.stdout.startswith("Z")


def test_without_ninja_the_reason_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ninja", None)
    with pytest.raises(BuildError, match=r"ninja, which runs the C\+\+ compiler, is not there.*pip install ninja$"):
        build.build(stand_in(tmp_path, monkeypatch, "exit 1"), "library")


def test_an_instruction_set_that_does_not_exist_is_refused() -> None:
    code = "from quantcache.backends import cpu; print(cpu.unavailable())"
    output, _ = run_python(code, QUANTCACHE_CPU_ISA="sse9").communicate(timeout=120)
    assert "QUANTCACHE_CPU_ISA: must be one of avx512, avx2, portable, got 'sse9'" in output


def test_kernels_are_clean_under_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    compiler = build.find_compiler()
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    made = subprocess.run([*compiler, *SANITIZERS, str(probe), "-o", str(tmp_path / "probe")], capture_output=True)
    if made.returncode or subprocess.run([str(tmp_path / "probe")]).returncode:
        pytest.skip("the compiler has no address and undefined-behaviour sanitizers")
    program = tmp_path / "sanitized"
    objects = build.compile_commands(compiler, tmp_path, SANITIZERS)
    main = [*compiler, *build.FLAGS, *SANITIZERS, "-I", str(build.SOURCES), str(Path(__file__).parent / "sanitize.cpp")]
    running = [subprocess.Popen(command) for _, command in objects]
    assert not any(process.wait() for process in running)
    link = [*main, *(str(target) for target, _ in objects), "-o", str(program), "-lpthread", "-ldl"]
    subprocess.run(link, check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.startswith("ok")


def test_what_is_called_first_builds_and_runs() -> None:
    stored = build_case(Case())
    output = reads.attention(*stored.arguments)  # type: ignore[arg-type]
    assert output.isfinite().all()
    assert dispatch.choose_backend(torch.device("cpu")) in ("cpu", "torch")
