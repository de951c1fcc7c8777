"""What a file of measurements says beside its rows, and how it is written."""

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import torch

from quantcache.backends import processor


def versions(*packages: str) -> dict[str, str | None]:
    """Of Python, torch and transformers, of CUDA if torch was built with it, and of ``packages``."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found | {name: version(name) for name in ("transformers", *packages)}


def surroundings(on_gpu: bool) -> dict[str, Any]:
    """``versions``, and the GPU, or the processor and torch's threads on it."""
    if on_gpu:
        hardware: dict[str, Any] = {"gpu": torch.cuda.get_device_properties(0).name}
    else:
        hardware = {"processor": processor.name(), "threads": torch.get_num_threads()}
    return {"hardware": hardware, "versions": versions()}


def version(package: str) -> str | None:
    """Of an installed package; None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def write(report: dict[str, Any], out: Path) -> None:
    """The file, in its folder, which is made."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
