"""What caches hold by length of the context, and the batches that fit on GPUs. No GPU is needed.

    PYTHONPATH=. python tests/benchmarks/bench_memory.py [--out FILE]

"held" rows are real caches of one layer, filled with a prompt and then token by token with ``NEW_TOKENS`` more, so that
slack counts, times the layers of the model; every byte of every tensor that the cache keeps is counted. "fits" rows are
the answers of the memory planner (``quantcache plan``), which are computed and not run: weights, cache and a tenth of
the GPU for everything else.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch

from quantcache.planning import GIB, find_geometry, plan
from tests.benchmarks.peers.candidates import CACHES, DYNAMIC, INT8, RefusedError, held_nbytes
from tests.benchmarks.peers.geometries import Geometry
from tests.benchmarks.report import versions, write

Row = dict[str, Any]

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
PEER_LENGTHS = (8192,)
NEW_TOKENS = 64
"""Decode steps behind the prompt: enough for a page to close and a segment to be added."""

MODELS = (
    Geometry("Llama-3.1-8B", 32, 8, 128, 32, 14336, 1, 32768),
    Geometry("Qwen-7B", 32, 32, 128, 32, 11008, 1, 8192),
    Geometry("SmolLM2-135M", 9, 3, 64, 30, 1536, 1, 8192),
)

GPUS_GIB = (24, 48, 80, 141)
PLANNED = (("Qwen-7B", 1024), ("Qwen-7B", 8192), ("Llama-3.1-8B", 8192), ("Qwen2.5-7B", 32768))


def held_row(geometry: Geometry, tokens: int, name: str) -> Row | None:
    try:
        cache = CACHES[name](geometry.config(1), tokens)
    except RefusedError:
        return None
    shape = (1, geometry.num_kv_heads, tokens, geometry.head_dim)
    states = torch.randn(shape, dtype=torch.bfloat16)
    prompt_len = tokens - NEW_TOKENS
    cache.update(states[:, :, :prompt_len], states[:, :, :prompt_len], 0)
    for index in range(prompt_len, tokens):
        cache.update(states[:, :, index : index + 1], states[:, :, index : index + 1], 0)
    layer = held_nbytes(cache)
    numbers = 2 * geometry.num_kv_heads * tokens * geometry.head_dim
    return {
        "model": geometry.name,
        "tokens": tokens,
        "cache": name,
        "held_bytes": layer * geometry.num_layers,
        "bytes_per_number": round(layer / numbers, 4),
    }


def fits_rows(model: str, tokens: int) -> list[Row]:
    rows = []
    for gib in GPUS_GIB:
        made = plan(find_geometry(model), tokens=tokens, gpu_nbytes=gib * GIB)
        batches = {fit.cache: fit.largest_batch for fit in made.fits if fit.weights == "bf16"}
        lengths = {fit.cache: fit.longest_context for fit in made.fits if fit.weights == "bf16"}
        rows.append(
            {"model": model, "tokens": tokens, "gpu_gib": gib, "largest_batch": batches, "longest_context": lengths}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs/benchmarks/memory.json")
    options = parser.parse_args()
    held = []
    for geometry in MODELS:
        for tokens in (length for length in LENGTHS if length <= geometry.tokens):
            for name in CACHES if tokens in PEER_LENGTHS else (DYNAMIC, INT8):
                if (row := held_row(geometry, tokens, name)) is not None:
                    held.append(row)
                    print(json.dumps(row), flush=True)
    report = {
        "command": "PYTHONPATH=. python tests/benchmarks/bench_memory.py",
        "hardware": {"device": "cpu", "cores": os.cpu_count()},
        "versions": versions(),
        "new_tokens": NEW_TOKENS,
        "held": held,
        "fits": [row for model, tokens in PLANNED for row in fits_rows(model, tokens)],
    }
    write(report, Path(options.out))


if __name__ == "__main__":
    main()
