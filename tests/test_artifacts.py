"""Are built kernels taken from this user's own files alone, and does every trouble with the folder end well?"""

import errno
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quantcache.backends import artifacts
from quantcache.backends.cuda import nvrtc
from quantcache.backends.dispatch import BACKEND_VARIABLE
from quantcache.cli import doctor
from quantcache.cli.main import app
from quantcache.evaluation.models import ModelError, fetch_demo_model

posix = pytest.mark.skipif(os.name != "posix", reason="owners and permissions as POSIX has them")
superuser = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="the superuser alone gives files away")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, and a process in which nothing has been said."""
    monkeypatch.setenv(artifacts.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(artifacts, "_said", [])
    return tmp_path / "cache"


def keep(content: bytes = b"code") -> None:
    artifacts.keep("kernel", ".bin", content)


def find() -> bytes | None:
    return artifacts.find_kept("kernel", ".bin")


def kept_files() -> list[Path]:
    return sorted(artifacts.kernel_folder().iterdir())


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_what_is_kept_is_found(caplog: pytest.LogCaptureFixture) -> None:
    assert find() is None
    keep()
    assert find() == b"code"
    assert artifacts.find_kept("kern", ".bin") is None
    assert artifacts.find_kept("kernel", ".so") is None
    assert not warnings_of(caplog)


@posix
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_folder_and_files_are_this_users_alone(umask: int) -> None:
    before = os.umask(umask)
    try:
        keep()
    finally:
        os.umask(before)
    (file,) = kept_files()
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert find() == b"code"


def belongs_to_another(path: Path) -> None:
    os.chown(path, 12345, 12345)


def may_be_written_by_all(path: Path) -> None:
    path.chmod(path.stat().st_mode | 0o002)


def may_be_written_by_the_group(path: Path) -> None:
    path.chmod(path.stat().st_mode | 0o020)


def is_a_link(path: Path) -> None:
    """To the very same content, which this user owns."""
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


OPENINGS = [
    pytest.param(belongs_to_another, "belongs to user 12345", marks=superuser),
    pytest.param(may_be_written_by_all, "may be written by others, its mode is 0", marks=posix),
    pytest.param(may_be_written_by_the_group, "may be written by others, its mode is 0", marks=posix),
    pytest.param(is_a_link, "", marks=posix),
]


@pytest.mark.parametrize(("open_to_others", "reason"), OPENINGS)
def test_nothing_is_taken_from_or_put_into_a_folder_of_others(
    open_to_others: Callable[[Path], None], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    keep()
    open_to_others(artifacts.kernel_folder())
    before = kept_files()
    assert find() is None
    keep(b"newer")
    assert kept_files() == before
    (message,) = warnings_of(caplog)
    assert message.startswith("quantcache: built kernels cannot be kept, so every process builds its own: ")
    assert reason in message
    assert message.endswith(". Set QUANTCACHE_CACHE to a folder that this user alone can write.")


@pytest.mark.parametrize(("open_to_others", "reason"), OPENINGS)
def test_a_file_of_others_is_built_again(
    open_to_others: Callable[[Path], None], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    keep()
    (file,) = kept_files()
    open_to_others(file)
    assert find() is None
    (message,) = warnings_of(caplog)
    assert message.startswith("quantcache: a kernel is built again: ")
    assert reason in message
    assert kept_files() == []
    keep()
    assert find() == b"code"


def test_content_that_is_not_what_the_name_says_is_built_again(caplog: pytest.LogCaptureFixture) -> None:
    keep()
    (file,) = kept_files()
    for content in (b"Code", b"cod", b"code ", b""):
        file.write_bytes(content)
        assert find() is None
        keep()
        assert find() == b"code"
    assert warnings_of(caplog) == [f"quantcache: a kernel is built again: {file} is damaged."] * 4


@posix
def test_the_folder_that_was_checked_is_the_one_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another takes its place between the check and the reading."""
    keep()
    other = tmp_path / "other"
    other.mkdir()
    (other / artifacts.kept_name("kernel", ".bin", b"evil")).write_bytes(b"evil")
    check = artifacts._check_private

    def check_and_replace(path: Path, descriptor: int) -> None:
        check(path, descriptor)
        if other.exists():
            path.rename(tmp_path / "moved")
            other.rename(path)

    monkeypatch.setattr(artifacts, "_check_private", check_and_replace)
    assert find() == b"code"


