"""Where this user's downloads and built kernels go, and how a built file is kept there."""

import contextlib
import hashlib
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Final

CACHE_VARIABLE: Final = "QUANTCACHE_CACHE"

logger = logging.getLogger("quantcache")


def cache_folder() -> Path:
    """``$QUANTCACHE_CACHE``, else ``quantcache`` in the platform's cache folder; it need not exist yet."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "quantcache"
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "quantcache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "quantcache"
    return Path.home() / ".cache" / "quantcache"


def find_kept(prefix: str, suffix: str) -> Path | None:
    """The file that ``keep`` made, or None. One whose content is not what its name says is removed."""
    for path in sorted(cache_folder().glob(f"{prefix}-*{suffix}")):
        # A file cut short by a full disk would not fail to load but kill the process when its pages are touched.
        if path.name == kept_name(prefix, suffix, path.read_bytes()):
            return path
        logger.warning("quantcache: %s is damaged and is built again.", path)
        with contextlib.suppress(OSError):
            path.unlink()
    return None


def keep(prefix: str, suffix: str, content: bytes, folder: Path | None = None) -> Path:
    """Put a file into the cache in one step, so that another process sees all of it or nothing.

    Args:
        prefix: what the content depends on, as a name.
        suffix: end of the file name, with its dot.
        content: the bytes; a digest of them goes into the name.
        folder: instead of the cache folder.

    Raises:
        OSError: it cannot be written.
    """
    path = (folder or cache_folder()) / kept_name(prefix, suffix, content)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target: only a rename within a directory is atomic.
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o755)
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise
    return path


def kept_name(prefix: str, suffix: str, content: bytes) -> str:
    """File name of ``content`` in the cache."""
    return f"{prefix}-{hashlib.sha256(content).hexdigest()[:16]}{suffix}"
