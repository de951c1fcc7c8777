"""Do the CUDA kernels read of every page the row that a table names, and pages that neighbours share once?"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from quantcache.backends import cuda
from quantcache.quantization.options import PLAIN, AttentionOptions
from quantcache.store import reads
from tests.attention_cases import Case
from tests.conftest import skip_without_gpu
from tests.shared_rows import TABLES, share
from tests.test_cuda_kernels import HEAD_DIMS, TOLERANCE, masks

pytestmark = [pytest.mark.cuda, skip_without_gpu]

CASE = Case(5, 2, 4, 1, (3, 40, 35), 37, 128, 128, torch.bfloat16)
"""Five sequences with pages in three segments, more than a warp looks at together, and a tail."""

ROWS = (3, 7, 5)
"""Stored rows of its segments: fewer than sequences, more, and as many."""

CAUSAL = AttentionOptions(is_causal=True)


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [None, ROWS], ids=str)
def test_every_table(kind: str, dtype: torch.dtype, rows: tuple[int, ...] | None) -> None:
    shared = share(replace(CASE, dtype=dtype), kind, rows).cuda()
    assert shared.error(reads.attention(shared.query, shared.view)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("kind", ["one row", "random", "runs"])
@pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=str)
@pytest.mark.parametrize(("group", "query_len"), [(1, 1), (7, 1), (4, 4), (8, 8), (4, 50)])
def test_every_head_dim_and_number_of_rows(head_dims: tuple[int, int], group: int, query_len: int, kind: str) -> None:
    case = Case(3, 2, group, query_len, (3, 1, 20), 37 + query_len, *head_dims, dtype=torch.float16)
    shared = share(case, kind).cuda()
    assert shared.error(reads.attention(shared.query, shared.view, CAUSAL), CAUSAL) <= TOLERANCE[torch.float16]


@pytest.mark.parametrize("name", masks(Case()) if torch.cuda.is_available() else [])
@pytest.mark.parametrize("query_len", [1, 5, 40])
@pytest.mark.parametrize("kind", ["one row", "random", "runs"])
def test_every_mask(name: str, query_len: int, kind: str) -> None:
    case = replace(CASE, query_len=query_len, tail_len=50, transposed=True)
    shared, asked = share(case, kind, ROWS).cuda(), AttentionOptions(masks(case)[name])
    assert shared.error(reads.attention(shared.query, shared.view, asked), asked) <= TOLERANCE[case.dtype]


@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 70},
        {"window": 1000, "is_causal": True},
        {"softcap": 30.0, "is_causal": True, "window": 2500},
        {"sinks": True, "softcap": 5.0},
        {"sinks": True},
        {"softmax_scale": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("query_len", [1, 6])
@pytest.mark.parametrize("kind", ["one row", "runs"])
def test_every_option(options: dict[str, Any], query_len: int, kind: str) -> None:
    case = replace(CASE, query_len=query_len)
    if options.get("sinks"):
        options = {**options, "sinks": torch.linspace(-2, 6, case.num_q_heads, device="cuda")}
    shared, asked = share(case, kind).cuda(), AttentionOptions(**options)
    assert shared.error(reads.attention(shared.query, shared.view, asked), asked) <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("query_len", [65, 300])
@pytest.mark.parametrize("kind", TABLES)
def test_many_query_rows(query_len: int, kind: str) -> None:
    case = replace(CASE, query_len=query_len, tail_len=query_len)
    shared = share(case, kind, ROWS).cuda()
    for splits in (None, 1, 3):
        output = cuda.prefill(shared.query, shared.view, CAUSAL, splits=splits)
        assert shared.error(output, CAUSAL) <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", TABLES)
def test_states_are_restored_as_the_table_says(kind: str, dtype: torch.dtype) -> None:
    """Bit for bit those of copies."""
    shared = share(replace(CASE, dtype=dtype), kind, ROWS).cuda()
    copies = replace(shared, view=shared.copies.view).cuda()
    for is_key in (True, False):
        assert torch.equal(cuda.restore(shared.view, is_key), cuda.restore(copies.view, is_key))


@pytest.mark.parametrize("kind", TABLES)
def test_results_are_the_same_from_run_to_run(kind: str) -> None:
    shared = share(CASE, kind, ROWS).cuda()
    first = reads.attention(shared.query, shared.view)
    assert all(torch.equal(reads.attention(shared.query, shared.view), first) for _ in range(20))


def test_a_page_of_an_unread_row_reaches_nobody() -> None:
    """NaN in stored rows that no sequence reads changes no bit."""
    shared = share(CASE, "prefix").cuda()
    first = reads.attention(shared.query, shared.view)
    for segment in shared.view.segments[:-1]:
        for metadata in (segment.key_metadata, segment.value_metadata):
            metadata[:, 1:] = 0x7FC0
    assert torch.equal(reads.attention(shared.query, shared.view, PLAIN), first)
