"""The pool: transformers' blocks with int8 pages in them, and what a forward pass reads and writes of it."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from quantcache.backends import dispatch
from quantcache.backends.blocks import BlockBatch, BlockLayout, BlockPages
from quantcache.quantization.options import AttentionOptions
from quantcache.quantization.scheme import PAGE_SIZE
from quantcache.serving import _host

_INDEX_BYTES: Final = 8
"""What transformers keeps for each token of the pool besides, an int64 in each set of inputs."""


class _Part(NamedTuple):
    """New tokens of one request."""

    stored: int
    """Tokens before them."""

    start: int
    """The place of the first of them among the tokens of the batch."""

    length: int

    row: list[int]
    """The blocks of the request."""


class MemoryHandler(_host.MemoryHandler):
    """How many blocks fit, where neither masks nor copies of what is stored are made."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_attention_masks = 0
        self.kv_heads_at_peak = 2 * self.num_key_value_heads if hasattr(self, "num_key_value_heads") else 0

    @property
    def bytes_per_cache_token(self) -> int:
        """Memory for a token of the pool besides its pages."""
        multiple: int = self.io_multiplier * self.num_groups
        return multiple * _INDEX_BYTES

    def _check_footprint(self, max_batch_tokens: int, num_sectors: int) -> Any:
        needed = self.compute_memory_footprint(max_batch_tokens, max(num_sectors, 1))
        if needed > self.available_memory:
            raise MemoryError(
                f"int8_batching: the pool and a step of {max_batch_tokens:,} tokens must fit in the "
                f"{self.available_memory / 2**20:,.1f} MiB that they may have, got {needed / 2**20:,.1f} MiB. Ask for "
                "less by num_blocks or max_batch_tokens, or give more by max_memory_percent."
            )
        return super()._check_footprint(max_batch_tokens, num_sectors)