@posix
@pytest.mark.parametrize("call", ["mkdir", "open", "write", "close", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES], ids=errno.errorcode.get)
def test_whichever_write_fails_costs_one_warning_and_leaves_nothing(
    call: str, number: int, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if call != "mkdir":
        artifacts.keep("another", ".bin", b"code")
    before = list(cache.rglob("*"))
    fail_at(call, number, monkeypatch)
    for _ in range(2):
        assert find() is None
        keep()
    (message,) = warnings_of(caplog)
    assert os.strerror(number) in message
    assert call == "mkdir" or str(artifacts.kernel_folder()) in message
    assert list(cache.rglob("*")) == before


def fail_at(call: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have one call of the system fail wherever a kernel is written."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    class Failing:
        def __init__(self, descriptor: int, mode: str) -> None:
            self.file = open(descriptor, mode)  # noqa: SIM115 - closed by __exit__

        def __enter__(self) -> "Failing":
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()
            if call == "close":
                fail()

        def write(self, content: bytes) -> None:
            self.file.write(content[:1])
            if call == "write":
                fail()

    if call == "mkdir":
        monkeypatch.setattr(Path, "mkdir", fail)
    elif call == "replace":
        monkeypatch.setattr(os, "replace", fail)
    elif call == "open":
        real = os.open
        monkeypatch.setattr(
            os, "open", lambda p, flags, *a, **k: fail() if flags & os.O_CREAT else real(p, flags, *a, **k)
        )
    else:
        monkeypatch.setattr(artifacts, "open", Failing, raising=False)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser reads and writes anywhere")
@pytest.mark.parametrize("mode", [0o000, 0o300, 0o500])
def test_a_folder_without_permission_costs_one_warning(
    mode: int, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keep()
    artifacts.kernel_folder().chmod(mode)
    try:
        find()
        keep(b"newer")
    finally:
        artifacts.kernel_folder().chmod(0o700)
    assert len(warnings_of(caplog)) == 1


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without HOME and without an entry among the system's users."""
    pwd = pytest.importorskip("pwd")

    def unknown(user: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {user}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for variable in (artifacts.CACHE_VARIABLE, "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.usefixtures("homeless")
def test_without_a_home_kernels_are_built_for_the_process(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(nvrtc, "_compile", lambda source, macros, arch: b"cubin")
    monkeypatch.setattr(nvrtc, "version", lambda: "13.0")
    for _ in range(2):
        assert nvrtc.cubin("pages.cu", (), "sm_90") == b"cubin"
    (message,) = warnings_of(caplog)
    assert "every process builds its own: this user has no home folder. Set QUANTCACHE_CACHE to a folder" in message


@pytest.mark.usefixtures("homeless")
def test_without_a_home_doctor_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "120", BACKEND_VARIABLE: "torch"})
    assert result.exit_code == 0
    assert (
        "\nbuilt kernels are not kept, every process builds its own: this user has no home folder. "
        "Set QUANTCACHE_CACHE to a folder that this user alone can write.\n"
    ) in result.output
    keep()
    assert not warnings_of(caplog)


@pytest.mark.usefixtures("homeless")
def test_without_a_home_the_demo_model_has_no_place() -> None:
    with pytest.raises(ModelError, match=r"^fetch_file: the cache folder must be writable with \d+ MB free, got: "):
        fetch_demo_model()


def test_doctor_says_where_kernels_are_kept_and_leaves_nothing_there(cache: Path) -> None:
    assert doctor.where_kept() == f"built kernels and downloads: {cache}"
    assert kept_files() == []
