"""A GPU of the CPU: what the host passes to the CUDA kernels, carried out in torch on the addresses passed.

It takes the arguments apart as the structures in ``csrc/cuda`` declare them and does what the kernels' comments say, by
``reference.py``. It stands in for the driver, not for the kernels: how they divide and round is tested on a GPU alone.
"""

import ctypes
import importlib
import itertools
import math
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from quantcache.backends import dispatch, torch_blocks
from quantcache.backends.blocks import BlockBatch, BlockLayout, BlockPages
from quantcache.backends.cuda import nvrtc
from quantcache.backends.cuda.launch import DTYPES, Gpu, Kernel
from quantcache.quantization import reference
from quantcache.quantization.options import AttentionOptions
from quantcache.quantization.scheme import PAGE_SIZE
from quantcache.store.growing import Int8Pages

H200 = Gpu(arch="sm_90", processors=132, shared_per_processor=233472, shared_per_block=232448)

GRID_LIMITS = 2**31 - 1, 65535, 65535
MAX_THREADS = 1024

ATTENTION, PREFILL, PAGES, PLAN, ADVANCE, SHARED, BLOCKS = MODULES = [
    importlib.import_module(f"quantcache.backends.cuda.{name}")
    for name in ("attention", "prefill", "pages", "plan", "advance", "shared", "blocks")
]
LAUNCH = importlib.import_module("quantcache.backends.cuda.launch")

ELEMENT_TYPES: dict[int, torch.dtype] = {number: dtype for dtype, number in DTYPES.items()} | {3: torch.bool}

LETTERS = {"i64": "q", "int": "i", "float": "f", "Segment": "PPPPq", "RowTable": "Pq", "BlockTable": "PqPqPP"}
"""Of ``struct``, for the C types; a pointer is a P."""

STRUCTURES = {  # kernel: source, structure, how the host packs it
    "attention": ("attention.cu", "AttentionArgs", ATTENTION.ATTENTION_ARGS),
    "prefill": ("prefill.cu", "PrefillArgs", PREFILL.PREFILL_ARGS),
    "merge_parts": ("prefill.cu", "PrefillArgs", PREFILL.PREFILL_ARGS),
    "scan_mask": ("prefill.cu", "ScanArgs", PREFILL._SCAN_ARGS),
    "append": ("pages.cu", "AppendArgs", PAGES._APPEND_ARGS),
    "store_pages": ("pages.cu", "StoreArgs", PAGES._STORE_ARGS),
    "restore": ("pages.cu", "RestoreArgs", PAGES._RESTORE_ARGS),
    "advance": ("pages.cu", "AdvanceArgs", ADVANCE._ADVANCE_ARGS),
    "append_blocks": ("pages.cu", "AppendBlocksArgs", BLOCKS._APPEND_BLOCKS_ARGS),
}


