"""Do the CUDA kernels read of every page the row that a table names, and pages that neighbours share once?"""

import importlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from quantcache.backends import cuda
from quantcache.quantization import reference
from quantcache.quantization.options import PLAIN, AttentionOptions
from quantcache.store import reads
from quantcache.store.growing import Int8Pages
from quantcache.store.segments import ClosedPages
from quantcache.store.view import PagesView
from tests.attention_cases import Case
from tests.conftest import skip_without_gpu
from tests.shared_rows import TABLES, make_table, share
from tests.test_cuda_kernels import HEAD_DIMS, TOLERANCE, masks

SHARED = importlib.import_module("quantcache.backends.cuda.shared")

pytestmark = [pytest.mark.cuda, skip_without_gpu]

CASE = Case(5, 2, 4, 1, (3, 40, 35), 37, 128, 128, torch.bfloat16)
"""Five sequences with pages in three segments, more than a warp looks at together, and a tail."""

ROWS = (3, 7, 5)
"""Stored rows of its segments: fewer than sequences, more, and as many."""

TAILS = "key_tail", "value_tail"

CAUSAL = AttentionOptions(is_causal=True)


@pytest.fixture(autouse=True, params=[math.inf, 0.0], ids=["read once", "read by each"])
def cost_of_reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[float]:
    """Everything here with what neighbours share read once, however little it is, and read by each sequence."""
    monkeypatch.setattr(SHARED, "EACH_PAGE", request.param)
    SHARED.plan_for.cache_clear()
    yield request.param
    SHARED.plan_for.cache_clear()


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
    copies = shared.copies.view
    for is_key in (True, False):
        assert torch.equal(cuda.restore(shared.view, is_key), cuda.restore(copies, is_key))


@pytest.mark.parametrize("kind", TABLES)
def test_results_are_the_same_from_run_to_run(kind: str) -> None:
    shared = share(CASE, kind, ROWS).cuda()
    first = reads.attention(shared.query, shared.view)
    assert all(torch.equal(reads.attention(shared.query, shared.view), first) for _ in range(20))


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize(
    ("batch", "num_kv_heads", "group", "query_len"),
    [
        (2, 2, 4, 1),
        (16, 2, 4, 1),
        (17, 2, 7, 1),
        (64, 1, 4, 1),
        (70, 2, 1, 1),
        (130, 1, 1, 1),
        (5, 2, 8, 8),
        (33, 1, 16, 1),
    ],
)
def test_every_number_of_sequences(kind: str, batch: int, num_kv_heads: int, group: int, query_len: int) -> None:
    """Those of one CTA and of several, whose rows fill its tiles or not."""
    case = Case(batch, num_kv_heads, group, query_len, (2, 7), 37, 128, 128, torch.bfloat16)
    shared = share(case, kind).cuda()
    assert shared.error(reads.attention(shared.query, shared.view, CAUSAL), CAUSAL) <= TOLERANCE[case.dtype]


def test_as_many_pages_as_the_queue_never_holds() -> None:
    """Each page read in as many runs as there can be, and the runs other ones from page to page."""
    case = Case(64, 1, 1, 1, (150,), 20, 16, 16, torch.float16)
    shared = share(case, "one row")
    shared.table.copy_((torch.arange(64)[:, None] + torch.arange(150) % 2) // 2)
    shared = shared.cuda()
    assert shared.error(reads.attention(shared.query, shared.view)) <= TOLERANCE[case.dtype]


def test_a_captured_graph_reads_the_table_when_it_runs() -> None:
    """One captured step, replayed behind other tables and lengths, gives what a fresh call gives, to the bit."""
    case = Case(6, 2, 4, 1, (40,), 95, 128, 128, torch.bfloat16)
    shared = share(case, "random").cuda()
    table, lengths = shared.table, torch.tensor([40, 95], dtype=torch.int32, device="cuda")
    scratch = cuda.make_scratch(torch.device("cuda", 0), 128)

    def step() -> torch.Tensor:
        closed = ClosedPages(shared.view.segments, table)
        return cuda.decode(
            shared.query, PagesView(closed, *shared.view.buffers, lengths=lengths, scratch=scratch), PLAIN
        )

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    for kind in TABLES:
        for pages, tail in ((40, 95), (23, 1), (0, 50)):
            table.copy_(make_table(kind, 6, (40,), (6,)))
            lengths.copy_(torch.tensor([pages, tail], dtype=torch.int32))
            graph.replay()
            again = step()
            assert torch.equal(output, again)
            (segment,) = shared.view.segments
            closed = ClosedPages((segment.narrow(0, pages),), table[:, :pages])
            live = replace(shared, view=PagesView(closed, *(buffer[:, :, :tail] for buffer in shared.view.buffers)))
            assert live.error(output) <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("part", ["query", *TAILS])
def test_a_broken_sequence_reaches_no_other(part: str) -> None:
    """NaN and inf of one sequence stay away from those that share its pages."""
    shared = share(CASE, "one row").cuda()
    broken = shared.query if part == "query" else shared.view.buffers[TAILS.index(part)]
    others, expected = [0, 1, 3, 4], shared.expected()
    broken[2, ..., 3] = torch.nan
    broken[2, ..., 5] = torch.inf
    output = reads.attention(shared.query, shared.view)
    assert output[2].isnan().any()
    error = (output[others].double() - expected[others]).norm() / expected[others].norm()
    assert error <= TOLERANCE[CASE.dtype]


def test_streams_do_not_share_what_was_found() -> None:
    shared = share(replace(CASE, segments=(300,)), "one row").cuda()
    expected = reads.attention(shared.query, shared.view)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    outputs = []
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                outputs.append(reads.attention(shared.query, shared.view))
    torch.cuda.synchronize()
    assert all(torch.equal(output, expected) for output in outputs)


def test_beams_that_are_reordered_read_what_is_restored() -> None:
    """Through the store: pages that beams share, then close for themselves, then share again."""
    key = torch.randn(1, 2, 2000, 128, device="cuda").bfloat16()
    beams = Int8Pages(key, key)
    beams.append(key, key)
    query = torch.randn(6, 8, 1, 128, device="cuda").bfloat16()
    generator = torch.Generator().manual_seed(0)
    order, shared_steps = torch.zeros(6, dtype=torch.int64), 0
    for step in range(40):
        beams.index_select(order)
        shared_steps += beams.row_table is not None
        newest = torch.randn(6, 2, 17, 128, device="cuda").bfloat16()
        output = reads.attention(query, beams.append(newest, newest)).double()
        expected = reference.attend(query.double(), *(states.double() for states in beams.restore()))
        # What is restored is rounded to bfloat16, which the kernel does not do.
        assert (output - expected).norm() <= 4e-3 * expected.norm(), f"step {step}"
        order = torch.randint(0, 6, (6,), generator=generator)
    assert shared_steps > 20


def test_a_page_of_an_unread_row_reaches_nobody() -> None:
    """NaN in stored rows that no sequence reads changes no bit."""
    shared = share(CASE, "prefix").cuda()
    first = reads.attention(shared.query, shared.view)
    for segment in shared.view.segments[:-1]:
        for metadata in (segment.key_metadata, segment.value_metadata):
            metadata[:, 1:] = 0x7FC0
    assert torch.equal(reads.attention(shared.query, shared.view, PLAIN), first)
