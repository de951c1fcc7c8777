"""Attention through a block table against the same pages in one segment, and appending, in one run.

    python -m tests.benchmarks.bench_blocks [--rows WORD ...] [--out FILE]

Times are those of ``bench_attention.py``: the GPU's, in turn, behind a flush of the L2 cache. Every sequence has 63
exact tokens in its open page and one new token, or a chunk. "segments" is the kernel of a cache over the same bytes,
its tail the open page and the new tokens; "ordered" has the blocks of a sequence side by side, "shuffled" anywhere in
the pool.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from quantcache.backends import cuda
from quantcache.backends.blocks import BlockBatch, BlockLayout, BlockPages
from quantcache.quantization.scheme import PAGE_SIZE
from quantcache.store.segments import ClosedPages, Segment
from quantcache.store.view import PagesView
from tests.benchmarks.bench_attention import CAUSAL, Row, interleaved, relative_error, write
from tests.benchmarks.bench_shared import random_pages

HEAD_DIM = 128

SHAPES = [  # name, sequences, q heads, kv heads, tokens with the new ones, new tokens of each, target
    ("decode", 32, 32, 8, 8192, 1, 0.93),
    ("job", 64, 28, 4, 2048, 1, None),
    ("long", 1, 32, 8, 32768, 1, None),
    ("chunk", 1, 32, 8, 8192, 2048, None),
    ("chunks", 4, 28, 4, 8192, 512, None),
]


def states(heads: int, tokens: int) -> Tensor:
    """As models hand them over."""
    made = torch.randn(1, tokens, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    return made.transpose(1, 2)


class Filled:
    """A pool and a segment with the same pages, and the new tokens."""

    def __init__(self, sequences: int, q_heads: int, kv_heads: int, stored: list[int], new: int) -> None:
        self.layout = BlockLayout(kv_heads, HEAD_DIM, HEAD_DIM, torch.bfloat16)
        self.stored, self.new, self.sequences = stored, [new] * sequences, sequences
        self.width = max(self.layout.peak_blocks(tokens + new) for tokens in stored)
        num_blocks = self.width * sequences
        self.pool = torch.zeros(num_blocks, self.layout.page_bytes, dtype=torch.uint8, device="cuda")
        self.query, self.key, self.value = (states(heads, sequences * new) for heads in (q_heads, kv_heads, kv_heads))
        self.tables = {
            "ordered": torch.arange(num_blocks, device="cuda").view(sequences, -1).int(),
            "shuffled": torch.randperm(num_blocks, device="cuda").view(sequences, -1).int(),
        }
        self.segment = random_pages(max(stored) // PAGE_SIZE, sequences, kv_heads)
        self.open = [
            torch.randn(sequences, kv_heads, PAGE_SIZE, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2)
        ]

    def fill(self, order: str) -> BlockPages:
        """The pool with the blocks of sequences in an order; it is then this one's."""
        table, pages = self.tables[order].long(), len(self.segment.key_qdata)
        for part, source in zip(self.layout.parts(self.pool), self.segment, strict=True):
            for index in range(self.sequences):
                part[table[index, :pages]] = source[:, index]
        for is_key, exact in zip((True, False), self.open, strict=True):
            for index, tokens in enumerate(self.stored):
                if tokens % PAGE_SIZE:
                    block = table[index, tokens // PAGE_SIZE + (not is_key)]
                    self.layout.exact(self.pool, is_key)[block] = exact[index]
        kv_lens = [tokens + new for tokens, new in zip(self.stored, self.new, strict=True)]
        starts = (torch.tensor([0, *lens]).cumsum(0).int().cuda() for lens in (self.new, kv_lens))
        batch = BlockBatch(self.tables[order], *starts, max(self.new), max(kv_lens), self.new, kv_lens)
        return BlockPages(self.pool.clone(), self.layout, batch)

    def view(self) -> tuple[Tensor, PagesView]:
        """Query and pages of the cache's kernels, for sequences of one length."""
        rest = self.stored[0] % PAGE_SIZE
        tails = [
            torch.cat([exact[:, :, :rest], new[0].unflatten(1, (self.sequences, -1)).transpose(0, 1)], 2)
            for exact, new in zip(self.open, (self.key, self.value), strict=True)
        ]
        query = self.query[0].unflatten(1, (self.sequences, -1)).transpose(0, 1).contiguous()
        return query, PagesView(ClosedPages((Segment(*self.segment),)), *tails)


def attention_row(sequences: int, q_heads: int, kv_heads: int, tokens: int, new: int, target: float | None) -> Row:
    """One row: sequences of one length."""
    stored = tokens - new if new > 1 else tokens - 1
    filled = Filled(sequences, q_heads, kv_heads, [stored // PAGE_SIZE * PAGE_SIZE + 63 * (new == 1)] * sequences, new)
    query, view = filled.view()
    candidates = {"segments": lambda: cuda.attention(query, view, CAUSAL)}
    for order in filled.tables:
        pages = filled.fill(order)
        candidates[order] = lambda pages=pages: cuda.attend_blocks(  # type: ignore[misc]
            filled.query, filled.key, filled.value, pages, CAUSAL
        )
    expected = candidates["segments"]().double()  # (sequences, new, q heads, head_dim)
    outputs = [candidates[order]() for order in filled.tables]
    assert torch.equal(*outputs)
    error = relative_error(outputs[0].view(expected.shape), expected)
    assert error <= 4e-3, error
    times = interleaved(candidates, repeats=20)
    nbytes = sum(part.nbytes for part in filled.segment) + sum(tail.nbytes for tail in view.buffers)
    return {
        "row": f"{sequences} x {tokens} tokens, {q_heads}/{kv_heads} heads, {new} new each",
        "median_us": times,
        "difference": round(error, 6),
        "tb_per_s": round(nbytes / times["shuffled"] / 1e6, 2),
        "ratio": round(times["segments"] / times["shuffled"], 3),
        "target": target,
    }


def uneven_row() -> Row:
    """A batch of lengths as a server has them, against as many tokens in sequences of one length."""
    sequences, generator = 64, torch.Generator().manual_seed(0)
    lens = (torch.rand(sequences, generator=generator) * 7900 + 100).int().tolist()
    even = Filled(sequences, 28, 4, [sum(lens) // sequences] * sequences, 1)
    uneven = Filled(sequences, 28, 4, lens, 1)
    candidates = {}
    for name, filled in (("even", even), ("uneven", uneven)):
        pages = filled.fill("shuffled")
        candidates[name] = lambda filled=filled, pages=pages: cuda.attend_blocks(
            filled.query, filled.key, filled.value, pages, CAUSAL
        )
    times = interleaved(candidates, repeats=20)
    return {
        "row": f"{sequences} sequences of 100 to 8,000 tokens, 28/4 heads, against one length",
        "median_us": times,
        "ratio": round(times["even"] / times["uneven"], 3),
        "target": None,
    }


def append_row() -> Row:
    """New tokens into the pool: of one that decodes, where no page and where every page closes, and of a chunk."""
    candidates = {}
    for name, sequences, stored, new in (
        ("64 tokens", 64, 2048 + 20, 1),
        ("64 tokens, 64 pages", 64, 2048 + 63, 1),
        ("2,048 tokens", 1, 2048, 2048),
    ):
        filled = Filled(sequences, 28, 4, [stored] * sequences, new)
        pages = filled.fill("shuffled")
        candidates[name] = lambda filled=filled, pages=pages: cuda.append_blocks(filled.key, filled.value, pages)
    return {"row": "append, 28/4 heads", "median_us": interleaved(candidates, repeats=20)}


def prompt_row() -> Row:
    """A prompt with nothing stored before it, against torch's attention."""
    filled = Filled(1, 28, 4, [0], 2048)
    pages = filled.fill("shuffled")
    candidates = {
        "blocks": lambda: cuda.attend_blocks(filled.query, filled.key, filled.value, pages, CAUSAL),
        "sdpa": lambda: scaled_dot_product_attention(
            filled.query, filled.key, filled.value, is_causal=True, enable_gqa=True
        ),
    }
    times = interleaved(candidates, repeats=20)
    return {
        "row": "prompt of 2,048 tokens, 28/4 heads",
        "median_us": times,
        "ratio": round(times["sdpa"] / times["blocks"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    others = {"uneven": uneven_row, "append": append_row, "prompt": prompt_row}
    parser.add_argument("--rows", nargs="*", default=[*(shape[0] for shape in SHAPES), *others])
    parser.add_argument("--out", default="docs/benchmarks/cuda-blocks.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows: list[Row] = []
    makers = {name: lambda shape=shape: attention_row(*shape) for name, *shape in SHAPES} | others
    for name in options.rows:
        rows.append(makers[name]())
        print(json.dumps(rows[-1]), flush=True)
        write(rows, Path(options.out), "python -m tests.benchmarks.bench_blocks")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
