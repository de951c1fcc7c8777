"""Where this user's downloads and built kernels go."""

import os
import sys
from pathlib import Path
from typing import Final

CACHE_VARIABLE: Final = "QUANTCACHE_CACHE"


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
