"""Saving and loading against the raw speed of the same file system, in one run.

    python tests/benchmarks/bench_files.py [--folder FOLDER] [--mib 512] [--repeats 7] [--out FILE]

Raw writing is one large ``write`` and ``fsync`` of as many bytes to the same folder; raw reading is ``readinto`` of the
same file into fresh memory, once into memory as torch allocates it and once as numpy does (huge pages), and the faster
counts. Files are in the page cache when they are read. Every load is compared with what was saved. Candidates are timed
in turn; medians and their ratios are written as JSON. Extra memory is the peak that tracemalloc sees, which is all but
what torch allocates: of a save all but copies of tails, of a load all but the tails, less the size of the file.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
import xxhash

from quantcache import QuantizedInt8Cache
from quantcache.backends import processor

LAYERS, KV_HEADS, HEAD_DIM = 32, 8, 128


def filled(mib: int) -> QuantizedInt8Cache:
    """A cache of about ``mib`` MiB in the geometry of an 8B Llama, bfloat16."""
    tokens = int(mib * 2**20 / (LAYERS * KV_HEADS * HEAD_DIM * 2 * 1.047))
    cache = QuantizedInt8Cache()
    states = torch.randn(2, 1, KV_HEADS, tokens, HEAD_DIM).bfloat16()
    for layer_idx in range(LAYERS):
        cache.update(*states, layer_idx)
    return cache


def interleaved(candidates: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each candidate."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for call in candidates.values():
        call()
    for _ in range(repeats):
        for name, call in candidates.items():
            start = time.perf_counter()
            result = call()
            times[name].append(time.perf_counter() - start)
            del result
    return {name: statistics.median(values) for name, values in times.items()}


def write_raw(path: Path, content: memoryview) -> None:
    """As many bytes, with as much certainty that they are on the disk."""
    with open(path, "wb", buffering=0) as file:
        written = 0
        while written < len(content):
            written += file.write(content[written:])
        os.fsync(file.fileno())


def read_raw(path: Path, memory: memoryview) -> memoryview:
    """The whole file into ``memory``."""
    with open(path, "rb", buffering=0) as file:
        done = 0
        while done < len(memory):
            done += file.readinto(memory[done:])
    return memory


def peak(call: Callable[[], object]) -> int:
    """Most bytes that numpy and Python held at once during the call beyond those before it."""
    tracemalloc.start()
    try:
        result = call()
        del result
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def assert_same(cache: QuantizedInt8Cache, expected: QuantizedInt8Cache) -> None:
    for layer, other in zip(cache.layers, expected.layers, strict=True):
        views = layer.pages.view(), other.pages.view()
        for parts in zip(*(segment for view in views for segment in view.segments), strict=True):
            if not torch.equal(*parts):
                raise AssertionError("a loaded page differs")
        if not torch.equal(views[0].key_tail, views[1].key_tail):
            raise AssertionError("a loaded tail differs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write; the system's temporary folder if left out")
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    cache = filled(arguments.mib)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path, raw = Path(folder) / "prompt.safetensors", Path(folder) / "raw"
        cache.save(path)
        size = path.stat().st_size
        content = memoryview(path.read_bytes())
        assert_same(QuantizedInt8Cache.load(path), cache)
        assert_same(QuantizedInt8Cache.load(path, mmap=True), cache)
        seconds = interleaved(
            {
                "write raw": lambda: write_raw(raw, content),
                "save": lambda: cache.save(path),
                "read raw, torch memory": lambda: read_raw(raw, torch.empty(size, dtype=torch.uint8).numpy().data),
                "read raw, numpy memory": lambda: read_raw(raw, numpy.empty(size, numpy.uint8).data),
                "load": lambda: QuantizedInt8Cache.load(path),
                "load, not verified": lambda: QuantizedInt8Cache.load(path, verify=False),
                "load, mmap": lambda: QuantizedInt8Cache.load(path, mmap=True),
            },
            arguments.repeats,
        )
        saving, loading = peak(lambda: cache.save(path)), peak(lambda: QuantizedInt8Cache.load(path))
    fastest_read = min(seconds["read raw, torch memory"], seconds["read raw, numpy memory"])
    report: dict[str, Any] = {
        "command": f"python tests/benchmarks/bench_files.py --mib {arguments.mib} --repeats {arguments.repeats}",
        "hardware": {"processor": processor.name(), "cores": os.cpu_count()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "xxhash": xxhash.VERSION,
        },
        "cache": {"layers": LAYERS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "tokens": cache.get_seq_length()},
        "file_bytes": size,
        "file_bytes_over_cache_nbytes": round(size / cache.nbytes, 5),
        "median_gb_per_s": {name: round(size / value / 1e9, 3) for name, value in seconds.items()},
        "save_share_of_raw": round(seconds["write raw"] / seconds["save"], 3),
        "load_share_of_raw": round(fastest_read / seconds["load"], 3),
        "target_share": 0.7,
        "layer_bytes": cache.nbytes // LAYERS,
        "extra_bytes_saving": saving,
        "extra_bytes_loading": loading - size,
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
    text = json.dumps(report, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
