"""Where a geometry comes from: a preset, a folder, a ``config.json`` or the hub."""

import difflib
import json
import math
import struct
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from quantcache.planning.geometry import Geometry, GeometryError

PRESETS_SOURCE: Final = "the config.json that each model's repository on huggingface.co publishes"


@cache
def _presets() -> dict[str, dict[str, Any]]:
    loaded: dict[str, dict[str, Any]] = json.loads((files("quantcache.planning") / "presets.json").read_text("utf-8"))
    return loaded


def preset_names() -> list[str]:
    """Names of the geometries that need no file."""
    return sorted(_presets())


def is_preset(spec: str) -> bool:
    """Whether ``find_geometry`` needs neither file nor hub for ``spec``."""
    return spec.lower() in {name.lower() for name in (*_presets(), *(each["hub_id"] for each in _presets().values()))}


def find_geometry(spec: str) -> Geometry:
    """The geometry of a model.

    Args:
        spec: a preset (in any case), a folder with a ``config.json``, that file itself, or a hub id, of which
            nothing but the config is fetched.

    Raises:
        GeometryError: there is no such model, or its config does not say how large its cache is.
    """
    path = Path(spec)
    if path.is_file() or (path / "config.json").is_file():
        file = path if path.is_file() else path / "config.json"
        geometry = Geometry.from_config(_read(file), name=path.name if path.is_dir() else path.parent.name)
        stored = _stored_params(file.parent)
        return geometry if stored is None else replace(geometry, num_params=stored)
    presets = {name.lower(): name for name in _presets()}
    presets |= {preset["hub_id"].lower(): name for name, preset in _presets().items()}
    if spec.lower() in presets:
        name = presets[spec.lower()]
        return Geometry.from_config(_presets()[name]["config"], name)
    if path.exists() or spec.count("/") != 1:
        near = difflib.get_close_matches(spec.lower(), presets, n=3, cutoff=0.6)
        names = " or ".join(dict.fromkeys(presets[name] for name in near))
        hint = f"Is it {names}? " if names else ""
        raise GeometryError(
            f"find_geometry: {spec!r} must be a preset, a hub id (owner/name), or a folder with a config.json, "
            f"got neither. {hint}quantcache plan --list names the presets."
        )
    return Geometry.from_config(_fetched(spec), spec)


def _fetched(hub_id: str) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return _read(Path(hf_hub_download(hub_id, "config.json")))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        if isinstance(error, GeometryError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise GeometryError(
            f"find_geometry: the config.json of {hub_id!r} must be on the hub or in its cache, got: {reason} "
            "quantcache plan --list names the presets, which need no network."
        ) from error


def _read(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise GeometryError(f"find_geometry: {file} must be JSON, got: {error}.") from error
    if not isinstance(config, dict):
        raise GeometryError(f"find_geometry: {file} must be a JSON object, got {type(config).__name__}.")
    return config


def _stored_params(folder: Path) -> int | None:
    """Weights in the safetensors files of a folder, from their headers alone; None for none, or packed ones."""
    total = 0
    for file in sorted(folder.glob("model*.safetensors")):
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        for entry in header.values():
            if entry["dtype"] not in ("F16", "BF16", "F32"):
                return None
            total += math.prod(entry["shape"])
    return total or None
