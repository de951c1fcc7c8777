"""Programs that a model wrote, run in processes of their own with limits on time and memory.

A program is stopped, and what it holds is bounded; what it may reach is not. It runs as the user, who may read files
and use the network: run programs of a model that you do not trust in a container without either.
"""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final

SECONDS: Final = 10.0
"""For a program and its test: HumanEval's take milliseconds, and a busy machine is slow."""

MEMORY_BYTES: Final = 2 << 30
FILE_BYTES: Final = 1 << 20

_LIMITED: Final = f"""
import sys
try:
    import resource
except ImportError:  # Windows has no such limits
    pass
else:
    for what, most in (("AS", {MEMORY_BYTES}), ("FSIZE", {FILE_BYTES}), ("CORE", 0), ("CPU", {int(SECONDS) + 1})):
        resource.setrlimit(getattr(resource, "RLIMIT_" + what), (most, most))
exec(compile(sys.stdin.read(), "program", "exec"), {{"__name__": "__main__"}})
"""


def passes(program: str, seconds: float = SECONDS) -> bool:
    """Whether a program comes to its end, within the limits and without an exception.

    Args:
        program: Python source.
        seconds: how long it may take, from the start of its interpreter on.
    """
    # A program that leaves early has not passed: the last thing it has to do is to say a word that it cannot know.
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _LIMITED],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(f"{program}\n\nprint({word!r})\n".encode(errors="replace"), seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            _stop(process)
    return process.returncode == 0 and said.rstrip().endswith(word.encode())


def passing(programs: Iterable[str]) -> list[bool]:
    """``passes`` of each, as many at a time as there are processors."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(passes, programs))


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End the process and what it has started; nothing where it has ended."""
    with suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.communicate()
