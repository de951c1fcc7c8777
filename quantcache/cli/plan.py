"""``quantcache plan``: a table, JSON or a picture of what a cache takes. Loads no torch."""

import json
import re
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from quantcache.planning import GIB, PRESETS_SOURCE, Geometry, Plan, find_geometry, plan, preset_names
from quantcache.planning.sizes import exact_nbytes, int8_nbytes

GPUS: Final = {
    "t4": 15.0,
    "l4": 22.5,
    "a10g": 22.5,
    "rtx3090": 24.0,
    "rtx4090": 24.0,
    "rtx5090": 31.8,
    "a100-40": 39.5,
    "l40s": 44.5,
    "a100": 79.3,
    "h100": 79.6,
    "h200": 140.4,
    "b200": 179.0,
}
"""GiB that the driver shows for common cards, about; give a size for another."""

_UNITS: Final = {"": GIB, "g": GIB, "gib": GIB, "gb": 10**9, "m": 1 << 20, "mib": 1 << 20, "mb": 10**6}


def parse_gpu(text: str) -> int:
    """Bytes of a GPU from a name of ``GPUS`` or a size like 24, 80GB or 79.6GiB; a bare number is GiB.

    Raises:
        ValueError: neither.
    """
    cleaned = text.strip().lower().replace(" ", "")
    if cleaned in GPUS:
        return int(GPUS[cleaned] * GIB)
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([a-z]*)", cleaned)
    if match is None or match[2] not in _UNITS or float(match[1]) == 0:
        raise ValueError(f"must be a size such as 24, 80GB or 79.6GiB, or one of {', '.join(GPUS)}, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])


def run(
    spec: str,
    *,
    batch: int,
    tokens: int,
    new_tokens: int,
    gpu: int | None,
    overhead: float,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Print the plan.

    Args:
        spec: see ``find_geometry``.
        batch: sequences.
        tokens: in each.
        new_tokens: how many of them are generated.
        gpu: bytes of its memory.
        overhead: share of it for other things.
        as_json: print JSON in place of tables.
        plot: where to draw the size over the context.

    Raises:
        GeometryError: no such model.
        ValueError: numbers out of range.
        ImportError: matplotlib is missing.
    """
    geometry = find_geometry(spec)
    made = plan(geometry, batch=batch, tokens=tokens, new_tokens=new_tokens, gpu_nbytes=gpu, overhead=overhead)
    if plot is not None:
        draw(geometry, made, plot)
    if as_json:
        print(json.dumps(made.to_dict(), indent=1))
        return
    console = Console()
    params = "" if made.num_params is None else f", {made.num_params / 1e9:.2f} B weights"
    layers = ", ".join(f"{count} {kind}" for kind, count in made.layers.items())
    console.print(f"[bold]{made.model}[/bold]{params}; layers: {layers}", highlight=False)
    for table in tables(made):
        console.print(table)
    if plot is not None:
        console.print(f"drawn: {plot}", soft_wrap=True)


def list_presets() -> None:
    """Print the names of the presets and where their facts are from."""
    console = Console()
    table = Table("preset", "weights", "layers", "bytes a token, bf16", "int8")
    for name in preset_names():
        geometry = find_geometry(name)
        made = plan(geometry, tokens=1)
        layers = ", ".join(f"{count} {kind}" for kind, count in made.layers.items())
        weights = f"{(made.num_params or 0) / 1e9:.2f} B"
        table.add_row(name, weights, layers, f"{made.bf16_per_token:,}", f"{made.int8_per_token:,}")
    console.print(table)
    console.print(
        f"Geometries are facts from {PRESETS_SOURCE}. 0 bytes a token: every layer has a window.", style="dim"
    )


def tables(made: Plan) -> list[Table]:
    """The cache, and what fits."""
    size = Table("", "bf16 cache", "int8 cache", "int8 / bf16")
    size.add_row("one more token, bytes", f"{made.bf16_per_token:,}", f"{made.int8_per_token:,}", _ratio(made, True))
    size.add_row(
        f"{made.batch} x {made.tokens:,} tokens", _gib(made.bf16_nbytes), _gib(made.int8_nbytes), _ratio(made, False)
    )
    if made.gpu_nbytes is None:
        return [size]
    fits = Table(
        "weights",
        "size",
        "cache",
        "left for it",
        f"batch at {made.tokens:,} tokens",
        f"tokens at batch {made.batch}",
        title=f"what fits in {_gib(made.gpu_nbytes)}",
    )
    for fit in made.fits:
        beyond = made.max_positions is not None and fit.longest_context > made.max_positions
        fits.add_row(
            fit.weights,
            _gib(fit.weights_nbytes),
            fit.cache,
            _gib(fit.free_nbytes) if fit.free_nbytes > 0 else "nothing",
            f"{fit.largest_batch:,}",
            f"{fit.longest_context:,}{' *' if beyond else ''}",
            end_section=fit.cache == "int8",
        )
    if not made.fits:
        fits.caption = "how many weights this model has is not known here; give a folder with its safetensors files"
    elif any("*" in str(cell) for cell in fits.columns[-1]._cells):
        fits.caption = f"* the model was made for {made.max_positions:,} tokens"
    return [size, fits]


def draw(geometry: Geometry, made: Plan, file: Path) -> None:
    """Bytes of both caches over the context, with the room that the GPU leaves beside the weights in bf16.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.figure import Figure

    lengths = [made.tokens * step // 64 for step in range(1, 129)]
    lengths = sorted({max(1, length) for length in lengths})
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(lengths, [exact_nbytes(geometry, made.batch, n, "bfloat16") / GIB for n in lengths], label="bf16 cache")
    axes.plot(lengths, [int8_nbytes(geometry, made.batch, n) / GIB for n in lengths], label="int8 cache")
    room = next((fit.free_nbytes for fit in made.fits if fit.weights == "bf16"), None)
    if room is not None and room > 0:
        axes.axhline(room / GIB, color="grey", linestyle="--", label="left beside bf16 weights")
    axes.set(xlabel=f"tokens, batch {made.batch}", ylabel="GiB", title=made.model, xlim=(0, None), ylim=(0, None))
    axes.legend()
    figure.savefig(file, dpi=150)


def _ratio(made: Plan, per_token: bool) -> str:
    pair = (made.int8_per_token, made.bf16_per_token) if per_token else (made.int8_nbytes, made.bf16_nbytes)
    return f"{pair[0] / pair[1]:.3f}" if pair[1] else ""


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:,.2f} GiB" if nbytes >= GIB / 100 else f"{nbytes / (1 << 20):,.2f} MiB"
