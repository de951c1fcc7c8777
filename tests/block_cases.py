"""Sequences whose pages lie in the blocks of a pool, for the tests of the backends that read and write them."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from quantcache.backends import torch_blocks
from quantcache.backends.blocks import BlockBatch, BlockLayout, BlockPages
from quantcache.quantization import reference
from quantcache.quantization.options import AttentionOptions

CAUSAL = AttentionOptions(is_causal=True)


@dataclass(frozen=True)
class Case:
    """What sequences have stored, and how many new tokens they have.

    Attributes:
        stored: tokens of each sequence in the pool.
        new: new tokens of each.
        num_kv_heads: of the layer.
        group: query heads of each.
        head_dim: channels of keys.
        v_head_dim: channels of values.
        dtype: of states.
        num_layers: pages side by side in a block, of which the last layer is read.
        is_shuffled: whether blocks lie anywhere, or in the order of the tokens.
        padding: sequences without a token behind the others.
    """

    stored: tuple[int, ...] = (70, 0, 128, 1)
    new: tuple[int, ...] = (1, 1, 1, 1)
    num_kv_heads: int = 2
    group: int = 4
    head_dim: int = 128
    v_head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    num_layers: int = 2
    is_shuffled: bool = True
    padding: int = 0

    @property
    def layout(self) -> BlockLayout:
        """Of the pool."""
        return BlockLayout(self.num_kv_heads, self.head_dim, self.v_head_dim, self.dtype)


@dataclass
class Pool:
    """A pool with what a case has stored, the new tokens, and all tokens as they were."""

    case: Case
    pages: BlockPages
    memory: Tensor
    query: Tensor
    key_states: Tensor
    value_states: Tensor
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def states(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, keys and values of the new tokens."""
        return self.query, self.key_states, self.value_states

    def moved(self, device: str) -> "Pool":
        """The same on another device, on the CPU a copy."""
        memory = self.memory.to(device, copy=True)
        batch = self.pages.batch
        tables = (t.to(device, copy=True) for t in (batch.block_table, batch.cu_seqlens_q, batch.cu_seqlens_k))
        batch = BlockBatch(*tables, batch.max_query_len, batch.max_kv_len, batch.query_lens, batch.kv_lens)
        pages = BlockPages(layer_of(memory, self.case), self.pages.layout, batch)
        return Pool(self.case, pages, memory, *(states.to(device) for states in self.states), self.kept)

    def expected(self, options: AttentionOptions = CAUSAL) -> Tensor:
        """What the specification says in float64 of what is stored, (1, tokens, num_q_heads, v_head_dim)."""
        made, start = [], 0
        query, *new = (states.cpu() for states in self.states)
        for index, (count, (key, value)) in enumerate(zip(self.case.new, self.kept, strict=True)):
            full = self.case.stored[index] // 64 * 64
            dense = []
            for is_key, states, own in ((True, key, new[0]), (False, value, new[1])):
                quantize = reference.quantize_key_pages if is_key else reference.quantize_value_pages
                restore = reference.restore_key_pages if is_key else reference.restore_value_pages
                closed = restore(*quantize(states[:, :, :full]), torch.float64) if full else states[:, :, :0].double()
                dense.append(
                    torch.cat([closed, states[:, :, full:].double(), own[:, :, start : start + count].double()], 2)
                )
            made.append(reference.attend(query[:, :, start : start + count].double(), *dense, options))
            start += count
        return torch.cat(made, 1)

    def error(self, output: Tensor, options: AttentionOptions = CAUSAL) -> float:
        """||output - expected|| / ||expected||; raises where the output is not what attention returns."""
        assert output.dtype == self.query.dtype
        assert output.is_contiguous()
        expected = self.expected(options)
        output = output.cpu()[:, : expected.shape[1]]
        return float((output.double() - expected).norm() / expected.norm())


def layer_of(memory: Tensor, case: Case) -> Tensor:
    """The pages of the last layer in ``memory``, uint8 (blocks, bytes of a block)."""
    size = case.layout.page_bytes
    return memory[:, (case.num_layers - 1) * size : case.num_layers * size]


def build(case: Case, seed: int = 0) -> Pool:
    """A pool of garbage with what ``case`` has stored, written in two calls of the torch backend, and new tokens.

    What is not stored is NaN as every kind of number.
    """
    generator = torch.Generator().manual_seed(seed)
    layout, sequences = case.layout, len(case.stored)
    totals = [stored + new for stored, new in zip(case.stored, case.new, strict=True)]
    width = max(max(map(layout.peak_blocks, (*totals, *case.stored))), 1)
    num_blocks = width * sequences + 3
    memory = torch.full((num_blocks, case.num_layers * layout.page_bytes + 48), 0xFF, dtype=torch.uint8)
    shuffled = torch.randperm(num_blocks, generator=generator)
    order = shuffled if case.is_shuffled else shuffled.sort().values
    table = order[: width * sequences].view(sequences, width).int()
    table = torch.cat([table, torch.full((case.padding, width), -1, dtype=torch.int32)])
    for index, total in enumerate(totals):
        table[index, max(layout.peak_blocks(n) for n in (total, case.stored[index], 0)) :] = -1

    def pages(before: tuple[int, ...], new: tuple[int, ...]) -> BlockPages:
        query_lens, kv_lens = [*new, *[0] * case.padding], [b + n for b, n in zip(before, new, strict=True)]
        kv_lens += [0] * case.padding
        starts = (torch.tensor([0, *lens]).cumsum(0).int() for lens in (query_lens, kv_lens))
        batch = BlockBatch(table, *starts, max(query_lens), max(kv_lens), query_lens, kv_lens)
        return BlockPages(layer_of(memory, case), layout, batch)

    def states(heads: int, tokens: int, width: int) -> Tensor:
        made = torch.randn(1, tokens, heads, width, generator=generator)
        return (made + torch.randn(1, 1, heads, width, generator=generator)).to(case.dtype).transpose(1, 2)

    kept = [
        (states(case.num_kv_heads, n, case.head_dim), states(case.num_kv_heads, n, case.v_head_dim))
        for n in case.stored
    ]
    first = tuple(n // 3 for n in case.stored)
    rest = tuple(n - f for n, f in zip(case.stored, first, strict=True))
    zeros = (0,) * sequences
    for before, counts in ((zeros, first), (first, rest)):
        parts = [
            torch.cat([pair[which][:, :, b : b + n] for pair, b, n in zip(kept, before, counts, strict=True)], 2)
            for which in (0, 1)
        ]
        if sum(counts):
            torch_blocks.append_blocks(*parts, pages(before, counts))
    tokens = sum(case.new)
    new = states(case.num_kv_heads, tokens, case.head_dim), states(case.num_kv_heads, tokens, case.v_head_dim)
    query = states(case.num_kv_heads * case.group, tokens, case.head_dim)
    return Pool(case, pages(case.stored, case.new), memory, query, *new, kept)


DECODING = Case()
CHUNKS = replace(DECODING, new=(64, 5, 130, 200))
MIXED = replace(DECODING, stored=(70, 0, 128, 1, 300, 63, 64), new=(1, 90, 1, 2, 65, 1, 1))
