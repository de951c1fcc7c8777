"""Blocks of a pool in plain torch: one sequence after the other, its pages restored.

The extra memory is the keys and values of one sequence of one layer, freed before the next. See ``backends.blocks`` for
what each function promises.
"""

from collections.abc import Callable
from typing import Final, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from quantcache.backends.blocks import BlockBatch, BlockLayout, BlockPages
from quantcache.backends.torch import attend_dense
from quantcache.quantization import reference
from quantcache.quantization.options import AttentionOptions
from quantcache.quantization.scheme import PAGE_SIZE

READS_LENGTHS: Final = False

MAX_SCORES: Final = 1 << 26
"""Elements of the mask of one call of torch's attention, over which queries are taken in parts."""


def unsupported_blocks(layout: BlockLayout) -> str | None:
    """Every layout is covered."""
    return None


def attend_blocks(
    query: Tensor, key_states: Tensor, value_states: Tensor, pages: BlockPages, options: AttentionOptions
) -> Tensor:
    """See ``BlockBackend.attend_blocks``."""
    output = query.new_zeros(1, query.shape[2], query.shape[1], pages.layout.v_head_dim)
    for index, tokens, stored in sequences_of(pages.batch):
        key, value = key_states[:, :, tokens], value_states[:, :, tokens]
        if stored:
            blocks = blocks_of(pages, index, stored)
            key = torch.cat([_restore(pages, blocks, stored, is_key=True), key], dim=2)
            value = torch.cat([_restore(pages, blocks, stored, is_key=False), value], dim=2)
        output[:, tokens] = attend_causal(query[:, :, tokens], key, value, options)
    return output


def append_blocks(key_states: Tensor, value_states: Tensor, pages: BlockPages) -> None:
    """See ``BlockBackend.append_blocks``."""
    append_with(_quantize, key_states, value_states, pages)


Quantize = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]
"""Of keys and values, (1, num_kv_heads, pages * 64, channels), the parts of ``Segment``."""


