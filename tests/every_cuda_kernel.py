"""Launches every CUDA kernel at small sizes, for ``tests/test_cuda_sanitizer.py``: those of caches but prefill, prefill
alone, or those that read and write the blocks of a pool.

    python tests/every_cuda_kernel.py [prefill | blocks]

With ``PYTORCH_NO_CUDA_MEMORY_CACHING=1`` every tensor is an allocation of its own, and a read past its end is seen.
"""

import importlib
import math
import sys
from dataclasses import replace

import torch
from torch import Tensor

from quantcache.backends import cuda
from quantcache.backends.blocks import BlockBatch, BlockLayout, BlockPages
from quantcache.backends.cuda.plan import Shape
from quantcache.backends.cuda.prefill import Shape as PrefillShape
from quantcache.layers.fixed import StaticInt8Layer
from quantcache.layers.growing import Int8Layer
from quantcache.quantization.options import PLAIN, AttentionOptions
from quantcache.store import reads
from quantcache.store.segments import ClosedPages
from quantcache.store.tensor import Int8Tensor, read
from quantcache.store.view import PagesView

Kind = tuple[int, int, torch.dtype, int, int]

KINDS: list[Kind] = [  # head_dim, v_head_dim, dtype, KV heads, query heads of each
    (64, 64, torch.bfloat16, 2, 4),
    (128, 128, torch.bfloat16, 2, 1),
    (128, 128, torch.float32, 1, 3),
    (192, 128, torch.float16, 3, 2),
    (80, 80, torch.float16, 2, 7),
    (256, 256, torch.bfloat16, 1, 8),
]

CHUNKS = (201, 1, 1, 5, 64, 1, 300, 2, 1)
"""Tokens of each call: pages closed one and many at a time, and a tail at every stage."""

CAPACITY = sum(CHUNKS) + 9

BATCH = 2

PREFILL_ALONE = "prefill" in sys.argv[1:]
"""Whether to look at the kernel for many query rows, and at no other's reads."""


DIVISIONS = [  # shape of the kernel, splits of the pages and in all
    (Shape(1, 4, 16, 2), (1, 1)),
    (Shape(1, 4, 16, 2), (2, 3)),
    (Shape(1, 8, 16, 2), (3, 3)),
    (Shape(1, 8, 16, 2), (16, 17)),
]


def options(query: Tensor, kv_len: int) -> list[AttentionOptions]:
    """Every way in which keys are hidden or logits changed; masks are ``kv_len`` wide."""
    _, num_q_heads, query_len, _ = query.shape
    hidden = torch.tensor([70, 0], device="cuda")[:, None]
    seen = (torch.arange(kv_len, device="cuda") >= hidden)[:, None, None]
    by_query = seen.expand(BATCH, 1, query_len, kv_len).contiguous()
    sinks = torch.linspace(-1, 2, num_q_heads, device="cuda")
    return [
        AttentionOptions(is_causal=True),
        AttentionOptions(seen),
        AttentionOptions(torch.where(by_query, 0.5, -torch.inf).expand(-1, num_q_heads, -1, -1).contiguous()),
        AttentionOptions(by_query, softcap=20.0, sinks=sinks, window=100),
    ]


