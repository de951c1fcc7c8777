"""Are the wheel's kernels taken where they match their sources, and only there? And are they those that calls get?"""

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from quantcache.backends import artifacts, cpu, cuda, prebuilt
from quantcache.backends.cpu import build
from quantcache.backends.cuda import launch, nvrtc, plan
from quantcache.backends.cuda.prefill import arch_for, macros_for, shape_on
from quantcache.quantization.errors import BuildError
from tests import emulated_cuda
from tools import prebuilt as wheel

MACROS = (("HEAD_DIM", 64), ("V_HEAD_DIM", 64), ("DTYPE", 1))
BUILDS = [wheel.Cubin(source, MACROS, "sm_90") for source in nvrtc.PROGRAMS]


def machine_code(cubin: wheel.Cubin) -> bytes:
    return b"\x7fELF of the wheel: " + cubin.name.encode()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A wheel's kernels, one of each program, and a cache folder in which there is nothing."""
    folder = tmp_path / "prebuilt"
    folder.mkdir()
    monkeypatch.setattr(prebuilt, "FOLDER", folder)
    monkeypatch.setenv(artifacts.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(wheel, "_built", lambda wanted: {cubin.name: machine_code(cubin) for cubin in BUILDS})
    monkeypatch.setattr(nvrtc, "version", lambda: "13.0.88")
    monkeypatch.setattr(build, "find_compiler", lambda: ["c++"])
    monkeypatch.setattr(build, "library_prefix", lambda compiler: "library")
    monkeypatch.setattr(artifacts, "find_kept", lambda prefix, suffix: b"a library")
    wheel.build_into(folder)
    monkeypatch.undo()
    monkeypatch.setattr(prebuilt, "FOLDER", folder)
    monkeypatch.setenv(artifacts.CACHE_VARIABLE, str(tmp_path / "cache"))
    forget()
    yield folder
    forget()


def forget() -> None:
    """What was found out about another wheel."""
    for function in (prebuilt.index, prebuilt._unpacked, nvrtc.prebuilt_states, launch.reads_wheel):
        function.cache_clear()


def edit_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    text = nvrtc.program_text
    monkeypatch.setattr(nvrtc, "program_text", lambda source: text(source) + "\n")


def test_a_kernel_of_the_wheel_is_found(folder: Path) -> None:
    for cubin in BUILDS:
        assert nvrtc.prebuilt_cubin(*cubin) == machine_code(cubin)


@pytest.mark.parametrize(
    "other", [{"arch": "sm_80"}, {"arch": "sm_90a"}, {"macros": (*MACROS[:2], ("DTYPE", 2))}], ids=str
)
def test_no_other_takes_its_place(folder: Path, other: dict[str, str]) -> None:
    assert nvrtc.prebuilt_cubin(*BUILDS[0]._replace(**other)) is None


def test_a_kernel_whose_source_was_edited_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_sources(monkeypatch)
    assert nvrtc.prebuilt_cubin(*BUILDS[0]) is None
    assert not nvrtc.prebuilt_states("sm_90")


def test_options_of_the_build_count_as_its_source(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "OPTIONS", {**nvrtc.OPTIONS, "fmad": False})
    assert nvrtc.prebuilt_cubin(*BUILDS[0]) is None


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_kernel_is_not_used_and_said_to_be(
    folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    archive = folder / prebuilt.index().kernels[BUILDS[0].name].archive
    content = archive.read_bytes()
    archive.unlink()
    if damage != "gone":
        archive.write_bytes(content[:40] if damage == "cut" else bytes([*content[:40], content[40] ^ 1, *content[41:]]))
    assert nvrtc.prebuilt_cubin(*BUILDS[0]) is None
    (message,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert f"{archive.name} of {folder} is not used" in message


def test_an_archive_is_unpacked_in_little_time(folder: Path) -> None:
    """It ends with the first kernel that fills it, and no kernel is missing."""
    contents = {str(number): bytes([number]) * (wheel.ARCHIVE_BYTES // 3) for number in range(7)}
    places = wheel._archived(contents, folder)
    forget()
    for name, place in places.items():
        unpacked = prebuilt._unpacked(place.archive)
        assert len(unpacked) < wheel.ARCHIVE_BYTES + len(contents[name])
        assert unpacked[place.start : place.start + place.size] == contents[name]


class Driver:
    """Loads what it accepts."""

    def __init__(self, refused: bytes = b"nothing") -> None:
        self.refused, self.asked, self.version = refused, list[bytes](), 13010

    def load(self, code: bytes, *_: object) -> tuple[int, bytes]:
        self.asked.append(code)
        return (209, b"") if code.startswith(self.refused) else (0, code)


@pytest.fixture
def driver(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    module = pytest.importorskip("cuda.bindings.driver")
    driver = Driver()
    monkeypatch.setattr(module, "cuLibraryLoadData", driver.load)
    monkeypatch.setattr(module, "cuDriverGetVersion", lambda: (0, driver.version))
    monkeypatch.setattr(nvrtc, "_compile", lambda *cubin: b"built")
    monkeypatch.setattr(nvrtc, "version", lambda: "13.0")
    return driver


def test_a_gpu_loads_the_wheels_kernel_and_nothing_is_built_or_kept(driver: Driver, tmp_path: Path) -> None:
    assert launch._library.__wrapped__(*BUILDS[0]) == machine_code(BUILDS[0])
    assert not (tmp_path / "cache").exists()


def test_a_driver_that_refuses_the_wheels_kernel_gets_one_that_is_built_here(
    driver: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    driver.refused = b"\x7fELF"
    assert launch._library.__wrapped__(*BUILDS[0]) == b"built"
    assert driver.asked == [machine_code(BUILDS[0]), b"built"]
    assert "attention.cu of the wheel is not used: the driver returned 209" in caplog.text


def test_a_driver_of_an_older_cuda_is_not_tried(driver: Driver) -> None:
    driver.version = 12090
    assert launch._library.__wrapped__(*BUILDS[0]) == b"built"
    assert driver.asked == [b"built"]


def test_what_the_wheel_does_not_have_is_built(driver: Driver) -> None:
    assert launch._library.__wrapped__("attention.cu", (), "sm_90") == b"built"
    assert driver.asked == [b"built"]


@pytest.fixture
def without_nvrtc(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "unavailable", lambda: "NVRTC cannot be used: it is not there")
    monkeypatch.setattr(cuda, "reads_wheel", lambda: True)
    monkeypatch.setattr(cuda, "gpu", lambda index: emulated_cuda.H200)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))


@pytest.mark.usefixtures("without_nvrtc")
def test_without_nvrtc_the_wheels_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda._unavailable.__wrapped__(0) is None
    monkeypatch.setattr(cuda, "reads_wheel", lambda: False)
    assert cuda._unavailable.__wrapped__(0) == "NVRTC cannot be used: it is not there"


@pytest.mark.usefixtures("without_nvrtc")
def test_without_nvrtc_an_edited_source_leaves_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    edit_sources(monkeypatch)
    assert cuda._unavailable.__wrapped__(0) == "NVRTC cannot be used: it is not there"


@pytest.mark.usefixtures("without_nvrtc")
@pytest.mark.parametrize(
    ("dtype", "head_dim", "v_head_dim", "reason"),
    [
        (torch.bfloat16, 64, 64, None),
        (torch.bfloat16, 128, 64, "the wheel has no kernels for head_dims (128, 64) in torch.bfloat16, and NVRTC"),
        (torch.float32, 64, 64, "the wheel has no kernels for head_dims (64, 64) in torch.float32, and NVRTC"),
    ],
)
def test_without_nvrtc_other_states_go_to_plain_torch(
    dtype: torch.dtype, head_dim: int, v_head_dim: int, reason: str | None
) -> None:
    states = [
        SimpleNamespace(shape=(1, 2, 3, width), dtype=dtype, is_cuda=True, device=torch.device("cuda", 0))
        for width in (head_dim, v_head_dim)
    ]
    found = cuda.unsupported(*states)  # type: ignore[arg-type]
    assert found is None if reason is None else str(found).startswith(reason)


@pytest.mark.usefixtures("without_nvrtc")
def test_doctor_is_told_what_the_wheel_has_for_a_gpu() -> None:
    built, others = cuda.where_from(torch.device("cuda", 0)).split("; ")
    assert built == "of sm_90 in the wheel, for head_dim 64 in bfloat16"
    assert others == "others: none, because NVRTC cannot be used: it is not there"


def test_without_a_wheels_kernels_doctor_names_nvrtc(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / prebuilt.INDEX).unlink()
    forget()
    monkeypatch.setattr(cuda, "gpu", lambda index: emulated_cuda.H200)
    monkeypatch.setattr(nvrtc, "unavailable", lambda: None)
    monkeypatch.setattr(nvrtc, "version", lambda: "13.0")
    assert cuda.where_from(torch.device("cuda", 0)) == "built at first use by NVRTC 13.0"


def refuse_compilers() -> list[str]:
    raise BuildError("no C++ compiler found")


def test_the_cpu_kernels_of_the_wheel_need_no_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[bytes] = []
    monkeypatch.setattr(build, "_loaded", loaded.append)
    monkeypatch.setattr(build, "find_compiler", refuse_compilers)
    monkeypatch.setattr(build, "where_from", [])
    build.load_library()
    assert (loaded, build.where_from) == ([b"a library"], ["in the wheel"])
    with pytest.raises(BuildError, match="no C"):
        build.load_library(["-g"])


def test_cpu_kernels_that_cannot_be_loaded_are_built(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "find_compiler", refuse_compilers)
    with pytest.raises(BuildError, match="no C"):
        build.load_library()
    assert "the CPU kernels of the wheel are not used" in caplog.text


@pytest.mark.skipif(cpu.unavailable() is not None, reason=f"no CPU kernels here: {cpu.unavailable()}")
def test_where_the_cpu_kernels_come_from_is_known() -> None:
    assert cpu.where_from().endswith(cpu.isa())


@pytest.mark.usefixtures("folder")
def test_a_wheel_whose_kernels_do_not_match_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel, "cubins", lambda pattern: BUILDS)
    wheel.check()
    edit_sources(monkeypatch)
    with pytest.raises(BuildError, match=r"not built from the source beside it: attention\.cu sm_90 DTYPE=1"):
        wheel.check()
    monkeypatch.setattr(wheel, "cubins", lambda pattern: BUILDS[1:])
    with pytest.raises(BuildError, match=r"not those of its table: attention\.cu sm_90"):
        wheel.check()


@pytest.mark.parametrize("gpu", wheel.GPUS, ids=lambda gpu: gpu.arch)
@pytest.mark.parametrize("kind", wheel.KINDS, ids=lambda kind: str(kind.head_dim))
def test_the_wheel_has_what_calls_of_its_kinds_get(gpu: launch.Gpu, kind: wheel.Kind) -> None:
    names = {cubin.name for cubin in wheel.cubins(f"* {gpu.arch}* HEAD_DIM={kind.head_dim} *")}
    widths, used = (kind.head_dim, kind.head_dim), set()
    for dtype, mask, softcap in itertools.product(wheel.DTYPES, (False, True), (False, True)[: 1 + kind.softcap]):
        for rows, heads, is_short in itertools.product((1, 4, 8, 9, 64), (1, 32, 250, 2048, 60000), (False, True)):
            shape = plan.shape_on(gpu, rows, *widths, dtype, heads, is_short)
            used.add(wheel.Cubin("attention.cu", plan.macros_for(shape, *widths, dtype, mask, softcap), gpu.arch).name)
        for rows in (65, 128, 129, 4096):
            wide = shape_on(gpu, rows, *widths)
            macros = macros_for(wide, *widths, dtype, mask, softcap)
            used.add(wheel.Cubin("prefill.cu", macros, arch_for(gpu, wide)).name)
    assert used <= names
    assert {name for name in names if not name.startswith("pages.cu")} == used
