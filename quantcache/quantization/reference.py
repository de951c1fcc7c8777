"""The specification: every operation in plain torch, on any device.

Shapes use P pages, page_size = 64 and T = P * page_size tokens.
"""

import torch
from torch import Tensor

from quantcache.quantization.options import PLAIN, AttentionOptions
from quantcache.quantization.scheme import (
    MAX_ABS_STEPS,
    MAX_STEPS,
    METADATA_SCALE,
    METADATA_ZERO_POINT,
    MIN_SCALE,
    PAGE_SIZE,
    QMIN,
)


def round_up_to_bfloat16(scale: Tensor) -> Tensor:
    """Smallest bfloat16 not below each element of ``scale`` (float32, finite, positive); still float32."""
    bits = scale.view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32)


def nearest_step(states: Tensor, scale: Tensor) -> Tensor:
    """Integer ``n`` with ``|n * scale - states| <= scale / 2`` exactly, as float32.

    The rounded quotient alone can miss by one near a tie, where the division itself has rounded; the remainder, which
    float32 holds exactly, tells. It is taken at half size so that the largest float32 does not overflow.

    Args:
        states: float32, finite.
        scale: float32 holding bfloat16 values, broadcastable to ``states``, at least ``|states| / MAX_ABS_STEPS``.
    """
    half = 0.5 * scale
    steps = (states / scale).round()
    remainder = 0.5 * states - steps * half
    quarter = 0.5 * half
    return steps + (remainder > quarter).float() - (remainder < -quarter).float()


