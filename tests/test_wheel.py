"""Does the wheel with kernels in it need nothing: no compiler, no NVRTC, no home folder?"""

import importlib.util
import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from quantcache.backends import cpu, prebuilt
from tests.processes import ROOT, finished

IS_HERE = sys.platform == "linux" and importlib.util.find_spec("hatchling") and importlib.util.find_spec("auditwheel")

pytestmark = [
    pytest.mark.skipif(not IS_HERE, reason="the wheel is made on Linux, in the development environment"),
    pytest.mark.skipif(cpu.unavailable() is not None, reason=f"no CPU kernels here: {cpu.unavailable()}"),
]

KERNEL = "pages.cu sm_80 DTYPE=1 HAS_ROW_TABLE=0 HEAD_DIM=64 V_HEAD_DIM=64"
"""The one CUDA kernel of the wheel here; ``make build`` makes hundreds in the same way."""

USE = f"""
import json
import os
import torch
import quantcache
from quantcache.backends import dispatch, torch as specification
from quantcache.backends.cuda import nvrtc
from quantcache.cli import doctor
from quantcache.store.segments import Segment

states = torch.randn(1, 2, 64, 32), torch.randn(1, 2, 64, 48)
stored, expected = (Segment.allocate(1, *states) for _ in range(2))
name = dispatch.choose_backend(torch.device("cpu"))
dispatch.BACKENDS[name].store_pages(*states, stored)
specification.store_pages(*states, expected)
program, arch, *macros = {KERNEL!r}.split(" ")
macros = tuple((macro.split("=")[0], int(macro.split("=")[1])) for macro in macros)
code = nvrtc.prebuilt_cubin(program, macros, arch)
print(json.dumps({{
    "package": quantcache.__file__,
    "backend": name,
    "kernels": doctor.examine()[0].kernels,
    "is_equal": all(torch.equal(*parts) for parts in zip(stored, expected)),
    "cubin": code is not None and code.startswith(b"\\x7fELF"),
    "home": os.listdir(os.environ["HOME"]),
}}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, with the CPU kernels and ``KERNEL``."""
    folder = tmp_path_factory.mktemp("dist")
    made = finished(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)],
        HATCH_BUILD_HOOK_ENABLE_CUSTOM="true",
        QUANTCACHE_KERNELS=KERNEL,
    )
    if "NVRTC cannot be used" in made.stderr:
        pytest.skip("there is no NVRTC here")
    assert made.returncode == 0, made.stderr
    (wheel,) = folder.iterdir()
    return wheel


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel and what it depends on, without what builds kernels."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    # A torch for GPUs cannot be loaded without NVRTC.
    left_out = ("quantcache", "_", "ninja", *(() if torch.version.cuda else ("nvidia",)))
    for entry in Path(spec.origin).parents[1].iterdir():
        if not entry.name.startswith(left_out) and entry.suffix != ".pth":
            (packages / entry.name).symlink_to(entry)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    installed = finished([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)])
    assert installed.returncode == 0, installed.stderr
    return python


def test_its_name_says_what_it_needs(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-manylinux_2_28_x86_64.whl")
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
        (description,) = [name for name in names if name.endswith(".dist-info/WHEEL")]
        assert "Root-Is-Purelib: false" in opened.read(description).decode()
        kernels = json.loads(opened.read(f"quantcache/prebuilt/{prebuilt.INDEX}"))["kernels"]
    assert sorted(kernels) == ["cpu linux x86_64", KERNEL]


def test_nothing_is_built_or_written_and_doctor_says_where_kernels_came_from(python: Path, tmp_path: Path) -> None:
    environment = {"PATH": "", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [python, "-c", USE], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert Path(found.pop("package")).is_relative_to(python.parents[1])
    assert found.pop("kernels").startswith("in the wheel, ")
    assert found == {"backend": "cpu", "is_equal": True, "cubin": True, "home": []}
    assert "quantcache" not in ran.stderr


def test_a_wheel_with_an_edited_source_is_refused(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tools import wheel as hook

    monkeypatch.setenv(hook.PATTERN_VARIABLE, KERNEL)
    edited = tmp_path / wheel.name
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(edited, "w") as target:
        for name in source.namelist():
            end = b"\n" if name.endswith("pages/store.cuh") else b""
            target.writestr(name, source.read(name) + end)
    with pytest.raises(RuntimeError, match=f"was not built from the source beside it: {KERNEL}"):
        hook.check_kernels(edited, str(ROOT))


def test_a_wheel_that_needs_a_newer_system_is_refused(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tools import wheel as hook

    monkeypatch.setattr(hook, "GLIBC", 17)
    with pytest.raises(RuntimeError, match=r"must run with glibc 2\.17, auditwheel finds manylinux_2_2[4-8]_x86_64"):
        hook.check_system(wheel)


def test_a_wheel_that_is_too_large_is_refused(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tools import wheel as hook

    monkeypatch.setattr(hook, "MAX_BYTES", os.path.getsize(wheel) - 1)
    monkeypatch.setattr(hook, "check_kernels", lambda *_: None)
    with pytest.raises(RuntimeError, match=rf"must have at most {os.path.getsize(wheel) - 1} bytes"):
        hook.check(wheel, str(ROOT))
