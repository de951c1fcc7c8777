"""Do batch operations share stored rows, and read and give back the right ones?"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import Qwen2Config
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer

from quantcache import QuantizedInt8Cache
from quantcache.backends import dispatch
from quantcache.quantization import reference
from quantcache.quantization.options import AttentionOptions
from quantcache.store import reads, tail
from quantcache.store.growing import Int8Pages
from quantcache.store.segments import ClosedPages, RowTable, Segment, sizes_until
from quantcache.store.view import PagesView
from tests.strategies import random_states


def filled(batch: int = 4, tokens: int = 300) -> Int8Pages:
    key, _ = random_states(batch, 2, tokens, 16, seed=1)
    value, _ = random_states(batch, 2, tokens, 24, seed=2)
    pages = Int8Pages(key, value)
    pages.append(key, value)
    return pages


def addresses(pages: Int8Pages) -> list[int]:
    return [part.data_ptr() for segment in pages.segments for part in segment]


def rows_of(dense: tuple[Tensor, Tensor], rows: list[int]) -> tuple[Tensor, Tensor]:
    return dense[0][rows], dense[1][rows]


@pytest.fixture
def reads_row_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "torch")


@given(data=st.data(), pages=st.integers(0, 5), rows=st.integers(1, 4), batch=st.integers(1, 6))
def test_a_sequence_reads_of_every_page_the_row_that_the_table_says(
    data: st.DataObject, pages: int, rows: int, batch: int
) -> None:
    table = torch.tensor(
        [[data.draw(st.integers(0, rows - 1)) for _ in range(pages)] for _ in range(batch)], dtype=torch.int32
    ).view(batch, pages)
    part = torch.randint(-128, 128, (pages, rows, 2, 3), dtype=torch.int8)
    selected = reference.select_rows(part, table)
    assert selected.shape == (pages, batch, 2, 3)
    for page in range(pages):
        for sequence in range(batch):
            assert torch.equal(selected[page, sequence], part[page, table[sequence, page]])


@pytest.mark.usefixtures("reads_row_tables")
@pytest.mark.parametrize("order", [[1, 0, 3, 2], [0, 0, 2, 3], [3, 1], [0, 0, 1, 1, 2, 2, 3, 3]])
def test_batch_operations_copy_no_page(order: list[int]) -> None:
    pages = filled()
    where, dense = addresses(pages), pages.restore()
    pages.index_select(torch.tensor(order))
    assert addresses(pages) == where
    assert pages.row_table is not None
    for have, want in zip(pages.restore(), rows_of(dense, order), strict=True):
        assert torch.equal(have, want)
    query, _ = random_states(len(order), 4, 1, 16, seed=3)
    expected = reference.attend(query, *rows_of(dense, order))
    torch.testing.assert_close(reads.attention(query, pages.view()), expected)
    # Pages closed from here on have a row for each sequence.
    newer = [random_states(len(order), 2, 100, width, seed=4)[0] for width in (16, 24)]
    pages.append(newer[0], newer[1])
    assert addresses(pages)[: len(where)] == where or len(order) != 4
    for have, want, new in zip(pages.restore(), rows_of(dense, order), newer, strict=True):
        assert torch.equal(have[:, :, :300], want) or (have[:, :, :256] == want[:, :, :256]).all()
        assert (have[:, :, 300:] - new).abs().max() < 0.05


@pytest.mark.usefixtures("reads_row_tables")
def test_the_order_there_was_needs_no_table() -> None:
    pages = filled()
    for order in ([1, 0, 3, 2], [1, 0, 3, 2]):
        pages.index_select(torch.tensor(order))
    assert pages.row_table is None


@pytest.mark.usefixtures("reads_row_tables")
def test_memory_is_given_back_once_fewer_than_half_of_the_rows_are_read() -> None:
    pages = filled()
    nbytes, dense = pages.nbytes, pages.restore()
    pages.index_select(torch.tensor([3, 1]))
    assert pages.row_table is not None, "half of the rows are read"
    pages.index_select(torch.tensor([1]))
    assert pages.row_table is None
    assert pages.nbytes < 0.3 * nbytes
    for have, want in zip(pages.restore(), rows_of(dense, [1]), strict=True):
        assert torch.equal(have, want)


def test_kernels_that_read_no_table_get_the_pages_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "torch")
    monkeypatch.setattr(dispatch.BACKENDS["torch"], "READS_ROW_TABLE", False)
    pages = filled()
    dense = pages.restore()
    for order in ([1, 0, 3, 2], [2, 2, 0, 1]):
        pages.index_select(torch.tensor(order))
        dense = rows_of(dense, order)
    where = addresses(pages)
    query, _ = random_states(4, 4, 1, 16, seed=3)
    torch.testing.assert_close(reads.attention(query, pages.view()), reference.attend(query, *dense))
    assert pages.row_table is None
    assert addresses(pages) != where
    assert addresses(pages) == addresses(pages), "once, and not for each read"


def test_registered_operations_read_a_table_on_every_backend() -> None:
    pages = filled()
    table = torch.tensor([[0, 1, 2, 3], [3, 3, 1, 0]], dtype=torch.int32)
    buffers = pages.key_tail[:2], pages.value_tail[:2]
    view = PagesView(ClosedPages(pages.stored().segments, table), *buffers)
    query, _ = random_states(2, 4, 1, 16, seed=3)
    segment = Segment(*(torch.cat(parts) for parts in zip(*pages.stored().segments, strict=True)))
    resolved = PagesView(ClosedPages((Segment(*(reference.select_rows(part, table) for part in segment)),)), *buffers)
    options = AttentionOptions(is_causal=True)
    packed = reads.packed(view)
    output = torch.ops.quantcache.attention(query, *packed, *options)
    torch.testing.assert_close(output, reference.attend(query, *reads.restore_both(resolved), options))
    for is_key in (True, False):
        restored = torch.ops.quantcache.restore(*packed, torch.float32, is_key)
        assert torch.equal(restored, reads.restore(resolved, is_key))


def test_a_table_counts_what_is_read() -> None:
    segments = filled().segments
    table = RowTable.identity(4, sum(segment.capacity for segment in segments))
    sizes = sizes_until(segments, 1000)
    assert sizes == tuple((segment.capacity, 4) for segment in segments)
    assert sum(pages for pages, _ in sizes_until(segments, 3)) == 3
    assert table.is_identity(sizes)
    assert table.share_read(sizes) == 1
    assert RowTable(table.rows[[0, 0, 1, 1]]).share_read(sizes) == 0.5


def test_the_report_of_a_fixed_capacity_says_who_shares() -> None:
    config = Qwen2Config(num_hidden_layers=1, hidden_size=32, num_attention_heads=2)
    cache = QuantizedInt8Cache(config, max_cache_len=400)
    cache.update(*random_states(3, 2, 300, 16), 0)
    nbytes = cache.nbytes
    assert "rows" not in str(cache.report())
    cache.reorder_cache(torch.tensor([1, 1, 2]))
    (row,) = cache.report().layers
    assert (row.rows_stored, row.rows_read, cache.nbytes) == (2 * 4, 3 * 4, nbytes)
    cache.reset()
    assert "rows" not in str(cache.report())


def test_a_table_says_whether_neighbours_share() -> None:
    rows = RowTable.identity(3, 2).rows
    assert not RowTable(rows).neighbours_share
    assert not RowTable(rows[[2, 0, 1]]).neighbours_share
    assert RowTable(rows[[2, 0, 0]]).neighbours_share


@pytest.mark.usefixtures("reads_row_tables")
@pytest.mark.parametrize("together", [False, True])
def test_tails_are_gathered_when_they_are_read(together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the reordering, once for several of them, and on a GPU of all layers at once."""
    calls: list[int] = []

    def counted(parts: list[Tensor], rows: Tensor) -> list[Tensor]:
        calls.append(len(parts))
        return [part.index_select(0, rows) for part in parts]

    monkeypatch.setattr(tail, "take_rows", counted)
    monkeypatch.setattr(tail, "gathers_together", lambda _: together)
    cache = QuantizedInt8Cache()
    for layer_idx in range(3):
        cache.update(*random_states(4, 2, 100, 16, seed=layer_idx), layer_idx)
    expected = [layer.pages.restore()[0] for layer in cache.layers]
    for order in ([3, 1, 1, 0], [0, 0, 2, 3], [0, 1, 2, 3]):
        cache.reorder_cache(torch.tensor(order))
        expected = [keys[order] for keys in expected]
    fork = cache.fork()
    assert not calls
    assert [layer.pages.batch_size for layer in cache.layers] == [4, 4, 4]
    for each in (cache, fork):
        for layer, keys in zip(each.layers, expected, strict=True):
            assert torch.equal(layer.pages.restore()[0], keys)
    assert calls == ([3, 3] if together else [1] * 6)
    for each in (cache, fork):
        each.layers[0].update(*random_states(4, 2, 1, 16, seed=9))
    assert torch.equal(cache.layers[1].pages.restore()[0], expected[1])