def random_states(heads: int, tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    """As models hand them over, and not a byte longer."""
    return torch.randn(BATCH, tokens, heads, width, device="cuda").to(dtype).transpose(1, 2)


def run(layer: Int8Layer, kind: Kind) -> None:
    """Store ``CHUNKS`` and read them in every way there is for the layer."""
    head_dim, v_head_dim, dtype, num_kv_heads, group = kind
    for tokens in CHUNKS:
        key, _ = layer.update(
            random_states(num_kv_heads, tokens, head_dim, dtype), random_states(num_kv_heads, tokens, v_head_dim, dtype)
        )
        is_prefill = tokens * group > cuda.MAX_DECODE_ROWS and dtype != torch.float32
        if is_prefill != PREFILL_ALONE:
            continue
        query = random_states(num_kv_heads * group, tokens, head_dim, dtype)
        if isinstance(key, Int8Tensor):
            for asked in options(query, key.shape[2]):
                assert read(key.pages_view, layer.read_log, query, asked).isfinite().all()
            if is_prefill:
                read_in_every_shape(key.pages_view, query)
            elif isinstance(layer, StaticInt8Layer):
                read_recorded(layer, query)
            else:
                read_divided(key.pages_view, query)
            if isinstance(layer, Int8Layer) and head_dim in PREFILL_SHAPES and dtype != torch.float32:
                read_shared(key.pages_view, query)
    for states in (layer.keys, layer.values):
        assert isinstance(states, Int8Tensor)
        assert states.restore().isfinite().all()


PREFILL_SHAPES = {  # by head_dim: as other GPUs and other numbers of rows get it; each is a build of seconds
    80: [PrefillShape(1, 2, 32, 1)],
    128: [PrefillShape(2, 8, 64, 2), PrefillShape(1, 4, 64, 2, True)],
}


def read_in_every_shape(view: PagesView, query: Tensor) -> None:
    """The prefill kernel in the shapes that are not chosen here, divided and whole."""
    for shape in PREFILL_SHAPES.get(query.shape[3], []):
        if shape.is_warpgroup and torch.cuda.get_device_capability() != (9, 0):
            continue
        for asked in options(query, view.seq_len)[::3]:
            for splits in (1, 3):
                assert cuda.prefill(query, view, asked, shape, splits).isfinite().all()


def read_shared(view: PagesView, query: Tensor) -> None:
    """Through a row table: the newest query, by the kernels of this turn; of every three pages two are shared."""
    table = torch.zeros(BATCH, view.num_pages, dtype=torch.int32, device="cuda")
    table[1, ::3] = 1
    shared = PagesView(ClosedPages(view.segments, table), *view.buffers, view.tail_len)
    for asked in options(query[:, :, -1:], view.seq_len)[:2]:
        output = cuda.decode(query[:, :, -1:], shared, asked, shares_pages=PREFILL_ALONE)
        assert output.isfinite().all()
    if PREFILL_ALONE:
        assert cuda.prefill(query, shared, AttentionOptions(is_causal=True)).isfinite().all()
    else:
        assert cuda.restore(shared, is_key=True).isfinite().all()


def read_recorded(layer: StaticInt8Layer, query: Tensor) -> None:
    """With the lengths in device memory."""
    if query.shape[2] > 1:
        return  # what a longer call reads instead of the tail is gone
    for asked in options(query, CAPACITY):
        recorded = [layer.pages.memory, layer._common.scratch], layer.pages.layout.shape
        assert reads.attention_recorded(query, *recorded, asked).isfinite().all()


def read_divided(view: PagesView, query: Tensor) -> None:
    """In divisions that only other GPUs or longer texts would get, all with the same result."""
    expected = cuda.decode(query, view, AttentionOptions(is_causal=True)).float()
    for shape, splits in DIVISIONS:
        output = cuda.decode(query, view, AttentionOptions(is_causal=True), shape=shape, splits=splits)
        torch.testing.assert_close(output.float(), expected, rtol=2e-2, atol=2e-2)


BLOCK_KINDS: list[Kind] = [kind for kind in KINDS if kind[2] != torch.float32 and kind[0] != 192]


def run_blocks(kind: Kind) -> None:
    """Steps of sequences that begin apart, through a table of blocks in any order: one, several and many new tokens."""
    head_dim, v_head_dim, dtype, num_kv_heads, group = kind
    layout = BlockLayout(num_kv_heads, head_dim, v_head_dim, dtype)
    stored, width = [0, 63, 1], 16
    pool = torch.zeros(3 * width, layout.page_bytes, dtype=torch.uint8, device="cuda")
    table = torch.randperm(len(pool), device="cuda").int().view(3, width)
    sinks = torch.linspace(-1, 2, num_kv_heads * group, device="cuda")
    for new in ([1, 1, 1], [70, 1, 300], [1, 64, 1], [1, 0, 1], [2, 130, 62], [1, 1, 1]):
        tokens = sum(new)
        kv_lens = [before + count if count else 0 for before, count in zip(stored, new, strict=True)]
        starts = (torch.tensor([0, *lens]).cumsum(0).int().cuda() for lens in (new, kv_lens))
        states = [
            torch.randn(1, tokens, heads, width, device="cuda").to(dtype).transpose(1, 2)
            for heads, width in ((num_kv_heads * group, head_dim), (num_kv_heads, head_dim), (num_kv_heads, v_head_dim))
        ]
        known = BlockBatch(table, *starts, max(new), 64 * width, new, kv_lens)
        for batch in (known, replace(known, query_lens=None, kv_lens=None, memo={})):
            pages = BlockPages(pool, layout, batch)
            for asked in (PLAIN._replace(is_causal=True), PLAIN._replace(is_causal=True, softcap=20.0, sinks=sinks)):
                assert cuda.attend_blocks(*states, pages, asked).isfinite().all()
        cuda.append_blocks(*states[1:], pages)
        stored = [before + count for before, count in zip(stored, new, strict=True)]


if __name__ == "__main__":
    if "blocks" in sys.argv[1:]:
        for each in BLOCK_KINDS:
            run_blocks(each)
        torch.cuda.synchronize()
        print("ok")
        sys.exit()
    importlib.import_module("quantcache.backends.cuda.shared").EACH_PAGE = math.inf
    for each in KINDS:
        run(Int8Layer(), each)
        run(StaticInt8Layer(CAPACITY), each)
    torch.cuda.synchronize()
    print("ok")