def fields(source: str, structure: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, letters of ``struct`` and array bounds of each field that a source declares."""
    text = nvrtc.program_text(source)
    constants = dict(re.findall(r"constexpr int (\w+) = (\d+);", text))
    body = re.search(rf"struct {structure} {{(.*?)\n}};", text, re.DOTALL)
    assert body is not None, f"{source} declares no {structure}"
    for declaration in re.sub(r"//.*", "", body[1]).split(";"):
        if not declaration.strip():
            continue
        kind, names = re.fullmatch(r"\s*((?:const )?\w+\*? )(.*)", declaration, re.DOTALL).groups()  # type: ignore[union-attr]
        kind = kind.replace("const ", "").strip()
        letters = "P" if kind.endswith("*") else LETTERS[kind]
        for name in names.split(","):
            bare, *bounds = re.findall(r"\w+", name)
            yield bare, letters, tuple(int(constants.get(bound, bound)) for bound in bounds)


def packed_letters(form: struct.Struct) -> str:
    """The format of a structure without repeat counts."""
    return "".join(letter * int(count or 1) for count, letter in re.findall(r"(\d*)(\w)", form.format))


def declared_letters(source: str, structure: str) -> str:
    """The same of what a source declares."""
    return "".join(letters * math.prod(bounds) for _, letters, bounds in fields(source, structure))


def taken_apart(kernel: str, packed: bytes) -> SimpleNamespace:
    """The fields of a packed structure, arrays as nested tuples."""
    source, structure, form = STRUCTURES[kernel]
    values = iter(form.unpack(packed))
    arguments = {}
    for name, letters, bounds in fields(source, structure):
        flat = [next(values) for _ in range(len(letters) * math.prod(bounds))]
        for bound in reversed((*bounds, len(letters))[1:] if len(letters) > 1 else bounds[1:]):
            flat = [tuple(flat[i : i + bound]) for i in range(0, len(flat), bound)]
        arguments[name] = tuple(flat) if bounds or len(letters) > 1 else flat[0]
    return SimpleNamespace(**arguments)


def memory(address: int, dtype: torch.dtype, shape: Sequence[int], strides: Sequence[int] | None = None) -> Tensor:
    """What lies at an address, shared."""
    if strides is None:
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    if 0 in shape:
        return torch.empty(*shape, dtype=dtype)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    raw = (ctypes.c_byte * (extent * dtype.itemsize)).from_address(address)
    return torch.frombuffer(raw, dtype=dtype).as_strided(tuple(shape), tuple(strides))


class Arguments:
    """The arguments of one launch, with what the kernels derive from them."""

    def __init__(self, kernel: str, macros: dict[str, int], grid: tuple[int, int, int], packed: bytes) -> None:
        self.given = taken_apart(kernel, packed)
        self.grid, self.macros = grid, macros
        self.widths = macros["HEAD_DIM"], macros["V_HEAD_DIM"]
        self.dtype = ELEMENT_TYPES[macros["DTYPE"]]

    def states(self, address: int, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
        """States whose last stride is 1; the kernels read four elements at once, and need the alignment for it."""
        assert not address % (4 * self.dtype.itemsize)
        assert not any(stride % 4 for stride in strides)
        return memory(address, self.dtype, shape, (*strides, 1))

    def pages(self, is_key: bool, num_pages: int, heads: int) -> tuple[Tensor, Tensor]:
        """Codes (pages, heads, 64, width) and metadata (pages, heads, width or 64, 2), as the sequences read them."""
        given = self.given
        few = given.few if hasattr(given, "few") else (given.only,)
        entries = [*map(list, few[: max(given.num_segments, 1)]), [0, 0, 0, 0, num_pages]]
        if given.num_segments > len(few):
            entries = memory(given.segments, torch.int64, (given.num_segments + 1, 5)).tolist()
            assert entries[-1][4] == given.num_pages
        width = self.widths[0 if is_key else 1]
        qdata, metadata = [], []
        for entry, following in itertools.pairwise(entries):
            first, rows = entry[4] & 0xFFFFFFFF, entry[4] >> 32
            count = min(following[4] & 0xFFFFFFFF, num_pages) - first
            if count <= 0:
                continue
            key, key_words, value, value_words = entry[:4]
            codes, words = (key, key_words) if is_key else (value, value_words)
            stored = rows * given.num_kv_heads if self.macros["HAS_ROW_TABLE"] else heads
            parts = [
                memory(codes, torch.int8, (count, stored, PAGE_SIZE, width)),
                memory(words, torch.int16, (count, stored, width if is_key else PAGE_SIZE, 2)),
            ]
            assert (rows > 0) == bool(self.macros["HAS_ROW_TABLE"])
            if rows:
                table = self.row_table(num_pages, heads // given.num_kv_heads)[:, first : first + count]
                by_row = [part.unflatten(1, (rows, given.num_kv_heads)) for part in parts]
                parts = [reference.select_rows(part, table).flatten(1, 2) for part in by_row]
            qdata.append(parts[0])
            metadata.append(parts[1])
        if not qdata:
            qdata.append(torch.empty(0, heads, PAGE_SIZE, width, dtype=torch.int8))
            metadata.append(torch.empty(0, heads, width if is_key else PAGE_SIZE, 2, dtype=torch.int16))
        return torch.cat(qdata), torch.cat(metadata)

    def row_table(self, num_pages: int, batch: int) -> Tensor:
        """Int32 (batch, num_pages), where there is one."""
        address, stride = self.given.row_table
        return memory(address, torch.int32, (batch, num_pages), (stride, 1))


def quantize(given: SimpleNamespace, which: int, states: Tensor, first: int = 0) -> None:
    """Write states as the pages from ``first`` on of the keys or the values."""
    make = reference.quantize_value_pages if which else reference.quantize_key_pages
    for address, part in zip((given.qdata[which], given.metadata[which]), make(states), strict=True):
        memory(address, part.dtype, (first + len(part), *part.shape[1:]))[first:] = part


def append(args: Arguments) -> None:
    given = args.given
    rows, position = (given.batch, given.num_kv_heads), given.position
    for which, width in enumerate(args.widths):
        assert 4 * 256 * args.grid[0] >= math.prod(rows) * given.tokens * width
        states = args.states(given.states[which], (*rows, given.tokens, width), given.stride[which])
        tail = args.states(given.tail[which], (*rows, position + given.tokens, width), given.tail_stride[which])
        tail[:, :, position:] = states


def store_pages(args: Arguments) -> None:
    given = args.given
    pages, heads, layers = args.grid
    assert not layers % 2
    assert heads * layers // 2 >= given.num_heads
    batch = given.num_heads // given.num_kv_heads
    for which, width in enumerate(args.widths):
        shape = batch, given.num_kv_heads, pages * PAGE_SIZE, width
        quantize(given, which, args.states(given.states[which], shape, given.stride[which]))


def restored(args: Arguments, is_key: bool, num_pages: int, heads: int, dtype: torch.dtype) -> Tensor:
    """Closed pages, dense: (heads, tokens, width)."""
    qdata, metadata = args.pages(is_key, num_pages, heads)
    restore_pages = reference.restore_key_pages if is_key else reference.restore_value_pages
    return restore_pages(qdata[:, None], metadata[:, None], dtype)[0]


def restore(args: Arguments) -> None:
    given = args.given
    width = args.widths[0 if given.is_key else 1]
    blocks, heads, _ = args.grid
    assert blocks == given.num_pages + (given.tail_len > 0)
    batch = given.heads_in_all // given.num_kv_heads
    tail = args.states(given.tail, (batch, given.num_kv_heads, given.tail_len, width), given.tail_stride)
    dense = torch.cat(
        [restored(args, bool(given.is_key), given.num_pages, given.heads_in_all, args.dtype), tail.flatten(0, 1)], 1
    )
    part = dense[given.first_head : given.first_head + heads]
    memory(given.output, args.dtype, part.shape).copy_(part)


def block_pages(args: Arguments, num_kv_heads: int, sequences: int) -> BlockPages:
    """The pool that a launch reads, as far as its sequences go."""
    address, block_bytes, blocks, stride, *starts = args.given.block_table
    assert not (address | block_bytes) % 16
    cu_seqlens_q, cu_seqlens_k = (memory(start, torch.int32, (sequences + 1,)).clone() for start in starts)
    layout = BlockLayout(num_kv_heads, *args.widths, args.dtype)
    assert layout.open_blocks == 1
    kv_lens = cu_seqlens_k.diff().tolist()
    width = max(map(layout.peak_blocks, kv_lens))
    table = memory(blocks, torch.int32, (sequences, max(min(width, stride), 1)), (stride, 1))
    pool = memory(address, torch.uint8, (int(table.max()) + 1, layout.page_bytes), (block_bytes, 1))
    batch = BlockBatch(table, cu_seqlens_q, cu_seqlens_k, int(cu_seqlens_q.diff().max()), max(kv_lens))
    return BlockPages(pool, layout, batch)


def attend_blocks(args: Arguments, sequences: int, is_single: bool) -> None:
    """What sequences with one new token, or those with more, attend to."""
    given = args.given
    assert (given.is_causal, given.mask, given.lengths, given.row_table) == (1, 0, 0, (0, 0))
    pages = block_pages(args, given.num_kv_heads, sequences)
    starts = pages.batch.cu_seqlens_q.tolist()
    states = []
    for (address, strides), heads, width in zip(
        [(given.query, given.query_stride), *tails(args)],
        (given.num_kv_heads * given.group, given.num_kv_heads, given.num_kv_heads),
        (args.widths[0], *args.widths),
        strict=True,
    ):
        token, head, _ = strides
        assert strides == (token, head, token)
        states.append(args.states(address, (1, heads, starts[-1], width), (0, head, token))[:, :, starts[0] :])
    sinks = memory(given.sinks, torch.float32, (states[0].shape[1],)) if given.sinks else None
    asked = AttentionOptions(None, True, given.softmax_scale, given.window or None, given.softcap or None, sinks)
    found = torch_blocks.attend_blocks(*states, pages, asked)
    output = memory(given.output, args.dtype, (1, starts[-1], *found.shape[2:]))
    for first, last in itertools.pairwise(starts):
        if last > first and (last - first == 1) == is_single:
            output[:, first:last] = found[:, first - starts[0] : last - starts[0]]


def append_blocks(args: Arguments) -> None:
    given = args.given
    _, num_kv_heads, sequences = args.grid
    pages = block_pages(args, num_kv_heads, sequences)
    tokens = int(pages.batch.cu_seqlens_q[-1])
    states = [
        args.states(address, (1, num_kv_heads, tokens, width), (0, *strides))
        for address, strides, width in zip(given.states, given.stride, args.widths, strict=True)
    ]
    torch_blocks.append_blocks(*states, pages)


def attention(args: Arguments) -> None:
    given = args.given
    splits, batch = args.grid[0], given.batch
    if args.macros["HAS_BLOCK_TABLE"]:
        row_tiles = -(-given.group // (8 * args.macros["ROW_TILES"]))
        assert args.grid == (given.num_splits, given.num_kv_heads * row_tiles, batch)
        attend_blocks(args, batch, is_single=True)
        if splits > 1:
            rows = (given.partial_sums - given.partial) // 4 // args.widths[1]
            assert rows >= math.prod(args.grid) * 8 * args.macros["ROW_TILES"]
            assert not memory(given.counters, torch.int32, (math.prod(args.grid[1:]),)).any()
            assert given.partial == given.counters + 4 * ATTENTION.NUM_COUNTERS
            memory(given.partial, torch.float32, (rows * (args.widths[1] + 2),)).fill_(torch.nan)
        return
    row_tiles = given.num_kv_heads * -(-given.group * given.query_len // (8 * args.macros["ROW_TILES"]))
    if args.macros["FOLDS_GRID"]:
        assert args.grid[1] * args.grid[2] >= row_tiles * batch
    else:
        assert args.grid[1:] == (row_tiles, batch)
    assert 1 <= given.page_splits <= given.num_splits == splits
    num_pages, tail_len = live_lengths(args)
    heads = batch, given.num_kv_heads
    for which, (address, strides) in enumerate(tails(args)):
        if given.num_new:
            width = args.widths[which]
            tail = args.states(address, (*heads, tail_len, width), strides)
            new = args.states(given.new_states[which], (*heads, given.num_new, width), given.new_stride[which])
            tail[:, :, tail_len - given.num_new :] = new
    if given.shared_parts:
        attend_merging(args, num_pages, tail_len)
    else:
        attend(args, num_pages, tail_len)
    if splits > 1:
        _leave_partial_results(given, splits, row_tiles * batch, args.widths[1])


def live_lengths(args: Arguments) -> tuple[int, int]:
    """Pages and tokens of the tail that there are when a kernel runs."""
    given = args.given
    if not given.lengths:
        return given.num_pages, given.tail_len
    num_pages, tail_len = memory(given.lengths, torch.int32, (2,)).tolist()
    return num_pages, tail_len


def tails(args: Arguments) -> list[tuple[int, tuple[int, ...]]]:
    """Addresses and strides of the keys and the values that are exact."""
    given = args.given
    return [(given.key_tail, given.key_tail_stride), (given.value_tail, given.value_tail_stride)]


def attend(args: Arguments, num_pages: int, tail_len: int, hidden: Tensor | None = None) -> None:
    """Write the output that is asked for, with nothing of the keys that are ``hidden`` besides."""
    query, dense, asked = attended(args, num_pages, tail_len, hidden)
    output = reference.attend(query, *dense, asked)
    memory(args.given.output, args.dtype, output.shape).copy_(output)


def attended(
    args: Arguments, num_pages: int, tail_len: int, hidden: Tensor | None = None
) -> tuple[Tensor, list[Tensor], AttentionOptions]:
    """The query, the dense keys and values, and the options of a launch, whose mask hides what is ``hidden``, too."""
    given = args.given
    heads = given.batch, given.num_kv_heads
    dense = []
    for which, (address, strides) in enumerate(tails(args)):
        width = args.widths[which]
        # Who reads nothing of the tail is not told where it is.
        tail = args.states(address, (*heads, tail_len, width), strides) if address else torch.zeros(1)
        tail = tail.expand(*heads, tail_len, width)
        pages = restored(args, which == 0, num_pages, math.prod(heads), torch.float32)
        dense.append(torch.cat([pages.view(*heads, -1, width), tail.float()], dim=2))
    num_q_heads, kv_len = given.num_kv_heads * given.group, num_pages * PAGE_SIZE + tail_len
    query = args.states(given.query, (given.batch, num_q_heads, given.query_len, args.widths[0]), given.query_stride)
    mask = None
    if given.mask:
        mask_shape = given.batch, num_q_heads, given.query_len, kv_len
        mask = memory(given.mask, ELEMENT_TYPES[given.mask_dtype], mask_shape, given.mask_stride)
        if hidden is not None:
            mask = mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, -torch.inf)
    asked = AttentionOptions(
        mask,
        bool(given.is_causal),
        given.softmax_scale,
        given.window or None,
        given.softcap or None,
        memory(given.sinks, torch.float32, (num_q_heads,)) if given.sinks else None,
    )
    return query, dense, asked


def shared_keys(args: Arguments, num_pages: int, kv_len: int) -> Tensor:
    """Whether a neighbour of a sequence, one of those looked at together, reads the same key, bool (batch, kv_len)."""
    given = args.given
    table = args.row_table(num_pages, given.batch)
    groups = torch.arange(given.batch) // given.sequences
    joined = (table[1:] == table[:-1]) & (groups[1:] == groups[:-1])[:, None]
    nobody = torch.zeros(1, num_pages, dtype=torch.bool)
    is_shared = torch.cat([nobody, joined]) | torch.cat([joined, nobody])
    keys = torch.zeros(given.batch, kv_len, dtype=torch.bool)
    keys[:, : num_pages * PAGE_SIZE] = is_shared.repeat_interleave(PAGE_SIZE, 1)
    return keys


def attend_partly(args: Arguments, lengths: tuple[int, int], keys: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over some of the keys, bool (batch, kv_len), of values times weights and of weights.

    Both float64, (batch, query_len, num_q_heads, v_head_dim or 1).
    """
    query, (key, value), asked = attended(args, *lengths)
    seen = keys[:, None, None]
    mask = seen if asked.attn_mask is None else asked.attn_mask
    mask = mask & seen if mask.dtype == torch.bool else mask.double().masked_fill(~seen, -torch.inf)
    # Beside a sink of the weight 1 a value of 1 has its share of the sum, which tells the sum.
    asked = asked._replace(attn_mask=mask, sinks=torch.zeros(query.shape[1]))
    ones = torch.ones(*value.shape[:3], 1)
    output = reference.attend(query.double(), key, torch.cat([value, ones], dim=3), asked)
    output = output / (1 - output[..., -1:])
    return output[..., :-1], output[..., -1:]


def attend_merging(args: Arguments, num_pages: int, tail_len: int) -> None:
    """Write the output: of the keys that a sequence reads alone, and of the parts that were found for the others."""
    given = args.given
    shared = shared_keys(args, num_pages, num_pages * PAGE_SIZE + tail_len)
    total, weights = attend_partly(args, (num_pages, tail_len), ~shared)
    batch, query_len, num_q_heads, v_head_dim = total.shape
    tiles = -(-batch // given.sequences)
    shape = given.num_kv_heads, tiles, given.shared_parts, given.shared_rows
    partial = memory(given.shared_partial, torch.float32, (*shape, v_head_dim)).double()
    sums = memory(given.shared_sums, torch.float32, (*shape, 2)).double()
    found = sums[..., :1].exp2() * torch.cat([partial, sums[..., 1:]], dim=4)
    rows = found.sum(2)[:, :, : given.sequences * given.group * query_len]
    rows = rows.reshape(given.num_kv_heads, tiles * given.sequences, given.group, query_len, -1)[:, :batch]
    rows = rows.permute(1, 3, 0, 2, 4).reshape(batch, query_len, num_q_heads, -1)
    total, weights = total + rows[..., :-1], weights + rows[..., -1:]
    if given.sinks:
        weights = weights + memory(given.sinks, torch.float32, (num_q_heads,)).double().exp()[:, None]
    output = total / torch.where(weights == 0, 1.0, weights)
    memory(given.output, args.dtype, output.shape).copy_(output)


def leave_parts(args: Arguments, num_pages: int, tail_len: int) -> None:
    """The parts of what neighbours share: all in the first split, and nothing in the others."""
    given, shape = args.given, built_as(args)
    assert not any([given.sinks, given.key_tail, given.value_tail])
    assert 1 < given.sequences <= SHARED.MAX_SEQUENCES
    rows_each = given.group * given.query_len
    assert given.sequences * rows_each <= shape.rows
    assert given.row_tiles == -(-given.batch // given.sequences)
    assert args.grid == (given.num_kv_heads * given.row_tiles * given.num_splits, 1, 1)
    keys = shared_keys(args, num_pages, num_pages * PAGE_SIZE + tail_len)
    total, weights = attend_partly(args, (num_pages, tail_len), keys)
    shape_of_parts = given.num_kv_heads, given.row_tiles, given.num_splits, shape.rows
    partial = memory(given.partial, torch.float32, (*shape_of_parts, args.widths[1]))
    sums = memory(given.sums, torch.float32, (*shape_of_parts, 2))
    assert given.sums == given.partial + 4 * partial.numel()
    partial.zero_(), sums[..., 0].fill_(-1e30), sums[..., 1].zero_()
    for sequence in range(given.batch):
        tile, place = divmod(sequence, given.sequences)
        rows = slice(place * rows_each, (place + 1) * rows_each)
        for found, target in ((total, partial), (weights, sums[..., 1:])):
            by_head = found[sequence].unflatten(1, (given.num_kv_heads, given.group))
            target[:, tile, 0, rows] = by_head.permute(1, 2, 0, 3).flatten(1, 2).float()
        sums[:, tile, 0, rows, 0] = 0.0


def built_as(args: Arguments) -> Any:
    names = "ROW_TILES", "WARPS", "TILE_KEYS", "BUFFERS", "WARPGROUP", "AT_ONCE"
    return PREFILL.Shape(*(args.macros[name] for name in names))


def prefill(args: Arguments) -> None:
    given = args.given
    shape = built_as(args)
    assert args.macros["SHARED_BYTES"] == shape.shared_bytes(*args.widths)
    num_pages, tail_len = live_lengths(args)
    if args.macros["SHARES_PAGES"]:
        passed_over(given, num_pages * PAGE_SIZE + tail_len)
        leave_parts(args, num_pages, tail_len)
        return
    if args.macros["HAS_BLOCK_TABLE"]:
        assert args.grid == (given.num_kv_heads * given.row_tiles * given.num_splits, 1, 1)
        query_lens = memory(given.block_table[4], torch.int32, (given.sequences + 1,)).diff().tolist()
        assert given.row_tiles >= sum(-(-given.group * count // shape.rows) for count in query_lens if count > 1)
        if given.num_splits == 1:
            attend_blocks(args, given.sequences, is_single=False)
        return
    assert given.row_tiles == -(-given.group * given.query_len // shape.rows)
    heads = given.batch * given.num_kv_heads
    assert args.grid == (heads * given.row_tiles * given.num_splits, 1, 1)
    if given.num_splits == 1:
        attend(args, num_pages, tail_len, passed_over(given, num_pages * PAGE_SIZE + tail_len))
        return
    rows = heads * given.row_tiles * given.num_splits * shape.rows
    assert given.sums == given.partial + 4 * rows * args.widths[1]
    memory(given.partial, torch.float32, (rows * (args.widths[1] + 2),)).fill_(torch.nan)


def passed_over(given: SimpleNamespace, kv_len: int) -> Tensor | None:
    """The keys whose blocks are not read for a query, bool (batch, num_q_heads, query_len, kv_len); None: none are."""
    if given.mask:
        every = given.batch, given.num_kv_heads * given.group, given.query_len, kv_len
        mask = memory(given.mask, ELEMENT_TYPES[given.mask_dtype], every, given.mask_stride)
        # Every query block that a query may look at, at the strides that the kernel uses.
        blocks = memory(
            given.blocks,
            torch.uint8,
            (*every[:2], -(-given.query_len // PREFILL.BLOCK_QUERIES), -(-kv_len // PAGE_SIZE)),
            (*given.block_stride, 1),
        )
        seen = mask if mask.dtype == torch.bool else mask != -torch.inf
        read = read_blocks(given, blocks).repeat_interleave(PREFILL.BLOCK_QUERIES, 2)[:, :, : given.query_len]
        hidden = ~read.repeat_interleave(PAGE_SIZE, 3)[..., :kv_len]
        if mask.dtype == torch.bool:
            assert not (hidden & seen).any()
        else:  # what is faint may be passed over, and must weigh nothing
            assert (mask[hidden] <= torch.finfo(mask.dtype).min / 2).all()
        return hidden
    return None


def read_blocks(given: SimpleNamespace, blocks: Tensor) -> Tensor:
    """Which blocks of a mask are read for which blocks of queries."""
    seen, faint = blocks & 1 != 0, blocks & 4 != 0
    if given.sighted:
        sighted = memory(given.sighted, torch.int32, blocks.shape[:3], given.sighted_stride)
        faint = faint & (sighted != -1)[..., None]
    return seen | faint


def merge_parts(args: Arguments) -> None:
    given = args.given
    assert given.num_splits > 1
    warps = built_as(args).threads // 32
    if args.macros["HAS_BLOCK_TABLE"]:
        assert args.grid[0] * warps >= given.num_kv_heads * given.row_tiles * built_as(args).rows
        attend_blocks(args, given.sequences, is_single=False)
        return
    assert args.grid[0] * warps >= given.batch * given.num_kv_heads * given.group * given.query_len
    num_pages, tail_len = live_lengths(args)
    attend(args, num_pages, tail_len, passed_over(given, num_pages * PAGE_SIZE + tail_len))


def scan_mask(args: Arguments) -> None:
    given = args.given
    shape = given.batch, given.heads, given.queries, given.kv_len
    mask = memory(given.mask, ELEMENT_TYPES[given.mask_dtype], shape, given.stride)
    blocks = -(-given.queries // PREFILL.BLOCK_QUERIES), -(-given.kv_len // PAGE_SIZE)
    is_bool = mask.dtype == torch.bool
    seen = mask if is_bool else ~(mask <= torch.finfo(mask.dtype).min / 2)
    faint, whole = (mask, mask) if is_bool else (mask != -torch.inf, mask == 0)

    def in_blocks(elements: torch.Tensor, elsewhere: bool) -> torch.Tensor:
        padded = torch.full((*shape[:2], blocks[0] * PREFILL.BLOCK_QUERIES, blocks[1] * PAGE_SIZE), elsewhere)
        padded[:, :, : given.queries, : given.kv_len] = elements
        return padded.view(*shape[:2], blocks[0], PREFILL.BLOCK_QUERIES, blocks[1], PAGE_SIZE).transpose(3, 4)

    any_, faint = (in_blocks(elements, False).flatten(4).any(-1) for elements in (seen, faint))
    found = any_ + 4 * (faint & ~any_) + 2 * ~in_blocks(whole, True).flatten(4).all(-1)
    memory(given.blocks, torch.uint8, found.shape).copy_(found)
    assert bool(given.sighted) == (not is_bool)
    if given.sighted:
        seq_len = given.kv_len
        if given.lengths:
            num_pages, tail_len = memory(given.lengths, torch.int32, (2,)).tolist()
            seq_len = num_pages * PAGE_SIZE + tail_len
        rows = (
            in_blocks(seen & (torch.arange(given.kv_len) < seq_len), False).any(5).any(3)
        )  # (batch, heads, query blocks, BLOCK_QUERIES)
        rows.flatten(2)[..., given.queries :] = True
        bits = (rows.long() << torch.arange(PREFILL.BLOCK_QUERIES)).sum(-1)
        words = memory(given.sighted, torch.int32, bits.shape)
        assert not words.any()
        words.copy_(bits - (bits >> 31 << 32))


def _leave_partial_results(given: SimpleNamespace, splits: int, tiles: int, v_head_dim: int) -> None:
    """Partial results are garbage for whoever comes next; counters begin and end at zero."""
    known = [*ATTENTION._workspaces.values(), *SCRATCHES]
    (workspace,) = (w for w in known if w.data_ptr() == given.counters)
    assert tiles <= ATTENTION.NUM_COUNTERS
    assert not memory(given.counters, torch.int32, (tiles,)).any()
    rows = (given.partial_sums - given.partial) // 4 // v_head_dim
    assert rows >= tiles * splits
    assert given.partial == given.counters + 4 * ATTENTION.NUM_COUNTERS
    assert given.partial_sums + 8 * rows <= given.counters + workspace.nbytes
    memory(given.partial, torch.float32, (rows * (v_head_dim + 2),)).fill_(torch.nan)


def advance(args: Arguments) -> None:
    given = args.given
    pages, tokens, in_all = memory(given.source_lengths, torch.int32, (3,)).tolist()
    closing = min(max(tokens - given.residual_length, 0) // PAGE_SIZE, given.capacity - pages)
    rest = min(tokens - closing * PAGE_SIZE, given.tail_capacity)
    stored = given.new_tokens if rest + given.new_tokens <= given.tail_capacity else 0
    heads = given.num_heads // given.num_kv_heads, given.num_kv_heads
    for which, width in enumerate(args.widths):
        source = args.states(given.source[which], (*heads, tokens, width), given.source_stride[which]).clone()
        new = args.states(given.states[which], (*heads, given.new_tokens, width), given.states_stride[which])
        if closing:
            quantize(given, which, source[:, :, : closing * PAGE_SIZE], pages)
        tail = memory(given.tail[which], args.dtype, (*heads, given.tail_capacity, width))
        tail[:, :, :rest] = source[:, :, closing * PAGE_SIZE : closing * PAGE_SIZE + rest]
        tail[:, :, rest : rest + stored] = new[:, :, :stored]
    lengths = torch.tensor([pages + closing, rest + stored, in_all + given.new_tokens], dtype=torch.int32)
    memory(given.lengths, torch.int32, (3,)).copy_(lengths)


SCRATCHES: list[Tensor] = []
"""Made for recorded calls."""


def make_scratch(device: torch.device, v_head_dim: int) -> Tensor:
    SCRATCHES.append(ATTENTION.make_scratch(device, v_head_dim))
    return SCRATCHES[-1]


KERNELS: dict[str, Callable[[Arguments], None]] = {
    "attention": attention,
    "prefill": prefill,
    "merge_parts": merge_parts,
    "scan_mask": scan_mask,
    "append": append,
    "store_pages": store_pages,
    "restore": restore,
    "advance": advance,
    "append_blocks": append_blocks,
}


def load_kernel(
    source: str, macros: nvrtc.Macros, name: str, index: Any, threads: int, shared_bytes: int, arch: str | None = None
) -> Kernel:
    """The emulation of a kernel, where the real one would run."""
    assert arch in (None, "sm_90a", *GENERATIONS)
    assert STRUCTURES[name][0] == source
    assert threads % 32 == 0
    return Kernel((name, dict(macros)), threads, shared_bytes)


def launch(kernel: Kernel, grid: tuple[int, int, int], index: Any, form: struct.Struct, *values: Any) -> None:
    name, macros = kernel.function
    assert form is STRUCTURES[name][2]
    if not all(1 <= size <= limit for size, limit in zip(grid, GRID_LIMITS, strict=True)):
        raise RuntimeError(f"{name}: no GPU takes a grid of {grid}")
    if not 1 <= kernel.threads <= MAX_THREADS or kernel.shared_bytes > H200.shared_per_block:
        raise RuntimeError(f"{name}: no GPU takes {kernel.threads} threads with {kernel.shared_bytes} bytes")
    KERNELS[name](Arguments(name, macros, grid, form.pack(*values)))


def emulate(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have CPU tensors go to the CUDA backend, and its launches here; the kernels, by name, as they are launched."""
    launched: list[str] = []

    def recorded(kernel: Kernel, *arguments: Any, begins_early: bool = False) -> None:
        # What may begin beside the kernel before it is the one that waits for that itself.
        assert not begins_early or (launched[-1:] == ["prefill"] and kernel.function[0] in ("attention", "merge_parts"))
        launched.append(kernel.function[0])
        launch(kernel, *arguments)

    stand_ins = {
        "gpu": lambda index: H200,
        "load_kernel": load_kernel,
        "launch": recorded,
        "current_stream": lambda index: 0,
    }
    for module in MODULES:
        for name, stand_in in stand_ins.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, stand_in)
    monkeypatch.setattr(ATTENTION, "_workspaces", {})
    monkeypatch.setattr(PREFILL, "_known", {})
    monkeypatch.setattr(dispatch.BACKENDS["cuda"], "make_scratch", make_scratch)
    monkeypatch.setattr(dispatch, "choose_backend", lambda device: "cuda")
    monkeypatch.setattr(Int8Pages, "_append_backend", property(lambda pages: pages.backend[0]))
    return launched


GENERATIONS = {
    "sm_80": (108, 167936, 166912),
    "sm_86": (84, 102400, 101376),
    "sm_89": (128, 102400, 101376),
    "sm_90": (132, 233472, 232448),
    "sm_100": (148, 233472, 232448),
    "sm_120": (170, 102400, 101376),
}
"""Processors, and the shared memory of one and of a block: of an A100, RTX A6000, RTX 4090, H200, B200 and RTX 5090."""


def become(monkeypatch: pytest.MonkeyPatch, arch: str) -> None:
    """Have the emulated GPU be one of ``GENERATIONS``."""
    for module in MODULES:
        if hasattr(module, "gpu"):
            monkeypatch.setattr(module, "gpu", lambda index: Gpu(arch, *GENERATIONS[arch]))
    # What was planned and built before was for another.
    monkeypatch.setattr(ATTENTION, "plan_for", PLAN.plan_for.__wrapped__)
    monkeypatch.setattr(PLAN, "_attention_kernel", PLAN._attention_kernel.__wrapped__)
    monkeypatch.setattr(PREFILL, "plan_for", PREFILL.plan_for.__wrapped__)
    monkeypatch.setattr(PREFILL, "kernels_for", PREFILL.kernels_for.__wrapped__)
    monkeypatch.setattr(BLOCKS, "kernels_for", BLOCKS.kernels_for.__wrapped__)
    monkeypatch.setattr(BLOCKS, "plan_single", BLOCKS.plan_single.__wrapped__)
    monkeypatch.setattr(BLOCKS, "_single_kernel", BLOCKS._single_kernel.__wrapped__)


def narrow_grids(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Have grids take ``limit`` CTAs in their second and third axis, so that few heads are too many for one."""
    monkeypatch.setitem(globals(), "GRID_LIMITS", (GRID_LIMITS[0], limit, limit))
    for module in (*MODULES, LAUNCH):
        if hasattr(module, "MAX_GRID"):
            monkeypatch.setattr(module, "MAX_GRID", limit)
    # What was planned before does not know the limit, and this must not outlive it.
    monkeypatch.setattr(ATTENTION, "plan_for", PLAN.plan_for.__wrapped__)
