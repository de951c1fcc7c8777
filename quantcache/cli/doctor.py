"""``quantcache doctor``: which backend would run here, and why not another."""

import platform
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Finding:
    """One device and how its caches are read.

    Attributes:
        device: "cpu", "cuda:0" ...
        backend: what would run there, or "none" if a forced backend cannot.
        reason: why it is that one.
        kernels: where its kernels come from, empty if it has none.
    """

    device: str
    backend: str
    reason: str
    kernels: str = ""


def doctor() -> None:
    """Show which backend reads the cache on each device of this machine, and why not another."""
    import torch
    import transformers

    from quantcache import __version__
    from quantcache.layers._host import untested

    console = Console()
    console.print(
        f"quantcache {__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()} on {platform.platform()}"
    )
    for sentence in untested():
        console.print(sentence, style="yellow", soft_wrap=True, highlight=False)
    console.print(where_kept(), soft_wrap=True, highlight=False)
    table = Table("device", "backend", "why", "kernels")
    for finding in examine():
        name = finding.device
        if name.startswith("cuda"):  # what tells one GPU from another
            gpu = torch.cuda.get_device_properties(name)
            name = f"{name}: {gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.1f} GiB"
        table.add_row(name, finding.backend, finding.reason, finding.kernels)
    console.print(table)


def where_kept() -> str:
    """Where built kernels and downloads are kept, or why they are not."""
    from quantcache.backends import artifacts

    reason = artifacts.why_not_kept()
    if reason is None:
        return f"built kernels and downloads: {artifacts.cache_folder()}"
    return (
        f"built kernels are not kept, every process builds its own: {reason}. "
        f"Set {artifacts.CACHE_VARIABLE} to a folder that this user alone can write."
    )


def examine() -> list[Finding]:
    """A finding for the CPU and for each GPU. Builds the CPU kernels if they have not been built."""
    import torch

    from quantcache.backends import dispatch

    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        devices.append("mps")
    findings = []
    for name in devices:
        try:
            backend = dispatch.choose_backend(torch.device(name))
        except ValueError as error:
            findings.append(Finding(name, "none", str(error)))
            continue
        device = torch.device(name)
        findings.append(
            Finding(name, backend, dispatch.why_chosen(device, backend), dispatch.where_from(device, backend))
        )
    return findings
