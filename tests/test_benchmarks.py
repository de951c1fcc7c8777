"""Do the benchmarks run, and does their JSON hold what the documentation shows?"""

import json
import sys
from pathlib import Path

import pytest

from tests.processes import finished, made_once

pytest.importorskip("pytest_benchmark")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON of a run at the smallest size."""
    suite = ["tests/benchmarks/peers/bench_caches.py", "-c", "tests/benchmarks/pytest.ini", "--rootdir", "."]
    command = [sys.executable, "-m", "pytest", *suite, "-q", "--size", "tiny"]

    def run(folder: Path) -> None:
        out = f"--benchmark-json={folder / 'peers-cpu.json'}"
        done = finished([*command, out], timeout=None, CUDA_VISIBLE_DEVICES="")
        assert done.returncode == 0, done.stdout + done.stderr

    return made_once(tmp_path_factory, "peers", run) / "peers-cpu.json"


def test_every_cache_is_measured_or_left_out_with_a_reason(measured: Path) -> None:
    from tests.benchmarks.peers.candidates import CACHES

    report = json.loads(measured.read_text())
    assert {name.split(":")[0] for name in report["groups"]} == {"update", "attention", "generate"}
    for members in report["groups"].values():
        found = {row["cache"]: row for row in members}
        assert set(found) | set(report["left_out"]) == set(CACHES)
        assert {"DynamicCache", "quantcache int8", "StaticCache", "original Qwen rule"} <= set(found)
        for row in found.values():
            assert row["median_ms"] > 0
            assert row["cache_bytes"] > 0
            assert row["times_as_fast_as_dynamic"] > 0
        int8, exact = found["quantcache int8"], found["DynamicCache"]
        assert int8["cache_of_dynamic"] == pytest.approx(int8["cache_bytes"] / exact["cache_bytes"], rel=1e-3)
        assert int8["cache_bytes"] < exact["cache_bytes"]


def test_the_documentation_takes_what_was_measured(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tools import measurements
    from tools.figures import FIGURES, THEMES
    from tools.tables import TABLES

    monkeypatch.setattr(measurements, "FOLDER", measured.parent)
    written = TABLES["peers-cpu"]()
    assert "**quantcache int8**" in written
    assert "OffloadedCache: offloading needs an accelerator" in written
    assert FIGURES["peers"](THEMES["dark"]).startswith("<?xml")
