"""Are cubins kept, found again, and built anew when they must be? And do the sources compile?"""

import os
import stat
from pathlib import Path

import pytest

from quantcache.backends import artifacts
from quantcache.backends.cuda import nvrtc
from quantcache.quantization.errors import BuildError

MACROS = (("DK", 64), ("DV", 64), ("DTYPE", 1))


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects what a stand-in for NVRTC is asked to build; the cache is a folder of the test's own."""
    asked: list[str] = []

    def compile_(source: str, macros: nvrtc.Macros, arch: str) -> bytes:
        asked.append(f"{source} {dict(macros)} {arch}")
        return f"cubin {len(asked)}".encode()

    monkeypatch.setenv(artifacts.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(nvrtc, "_compile", compile_)
    monkeypatch.setattr(nvrtc, "version", lambda: "13.0")
    return asked


def test_a_cubin_is_built_once(compiled: list[str]) -> None:
    first = nvrtc.cubin("pages.cu", MACROS, "sm_90")
    assert nvrtc.cubin("pages.cu", MACROS, "sm_90") == first
    assert len(compiled) == 1


@pytest.mark.parametrize("change", ["arch", "macros", "source", "nvrtc"])
def test_whatever_it_depends_on_makes_another(
    change: str, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, macros, arch = "pages.cu", MACROS, "sm_90"
    nvrtc.cubin(source, macros, arch)
    if change == "arch":
        arch = "sm_80"
    elif change == "macros":
        macros = (*MACROS[:2], ("DTYPE", 2))
    elif change == "source":
        text = nvrtc.program_text(source)
        monkeypatch.setattr(nvrtc, "program_text", lambda name: text + "\n")
    else:
        monkeypatch.setattr(nvrtc, "version", lambda: "13.1")
    nvrtc.cubin(source, macros, arch)
    assert len(compiled) == 2


def test_a_damaged_cubin_is_built_again(compiled: list[str]) -> None:
    nvrtc.cubin("pages.cu", MACROS, "sm_90")
    (path,) = artifacts.cache_folder().glob("*.cubin")
    path.write_bytes(b"cut short")
    assert nvrtc.cubin("pages.cu", MACROS, "sm_90") == b"cubin 2"
    (path,) = artifacts.cache_folder().glob("*.cubin")
    assert path.read_bytes() == b"cubin 2"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the superuser writes anywhere")
def test_an_unwritable_folder_costs_a_build_and_nothing_else(compiled: list[str], tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        assert nvrtc.cubin("pages.cu", MACROS, "sm_90") == b"cubin 1"
    finally:
        tmp_path.chmod(stat.S_IRWXU)


def test_a_folder_that_cannot_be_made_costs_a_build_and_nothing_else(
    compiled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(artifacts.CACHE_VARIABLE, str(tmp_path / "file" / "below"))
    assert nvrtc.cubin("pages.cu", MACROS, "sm_90") == b"cubin 1"
    assert nvrtc.cubin("pages.cu", MACROS, "sm_90") == b"cubin 2"


def test_nothing_is_left_beside_the_cubin(compiled: list[str]) -> None:
    """What is written first under another name is renamed, so that another process sees all of it or nothing."""
    nvrtc.cubin("pages.cu", MACROS, "sm_90")
    assert [path.suffix for path in artifacts.cache_folder().iterdir()] == [".cubin"]


def test_a_refused_source_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.core")
    if nvrtc.unavailable():
        pytest.skip(str(nvrtc.unavailable()))
    monkeypatch.setenv(artifacts.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(nvrtc, "program_text", lambda name: "this is no C++")
    with pytest.raises(BuildError, match=r"NVRTC cannot build pages\.cu for sm_90"):
        nvrtc.cubin("pages.cu", MACROS, "sm_90")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("dtype", [0, 1, 2])
def test_the_sources_compile_for_every_architecture(
    arch: str, dtype: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cuda.core")
    if nvrtc.unavailable():
        pytest.skip(str(nvrtc.unavailable()))
    monkeypatch.setenv(artifacts.CACHE_VARIABLE, str(tmp_path))
    shared = (("DK", 192), ("DV", 128), ("DTYPE", dtype))
    shape = (("NT", 1), ("WARPS", 8), ("KSTEP", 16), ("STAGES", 2), ("MASK", 1), ("SOFTCAP", 1))
    assert nvrtc.cubin("pages.cu", shared, arch).startswith(b"\x7fELF")
    assert nvrtc.cubin("attention.cu", (*shared, *shape), arch).startswith(b"\x7fELF")
