"""The backend of CUDA kernels: reads the int8 pages where they lie, on NVIDIA GPUs from compute capability 8.0.

The sources in ``csrc/cuda`` are built by NVRTC for the head_dims and the kind of call at hand, see ``nvrtc.py``, and
launched with one packed structure, see the ``Args`` of each source. Nothing here waits for the GPU.
"""

import ctypes
import functools
import struct
import threading
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from quantcache import nvrtc
from quantcache.backends import torch as torch_backend
from quantcache.native import BuildError
from quantcache.scheme import PAGE_SIZE

MIN_CAPABILITY: Final = (8, 0)

HEAD_DIM_STEP: Final = 16
MAX_HEAD_DIM: Final = 256

MAX_FUSED_ROWS: Final = 64
"""Query rows per KV head (group * query_len) from which on a layer is restored and given to torch's attention."""

SCRATCH_BYTES: Final = 256 << 20
"""Bound of the memory a layer is restored to, unless keys and values of a single head take more."""

_DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MASK_DTYPES: Final = {**_DTYPES, torch.bool: 3}

_ATTENTION_ARGS: Final = struct.Struct("11P 13q 12i 2f 4Pq")
_STORE_ARGS: Final = struct.Struct("2P 2P 2P 6q i")
_RESTORE_ARGS: Final = struct.Struct("3P 3q 8i")
_APPEND_ARGS: Final = struct.Struct("2P 2P 12q P 4i")


class Kernel(NamedTuple):
    """A kernel ready to be launched on one device."""

    function: Any
    threads: int
    shared_bytes: int


