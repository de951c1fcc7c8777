"""Do the kernels of serving engines get the same states, is what comes back checked, and who is absent named?"""

import itertools
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantcache.quantization import reference
from tests.benchmarks import bench_flashinfer as bench


class Wrapper:
    """FlashInfer's wrapper, as its documentation describes it, in plain torch."""

    def __init__(self, workspace: Tensor, layout: str, use_tensor_cores: bool) -> None:
        self.layout, self.tensor_cores = layout, use_tensor_cores

    def plan(
        self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, num_q_heads: int, num_kv_heads: int,
        head_dim: int, page_size: int, *, q_data_type: torch.dtype, kv_data_type: torch.dtype,
    ) -> None:  # fmt: skip
        if page_size == 128 and self.tensor_cores:
            raise RuntimeError("no tensor cores\n at /tmp/some.cu:7 for pages of 128")
        assert indptr.dtype == indices.dtype == last_page_len.dtype == torch.int32
        self.rows = [indices[a:b].long() for a, b in itertools.pairwise(indptr)]
        self.lengths = [
            page_size * (len(row) - 1) + int(last) for row, last in zip(self.rows, last_page_len, strict=True)
        ]
        self.dtype, self.shape = kv_data_type, (page_size, num_kv_heads, head_dim)

    def run(self, query: Tensor, pages: tuple[Tensor, Tensor]) -> Tensor:
        outputs = []
        for number, (row, length) in enumerate(zip(self.rows, self.lengths, strict=True)):
            states = []
            for kind in pages:
                assert kind.dtype == self.dtype
                tokens_first = kind[row] if self.layout == "NHD" else kind[row].transpose(1, 2)
                assert tokens_first.shape[1:] == self.shape
                states.append(tokens_first.flatten(0, 1)[:length].transpose(0, 1)[None].float())
            outputs.append(reference.attend(query[number : number + 1, :, None].float(), *states)[:, 0])
        return torch.cat(outputs).to(query.dtype)


@pytest.fixture(scope="module")
def measured() -> Iterator[dict]:
    def timed(calls: dict, repeats: int) -> dict[str, float]:
        return {name: float(place) for place, name in enumerate(calls, 1)}

    with pytest.MonkeyPatch.context() as patch:
        fake = types.SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=Wrapper)
        patch.setitem(sys.modules, "flashinfer", fake)
        patch.setattr(bench, "imported", absent)
        patch.setattr(bench, "WORKSPACE_BYTES", 1)
        torch.manual_seed(0)
        yield bench.row(2, 4, 2, 256, 64, device="cpu", timed=timed)


def absent(name: str) -> None:
    raise bench.AbsentError(f"{name} is not installed")


def test_every_candidate_reads_the_states_it_is_given(measured: dict) -> None:
    errors = measured["relative_error"]
    assert set(errors) == set(measured["median_us"])
    assert {name.split(",")[0] for name in errors} == {"int8", "flashinfer fp8", "flashinfer bf16"} | {
        name.split(",")[0] for name in errors if name.startswith("torch")
    }
    assert 0.001 < errors["int8"] < errors["flashinfer fp8, plain, pages of 64, HND"]


def test_who_cannot_run_is_named_with_the_reason(measured: dict) -> None:
    assert measured["left_out"]["xformers bf16, split keys"] == "xformers is not installed"
    refused = "flashinfer bf16, tensor cores, pages of 128, NHD"
    assert measured["left_out"][refused] == "no tensor cores for pages of 128"
    assert refused not in measured["median_us"]


def test_a_result_of_other_states_is_refused() -> None:
    states = torch.randn(2, 2, 64, 64).bfloat16()
    problem = bench.Problem(torch.randn(2, 4, 64).bfloat16(), states, states)
    right = torch.stack([problem.expected(row) for row in range(2)])
    assert bench.checked(problem, {"bf16": right}) == {"bf16": 0.0}
    for wrong in (right.flip(0), torch.full_like(right, torch.nan)):
        with pytest.raises(bench.WrongResultError, match=r"bf16: the result must be within 0\.01"):
            bench.checked(problem, {"bf16": wrong})


def test_the_documentation_takes_what_was_measured(
    measured: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tools import measurements
    from tools.figures import FIGURES, THEMES
    from tools.tables import TABLES

    report = {"command": "run", "hardware": {"gpu": "none"}, "versions": {"flashinfer": "0.7.4"}, "rows": [measured]}
    (tmp_path / "flashinfer.json").write_text(json.dumps(report))
    monkeypatch.setattr(measurements, "FOLDER", tmp_path)
    written = TABLES["flashinfer"]()
    assert "| 2, 4/2, 256, head_dim 64 |" in written
    assert "Left out: xformers bf16, split keys: xformers is not installed." in written
    assert "flashinfer 0.7.4" in written
    assert FIGURES["flashinfer"](THEMES["dark"]).startswith("<?xml")
