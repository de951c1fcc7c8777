"""Options of the peers' suite, and what its JSON holds: groups, ratios, the machine, no more."""

import os
import statistics
from typing import Any

import pytest
import torch

from quantcache.backends import processor
from tests.benchmarks.peers.candidates import CACHES, DYNAMIC, INT8
from tests.benchmarks.peers.geometries import SIZES, Geometry
from tests.benchmarks.report import versions


def pytest_addoption(parser: pytest.Parser) -> None:
    default = "full" if torch.cuda.is_available() else "small"
    parser.addoption("--size", choices=list(SIZES), default=default, help="geometries to measure")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "geometry" in metafunc.fixturenames:
        metafunc.parametrize("geometry", SIZES[metafunc.config.getoption("--size")], ids=str)
    if "cache_name" in metafunc.fixturenames:
        metafunc.parametrize("cache_name", list(CACHES))


@pytest.fixture(scope="session")
def device() -> torch.device:
    # cuDNN's attention, which torch may take, builds a plan for every new length: 35 ms a layer, and no cache's fault
    # (https://github.com/pytorch/pytorch/pull/155958).
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def grouped(request: pytest.FixtureRequest, benchmark: Any, geometry: Geometry, cache_name: str) -> None:
    """One group for each question and geometry; its members are the caches."""
    question = request.function.__name__.removeprefix("bench_")
    benchmark.group = f"{question}: {geometry}"
    benchmark.extra_info |= {
        "question": question,
        "geometry": str(geometry),
        "cache": cache_name,
        "batch": geometry.batch,
        "tokens": geometry.tokens,
    }


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["hardware"] = (
        {"gpu": torch.cuda.get_device_properties(0).name}
        if torch.cuda.is_available()
        else {"processor": processor.name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    )
    machine_info["versions"] = versions("hqq", "optimum-quanto")


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """Rows as the documentation reads them: medians, and how many times as fast and as small as ``DynamicCache``."""
    rows = []
    for entry in output_json["benchmarks"]:
        stats = entry["stats"]
        rows.append(
            {
                **entry["extra_info"],
                **{f"{name}_ms": _digits(1e3 * stats[name]) for name in ("median", "mean", "iqr")},
                "rounds": stats["rounds"],
            }
        )
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(f"{row['question']}: {row['geometry']}", []).append(row)
    for group in groups.values():
        exact = next((row for row in group if row["cache"] == DYNAMIC), None)
        for row in group if exact else ():
            row["times_as_fast_as_dynamic"] = _digits(exact["median_ms"] / row["median_ms"])
            for kind in ("cache_bytes", "peak_allocated_bytes", "peak_reserved_bytes"):
                if row.get(kind) and exact.get(kind):
                    row[kind.replace("bytes", "of_dynamic")] = _digits(row[kind] / exact[kind])
    machine = output_json["machine_info"]
    size = config.getoption("--size")
    by_clock = not str(config.getoption("benchmark_timer")).endswith("process_time")
    options = f"--size {size}" + ("" if by_clock else " --benchmark-timer=time.process_time")
    if chosen := config.getoption("keyword"):
        options += f" -k '{chosen}'"
    threads = "" if torch.cuda.is_available() else f"OMP_NUM_THREADS={torch.get_num_threads()} "
    kept = {
        "command": f'{threads}make bench BENCH_ARGS="{options}"',
        "timer": "wall clock" if by_clock else "CPU time of the process",
        "hardware": machine["hardware"],
        "versions": machine["versions"],
        "load_average": round(os.getloadavg()[0], 2),
        "datetime": output_json["datetime"],
        "subject": INT8,
        "left_out": _left_out,
        "groups": groups,
        "geometric_mean_ratio": {
            question: _digits(statistics.geometric_mean(ratios))
            for question in sorted({row["question"] for row in rows})
            if (
                ratios := [
                    row["times_as_fast_as_dynamic"]
                    for row in rows
                    if row["question"] == question and row["cache"] == INT8 and "times_as_fast_as_dynamic" in row
                ]
            )
        },
    }
    output_json.clear()
    output_json.update(kept)


_left_out: dict[str, str] = {}
"""Caches that were not measured, and why."""


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    cache = next((name for name in CACHES if name in report.nodeid), None)
    if cache is None:
        return
    if report.skipped and isinstance(report.longrepr, tuple):
        _left_out.setdefault(cache, report.longrepr[2].removeprefix("Skipped: "))
    elif report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        _left_out.setdefault(report.nodeid.partition("::")[2], crash.message.partition("\n")[0] if crash else "failed")


def _digits(number: float) -> float:
    return float(f"{number:.4g}")
