"""The backend that runs everywhere: restore the pages in plain torch, then torch's own attention.

Its extra memory is one layer's keys and values in the dtype of the query, freed when the call returns.
"""

from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from quantcache.backends import host
from quantcache.backends.protocol import Buffers, SegmentLike, Source, View
from quantcache.quantization import reference
from quantcache.quantization.options import AttentionOptions

WRITES_ON_READ, READS_LENGTHS = host.WRITES_ON_READ, host.READS_LENGTHS
append_tail, make_scratch = host.append_tail, host.make_scratch
READS_ROW_TABLE: Final = True


def store_pages(key_states: Tensor, value_states: Tensor, target: SegmentLike) -> None:
    """See ``writes.store_pages``."""
    for quantize, states, qdata, metadata in (
        (reference.quantize_key_pages, key_states, target.key_qdata, target.key_metadata),
        (reference.quantize_value_pages, value_states, target.value_qdata, target.value_metadata),
    ):
        new_qdata, new_metadata = quantize(states)
        qdata.copy_(new_qdata)
        metadata.copy_(new_metadata)


def advance(
    source: Source | None, key_states: Tensor, value_states: Tensor, buffers: Buffers, residual_length: int
) -> None:
    """See ``writes.advance``."""
    host.advance(source, key_states, value_states, buffers, residual_length, store_pages)


def restore(view: View, is_key: bool) -> Tensor:
    """See ``reads.restore``."""
    made, first = [], 0
    for segment in view.segments:
        if is_key:
            qdata, metadata, restore_pages = segment.key_qdata, segment.key_metadata, reference.restore_key_pages
        else:
            qdata, metadata, restore_pages = segment.value_qdata, segment.value_metadata, reference.restore_value_pages
        if view.row_table is not None:
            rows = view.row_table[:, first : first + len(qdata)]
            qdata, metadata = reference.select_rows(qdata, rows), reference.select_rows(metadata, rows)
        first += len(qdata)
        made.append(restore_pages(qdata, metadata, view.buffers[0].dtype))
    return torch.cat([*made, view.buffers[0 if is_key else 1].narrow(2, 0, view.tail_len)], dim=2)


def attention(query: Tensor, view: View, options: AttentionOptions) -> Tensor:
    """See ``reads.attention``."""
    if view.lengths is not None:
        view, options = host.on_host(view, options)
    host.write_pending(view)
    return attend_dense(query, restore(view, True), restore(view, False), options)


def attend_dense(query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
    """What ``reference.attend`` computes, by torch's own attention where that covers the call."""
    if options.softcap is not None or options.sinks is not None:
        return reference.attend(query, key, value, options)

    batch, num_q_heads, query_len, head_dim = query.shape
    num_kv_heads, kv_len = key.shape[1], key.shape[2]
    mask = combined_mask(query, kv_len, options)
    # The query heads of one KV head become query rows, so that torch never copies keys for them.
    group = num_q_heads // num_kv_heads
    if group > 1:
        query = query.reshape(batch, num_kv_heads, group * query_len, head_dim)
        mask = None if mask is None else _packed_mask(mask, num_kv_heads, group, query_len, kv_len)
    output = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=options.softmax_scale)
    if mask is not None:
        output = zero_where_blind(output, mask)
    return output.reshape(batch, num_q_heads, query_len, -1).transpose(1, 2).contiguous()


def kernel_of(query: Tensor, view: View) -> str:
    """See ``Backend.kernel_of``."""
    return "torch"


def unsupported(*states: Tensor) -> str | None:
    """Every operation on every kind of states is covered."""
    return None


def zero_where_blind(output: Tensor, mask: Tensor) -> Tensor:
    """``output`` with zeros for a query that sees nothing; some of torch's kernels give it the mean of all values."""
    sees = mask if mask.dtype == torch.bool else mask != -torch.inf
    return output.masked_fill(~sees.any(dim=-1, keepdim=True), 0)


def combined_mask(query: Tensor, kv_len: int, options: AttentionOptions) -> Tensor | None:
    """One mask of at least 4 axes for the position rules and ``attn_mask`` together, or None."""
    query_len, attn_mask, window = query.shape[2], options.attn_mask, options.window
    # The only query of a decode step is the newest token, from which causality hides nothing.
    is_causal = options.is_causal and query_len > 1
    if attn_mask is not None:
        attn_mask = attn_mask.view((1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape))
        if attn_mask.dtype != torch.bool:
            attn_mask = attn_mask.to(query.dtype)
    if not is_causal and window is None:
        return attn_mask
    allowed = reference.visible(query_len, kv_len, is_causal=is_causal, window=window, device=query.device)[None, None]
    if attn_mask is None:
        return allowed
    if attn_mask.dtype == torch.bool:
        return attn_mask & allowed
    return attn_mask.masked_fill(~allowed, -torch.inf)


def _packed_mask(mask: Tensor, num_kv_heads: int, group: int, query_len: int, kv_len: int) -> Tensor:
    """Mask for query heads packed as rows: (batch or 1, num_kv_heads or 1, group * query_len or 1, kv_len)."""
    if mask.shape[1] == 1:
        if mask.shape[2] == 1:
            return mask
        mask = mask.expand(-1, group, -1, -1)
        return mask.reshape(mask.shape[0], 1, group * query_len, -1)
    mask = mask.expand(-1, -1, query_len, -1)
    return mask.reshape(mask.shape[0], num_kv_heads, group * query_len, -1)
