"""The build hook that makes the wheel with kernels in it, for Linux on x86-64; see ``make build``.

hatchling runs it where ``HATCH_BUILD_HOOK_ENABLE_CUSTOM=true`` asks for it. It needs what kernels are built with: the
development environment and a C++ compiler. Without it the wheel is the pure one, which builds kernels at first use.
"""

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, Final

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PATTERN_VARIABLE: Final = "QUANTCACHE_KERNELS"
"""Which of the CUDA kernels go into the wheel, as ``fnmatch`` has it; all of them where it is not set."""

GLIBC: Final = 28
"""Minor version of the oldest glibc 2 that the wheel runs with."""

MAX_BYTES: Final = 12_000_000
"""Of the wheel."""


class KernelsHook(BuildHookInterface[Any]):
    """Builds kernels into the wheel, and refuses a wheel that would not be what it says."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the kernels, and have the wheel take them and its tag.

        Raises:
            BuildError: see ``prebuilt.build_into``.
            RuntimeError: not on Linux and x86-64.
        """
        if version == "editable":
            return
        if (sys.platform, platform.machine()) != ("linux", "x86_64"):
            raise RuntimeError(f"The wheel with kernels is made on Linux and x86-64, not on {sys.platform}.")
        sys.path.insert(0, self.root)
        from tools import prebuilt

        self._folder = tempfile.TemporaryDirectory(prefix="quantcache-wheel-")
        prebuilt.build_into(Path(self._folder.name), _pattern())
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-manylinux_2_{GLIBC}_x86_64"
        build_data["force_include"][self._folder.name] = "quantcache/prebuilt"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Look at the finished wheel; one that does not pass is removed.

        Raises:
            RuntimeError: a kernel does not match its source, a library needs a newer system, or it is too large.
        """
        if version == "editable":
            return
        self._folder.cleanup()
        try:
            check(Path(artifact_path), self.root)
        except BaseException:
            os.unlink(artifact_path)
            raise


def check(wheel: Path, root: str) -> None:
    """Refuse a wheel with a kernel that does not match its source, that needs a newer system, or that is too large.

    Args:
        wheel: the file.
        root: of the repository.

    Raises:
        RuntimeError: the first of these.
    """
    check_kernels(wheel, root)
    check_system(wheel)
    if wheel.stat().st_size > MAX_BYTES:
        raise RuntimeError(f"{wheel.name}: must have at most {MAX_BYTES} bytes, has {wheel.stat().st_size}.")


def check_kernels(wheel: Path, root: str) -> None:
    """Hold the kernels in a wheel against the sources in it, by its own code: see ``prebuilt.check``.

    The sources of the repository may have changed while kernels were built from them.
    """
    with tempfile.TemporaryDirectory(prefix="quantcache-wheel-") as folder:
        with zipfile.ZipFile(wheel) as opened:
            opened.extractall(folder)
        program = f"from tools import prebuilt; prebuilt.check({_pattern()!r})"
        _printed([sys.executable, "-c", program], cwd=folder, env={**os.environ, "PYTHONPATH": root})


def check_system(wheel: Path) -> None:
    """Ask auditwheel whether a wheel runs where its name says."""
    shown = json.loads(_printed([sys.executable, "-m", "auditwheel", "show", "--json", str(wheel)]))
    needed = re.fullmatch(r"manylinux_2_(\d+)_x86_64", shown["overall_tag"])
    if needed is None or int(needed[1]) > GLIBC:
        raise RuntimeError(
            f"{wheel.name}: must run with glibc 2.{GLIBC}, auditwheel finds {shown['overall_tag']}, for "
            f"{shown['versioned_symbols']}. Build it on an older system."
        )


def _pattern() -> str:
    return os.environ.get(PATTERN_VARIABLE) or "*"


def _printed(command: list[str], **options: Any) -> str:
    ran = subprocess.run(command, text=True, capture_output=True, **options)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {ran.stderr.strip() or ran.stdout.strip()}")
    return str(ran.stdout)
