"""Where this user's downloads and built kernels go, and how kernels are kept and found again.

Kernels are code that runs with all that the user may do. So they are taken from a folder and from files that this user
alone can write, each file is opened once, and what is loaded are the bytes that were held against its name. Where such
a folder cannot be had, kernels live as long as the process that built them.
"""

import contextlib
import hashlib
import logging
import os
import secrets
import stat
import sys
from pathlib import Path
from typing import Final

CACHE_VARIABLE: Final = "QUANTCACHE_CACHE"

_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH

logger = logging.getLogger("quantcache")


def cache_folder() -> Path:
    """``$QUANTCACHE_CACHE``, else ``quantcache`` in the platform's cache folder; it need not exist yet.

    Raises:
        OSError: the user has no home folder, and no variable names another.
    """
    try:
        if chosen := os.environ.get(CACHE_VARIABLE):
            return Path(chosen).expanduser()
        if sys.platform == "win32":
            return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "quantcache"
        if xdg := os.environ.get("XDG_CACHE_HOME"):
            return Path(xdg) / "quantcache"
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "quantcache"
        return Path.home() / ".cache" / "quantcache"
    except RuntimeError as error:  # of a user without HOME and without an entry among the system's users
        raise FileNotFoundError("this user has no home folder") from error


def kernel_folder() -> Path:
    """The folder of built kernels, which this user alone may write; it need not exist yet.

    Raises:
        OSError: see ``cache_folder``.
    """
    return cache_folder() / "kernels"


def find_kept(prefix: str, suffix: str) -> bytes | None:
    """What ``keep`` was given, or None. A file that others could have written, or that is damaged, is removed."""
    try:
        with _Folder() as folder:
            for name in folder.names():
                if not (name.startswith(f"{prefix}-") and name.endswith(suffix)):
                    continue
                try:
                    content = folder.read(name)
                    if name == kept_name(prefix, suffix, content):
                        return content
                    fault = f"{folder.path / name} is damaged"
                except OSError as error:
                    fault = str(error)
                logger.warning("quantcache: a kernel is built again: %s.", fault)
                with contextlib.suppress(OSError):
                    folder.remove(name)
    except FileNotFoundError:
        pass  # nothing was kept yet
    except OSError as error:
        _say_not_kept(error)
    return None


def keep(prefix: str, suffix: str, content: bytes) -> None:
    """Put a built file into the folder, so that another process sees all of it or nothing.

    Where that cannot be done, one warning in the life of the process says so.

    Args:
        prefix: what the content depends on, as a name.
        suffix: end of the file name, with its dot.
        content: the bytes; a digest of them goes into the name.
    """
    try:
        with _Folder(make=True) as folder:
            folder.write(kept_name(prefix, suffix, content), content)
    except OSError as error:
        _say_not_kept(error)


def why_not_kept() -> str | None:
    """Why kernels that are built now would not be kept, or None; no warning says it again."""
    try:
        with _Folder(make=True) as folder:
            folder.write(name := f"{secrets.token_hex(8)}.tmp", bytes(1 << 12))
            folder.remove(name)
    except OSError as error:
        _said.append(str(error))
        return str(error)
    return None


def kept_name(prefix: str, suffix: str, content: bytes) -> str:
    """File name of ``content`` in the folder."""
    return f"{prefix}-{hashlib.sha256(content).hexdigest()}{suffix}"


class _Folder:
    """``kernel_folder``, opened. Its files are those of what was opened, whatever its path leads to by now.

    Args:
        make: make it if it is not there.

    Attributes:
        path: of the folder.

    Raises:
        OSError: it cannot be had, or others can write it; so do all methods where a file cannot.
    """

    def __init__(self, make: bool = False) -> None:
        self.path = kernel_folder()
        self._descriptor: int | None = None  # where folders cannot be opened, a user's profile is the user's alone
        if make:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                self.path.mkdir(0o700)
        if os.name == "posix":
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                _check_private(self.path, self._descriptor)
            except OSError:
                os.close(self._descriptor)
                raise

    def __enter__(self) -> "_Folder":
        return self

    def __exit__(self, *error: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    def names(self) -> list[str]:
        """Of its files, in a fixed order."""
        return sorted(os.listdir(self.path if self._descriptor is None else self._descriptor))

    def read(self, name: str) -> bytes:
        """The content of a file that this user alone can write, and no link."""
        with open(self._opened(name, os.O_RDONLY), "rb") as file:
            _check_private(self.path / name, file.fileno())
            return file.read()

    def write(self, name: str, content: bytes) -> None:
        """Make a file in one step."""
        temporary = f"{secrets.token_hex(8)}.tmp"
        try:
            with open(self._opened(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
                file.write(content)
            ends = {"src_dir_fd": self._descriptor, "dst_dir_fd": self._descriptor}
            os.replace(self._place(temporary), self._place(name), **ends)
        except BaseException as error:
            with contextlib.suppress(OSError):
                self.remove(temporary)
            if isinstance(error, OSError):  # which names the file at most
                raise OSError(error.errno, error.strerror, str(self.path)) from error
            raise

    def remove(self, name: str) -> None:
        """Remove a file, or a link and not what it leads to."""
        os.unlink(self._place(name), dir_fd=self._descriptor)

    def _opened(self, name: str, flags: int) -> int:
        flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        return os.open(self._place(name), flags, 0o600, dir_fd=self._descriptor)

    def _place(self, name: str) -> str | Path:
        return self.path / name if self._descriptor is None else name


def _check_private(path: Path, descriptor: int) -> None:
    """Refuse what is open there if others can have written it.

    Raises:
        PermissionError: it belongs to another user, or may be written by others.
    """
    status = os.fstat(descriptor)
    if os.name == "posix" and status.st_uid != os.geteuid():
        raise PermissionError(f"{path} belongs to user {status.st_uid}, not to {os.geteuid()}")
    if os.name == "posix" and status.st_mode & _OTHERS_WRITE:
        raise PermissionError(f"{path} may be written by others, its mode is {stat.S_IMODE(status.st_mode):04o}")


_said: Final[list[str]] = []


def _say_not_kept(error: OSError) -> None:
    if not _said:
        _said.append(str(error))
        logger.warning(
            "quantcache: built kernels cannot be kept, so every process builds its own: %s. "
            "Set %s to a folder that this user alone can write.",
            error,
            CACHE_VARIABLE,
        )
