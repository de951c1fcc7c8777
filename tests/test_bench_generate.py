"""Does the benchmark of ``generate()`` run, check what it times, and keep what it has measured?"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from tests.benchmarks import bench_generate, profile_generate
from tests.processes import finished, made_once

ROWS = [
    *("turn", "chunk", "lookup", "assisted", "beams", "shared-samples", "shared-beams", "padding", "sliding", "fixed"),
    *("fixed-chunk", "turns"),
]


def benchmark(out: Path, *rows: str, peaks: str = "none") -> list[dict]:
    """On the CPU, in this process: another one takes longer to import torch than the rows take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_generate, "ON_GPU", False)
        patch.setattr(bench_generate, "DEVICE", torch.device("cpu"))
        options = ["--size", "tiny", "--pairs", "1", "--peaks", peaks, "--out", str(out), "--rows", *rows]
        patch.setattr(sys, "argv", ["bench_generate.py", *options])
        assert bench_generate.main() == 0
    found: list[dict] = json.loads(out.read_text())["rows"]
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = made_once(tmp_path_factory, "bench", lambda made: benchmark(made / "generate-cpu.json", *ROWS))
    return folder / "generate-cpu.json"


def test_each_row_holds_times_memory_and_the_path_of_attention(measured: Path) -> None:
    rows = json.loads(measured.read_text())["rows"]
    assert {row["name"] for row in rows} == set(ROWS)
    for row in rows:
        assert len(row["seconds"]) >= 2
        assert all(seconds > 0 for seconds in row["seconds"].values())
        assert set(row["seconds"]) == set(row["peak_gib"])
        assert row["path"] not in ("", "none", "exact")
        assert row["ratio"] > 0
        assert row["versions"]["torch"] == torch.__version__


