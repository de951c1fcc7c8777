"""Does the benchmark of continuous batching run, do every job in each way, and check what it times?"""

import json
from pathlib import Path

import pytest
import torch


def benchmark(out: Path, *options: str) -> dict[str, dict]:
    from tests.benchmarks.bench_serving import main

    assert main(["--size", "tiny", "--out", str(out), *options]) == 0
    return {row["name"]: row for row in json.loads(out.read_text())["jobs"]}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "serving-cpu.json"
    benchmark(out)
    return out


def test_each_job_is_done_in_every_way(measured: Path) -> None:
    jobs = {row["name"]: row for row in json.loads(measured.read_text())["jobs"]}
    assert {name: list(row["ways"]) for name, row in jobs.items()} == {
        "even": ["int8 blocks", "generate()", "stock"],
        "mixed": ["int8 blocks", "generate()"],
    }
    for row in jobs.values():
        for way in row["ways"].values():
            assert way["seconds"] > 0
            assert way["new_tokens_per_second"] == pytest.approx(way["new_tokens"] / way["seconds"], rel=0.01)
        assert set(row["times_as_fast_as"]) == set(row["ways"]) - {"int8 blocks"}
        assert row["first_tokens_alike"] == 1, "float32"
        assert 0 < row["blocks_gib"]["int8"] < row["blocks_gib"]["bf16"]
        assert row["versions"]["torch"] == torch.__version__


def test_a_part_of_the_stock_batching_is_said_to_be_one(measured: Path) -> None:
    rows = benchmark(measured, "--jobs", "even", "--stock-tokens", "3", "--share", "0.5")
    assert set(rows) == {"even", "mixed"}, "a job that was not run again is kept"
    stock = rows["even"]["ways"]["stock"]
    assert rows["even"]["share"] == 0.5
    assert (stock["requests"], stock["new_tokens"]) == (2, 6)
    assert stock["whole_job_seconds"] == pytest.approx(stock["seconds"] + stock["decode_seconds"] / 2 * 5, rel=0.01)


def test_an_answer_of_another_length_is_refused() -> None:
    from tests.benchmarks.bench_serving import SIZES, Ran, WrongResultError, job, row_of

    work = job("even", SIZES["tiny"])
    with pytest.raises(WrongResultError, match="request 1 must have 8 new tokens, got 7"):
        row_of(work, Ran(1.0, [[1] * 8, [1] * 7, [1] * 8, [1] * 8], None, {}))


def test_the_jobs_are_as_large_as_they_say() -> None:
    from tests.benchmarks.bench_serving import SIZES, job

    even, mixed = job("even", SIZES["gpu"]), job("mixed", SIZES["gpu"])
    assert {len(prompt) for prompt in even.prompts} == {2048}
    assert (len(even.prompts), set(even.new_tokens)) == (64, {128})
    lengths = list(map(len, mixed.prompts))
    assert (len(lengths), min(lengths) >= 100, max(lengths) <= 8000) == (256, True, True)
    assert (min(mixed.new_tokens) >= 16, max(mixed.new_tokens) <= 512) == (True, True)
    longest = max(mixed.prompts, key=len)
    assert all(prompt[:1000] == longest[: min(1000, len(prompt))] for prompt in mixed.prompts)
