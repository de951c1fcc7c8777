"""How the attention kernel is built and divided for one kind of call."""

import functools
from typing import Final, NamedTuple

import torch

from quantcache.backends.cuda import nvrtc
from quantcache.backends.cuda.launch import DTYPES, MAX_GRID, Gpu, Kernel, folded, gpu, load_kernel
from quantcache.quantization.errors import BuildError

HEAD_DIM_STEP: Final = 16
MAX_HEAD_DIM: Final = 256


class Shape(NamedTuple):
    """How the attention kernel is built for one kind of call; the macros of ``attention/build.cuh``.

    Attributes:
        row_tiles: tiles of 8 query rows that a CTA holds.
        warps: of a CTA; each takes its own pages.
        key_step: keys copied and attended to at once.
        stages: steps in a warp's ring of copies.
    """

    row_tiles: int
    warps: int
    key_step: int
    stages: int

    @property
    def rows(self) -> int:
        """Query rows of a CTA."""
        return 8 * self.row_tiles

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return 32 * self.warps

    def shared_bytes(self, head_dim: int, v_head_dim: int, element_size: int, num_splits: int = 1) -> int:
        """Shared memory of a CTA: the query and the rings, and later in their place what is merged."""
        pitch = head_dim + (HEAD_DIM_STEP if head_dim // HEAD_DIM_STEP % 2 == 0 else 0)
        stage = self.key_step * (head_dim + v_head_dim) + 4 * head_dim + 4 * self.key_step
        ring = self.rows * pitch * element_size + self.warps * self.stages * stage
        parts = self.warps * self.rows * (v_head_dim + 2) * 4
        splits = (num_splits + 1) * self.rows * 4 + 16 * self.threads
        return max(ring, parts, splits)


MAX_SPLITS: Final = 128
"""Most CTAs that the last of them merges; the kernel loads their sums in four rounds of 32."""


class Plan(NamedTuple):
    """How one kind of call is launched."""

    kernel: Kernel
    grid: tuple[int, int, int]
    page_splits: int
    num_splits: int
    tiles: int
    partial_rows: int


@functools.lru_cache(maxsize=4096)
def plan_for(
    index: int,
    sizes: tuple[int, int, int, int, int, int],
    dtype: torch.dtype,
    has_mask: bool,
    has_softcap: bool,
    has_row_table: bool,
    num_pages: int,
    shape: Shape | None,
    splits: tuple[int, int] | None,
) -> Plan:
    """The launch for a kind of call, ``sizes`` as unpacked; ``shape`` and ``splits`` go before those chosen."""
    batch, num_kv_heads, group, query_len, head_dim, v_head_dim = sizes
    rows = group * query_len
    if shape is None:
        heads = batch * num_kv_heads
        is_short = heads * num_pages < SHORT * gpu(index).processors
        shape = choose_shape(index, rows, head_dim, v_head_dim, dtype, heads, is_short)
    row_tiles = -(-rows // shape.rows)
    tiles = batch * num_kv_heads * row_tiles
    page_splits, num_splits = splits or choose_splits(index, shape, head_dim, v_head_dim, dtype, tiles, num_pages)
    grid = (num_splits, num_kv_heads * row_tiles, batch)
    if folds := max(grid[1:]) > MAX_GRID:
        grid = (num_splits, *folded(tiles))
    kernel = _attention_kernel(index, shape, head_dim, v_head_dim, dtype, has_mask, has_softcap, has_row_table, folds)
    return Plan(kernel, grid, page_splits, num_splits, tiles, tiles * num_splits * shape.rows)


@functools.cache
def choose_shape(
    index: int, rows: int, head_dim: int, v_head_dim: int, dtype: torch.dtype, heads: int, is_short: bool
) -> Shape:
    """``shape_on`` the GPU ``index``."""
    return shape_on(gpu(index), rows, head_dim, v_head_dim, dtype, heads, is_short)


def shape_on(
    device: Gpu, rows: int, head_dim: int, v_head_dim: int, dtype: torch.dtype, heads: int, is_short: bool
) -> Shape:
    """How the kernel is built for a kind of call; found by trying, see ``docs/benchmarks/cuda-attention.json``.

    Few heads are best served by one large CTA a processor, which leaves few splits to merge, many by small ones.

    Args:
        device: where it runs.
        rows: query rows per KV head.
        head_dim: of queries and keys.
        v_head_dim: of values.
        dtype: of the query.
        heads: KV heads in the whole batch.
        is_short: whether there are only a few pages for each processor.
    """
    step = 32 if head_dim + v_head_dim <= 256 else 16
    row_tiles = 2 if rows > 8 and max(head_dim, v_head_dim) <= 128 else 1
    if max(head_dim, v_head_dim) > 128:
        warps = 8
    elif row_tiles > 1:
        warps = 4
    else:
        warps = 4 if is_short or heads > 1.5 * device.processors else 8
        if heads >= 4 * device.processors and head_dim + v_head_dim > 128:
            step = 16
    element_size = 4 if dtype == torch.float32 else 2
    while True:
        shape = Shape(row_tiles, warps, step, 2)
        if shape.shared_bytes(head_dim, v_head_dim, element_size, MAX_SPLITS + 1) <= device.shared_per_block:
            return shape
        if step > 16:
            step //= 2
        elif warps > 1:
            warps //= 2
        else:
            raise BuildError(
                f"the CUDA kernels need more shared memory than the {device.shared_per_block} bytes of this GPU"
            )


@functools.lru_cache(maxsize=4096)
def choose_splits(
    index: int, shape: Shape, head_dim: int, v_head_dim: int, dtype: torch.dtype, tiles: int, num_pages: int
) -> tuple[int, int]:
    """Into how many CTAs the pages of one head and row tile are divided, and how many there are with the tail's.

    All CTAs run at once if they can; the time is then that of a CTA's pages, of its start and end, and of merging.

    Args:
        index: of the device.
        shape: of the kernel.
        head_dim: of queries and keys.
        v_head_dim: of values.
        dtype: of the query.
        tiles: batch * num_kv_heads * row tiles.
        num_pages: pages of a head.
    """
    device = gpu(index)
    element_size = 4 if dtype == torch.float32 else 2
    registers = 255 if shape.row_tiles > 1 or max(head_dim, v_head_dim) > 128 or element_size == 4 else 128
    shared = shape.shared_bytes(head_dim, v_head_dim, element_size, MAX_SPLITS + 1) + 1024
    blocks = max(1, min(device.shared_per_processor // shared, 65536 // (registers * shape.threads)))
    slots = device.processors * blocks
    rounds = max(1, -(-num_pages // shape.warps))
    start, merge = SPLIT_COST
    most = max(1, min(slots // tiles, rounds, MAX_SPLITS))
    best = min(
        range(1, most + 1),
        key=lambda splits: -(-num_pages // splits) / shape.warps + start + merge * (splits > 1) * splits,
    )
    # A short range of pages would wait for the tail, so that has a CTA of its own.
    if best > 1 and -(-rounds // best) <= 2 and tiles * (best + 1) <= slots:
        return best, best + 1
    return best, best


SPLIT_COST: Final = (1.0, 0.03)
"""In rounds of a page for each key part: starting and ending a CTA, and merging one more split."""

SHORT: Final = 16
"""Pages for each processor below which a call is short."""


def macros_for(
    shape: Shape,
    head_dim: int,
    v_head_dim: int,
    dtype: torch.dtype,
    has_mask: bool,
    has_softcap: bool,
    has_row_table: bool = False,
    folds_grid: bool = False,
    has_block_table: bool = False,
) -> nvrtc.Macros:
    """See ``attention/build.cuh``."""
    return (
        *(("HEAD_DIM", head_dim), ("V_HEAD_DIM", v_head_dim), ("DTYPE", DTYPES[dtype])),
        *(("ROW_TILES", shape.row_tiles), ("WARPS", shape.warps)),
        *(("KEY_STEP", shape.key_step), ("STAGES", shape.stages)),
        *(("HAS_MASK", int(has_mask)), ("HAS_SOFTCAP", int(has_softcap)), ("HAS_ROW_TABLE", int(has_row_table))),
        *(("FOLDS_GRID", int(folds_grid)), ("HAS_BLOCK_TABLE", int(has_block_table))),
    )


@functools.cache
def _attention_kernel(
    index: int,
    shape: Shape,
    head_dim: int,
    v_head_dim: int,
    dtype: torch.dtype,
    has_mask: bool,
    has_softcap: bool,
    has_row_table: bool,
    folds_grid: bool,
) -> Kernel:
    macros = macros_for(shape, head_dim, v_head_dim, dtype, has_mask, has_softcap, has_row_table, folds_grid)
    element_size = 4 if dtype == torch.float32 else 2
    shared_bytes = shape.shared_bytes(head_dim, v_head_dim, element_size, MAX_SPLITS + 1)
    return load_kernel("attention.cu", macros, "attention", index, shape.threads, shared_bytes)
