"""Do the CPU kernels read the rows that a table names, of neighbours that share a page as of others?"""

from typing import Any

import pytest
import torch

from quantcache.backends import torch as plain
from quantcache.quantization.options import AttentionOptions
from quantcache.store import reads
from quantcache.store.segments import ClosedPages
from quantcache.store.view import PagesView
from tests.attention_cases import Case, assert_within, attention_bound
from tests.shared_rows import TABLES, Shared, share
from tests.test_cpu_kernels import DTYPES, backend, one_thread  # noqa: F401 (fixtures)

CASES = {
    "decode": Case(batch=8, group=3, segments=(3, 1, 2), tail_len=40),
    "one head": Case(batch=5, num_kv_heads=1, group=1, segments=(6,), tail_len=1, v_head_dim=80),
    "many queries": Case(batch=3, group=2, query_len=7, segments=(2, 2), tail_len=70, head_dim=20, v_head_dim=24),
    "long queries": Case(batch=2, group=2, query_len=210, segments=(2, 1), tail_len=220, head_dim=40, v_head_dim=24),
    "no tail": Case(batch=4, group=4, segments=(5,), tail_len=0, head_dim=128, v_head_dim=128),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"is_causal": True, "window": 150},
    "softcap and sinks": {"softcap": 20.0, "sinks": torch.linspace(-1, 1, 6)},
}


def check(shared: Shared, case: Case, options: AttentionOptions, backend: str) -> None:  # noqa: F811
    output = reads.attention(shared.query, shared.view, options)
    sinks = None if options.sinks is None else options.sinks.double()
    expected = shared.expected(options._replace(sinks=sinks))
    eps = torch.finfo(torch.float32 if backend == "cpu" else case.dtype).eps
    assert_within(output, expected, attention_bound(shared.copies, expected, case.head_dim**-0.5, eps))


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("name", CASES)
def test_attention_reads_the_rows_of_the_table(backend: str, name: str, kind: str) -> None:  # noqa: F811
    case = CASES[name]
    for rows in (None, tuple(range(1, len(case.segments) + 1))):
        check(share(case, kind, rows), case, AttentionOptions(is_causal=case.query_len > 1), backend)


@pytest.mark.parametrize("kind", ["one row", "runs"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_and_mask_holds_for_shared_rows(backend: str, name: str, kind: str) -> None:  # noqa: F811
    case = Case(batch=4, group=3, query_len=2, segments=(3, 1), tail_len=20)
    shared, generator = share(case, kind), torch.Generator().manual_seed(3)
    seen = torch.rand(4, 1, 2, case.kv_len, generator=generator) < 0.7
    for mask in (None, seen, torch.randn(4, case.num_q_heads, 2, case.kv_len, generator=generator)):
        check(shared, case, AttentionOptions(mask, **OPTIONS[name]), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", TABLES)
def test_restored_states_are_those_of_the_rows(backend: str, kind: str, dtype: torch.dtype) -> None:  # noqa: F811
    shared = share(Case(batch=3, segments=(2, 3), tail_len=9, head_dim=20, dtype=dtype), kind)
    for is_key in (True, False):
        assert torch.equal(reads.restore(shared.view, is_key), plain.restore(shared.copies.view, is_key))


@pytest.mark.parametrize("num_threads", [1, 3])
def test_neighbours_that_share_get_what_each_gets_alone(num_threads: int, backend: str) -> None:  # noqa: F811
    """Their rows fill tiles together: no row changes another's sums."""
    torch.set_num_threads(num_threads)
    shared = share(Case(batch=7, group=3, segments=(4,), tail_len=10), "one row")
    together = reads.attention(shared.query, shared.view)
    for row in range(7):
        view = PagesView(
            ClosedPages(shared.view.segments, shared.view.row_table[row : row + 1]),
            *(buffer[row : row + 1] for buffer in shared.view.buffers),
        )
        alone = reads.attention(shared.query[row : row + 1], view)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [None, "one row", "runs"])
@pytest.mark.parametrize("masked", [False, True])
def test_long_queries_give_the_same_bits_on_any_number_of_threads(masked: bool, kind: str | None, backend: str) -> None:  # noqa: F811
    """Each thread has some of the queries and all keys."""
    case = Case(batch=2, num_kv_heads=2, group=3, query_len=301, segments=(4, 3), tail_len=301, head_dim=20)
    shared = share(case, kind or "identity")
    view = shared.view if kind else shared.copies.view
    mask = torch.rand(2, 1, 301, case.kv_len, generator=torch.Generator().manual_seed(1)) < 0.8 if masked else None
    outputs = []
    for num_threads in (1, 2, 3, 5):
        torch.set_num_threads(num_threads)
        outputs.append(reads.attention(shared.query, view, AttentionOptions(mask, is_causal=not masked)))
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_what_no_sequence_reads_is_not_read(backend: str) -> None:  # noqa: F811
    """Nor does a broken page show in sequences that do not see it, though neighbours do."""
    shared = share(Case(batch=4, group=3, segments=(3,), tail_len=5), "one row")
    expected = reads.attention(shared.query, shared.view)
    segment, table = shared.view.segments[0], shared.view.row_table
    segment.key_metadata[:, 1] = 0x7FC0  # NaN
    segment.value_metadata[:, 1] = 0x7FC0
    again = PagesView(ClosedPages(shared.view.segments, table), *shared.view.buffers)
    assert torch.equal(reads.attention(shared.query, again), expected)
    table[2, 1] = 1
    broken = reads.attention(shared.query, PagesView(ClosedPages(shared.view.segments, table), *shared.view.buffers))
    assert broken[2].isnan().all()
    torch.testing.assert_close(broken[[0, 1, 3]], expected[[0, 1, 3]])
