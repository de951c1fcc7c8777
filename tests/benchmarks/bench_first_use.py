"""How long the first use of the CPU kernels takes: built, and found on disk.

    PYTHONPATH=. python tests/benchmarks/bench_first_use.py [--out FILE]

Each row is a new process that imports torch first and then times storing a small prompt and attending to it.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.report import versions, write

PROGRAM = """
import time, torch
from quantcache.backends import dispatch
from quantcache import QuantizedInt8Cache
from quantcache.store import reads
from torch.nn.functional import scaled_dot_product_attention
cache = QuantizedInt8Cache()
states = torch.randn(1, 2, 200, 64)
start = time.perf_counter()
cache.update(states, states, 0)
scaled_dot_product_attention(states[:, :, :1], *cache.update(states[:, :, :1], states[:, :, :1], 0))
seconds = time.perf_counter() - start
assert dispatch.choose_backend(torch.device("cpu")) == "cpu", "the CPU kernels do not run here"
print(seconds)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs/benchmarks/first-use.json")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("CPU kernels, built by the system's compiler", "CPU kernels, found on disk"):
            done = subprocess.run(
                [sys.executable, "-c", PROGRAM], env={**os.environ, "QUANTCACHE_CACHE": folder}, capture_output=True,
                text=True, check=True,
            )  # fmt: skip
            rows.append({"row": name, "seconds": float(f"{float(done.stdout.splitlines()[-1]):.3g}")})
            print(rows[-1], flush=True)
    report = {
        "command": "PYTHONPATH=. python tests/benchmarks/bench_first_use.py",
        "hardware": {"device": "cpu", "cores": os.cpu_count()},
        "versions": versions(),
        "load_average": round(os.getloadavg()[0], 2),
        "rows": rows,
    }
    write(report, Path(options.out))


if __name__ == "__main__":
    main()