def test_rows_are_taken_of_all_in_one_operation() -> None:
    parts, rows = [torch.randn(3, 2, 5) for _ in range(4)], torch.tensor([2, 0, 0, 1])
    for have, part in zip(tail.joint_rows(parts, rows), parts, strict=True):
        assert torch.equal(have, part[rows])
        assert have.is_contiguous()


@pytest.mark.usefixtures("reads_row_tables")
def test_layers_alike_share_one_table() -> None:
    cache = QuantizedInt8Cache()
    for layer_idx in range(3):
        cache.update(*random_states(2, 2, 300, 16, seed=layer_idx), layer_idx)
    where = [addresses(layer.pages) for layer in cache.layers]
    cache.batch_repeat_interleave(2)
    for step, order in enumerate(([3, 1, 1, 0], [0, 0, 2, 3])):
        for layer_idx in range(3):
            cache.update(*random_states(4, 2, 100, 16, seed=layer_idx + step), layer_idx)
        cache.reorder_cache(torch.tensor(order))
        assert len({id(layer.pages.row_table) for layer in cache.layers}) == 1
    assert [addresses(layer.pages)[: len(had)] for layer, had in zip(cache.layers, where, strict=True)] == where


@pytest.mark.usefixtures("reads_row_tables")
def test_shared_bytes_count_once_and_the_report_says_who_shares() -> None:
    cache = QuantizedInt8Cache()
    cache.update(*random_states(2, 2, 300, 16), 0)
    assert "rows" not in str(cache.report())
    pages = sum(segment.nbytes for segment in cache.layers[0].pages.segments)
    cache.batch_repeat_interleave(8)
    assert sum(segment.nbytes for segment in cache.layers[0].pages.segments) == pages
    assert cache.nbytes == pages + sum(buffer.nbytes for buffer in cache.layers[0].pages._buffers)
    (row,) = cache.report().layers
    assert (row.rows_stored, row.rows_read) == (2 * 4, 16 * 4)
    assert "<th>rows stored</th><th>rows read</th>" in cache.report()._repr_html_()
    assert "<td>8</td><td>64</td>" in cache.report()._repr_html_()
    head, line, *_ = str(cache.report()).splitlines()
    assert head.endswith("rows stored  rows read")
    assert line.endswith("8            64")


