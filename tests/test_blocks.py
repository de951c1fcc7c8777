"""Does a pool of blocks hold what pages hold, and do its backends read and write it as the specification says?"""

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from quantcache.backends import dispatch
from quantcache.backends.blocks import BlockBatch, BlockLayout, BlockPages
from quantcache.quantization import reference
from quantcache.quantization.options import AttentionOptions
from quantcache.quantization.scheme import PAGE_SIZE
from tests.strategies import random_states

HEADS, GROUP, DTYPES = 2, 3, (torch.float32, torch.bfloat16, torch.float16)


def layout_of(dtype: torch.dtype, head_dim: int = 32) -> BlockLayout:
    return BlockLayout(HEADS, head_dim, head_dim, dtype)


class Pool:
    """Three layers of a pool full of garbage, sequences of shuffled blocks, and the middle layer's exact states."""

    def __init__(self, layout: BlockLayout, sequences: int, blocks: int = 48) -> None:
        torch.manual_seed(3)
        self.layout = layout
        self.bytes = torch.randint(0, 256, (blocks, 3, layout.page_bytes), dtype=torch.uint8)
        self.free = torch.randperm(blocks).tolist()
        self.rows: list[list[int]] = [[] for _ in range(sequences)]
        empty = torch.empty(1, layout.num_kv_heads, 0, layout.head_dim, dtype=layout.dtype)
        self.states = [[empty, empty] for _ in range(sequences)]
        self.seed = itertools.count()

    def batch(self, query_lens: list[int], *, on_host: bool) -> BlockBatch:
        """A forward pass with so many new tokens of each sequence, which get their blocks."""
        kv_lens = [s[0].shape[2] + n for s, n in zip(self.states, query_lens, strict=True)]
        for row, kv_len in zip(self.rows, kv_lens, strict=True):
            while len(row) < self.layout.peak_blocks(kv_len):
                row.append(self.free.pop())
        width = max(map(len, self.rows)) + 1
        table = torch.tensor([row + [-1] * (width - len(row)) for row in self.rows], dtype=torch.int32)
        starts = [torch.tensor([0, *lens]).cumsum(0).int() for lens in (query_lens, kv_lens)]
        known = (query_lens, kv_lens) if on_host else (None, None)
        return BlockBatch(table, *starts, max(query_lens), max(kv_lens), *known)

    def pages(self, batch: BlockBatch) -> BlockPages:
        return BlockPages(self.bytes[:, 1], self.layout, batch)

    def new(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values."""
        dtype, head_dim = self.layout.dtype, self.layout.head_dim
        query, _ = random_states(1, HEADS * GROUP, tokens, head_dim, dtype=dtype, seed=next(self.seed))
        return query, *random_states(1, HEADS, tokens, head_dim, dtype=dtype, seed=next(self.seed))

    def stored(self, index: int) -> tuple[Tensor, Tensor]:
        """What a sequence reads: closed pages restored, the newest tokens exact."""
        key, value = self.states[index]
        closed = key.shape[2] // PAGE_SIZE * PAGE_SIZE
        if not closed:
            return key, value
        dtype = self.layout.dtype
        keys = reference.restore_key_pages(*reference.quantize_key_pages(key[:, :, :closed]), dtype)
        values = reference.restore_value_pages(*reference.quantize_value_pages(value[:, :, :closed]), dtype)
        return torch.cat([keys, key[:, :, closed:]], 2), torch.cat([values, value[:, :, closed:]], 2)

    def append(self, query_lens: list[int], key: Tensor, value: Tensor) -> None:
        for index, (k, v) in enumerate(zip(key.split(query_lens, 2), value.split(query_lens, 2), strict=True)):
            self.states[index] = [torch.cat([s, n], 2) for s, n in zip(self.states[index], (k, v), strict=True)]


def passes() -> Iterator[list[int]]:
    """New tokens of three sequences: prompts, chunks mixed with single tokens, single tokens across a page's end."""
    yield from ([5, 64, 130], [1, 1, 1], [100, 1, 0], [0, 0, 1], [23, 63, 1])
    yield from itertools.repeat([1, 1, 1], 3)
    yield from ([64, 128, 2], [1, 0, 60])


def backends() -> list[str]:
    return sorted(dispatch.BLOCK_BACKENDS)


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in backends() if name != "cuda"])
def test_blocks_hold_what_pages_hold(name: str, dtype: torch.dtype, on_host: bool) -> None:
    backend, layout = dispatch.BLOCK_BACKENDS[name], layout_of(dtype)
    if (reason := backend.unsupported_blocks(layout)) is not None:
        pytest.skip(reason)
    pool, options = Pool(layout, 3), AttentionOptions(is_causal=True, softmax_scale=0.3)
    others = pool.bytes[:, ::2].clone()
    for query_lens in passes():
        batch = pool.batch(query_lens, on_host=on_host)
        query, key, value = pool.new(sum(query_lens))
        before = pool.bytes.clone()
        output = backend.attend_blocks(query, key, value, pool.pages(batch), options)
        assert torch.equal(pool.bytes, before)
        expected = []
        for index, parts in enumerate(zip(*(s.split(query_lens, 2) for s in (query, key, value)), strict=True)):
            if not query_lens[index]:
                continue
            stored = pool.stored(index)
            keys, values = (torch.cat([old, new], 2) for old, new in zip(stored, parts[1:], strict=True))
            expected.append(reference.attend(parts[0], keys, values, options))
        few_eps = max(4 * torch.finfo(dtype).eps, 1e-5)
        torch.testing.assert_close(output, torch.cat(expected, 1), rtol=few_eps, atol=few_eps)
        backend.append_blocks(key, value, pool.pages(batch))
        pool.append(query_lens, key, value)
        check_bytes(pool)
    assert torch.equal(pool.bytes[:, ::2], others)


