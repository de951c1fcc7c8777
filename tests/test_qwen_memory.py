"""The memory benchmark of Qwen-7B in small: does every row come out, and does it say what it should?"""

import json
import sys
from pathlib import Path

import pytest
import torch

from quantcache.adapters.qwen import QWenConfig, QWenLMHeadModel, memory_report
from tests.processes import ROOT, finished


def test_the_benchmark_runs_on_a_cpu_with_a_tiny_model(tmp_path: Path) -> None:
    """Both kinds of weights, both tables, both ways to fill the cache, which leave the same bytes; JSON comes out."""
    out = tmp_path / "rows.json"
    script = ROOT / "tests" / "benchmarks" / "bench_qwen_memory.py"
    done = finished([sys.executable, str(script), "--device", "cpu", "--tiny", "--out", str(out)])
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert {(row["weights"], row["table"], row["measured_by"]) for row in rows} >= {
        (weights, table, "chunks") for weights in ("bf16", "int4") for table in ("batch", "length")
    }
    assert all(row["cache_bytes"] > 0 and row["original_with_gib"] > 0 for row in rows)
    by_row: dict[tuple[object, ...], set[int]] = {}
    for row in rows:
        by_row.setdefault((row["batch"], row["tokens"]), set()).add(row["cache_bytes"])
    assert all(len(sizes) == 1 for sizes in by_row.values())
    assert {row["measured_by"] for row in rows} == {"chunks", "generate"}


# Layers, hidden size, heads, intermediate size, vocabulary, and the parameters that the released files have.
RELEASED = {
    "1.8B": (24, 2048, 16, 11008, 151936, 1_836_828_672),
    "7B": (32, 4096, 32, 22016, 151936, 7_721_324_544),
    "14B": (40, 5120, 40, 27392, 152064, 14_167_290_880),
    "72B": (80, 8192, 64, 49152, 152064, 72_287_920_128),
}


@pytest.mark.parametrize("size", RELEASED)
def test_a_model_of_released_size_weighs_what_is_known(size: str) -> None:
    """Built without memory and counted in bfloat16."""
    layers, hidden, heads, intermediate, vocabulary, parameters = RELEASED[size]
    config = QWenConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        seq_length=8192,
    )
    with torch.device("meta"):
        model = QWenLMHeadModel(config).bfloat16()
    report = memory_report(model)
    assert report.float_weights == report.total == 2 * parameters