def _quantize(key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *reference.quantize_key_pages(key_states), *reference.quantize_value_pages(value_states)


def append_with(quantize: Quantize, key_states: Tensor, value_states: Tensor, pages: BlockPages) -> None:
    """The same with pages made by ``quantize``."""
    layout, single = pages.layout, single_tokens(pages)
    if single is not None:
        single.write(pages, key_states, value_states)
    for index, tokens, stored in sequences_of(pages.batch):
        full, rest = divmod(stored, PAGE_SIZE)
        if tokens.stop - tokens.start == 1 and rest < PAGE_SIZE - 1:
            continue
        blocks = blocks_of(pages, index, stored + tokens.stop - tokens.start)
        key, value = key_states[0, :, tokens], value_states[0, :, tokens]
        closing = (rest + key.shape[1]) // PAGE_SIZE
        if closing:
            if rest:
                key = torch.cat([open_page(pages, blocks[full:], rest, is_key=True), key], dim=1)
                value = torch.cat([open_page(pages, blocks[full:], rest, is_key=False), value], dim=1)
            closed, length = blocks[full : full + closing], closing * PAGE_SIZE
            quantized = quantize(key[None, :, :length], value[None, :, :length])
            for part, made in zip(layout.parts(pages.pool), quantized, strict=True):
                part[closed] = made[:, 0]
            full, rest, key, value = full + closing, 0, key[:, length:], value[:, length:]
        if key.shape[1]:
            side = layout.open_blocks
            _write_open(layout.exact(pages.pool, True), blocks[full : full + side], rest, key)
            _write_open(layout.exact(pages.pool, False), blocks[full + side : full + 2 * side], rest, value)


def sequences_of(batch: BlockBatch) -> list[tuple[int, slice, int]]:
    """Row of the block table, new tokens and number of stored tokens of each sequence that has new ones."""
    if "sequences" not in batch.memo:
        start, found = 0, []
        for index, (query_len, kv_len) in enumerate(zip(*batch.on_host(), strict=True)):
            if query_len:
                found.append((index, slice(start, start + query_len), kv_len - query_len))
            start += query_len
        batch.memo["sequences"] = found
    return cast("list[tuple[int, slice, int]]", batch.memo["sequences"])


class SingleTokens(NamedTuple):
    """The sequences of a batch with one new token, as all that decode, whose open pages are read and written together.

    Attributes:
        tokens: places of their tokens in the batch, int64 (sequences,).
        rests: tokens of the open page before the new one, int64 (sequences,).
        blocks: of the open page, keys and then values, int64 (sequences, 2 * open_blocks).
    """

    tokens: Tensor
    rests: Tensor
    blocks: Tensor

    def open_pages(self, pages: BlockPages, states: Tensor, is_key: bool) -> Tensor:
        """Copies of the open pages, with the new tokens, (sequences, num_kv_heads, page_size, channels).

        Args:
            pages: of a layer.
            states: keys or values of all new tokens of the batch, (1, num_kv_heads, tokens, channels).
            is_key: which.

        Returns:
            memory that the next layer's copies will take.
        """
        exact, side, memo = pages.layout.exact(pages.pool, is_key), pages.layout.open_blocks, pages.batch.memo
        _, heads, tokens, channels = exact.shape
        if ("open", is_key) not in memo:
            memo["open", is_key] = states.new_empty(len(self.rests), heads, PAGE_SIZE, channels)
        copies: Tensor = memo["open", is_key]
        for place, blocks in enumerate((self.blocks[:, :side] if is_key else self.blocks[:, side:]).T):
            torch.index_select(exact, 0, blocks, out=copies[:, :, place * tokens : (place + 1) * tokens])
        copies[torch.arange(len(copies)), :, self.rests] = states[0, :, self.tokens].transpose(0, 1)
        return copies

    def write(self, pages: BlockPages, key_states: Tensor, value_states: Tensor) -> None:
        """Write the new tokens, (1, num_kv_heads, tokens, channels), into open pages that they do not fill."""
        kept = self.rests < PAGE_SIZE - 1
        tokens, rests, blocks = self.tokens[kept], self.rests[kept], self.blocks[kept]
        side = pages.layout.open_blocks
        places = rests.div(PAGE_SIZE // side, rounding_mode="floor"), rests % (PAGE_SIZE // side)
        for is_key, states in ((True, key_states), (False, value_states)):
            part = blocks[:, :side] if is_key else blocks[:, side:]
            chosen = part.gather(1, places[0][:, None])[:, 0]
            pages.layout.exact(pages.pool, is_key)[chosen, :, places[1]] = states[0, :, tokens].transpose(0, 1)


def single_tokens(pages: BlockPages) -> SingleTokens | None:
    """The sequences of a batch with one new token, None if there is none; the layers share them."""
    batch = pages.batch
    if "single tokens" not in batch.memo:
        found = [
            (tokens.start, *divmod(stored, PAGE_SIZE), index)
            for index, tokens, stored in sequences_of(batch)
            if tokens.stop - tokens.start == 1
        ]
        made = None
        if found:
            tokens, full, rests, rows = torch.tensor(found, device=batch.block_table.device).T
            columns = full[:, None] + torch.arange(2 * pages.layout.open_blocks, device=full.device)
            made = SingleTokens(tokens, rests, batch.block_table[rows[:, None], columns].long())
        batch.memo["single tokens"] = made
    return cast("SingleTokens | None", batch.memo["single tokens"])


def blocks_of(pages: BlockPages, index: int, kv_len: int) -> Tensor:
    """The blocks of a sequence when it has ``kv_len`` tokens, and the first behind them, so long as the row has any.

    A page is open until it is closed, and then needs blocks that the length alone does not tell.
    """
    return pages.batch.block_table[index, : pages.layout.peak_blocks(kv_len)].long()


def _restore(pages: BlockPages, blocks: Tensor, stored: int, is_key: bool) -> Tensor:
    """The stored keys or values of a sequence, dense, (1, num_kv_heads, stored, channels)."""
    full, rest = divmod(stored, PAGE_SIZE)
    parts, dtype, made = pages.layout.parts(pages.pool), pages.layout.dtype, []
    if full and is_key:
        qdata, metadata = parts.key_qdata[blocks[:full]], parts.key_metadata[blocks[:full]]
        made.append(reference.restore_key_pages(qdata[:, None], metadata[:, None], dtype))
    elif full:
        qdata, metadata = parts.value_qdata[blocks[:full]], parts.value_metadata[blocks[:full]]
        made.append(reference.restore_value_pages(qdata[:, None], metadata[:, None], dtype))
    if rest:
        made.append(open_page(pages, blocks[full:], rest, is_key)[None])
    return torch.cat(made, dim=2)


def open_page(pages: BlockPages, blocks: Tensor, rest: int, is_key: bool) -> Tensor:
    """A copy of the exact tokens of an open page whose blocks begin ``blocks``, (num_kv_heads, rest, channels)."""
    side = pages.layout.open_blocks
    held = pages.layout.exact(pages.pool, is_key)[blocks[:side] if is_key else blocks[side : 2 * side]]
    return held.transpose(0, 1).flatten(1, 2)[:, :rest]


def _write_open(exact: Tensor, blocks: Tensor, position: int, states: Tensor) -> None:
    """Write ``states`` (num_kv_heads, tokens, channels) into an open page from token ``position`` on."""
    tokens = exact.shape[2]
    for place, block in enumerate(blocks):
        first, last = max(position, place * tokens), min(position + states.shape[1], (place + 1) * tokens)
        if first < last:
            written = states[:, first - position : last - position]
            exact[block, :, first - place * tokens : last - place * tokens] = written


def attend_causal(query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
    """Causal attention of the newest tokens; (1, tokens, num_q_heads, v_head_dim)."""
    query_len, kv_len = query.shape[2], key.shape[2]
    if query_len == kv_len and options.softcap is None and options.sinks is None:
        is_grouped = query.shape[1] != key.shape[1]
        scale = options.softmax_scale
        output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=is_grouped)
        return output.transpose(1, 2)
    step = max(1, MAX_SCORES // (kv_len * query.shape[1]))
    made = []
    for start in range(0, query_len, step):
        stop = min(start + step, query_len)
        seen = kv_len - query_len + stop
        made.append(attend_dense(query[:, :, start:stop], key[:, :, :seen], value[:, :, :seen], options))
    return torch.cat(made, dim=1)
