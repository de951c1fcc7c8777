"""The backend of C++ kernels for CPUs: reads the int8 pages where they lie, and never restores them to memory.

The kernels are called through ctypes with one packed structure, see ``csrc/cpu/interface.h``. Threads follow
``torch.get_num_threads()``.
"""

import ctypes
import functools
import os
import struct
from typing import Final

import torch
from torch import Tensor

from quantcache.backends import host
from quantcache.backends.cpu import build
from quantcache.backends.devices import check_pages
from quantcache.backends.protocol import Buffers, SegmentLike, Source, View
from quantcache.quantization.errors import BuildError
from quantcache.quantization.options import AttentionOptions
from quantcache.quantization.scheme import PAGE_SIZE

WRITES_ON_READ, READS_LENGTHS = host.WRITES_ON_READ, host.READS_LENGTHS
append_tail, make_scratch = host.append_tail, host.make_scratch
READS_ROW_TABLE: Final = True

ISA_VARIABLE: Final = "QUANTCACHE_CPU_ISA"
ISAS: Final = ("avx512", "avx2", "portable")

_DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MASK_DTYPES: Final = {**_DTYPES, torch.bool: 3}

_ATTENTION_ARGS: Final = struct.Struct("8q Pq Pq P3q PP7q Pq4q 2q 2d PP")
_STORE_ARGS: Final = struct.Struct("7q P3q PP")
_RESTORE_ARGS: Final = struct.Struct("6q Pq Pq P4q P")


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels, built at the first call if need be.

    Raises:
        BuildError: they cannot be built here, or ``QUANTCACHE_CPU_ISA`` names an instruction set there is not.
    """
    loaded = build.load_library()
    for name in ("quantcache_attention", "quantcache_store", "quantcache_restore"):
        function = getattr(loaded, name)
        function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int
    loaded.quantcache_isa.argtypes, loaded.quantcache_isa.restype = [], ctypes.c_char_p
    loaded.quantcache_use_isa.argtypes, loaded.quantcache_use_isa.restype = [ctypes.c_char_p], ctypes.c_int
    forced = os.environ.get(ISA_VARIABLE)
    if forced:
        if forced not in ISAS:
            raise BuildError(f"{ISA_VARIABLE}: must be one of {', '.join(ISAS)}, got {forced!r}")
        if loaded.quantcache_use_isa(forced.encode()):
            raise BuildError(f"{ISA_VARIABLE}: this processor does not run {forced}")
    return loaded


def isa() -> str:
    """The instruction set in use: one of ``ISAS``."""
    name: bytes = library().quantcache_isa()
    return name.decode()


def use_isa(name: str) -> bool:
    """Use the instruction set ``name`` from now on; False if this processor does not have it. For tests."""
    return not library().quantcache_use_isa(name.encode())


@functools.cache
def unavailable() -> str | None:
    """Why this backend cannot run here, or None. Builds the kernels if need be; asked once a process."""
    try:
        library()
    except BuildError as error:
        return str(error)
    return None


def where_from() -> str:
    """Where the kernels come from, and the instruction set in use."""
    library()
    return f"{build.where_from[-1]}, {isa()}"


def store_pages(key_states: Tensor, value_states: Tensor, target: SegmentLike) -> None:
    """See ``writes.store_pages``."""
    run, num_threads = library().quantcache_store, torch.get_num_threads()
    for is_key, states, qdata, metadata in (
        (1, key_states, target.key_qdata, target.key_metadata),
        (0, value_states, target.value_qdata, target.value_metadata),
    ):
        states = _rows(states)
        batch, num_kv_heads, _, head_dim = states.shape
        written = [t if t.is_contiguous() else t.new_empty(t.shape) for t in (qdata, metadata)]
        arguments = _STORE_ARGS.pack(
            num_threads,
            _DTYPES[states.dtype],
            is_key,
            len(qdata),
            batch,
            num_kv_heads,
            head_dim,
            states.data_ptr(),
            *states.stride()[:3],
            written[0].data_ptr(),
            written[1].data_ptr(),
        )
        _check(run(arguments))
        for part, source in zip((qdata, metadata), written, strict=True):
            if part is not source:
                part.copy_(source)


def advance(
    source: Source | None, key_states: Tensor, value_states: Tensor, buffers: Buffers, residual_length: int
) -> None:
    """See ``writes.advance``."""
    host.advance(source, key_states, value_states, buffers, residual_length, store_pages)


def restore(view: View, is_key: bool) -> Tensor:
    """See ``reads.restore``."""
    tail = _rows(view.buffers[0 if is_key else 1])
    batch, num_kv_heads, _, head_dim = tail.shape
    output = tail.new_empty(batch, num_kv_heads, view.num_pages * PAGE_SIZE + view.tail_len, head_dim)
    arguments = _RESTORE_ARGS.pack(
        torch.get_num_threads(),
        _DTYPES[tail.dtype],
        is_key,
        batch,
        num_kv_heads,
        head_dim,
        _segment_table(view),
        len(view.segments),
        *_row_table(view),
        tail.data_ptr(),
        view.tail_len,
        *tail.stride()[:3],
        output.data_ptr(),
    )
    _check(library().quantcache_restore(arguments))
    return output


def attention(query: Tensor, view: View, options: AttentionOptions) -> Tensor:
    """See ``reads.attention``; ``unsupported`` must be None."""
    if view.lengths is not None:
        view, options = host.on_host(view, options)
    host.write_pending(view)
    batch, num_q_heads, query_len, head_dim = query.shape
    key_tail, value_tail = view.buffers
    _, num_kv_heads, _, v_head_dim = value_tail.shape
    query, key_tail, value_tail = _rows(query), _rows(key_tail), _rows(value_tail)
    attn_mask, is_causal, _, window, softcap, sinks = options
    mask_fields: tuple[int, ...] = _NO_MASK
    if attn_mask is not None:
        if attn_mask.dtype not in _MASK_DTYPES:
            attn_mask = attn_mask.float()
        mask_stride = [0] * (4 - attn_mask.dim())
        mask_stride += [s if n > 1 else 0 for n, s in zip(attn_mask.shape, attn_mask.stride(), strict=True)]
        mask_fields = (attn_mask.data_ptr(), _MASK_DTYPES[attn_mask.dtype], *mask_stride)
    if sinks is not None:
        sinks = sinks.float().contiguous()
    output = query.new_empty(batch, query_len, num_q_heads, v_head_dim)
    arguments = _ATTENTION_ARGS.pack(
        torch.get_num_threads(),
        _DTYPES[query.dtype],
        batch,
        num_q_heads,
        num_kv_heads,
        query_len,
        head_dim,
        v_head_dim,
        _segment_table(view),
        len(view.segments),
        *_row_table(view),
        query.data_ptr(),
        *query.stride()[:3],
        key_tail.data_ptr(),
        value_tail.data_ptr(),
        view.tail_len,
        *key_tail.stride()[:3],
        *value_tail.stride()[:3],
        *mask_fields,
        is_causal,
        window or 0,
        options.scale(head_dim),
        softcap or 0.0,
        0 if sinks is None else sinks.data_ptr(),
        output.data_ptr(),
    )
    _check(library().quantcache_attention(arguments))
    return output


def kernel_of(query: Tensor, view: View) -> str:
    """See ``Backend.kernel_of``: there is one, for any number of query rows."""
    return "cpu"


_NO_MASK: Final = (0, 0, 0, 0, 0, 0)


def unsupported(*states: Tensor) -> str | None:
    """Why the kernels do not cover a call with this query or tail or these states, or None. All options are covered.

    No number of queries is too large: at 512 the kernels still take half the time of restoring and torch's attention.
    """
    for tensor in states:
        if tensor.dtype not in _DTYPES:
            return f"the CPU kernels compute in float32, got {tensor.dtype}"
    return None


def _segment_table(view: View) -> int:
    """Address of an array of SegmentArgs, which lives as long as the view's closed pages."""
    found = view.memo.get("cpu")
    if found is None:
        contiguous = [
            [part.contiguous() for part in (s.key_qdata, s.key_metadata, s.value_qdata, s.value_metadata)]
            for s in view.segments
        ]
        check_pages(view.buffers[0].device, contiguous)
        fields = [n for parts in contiguous for n in (*(part.data_ptr() for part in parts), *parts[0].shape[:2], 0, 0)]
        packed = (ctypes.c_int64 * len(fields))(*fields)
        found = view.memo["cpu"] = ctypes.addressof(packed), packed, contiguous
    address: int = found[0]
    return address


def _row_table(view: View) -> tuple[int, int]:
    """Address of the row table and elements from a sequence to the next; (0, 0) where every one reads its own row."""
    table = view.row_table
    return (0, 0) if table is None or not table.shape[1] else (table.data_ptr(), table.stride(0))


def _rows(states: Tensor) -> Tensor:
    """``states`` with a contiguous last axis; the other strides may be any."""
    return states if states.stride(-1) == 1 or states.shape[-1] == 1 else states.contiguous()


def _check(status: int) -> None:
    if status:
        raise MemoryError("quantcache: the CPU kernels found no memory for their scratch.")
