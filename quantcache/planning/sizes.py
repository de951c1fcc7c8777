"""Bytes that a cache takes: the arithmetic of the rooms ``store`` and ``layers``, without their tensors.

The tests compare every number with ``cache.nbytes``.
"""

from quantcache.planning.geometry import DTYPE_BYTES, STATE_BYTES, Geometry, LayerGeometry
from quantcache.quantization.scheme import (
    DEFAULT_RESIDUAL_LENGTH,
    PAGE_SIZE,
    SEGMENT_GROWTH,
    TAIL_STEP,
    WINDOW_SEGMENTS,
)

METADATA_BYTES = 4
"""A scale and a zero point, 16 bits each."""


def int8_nbytes(
    geometry: Geometry, batch: int, tokens: int, new_tokens: int = 0, residual_length: int = DEFAULT_RESIDUAL_LENGTH
) -> int:
    """Bytes of ``QuantizedInt8Cache(config)``, slack included.

    Args:
        geometry: of the model.
        batch: sequences.
        tokens: stored in the end.
        new_tokens: how many of them came one by one, after the rest had come in one call.
        residual_length: see the cache.
    """
    new_tokens = min(new_tokens, tokens - 1)
    total = 0
    for layer in geometry.layers:
        if layer.kind == "native":
            total += exact_layer_nbytes(layer, batch, tokens, geometry.dtype)
        elif tokens:
            keep_tokens = None if layer.window is None else layer.window - 1 + residual_length
            capacity, tail = _capacities(tokens - new_tokens, new_tokens, residual_length, keep_tokens)
            exact = layer.num_kv_heads * (layer.head_dim + layer.v_head_dim) * DTYPE_BYTES[geometry.dtype]
            total += batch * (capacity * page_nbytes(layer) + tail * exact)
    return total


def exact_nbytes(geometry: Geometry, batch: int, tokens: int, dtype: str | None = None) -> int:
    """Bytes of transformers' ``DynamicCache(config=config)`` in ``dtype`` (None: the model's)."""
    return sum(exact_layer_nbytes(layer, batch, tokens, dtype or geometry.dtype) for layer in geometry.layers)


def exact_layer_nbytes(layer: LayerGeometry, batch: int, tokens: int, dtype: str) -> int:
    """Bytes of one of transformers' layers, once a token has followed the prompt: a window is cut from a longer tensor,
    which stays in memory with one token more.
    """
    held = tokens if layer.window is None else min(tokens, layer.window)
    element = DTYPE_BYTES[dtype]
    keys_values = held * layer.num_kv_heads * (layer.head_dim + layer.v_head_dim) * element
    return batch * (keys_values + layer.conv_elements * element + layer.state_elements * STATE_BYTES)


def page_nbytes(layer: LayerGeometry) -> int:
    """Bytes of a closed page of one sequence."""
    codes = PAGE_SIZE * (layer.head_dim + layer.v_head_dim)
    return layer.num_kv_heads * (codes + METADATA_BYTES * (layer.head_dim + PAGE_SIZE))


def _capacities(prompt: int, new_tokens: int, residual_length: int, keep_tokens: int | None) -> tuple[int, int]:
    """Pages and tail tokens allocated after a prompt in one call and then single tokens."""
    closed = max(0, (prompt - residual_length) // PAGE_SIZE)
    tail = prompt - closed * PAGE_SIZE
    rings = 1 if keep_tokens is None else max(keep_tokens // PAGE_SIZE // WINDOW_SEGMENTS, 1)
    skipped = 0 if keep_tokens is None else min(max((prompt - keep_tokens) // PAGE_SIZE, 0), closed)
    held = closed - skipped
    segments = [held] * bool(held) if keep_tokens is None else [rings] * -(-held // rings)
    seen, first = prompt, skipped
    buffer = _rounded(tail)
    for _ in range(new_tokens // PAGE_SIZE + 1):
        # To the next token that closes a page, or to the end.
        step = min(PAGE_SIZE + residual_length - tail, prompt + new_tokens - seen)
        seen, tail = seen + step, tail + step
        if step:
            buffer = max(buffer, _rounded(tail))
        if tail < PAGE_SIZE + residual_length:
            break
        if sum(segments) == held:
            segments.append(rings if keep_tokens is not None else max(1, held // SEGMENT_GROWTH))
        held, tail = held + 1, tail - PAGE_SIZE
        buffer = _rounded(tail + 1)
        while keep_tokens is not None and segments and first + segments[0] <= (seen - keep_tokens) // PAGE_SIZE:
            first, held = first + segments[0], held - segments[0]
            segments.pop(0)
    return sum(segments), buffer


def _rounded(tokens: int) -> int:
    return -(-tokens // TAIL_STEP) * TAIL_STEP