def test_rows_that_do_not_run_again_are_kept(measured: Path, tmp_path: Path) -> None:
    before = {row["name"]: row for row in json.loads(measured.read_text())["rows"]}
    out = Path(shutil.copy(measured, tmp_path))
    after = {row["name"]: row for row in benchmark(out, "turn")}
    assert set(after) == set(before)
    assert after["chunk"] == before["chunk"]
    assert after["turn"]["seconds"] != before["turn"]["seconds"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of a process is read from /proc")
def test_a_peak_is_what_one_call_takes_over_the_weights() -> None:
    small = bench_generate.calls(bench_generate.SIZES["tiny"])["turn"]
    peaks = bench_generate.peaks_alone("tiny", "turn", small)
    sizes = bench_generate.GEOMETRIES["tiny"]
    numbers = 2 * sizes["num_hidden_layers"] * sizes["num_key_value_heads"] * sizes["head_dim"] * small.prompt
    held = numbers * torch.float32.itemsize
    # The cache of an earlier turn counts, and the weights and what importing torch takes do not.
    assert held <= peaks["DynamicCache"] < 16 * held  # type: ignore[operator]
    assert 0 < peaks["int8"] < 16 * held  # type: ignore[operator]


PEAKS = """
import torch
from tests.benchmarks.bench_generate import Peak

mebi = 1 << 20
peak = Peak()
if peak.before is None:
    print("no peak")
else:
    first = torch.ones(64 * mebi, dtype=torch.uint8)
    assert peak.nbytes() >= 64 * mebi, peak.nbytes()
    del first
    peak.restart()
    assert peak.nbytes() < 32 * mebi, peak.nbytes()
"""


def test_a_peak_forgets_what_was_freed_before_it() -> None:
    # In a process of its own: of an old one that is large, the system may take pages back meanwhile.
    done = finished([sys.executable, "-c", PEAKS])
    assert done.returncode == 0, done.stderr
    if "no peak" in done.stdout:
        pytest.skip("this system does not let a peak begin anew")


def test_peaks_alone_leave_the_times_as_they_are(
    measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {row["name"]: row for row in json.loads(measured.read_text())["rows"]}
    out = Path(shutil.copy(measured, tmp_path))
    monkeypatch.setattr(bench_generate, "peaks_alone", lambda size, name, call: {"int8": 1 << 30, "DynamicCache": None})
    after = {row["name"]: row for row in benchmark(out, "turn", peaks="only")}
    assert after["turn"] == before["turn"] | {"peak_gib": {"int8": 1.0, "DynamicCache": None}}
    assert after["chunk"] == before["chunk"]
    with pytest.raises(AssertionError):  # the row fails
        benchmark(tmp_path / "none.json", "turn", peaks="only")
    assert "needs rows with times" in capsys.readouterr().err


def test_caches_that_are_reused_are_emptied_for_each_run() -> None:
    from tests.benchmarks.bench_generate import SIZES, Bench, Caches, calls, generate

    bench, call = Bench("tiny"), calls(SIZES["tiny"])["compiled"]
    ids = bench.prompt(call)
    caches = Caches(bench, call, ids)
    for name in call.caches:
        cache = caches.for_run(name)
        generate(bench, call, ids, cache, 1, disable_compile=True)
        assert int(cache.get_seq_length()) > 0
        assert caches.for_run(name) is cache
        assert int(cache.get_seq_length()) == 0


def test_a_cache_of_another_prompt_is_refused() -> None:
    from tests.benchmarks.bench_generate import SIZES, Bench, Caches, WrongResultError, calls, checked

    bench, call = Bench("tiny"), calls(SIZES["tiny"])["turn"]
    ids = bench.prompt(call)
    caches = Caches(bench, call, ids)
    assert checked(bench, call, caches, ids)["relative_error"] > 0
    caches.kept["int8"] = Caches(bench, call, ids.flip(1)).kept["int8"]
    with (
        pytest.warns(UserWarning, match="does not begin with the"),
        pytest.raises(WrongResultError, match="logits must be within"),
    ):
        checked(bench, call, caches, ids)


def test_the_documentation_takes_what_was_measured(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tools import measurements
    from tools.figures import FIGURES, THEMES
    from tools.tables import TABLES

    monkeypatch.setattr(measurements, "FOLDER", measured.parent)
    written = TABLES["generate-cpu"]()
    assert "second turn: 80 tokens after 300" in written
    assert "StaticCache" in written
    assert FIGURES["generate-cpu"](THEMES["dark"]).startswith("<?xml")


def test_a_profile_has_the_time_of_the_host_for_each_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "profile.json"
    monkeypatch.setattr(bench_generate, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(bench_generate, "ON_GPU", False)
    monkeypatch.setattr(profile_generate, "ON_GPU", False)
    monkeypatch.setattr(sys, "argv", ["profile_generate.py", "--size", "tiny", "--rows", "turn", "--out", str(out)])
    profile_generate.main()
    int8, stock = json.loads(out.read_text())["rows"]
    assert (int8["cache"], stock["cache"]) == ("int8", "DynamicCache")
    assert len(int8["seconds"]) == len(stock["seconds"]) == profile_generate.CALLS
    assert min(int8["host_ms"], stock["host_ms"], *int8["seconds"], *stock["seconds"]) > 0


def test_calls_that_take_turns_by_steps_fill_the_same_row(monkeypatch: pytest.MonkeyPatch) -> None:
    call = bench_generate.calls(bench_generate.SIZES["tiny"])["decode"]
    bench = bench_generate.Bench("tiny")
    assert call.takes_turns == bench_generate.ON_GPU
    alone = bench_generate.measure(bench, call, pairs=1)
    monkeypatch.setattr(bench_generate.Call, "takes_turns", True)
    in_turn = bench_generate.measure(bench, call, pairs=3)
    assert set(alone) == set(in_turn)
    assert in_turn["path"] == alone["path"]
    assert all(seconds > 0 for seconds in in_turn["seconds"].values())