def within_finite(states: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Groups of ``states`` along ``dim`` with finite numbers in place of NaN and infinity, and the range of each.

    What a model in float16 leaves under a mask need not be finite, and must not reach the tokens that share its scale.

    Args:
        states: float32, any shape.
        dim: the axis of a group.

    Returns:
        states: the same, but +inf is the largest finite element of its group, -inf and NaN the smallest. A group that
            has none is all zeros.
        low: the smallest finite element of each group, ``dim`` kept as 1.
        high: the largest.
    """
    inf = torch.inf
    low = states.nan_to_num(inf, inf, inf).amin(dim, keepdim=True)
    high = states.nan_to_num(-inf, -inf, -inf).amax(dim, keepdim=True)
    has_finite = low <= high
    low, high = torch.where(has_finite, low, 0.0), torch.where(has_finite, high, 0.0)
    return states.nan_to_num(-inf, inf, -inf).clamp(low, high), low, high


def quantize(states: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Round ``states`` to int8 with one affine map along ``dim``.

    Args:
        states: any shape, any float dtype.
        dim: the axis whose elements share a scale.

    Returns:
        qdata: int8, the shape of ``states``.
        metadata: int16, the shape of ``states`` without ``dim``, and a last axis of 2: the bits of the bfloat16
            ``scale`` and the ``zero_point``. ``|scale * (qdata - zero_point) - states| <= scale / 2`` for every
            finite element, whatever others are in its group; ``within_finite`` says what is stored for those that
            are not.
    """
    states, low, high = within_finite(states.float(), dim)
    # Divided before they are subtracted: the range of a float32 group can exceed float32.
    spread = high / MAX_STEPS - low / MAX_STEPS
    floor = torch.maximum(high.abs(), low.abs()) / MAX_ABS_STEPS
    scale = round_up_to_bfloat16(torch.maximum(spread, floor).clamp_min(MIN_SCALE))

    steps = nearest_step(states, scale)
    zero_point = QMIN - steps.amin(dim, keepdim=True)
    qdata = (steps + zero_point).to(torch.int8)

    words = scale.to(torch.bfloat16).view(torch.int16), zero_point.to(torch.int16)
    return qdata, torch.stack(words, dim=-1).squeeze(dim if dim >= 0 else dim - 1)


def unpack_metadata(metadata: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of int16 ``metadata`` (..., 2), each float32 (...)."""
    scale = metadata[..., METADATA_SCALE].view(torch.bfloat16).float()
    return scale, metadata[..., METADATA_ZERO_POINT].float()


def split_pages(states: Tensor) -> Tensor:
    """View (batch, num_kv_heads, T, head_dim) as pages (P, batch, num_kv_heads, page_size, head_dim)."""
    pages: Tensor = states.unflatten(2, (-1, PAGE_SIZE))
    return pages.permute(2, 0, 1, 3, 4)


def join_pages(pages: Tensor) -> Tensor:
    """Inverse of ``split_pages``: (batch, num_kv_heads, T, head_dim) from its pages."""
    return pages.permute(1, 2, 0, 3, 4).flatten(2, 3)


def select_rows(pages: Tensor, row_table: Tensor) -> Tensor:
    """Pages as the sequences of a batch read them.

    Args:
        pages: (P, rows, ...), one part of pages of which each has so many stored rows.
        row_table: integers (batch, P): the row of page p that sequence b reads.

    Returns:
        (P, batch, ...), in memory of its own.
    """
    return pages[torch.arange(len(pages), device=pages.device)[:, None], row_table.T.long()]


def quantize_key_pages(key_states: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise keys, one scale per channel of each page.

    Args:
        key_states: (batch, num_kv_heads, T, head_dim), any float dtype.

    Returns:
        qdata int8 (P, batch, num_kv_heads, page_size, head_dim) and metadata int16
        (P, batch, num_kv_heads, head_dim, 2); see ``quantize`` for the promise.
    """
    return quantize(split_pages(key_states), dim=-2)


def quantize_value_pages(value_states: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise values, one scale per token.

    Args:
        value_states: (batch, num_kv_heads, T, head_dim), any float dtype.

    Returns:
        qdata int8 (P, batch, num_kv_heads, page_size, head_dim) and metadata int16
        (P, batch, num_kv_heads, page_size, 2); see ``quantize`` for the promise.
    """
    return quantize(split_pages(value_states), dim=-1)


def saturate(states: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast float32 ``states`` to ``dtype``; what lies beyond its finite range becomes its largest finite value.

    A restored element may lie half a scale beyond the data, which near the top of float16 would otherwise read as inf.
    """
    limit = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    return states.clamp(-limit, limit).to(dtype)


def restore_key_pages(qdata: Tensor, metadata: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys of ``quantize_key_pages`` as (batch, num_kv_heads, T, head_dim) in ``dtype``."""
    scale, zero_point = unpack_metadata(metadata)
    return join_pages(saturate((qdata.float() - zero_point.unsqueeze(-2)) * scale.unsqueeze(-2), dtype))


def restore_value_pages(qdata: Tensor, metadata: Tensor, dtype: torch.dtype) -> Tensor:
    """Values of ``quantize_value_pages`` as (batch, num_kv_heads, T, head_dim) in ``dtype``."""
    scale, zero_point = unpack_metadata(metadata)
    return join_pages(saturate((qdata.float() - zero_point.unsqueeze(-1)) * scale.unsqueeze(-1), dtype))


def visible(query_len: int, kv_len: int, *, is_causal: bool, window: int | None, device: torch.device) -> Tensor:
    """Bool (query_len, kv_len): which keys each query may see by position alone.

    The last query sits on the last key, as in decoding: query ``i`` has the position ``kv_len - query_len + i``.

    Args:
        query_len: number of queries.
        kv_len: number of keys.
        is_causal: hide keys newer than the query.
        window: hide keys ``window`` or more positions older than the query; None for no limit.
        device: where to build it.
    """
    position = torch.arange(kv_len - query_len, kv_len, device=device)[:, None]
    key_position = torch.arange(kv_len, device=device)[None, :]
    allowed = torch.ones(query_len, kv_len, dtype=torch.bool, device=device)
    if is_causal:
        allowed = allowed & (key_position <= position)
    if window is not None:
        allowed = allowed & (position - key_position < window)
    return allowed


def attend(query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions = PLAIN) -> Tensor:
    """Attention over dense keys and values, in one softmax.

    logits = softmax_scale * query @ key^T, then softcap * tanh(logits / softcap), then masks, then softmax over the
    keys and, with ``sinks``, one more logit per head.

    Args:
        query: (batch, num_q_heads, query_len, head_dim); float64 computes in float64, any other dtype in float32.
        key: (batch, num_kv_heads, kv_len, head_dim); num_q_heads is a multiple of num_kv_heads.
        value: (batch, num_kv_heads, kv_len, v_head_dim).
        options: see ``AttentionOptions``; causality and windows are those of ``visible``.

    Returns:
        (batch, query_len, num_q_heads, v_head_dim) in the dtype of ``query``, contiguous. A query that may see no key
        and has no sink gets zeros.
    """
    attn_mask, is_causal, _, window, softcap, sinks = options
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    batch, num_q_heads, query_len, head_dim = query.shape
    num_kv_heads, kv_len = key.shape[1], key.shape[2]
    group = num_q_heads // num_kv_heads

    grouped = query.to(compute).reshape(batch, num_kv_heads, group * query_len, -1)
    logits = options.scale(head_dim) * (grouped @ key.to(compute).transpose(-1, -2))
    logits = logits.view(batch, num_q_heads, query_len, kv_len)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if is_causal or window is not None:
        allowed = visible(query_len, kv_len, is_causal=is_causal, window=window, device=query.device)
        logits = logits.masked_fill(~allowed, -torch.inf)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, -torch.inf)
        else:
            logits = logits + attn_mask.to(compute)

    peak = (
        logits.amax(dim=-1, keepdim=True) if kv_len else logits.new_full((batch, num_q_heads, query_len, 1), -torch.inf)
    )
    if sinks is not None:
        sink = sinks.to(compute).view(1, -1, 1, 1)
        peak = torch.maximum(peak, sink)
    # A row that sees nothing has the peak -inf; any finite one gives it weights of zero instead of NaN.
    peak = torch.where(peak == -torch.inf, 0.0, peak)
    weights = torch.exp(logits - peak)
    total = weights.sum(dim=-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sink - peak)
    weights = weights / torch.where(total == 0, 1.0, total)

    output = weights.view(batch, num_kv_heads, group * query_len, kv_len) @ value.to(compute)
    output = output.view(batch, num_q_heads, query_len, -1).transpose(1, 2)
    return output.to(query.dtype).contiguous()
