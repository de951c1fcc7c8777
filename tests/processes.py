"""Programs that tests run beside them, several processes of torch.distributed among them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from filelock import FileLock

ROOT = Path(__file__).parent.parent

skip_below_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")


def finished(
    command: Sequence[str], timeout: float | None = 300, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """What became of ``command`` in the repository, with the package on its path and what it wrote as text."""
    # A pytest that is run here is none of the processes that the tests are spread over.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**inherited, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that ``make`` fills, once for all processes of the tests. No test may write into it."""
    shared = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder, unfinished = shared / name, shared / f"{name}.unfinished"
    with FileLock(shared / f"{name}.lock"):
        if not folder.exists():
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(folder)
    return folder


def launch(program: Path, *arguments: object, device: str = "cpu", processes: int = 2) -> str:
    """Run ``program`` under torchrun on a free port; what it wrote.

    On the CPU the processes see no GPU, since transformers would take it, and talk through gloo; on GPUs through NCCL.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    unseen = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    done = finished([*command, str(program), *map(str, arguments)], OMP_NUM_THREADS="1", **unseen)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout
