"""Decoding on one GPU against two: layers split by ``device_map``, heads split by ``tp_plan="auto"``; in one run.

    python tests/benchmarks/bench_parallel.py [--rows WORD ...] [--add] [--budget SECONDS] [--out FILE]
    python tests/benchmarks/bench_parallel.py --tiny --device cpu --out FILE

``generate()`` itself runs, with random bf16 weights made on the GPU, behind random states already in the cache. A time
is that of a step, the median of the steady state; memory is what torch has allocated and reserved at its peak on each
GPU. null means that there was no result, and ``why`` says the reason.

The rows run in processes of their own, one for a GPU and two under torchrun, so that a row which runs out of memory or
hangs takes no other with it. Rows that do not fit into the budget are left out, compiled ones first.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent.parent

SIZES = {  # geometry of bench_compiled.py, batch, tokens
    "gqa": ("Qwen2.5-7B", 32, 8192),
    "mha": ("Qwen-7B", 32, 8192),
    "mha16": ("Qwen-7B", 16, 8192),  # what int8 makes fit on one GPU
    "tiny": ("tiny", 2, 200),
}
HEADS = {"Qwen2.5-7B": "28/4", "Qwen-7B": "32/32", "tiny": "4/2"}
PLACEMENTS = {
    "one": "one GPU",
    "split": "two GPUs, device_map: half of the layers each",
    "tp": 'two GPUs, tp_plan="auto": half of the heads each',
}
WARM_UP, STEPS = 8, 24
PROBLEM = "bench_parallel: "
"""Begins what a worker says of the error that it ends with."""


class Row(NamedTuple):
    """One measurement.

    Attributes:
        placement: of ``PLACEMENTS``.
        size: of ``SIZES``.
        kind: of cache.
        seconds: what it takes at most, roughly.
        is_optional: left out where time is short.
    """

    placement: str
    size: str
    kind: str
    seconds: float = 6.0
    is_optional: bool = False

    @property
    def name(self) -> str:
        return f"{self.placement}/{self.size}/{self.kind}"


COMPILED = {"int8 compiled", "StaticCache compiled"}
COMPILING = 34.0
"""Seconds that a compiled row takes, roughly."""

FARTHEST = 0.25
"""Most that int8 may move the logits of a random bf16 model, of their norm; other logits are at about 1.4."""


def rows_of(sizes: list[str]) -> list[Row]:
    """Those of one process, then those of two; what compiles and may hang, late."""
    kinds = ("int8", "DynamicCache")
    compiled = ("int8 compiled", "StaticCache compiled")
    alone, together = [], []
    for size in reversed(sizes):
        alone += [Row("one", size, kind) for kind in kinds]
        together += [Row("tp", size, kind) for kind in kinds]
        if size == "mha":
            alone.append(Row("one", "mha16", "int8", is_optional=True))
            together.append(Row("tp", "mha16", "int8", is_optional=True))
        alone += [Row("split", size, kind) for kind in kinds]
    alone += [Row("one", sizes[0], kind, COMPILING, True) for kind in compiled]
    together += [Row("tp", sizes[0], kind, COMPILING, True) for kind in compiled]
    # Compiled, MHA does not fit on one GPU either.
    return alone + together + [Row("tp", size, "int8 compiled", COMPILING, True) for size in sizes[1:]]


class Report:
    """The file, written again with every result."""

    def __init__(self, path: Path, command: str, adds: bool = False) -> None:
        self.path = path
        self.made: dict[str, Any] = {"command": command, "hardware": {}, "versions": {}, "rows": []}
        if adds and path.exists():
            self.made = json.loads(path.read_text())

    def about(self, about: dict[str, Any]) -> None:
        """What a worker says of the machine, which must be the same for all rows of a file."""
        for name in ("hardware", "versions"):
            before, now = self.made[name], self.made[name] | about[name]
            if any(before.get(key, value) != value for key, value in now.items()):
                raise SystemExit(f"{self.path}: rows of one file need one {name}, got {before} and then {about[name]}.")
            self.made[name] = now

    def add(self, row: Row, result: dict[str, Any]) -> None:
        geometry, batch, tokens = SIZES[row.size]
        title = f"{geometry} geometry, {HEADS[geometry]} heads, batch {batch}, {tokens} tokens"
        key = {"row": title, "placement": PLACEMENTS[row.placement]}
        found = next((r for r in self.made["rows"] if {k: r[k] for k in key} == key), None)
        if found is None:
            found = key | {name: {} for name in ("tokens_per_s", "ms", "memory_gb", "why")}
            self.made["rows"].append(found)
        for name in ("tokens_per_s", "ms", "memory_gb"):
            found[name][row.kind] = result.get(name)
        found["why"].pop(row.kind, None)
        if result.get("why"):
            found["why"][row.kind] = result["why"]
        if "logits_error" in result:
            found["logits_error"] = result["logits_error"]
        for name in ("graphs", "cudagraph_skips"):
            if name in result:
                found.setdefault(name, {})[row.kind] = result[name]
        print(json.dumps({"cell": row.name, **result}), flush=True)
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.made, indent=1) + "\n")


def run_workers(rows: list[Row], options: argparse.Namespace, report: Report, deadline: float) -> None:
    """Workers one after the other until every row has a result, or the time is over."""
    waiting = list(rows)
    while waiting:
        if time.monotonic() > deadline - 5:
            for row in waiting:
                report.add(row, {"why": "no time left"})
            return
        started = run_worker(waiting, options, report, deadline)
        if started is not None:  # it died with this row
            waiting.remove(started)


def run_worker(waiting: list[Row], options: argparse.Namespace, report: Report, deadline: float) -> Row | None:
    """One worker; takes the rows that have a result from ``waiting`` and returns the one that it died with, if any."""
    processes = 2 if waiting[0].placement == "tp" else 1
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    seconds = max(deadline - time.monotonic(), 1.0)
    command = [
        *(sys.executable, *(launcher if processes > 1 else []), str(Path(__file__).with_name("parallel_worker.py"))),
        *(options.device, str(seconds), *(row.name for row in waiting)),
    ]
    by_name = {row.name: row for row in waiting}
    started: Row | None = None
    with tempfile.TemporaryFile("w+") as log:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=ROOT)

        working: list[int] = []  # torchrun has them in sessions of their own

        def stop() -> None:
            for process in (*working, worker.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)

        timer = threading.Timer(seconds + 2, stop)
        timer.start()
        assert worker.stdout is not None
        reported = False
        for line in worker.stdout:
            word, _, rest = line.partition(" ")
            if word == "PROCESS":
                working.append(int(rest))
            elif word == "ABOUT":
                report.about(json.loads(rest))
            elif word == "START":
                started = by_name[rest.strip()]
            elif word == "DONE" and started is not None:
                report.add(started, json.loads(rest))
                waiting.remove(started)
                started, reported = None, True
        worker.wait()
        timer.cancel()
        log.seek(0)
        text = log.read().strip()
    if started is None and (reported or not waiting):
        return None
    victim = started or waiting[0]
    told = [line.removeprefix(PROBLEM) for line in text.splitlines() if line.startswith(PROBLEM)]
    why = "no time left" if time.monotonic() > deadline else f"the process ended with {worker.returncode}"
    report.add(victim, {"why": told[0] if told else why})
    print(text[-3000:], file=sys.stderr, flush=True)
    return victim


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", help="words; rows with one of them in PLACEMENT/SIZE/CACHE are run")
    parser.add_argument("--add", action="store_true", help="keep the other rows of a file that exists")
    parser.add_argument("--tiny", action="store_true", help="a model of two layers, which shows that the command works")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--budget", type=float, default=195.0, help="seconds for all rows")
    parser.add_argument("--out", default="docs/benchmarks/parallel.json")
    options = parser.parse_args()
    start = time.monotonic()
    rows = rows_of(["tiny"] if options.tiny else ["gqa", "mha"])
    rows = [row for row in rows if not options.rows or any(word in row.name for word in options.rows)]
    report = Report(Path(options.out), "python tests/benchmarks/bench_parallel.py", options.add)
    here = [row for row in rows if row.placement != "tp"]
    apart = [row for row in rows if row.placement == "tp"]
    share = sum(row.seconds for row in here) / max(sum(row.seconds for row in rows), 1)
    run_workers(here, options, report, start + options.budget * share)
    run_workers(apart, options, report, start + options.budget)
    report.made["seconds"] = round(report.made.get("seconds", 0) + time.monotonic() - start, 1)
    report.write()


if __name__ == "__main__":
    main()
