"""Where calls of ``generate()`` spend their time: on the host or on the GPU, with each cache.

    PYTHONPATH=. python tests/benchmarks/profile_generate.py [--rows WORD ...] [--size tiny|full] [--out FILE]

Rows are those of ``bench_generate.py``. ``seconds`` are those of single calls, one after the other, the first of them
included, which builds and loads what it needs. Then one call runs under torch's profiler: ``host_ms`` is what calls of
torch and of the driver took of the host, ``gpu_ms`` how long kernels ran. A call whose ``host_ms`` is larger waits for
Python; the profiler itself makes the host slower, so that the two are to be compared between caches.
"""

import argparse
import json
import os
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from tests.benchmarks import report
from tests.benchmarks.bench_generate import GEOMETRY_OF, ON_GPU, SIZES, Bench, Caches, Row, calls, generate, run

CALLS = 4


def profiled(bench: Bench, size: str, name: str) -> list[Row]:
    """One row for each cache of a call."""
    call = calls(SIZES[size])[name]
    ids, rows = bench.prompt(call), []
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_GPU else [])]
    with torch.no_grad():
        caches = Caches(bench, call, ids)
        for cache_name in call.caches:
            seconds = [sum(run(bench, call, caches.for_run(cache_name), ids)) for _ in range(CALLS)]
            cache = caches.for_run(cache_name)
            with profile(activities=activities) as found:
                generate(bench, call, ids, cache, call.new_tokens)
                if ON_GPU:
                    torch.cuda.synchronize()
            events = found.key_averages()
            gpu_us = sum(e.self_device_time_total for e in events if e.device_type == torch.autograd.DeviceType.CUDA)
            rows.append(
                {
                    "name": name,
                    "row": call.says,
                    "cache": cache_name,
                    "seconds": [round(each, 5) for each in seconds],
                    "host_ms": round(sum(e.self_cpu_time_total for e in events) / 1e3, 1),
                    "gpu_ms": round(gpu_us / 1e3, 1),
                    "load_average": round(os.getloadavg()[0], 2),
                }
            )
    return rows


def main() -> None:
    """Print and write the rows."""
    names = [name for name, call in calls(SIZES["tiny"]).items() if call.turns == 1]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=["sliding-turn", "turn", "sliding", "padding"], choices=names)
    parser.add_argument("--size", choices=("tiny", "full"), default="full")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/generate-profile.json"))
    options = parser.parse_args()
    size = "tiny" if options.size == "tiny" else "gpu" if ON_GPU else "cpu"
    bench, rows = Bench(GEOMETRY_OF[size]), []
    for name in options.rows:
        rows += profiled(bench, size, name)
        print(json.dumps(rows[-len(calls(SIZES[size])[name].caches) :]), flush=True)
        report.write(
            {
                "command": "PYTHONPATH=. python tests/benchmarks/profile_generate.py",
                **report.surroundings(ON_GPU),
                "rows": rows,
            },
            options.out,
        )


if __name__ == "__main__":
    main()
