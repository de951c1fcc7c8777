"""``quantcache doctor``: which backend would run here, and why not another.

Versions are those that pip knows; torch is loaded only to ask it for the devices, transformers not at all.
"""

import json
import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table

from quantcache.backends import processor
from quantcache.cli.arguments import AsJson


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


EXTRAS: Final = {
    "demo": ("gguf", "accelerate"), "plot": ("matplotlib",), "eval": ("lm_eval",),
    "serve": ("fastapi", "openai", "uvicorn"),
}  # fmt: skip
"""What ``pip install '.[...]'`` brings, by extra."""


def doctor(
    as_json: AsJson = False,
    no_devices: Annotated[
        bool,
        typer.Option("--no-devices", metavar="", help="Leave the devices out, and torch, which takes seconds to load."),
    ] = False,
) -> None:
    """Show which backend reads the cache on each device of this machine, and why not another."""
    from quantcache.layers.releases import untested

    if as_json:
        print(json.dumps(machine() | ({} if no_devices else on_devices()), indent=1))
        return
    console = Console()
    names = ", ".join(f"{name} {version}" for name, version in versions().items() if name != "python")
    console.print(
        f"{names}, Python {platform.python_version()} on {platform.platform()}",
        soft_wrap=not console.is_terminal,
        highlight=False,
    )
    for sentence in untested():
        console.print(sentence, style="yellow", soft_wrap=not console.is_terminal, highlight=False)
    console.print(where_kept(), soft_wrap=not console.is_terminal, highlight=False)
    if no_devices:
        return
    import torch

    table = Table("device", "backend", "why", "kernels")
    for finding in examine():
        name = finding.device
        if name.startswith("cuda"):  # what tells one GPU from another
            gpu = torch.cuda.get_device_properties(name)
            name = f"{name}: {gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.1f} GiB"
        table.add_row(name, finding.backend, finding.reason, finding.kernels)
    console.print(table)


def versions() -> dict[str, str]:
    """Of quantcache, of the packages it stands on and of Python, by name."""
    from quantcache import __version__
    from quantcache.layers.releases import TESTED

    installed = {name: metadata.version(name) for name in TESTED}
    return {"quantcache": __version__, **installed, "python": platform.python_version()}


def machine() -> dict[str, Any]:
    """What a report of a problem should say of the machine and can be told without torch, as JSON wants it."""
    from quantcache.layers.releases import TESTED, untested

    return {
        "versions": versions(),
        "tested": {name: releases._asdict() for name, releases in TESTED.items()},
        "untested": untested(),
        "platform": platform.platform(),
        "processor": {"name": processor.name(), "features": processor.shown_features(), "cores": os.cpu_count()},
        "extras": {extra: all(find_spec(name) for name in names) for extra, names in EXTRAS.items()},
        "kept": where_kept(),
    }


def on_devices() -> dict[str, Any]:
    """What torch must be loaded for: its threads, the compiler of the kernels, the GPUs and what reads the cache."""
    import torch

    from quantcache.backends.cpu import build
    from quantcache.quantization.errors import BuildError

    try:
        compiler = " ".join(build.find_compiler())
    except BuildError as error:
        compiler = f"none: {error}"
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "threads": torch.get_num_threads(),
        "compiler": compiler,
        "gpus": [{"name": gpu.name, "nbytes": gpu.total_memory, "sm": f"{gpu.major}{gpu.minor}"} for gpu in gpus],
        "devices": [asdict(finding) for finding in examine()],
    }


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
