"""``quantcache doctor``: which backend would run here, and why not another."""

import os
import platform
from dataclasses import dataclass

import torch
import transformers
from rich.console import Console
from rich.table import Table

from quantcache import __version__
from quantcache._host import untested
from quantcache.backends import dispatch
from quantcache.backends.artifacts import cache_folder


@dataclass(frozen=True)
class Finding:
    """One device and how its caches are read.

    Attributes:
        device: "cpu", "cuda:0" ...
        backend: what would run there, or "none" if a forced backend cannot.
        reason: why it is that one.
    """

    device: str
    backend: str
    reason: str


def examine() -> list[Finding]:
    """A finding for the CPU and for each GPU. Builds the CPU kernels if they have not been built."""
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        devices.append("mps")
    return [_finding(torch.device(name)) for name in devices]


def _finding(device: torch.device) -> Finding:
    forced = os.environ.get(dispatch.BACKEND_VARIABLE)
    try:
        backend = dispatch.choose_backend(device)
    except ValueError as error:
        return Finding(str(device), "none", str(error))
    if forced:
        return Finding(str(device), backend, f"{dispatch.BACKEND_VARIABLE} asks for it")
    if backend == "torch":
        return Finding(str(device), backend, dispatch.why_torch(device))
    return Finding(str(device), backend, "the fastest there is for this device")


def _described(device: str) -> str:
    """A device with what tells one GPU from another."""
    if not device.startswith("cuda"):
        return device
    found = torch.cuda.get_device_properties(device)
    return f"{device}: {found.name}, sm_{found.major}{found.minor}, {found.total_memory / 2**30:.1f} GiB"


def run() -> None:
    """Print what was found."""
    console = Console()
    console.print(
        f"quantcache {__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()} on {platform.platform()}"
    )
    for sentence in untested():
        console.print(sentence, style="yellow", soft_wrap=True, highlight=False)
    console.print(f"built kernels and downloads: {cache_folder()}", soft_wrap=True)
    table = Table("device", "backend", "why")
    for finding in examine():
        table.add_row(_described(finding.device), finding.backend, finding.reason)
    console.print(table)
