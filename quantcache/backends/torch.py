"""The backend that runs everywhere: restore the pages in plain torch, then torch's own attention.

Its extra memory is one layer's keys and values in the dtype of the query, freed when the call returns.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from quantcache.quantization import reference
from quantcache.quantization.options import AttentionOptions


def store_pages(
    key_states: Tensor,
    value_states: Tensor,
    key_qdata: Tensor,
    key_metadata: Tensor,
    value_qdata: Tensor,
    value_metadata: Tensor,
) -> None:
    """See ``ops.store_pages``."""
    for quantize, states, qdata, metadata in (
        (reference.quantize_key_pages, key_states, key_qdata, key_metadata),
        (reference.quantize_value_pages, value_states, value_qdata, value_metadata),
    ):
        new_qdata, new_metadata = quantize(states)
        qdata.copy_(new_qdata)
        metadata.copy_(new_metadata)


def append_tail(key_states: Tensor, value_states: Tensor, key_tail: Tensor, value_tail: Tensor, position: int) -> None:
    """See ``ops.append_tail``."""
    key_tail.narrow(2, position, key_states.shape[2]).copy_(key_states)
    value_tail.narrow(2, position, value_states.shape[2]).copy_(value_states)


def restore_keys(qdata: Sequence[Tensor], metadata: Sequence[Tensor], tail: Tensor) -> Tensor:
    """See ``ops.restore_keys``."""
    restored = [reference.restore_key_pages(q, m, tail.dtype) for q, m in zip(qdata, metadata, strict=True)]
    return torch.cat([*restored, tail], dim=2)


def restore_values(qdata: Sequence[Tensor], metadata: Sequence[Tensor], tail: Tensor) -> Tensor:
    """See ``ops.restore_values``."""
    restored = [reference.restore_value_pages(q, m, tail.dtype) for q, m in zip(qdata, metadata, strict=True)]
    return torch.cat([*restored, tail], dim=2)


def attention(
    query: Tensor,
    key_qdata: Sequence[Tensor],
    key_metadata: Sequence[Tensor],
    value_qdata: Sequence[Tensor],
    value_metadata: Sequence[Tensor],
    key_tail: Tensor,
    value_tail: Tensor,
    options: AttentionOptions,
) -> Tensor:
    """See ``ops.attention``."""
    key = restore_keys(key_qdata, key_metadata, key_tail)
    value = restore_values(value_qdata, value_metadata, value_tail)
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


def write_and_attend(
    query: Tensor,
    new_states: tuple[Tensor, Tensor],
    parts: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]],
    tails: tuple[Tensor, Tensor],
    tail_len: int,
    options: AttentionOptions,
) -> Tensor:
    """See ``ops.write_and_attend``; here it is no faster than one after the other, and is what tests compare with."""
    append_tail(*new_states, *tails, tail_len - new_states[0].shape[2])
    key_tail, value_tail = (tail.narrow(2, 0, tail_len) for tail in tails)
    return attention(query, *parts, key_tail, value_tail, options)


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