def check_bytes(pool: Pool) -> None:
    """Every closed page has the bytes of the specification, every open one the exact tokens."""
    layout, layer = pool.layout, pool.bytes[:, 1]
    parts = layout.parts(layer)
    for row, (key, value) in zip(pool.rows, pool.states, strict=True):
        full, rest = divmod(key.shape[2], PAGE_SIZE)
        if full:
            closed = key[:, :, : full * PAGE_SIZE], value[:, :, : full * PAGE_SIZE]
            made = *reference.quantize_key_pages(closed[0]), *reference.quantize_value_pages(closed[1])
            for part, expected in zip(parts, made, strict=True):
                assert torch.equal(part[row[:full]], expected[:, 0])
        if rest:
            side = layout.open_blocks
            for is_key, states, blocks in ((True, key, row[full:]), (False, value, row[full + side :])):
                held = layout.exact(layer, is_key)[blocks[:side]].transpose(0, 1).flatten(1, 2)
                assert torch.equal(held[:, :rest], states[0, :, full * PAGE_SIZE :])


@pytest.mark.parametrize("options", [AttentionOptions(is_causal=True, softcap=2.0), AttentionOptions(True)])
def test_softcap_and_sinks_are_those_of_the_specification(options: AttentionOptions) -> None:
    sinks = torch.linspace(-1, 1, HEADS * GROUP)
    options = AttentionOptions(is_causal=True, softcap=options.softcap, sinks=None if options.softcap else sinks)
    for name in backends():
        backend = dispatch.BLOCK_BACKENDS[name]
        if name == "cuda" or backend.unsupported_blocks(layout_of(torch.float32)) is not None:
            continue
        pool = Pool(layout_of(torch.float32), 1)
        batch = pool.batch([70], on_host=True)
        query, key, value = pool.new(70)
        output = backend.attend_blocks(query, key, value, pool.pages(batch), options)
        torch.testing.assert_close(output, reference.attend(query, key, value, options), rtol=1e-4, atol=1e-5)


def test_queries_in_parts_are_those_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantcache.backends import torch_blocks

    pool, options = Pool(layout_of(torch.float32), 1), AttentionOptions(is_causal=True)
    query, key, value = pool.new(70)
    torch_blocks.append_blocks(key, value, pool.pages(pool.batch([70], on_host=True)))
    pool.append([70], key, value)
    query, key, value = pool.new(50)
    pages = pool.pages(pool.batch([50], on_host=True))
    whole = torch_blocks.attend_blocks(query, key, value, pages, options)
    monkeypatch.setattr(torch_blocks, "MAX_SCORES", 7 * 120 * HEADS * GROUP)
    torch.testing.assert_close(torch_blocks.attend_blocks(query, key, value, pages, options), whole)


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_open_page_fits_its_blocks(dtype: torch.dtype, head_dim: int) -> None:
    layout = layout_of(dtype, head_dim)
    exact = layout.exact(torch.zeros(4, layout.page_bytes, dtype=torch.uint8), True)
    assert exact.shape == (4, HEADS, PAGE_SIZE // layout.open_blocks, head_dim)
    assert layout.open_blocks == (1 if dtype.itemsize == 2 else 2)
    assert layout.page_bytes == HEADS * (132 * head_dim + 256)
    most = 0
    for kv_len in range(200):
        most = max(most, layout.blocks_for(kv_len))
        assert layout.blocks_for(kv_len) <= layout.peak_blocks(kv_len) == most


def test_a_device_without_kernels_for_blocks_takes_torch_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "choose_backend", lambda device: "cuda")
    monkeypatch.setattr(dispatch, "BLOCK_BACKENDS", {"torch": dispatch.BLOCK_BACKENDS["torch"]})
    name, reason = dispatch.block_backend_for(torch.device("cpu"), layout_of(torch.float32))
    assert (name, reason) == ("torch", "this version has no CUDA kernels for blocks")


def test_a_layout_that_kernels_refuse_takes_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refuses:
        READS_LENGTHS = True

        @staticmethod
        def unsupported_blocks(layout: BlockLayout) -> str | None:
            return "of a test"

    monkeypatch.setattr(dispatch, "choose_backend", lambda device: "cpu")
    monkeypatch.setitem(dispatch.BLOCK_BACKENDS, "cpu", Refuses())
    assert dispatch.block_backend_for(torch.device("cpu"), layout_of(torch.float32)) == ("torch", "of a test")


def test_lengths_on_the_device_are_read_once() -> None:
    pool = Pool(layout_of(torch.float32), 3)
    batch = pool.batch([2, 0, 1], on_host=False)
    assert batch.on_host() == ([2, 0, 1], [2, 0, 1])
    assert batch.on_host()[0] is batch.on_host()[0]