def mixed_cache() -> QuantizedInt8Cache:
    """Int8, and layers of transformers' own of two kinds, three sequences."""
    cache = QuantizedInt8Cache()
    key, value = random_states(3, 2, 150, 16)
    cache.update(key, value, 0)
    window, linear = DynamicSlidingWindowLayer(64), LinearAttentionLayer()
    window.update(key, value)
    linear.update_recurrent_state(key[:, 0, 0].clone())
    cache.layers += [window, linear]
    return cache


def states_of(cache: QuantizedInt8Cache) -> list[Tensor]:
    int8, window, linear = cache.layers
    return [*int8.pages.restore(), window.keys, window.values, linear.recurrent_states[0]]


@pytest.mark.parametrize("indices", [[1, 0, 2], [-1, 0, 1], torch.tensor([2, 2, 0], dtype=torch.int32)])
@pytest.mark.parametrize("method", ["reorder_cache", "batch_select_indices"])
def test_layers_of_every_kind_take_the_same_sequences(method: str, indices: list[int] | Tensor) -> None:
    cache = mixed_cache()
    wanted = [states[torch.as_tensor(indices).tolist()] for states in states_of(cache)]
    getattr(cache, method)(indices)
    for have, want in zip(states_of(cache), wanted, strict=True):
        assert torch.equal(have, want)


@pytest.mark.parametrize("indices", [[0, 3, 1], [[0, 1, 2]], [0.0, 1.0, 2.0], "012"])
@pytest.mark.parametrize("method", ["reorder_cache", "batch_select_indices"])
def test_layers_of_every_kind_stay_as_they_were_where_one_cannot_take_them(method: str, indices: object) -> None:
    """Also before the int8 layers hold anything, and where there is no int8 layer at all."""
    for kept in (slice(None), slice(1, None)):
        cache = mixed_cache()
        held = [states.clone() for states in states_of(cache)]
        layers, cache.layers = cache.layers, cache.layers[kept]
        with pytest.raises((TypeError, IndexError)):
            getattr(cache, method)(indices)
        cache.layers = layers
        for have, want in zip(states_of(cache), held, strict=True):
            assert torch.equal(have, want)


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        (torch.tensor([0, 4]), IndexError, r"indices must be below the batch of 4 sequences, got 4\."),
        (torch.tensor([-5]), IndexError, r"indices must be below the batch of 4 sequences, got -5\."),
        (torch.tensor([0.0]), TypeError, r"indices must be integers or bool, got torch\.float32\."),
        (torch.tensor([[0]]), IndexError, r"indices must be 1-D, bool ones \(4,\), got \(1, 1\)\."),
        (torch.tensor([True]), IndexError, r"indices must be 1-D, bool ones \(4,\), got \(1,\)\."),
    ],
)
def test_sequences_that_are_not_there_are_refused(indices: Tensor, error: type[Exception], message: str) -> None:
    pages = filled()
    dense = pages.restore()
    with pytest.raises(error, match=message):
        pages.index_select(indices)
    for have, want in zip(pages.restore(), dense, strict=True):
        assert torch.equal(have, want)