class Shape(NamedTuple):
    """How the attention kernel is built for one kind of call; the macros of ``attention.cu``.

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


class _Device(NamedTuple):
    """What is asked of a device once."""

    arch: str
    processors: int
    shared_per_processor: int
    shared_per_block: int


MAX_SPLITS: Final = 128
"""Most CTAs that the last of them merges; the kernel loads their sums in four rounds of 32."""


@functools.cache
def _device(index: int) -> _Device:
    from cuda.bindings import driver

    properties = torch.cuda.get_device_properties(index)
    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    return _Device(
        f"sm_{properties.major}{properties.minor}",
        properties.multi_processor_count,
        properties.shared_memory_per_multiprocessor,
        _check(driver.cuDeviceGetAttribute(attribute, index)),
    )


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on ``device``, or None."""
    return _unavailable(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _unavailable(index: int) -> str | None:
    if torch.version.hip is not None:
        return "there are no kernels for AMD GPUs"
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        return (
            f"the CUDA kernels need compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}, "
            f"this GPU has {capability[0]}.{capability[1]}"
        )
    return nvrtc.unavailable()


def unsupported(*states: Tensor) -> str | None:
    """Why the kernels do not cover a call with these states, or None. All options of attention are covered."""
    for tensor in states:
        if tensor.dtype not in _DTYPES:
            return f"the CUDA kernels compute in float32, got {tensor.dtype}"
        head_dim = tensor.shape[-1]
        if head_dim % HEAD_DIM_STEP or head_dim > MAX_HEAD_DIM:
            return f"the CUDA kernels take head_dims up to {MAX_HEAD_DIM} in steps of {HEAD_DIM_STEP}, got {head_dim}"
    return None


def store_pages(
    key_states: Tensor,
    value_states: Tensor,
    key_qdata: Tensor,
    key_metadata: Tensor,
    value_qdata: Tensor,
    value_metadata: Tensor,
) -> None:
    """See ``ops.store_pages``."""
    key_states, key_address, *key_strides = _readable(key_states)
    value_states, value_address, *value_strides = _readable(value_states)
    targets = [(key_qdata, value_qdata), (key_metadata, value_metadata)]
    written = [[t if t.is_contiguous() else torch.empty_like(t).contiguous() for t in pair] for pair in targets]
    batch, num_kv_heads, _, head_dim = key_states.shape
    kernel = _pages_kernel("store_pages", key_states, head_dim, value_states.shape[-1])
    _launch(
        kernel,
        (len(key_qdata), batch * num_kv_heads, 2),
        key_states.device.index,
        _STORE_ARGS,
        *(key_address, value_address),
        *(t.data_ptr() for pair in written for t in pair),
        *key_strides,
        *value_strides,
        num_kv_heads,
    )
    for pair, sources in zip(targets, written, strict=True):
        for target, source in zip(pair, sources, strict=True):
            if target is not source:
                target.copy_(source)


def append_tail(
    key_states: Tensor, value_states: Tensor, key_tail: Tensor, value_tail: Tensor, position: int | Tensor
) -> None:
    """See ``ops.append_tail``; ``position`` may also be an int32 tensor (pages, tail_len) on the device."""
    key_states, key_address, key0, key1, key2 = _readable(key_states)
    value_states, value_address, value0, value1, value2 = _readable(value_states)
    batch, num_kv_heads, tokens, head_dim = key_states.shape
    v_head_dim = value_states.shape[3]
    lengths, start = (position.data_ptr(), 0) if isinstance(position, Tensor) else (0, position)
    kernel = _pages_kernel("append", key_states, head_dim, v_head_dim)
    words = batch * num_kv_heads * tokens * max(head_dim, v_head_dim) // 4
    if not words:
        return
    to_key0, to_key1, to_key2, _ = key_tail.stride()
    to_value0, to_value1, to_value2, _ = value_tail.stride()
    _launch(
        kernel,
        (-(-words // 256), 1, 2),
        key_states.device.index,
        _APPEND_ARGS,
        key_address,
        value_address,
        key_tail.data_ptr(),
        value_tail.data_ptr(),
        *(key0, key1, key2, value0, value1, value2),
        *(to_key0, to_key1, to_key2, to_value0, to_value1, to_value2),
        lengths,
        *(num_kv_heads, batch, tokens, start),
    )


def restore_keys(qdata: Sequence[Tensor], metadata: Sequence[Tensor], tail: Tensor) -> Tensor:
    """See ``ops.restore_keys``."""
    return _restore_all(True, qdata, metadata, tail)


def restore_values(qdata: Sequence[Tensor], metadata: Sequence[Tensor], tail: Tensor) -> Tensor:
    """See ``ops.restore_values``."""
    return _restore_all(False, qdata, metadata, tail)


def attention(
    query: Tensor,
    key_qdata: Sequence[Tensor],
    key_metadata: Sequence[Tensor],
    value_qdata: Sequence[Tensor],
    value_metadata: Sequence[Tensor],
    key_tail: Tensor,
    value_tail: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    softmax_scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """See ``ops.attention``; ``unsupported`` must be None.

    Up to ``MAX_FUSED_ROWS`` query rows per KV head are attended to by the kernel. More of them are arithmetic and no
    longer memory: the layer is restored, a bounded number of heads at a time, and torch's attention reads that.
    """
    table = segment_table(key_qdata, key_metadata, value_qdata, value_metadata)
    _, num_q_heads, query_len, _ = query.shape
    if query_len * num_q_heads > MAX_FUSED_ROWS * key_tail.shape[1] and softcap is None and sinks is None:
        return _attention_of_restored(
            query, table, key_tail, value_tail, attn_mask, is_causal, softmax_scale, window, SCRATCH_BYTES
        )
    return fused_attention(
        query, table, key_tail, value_tail, attn_mask, is_causal, softmax_scale, window, softcap, sinks
    )


class SegmentTable(NamedTuple):
    """Where the pages are, for the kernels.

    Attributes:
        address: of an int64 (segments + 1, 5) on the device: addresses of the four parts, and the first page.
        num_segments: entries without the last, which has only the number of pages.
        num_pages: pages in all of them.
        first: addresses of the four parts of the first segment.
        kept: what must live as long as the table is read.
    """

    address: int
    num_segments: int
    num_pages: int
    first: tuple[int, int, int, int]
    kept: tuple[object, ...]


def segment_table(
    key_qdata: Sequence[Tensor],
    key_metadata: Sequence[Tensor],
    value_qdata: Sequence[Tensor],
    value_metadata: Sequence[Tensor],
) -> SegmentTable:
    """The table of pages given as in ``ops.attention``, remembered by ``ops.Parts``."""
    memo: dict[object, Any] | None = getattr(key_qdata, "memo", None)
    if memo is None:
        return _make_table((key_qdata, key_metadata, value_qdata, value_metadata))
    found = memo.get("cuda")
    if found is None or found[0] is not key_metadata or found[1] is not value_qdata or found[2] is not value_metadata:
        table = _make_table((key_qdata, key_metadata, value_qdata, value_metadata))
        found = memo["cuda"] = key_metadata, value_qdata, value_metadata, table
    made: SegmentTable = found[3]
    return made


def _make_table(parts: Sequence[Sequence[Tensor]]) -> SegmentTable:
    contiguous = [[part.contiguous() for part in kind] for kind in parts]
    rows, first = [], 0
    for segment in zip(*contiguous, strict=True):
        rows += [*(part.data_ptr() for part in segment), first]
        first += len(segment[0])
    rows += [0, 0, 0, 0, first]
    if not contiguous[0]:
        return SegmentTable(0, 0, 0, (0, 0, 0, 0), ())
    # Pinned, so that the copy waits for nothing; torch keeps the pinned memory until the copy is done.
    host = torch.tensor(rows, dtype=torch.int64).pin_memory()
    on_device = host.to(contiguous[0][0].device, non_blocking=True)
    return SegmentTable(on_device.data_ptr(), len(contiguous[0]), first, tuple(rows[:4]), (on_device, contiguous))


def fused_attention(
    query: Tensor,
    table: SegmentTable,
    key_tail: Tensor,
    value_tail: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    softmax_scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    lengths: Tensor | None = None,
    shape: Shape | None = None,
    splits: tuple[int, int] | None = None,
) -> Tensor:
    """Attention in one kernel, for any number of query rows.

    Args:
        query: see ``ops.attention``, as for every argument not named here.
        table: the pages; with ``lengths`` the first of them count.
        key_tail: see ``ops.attention``.
        value_tail: see ``ops.attention``.
        attn_mask: see ``ops.attention``.
        is_causal: see ``ops.attention``.
        softmax_scale: see ``ops.attention``.
        window: see ``ops.attention``.
        softcap: see ``ops.attention``.
        sinks: see ``ops.attention``.
        lengths: int32 (2,) on the device, pages and tail_len in use, read when the kernel runs.
        shape: instead of the one chosen for the call.
        splits: instead of those chosen: splits of the pages, splits in all.
    """
    batch, num_q_heads, query_len, head_dim = query.shape
    _, num_kv_heads, tail_len, v_head_dim = value_tail.shape
    index = query.device.index
    query, query_address, query0, query1, query2 = _readable(query)
    key_tail, key_address, key0, key1, key2 = _readable(key_tail)
    value_tail, value_address, value0, value1, value2 = _readable(value_tail)
    group = num_q_heads // num_kv_heads
    plan = _plan(
        index,
        (batch, num_kv_heads, group, query_len, head_dim, v_head_dim),
        query.dtype,
        attn_mask is not None,
        softcap is not None,
        table.num_pages,
        shape,
        splits,
    )

    mask, mask_strides, mask_dtype = _NO_MASK
    if attn_mask is not None:
        if attn_mask.dtype not in _MASK_DTYPES:
            attn_mask = attn_mask.float()
        strides = [0] * (4 - attn_mask.dim())
        strides += [s if n > 1 else 0 for n, s in zip(attn_mask.shape, attn_mask.stride(), strict=True)]
        mask, mask_strides, mask_dtype = attn_mask.data_ptr(), tuple(strides), _MASK_DTYPES[attn_mask.dtype]
    if sinks is not None:
        sinks = sinks.float().contiguous()
    partial = sums = counters = 0
    if plan.num_splits > 1:
        partial, sums, counters = _workspace(query.device, plan.tiles, plan.partial_rows, v_head_dim)
    output = query.new_empty(batch, query_len, num_q_heads, v_head_dim)
    _launch(
        plan.kernel,
        plan.grid,
        index,
        _ATTENTION_ARGS,
        query_address,
        output.data_ptr(),
        table.address,
        key_address,
        value_address,
        mask,
        0 if sinks is None else sinks.data_ptr(),
        0 if lengths is None else lengths.data_ptr(),
        *(partial, sums, counters),
        *(query0, query1, query2, key0, key1, key2, value0, value1, value2),
        *mask_strides,
        *(num_kv_heads, group, query_len, table.num_pages, tail_len, table.num_segments),
        *(plan.page_splits, plan.num_splits, is_causal, window or 0, mask_dtype, batch),
        softmax_scale,
        softcap or 0.0,
        *table.first,
        0,
    )
    return output


class _Plan(NamedTuple):
    """How one kind of call is launched."""

    kernel: Kernel
    grid: tuple[int, int, int]
    page_splits: int
    num_splits: int
    tiles: int
    partial_rows: int


@functools.lru_cache(maxsize=4096)
def _plan(
    index: int,
    sizes: tuple[int, int, int, int, int, int],
    dtype: torch.dtype,
    has_mask: bool,
    has_softcap: bool,
    num_pages: int,
    shape: Shape | None,
    splits: tuple[int, int] | None,
) -> _Plan:
    batch, num_kv_heads, group, query_len, head_dim, v_head_dim = sizes
    rows = group * query_len
    if shape is None:
        heads = batch * num_kv_heads
        is_short = heads * num_pages < SHORT * _device(index).processors
        shape = choose_shape(index, rows, head_dim, v_head_dim, dtype, heads, is_short)
    row_tiles = -(-rows // shape.rows)
    tiles = batch * num_kv_heads * row_tiles
    page_splits, num_splits = splits or choose_splits(index, shape, head_dim, v_head_dim, dtype, tiles, num_pages)
    kernel = _attention_kernel(index, shape, head_dim, v_head_dim, dtype, has_mask, has_softcap)
    grid = (num_splits, num_kv_heads * row_tiles, batch)
    return _Plan(kernel, grid, page_splits, num_splits, tiles, tiles * num_splits * shape.rows)


_NO_MASK: Final[tuple[int, tuple[int, ...], int]] = (0, (0, 0, 0, 0), 0)


@functools.cache
def choose_shape(
    index: int, rows: int, head_dim: int, v_head_dim: int, dtype: torch.dtype, heads: int, is_short: bool
) -> Shape:
    """How the kernel is built for a kind of call; found by trying, see ``docs/benchmarks/cuda-attention.json``.

    Few heads are best served by one large CTA a processor, which leaves few splits to merge, many by small ones.

    Args:
        index: of the device.
        rows: query rows per KV head.
        head_dim: of queries and keys.
        v_head_dim: of values.
        dtype: of the query.
        heads: KV heads in the whole batch.
        is_short: whether there are only a few pages for each processor.
    """
    device = _device(index)
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
    device = _device(index)
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


def _attention_of_restored(
    query: Tensor,
    table: SegmentTable,
    key_tail: Tensor,
    value_tail: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    softmax_scale: float,
    window: int | None,
    scratch_bytes: int,
) -> Tensor:
    """Torch's attention over a few heads at a time, restored to memory that all layers take in turn."""
    batch, num_q_heads, query_len, _ = query.shape
    num_kv_heads, kv_len = key_tail.shape[1], table.num_pages * PAGE_SIZE + key_tail.shape[2]
    group = num_q_heads // num_kv_heads
    a_head = kv_len * (key_tail.shape[3] + value_tail.shape[3]) * query.element_size()
    at_once = max(1, scratch_bytes // a_head)
    heads_at_once = num_kv_heads if at_once >= num_kv_heads else at_once
    rows_at_once = max(1, at_once // num_kv_heads)
    mask: Any = None
    if attn_mask is not None or window is not None:
        mask = torch_backend.combined_mask(query, kv_len, attn_mask, is_causal, window)
        mask = mask.expand(-1, num_q_heads if mask.shape[1] > 1 else 1, -1, -1)
    elif is_causal and query_len > 1:
        from torch.nn.attention.bias import causal_lower_right  # half a second: it brings torch's compiler

        mask = causal_lower_right(query_len, kv_len)
    output = query.new_empty(batch, query_len, num_q_heads, value_tail.shape[3])
    for row in range(0, batch, rows_at_once):
        rows = min(rows_at_once, batch - row)
        for head in range(0, num_kv_heads, heads_at_once):
            heads = min(heads_at_once, num_kv_heads - head)
            first = row * num_kv_heads + head
            shape = (rows, heads, kv_len)
            key = _restore(True, table, key_tail, shape, first, key_tail.shape[3], value_tail.shape[3])
            value = _restore(False, table, value_tail, shape, first, key_tail.shape[3], value_tail.shape[3])
            q_heads = slice(head * group, (head + heads) * group)
            part: Any = mask
            if isinstance(mask, Tensor) and type(mask) is Tensor:
                part = mask[row : row + rows] if mask.shape[0] > 1 else mask
                part = part[:, q_heads] if part.shape[1] > 1 else part
            attended = scaled_dot_product_attention(
                query[row : row + rows, q_heads],
                key,
                value,
                attn_mask=part,
                scale=softmax_scale,
                enable_gqa=group > 1,
            )
            if type(part) is Tensor:
                attended = torch_backend.zero_where_blind(attended, part)
            output[row : row + rows, :, q_heads] = attended.transpose(1, 2)
            del key, value
    return output


def _restore_all(is_key: bool, qdata: Sequence[Tensor], metadata: Sequence[Tensor], tail: Tensor) -> Tensor:
    table = segment_table(qdata, metadata, qdata, metadata)
    batch, num_kv_heads, tail_len, head_dim = tail.shape
    shape = (batch, num_kv_heads, table.num_pages * PAGE_SIZE + tail_len)
    return _restore(is_key, table, tail, shape, 0, head_dim, head_dim)


def _restore(
    is_key: bool,
    table: SegmentTable,
    tail: Tensor,
    shape: tuple[int, int, int],
    first_head: int,
    head_dim: int,
    v_head_dim: int,
) -> Tensor:
    """(rows, heads, kv_len, head_dim) of the heads from ``first_head`` on, counted over the batch."""
    tail, address, *strides = _readable(tail)
    batch, num_kv_heads, tail_len, width = tail.shape
    output = tail.new_empty(*shape, width)
    blocks = table.num_pages + (tail_len > 0)
    if blocks:
        _launch(
            _pages_kernel("restore", tail, head_dim, v_head_dim),
            (blocks, shape[0] * shape[1], 1),
            tail.device.index,
            _RESTORE_ARGS,
            *(table.address, address, output.data_ptr()),
            *strides,
            *(num_kv_heads, batch * num_kv_heads, first_head, table.num_segments),
            *(table.num_pages, 0, tail_len, is_key),
        )
    return output


def _readable(states: Tensor) -> tuple[Tensor, int, int, int, int]:
    """``states``, copied if the kernels could not read four elements at once; its address and strides but the last."""
    batch, heads, tokens, last = states.stride()
    address = states.data_ptr()
    if last != 1 or (batch | heads | tokens) & 3 or address & 15:
        states = states.clone(memory_format=torch.contiguous_format)
        batch, heads, tokens, _ = states.stride()
        address = states.data_ptr()
    return states, address, batch, heads, tokens


_workspaces: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}


def _workspace(device: torch.device, tiles: int, rows: int, v_head_dim: int) -> tuple[int, int, int]:
    """Addresses of partial outputs and sums for ``rows``, and of ``tiles`` counters that are zero.

    There is one for each device and stream, since what a stream runs, it runs in order.
    """
    key = device.index, _stream(device.index)
    floats = rows * (v_head_dim + 2)
    have = _workspaces.get(key)
    if have is None or have[0].numel() < floats or have[1].numel() < tiles:
        partial = torch.empty(max(floats, 1 << 20), dtype=torch.float32, device=device)
        counters = torch.zeros(max(tiles, 4096), dtype=torch.int32, device=device)
        have = _workspaces[key] = partial, counters
    partial, counters = have
    address = partial.data_ptr()
    return address, address + 4 * rows * v_head_dim, counters.data_ptr()


@functools.cache
def _attention_kernel(
    index: int,
    shape: Shape,
    head_dim: int,
    v_head_dim: int,
    dtype: torch.dtype,
    has_mask: bool,
    has_softcap: bool,
) -> Kernel:
    macros = (
        *(("DK", head_dim), ("DV", v_head_dim), ("DTYPE", _DTYPES[dtype])),
        *(("NT", shape.row_tiles), ("WARPS", shape.warps)),
        *(("KSTEP", shape.key_step), ("STAGES", shape.stages)),
        *(("MASK", int(has_mask)), ("SOFTCAP", int(has_softcap))),
    )
    element_size = 4 if dtype == torch.float32 else 2
    shared_bytes = shape.shared_bytes(head_dim, v_head_dim, element_size, MAX_SPLITS + 1)
    return _kernel("attention.cu", macros, "attention", index, shape.threads, shared_bytes)


def _pages_kernel(name: str, states: Tensor, head_dim: int, v_head_dim: int) -> Kernel:
    return _kernel_of_pages(name, head_dim, v_head_dim, states.dtype, states.device.index)


@functools.cache
def _kernel_of_pages(name: str, head_dim: int, v_head_dim: int, dtype: torch.dtype, index: int) -> Kernel:
    macros = (("DK", head_dim), ("DV", v_head_dim), ("DTYPE", _DTYPES[dtype]))
    threads = max(256, 2 * head_dim) if name == "store_pages" else 256
    return _kernel("pages.cu", macros, name, index, threads, 0)


def _kernel(source: str, macros: nvrtc.Macros, name: str, index: int, threads: int, shared_bytes: int) -> Kernel:
    from cuda.bindings import driver

    function = _check(driver.cuLibraryGetKernel(_library(source, macros, _device(index).arch), name.encode()))
    if shared_bytes:
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(driver.cuKernelSetAttribute(attribute, shared_bytes, function, index))
    return Kernel(driver.CUfunction(int(function)), threads, shared_bytes)


@functools.cache
def _library(source: str, macros: nvrtc.Macros, arch: str) -> Any:
    """The kernels of a source, for every device of ``arch``."""
    from cuda.bindings import driver

    return _check(driver.cuLibraryLoadData(nvrtc.cubin(source, macros, arch), None, None, 0, None, None, 0))


class _Launches(threading.local):
    """Memory for the arguments of a launch, one for each thread; the driver copies them before it returns."""

    def __init__(self) -> None:
        self.buffer = ctypes.create_string_buffer(1024)
        self.pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self.buffer))
        self.address = ctypes.addressof(self.pointers)

    @functools.cached_property
    def launch(self) -> Any:
        from cuda.bindings import driver

        return driver.cuLaunchKernel


_launches: Final = _Launches()


def _stream(index: int) -> int:
    """The current stream; torch's own generated code asks for it the same way, a tenth of the public call's time."""
    stream: int = torch._C._cuda_getCurrentRawStream(index)
    return stream


def _launch(kernel: Kernel, grid: tuple[int, int, int], index: int, form: struct.Struct, *values: Any) -> None:
    """Queue ``kernel`` with the structure of ``values`` on the current stream of device ``index``."""
    if index != torch._C._cuda_getDevice():
        with torch.cuda.device(index):
            _launch(kernel, grid, index, form, *values)
        return
    launches = _launches
    form.pack_into(launches.buffer, 0, *values)
    x, y, z = grid
    (status,) = launches.launch(
        kernel.function, x, y, z, kernel.threads, 1, 1, kernel.shared_bytes, _stream(index), launches.address, 0
    )
    if status:
        _check((status,))


def _check(result: tuple[Any, ...]) -> Any:
    """What a call of the driver returned besides its status."""
    if int(result[0]):
        raise RuntimeError(f"quantcache: the CUDA driver returned {result[0]!r}.")
    return result[1] if len(result) > 1 else None