class Int8Allocator(_host.Allocator):
    """Gives blocks of int8 pages to requests, and lets the attention of each layer read and write them.

    Attributes:
        layout: what lies where in a page of a layer.
        backend: which of ``dispatch.BLOCK_BACKENDS`` reads and writes the pages.
        reason: why it is not the one for this device, None if it is.
        prompt_len: tells how many tokens of a request that was started again were its prompt, None for any other.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.layout = BlockLayout(self.num_key_value_heads, self.head_dim, self.head_dim, self.cache_dtype)
        self.prompt_len: Callable[[str], int | None] = lambda request_id: None
        self.backend = "torch"
        self.reason: str | None = None
        self._positions = {layer_idx: position for position, layer_idx in enumerate(self.layer_indices)}
        self._parts: list[tuple[str, int, int, list[int]]] = []
        self._rounds: list[tuple[Tensor | None, BlockBatch]] = []
        self._attended = 0

    @classmethod
    def get_bytes_per_page(
        cls, num_key_value_heads: int, head_dim: int, cache_dtype: torch.dtype, page_size: int
    ) -> int:
        """Bytes of a page of one layer."""
        return BlockLayout(num_key_value_heads, head_dim, head_dim, cache_dtype).page_bytes

    def register_cache_tensor(
        self, bytes_per_sector: int, non_trash_bytes: int, cache_tensor: Tensor, pool: _host.CachePool
    ) -> None:
        """Take the memory of the pool, uint8 (bytes,), of which the first two sectors are never given away."""
        self.bytes_per_sector = bytes_per_sector
        self._copy_view = cache_tensor.view(-1, self.bytes_per_block)
        self._after_cache_tensor_init(non_trash_bytes, bytes_per_sector, cache_tensor, pool)
        blocks = cache_tensor.view(-1, self.pages_per_block, self.bytes_per_page)
        self._layers = [blocks[:, position] for position in range(self.pages_per_block)]
        self.backend, self.reason = dispatch.block_backend_for(cache_tensor.device, self.layout)

    # What a request needs

    def _compute_blocks_needed(self, allocated_blocks: int, past_length: int, query_length: int) -> int:
        # At a full page a request still holds what its open page took, so that the tokens of a request that is started
        # again can be stored in parts.
        return max(0, self.layout.peak_blocks(past_length + query_length) - allocated_blocks)

    def get_read_indices(self, request_id: str, past_length: int, query_length: int) -> list[int]:
        """None: attention reads blocks, not tokens."""
        return []

    def get_write_indices(self, request_id: str, past_length: int, query_length: int) -> list[int]:
        """None; this is where the host says what a batch holds that does not only decode."""
        self._parts.append((request_id, past_length, query_length, self.block_table[request_id][:]))
        return []

    def fill_block_table(self, request_id: str, past_length: int, query_length: int, block_table: Tensor) -> None:
        """Write the blocks of a request into its row of a table, int32 (width,)."""
        row = self.block_table[request_id][: self.layout.peak_blocks(past_length + query_length)]
        block_table[: len(row)] = torch.tensor(row, dtype=block_table.dtype)

    # A forward pass

    def free_all_requests(self) -> None:
        """Take back all blocks."""
        super().free_all_requests()
        self.forget_batch()

    def forget_batch(self) -> None:
        """Forget a batch that was prepared and is not run."""
        self._parts, self._attended = [], 0

    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        key_states: Tensor,
        value_states: Tensor,
        kwargs: Mapping[str, Any],
        options: AttentionOptions,
    ) -> Tensor:
        """Attention of the new tokens of a batch in one layer, and storing them.

        Args:
            layer_idx: which; the layers of a pass come in turn.
            query: (1, num_q_heads, tokens, head_dim).
            key_states: (1, num_kv_heads, tokens, head_dim).
            value_states: (1, num_kv_heads, tokens, head_dim).
            kwargs: what transformers says of the batch.
            options: causal.

        Returns:
            (1, tokens, num_q_heads, head_dim).
        """
        position = self._positions[layer_idx]
        if position == 0:
            self._attended -= self._attended % self.pages_per_block  # of a pass that broke off
        if position != self._attended % self.pages_per_block:
            raise RuntimeError(
                f"int8_batching: layer {layer_idx} must attend in its turn and once in a forward pass, but layer "
                f"{self.layer_indices[self._attended % self.pages_per_block]} is next."
            )
        if position == 0:
            self._rounds = self._rounds_of(query.device, kwargs)
        backend, pool = dispatch.BLOCK_BACKENDS[self.backend], self._layers[position]
        if len(self._rounds) > 1:
            output = query.new_zeros(1, query.shape[2], query.shape[1], self.layout.v_head_dim)
        for tokens, batch in self._rounds:
            pages = BlockPages(pool, self.layout, batch)
            if tokens is None:
                output = backend.attend_blocks(query, key_states, value_states, pages, options)
                backend.append_blocks(key_states, value_states, pages)
            else:
                key, value = key_states[:, :, tokens], value_states[:, :, tokens]
                output[:, tokens] = backend.attend_blocks(query[:, :, tokens], key, value, pages, options)
                backend.append_blocks(key, value, pages)
        self._attended += 1
        return output

    def end_pass(self) -> None:
        """Called after a forward pass.

        Raises:
            RuntimeError: some layers of the model did not attend through blocks.
        """
        attended, self._attended = self._attended, 0
        if attended % self.pages_per_block:
            raise RuntimeError(
                f"int8_batching: all {self.pages_per_block} layers must attend through transformers' "
                f"AttentionInterface, {attended % self.pages_per_block} did."
            )

    def _rounds_of(self, device: torch.device, kwargs: Mapping[str, Any]) -> list[tuple[Tensor | None, BlockBatch]]:
        """What the layers of a pass do, one after the other: the tokens, None for all, and the sequences."""
        parts, self._parts = self._parts, []
        table = _host.block_table_of(kwargs, self.index)
        if table is not None:
            return [(None, BlockBatch(table, *_host.lengths_of(kwargs), 1, table.shape[1] * PAGE_SIZE))]
        start, rounds = 0, [[]]  # type: ignore[var-annotated]
        for request_id, stored, length, row in parts:
            cuts = _cuts(stored, length, self.prompt_len(request_id))
            for index, (first, last) in enumerate(zip([stored, *cuts], [*cuts, stored + length], strict=True)):
                if index == len(rounds):
                    rounds.append([])
                rounds[index].append(_Part(first, start + first - stored, last - first, row))
            start += length
        if len(rounds) == 1:
            return [(None, _batch_of(rounds[0], device))]
        return [(_tokens_of(parts, device), _batch_of(parts, device)) for parts in rounds]


def _cuts(stored: int, length: int, prompt_len: int | None) -> list[int]:
    """Where the new tokens of a request are divided so that each sees what it saw when it was new.

    A request that lost its blocks comes again with its answer as part of the prompt. Tokens of the answer attended to
    int8 pages, up to the last full one: so behind the prompt no part reaches beyond a page.
    """
    if prompt_len is None or stored + length <= prompt_len:
        return []
    first = max(stored, prompt_len)
    pages = range((first // PAGE_SIZE + 1) * PAGE_SIZE, stored + length, PAGE_SIZE)
    return [first, *pages] if stored < prompt_len else list(pages)


def _batch_of(parts: list[_Part], device: torch.device) -> BlockBatch:
    """The sequences of ``parts``, whose tokens follow one another."""
    query_lens, kv_lens = [part.length for part in parts], [part.stored + part.length for part in parts]
    width = max(len(part.row) for part in parts)
    table = torch.tensor([part.row + [-1] * (width - len(part.row)) for part in parts], dtype=torch.int32)
    return BlockBatch(
        table.to(device, non_blocking=True),
        _starts(query_lens, device),
        _starts(kv_lens, device),
        max(query_lens),
        max(kv_lens),
        query_lens,
        kv_lens,
    )


def _starts(lengths: Iterable[int], device: torch.device) -> Tensor:
    """int32 (sequences + 1,): the sum of the lengths before each."""
    return torch.tensor([0, *lengths]).cumsum(0).int().to(device, non_blocking=True)


def _tokens_of(parts: list[_Part], device: torch.device) -> Tensor:
    """The places of the tokens of ``parts`` in the batch, int64."""
    return torch.cat([torch.arange(part.start, part.start + part.length) for part in parts]).to(device)
