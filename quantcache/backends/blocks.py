"""Blocks of a pool, which serving keeps its pages in: their layout, and what a backend does with them.

A *block* holds 64 tokens of one sequence, a page for each layer. Sequences find their blocks by a block table, a row of
which lists blocks in the order of the tokens. Of a sequence with ``kv_len`` stored tokens, ``n = kv_len // 64``:

- ``block_table[:n]`` are closed pages, int8;
- with ``kv_len % 64 > 0``, the next ``2 * open_blocks`` blocks are the open page: exact keys in the dtype of the model
  in the first half of them, exact values in the other, ``64 // open_blocks`` tokens in each block;
- blocks behind those, if there are any, belong to the sequence and hold nothing.

A page of a layer in a block is a chunk for each KV head, side by side. A closed chunk holds, without gaps,

    key_qdata       int8  (64, head_dim)
    key_metadata    int16 (head_dim, 2)      scale and zero point of a channel, see ``reference.quantize``
    value_qdata     int8  (64, v_head_dim)
    value_metadata  int16 (64, 2)            of a token

and an open one begins with (64 // open_blocks, head_dim or v_head_dim) exact numbers; the rest of it is not read.
So all that a sequence stores is a function of its length and of its row, and closing a page in place, which makes the
first block of the open page the closed one, is local to a head. 64 exact tokens of a head in 16 bits, 128 bytes a
channel, fit one chunk of 132 bytes a channel and 256; in float32 they take two.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from quantcache.quantization.options import AttentionOptions
from quantcache.quantization.scheme import PAGE_SIZE


class ChunkParts(NamedTuple):
    """The parts of all closed pages of a layer, views of its pool."""

    key_qdata: Tensor
    """int8 (blocks, num_kv_heads, page_size, head_dim)."""

    key_metadata: Tensor
    """int16 (blocks, num_kv_heads, head_dim, 2)."""

    value_qdata: Tensor
    """int8 (blocks, num_kv_heads, page_size, v_head_dim)."""

    value_metadata: Tensor
    """int16 (blocks, num_kv_heads, page_size, 2)."""


@dataclass(frozen=True)
class BlockLayout:
    """What lies where in the page of a layer.

    Attributes:
        num_kv_heads: of this process, where several share the heads.
        head_dim: channels of keys.
        v_head_dim: channels of values.
        dtype: of exact keys and values: float16, bfloat16 or float32.
    """

    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one head of a page; a multiple of 4."""
        return (PAGE_SIZE + 4) * self.head_dim + PAGE_SIZE * self.v_head_dim + 4 * PAGE_SIZE

    @property
    def page_bytes(self) -> int:
        """Bytes of a page of one layer."""
        return self.num_kv_heads * self.chunk_bytes

    @property
    def open_blocks(self) -> int:
        """Blocks of the exact keys of an open page, and as many of its values: 1, in float32 2."""
        return -(-PAGE_SIZE * max(self.head_dim, self.v_head_dim) * self.dtype.itemsize // self.chunk_bytes)

    def blocks_for(self, kv_len: int) -> int:
        """Blocks that a sequence of ``kv_len`` tokens reads."""
        full, rest = divmod(kv_len, PAGE_SIZE)
        return full + (2 * self.open_blocks if rest else 0)

    def peak_blocks(self, kv_len: int) -> int:
        """Blocks that a sequence has needed at some time when it has grown to ``kv_len`` tokens."""
        full, rest = divmod(kv_len, PAGE_SIZE)
        return self.blocks_for(kv_len) if rest else full - 1 + 2 * self.open_blocks if full else 0

    def parts(self, pool: Tensor) -> ChunkParts:
        """The parts of closed pages in ``pool``, uint8 (blocks, page_bytes) of one layer, sharing its memory."""
        chunks = pool.unflatten(1, (self.num_kv_heads, self.chunk_bytes))
        sizes = (PAGE_SIZE * self.head_dim, 4 * self.head_dim, PAGE_SIZE * self.v_head_dim, 4 * PAGE_SIZE)
        key_qdata, key_metadata, value_qdata, value_metadata = chunks.split(sizes, dim=2)
        return ChunkParts(
            key_qdata.view(torch.int8).unflatten(2, (PAGE_SIZE, self.head_dim)),
            key_metadata.view(torch.int16).unflatten(2, (self.head_dim, 2)),
            value_qdata.view(torch.int8).unflatten(2, (PAGE_SIZE, self.v_head_dim)),
            value_metadata.view(torch.int16).unflatten(2, (PAGE_SIZE, 2)),
        )

    def exact(self, pool: Tensor, is_key: bool) -> Tensor:
        """The blocks of ``pool`` as exact numbers, ``dtype`` (blocks, num_kv_heads, 64 // open_blocks, channels)."""
        channels, tokens = self.head_dim if is_key else self.v_head_dim, PAGE_SIZE // self.open_blocks
        chunks = pool.unflatten(1, (self.num_kv_heads, self.chunk_bytes))
        numbers = chunks[..., : tokens * channels * self.dtype.itemsize].view(self.dtype)
        exact: Tensor = numbers.unflatten(2, (tokens, channels))
        return exact


@dataclass
class BlockBatch:
    """The sequences of one forward pass: what they store, and which of the new tokens are theirs.

    The layers of the pass share it. Recorded steps have lengths in device memory alone, tables of fixed width and
    padding: rows of no new token, whose blocks are -1. Nothing is read or written for those, and what attention returns
    for tokens beyond the last of ``cu_seqlens_q`` is anything finite.

    Attributes:
        block_table: int32 (sequences, width) on the device. What is behind the blocks of ``blocks_for`` is not read.
        cu_seqlens_q: int32 (sequences + 1,) on the device: where the new tokens of a sequence begin.
        cu_seqlens_k: int32 (sequences + 1,) on the device, whose differences are the tokens of each sequence, the new
            ones included.
        max_query_len: no sequence has more new tokens; 1 for a batch that decodes.
        max_kv_len: no sequence has more tokens, the new ones included.
        query_lens: new tokens of each sequence where the host knows them; None in a batch that decodes.
        kv_lens: tokens of each sequence, likewise.
        memo: what a backend finds out for the first layer and the others use.
    """

    block_table: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_query_len: int
    max_kv_len: int
    query_lens: Sequence[int] | None = None
    kv_lens: Sequence[int] | None = None
    memo: dict[object, Any] = field(default_factory=dict)

    def on_host(self) -> tuple[Sequence[int], Sequence[int]]:
        """New tokens and all tokens of each sequence; waits for the device where the host does not know them."""
        if self.query_lens is None or self.kv_lens is None:
            self.query_lens = self.cu_seqlens_q.diff().tolist()
            self.kv_lens = self.cu_seqlens_k.diff().tolist()
        return self.query_lens, self.kv_lens


class BlockPages(NamedTuple):
    """The pages of one layer as one forward pass reads and writes them."""

    pool: Tensor
    """uint8 (blocks, page_bytes), the bytes of a page side by side; the blocks of all layers are ``stride(0)`` apart.
    Pages begin at multiples of 64 bytes or more where num_kv_heads * chunk_bytes is one."""

    layout: BlockLayout
    batch: BlockBatch


class BlockBackend(Protocol):
    """What a module in ``backends/`` offers to serving.

    A layer first attends and then appends, so that a token sees those of its own page and its own forward pass exact.
    """

    READS_LENGTHS: bool
    """Whether its kernels read lengths and blocks in device memory, so that a step can be recorded."""

    def attend_blocks(
        self, query: Tensor, key_states: Tensor, value_states: Tensor, pages: BlockPages, options: AttentionOptions
    ) -> Tensor:
        """Attention of new tokens over what their sequences have stored and over each other, causal.

        Args:
            query: (1, num_q_heads, tokens, head_dim), the new tokens of all sequences, one sequence behind the other;
                the last axis is contiguous, here and below. There may be more tokens than ``cu_seqlens_q`` counts.
            key_states: (1, num_kv_heads, tokens, head_dim), not stored yet.
            value_states: (1, num_kv_heads, tokens, v_head_dim).
            pages: read only. Stored of a sequence are kv_len - query_len tokens.
            options: ``is_causal`` is true, ``attn_mask`` and ``window`` are None.

        Returns:
            (1, tokens, num_q_heads, v_head_dim) in the dtype of ``query``, contiguous.
        """
        ...

    def append_blocks(self, key_states: Tensor, value_states: Tensor, pages: BlockPages) -> None:
        """Store the new tokens, as for ``attend_blocks``, and close every page that is full, in place.

        Closed pages hold the bytes of ``reference.quantize_key_pages`` and ``quantize_value_pages``.
        """

    def unsupported_blocks(self, layout: BlockLayout) -> str | None:
        """Why it does not cover pages of this layout, or None."""
        ...
