"""Attention of many query rows over pages and tail, in tensor cores; see ``csrc/cuda/prefill.cu``."""

import functools
import struct
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from quantcache.backends.cuda import nvrtc
from quantcache.backends.cuda.launch import (
    DTYPES,
    MASK_DTYPES,
    NO_BLOCK_TABLE,
    Gpu,
    Kernel,
    current_stream,
    gpu,
    launch,
    load_kernel,
    readable,
)
from quantcache.backends.cuda.pages import FEW_SEGMENTS, SegmentTable, segment_table
from quantcache.backends.protocol import View
from quantcache.quantization.errors import BuildError
from quantcache.quantization.options import AttentionOptions
from quantcache.quantization.scheme import PAGE_SIZE

PREFILL_DTYPES: Final = (torch.bfloat16, torch.float16)

PREFILL_ARGS: Final = struct.Struct("12P 19q 12i 2f " + FEW_SEGMENTS * "4Pq " + "Pq i PqPqPP")
_SCAN_ARGS: Final = struct.Struct("4P 4q 5i")


class Shape(NamedTuple):
    """How the kernel is built for one kind of call; the macros of ``prefill/build.cuh``.

    Attributes:
        row_tiles: tiles of 16 query rows that a warp holds.
        warps: of a CTA with query rows, each its own.
        tile_keys: keys attended to at once, a page or half of one.
        buffers: converted tiles in shared memory.
        is_warpgroup: whether it multiplies by the instructions that only compute capability 9.0 has; further warps then
            make tiles.
        at_once: CTAs that a processor shall hold.
    """

    row_tiles: int
    warps: int
    tile_keys: int
    buffers: int
    is_warpgroup: bool = False
    at_once: int = 1

    @property
    def rows(self) -> int:
        """Query rows of a CTA."""
        return 16 * self.row_tiles * self.warps

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return 32 * self.warps + (self.makers if self.is_warpgroup else 0)

    @property
    def makers(self) -> int:
        """Threads of a CTA that make tiles."""
        is_narrow = self.is_warpgroup and (self.warps, self.tile_keys) != (8, PAGE_SIZE)
        return 128 if is_narrow else 32 * self.warps

    def shared_bytes(self, head_dim: int, v_head_dim: int) -> int:
        """Shared memory of a CTA: the query, tiles, codes on their way, and ``Shared`` of ``prefill/shared.cuh``."""
        keys, key_pitch, widths = self.tile_keys, 2 * head_dim + 16, (head_dim, v_head_dim)
        pieces = sum(-(-keys * width // (16 * self.makers)) for width in widths)
        pitches = [-(-width // 64) * 128 if self.is_warpgroup else 2 * width + 16 for width in widths]
        tiles = self.rows * pitches[0] + self.buffers * keys * sum(pitches) + 16 * self.makers * pieces
        queue = 40 * (48 if self.at_once > 1 else 64) * (PAGE_SIZE // keys) + 4 * 14 + 4 * 3 * _SLOTS
        tables = _SLOTS * (8 * keys + 2 * head_dim) + 2 * _SLOTS * key_pitch
        metadata = _SLOTS // 2 * 4 * (head_dim + keys)
        return tiles + -(-queue // 16) * 16 + tables + self.rows * 20 + metadata


_SLOTS: Final = 8
"""Tiles whose metadata is kept."""


def choose_shape(index: int, rows: int, head_dim: int, v_head_dim: int) -> Shape:
    """``shape_on`` the GPU ``index``."""
    return shape_on(gpu(index), rows, head_dim, v_head_dim)


def shape_on(device: Gpu, rows: int, head_dim: int, v_head_dim: int) -> Shape:
    """The shape for calls with ``rows`` query rows for each KV head."""
    if device.arch == WARPGROUP_ARCH:
        if max(head_dim, v_head_dim) <= 64:
            warps = min((12, 8), key=lambda warps: -(-rows // (16 * warps)) * _TILE_TIME[warps])
            return Shape(1, warps, PAGE_SIZE, 2, True)
        return Shape(1, 8, PAGE_SIZE if head_dim <= 192 and v_head_dim <= 128 else PAGE_SIZE // 2, 2, True)
    row_tiles = 2 if max(head_dim, v_head_dim) <= 128 else 1
    narrow = [Shape(row_tiles, *rest) for rest in ((4, PAGE_SIZE, 1), (4, PAGE_SIZE // 2, 1), (2, PAGE_SIZE // 2, 1))]
    wide = [Shape(row_tiles, 8, PAGE_SIZE, buffers) for buffers in (2, 1)]
    for shape in narrow if rows <= narrow[0].rows else wide + narrow:
        if shape.shared_bytes(head_dim, v_head_dim) <= device.shared_per_block:
            return shape
    raise BuildError(f"the CUDA kernels need more shared memory than the {device.shared_per_block} bytes of this GPU")


_TILE_TIME: Final = {8: 1.25, 12: 1.61}
"""Microseconds of a CTA for a page, by its warps with query rows, at head_dim 64; an H200."""

WARPGROUP_ARCH: Final = "sm_90"
"""What has the instructions of ``common/warpgroup.cuh``; they are built for "sm_90a"."""


def arch_for(device: Gpu, shape: Shape) -> str:
    """What kernels of a shape are built for."""
    return device.arch + "a" * shape.is_warpgroup


class Kernels(NamedTuple):
    """The kernels of one build."""

    shape: Shape
    prefill: Kernel
    merge_parts: Kernel
    scan_mask: Kernel


def macros_for(
    shape: Shape,
    head_dim: int,
    v_head_dim: int,
    dtype: torch.dtype,
    has_mask: bool,
    has_softcap: bool,
    has_row_table: bool = False,
    shares_pages: bool = False,
    has_block_table: bool = False,
) -> nvrtc.Macros:
    """See ``prefill/build.cuh``."""
    return (
        *(("HEAD_DIM", head_dim), ("V_HEAD_DIM", v_head_dim), ("DTYPE", DTYPES[dtype])),
        *(("ROW_TILES", shape.row_tiles), ("WARPS", shape.warps)),
        *(("TILE_KEYS", shape.tile_keys), ("BUFFERS", shape.buffers), ("WARPGROUP", int(shape.is_warpgroup))),
        ("AT_ONCE", shape.at_once),
        *(("HAS_MASK", int(has_mask)), ("HAS_SOFTCAP", int(has_softcap)), ("HAS_ROW_TABLE", int(has_row_table))),
        *(("SHARES_PAGES", int(shares_pages)), ("HAS_BLOCK_TABLE", int(has_block_table))),
        ("SHARED_BYTES", shape.shared_bytes(head_dim, v_head_dim)),
    )


@functools.cache
def kernels_for(
    index: int,
    shape: Shape,
    head_dim: int,
    v_head_dim: int,
    dtype: torch.dtype,
    has_mask: bool,
    has_softcap: bool,
    has_row_table: bool,
    shares_pages: bool = False,
    has_block_table: bool = False,
) -> Kernels:
    """A build for ``macros_for`` the arguments."""
    tables = has_row_table, shares_pages, has_block_table
    macros = macros_for(shape, head_dim, v_head_dim, dtype, has_mask, has_softcap, *tables)
    arch = arch_for(gpu(index), shape)

    def load(name: str, shared_bytes: int) -> Kernel:
        return load_kernel("prefill.cu", macros, name, index, shape.threads, shared_bytes, arch)

    shared_bytes = shape.shared_bytes(head_dim, v_head_dim)
    return Kernels(shape, load("prefill", shared_bytes), load("merge_parts", 0), load("scan_mask", 0))


def choose_splits(index: int, shape: Shape, head_dim: int, v_head_dim: int, tiles: int, num_blocks: int) -> int:
    """Into how many CTAs the keys of one row tile are divided, so that the last ones to run are not few.

    Args:
        index: of the device.
        shape: of the kernel.
        head_dim: of queries and keys.
        v_head_dim: of values.
        tiles: batch * num_kv_heads * row tiles.
        num_blocks: pages of a head, the tail's included.
    """
    device = gpu(index)
    at_once = 2 if 2 * (shape.shared_bytes(head_dim, v_head_dim) + 1024) <= device.shared_per_processor else 1
    slots = device.processors * (at_once if shape.warps <= 4 else 1)

    def time(splits: int) -> float:
        """In units of what a CTA needs for a page."""
        rounds = -(-tiles * splits // slots)
        merging = 0 if splits == 1 else tiles * splits / slots * MERGING_BLOCKS
        return rounds * (num_blocks / splits + STARTING_BLOCKS) + merging

    most = min(num_blocks // MIN_BLOCKS, MAX_SPLITS, MAX_ROUNDS * slots // tiles)
    return min(range(1, max(1, most) + 1), key=time)


MIN_BLOCKS: Final = 4
"""Pages that a CTA should have at least."""

STARTING_BLOCKS: Final = 2
"""Pages in whose time a CTA begins and ends."""

MERGING_BLOCKS: Final = 3
"""Pages in whose time the parts of as many CTAs as run at once are written and merged."""

MAX_ROUNDS: Final = 7
"""Times as many CTAs as run at once that keys are divided for, which bounds the memory of their parts."""

MAX_SPLITS: Final = 32
"""Parts of a row that are merged; more would take longer than they save."""


class Plan(NamedTuple):
    """How one kind of call is launched.

    Attributes:
        kernels: of its build.
        row_tiles: CTAs that the rows of a KV head are divided among.
        num_splits: CTAs that the keys of each are divided among.
        sequences: of which a CTA has the rows, where it attends to what they share; else 0.
    """

    kernels: Kernels
    row_tiles: int
    num_splits: int
    sequences: int = 0


Sizes = tuple[int, int, int, int, int, int]
"""batch, num_kv_heads, query heads of each, query_len, head_dim and v_head_dim of a call."""


def sizes_of(query: Tensor, view: View) -> Sizes:
    """The sizes of a call, for its plan."""
    batch, num_q_heads, query_len, head_dim = query.shape
    _, num_kv_heads, _, v_head_dim = view.buffers[1].shape
    return batch, num_kv_heads, num_q_heads // num_kv_heads, query_len, head_dim, v_head_dim


@functools.lru_cache(maxsize=4096)
def plan_for(
    index: int,
    sizes: Sizes,
    dtype: torch.dtype,
    has_mask: bool,
    has_softcap: bool,
    has_row_table: bool,
    num_blocks: int,
    shape: Shape | None,
    splits: int | None,
) -> Plan:
    """The launch for a kind of call, ``sizes`` as unpacked; ``shape`` and ``splits`` go before those chosen."""
    batch, num_kv_heads, group, query_len, head_dim, v_head_dim = sizes
    rows = group * query_len
    shape = shape or choose_shape(index, rows, head_dim, v_head_dim)
    row_tiles = -(-rows // shape.rows)
    if splits is None:
        splits = choose_splits(index, shape, head_dim, v_head_dim, batch * num_kv_heads * row_tiles, num_blocks)
    kernels = kernels_for(index, shape, head_dim, v_head_dim, dtype, has_mask, has_softcap, has_row_table)
    return Plan(kernels, row_tiles, splits)


def prefill(
    query: Tensor, view: View, options: AttentionOptions, shape: Shape | None = None, splits: int | None = None
) -> Tensor:
    """Attention of any number of query rows, in float16 or bfloat16.

    Args:
        query: see ``reads.attention``, as for every argument not named here.
        view: what is read, nothing of it pending.
        options: see ``AttentionOptions``.
        shape: instead of the one chosen for the call.
        splits: instead of the number chosen.
    """
    table = segment_table(view)
    batch, num_q_heads, query_len, _ = query.shape
    num_blocks = table.num_pages + -(-view.tail_len // PAGE_SIZE)
    asked = options.attn_mask is not None, options.softcap is not None, table.has_row_table
    plan = plan_for(query.device.index, sizes_of(query, view), query.dtype, *asked, num_blocks, shape, splits)
    output = query.new_empty(batch, query_len, num_q_heads, view.buffers[1].shape[3])
    launch_plan(plan, query, view, table, options, output)
    return output


def launch_plan(
    plan: Plan, query: Tensor, view: View, table: SegmentTable, options: AttentionOptions, output: Tensor | None
) -> Tensor | None:
    """Attend as planned, into ``output``, or, if that is None, leaving the parts as they are, and the tail to others.

    Returns:
        float32: the parts of the rows, (KV heads, row tiles, splits, rows, v_head_dim), those not normalised, then
        largest logit in units of log2 and sum of weights of each, (..., 2). None where there are none.
    """
    lengths = view.lengths
    kernels, row_tiles, num_splits, sequences = plan
    attn_mask, is_causal, _, window, softcap, sinks = options
    _, num_q_heads, query_len, head_dim = query.shape
    key_tail, value_tail = view.buffers
    batch, num_kv_heads, _, v_head_dim = value_tail.shape
    index, group = query.device.index, num_q_heads // num_kv_heads
    query, query_address, query0, query1, query2 = readable(query)
    key_address = key0 = key1 = key2 = value_address = value0 = value1 = value2 = 0
    if output is not None:
        key_tail, key_address, key0, key1, key2 = readable(key_tail)
        value_tail, value_address, value0, value1, value2 = readable(value_tail)

    found = _NO_MASK
    if attn_mask is not None:
        if attn_mask.dtype not in MASK_DTYPES:
            attn_mask = attn_mask.float()
        if attn_mask.dim() < 4:
            attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
        # In a recorded step all that there is room for.
        kv_len = table.num_pages * PAGE_SIZE + view.tail_len
        found = _scanned(kernels, attn_mask, kv_len if attn_mask.shape[3] == 1 else attn_mask.shape[3], lengths)
    # Where another rule hides keys, too, a key that the mask shows may be none that is seen.
    sighted = 0 if is_causal or window is not None else found.sighted
    if sinks is not None:
        sinks = sinks.float().contiguous()
    heads = num_kv_heads if sequences else batch * num_kv_heads
    partial, sums, workspace = 0, 0, None
    if num_splits > 1 or output is None:
        rows = heads * row_tiles * num_splits * kernels.shape.rows
        workspace = torch.empty(rows * (v_head_dim + 2), dtype=torch.float32, device=query.device)
        partial = workspace.data_ptr()
        sums = partial + 4 * rows * v_head_dim
    arguments = (
        *(query_address, 0 if output is None else output.data_ptr()),
        *(table.address_beyond(FEW_SEGMENTS), key_address, value_address),
        *(found.mask, found.blocks, sighted),
        *(0 if sinks is None else sinks.data_ptr(), 0 if lengths is None else lengths.data_ptr()),
        *(partial, sums),
        *(query0, query1, query2, key0, key1, key2, value0, value1, value2),
        *found.strides,
        *(num_kv_heads, group, query_len, table.num_pages, view.tail_len, table.num_segments),
        *(num_splits, is_causal, window or 0, found.dtype, batch, row_tiles),
        options.scale(head_dim),
        softcap or 0.0,
        *table.few,
        *table.row_table,
        sequences,
        *NO_BLOCK_TABLE,
    )
    launch(kernels.prefill, (heads * num_splits * row_tiles, 1, 1), index, PREFILL_ARGS, *arguments)
    if num_splits > 1 and output is not None:
        launch_merge(kernels, heads * group * query_len, index, arguments)
    return workspace


def launch_merge(kernels: Kernels, rows: int, index: int, arguments: tuple[Any, ...]) -> None:
    """Queue the merging of the parts of ``rows`` query rows behind the launch with ``arguments`` that finds them."""
    grid = -(-rows // (kernels.shape.threads // 32)), 1, 1
    launch(kernels.merge_parts, grid, index, PREFILL_ARGS, *arguments, begins_early=gpu(index).begins_early)


def _broadcast_strides(tensor: Tensor) -> list[int]:
    return [stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]


BLOCK_QUERIES: Final = 32
"""Queries whose masks are looked at together."""


class _Scanned(NamedTuple):
    """A mask and what was found in it, as launches are told of it.

    Attributes:
        mask: its address; (batch or 1, heads or 1, query_len or 1, kv_len or 1).
        blocks: address of uint8 (batch, heads, query blocks, key blocks).
        sighted: address of int32 (batch, heads, query blocks), a bit for each query that sees some key; 0 for a mask
            of bools.
        strides: four of the mask, three of the blocks and of what is sighted, 0 along an axis of one.
        dtype: of the mask, as the kernels number it.
        kept: the tensors that were made.
    """

    mask: int
    blocks: int
    sighted: int
    strides: tuple[int, ...]
    dtype: int
    kept: tuple[Tensor | None, ...] = ()


_NO_MASK: Final = _Scanned(0, 0, 0, (0,) * 10, 0)


def _scanned(kernels: Kernels, mask: Tensor, kv_len: int, lengths: Tensor | None) -> _Scanned:
    """What ``scan_mask`` finds; once for the layers of a call."""
    stream = current_stream(mask.device.index)
    key: tuple[object, ...] = (mask.data_ptr(), mask.shape, mask.stride(), mask.dtype, kv_len, stream)
    base = mask if mask._base is None else mask._base
    is_bool = mask.dtype == torch.bool
    # What is seen of an additive mask depends on the length, which is one layer's own where the device holds it.
    is_known = not base.is_inference() and (is_bool or lengths is None)
    is_known = is_known and not (mask.is_cuda and torch.cuda.is_current_stream_capturing())
    if is_known:
        key = (*key, base._version)
        for known_key, known_base, known in _known.get(mask.device.index, ()):
            if known_key == key and known_base() is base:
                return known
    batch, heads, queries, _ = mask.shape
    blocks = mask.new_empty(batch, heads, -(-queries // BLOCK_QUERIES), -(-kv_len // PAGE_SIZE), dtype=torch.uint8)
    sighted = None if is_bool else mask.new_zeros(blocks.shape[:3], dtype=torch.int32)
    strides = [*_broadcast_strides(mask), *_broadcast_strides(blocks)[:3]]
    strides += [0] * 3 if sighted is None else _broadcast_strides(sighted)
    addresses = mask.data_ptr(), blocks.data_ptr(), 0 if sighted is None else sighted.data_ptr()
    scanned = _Scanned(*addresses, tuple(strides), MASK_DTYPES[mask.dtype], (blocks, sighted))
    launch(
        kernels.scan_mask,
        (-(-blocks.numel() // (kernels.shape.threads // 32)), 1, 1),
        mask.device.index,
        _SCAN_ARGS,
        *addresses,
        0 if lengths is None else lengths.data_ptr(),
        *strides[:4],
        *(batch, heads, queries, kv_len, scanned.dtype),
    )
    if is_known:
        others = [known for known in _known.get(mask.device.index, ()) if known[1]() is not None]
        _known[mask.device.index] = [(key, TensorWeakRef(base), scanned), *others[: KNOWN_MASKS - 1]]
    return scanned


KNOWN_MASKS: Final = 4
"""Of a device, that are remembered: layers with a window and layers without have masks of their own, and take turns."""

_known: Final[dict[int, list[tuple[object, TensorWeakRef, _Scanned]]]] = {}
"""Of each mask what tells it from others and its memory, and what was found; newest first."""
