"""Do the CUDA kernels read and write only what is theirs, without races? compute-sanitizer says, where there is one."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.conftest import skip_without_gpu
from tests.processes import ROOT, finished

pytestmark = [pytest.mark.cuda, skip_without_gpu]


def sanitizer() -> str | None:
    """Where CUDA's toolkit has it; its folder is not always on the path."""
    toolkits = [Path(os.environ.get("CUDA_HOME", "/opt/cuda")), *Path("/usr/local").glob("cuda*")]
    places = [os.environ.get("PATH", ""), *(str(toolkit / "bin") for toolkit in toolkits)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


@pytest.mark.parametrize("part", ["", "prefill", "blocks"])
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_every_kernel_is_clean(tool: str, part: str) -> None:
    command = sanitizer()
    if command is None:
        pytest.skip("needs compute-sanitizer, which CUDA's toolkit has")
    options = ["--tool", tool, "--error-exitcode", "9"]
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    if tool == "memcheck":
        options += ["--report-api-errors", "no"]  # torch probes the driver with calls that are meant to fail
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    program = str(ROOT / "tests" / "every_cuda_kernel.py")
    done = finished([command, *options, sys.executable, program, part], timeout=900, **environment)
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer cannot watch this GPU, as in some containers")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "ok" in done.stdout
