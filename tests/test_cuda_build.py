"""Are cubins kept, found again, and built anew when they must be? And do the sources compile?"""

import os
import re
import stat
import struct
from pathlib import Path

import pytest
import torch

from quantcache.backends import artifacts
from quantcache.backends.cuda import nvrtc, plan
from quantcache.backends.cuda.launch import Gpu
from quantcache.backends.cuda.plan import HEAD_DIM_STEP, MAX_HEAD_DIM
from quantcache.backends.cuda.prefill import Shape, macros_for
from quantcache.quantization.errors import BuildError
from tests import emulated_cuda

MACROS = (("HEAD_DIM", 64), ("V_HEAD_DIM", 64), ("DTYPE", 1), ("HAS_ROW_TABLE", 0))
ATTENTION_MACROS = (
    *(("ROW_TILES", 1), ("WARPS", 8), ("KEY_STEP", 16), ("STAGES", 2)),
    *(("HAS_MASK", 1), ("HAS_SOFTCAP", 1), ("FOLDS_GRID", 0), ("HAS_BLOCK_TABLE", 0)),
)


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


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in place of ``csrc/cuda``."""
    monkeypatch.setattr(nvrtc, "SOURCES", tmp_path)
    return tmp_path


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
        macros = (*MACROS[:2], ("DTYPE", 2), MACROS[3])
    elif change == "source":
        text = nvrtc.program_text(source)
        monkeypatch.setattr(nvrtc, "program_text", lambda name: text + "\n")
    else:
        monkeypatch.setattr(nvrtc, "version", lambda: "13.1")
    nvrtc.cubin(source, macros, arch)
    assert len(compiled) == 2


PROGRAMS = ("attention.cu", "pages.cu", "prefill.cu")


def test_every_source_is_part_of_a_program_once() -> None:
    """And nothing else names it, so the digest of a program covers all that goes into it."""
    found: set[str] = set()
    for program in PROGRAMS:
        text = nvrtc.program_text(program)
        names = re.findall(r'^#line 1 "(.+)"$', text, re.MULTILINE)
        assert len(names) == len(set(names))
        assert "#include" not in text
        found.update(names)
    assert found == {path.relative_to(nvrtc.SOURCES).as_posix() for path in nvrtc.SOURCES.rglob("*.cu*")}


def test_a_message_names_the_file_and_the_line(sources: Path) -> None:
    (sources / "program.cu").write_text('#include "part.cuh"\n#include "part.cuh"\n\nint c = b;\n')
    (sources / "part.cuh").write_text("const int a = 1;\nconst int b = a;\n")
    assert nvrtc.program_text("program.cu").splitlines() == [
        '#line 1 "program.cu"',
        '#line 1 "part.cuh"',
        "const int a = 1;",
        "const int b = a;",
        '#line 2 "program.cu"',
        "",
        "",
        "int c = b;",
    ]


@pytest.mark.parametrize("kernel", emulated_cuda.STRUCTURES)
def test_the_sources_expect_as_many_bytes_as_the_host_packs(kernel: str) -> None:
    """NVRTC checks the number against the structure, this the host against the number."""
    source, structure, form = emulated_cuda.STRUCTURES[kernel]
    stated = re.search(rf"static_assert\(sizeof\({structure}\) == (\d+),", nvrtc.program_text(source))
    assert stated is not None
    alignment = struct.calcsize("q")
    assert int(stated[1]) == -(-form.size // alignment) * alignment


def test_the_kernels_merge_as_many_splits_as_are_planned() -> None:
    assert f"constexpr int kMaxSplits = {plan.MAX_SPLITS};" in nvrtc.program_text("attention.cu")


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"HEAD_DIM": 72}, "HEAD_DIM in steps of an MMA"),
        ({"V_HEAD_DIM": 272}, "V_HEAD_DIM in steps of an MMA"),
        ({"DTYPE": 3}, "states are floats"),
        ({"WARPS": 3}, "WARPS - 1 masks"),
        ({"KEY_STEP": 48}, "fill a page"),
        ({"STAGES": 1}, "while another is copied"),
        ({"HAS_MASK": 2}, "a yes or a no"),
        ({"FOLDS_GRID": 2}, "a yes or a no"),
        ({"HAS_ROW_TABLE": 2}, "a yes or a no"),
        ({"HAS_BLOCK_TABLE": 2}, "a yes or a no"),
        ({"HAS_BLOCK_TABLE": 1}, "what serving asks for"),
    ],
    ids=str,
)
def test_a_build_that_the_sources_do_not_allow_is_refused(
    wrong: dict[str, int], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cuda.core")
    if nvrtc.unavailable():
        pytest.skip(str(nvrtc.unavailable()))
    monkeypatch.setenv(artifacts.CACHE_VARIABLE, str(tmp_path))
    macros = {**dict(MACROS), **dict(ATTENTION_MACROS), **wrong}
    with pytest.raises(BuildError, match=reason):
        nvrtc.cubin("attention.cu", tuple(macros.items()), "sm_90")


def test_a_damaged_cubin_is_built_again(compiled: list[str]) -> None:
    nvrtc.cubin("pages.cu", MACROS, "sm_90")
    (path,) = artifacts.kernel_folder().glob("*.cubin")
    path.write_bytes(b"cut short")
    assert nvrtc.cubin("pages.cu", MACROS, "sm_90") == b"cubin 2"
    (path,) = artifacts.kernel_folder().glob("*.cubin")
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
    assert [path.suffix for path in artifacts.kernel_folder().iterdir()] == [".cubin"]


def test_a_refused_source_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.core")
    if nvrtc.unavailable():
        pytest.skip(str(nvrtc.unavailable()))
    monkeypatch.setenv(artifacts.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(nvrtc, "program_text", lambda name: "this is no C++")
    with pytest.raises(BuildError, match=r"NVRTC cannot build pages\.cu for sm_90"):
        nvrtc.cubin("pages.cu", MACROS, "sm_90")
    assert not list(tmp_path.iterdir())


def test_a_folded_grid_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.core")
    if nvrtc.unavailable():
        pytest.skip(str(nvrtc.unavailable()))
    monkeypatch.setenv(artifacts.CACHE_VARIABLE, str(tmp_path))
    macros = {**dict(MACROS), **dict(ATTENTION_MACROS), "FOLDS_GRID": 1}
    assert nvrtc.cubin("attention.cu", tuple(macros.items()), "sm_80").startswith(b"\x7fELF")


BUILDS = [
    pytest.param(arch, dtype, marks=[] if dtype == 2 or arch == "sm_90" else [pytest.mark.slow, pytest.mark.sweep])
    for arch in ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
    for dtype in (0, 1, 2)
]
"""The short form has every architecture and every dtype."""


@pytest.mark.parametrize(("arch", "dtype"), BUILDS)
def test_the_sources_compile_for_every_architecture(
    arch: str, dtype: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cuda.core")
    if nvrtc.unavailable():
        pytest.skip(str(nvrtc.unavailable()))
    monkeypatch.setenv(artifacts.CACHE_VARIABLE, str(tmp_path))
    shared = (("HEAD_DIM", 192), ("V_HEAD_DIM", 128), ("DTYPE", dtype), ("HAS_ROW_TABLE", dtype % 2))
    assert nvrtc.cubin("pages.cu", shared, arch).startswith(b"\x7fELF")
    assert nvrtc.cubin("attention.cu", (*shared, *ATTENTION_MACROS), arch).startswith(b"\x7fELF")


@pytest.mark.parametrize(
    ("arch", "shape", "head_dims"),
    [
        ("sm_80", Shape(2, 8, 64, 1), (128, 128)),
        ("sm_90a", Shape(1, 8, 64, 2, True), (128, 128)),
        ("sm_90a", Shape(1, 12, 64, 2, True), (64, 64)),
        ("sm_90a", Shape(1, 8, 32, 2, True), (256, 256)),
        ("sm_90a", Shape(1, 4, 64, 2, True, 2), (128, 112)),
        ("sm_100", Shape(2, 8, 64, 2), (96, 80)),
        ("sm_120", Shape(1, 2, 32, 1), (256, 256)),
    ],
    ids=str,
)
def test_the_prefill_kernel_compiles_for_every_architecture(
    arch: str, shape: Shape, head_dims: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cuda.core")
    if nvrtc.unavailable():
        pytest.skip(str(nvrtc.unavailable()))
    monkeypatch.setenv(artifacts.CACHE_VARIABLE, str(tmp_path))
    shares_pages = head_dims != (128, 128)
    macros = macros_for(shape, *head_dims, torch.bfloat16, True, True, shares_pages, shares_pages)
    assert nvrtc.cubin("prefill.cu", macros, arch).startswith(b"\x7fELF")


@pytest.mark.parametrize(
    ("arch", "shape", "several", "head_dims"),
    [
        ("sm_80", plan.Shape(1, 4, 16, 2), Shape(2, 8, 64, 1), (128, 128)),
        ("sm_90", plan.Shape(2, 4, 32, 2), Shape(1, 8, 64, 2, True), (128, 128)),
        ("sm_120", plan.Shape(1, 8, 16, 2), Shape(1, 2, 32, 1), (256, 256)),
    ],
    ids=str,
)
def test_the_kernels_that_read_blocks_compile(
    arch: str,
    shape: plan.Shape,
    several: Shape,
    head_dims: tuple[int, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("cuda.core")
    if nvrtc.unavailable():
        pytest.skip(str(nvrtc.unavailable()))
    monkeypatch.setenv(artifacts.CACHE_VARIABLE, str(tmp_path))
    asked = (*head_dims, torch.float16, False, True)
    macros = plan.macros_for(shape, *asked, has_block_table=True)
    assert nvrtc.cubin("attention.cu", macros, arch).startswith(b"\x7fELF")
    macros = macros_for(several, *asked, has_block_table=True)
    assert nvrtc.cubin("prefill.cu", macros, arch + "a" * several.is_warpgroup).startswith(b"\x7fELF")


@pytest.mark.parametrize("shared_per_block", [99 << 10, 163 << 10, 227 << 10])
@pytest.mark.parametrize("head_dim", range(HEAD_DIM_STEP, MAX_HEAD_DIM + 1, HEAD_DIM_STEP))
@pytest.mark.parametrize("rows", [65, 4096])
def test_every_gpu_has_room_for_the_prefill_kernel(
    shared_per_block: int, head_dim: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of compute capability 8.6, 8.0 and 10.0, by CUDA's table of what a block may have of shared memory."""
    monkeypatch.setattr(
        emulated_cuda.PREFILL, "gpu", lambda index: Gpu("sm_80", 108, shared_per_block, shared_per_block)
    )
    shape = emulated_cuda.PREFILL.choose_shape(0, rows, head_dim, head_dim)
    assert shape.shared_bytes(head_dim, head_dim) <= shared_per_block


