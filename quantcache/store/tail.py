"""The buffers of an exact tail that grows: keys and values (batch, num_kv_heads, capacity, head_dim)."""

from torch import Tensor

from quantcache.quantization.scheme import TAIL_STEP
from quantcache.store import writes
from quantcache.store.offloading import write_access


def write_tail(
    key_states: Tensor, value_states: Tensor, key_buffer: Tensor, value_buffer: Tensor, used: int, backend: str
) -> None:
    """Write new tokens behind the first ``used`` of the buffers."""
    with write_access(key_buffer):
        writes.append_tail(key_states, value_states, key_buffer, value_buffer, used, backend)


def roomier(key_buffer: Tensor, value_buffer: Tensor, used: int, tokens: int, backend: str) -> tuple[Tensor, Tensor]:
    """Larger buffers, for at least ``tokens`` tokens, that begin with the first ``used`` of these."""
    capacity = -(-tokens // TAIL_STEP) * TAIL_STEP
    key_made, value_made = (
        buffer.new_empty(*buffer.shape[:2], capacity, buffer.shape[3]) for buffer in (key_buffer, value_buffer)
    )
    if used:
        writes.append_tail(key_buffer[:, :, :used], value_buffer[:, :, :used], key_made, value_made, 0, backend)
    return key_made, value_made


def copied(key_states: Tensor, value_states: Tensor, backend: str = "torch") -> tuple[Tensor, Tensor]:
    """Buffers of their own for some tokens."""
    tokens = key_states.shape[2]
    return roomier(key_states, value_states, tokens, tokens, backend)