@pytest.mark.parametrize(
    ("arch", "driver", "expected"),
    [("sm_89", 13000, False), ("sm_90", 12020, False), ("sm_90", 12030, True), ("sm_100", 13000, True)],
)
def test_a_kernel_begins_early_where_gpu_and_driver_can(arch: str, driver: int, expected: bool) -> None:
    assert Gpu(arch, 100, 1 << 17, 1 << 17, driver).begins_early == expected


@pytest.mark.parametrize(("rows", "warps"), [(65, 8), (128, 8), (192, 12), (256, 8), (2048, 12)])
def test_narrow_heads_have_as_many_rows_in_a_cta_as_waste_the_least(
    rows: int, warps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emulated_cuda.PREFILL, "gpu", lambda index: emulated_cuda.H200)
    assert emulated_cuda.PREFILL.choose_shape(0, rows, 64, 64).warps == warps


@pytest.mark.parametrize("head_dim", range(HEAD_DIM_STEP, MAX_HEAD_DIM + 1, HEAD_DIM_STEP))
@pytest.mark.parametrize(("batch", "rows_each", "rows"), [(2, 1, 64), (70, 4, 64), (9, 16, 64), (9, 17, 128)])
def test_pages_that_are_shared_are_read_by_two_ctas_of_a_processor_where_they_fit(
    batch: int, rows_each: int, rows: int, head_dim: int
) -> None:
    device = emulated_cuda.H200
    shape = emulated_cuda.SHARED.shape_on(device, batch, rows_each, head_dim, head_dim)
    assert shape.at_once == (2 if rows == 64 and head_dim <= 128 else 1)
    needed = shape.shared_bytes(head_dim, head_dim)
    assert needed <= device.shared_per_block
    assert shape.at_once * (needed + 1024) <= device.shared_per_processor
    if head_dim in range(80, 129, 16):  # else there are more rows in a CTA
        assert shape.rows == rows


@pytest.mark.parametrize(
    ("tiles", "num_blocks", "splits"),
    [
        (128, 520, 1),  # nearly as many as run at once
        (112, 520, 7),  # 20 of 132 processors would have nothing to do
        (448, 512, 2),  # the last of four rounds would be of 52
        (32, 128, 4),
        (1792, 512, 1),
        (1, 3, 1),  # too few pages for two
    ],
)
def test_keys_are_divided_so_that_the_last_round_is_full(
    tiles: int, num_blocks: int, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emulated_cuda.PREFILL, "gpu", lambda index: emulated_cuda.H200)
    shape = Shape(1, 8, 64, 2, True)
    assert emulated_cuda.PREFILL.choose_splits(0, shape, 128, 128, tiles, num_blocks) == splits
